"""Tasks at positions of the zig-zag schedule, with their slots and waits."""

from __future__ import annotations

from collections.abc import Sequence

from costmodel.plan.plan import Plan
from costmodel.pricing.buffers import NUM_BUFFERS, num_hidden_buffers, staging_kind
from costmodel.schedule.lookahead import Lookahead
from costmodel.schedule.positions import Position
from costmodel.schedule.tasks import Hazards, Resource, Task


class TaskMaker:
    """Makes and numbers tasks, and derives their waits from the resources that they use.

    Parameters
    ----------
    plan
        The layers, and the moves that the policy needs.
    num_batches, num_tokens
        Batches in the block; passes over the model, the first of which is prefill. ``None`` are
        passes without an end, which are all alike: prompts begin beside sequences that decode.
    batch_size, prompt_len
        Most sequences of a batch, and most tokens of their prompts; unless told, the policy's.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        num_batches: int,
        num_tokens: int | None,
        batch_size: int | None = None,
        prompt_len: int | None = None,
    ) -> None:
        self.plan = plan
        self.route = plan.route
        self.staging = [staging_kind(layer, experts=plan.expert_staging) for layer in plan.layers]
        self.kinds = [layer.kind for layer in plan.layers]
        self.batches_at_once = min(plan.batches_at_once, num_batches)
        self.num_batches = num_batches
        self.batch_size = batch_size or plan.policy.gpu_batch_size
        self.prompt_len = prompt_len or plan.policy.workload.prompt_len
        self.num_tokens = num_tokens
        self.reads, self.sends = (
            Lookahead(plan, layers, num_batches=num_batches, num_tokens=num_tokens)
            for layers in (self.route.disk_weights, self.route.sent_weights)
        )
        self.num_pieces = self.reads.num_pieces
        self._hazards = Hazards()
        self._count = 0
        self.first_head = self.kinds.index("head")
        self._scores_prompts = plan.policy.workload.scores_prompts

    def decodes(self, here: Position) -> bool:
        """Whether any sequence decodes in the pass of a position."""
        return self.num_tokens is None or here.token > 0

    def takes_hidden(self, here: Position) -> bool:
        """Whether a layer computes with hidden states. The first chunk of the head keeps what the
        others need, unless all tokens of the prompts are scored."""
        is_scored = here.is_prefill and self._scores_prompts
        return here.layer > 0 and (here.layer <= self.first_head or is_scored)

    def attends(self, here: Position) -> bool:
        """Whether the layer of a position has attention."""
        return self.kinds[here.layer] in ("decoder", "attention")

    def is_last_batch(self, here: Position) -> bool:
        """Whether the batches of a position are the last of the block."""
        return here.batches.stop == self.num_batches

    def is_split(self, here: Position) -> bool:
        """Whether the layer is split, because the CPU attends to a part of the cache."""
        return self.decodes(here) and self.attends(here) and self.route.attends_on_cpu

    def is_in_place(self, here: Position) -> bool:
        """Whether the CPU multiplies some of the layer's experts in place."""
        return self.decodes(here) and here.layer in self.route.experts_in_place

    def walks(self, layer: int) -> bool:
        """Whether the experts of a layer are loaded and computed in chunks."""
        return self.plan.walks_experts and layer in self.route.demanding

    def make(
        self,
        kind: str,
        channel: str,
        here: Position,
        *,
        reads: Sequence[Resource] = (),
        writes: Sequence[Resource] = (),
    ) -> Task:
        """Make a task of a position.

        Tasks of one channel run in the order in which they are made.
        """
        waits = self._hazards.waits(self._count, channel, reads, writes)
        task = Task(
            index=self._count,
            kind=kind,
            channel=channel,
            token=here.token,
            layer=here.layer,
            batch=here.batch,
            slot=self.cache_slot(here),
            hidden_slot=self.hidden_slot(here),
            read_slot=self.reads.slot(here.token, here.layer),
            sent_slot=self.sends.slot(here.token, here.layer),
            waits=waits,
        )
        self._count += 1
        return task

    def weights_read(self, here: Position) -> list[Resource]:
        """Return all loaded pieces of the weights that a position computes with."""
        piece = self.piece_sent if self.route.has_gpu else self.piece_on_cpu
        staged = self.route.sent_weights if self.route.has_gpu else self.route.disk_weights
        pieces = range(self.num_pieces) if here.layer in staged else range(0)
        return [piece(here, number) for number in pieces]

    def piece_on_cpu(self, here: Position, number: int) -> Resource:
        """Return the CPU staging of one piece of a layer's weights on disk."""
        slot = self.reads.slot(here.token, here.layer)
        return ("weights", "cpu", self.staging[here.layer], slot, number)

    def piece_sent(self, here: Position, number: int) -> Resource:
        """Return the GPU staging of one piece of a layer's weights off the GPU."""
        slot = self.sends.slot(here.token, here.layer)
        return ("weights", "gpu", self.staging[here.layer], slot, number)

    def hidden_slot(self, here: Position) -> int:
        """Return the buffer that stages the hidden states of a position."""
        return here.step % num_hidden_buffers(has_gpu=self.route.has_gpu)

    def cache_slot(self, here: Position) -> int:
        """Return the buffer that stages the cache of a position.

        Positions take turns. Where caches of lanes are on disk, those layers do, and -1 stands for
        a layer whose cache is attended to where it is stored.
        """
        staged = self.route.staged_caches
        if not staged:
            return here.slot
        if here.layer not in staged:
            return -1
        return (here.token * len(staged) + staged.index(here.layer)) % NUM_BUFFERS

    def cache_staging(self, here: Position) -> Resource:
        """Return the buffer that a position's cache is computed in."""
        return ("cache staging", "gpu" if self.route.has_gpu else "cpu", self.cache_slot(here))

    def hidden_staging(self, here: Position) -> Resource:
        """Return the buffer that a position's hidden states are computed in."""
        tier = "gpu" if self.route.has_gpu else "cpu"
        return ("hidden staging", tier, self.hidden_slot(here))
