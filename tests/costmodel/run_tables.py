"""Tables of runs for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from costmodel.calibration.measured_runs import append_row


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a new table of runs."""
    path.unlink(missing_ok=True)
    for row in rows:
        append_row(path, row)
