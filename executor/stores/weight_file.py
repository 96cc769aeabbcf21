"""The weights that live on disk: one aligned file per model and precision, built once.

Every component has a fixed place in the file, so the layout does not depend on the policy. Only the
bytes that some policy has put on disk are ever written (the file is sparse), and behind the
layers lies a checksum for each page. A manifest beside the file says from which byte on each
component is there.

The file is written in place and the manifest appears last, by renaming: a file is never
believed before all of it is safe, and it can grow without a second copy of it. Whoever builds
holds the file's lock; readers need none, because pages in a manifest change only when the file is
built anew, and then to the same bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from costmodel.model.layout import LayerLayout, round_up
from costmodel.plan.cuts import PlacedComponent, PlacedLayers
from executor.checkpoint.folder import WeightSource
from executor.machine.offload_folder import MANIFEST_SUFFIX, WEIGHTS_PREFIX, WEIGHTS_SUFFIX
from executor.stores.page_checksums import PageChecksums
from executor.stores.staging import page_floor
from profiles.aligned_io import PAGE_BYTES, DirectFile, aligned_buffer
from profiles.errors import RunError, ZigzagError
from profiles.files import from_json, read_json, to_json, write_json
from profiles.units import MIB
from profiles.whole_file import sync_folder

logger = logging.getLogger(__name__)

BUILD_PIECE_BYTES = 16 * MIB
Progress = Callable[[int], None]
PageRange = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """From which byte on each component is in the file, for one source of weights."""

    fingerprint: str
    first_bytes: tuple[int, ...]


class WeightFile:
    """Components on disk, each from some byte on. A context manager.

    Each page is held against its checksum when this process first reads it. Any thread may read.

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
        # Each component has a place of its own; its layer is the first of the pair.
        self._components = [
            (index, layout) for index, layer in enumerate(layers) for layout in layer.components
        ]
        self._fingerprint = source.fingerprint
        # A layout of another version must never be taken for this one.
        key = hashlib.sha256(f"{self._fingerprint} {layers}".encode()).hexdigest()
        self.path = folder / f"{WEIGHTS_PREFIX}{key[:16]}{WEIGHTS_SUFFIX}"
        self.manifest_path = self.path.with_suffix(MANIFEST_SUFFIX)
        self._bases = [0]
        for _, layout in self._components:
            self._bases.append(self._bases[-1] + round_up(layout.num_bytes, PAGE_BYTES))
        self._places = {(i, c.name): place for place, (i, c) in enumerate(self._components)}
        self._checksums = PageChecksums(self._bases[-1])
        self._nothing = [layout.num_bytes for _, layout in self._components]
        self._first_bytes = self._read_manifest()
        self._file: DirectFile | None = None
        # Reads through the page cache, of checksums and of rows of tables.
        self._descriptor = -1

    def missing_bytes(self, placed: PlacedLayers) -> int:
        """Bytes that ``build`` would have to write for components with these cuts."""
        return sum(end - start for _, start, end in self._missing(placed))

    def build(self, placed: PlacedLayers, progress: Progress) -> None:
        """Write what the cuts put on disk and the file does not hold yet, and open the file.

        ``progress`` is called with the bytes of each piece. Where another process is building,
        this one waits for it.

        Raises
        ------
        RunError
            When the disk is full or fails; what was written is not in the manifest then.
        """
        missing = self.missing_bytes(placed)
        try:
            if missing:
                with self._locked() as descriptor:
                    # Another process may have written it in the meantime.
                    self._first_bytes = self._read_manifest()
                    progress(max(0, missing - self.missing_bytes(placed)))
                    self._write_ranges(descriptor, self._missing(placed), progress)
            self._file = DirectFile(self.path)
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as error:
            raise RunError(f"weight file {self.path}: {error.strerror}") from error

    def read_into(self, buffer: torch.Tensor, component: PlacedComponent, start: int) -> None:
        """Fill ``buffer`` (uint8, whole pages) with a component's bytes from ``start`` (a page) on.

        Raises
        ------
        RunError
            When the bytes cannot be read, or are not those that were written.
        """
        assert self._file is not None
        data, position = buffer.numpy().data, self.position(component, start)
        self._file.read_into(data, position)
        if not self._checksums.were_checked(position, len(data)):
            self._check(data, position)

    def read_row(self, row: memoryview, position: int) -> None:
        """Fill ``row`` from any ``position`` in the file, through the page cache.

        Raises
        ------
        RunError
            As ``read_into`` does.
        """
        if self._checksums.were_checked(position, len(row)):
            self._read_cached(row, position)
            return
        first = page_floor(position)
        pages = memoryview(bytearray(round_up(position + len(row), PAGE_BYTES) - first))
        self._read_cached(pages, first)
        self._check(pages, first)
        row[:] = pages[position - first : position - first + len(row)]

    def position(self, component: PlacedComponent, start: int) -> int:
        """Return where byte ``start`` of a component is in the file."""
        return self._bases[self._places[component.layer, component.layout.name]] + start

    def close(self) -> None:
        """Close the file; it stays for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_manifest(self) -> list[int]:
        if not (self.path.exists() and self.manifest_path.exists()):
            return list(self._nothing)
        try:
            found = from_json(Manifest, read_json(self.manifest_path, "manifest"), "manifest")
        except ZigzagError:
            # Whatever wrote it, the file can be built again from the source.
            return list(self._nothing)
        fits = self.path.stat().st_size >= self._checksums.end
        same = found.fingerprint == self._fingerprint
        is_believed = same and fits and self._is_sound(found)
        return list(found.first_bytes if is_believed else self._nothing)

    def _is_sound(self, manifest: Manifest) -> bool:
        """Whether each component begins on one of its pages, or is not there at all."""
        return len(manifest.first_bytes) == len(self._components) and all(
            first == layout.num_bytes or first in range(0, layout.num_bytes, PAGE_BYTES)
            for first, (_, layout) in zip(manifest.first_bytes, self._components, strict=True)
        )

    def _missing(self, placed: PlacedLayers) -> list[PageRange]:
        """List (place, start, end) of whole pages to be written."""
        ranges = []
        for place, component in enumerate(c for layer in placed for c in layer):
            cut = component.cut
            start = page_floor(cut.cpu_end)
            end = round_up(cut.num_bytes, PAGE_BYTES)
            if self._first_bytes[place] < cut.num_bytes:
                end = page_floor(self._first_bytes[place])
            if cut.disk_bytes and start < end:
                ranges.append((place, start, end))
        return ranges

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Hold the file, made where there is none; yields its descriptor."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.warning("waiting for another process that builds %s", self.path)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Who held it before removes what it could not finish.
                if os.fstat(descriptor).st_nlink:
                    yield descriptor
                    return
            finally:
                os.close(descriptor)

    def _write_ranges(self, descriptor: int, ranges: list[PageRange], progress: Progress) -> None:
        is_new = self._first_bytes == self._nothing
        try:
            if is_new:
                # A manifest that is not believed now must not be after half of a build.
                self.manifest_path.unlink(missing_ok=True)
                sync_folder(self.path.parent)
            os.truncate(descriptor, max(self._checksums.end, os.fstat(descriptor).st_size))
            with DirectFile(self.path, writable=True) as file:
                for place, first, last in ranges:
                    self._write_pages(file, descriptor, place, first, last, progress)
            self.source.check_unchanged()
            os.fsync(descriptor)
            for place, first, _ in ranges:
                self._first_bytes[place] = min(self._first_bytes[place], first)
            manifest = Manifest(fingerprint=self._fingerprint, first_bytes=tuple(self._first_bytes))
            write_json(self.manifest_path, to_json(manifest))
            sync_folder(self.path.parent)
        except BaseException:
            if is_new:
                self.manifest_path.unlink(missing_ok=True)
                self.path.unlink(missing_ok=True)
            raise

    def _write_pages(
        self,
        file: DirectFile,
        descriptor: int,
        place: int,
        first: int,
        last: int,
        progress: Progress,
    ) -> None:
        scratch = torch.frombuffer(aligned_buffer(BUILD_PIECE_BYTES), dtype=torch.uint8)
        for start in range(first, last, BUILD_PIECE_BYTES):
            piece = scratch[: min(BUILD_PIECE_BYTES, last - start)]
            layer, layout = self._components[place]
            known = min(len(piece), layout.num_bytes - start)
            self.source.read_range(layer, layout, start, piece[:known])
            piece[known:].zero_()
            data, position = piece.numpy().data, self._bases[place] + start
            file.write_from(data, position)
            self._checksums.write(descriptor, data, position)
            progress(len(piece))

    def _check(self, pages: memoryview, position: int) -> None:
        try:
            is_right = self._checksums.check(self._descriptor, pages, position)
        except OSError as error:
            raise self._failure(position, error) from error
        if is_right:
            return
        # The next start believes nothing of the file and writes it again.
        self.manifest_path.unlink(missing_ok=True)
        layer, layout = self._components[bisect.bisect_right(self._bases, position) - 1]
        raise RunError(
            f"weight file {self.path}: {layout.name} of layer {layer} is not what was written there"
            " (its checksum differs); run again, and the file is built anew"
        )

    def _read_cached(self, target: memoryview, position: int) -> None:
        try:
            got = os.preadv(self._descriptor, [target], position)
        except OSError as error:
            raise self._failure(position, error) from error
        if got != len(target):
            raise RunError(
                f"read of {self.path} at offset {position}: file is shorter than expected,"
                f" {len(target)} bytes wanted, {got} there"
            )

    def _failure(self, position: int, error: OSError) -> RunError:
        return RunError(f"read of {self.path} at offset {position}: {error.strerror}")
