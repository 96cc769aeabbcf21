"""Rows of the embedding tables, gathered from all tiers."""

from __future__ import annotations

import torch

from costmodel.model.tensor_layout import TensorLayout
from costmodel.plan.cuts import PlacedComponent
from executor.model.matrices import decode
from executor.stores.tensor_views import matrix_view
from executor.stores.weight_file import WeightFile
from executor.stores.weights import WeightStore
from profiles.units import MIB

# Rows that are gathered in CPU memory and copied to the compute device at once.
GATHERED_AT_ONCE_BYTES = 8 * MIB


class EmbeddingTable:
    """An embedding table. Only the rows of a batch's tokens are read.

    Rows on disk are read through the page cache, unlike all else on disk: they are small, and
    common tokens repeat.

    Parameters
    ----------
    weights, file
        The store and, where some rows are on disk, its file.
    name
        The tensor of the table: ``tokens.weight``, ``positions.weight``, or, in several chunks,
        ``head.weight`` of a tied head. A vector is a table of one row.
    """

    def __init__(self, weights: WeightStore, file: WeightFile | None, name: str) -> None:
        self._runs: list[tuple[int, torch.Tensor]] = []
        self._disk: list[tuple[int, int, int]] = []
        self._device = weights.machine.compute.device
        self._dtype = weights.dtype
        self._file = file
        found = [
            (component, tensor)
            for layer in weights.placed
            for component in layer
            for tensor in component.layout.tensors
            if tensor.name == name
        ]
        self._tensor = found[0][1]
        # Rows are gathered as bytes, or as words where every row starts at a word.
        in_words = all(
            other.row_bytes % 4 == 0 for component, _ in found for other in component.layout.tensors
        )
        self._word = torch.int32 if in_words else torch.uint8
        for component, tensor in found:
            self._add(weights, component, tensor)

    @property
    def num_rows(self) -> int:
        """Rows of the table; of a tied head those of its first chunk."""
        return self._tensor.num_rows

    def _add(self, weights: WeightStore, component: PlacedComponent, tensor: TensorLayout) -> None:
        layout = component.layout
        start, end = tensor.offset_bytes, tensor.end_bytes
        for offset, run in weights.resident_runs(component.layer, layout.name):
            low, high = max(start, offset), min(end, offset + len(run))
            if low < high:
                rows = run[low - offset : high - offset].view(-1, tensor.row_bytes)
                first = layout.first_row + (low - start) // tensor.row_bytes
                self._runs.append((first, rows.view(self._word)))
        low = max(start, component.cut.cpu_end)
        if low < end and component.cut.disk_bytes:
            assert self._file is not None
            first = layout.first_row + (low - start) // tensor.row_bytes
            position = self._file.position(component, low)
            self._disk.append((first, layout.first_row + tensor.num_rows, position))

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows [*ids.shape, hidden_size] on the compute device, for int64 ids on the CPU."""
        step = max(1, GATHERED_AT_ONCE_BYTES // self._tensor.row_bytes)
        parts = [self._gather(part) for part in ids.flatten().split(step)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(*ids.shape, -1)

    def _gather(self, flat: torch.Tensor) -> torch.Tensor:
        raw = self._empty_rows(len(flat))
        for first, rows in self._runs:
            found = _between(flat, first, first + len(rows))
            if len(found) and rows.device.type == "cpu":
                raw[found] = rows[flat[found] - first]
        for first, end, position in self._disk:
            found = _between(flat, first, end)
            if len(found):
                raw[found] = self._read(flat[found] - first, position)
        # One copy, because each copy waits for others on the link.
        raw = raw.to(self._device)
        for first, rows in self._runs:
            found = _between(flat, first, first + len(rows))
            if len(found) and rows.device.type != "cpu":
                places, wanted = torch.stack((found, flat[found] - first)).to(self._device)
                raw[places] = rows[wanted]
        return self._elements(raw)

    def _empty_rows(self, count: int) -> torch.Tensor:
        return torch.empty(count, self._tensor.row_bytes, dtype=torch.uint8).view(self._word)

    def _elements(self, raw: torch.Tensor) -> torch.Tensor:
        """Return gathered rows as elements [rows, hidden_size]."""
        rows = matrix_view(self._tensor, raw.view(torch.uint8).flatten(), self._dtype)
        if isinstance(rows, torch.Tensor):
            return rows.view(len(raw), -1)
        out = torch.empty(rows.shape, dtype=self._dtype, device=raw.device)
        decode(rows, out)
        return out

    def _read(self, rows: torch.Tensor, position: int) -> torch.Tensor:
        assert self._file is not None
        wanted, places = rows.unique(return_inverse=True)
        table = self._empty_rows(len(wanted))
        raw = table.view(torch.uint8).numpy()
        size = self._tensor.row_bytes
        positions = [position + row * size for row in wanted.tolist()]
        self._file.expect_rows(positions, size)
        for i, start in enumerate(positions):
            self._file.read_row(raw[i].data, start)
        return table[places]


def _between(ids: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Return the indices of the ``ids`` in [first, end), int64."""
    return ((ids >= first) & (ids < end)).nonzero().squeeze(1)
