"""The weights on disk: one aligned file for each model and precision, built once.

Every component has a fixed place in the file, so the layout does not depend on the policy. That of
a mixture depends on whether there is a GPU. The file is sparse: only bytes that some policy puts on
disk are written. A table at the end has a checksum for each page. A manifest beside the file has,
for each component, the first byte that is written.

The file is written in place, and a rename adds the manifest last. So a file is used only when all
of its data is safe, and it grows without a second copy. The process that builds locks the file.
Readers need no lock: pages in a manifest change only when the file is built anew, with equal bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
OnBytes = Callable[[int], None]
PageRange = tuple[int, int, int]
# A buffer to fill, and where its bytes begin in the file.
ReadRequest = tuple[memoryview, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """For one source of weights, the first byte of each component that is in the file."""

    fingerprint: str
    first_bytes: tuple[int, ...]


class WeightFile:
    """The components on disk, each from some byte on. A context manager.

    Each page is checked against its checksum at its first read in a process. Any thread may read.

    Parameters
    ----------
    folder
        The offload folder.
    source
        The source of the weights; its fingerprint is part of the file's name.
    layers
        Layouts of all layers.
    """

    def __init__(self, folder: Path, source: WeightSource, layers: Sequence[LayerLayout]) -> None:
        self.source = source
        # The place of a component is its index here; pairs of layer and component.
        self._components = [
            (index, layout) for index, layer in enumerate(layers) for layout in layer.components
        ]
        self._fingerprint = source.fingerprint
        # Versions of this program with another layout get another file.
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
        # For reads of checksums and of rows of tables, through the page cache.
        self._descriptor = -1

    def missing_bytes(self, placed: PlacedLayers) -> int:
        """Return the bytes that ``build`` has to write for components with these cuts."""
        return sum(end - start for _, start, end in self._missing(placed))

    def build(self, placed: PlacedLayers, on_bytes: OnBytes) -> None:
        """Write the bytes of the disk parts that the file does not have yet, and open the file.

        ``on_bytes`` is called with the bytes of each piece. Where another process is building, this
        one waits for it.

        Raises
        ------
        RunError
            When the disk is full or fails; the manifest then does not include the written bytes.
        """
        missing = self.missing_bytes(placed)
        try:
            if missing:
                with self._locked() as descriptor:
                    # Another process may have written the bytes in the meantime.
                    self._first_bytes = self._read_manifest()
                    on_bytes(max(0, missing - self.missing_bytes(placed)))
                    self._write_ranges(descriptor, self._missing(placed), on_bytes)
            self._file = DirectFile(self.path)
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as error:
            raise RunError(f"weight file {self.path}: {error.strerror}") from error

    def requests_of(
        self, parts: Sequence[tuple[PlacedComponent, torch.Tensor, int]]
    ) -> list[ReadRequest]:
        """Return what fills buffers (uint8, whole pages), each with a component's bytes from a page
        on; in the order of the file."""
        requests = [
            (buffer[place].numpy().data, self.position(component, stored))
            for component, buffer, start in parts
            for stored, place in component.stored_ranges(start, start + len(buffer))
        ]
        return sorted(requests, key=lambda request: request[1])

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill the buffers of ``requests``, all at once.

        Raises
        ------
        RunError
            When the bytes cannot be read, or do not have their checksums.
        """
        assert self._file is not None
        self._file.read_parts(requests)
        for data, position in requests:
            if not self._checksums.were_checked(position, len(data)):
                self._check(data, position)

    def expect_rows(self, positions: Iterable[int], num_bytes: int) -> None:
        """Let the system read rows of ``num_bytes`` at some positions into the page cache, all at
        once. ``read_row`` would have it read one after another."""
        # It is only advice: the reads themselves tell what is wrong.
        with contextlib.suppress(OSError):
            for position in positions:
                os.posix_fadvise(self._descriptor, position, num_bytes, os.POSIX_FADV_WILLNEED)

    def read_row(self, row: memoryview, position: int) -> None:
        """Fill ``row`` from any ``position`` in the file, through the page cache.

        Raises
        ------
        RunError
            As ``read`` does.
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
            # The manifest is not valid. The file is built again from the source.
            return list(self._nothing)
        fits = self.path.stat().st_size >= self._checksums.end
        same = found.fingerprint == self._fingerprint
        is_believed = same and fits and self._is_sound(found)
        return list(found.first_bytes if is_believed else self._nothing)

    def _is_sound(self, manifest: Manifest) -> bool:
        """Whether each component starts at one of its pages, or is not in the file at all."""
        return len(manifest.first_bytes) == len(self._components) and all(
            first == layout.num_bytes or first in range(0, layout.num_bytes, PAGE_BYTES)
            for first, (_, layout) in zip(manifest.first_bytes, self._components, strict=True)
        )

    def _missing(self, placed: PlacedLayers) -> list[PageRange]:
        """Return (place, start, end) of the whole pages to write."""
        ranges = []
        for place, component in enumerate(c for layer in placed for c in layer):
            cut = component.cut
            start = page_floor(component.first_disk_byte)
            end = round_up(cut.num_bytes, PAGE_BYTES)
            if self._first_bytes[place] < cut.num_bytes:
                end = page_floor(self._first_bytes[place])
            if cut.disk_bytes and start < end:
                ranges.append((place, start, end))
        return ranges

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """Lock the file, which is created if necessary; yields its descriptor."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    logger.warning("waiting for another process that builds %s", self.path)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                # The process that held the lock removes the file where its build failed.
                if os.fstat(descriptor).st_nlink:
                    yield descriptor
                    return
            finally:
                os.close(descriptor)

    def _write_ranges(self, descriptor: int, ranges: list[PageRange], on_bytes: OnBytes) -> None:
        is_new = self._first_bytes == self._nothing
        try:
            if is_new:
                # An invalid manifest must not become valid in the middle of a build.
                self.manifest_path.unlink(missing_ok=True)
                sync_folder(self.path.parent)
            os.truncate(descriptor, max(self._checksums.end, os.fstat(descriptor).st_size))
            with DirectFile(self.path, writable=True) as file:
                for place, first, last in ranges:
                    self._write_pages(file, descriptor, place, first, last, on_bytes)
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
        on_bytes: OnBytes,
    ) -> None:
        size = min(BUILD_PIECE_BYTES, last - first)
        scratch = torch.frombuffer(aligned_buffer(size), dtype=torch.uint8)
        for start in range(first, last, size):
            piece = scratch[: min(size, last - start)]
            layer, layout = self._components[place]
            known = min(len(piece), layout.num_bytes - start)
            self.source.read_range(layer, layout, start, piece[:known])
            piece[known:].zero_()
            data, position = piece.numpy().data, self._bases[place] + start
            file.write_from(data, position)
            self._checksums.write(descriptor, data, position)
            on_bytes(len(piece))

    def _check(self, pages: memoryview, position: int) -> None:
        try:
            is_right = self._checksums.check(self._descriptor, pages, position)
        except OSError as error:
            raise self._failure(position, error) from error
        if is_right:
            return
        # Without a manifest, the next start writes the file again.
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
