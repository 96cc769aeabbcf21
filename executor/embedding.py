"""Rows of the embedding tables, gathered from wherever they live."""

from __future__ import annotations

import torch

from costmodel.layout import LayerLayout
from executor.weight_file import WeightFile
from executor.weights import WeightStore


class EmbeddingTable:
    """A table of which only the rows that are asked for are ever touched.

    Rows on disk are read through the page cache, unlike all else: they are small, and common
    tokens come again.

    Parameters
    ----------
    weights, file
        The store and, where some rows live on disk, its file.
    name
        The tensor that holds the rows: ``tokens.weight``, ``positions.weight``, or
        ``head.weight`` in several chunks where it is tied to the embedding.
    """

    def __init__(self, weights: WeightStore, file: WeightFile | None, name: str) -> None:
        self._runs: list[tuple[int, torch.Tensor]] = []
        self._disk: list[tuple[int, int, int]] = []
        self._device = weights.machine.compute.device
        self._dtype = weights.dtype
        self._file = file
        self._width = 0
        for index, layout in enumerate(weights.layers):
            for tensor in layout.tensors:
                if tensor.name == name:
                    self._width = tensor.shape[1]
                    self._add(weights, file, index, layout, name)

    def _add(
        self,
        weights: WeightStore,
        file: WeightFile | None,
        index: int,
        layout: LayerLayout,
        name: str,
    ) -> None:
        tensor = next(t for t in layout.tensors if t.name == name)
        start, end = tensor.offset_bytes, tensor.end_bytes
        for offset, run in weights.resident_runs(index):
            low, high = max(start, offset), min(end, offset + len(run))
            if low < high:
                rows = run[low - offset : high - offset].view(self._dtype).view(-1, self._width)
                first = layout.first_row + (low - start) // tensor.row_bytes
                self._runs.append((first, rows))
        low = max(start, weights.cuts[index].cpu_end)
        if low < end and weights.cuts[index].disk_bytes:
            assert file is not None
            first = (low - start) // tensor.row_bytes
            self._disk.append(
                (
                    layout.first_row + first,
                    layout.first_row + tensor.num_rows,
                    file.position(index, low),
                )
            )

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Return rows [*ids.shape, hidden_size] on the compute device; ``ids`` is int64 on CPU."""
        flat = ids.flatten()
        below = torch.empty(len(flat), self._width, dtype=self._dtype)
        for first, rows in self._runs:
            found = _between(flat, first, first + len(rows))
            if len(found) and rows.device.type == "cpu":
                below[found] = rows[flat[found] - first]
        for first, end, position in self._disk:
            found = _between(flat, first, end)
            if len(found):
                below[found] = self._read(flat[found] - first, position)
        # One copy up, because each waits for whatever the link is busy with.
        out = below.to(self._device)
        for first, rows in self._runs:
            found = _between(flat, first, first + len(rows))
            if len(found) and rows.device.type != "cpu":
                places, wanted = torch.stack((found, flat[found] - first)).to(self._device)
                out[places] = rows[wanted]
        return out.view(*ids.shape, self._width)

    def _read(self, rows: torch.Tensor, position: int) -> torch.Tensor:
        assert self._file is not None
        wanted, places = rows.unique(return_inverse=True)
        table = torch.empty(len(wanted), self._width, dtype=self._dtype)
        row_bytes = self._width * table.element_size()
        raw = table.view(torch.uint8).numpy()
        for i, row in enumerate(wanted.tolist()):
            self._file.read_row(raw[i].data, position + row * row_bytes)
        return table[places]


def _between(ids: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """Return which of ``ids`` are in [first, end): int64 indices."""
    return ((ids >= first) & (ids < end)).nonzero().squeeze(1)
