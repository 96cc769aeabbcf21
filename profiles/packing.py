"""The packed layout of rows in 4 or 8 bits an element. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.errors import InputError
from profiles.units import MIB

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
# A group's scale and its minimum, bfloat16 each.
SHARED_BYTES = 4
# The group size of products in integers: ``kCoded`` of group_codes.h.
CODED_GROUP_SIZE = 64
# Up to so many rows are multiplied by packed weights directly. With more, unpacking once is faster,
# unless a CPU multiplies the codes.
DIRECT_ROWS = 64
# The same for one matrix on a GPU: a tile of so many rows takes as long as one row.
GPU_DIRECT_ROWS = 16
# Without a kernel that reads a packed cache directly, so much of it is unpacked at once.
UNPACKED_AT_ONCE_BYTES = 64 * MIB
# Where a library multiplies many rows faster, so much of an encoded matrix is unpacked at once.
DECODED_AT_ONCE_BYTES = 16 * MIB


def check_group_size(what: str, size: int) -> None:
    """Raise ``InputError`` for a size that no kernel supports."""
    if size not in GROUP_SIZES:
        allowed = ", ".join(str(allowed) for allowed in GROUP_SIZES)
        raise InputError(what, got=size, allowed=allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Rows of ``num_elements``, whose groups of ``group_size`` share a scale and a minimum.

    Element ``i`` of a group is ``minimum + scale * code[i]``, with codes of ``bits`` bits. The last
    group of a row may be shorter. One row is, byte by byte:

    - the codes of all groups in order. With 8 bits, byte ``i`` of a group is code ``i``. With 4
      bits, byte ``i`` of a group of ``n`` has code ``i`` in its low half and code
      ``i + ceil(n / 2)`` in its high half (0 where there is none), so that each half unpacks to
      adjacent elements. Zeros pad the codes to a multiple of 4 bytes;
    - for each group its scale, then its minimum, bfloat16 with the low byte first.

    The minimum is rounded down and the scale up, so that they span the group despite the rounding
    to bfloat16: no element is further than half a scale from its code's value.
    """

    num_elements: int
    bits: int
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        assert self.bits in BITS and self.group_size in GROUP_SIZES and self.num_elements > 0

    @property
    def num_groups(self) -> int:
        """Groups of a row, the last one perhaps shorter."""
        return -(-self.num_elements // self.group_size)

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's codes, padding included."""
        return -(-self.num_elements * self.bits // 32) * 4

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.code_bytes + self.num_groups * SHARED_BYTES
