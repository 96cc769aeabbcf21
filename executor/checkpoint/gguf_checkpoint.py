"""A model in GGUF as a source of weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from costmodel.gguf.encoded import encoded_spec
from costmodel.gguf.model import GgufModel
from costmodel.gguf.names import stored_rows
from costmodel.model.layout import ComponentLayout, decoder_numbers
from costmodel.model.spec import ModelSpec
from executor.checkpoint.row_reader import RowRange, fill_component
from executor.checkpoint.stored_tensors import contents_digest
from executor.checkpoint.tensor_rows import TensorRows
from profiles.compute_plan import DTYPES
from profiles.errors import RunError


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint:
    """A GGUF file, or the parts of one, with every tensor of its config in the right shape.

    Parameters
    ----------
    path
        The file, or one of its parts.
    contents
        The digest of the tensors when the file was opened.
    """

    path: Path
    spec: ModelSpec
    model: GgufModel
    contents: str

    @classmethod
    def open(cls, path: Path, dtype: str | None = None) -> GgufCheckpoint:
        """Open a file and check it completely; of the weights, only samples are read.

        Parameters
        ----------
        dtype
            The compute dtype; ``None`` stands for bfloat16.

        Raises
        ------
        InputError
            Naming the file, key or tensor, the value found and the allowed ones.
        """
        model = GgufModel.open(path)
        spec = encoded_spec(model, path.name)
        if dtype is not None:
            spec = spec.with_dtype(dtype)
        contents = contents_digest(model.tensors)
        return cls(path=path, spec=spec, model=model, contents=contents)

    def in_dtype(self, dtype: str) -> GgufCheckpoint:
        """Return the same weights with another compute dtype."""
        return replace(self, spec=self.spec.with_dtype(dtype))

    @property
    def fingerprint(self) -> str:
        """A hash of the compute dtype, and of the weights when the file was opened."""
        return hashlib.sha256(f"{self.spec.dtype} {self.contents}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise ``RunError`` where the files have changed since they were opened."""
        if contents_digest(self.model.tensors) != self.contents:
            raise RunError(f"{self.path}: it changed while it was read; try: run again")

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Read part of one component (see ``WeightSource.read_range``)."""
        numbers = decoder_numbers(self.spec)
        layer = max(numbers[index], 0) if index < len(numbers) else 0

        def rows_of(name: str, unit: int) -> list[RowRange]:
            found = stored_rows(self.model, self.spec, name, layer=layer, expert=unit)
            return [
                RowRange(reader=TensorRows(part.entry), first_row=part.first, num_rows=part.count)
                for part in found
            ]

        fill_component(layout, start, out, rows_of, DTYPES[self.spec.dtype])
