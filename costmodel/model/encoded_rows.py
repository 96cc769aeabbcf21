"""Which rows of a matrix are stored encoded, as the files of a checkpoint have them. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from costmodel.model.checks import check_least
from profiles.encodings import Encoding, find_encoding


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRows:
    """Adjacent rows of one matrix that are stored alike.

    Parameters
    ----------
    tensor
        The matrix, by its name in ``costmodel.model.shapes``.
    rows
        How many rows. Those of one matrix follow each other.
    encoding
        The name of an encoding of ``profiles.encodings``; empty for rows in the model's dtype.
    is_sorted
        Whether the inputs are sorted by their groups: their numbers are then stored beside the
        rows.
    """

    tensor: str
    rows: int
    encoding: str = ""
    is_sorted: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "rows")
        if self.encoding:
            find_encoding(self.encoding)

    @property
    def how(self) -> Encoding | None:
        """The encoding; ``None`` for rows in the model's dtype."""
        return find_encoding(self.encoding) if self.encoding else None

    def joins(self, other: EncodedRows) -> bool:
        """Whether rows of ``other`` may follow these as rows of one matrix with one table."""
        if (self.tensor, self.encoding) != (other.tensor, other.encoding):
            return False
        if self.is_sorted or other.is_sorted:
            return False
        how = self.how
        if how is None or not how.has_table:
            return True
        return how.tile_rows > 0 and self.rows % how.tile_rows == 0


def join_rows(rows: Iterable[EncodedRows]) -> tuple[EncodedRows, ...]:
    """Join rows that are stored alike and follow each other."""
    joined: list[EncodedRows] = []
    for part in rows:
        if joined and joined[-1].joins(part):
            joined[-1] = replace(joined[-1], rows=joined[-1].rows + part.rows)
        else:
            joined.append(part)
    return tuple(joined)
