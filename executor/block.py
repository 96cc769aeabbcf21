"""One block of sequences: its state, and what each kind of task does to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from costmodel.layout import OPT_POSITION_OFFSET
from costmodel.memory import LOGIT_BYTES, NUM_BUFFERS
from costmodel.policy import Policy
from costmodel.schedule import num_weight_pieces
from costmodel.tasks import Task
from executor import layers
from executor.activations import HiddenStates
from executor.attention import prefill_attention
from executor.batch import Batch
from executor.embedding import EmbeddingTable
from executor.engine import Handler
from executor.families import DecoderConfig
from executor.kv_cache import KVCache
from executor.machine import Machine
from executor.sampling import Chooser
from executor.weights import WeightStore
from profiles import kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Stores:
    """Everything that a block computes with."""

    weights: WeightStore
    tokens: EmbeddingTable
    positions: EmbeddingTable | None
    cache: KVCache
    hidden: HiddenStates


class Block:
    """The state of one block and the handlers of its tasks.

    Every buffer that the handlers write is either this block's own or ordered by the schedule.
    """

    def __init__(
        self,
        policy: Policy,
        config: DecoderConfig,
        machine: Machine,
        stores: Stores,
        sampler: Chooser,
        eos_ids: frozenset[int],
    ) -> None:
        self.policy = policy
        self.spec = policy.model
        self.config = config
        self.device = machine.compute.device
        self.stores = stores
        self.sampler = sampler
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.int64)
        self.batches: list[Batch] = []
        # By place, for each batch the tokens of each prompt, int32 [batch]: copied once a block.
        self._lengths: dict[str, list[torch.Tensor]] = {}
        self.kinds = [layer.kind for layer in stores.weights.layers]
        self._last_layer = len(self.kinds) - 1
        self._head_inputs: dict[int, torch.Tensor] = {}
        # Kept over the tokens: in the heap, whatever small outlives a token lands where they were,
        # and the next ones lie behind it. Where the head has one chunk, batches take turns.
        count = policy.num_gpu_batches if self.kinds.count("head") > 1 else 1
        shape = count, policy.gpu_batch_size, self.spec.vocab_size
        raw = machine.compute.allocate("logits", math.prod(shape) * LOGIT_BYTES)
        self._logits = raw.view(torch.float32).view(shape)
        # What passes between the GPU and the CPU's attention, by staging slot.
        self._projected: list[tuple[torch.Tensor, ...]] = [()] * NUM_BUFFERS
        self._returned: list[tuple[torch.Tensor, ...]] = [()] * NUM_BUFFERS
        self._attended: list[list[tuple[slice, torch.Tensor]]] = [[] for _ in range(NUM_BUFFERS)]
        self._outputs: list[torch.Tensor | None] = [None] * NUM_BUFFERS

    def start(self, batches: list[Batch]) -> None:
        """Take up a new block."""
        self.batches = batches
        self._lengths = {
            place: [batch.lengths.to(device, torch.int32) for batch in batches]
            for place, device in (("cpu", torch.device("cpu")), ("gpu", self.device))
        }
        sizes = [len(batch) for batch in batches]
        prompt_len = batches[0].prompt_ids.shape[1]
        self.stores.weights.num_pieces = num_weight_pieces(len(batches))
        self.stores.cache.start_block(sizes, prompt_len)
        self.stores.hidden.start_block(sizes, prompt_len)

    @property
    def is_finished(self) -> bool:
        """Whether every sequence has met an end-of-sequence token."""
        return all(bool(batch.is_finished.all()) for batch in self.batches)

    def handlers(self) -> Mapping[str, Handler]:
        """Return what to do for each kind of task."""
        stores = self.stores
        return {
            "read_weights": stores.weights.read,
            "send_weights": stores.weights.send,
            "read_cache": stores.cache.read,
            "send_cache": stores.cache.send,
            "return_cache": stores.cache.bring_back,
            "write_cache": stores.cache.write,
            "read_hidden": stores.hidden.read,
            "send_hidden": stores.hidden.send,
            "return_hidden": stores.hidden.bring_back,
            "write_hidden": stores.hidden.write,
            "compute": self.compute,
            "project": self.project,
            "return_queries": self.return_queries,
            "attend": self.attend,
            "send_attended": self.send_attended,
            "finish": self.finish,
        }

    def compute(self, task: Task) -> int:
        """Run one layer for one batch, whole."""
        kind = self.kinds[task.layer]
        if kind == "head":
            self._compute_head(task)
            return 0
        hidden = self.stores.hidden.gather(task)
        if kind == "embed":
            self._embed(task, hidden)
        elif task.is_prefill:
            self._prefill(task, hidden)
        else:
            self._decode(task, hidden)
        self.stores.hidden.hand_back(task)
        return 0

    def project(self, task: Task) -> int:
        """Make queries, keys and values, and attend to what lies on the GPU."""
        hidden = self.stores.hidden.gather(task)
        q, k, v = self._project(task, hidden, slice(None))
        self._projected[task.slot] = (q, k, v)
        out = self._empty_rows(q)
        self._attend_rows(task, "gpu", (q, k, v), out)
        self._outputs[task.slot] = out
        return 0

    def return_queries(self, task: Task) -> int:
        """Copy queries, keys and values to the CPU, from the first sequence attended there on."""
        first = self._first_on_cpu(task)
        down = tuple(t[first:].to("cpu", non_blocking=True) for t in self._projected[task.slot])
        self._returned[task.slot] = down
        return sum(t.numel() * t.element_size() for t in down)

    def attend(self, task: Task) -> int:
        """Attend on the CPU to what lies in its memory."""
        # Pinned memory is sent at the link's rate, and without holding up who sends it.
        out = self._empty_rows(self._returned[task.slot][0], pins=self.device.type == "cuda")
        first = self._first_on_cpu(task)
        self._attended[task.slot] = self._attend_rows(
            task, "cpu", self._returned[task.slot], out, first
        )
        return 0

    def send_attended(self, task: Task) -> int:
        """Copy what the CPU attended to the GPU."""
        up = [(r, part.to(self.device, non_blocking=True)) for r, part in self._attended[task.slot]]
        self._attended[task.slot] = up
        return sum(part.numel() * part.element_size() for _, part in up)

    def finish(self, task: Task) -> int:
        """Put the attended rows together and run the rest of the layer."""
        out = self._outputs[task.slot]
        assert out is not None
        for rows, part in self._attended[task.slot]:
            out[rows] = part
        hidden = self.stores.hidden.gather(task)
        self._finish(task, hidden, out.view(len(hidden), 1, -1))
        self.stores.hidden.hand_back(task)
        return 0

    def _first_on_cpu(self, task: Task) -> int:
        """Return the first sequence of a batch that has a row attended on the CPU."""
        return self.stores.cache.first_row_attended_at(task, "cpu") // self.spec.num_kv_heads

    def _empty_rows(self, q: torch.Tensor, *, pins: bool = False) -> torch.Tensor:
        shape = len(q) * self.spec.num_kv_heads, self.spec.group_size, self.spec.head_dim
        return q.new_empty(shape, pin_memory=pins)

    def _weights(self, task: Task) -> layers.LayerWeights:
        return self.stores.weights.layer(task)

    def _embed(self, task: Task, hidden: torch.Tensor) -> None:
        batch = self.batches[task.batch]
        step = self.policy.prefill_batch_size if task.is_prefill else len(batch)
        ids, positions = batch.token_ids(task.token), self._positions(task, "cpu")
        for first in range(0, len(batch), step):
            part = slice(first, first + step)
            hidden[part] = self.stores.tokens.gather(ids[part])
            if self.stores.positions is not None:
                # Prompts all begin at the first position.
                wanted = positions[:1] if task.is_prefill else positions[part]
                hidden[part] += self.stores.positions.gather(wanted + OPT_POSITION_OFFSET)

    def _prefill(self, task: Task, hidden: torch.Tensor) -> None:
        for first in range(0, len(hidden), self.policy.prefill_batch_size):
            part = slice(first, first + self.policy.prefill_batch_size)
            q, k, v = self._project(task, hidden[part], part)
            self.stores.cache.write_prompt(task, first, k, v)
            attended = prefill_attention(q, k, v)
            del q, k, v
            if self.kinds[task.layer + 1] != "head":
                self._finish(task, hidden[part], attended)
                continue
            # Of the last layer, the head takes each prompt's last token alone.
            last = self._last_tokens(task)[part]
            rows = torch.arange(len(last), device=last.device)
            picked = hidden[part][rows, last][:, None]
            self._finish(task, picked, attended[rows, last][:, None])
            hidden[part][rows, last] = picked[:, 0]

    def _decode(self, task: Task, hidden: torch.Tensor) -> None:
        projected = self._project(task, hidden, slice(None))
        out = self._empty_rows(projected[0])
        # Without a GPU, everything is attended on the CPU, which computes.
        for place in ("gpu", "cpu"):
            self._attend_rows(task, place, projected, out)
        self._finish(task, hidden, out.view(len(hidden), 1, -1))

    def _project(
        self, task: Task, hidden: torch.Tensor, sequences: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        positions = self._positions(task, "gpu")[sequences]
        return layers.project_qkv(hidden, self._weights(task), positions, self.spec, self.config)

    def _positions(self, task: Task, place: str) -> torch.Tensor:
        """Return the positions of the tokens of this pass: [batch, tokens], on a place's device."""
        lengths = self._lengths[place][task.batch]
        if not task.is_prefill:
            return lengths[:, None].long() + (task.token - 1)
        num_tokens = self.batches[task.batch].prompt_ids.shape[1]
        return torch.arange(num_tokens, device=lengths.device).expand(len(lengths), -1)

    def _finish(self, task: Task, hidden: torch.Tensor, attended: torch.Tensor) -> None:
        layers.finish_layer(hidden, attended, self._weights(task), self.spec, self.config)

    def _attend_rows(
        self,
        task: Task,
        place: str,
        projected: Sequence[torch.Tensor],
        out: torch.Tensor,
        first_sequence: int = 0,
    ) -> list[tuple[slice, torch.Tensor]]:
        """Append the new token to each segment attended at ``place`` and attend to it.

        ``projected`` are queries [sequences, 1, heads, head_dim], keys and values of the batch from
        ``first_sequence`` on; ``out`` is [rows, group, head_dim], of the same sequences. Returns
        which of the batch's rows were filled, each with its part of ``out``.
        """
        q, k, v = projected
        k, v = k.flatten(0, 2), v.flatten(0, 2)
        batch = self.batches[task.batch]
        lengths = self._lengths[place][task.batch] if batch.is_padded else None
        filled = []
        if lengths is not None:
            lengths = lengths[first_sequence:]
        before = first_sequence * self.spec.num_kv_heads
        for segment, context in self.stores.cache.attended_at(task, place):
            rows = slice(segment.first_row - before, segment.end_row - before)
            self.stores.cache.append(context, k[rows], v[rows])
            kernels.decode_attention(
                q[:, 0], context, out[rows], first_row=rows.start,
                lengths=lengths, prompt_len=batch.prompt_ids.shape[1],
                packing=self.stores.cache.packing, sparsity=self.policy.attention_sparsity,
                value_sums=self.stores.cache.value_sums(task, segment), begins=task.token == 1,
            )  # fmt: skip
            filled.append((slice(segment.first_row, segment.end_row), out[rows]))
        return filled

    def _compute_head(self, task: Task) -> None:
        batch, weights = self.batches[task.batch], self._weights(task)
        if self.kinds[task.layer - 1] != "head":
            hidden = self.stores.hidden.gather(task)
            last = self._last_tokens(task)
            picked = hidden[torch.arange(len(batch), device=last.device), last]
            self._head_inputs[task.batch] = layers.final_norm(picked, weights, self.config)
        logits = self._logits[task.batch % len(self._logits), : len(batch)]
        chunks = weights["head.weight"]
        first = self.stores.weights.layers[task.layer].first_row
        for chunk in chunks:
            columns = slice(first, first + chunk.shape[0])
            logits[:, columns] = layers.linear(self._head_inputs[task.batch], [chunk])
            first += chunk.shape[0]
        if task.layer == self._last_layer:
            del self._head_inputs[task.batch]
            self._choose(task, batch, logits)

    def _last_tokens(self, task: Task) -> torch.Tensor:
        """Return the index of each sequence's last token in this pass: int64 [batch]."""
        lengths = self._lengths["gpu"][task.batch]
        return lengths.long() - 1 if task.is_prefill else torch.zeros_like(lengths).long()

    def _choose(self, task: Task, batch: Batch, logits: torch.Tensor) -> None:
        ids = self.sampler.sample(logits, batch.sequence_ids, task.token).cpu()
        batch.generated[:, task.token] = ids
        batch.is_finished |= torch.isin(ids, self.eos_ids)
