"""What every kind of task touches, told apart from the schedule, and a tracker of collisions.

The schedule derives its waits from its own lists of reads and writes. This table is written from
what the kinds of tasks are for, so that an omission there shows here.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from costmodel.model.layout import LayerLayout
from costmodel.plan.cuts import cache_spec, cut_cache, cut_hidden, place_weights
from costmodel.plan.plan import Plan
from costmodel.plan.policy import Policy
from costmodel.pricing.buffers import Chunks
from costmodel.schedule.tasks import Task

Content = Hashable
# Buffer, the content that a task must find there (None: anything), what it leaves (None: the same).
Access = tuple[Hashable, Content | None, Content | None]


@dataclass(frozen=True, slots=True)
class Span:
    """When a task ran."""

    task: Task
    start_s: float
    end_s: float


def simulate(tasks: Sequence[Task], duration_s: Callable[[Task], float]) -> list[Span]:
    """Run tasks as early as their channel's order and their waits allow."""
    free_s: dict[str, float] = defaultdict(float)
    spans: list[Span] = []
    for task in tasks:
        start_s = max([free_s[task.channel], *(spans[i].end_s for i in task.waits)])
        spans.append(Span(task, start_s, start_s + duration_s(task)))
        free_s[task.channel] = spans[-1].end_s
    return spans


def random_durations(rng: random.Random) -> Callable[[Task], float]:
    """Draw durations over three decades, with every channel fast or slow as a whole."""
    pace: dict[str, float] = defaultdict(lambda: 10 ** rng.uniform(-1.5, 1.5))
    return lambda task: float(pace[task.channel] * 10 ** rng.uniform(-1, 1))


class BlockMemory:
    """Where the bytes of a policy's block lie, and who touches them."""

    def __init__(
        self,
        policy: Policy,
        layers: Sequence[LayerLayout],
        *,
        has_gpu: bool,
        batch_size: int | None = None,
        prompt_len: int | None = None,
    ) -> None:
        self.has_gpu = has_gpu
        self.batch_size = batch_size or policy.gpu_batch_size
        self.prompt_len = prompt_len or policy.workload.prompt_len
        self.compute_tier = "gpu" if has_gpu else "cpu"
        self.plan = Plan.of(policy, has_gpu=has_gpu)
        self.num_batches = policy.num_gpu_batches
        self.num_pieces = max(2, policy.num_gpu_batches)
        self.first_head = [layer.kind for layer in layers].index("head")
        self.kinds = [layer.kind for layer in layers]
        # Experts that decode does not load ahead leave other buffers to the head.
        self.is_apart = has_gpu and (policy.loads_on_demand or policy.cpu_experts > 0)
        # A CPU loads experts on demand in chunks, whose places are not those of other weights.
        self.in_chunks = policy.loads_on_demand and not has_gpu
        placed = place_weights(policy, has_gpu=has_gpu)
        parts = [(i, part.layout.name, part.cut) for i, of in enumerate(placed) for part in of]
        off_device = [
            (i, name)
            for i, name, cut in parts
            if (cut.off_gpu_bytes if has_gpu else cut.disk_bytes) and i > 0
        ]
        # Layers whose experts come when the router has chosen them: beside a GPU, in decode.
        self.demanding = {
            i for i, name in off_device if name == "experts" and policy.loads_on_demand
        }
        # The embedding is gathered, never loaded.
        self.disk_layers = {
            i
            for i, name, cut in parts
            if cut.disk_bytes and i > 0 and not (self.in_chunks and name == "experts")
        }
        self.moved_layers = {
            i for i, name in off_device if not (self.in_chunks and name == "experts")
        }
        self.in_place = {part.layer for of in placed for part in of if part.bytes_in_place}
        # All layers of these models keep the same.
        (cache,) = {cache_spec(policy, kind) for kind in policy.model.layer_kinds}
        segments = cut_cache(policy, cache, policy.gpu_batch_size, has_gpu=has_gpu)
        self.rows = {(s.home, s.attended) for s in segments}
        disk_end, cpu_end = cut_hidden(policy, policy.gpu_batch_size)
        self.hidden_on_disk = disk_end > 0
        self.hidden_on_cpu = has_gpu and cpu_end > disk_end
        self.hidden_moves = self.hidden_on_disk or self.hidden_on_cpu
        self.scores_prompts = policy.workload.prompt_logprobs is not None

    def accesses(self, task: Task) -> Iterator[Access]:
        """Yield what a task touches, in the order in which it does."""
        yield from getattr(self, f"_{task.kind}")(task)

    def _read_weights(self, task: Task) -> Iterator[Access]:
        yield self._read_piece(task), None, (task.token, task.layer)

    def _send_weights(self, task: Task) -> Iterator[Access]:
        content = (task.token, task.layer)
        if task.layer in self.disk_layers:
            yield self._read_piece(task), content, None
        yield self._device_piece(task, task.batch), None, content

    def _read_experts(self, task: Task) -> Iterator[Access]:
        if self.is_ahead(task):
            yield ("expert places", task.layer), task.token - 1 if task.token else None, None
        else:
            yield ("routing", task.layer), (task.token, task.layer), None
        if self.in_chunks:
            yield self._chunk(task), None, (task.token, task.layer, task.batch)
            return
        buffer = self._read_piece(task)
        yield buffer, (task.token, task.layer), (task.token, task.layer, "experts")

    def _send_experts(self, task: Task) -> Iterator[Access]:
        yield ("routing", task.layer), (task.token, task.layer), None
        content = (task.token, task.layer, "experts")
        if task.layer in self.disk_layers:
            yield self._read_piece(task), content, None
        yield (
            self._device_piece(task, task.batch),
            (task.token, task.layer),
            content,
        )

    def _weights(self, task: Task, *, before_experts: bool = False) -> Iterator[Access]:
        content: Content = (task.token, task.layer)
        is_late = task.layer in self.demanding and task.token > 0 and not self.in_chunks
        if is_late and not before_experts:
            content = (task.token, task.layer, "experts")
        if task.layer in self.moved_layers:
            for piece in range(self.num_pieces):
                buffer = self._device_piece(task, piece)
                yield buffer, content, None

    def _read_piece(self, task: Task) -> Hashable:
        slot = self._slot(task, self.disk_layers)
        assert task.read_slot == slot
        return ("weights", "cpu", self._staging(task.layer), slot, task.batch)

    def _device_piece(self, task: Task, piece: int) -> Hashable:
        """Loaded layers take turns in the buffers of the device that computes."""
        slot = self._slot(task, self.moved_layers)
        assert (task.sent_slot if self.has_gpu else task.read_slot) == slot
        return ("weights", self.compute_tier, self._staging(task.layer), slot, piece)

    def _staging(self, layer: int) -> str:
        """Attention has buffers of its own."""
        kind = self.kinds[layer]
        return kind if kind == "attention" or (kind == "experts" and self.is_apart) else "layers"

    def _slot(self, task: Task, loaded: set[int]) -> int:
        """Number the loads of layers over all passes: they take turns in two buffers."""
        kind = self._staging(task.layer)
        turns = [i for i in sorted(loaded) if self._staging(i) == kind]
        turn = task.token * len(turns) + turns.index(task.layer)
        return turn % 2

    def is_ahead(self, task: Task) -> bool:
        """Whether a chunk of experts is read before its tokens are routed."""
        if task.kind != "read_experts" or not self.in_chunks:
            return False
        return task.batch < self._chunks(task).ahead

    def _chunk(self, task: Task) -> Hashable:
        """Chunks take turns in places that all layers share."""
        return ("staged experts", task.batch % self._chunks(task).staged)

    def _chunks(self, task: Task) -> Chunks:
        tokens = self.batch_size * (self.prompt_len if task.is_prefill else 1)
        return self.plan.chunks(task.layer, self.num_batches, tokens)

    def _disk_rows(self) -> Iterator[str]:
        """Places of attention of the rows on disk: they have staging of their own."""
        return (place for home, place in sorted(self.rows) if home == "disk")

    def _read_cache(self, task: Task) -> Iterator[Access]:
        yield ("cache", "disk", task.layer, task.batch), task.token - 1, None
        for place in self._disk_rows():
            yield ("cache staging", "cpu", place, task.slot), None, ("in", *_at(task))

    def _write_cache(self, task: Task) -> Iterator[Access]:
        for place in self._disk_rows():
            yield ("cache staging", "cpu", place, task.slot), ("out", *_at(task)), None
        yield ("cache", "disk", task.layer, task.batch), None, task.token

    def _send_cache(self, task: Task) -> Iterator[Access]:
        if ("disk", "gpu") in self.rows:
            yield ("cache staging", "cpu", "gpu", task.slot), ("in", *_at(task)), None
        if ("cpu", "gpu") in self.rows:
            yield ("cache", "cpu", "gpu", task.layer, task.batch), task.token - 1, None
        yield ("cache staging", "gpu", task.slot), None, ("in", *_at(task))

    def _return_cache(self, task: Task) -> Iterator[Access]:
        yield ("cache staging", "gpu", task.slot), ("out", *_at(task)), None
        for home, place in sorted(self.rows - {("gpu", "gpu")}):
            if place == "cpu" and not task.is_prefill:
                continue
            if home == "disk":
                yield ("cache staging", "cpu", place, task.slot), None, ("out", *_at(task))
            else:
                yield ("cache", "cpu", place, task.layer, task.batch), None, task.token

    def _append_on_gpu(self, task: Task) -> Iterator[Access]:
        """New rows of what lies off the GPU go into its staging."""
        buffer = ("cache staging", "gpu", task.slot)
        if task.is_prefill and self.rows - {("gpu", "gpu")}:
            yield buffer, None, ("out", *_at(task))
        elif {("cpu", "gpu"), ("disk", "gpu")} & self.rows:
            yield buffer, ("in", *_at(task)), ("out", *_at(task))

    def _append_on_cpu(self, task: Task) -> Iterator[Access]:
        found = None if task.is_prefill else ("in", *_at(task))
        if ("disk", "cpu") in self.rows:
            yield ("cache staging", "cpu", "cpu", task.slot), found, ("out", *_at(task))
        if ("cpu", "cpu") in self.rows:
            before = None if task.is_prefill else task.token - 1
            yield ("cache", "cpu", "cpu", task.layer, task.batch), before, task.token

    def _read_hidden(self, task: Task) -> Iterator[Access]:
        yield ("hidden", "disk", task.batch), self._made_before(task), None
        yield ("hidden staging", "cpu", task.hidden_slot), None, ("in", *_at(task))

    def _made_before(self, task: Task) -> tuple[int, int]:
        """Chunks of the head all take what the last decoder layer made."""
        return task.token, min(task.layer, self.first_head) - 1

    def _write_hidden(self, task: Task) -> Iterator[Access]:
        yield ("hidden staging", "cpu", task.hidden_slot), ("out", *_at(task)), None
        yield ("hidden", "disk", task.batch), None, (task.token, task.layer)

    def _send_hidden(self, task: Task) -> Iterator[Access]:
        if self.hidden_on_cpu:
            yield ("hidden", "cpu", task.batch), self._made_before(task), None
        if self.hidden_on_disk:
            yield ("hidden staging", "cpu", task.hidden_slot), ("in", *_at(task)), None
        yield ("hidden staging", "gpu", task.hidden_slot), None, ("in", *_at(task))

    def _return_hidden(self, task: Task) -> Iterator[Access]:
        yield ("hidden staging", "gpu", task.hidden_slot), ("out", *_at(task)), None
        if self.hidden_on_cpu:
            yield ("hidden", "cpu", task.batch), None, (task.token, task.layer)
        if self.hidden_on_disk:
            yield ("hidden staging", "cpu", task.hidden_slot), None, ("out", *_at(task))

    def _hidden(self, task: Task, *, ends: bool) -> Iterator[Access]:
        """A layer takes its hidden states out of staging and puts its own there."""
        is_scored = task.is_prefill and self.scores_prompts
        if self.hidden_moves and (task.layer <= self.first_head or is_scored):
            found = None if task.layer == 0 else ("in", *_at(task))
            left = ("out", *_at(task)) if ends and task.layer < self.first_head else None
            yield ("hidden staging", self.compute_tier, task.hidden_slot), found, left

    def _compute(self, task: Task) -> Iterator[Access]:
        yield from self._weights(task)
        if self.kinds[task.layer] in ("decoder", "attention"):
            append = self._append_on_gpu if self.has_gpu else self._append_on_cpu
            yield from append(task)
        goes_on = task.token > 0 and task.layer in self.in_place
        yield from self._hidden(task, ends=not goes_on)
        if goes_on:
            yield ("made", "here"), None, (task.token, task.layer)
        if self.in_chunks and task.layer in self.demanding:
            # An expert that was loaded may have taken the place of another.
            yield ("expert places", task.layer), None, task.token

    def _route(self, task: Task) -> Iterator[Access]:
        yield from self._weights(task, before_experts=True)
        yield from self._hidden(task, ends=False)
        yield ("routing", task.layer), None, (task.token, task.layer)

    def _run_chunk(self, task: Task) -> Iterator[Access]:
        yield ("routing", task.layer), (task.token, task.layer), None
        yield self._chunk(task), (task.token, task.layer, task.batch), None

    def _return_tokens(self, task: Task) -> Iterator[Access]:
        yield ("routing", task.layer), (task.token, task.layer), None
        yield ("tokens", task.layer), None, (task.token, task.layer)

    def _run_experts(self, task: Task) -> Iterator[Access]:
        yield ("tokens", task.layer), (task.token, task.layer), None
        yield ("made", "cpu", task.layer), None, (task.token, task.layer)

    def _send_made(self, task: Task) -> Iterator[Access]:
        yield ("made", "cpu", task.layer), (task.token, task.layer), None
        yield ("made", "gpu", task.layer), None, (task.token, task.layer)

    def _combine(self, task: Task) -> Iterator[Access]:
        # What both made may pass through a norm of the layer.
        yield from self._weights(task)
        yield ("made", "here"), (task.token, task.layer), None
        yield ("made", "gpu", task.layer), (task.token, task.layer), None
        yield from self._hidden(task, ends=True)

    def _project(self, task: Task) -> Iterator[Access]:
        yield from self._weights(task)
        yield from self._hidden(task, ends=False)
        yield from self._append_on_gpu(task)
        yield ("projected", "gpu", task.slot), None, _at(task)
        yield ("attended", "gpu", task.slot), None, ("in part", *_at(task))

    def _return_queries(self, task: Task) -> Iterator[Access]:
        yield ("projected", "gpu", task.slot), _at(task), None
        yield ("projected", "cpu", task.slot), None, _at(task)

    def _attend(self, task: Task) -> Iterator[Access]:
        yield ("projected", "cpu", task.slot), _at(task), None
        yield from self._append_on_cpu(task)
        yield ("attended", "cpu", task.slot), None, _at(task)

    def _send_attended(self, task: Task) -> Iterator[Access]:
        yield ("attended", "cpu", task.slot), _at(task), None
        yield ("attended", "gpu", task.slot), ("in part", *_at(task)), _at(task)

    def _finish(self, task: Task) -> Iterator[Access]:
        yield from self._weights(task)
        yield ("attended", "gpu", task.slot), _at(task), None
        yield from self._hidden(task, ends=True)


def _at(task: Task) -> tuple[int, int, int]:
    return task.token, task.layer, task.batch


def find_hazards(spans: Sequence[Span], memory: BlockMemory) -> list[str]:
    """Find tasks that meet in a buffer while one writes, or that find the wrong content there."""
    touched: dict[Hashable, list[tuple[Span, Content | None, Content | None]]] = defaultdict(list)
    for span in spans:
        for buffer, found, left in memory.accesses(span.task):
            touched[buffer].append((span, found, left))
    hazards = []
    for buffer, accesses in touched.items():
        accesses.sort(key=lambda access: (access[0].start_s, access[0].task.index))
        content: Content | None = None
        read_until_s = written_until_s = 0.0
        for span, found, left in accesses:
            if span.start_s < (
                written_until_s if left is None else max(read_until_s, written_until_s)
            ):
                hazards.append(f"{span.task} comes too early to {buffer}")
            if found is not None and content != found:
                hazards.append(f"{span.task} finds {content} in {buffer} instead of {found}")
            if left is not None:
                content = left
                written_until_s = max(written_until_s, span.end_s)
            read_until_s = max(read_until_s, span.end_s)
    return hazards
