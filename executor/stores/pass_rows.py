"""Hidden states of the rows of one pass, on the device that computes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from costmodel.plan.policy import Policy
from executor.machine.tiers import Machine
from profiles.compute_plan import DTYPES

RowBytes = npt.NDArray[np.uint8]


class PassRows:
    """One buffer for all rows of a pass; each batch has adjacent ones.

    Parameters
    ----------
    policy
        Whose ``lanes`` bound the rows.
    machine
        Its compute device has room for the rows.
    """

    def __init__(self, policy: Policy, machine: Machine) -> None:
        assert policy.lanes is not None
        model, shape = policy.model, (policy.lanes.pass_rows, 1, policy.model.hidden_size)
        raw = machine.compute.allocate("hidden states", math.prod(shape) * model.dtype_bytes)
        self._rows = raw.view(DTYPES[model.dtype]).view(shape)
        self._ends: Sequence[int] = ()

    def start_pass(self, ends: Sequence[int]) -> None:
        """Prepare for a pass; batch ``i`` has the rows from ``ends[i]`` to ``ends[i + 1]``."""
        assert ends[-1] <= len(self._rows)
        self._ends = ends

    @property
    def _used(self) -> torch.Tensor:
        """The bytes of all rows of the pass, uint8."""
        return self._rows[: self._ends[-1]].flatten().view(torch.uint8)

    def put(self, rows: RowBytes) -> None:
        """Fill all rows of the pass with those that ``taken`` returned on another machine."""
        # Torch warns of memory that is read-only, numpy does not.
        np.copyto(self._used.numpy(), rows)

    def taken(self) -> RowBytes:
        """Return a copy of all rows of the pass, as bytes of the model's dtype, uint8 [bytes]."""
        return self._used.numpy().copy()

    def of(self, batches: range) -> torch.Tensor:
        """Return the hidden states of adjacent batches, [rows, 1, hidden_size]."""
        return self._rows[self._ends[batches.start] : self._ends[batches.stop]]
