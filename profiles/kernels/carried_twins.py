"""Attention that is cut between two calls, in plain torch (see ``prefix_attention``)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from profiles.kernels.groups import unpack_rows
from profiles.packing import Packing

# From the end of what is carried: parts of the total, the largest score, whether there is any.
_TOTAL, _LARGEST, _IS_THERE = -32, -16, -15


@dataclass(frozen=True, slots=True, kw_only=True)
class Attended:
    """What queries have attended to so far, float32: ``sums`` of values [rows, group, value_dim],
    the ``total`` of the shares and the ``largest`` score, [rows, group]."""

    sums: torch.Tensor
    total: torch.Tensor
    largest: torch.Tensor

    @classmethod
    def nothing(cls, sums: torch.Tensor, sinks: torch.Tensor | None) -> Attended:
        """Return what is there before any token, ``sums`` being zeros: sinks [heads], if any."""
        if sinks is not None:
            largest = sinks.view(sums.shape[:2])
            return cls(sums=sums, total=torch.ones_like(largest), largest=largest)
        total = sums.new_zeros(sums.shape[:2])
        return cls(sums=sums, total=total, largest=torch.full_like(total, -torch.inf))

    @classmethod
    def loaded(cls, kept: torch.Tensor, value_dim: int, sinks: torch.Tensor | None) -> Attended:
        """Return what was stored in ``kept`` [rows, group, width], which may be nothing."""
        is_there = kept[..., _IS_THERE] != 0
        nothing = cls.nothing(kept[..., :value_dim], sinks)
        return cls(
            sums=nothing.sums,
            total=torch.where(is_there, kept[..., _TOTAL:_LARGEST].sum(-1), nothing.total),
            largest=torch.where(is_there, kept[..., _LARGEST], nothing.largest),
        )

    def store(self, kept: torch.Tensor) -> None:
        """Store this in ``kept`` [rows, group, width]."""
        kept.zero_()
        kept[..., : self.sums.shape[-1]] = self.sums
        kept[..., _TOTAL], kept[..., _LARGEST], kept[..., _IS_THERE] = self.total, self.largest, 1

    def merged(self, other: Attended) -> Attended:
        """Return both together."""
        largest = torch.maximum(self.largest, other.largest)
        left, right = (self.largest - largest).exp(), (other.largest - largest).exp()
        return Attended(
            sums=self.sums * left[..., None] + other.sums * right[..., None],
            total=self.total * left + other.total * right,
            largest=largest,
        )

    @property
    def mean(self) -> torch.Tensor:
        """The result of attention, [rows, group, value_dim]."""
        return self.sums / self.total[..., None]


def attend(
    queries: torch.Tensor,
    context: torch.Tensor,
    *,
    void: torch.Tensor | None,
    value_dim: int,
    scale: float,
    soft_cap: float | None,
    packing: Packing | None,
) -> Attended:
    """Attend with [rows, group, head_dim] to the tokens of one sequence, [tokens, vectors, rows,
    width], but the void ones, from the first of ``void`` to the second (it may wrap around)."""
    if packing is not None:
        shape = *context.shape[:3], packing.num_elements
        whole = torch.empty(shape, dtype=queries.dtype, device=queries.device)
        unpack_rows(context.flatten(0, 1), packing, whole.view(-1, *shape[2:]))
        context = whole
    keys, values = context[:, 0].transpose(0, 1), context[:, -1].transpose(0, 1)
    scores = queries.float() @ keys.float().transpose(1, 2) * scale
    if soft_cap is not None:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if void is not None:
        slots = torch.arange(len(context), device=void.device)
        is_behind, is_before_end = slots >= void[0], slots < void[1]
        wraps = void[0] > void[1]
        masked = torch.where(wraps, is_behind | is_before_end, is_behind & is_before_end)
        scores.masked_fill_(masked, -torch.inf)
    largest = scores.amax(-1)
    shares = (scores - largest[..., None]).exp_()
    sums = shares @ values[..., :value_dim].float()
    return Attended(sums=sums, total=shares.sum(-1), largest=largest)
