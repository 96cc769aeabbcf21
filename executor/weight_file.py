"""The weights that live on disk: one aligned file per model and precision, built once.

Every layer has a fixed place in the file, so the layout does not depend on the policy. Only the
bytes that some policy has put on disk are ever written (the file is sparse); a manifest beside
it says from which byte on each layer is there, and appears only after those bytes are safe.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from costmodel.layout import LayerLayout, round_up
from costmodel.rounding import LayerCut
from executor.checkpoint import WeightSource
from profiles.aligned_io import PAGE_BYTES, DirectFile, aligned_buffer
from profiles.errors import ZigzagError
from profiles.files import from_json, read_json, to_json, write_json
from profiles.units import MIB

BUILD_PIECE_BYTES = 16 * MIB
Progress = Callable[[int], None]


def page_floor(position: int) -> int:
    """Round down to the start of a page."""
    return position // PAGE_BYTES * PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """From which byte on each layer is in the file, for one source of weights."""

    fingerprint: str
    first_bytes: tuple[int, ...]


class WeightFile:
    """Layers on disk, each from some byte on. A context manager.

    Parameters
    ----------
    folder
        The offload folder.
    source
        Where the weights come from; its fingerprint names the file.
    layers
        Layouts of all layers.
    """

    def __init__(self, folder: Path, source: WeightSource, layers: Sequence[LayerLayout]) -> None:
        self.source = source
        self.layers = layers
        # A layout of another version must never be taken for this one.
        key = hashlib.sha256(f"{source.fingerprint} {layers}".encode()).hexdigest()
        self.path = folder / f"weights-{key[:16]}.bin"
        self.manifest_path = self.path.with_suffix(".json")
        self._file: DirectFile | None = None
        self._bases = [0]
        for layer in layers:
            self._bases.append(self._bases[-1] + round_up(layer.num_bytes, PAGE_BYTES))
        self._first_bytes = self._read_manifest()

    def missing_bytes(self, cuts: Sequence[LayerCut]) -> int:
        """Bytes that ``build`` would have to write for these cuts."""
        return sum(end - start for _, start, end in self._missing(cuts))

    def build(self, cuts: Sequence[LayerCut], progress: Progress) -> None:
        """Write what the cuts put on disk and the file does not hold yet.

        ``progress`` is called with the bytes of each piece. What an interrupted build has
        written is not in the manifest, so it is never read.
        """
        existed = self.path.exists()
        missing = self._missing(cuts)
        try:
            self._file = DirectFile(self.path, writable=True)
            if missing:
                self._write_ranges(missing, progress)
        except BaseException:
            self.close()
            if not existed:
                self.path.unlink(missing_ok=True)
            raise

    def read_into(self, buffer: torch.Tensor, layer: int, start: int) -> None:
        """Fill ``buffer`` (uint8, whole pages) with a layer's bytes from ``start`` (a page) on."""
        assert self._file is not None
        self._file.read_into(buffer.numpy().data, self._bases[layer] + start)

    def position(self, layer: int, start: int) -> int:
        """Return where byte ``start`` of a layer lies in the file."""
        return self._bases[layer] + start

    def close(self) -> None:
        """Close the file; it stays for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_manifest(self) -> list[int]:
        nothing = [layer.num_bytes for layer in self.layers]
        if not (self.path.exists() and self.manifest_path.exists()):
            return nothing
        try:
            found = from_json(Manifest, read_json(self.manifest_path, "manifest"), "manifest")
        except ZigzagError:
            # Whatever wrote it, the file can be built again from the source.
            return nothing
        fits = self.path.stat().st_size >= self._bases[-1]
        same = found.fingerprint == self.source.fingerprint
        return list(found.first_bytes) if same and fits and self._is_sound(found) else nothing

    def _is_sound(self, manifest: Manifest) -> bool:
        """Whether each layer begins on one of its pages, or is not there at all."""
        return len(manifest.first_bytes) == len(self.layers) and all(
            first == layer.num_bytes or first in range(0, layer.num_bytes, PAGE_BYTES)
            for first, layer in zip(manifest.first_bytes, self.layers, strict=True)
        )

    def _missing(self, cuts: Sequence[LayerCut]) -> list[tuple[int, int, int]]:
        """List (layer, start, end) of whole pages to be written."""
        ranges = []
        for layer, cut in enumerate(cuts):
            start = page_floor(cut.cpu_end)
            end = round_up(cut.num_bytes, PAGE_BYTES)
            if self._first_bytes[layer] < cut.num_bytes:
                end = page_floor(self._first_bytes[layer])
            if cut.disk_bytes and start < end:
                ranges.append((layer, start, end))
        return ranges

    def _write_ranges(self, ranges: list[tuple[int, int, int]], progress: Progress) -> None:
        assert self._file is not None
        os.truncate(self.path, max(self._bases[-1], self.path.stat().st_size))
        scratch = torch.frombuffer(aligned_buffer(BUILD_PIECE_BYTES), dtype=torch.uint8)
        for layer, first, last in ranges:
            for start in range(first, last, BUILD_PIECE_BYTES):
                piece = scratch[: min(BUILD_PIECE_BYTES, last - start)]
                known = min(len(piece), self.layers[layer].num_bytes - start)
                self.source.read_range(layer, self.layers[layer], start, piece[:known])
                piece[known:].zero_()
                self._file.write_from(piece.numpy().data, self._bases[layer] + start)
                progress(len(piece))
        self._file.sync()
        for layer, first, _ in ranges:
            self._first_bytes[layer] = min(self._first_bytes[layer], first)
        manifest = Manifest(
            fingerprint=self.source.fingerprint, first_bytes=tuple(self._first_bytes)
        )
        write_json(self.manifest_path, to_json(manifest))
