"""Pages of a pass that move between a layer's cache on disk and its staging buffer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from profiles.aligned_io import PAGE_BYTES

Integers = npt.NDArray[np.int64]

# Free pages between two that are read are read with them: as long as another request takes.
READ_THROUGH_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PassPages:
    """Pages of the layers of one ring in one pass, in increasing order, int64 each.

    Parameters
    ----------
    present
        In use before the pass.
    used
        In use after it: these and the new ones.
    written
        Those with a new token.
    """

    present: Integers
    used: Integers
    written: Integers


def byte_runs(pages: Integers, page_bytes: int, *, gap_bytes: int = 0) -> list[slice]:
    """Return the bytes of pages of the cache as whole pages of the disk.

    The former need not be multiples of the latter. Runs nearer than ``gap_bytes`` are joined.
    """
    if not len(pages):
        return []
    starts = pages * page_bytes // PAGE_BYTES * PAGE_BYTES
    ends = -(-(pages + 1) * page_bytes // PAGE_BYTES) * PAGE_BYTES
    breaks = np.flatnonzero(starts[1:] > ends[:-1] + gap_bytes) + 1
    firsts, lasts = np.append(0, breaks), np.append(breaks, len(pages)) - 1
    bounds = zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True)
    return [slice(start, end) for start, end in bounds]
