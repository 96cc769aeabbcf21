"""Hugging Face checkpoints: checked when they are opened, and read one layer at a time.

Only ``*.safetensors`` files are read. Pickled files are never loaded, and no code of a checkpoint
runs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from costmodel.cluster.stages import stage_model
from costmodel.families import (
    CHECKPOINT_FOLDER,
    family_named,
    is_text_part,
    quantized_weights,
    spec_from_config,
)
from costmodel.model.layout import ComponentLayout
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_entry import TensorEntry, refuse_unread
from costmodel.model.tensor_layout import TensorLayout
from executor.checkpoint.language_part import language_part
from executor.checkpoint.quantized_matrices import (
    QuantizedMatrices,
    find_quantized,
    scale_dtype,
)
from executor.checkpoint.row_reader import fill_component
from executor.checkpoint.safetensors_file import drop_pages
from executor.checkpoint.stored_tensors import StoredTensors, contents_digest
from executor.checkpoint.tensor_parts import needed_shapes, overlaps
from executor.checkpoint.tensor_reads import (
    SOURCE_DTYPES,
    are_equal,
    read_elements,
    read_strided,
)
from profiles.compute_plan import DTYPES
from profiles.errors import InputError, RunError
from profiles.files import read_json

ADAPTER_NAME = "adapter_config.json"
logger = logging.getLogger(__name__)


class WeightSource(Protocol):
    """A source of a model's weights, layer by layer."""

    @property
    def spec(self) -> ModelSpec:
        """Shapes and compute dtype."""

    @property
    def fingerprint(self) -> str:
        """A hash of the weights."""

    def check_unchanged(self) -> None:
        """Raise ``RunError`` where the weights have changed since the fingerprint was taken."""

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Fill ``out`` with the bytes of a component of layer ``index`` of ``model_layers(spec)``,
        from ``start`` on.

        ``out`` is one-dimensional uint8 in CPU memory; both ends of the range are whole elements.
        The tensors are at the offsets of the layout, in the dtype of ``spec``. Padding is zero.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder with every tensor of its config in the right shape.

    Parameters
    ----------
    tensors
        The needed plain tensors, by their names in transformers' causal model.
    quantized
        The matrices that its files have in few bits.
    contents
        The digest of the tensors when the folder was opened.
    """

    folder: Path
    spec: ModelSpec
    tensors: Mapping[str, TensorEntry]
    contents: str
    quantized: QuantizedMatrices = QuantizedMatrices()  # noqa: RUF009  # frozen

    @classmethod
    def open(cls, folder: Path, dtype: str | None = None) -> Checkpoint:
        """Open a folder and check it completely.

        Of the weights, only samples are read. Where the config ties the head to the embedding and
        both are stored, the two are compared.

        Parameters
        ----------
        dtype
            The compute dtype; ``None`` stands for the config's dtype, or else for the dtype of the
            stored weights.

        Raises
        ------
        InputError
            Naming the file or tensor, the value found and the allowed ones.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"model {folder}", got="no such folder", allowed=CHECKPOINT_FOLDER)
        raw = read_json(folder / "config.json", "model config", takes_infinity=True)
        if (folder / ADAPTER_NAME).exists():
            raise InputError(
                f"checkpoint {folder}",
                got=f"{ADAPTER_NAME}, an adapter that is not applied",
                allowed="a folder of whole weights",
                hint="merging the adapter, or removing that file where the weights hold it already",
            )
        spec = spec_from_config(raw, name=folder.resolve().name)
        stored = StoredTensors.open(folder, family_named(spec.family).base_prefix)
        if dtype is None and raw.get("dtype") is None and raw.get("torch_dtype") is None:
            dtype = stored.dtype
        if is_text_part(raw):
            stored = language_part(stored)
        quantized = QuantizedMatrices()
        if (how := quantized_weights(raw, spec)) is not None:
            scales = scale_dtype(stored, how)
            spec = spec_from_config(raw, name=spec.name, scales=scales)
            quantized = find_quantized(stored, spec, how.with_scales(scales) if scales else how)
        if dtype is not None:
            spec = spec.with_dtype(dtype)
        spec, tensors = _find_tensors(stored, spec, quantized)
        checkpoint = cls(
            folder=folder, spec=spec, tensors=tensors, contents="", quantized=quantized
        )
        return replace(checkpoint, contents=checkpoint._digest())

    def in_dtype(self, dtype: str) -> Checkpoint:
        """Return the same weights with another compute dtype."""
        return replace(self, spec=self.spec.with_dtype(dtype))

    def of_stage(self, model: ModelSpec) -> Checkpoint:
        """Return the weights of one stage of a pipeline, as ``model`` describes it."""
        stage = model.stage
        if stage is None:
            return self
        return replace(self, spec=stage_model(self.spec, stage.first, stage.count))

    @property
    def fingerprint(self) -> str:
        """A hash of the compute dtype, and of the weights when the folder was opened."""
        return hashlib.sha256(f"{self.spec.dtype} {self.contents}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raise ``RunError`` where the files have changed since the folder was opened."""
        if self._digest() != self.contents:
            raise RunError(
                f"checkpoint {self.folder}: it changed while it was read; try: run again"
            )

    def read_range(
        self, index: int, layout: ComponentLayout, start: int, out: torch.Tensor
    ) -> None:
        """Read part of one component (see ``WeightSource.read_range``); scratch is at most
        16 MiB."""
        quantized = [t for t in layout.tensors if self._is_quantized(index, layout, t)]
        # Padding is zero: a component's bytes depend on its weights only.
        fill_component(
            replace(layout, tensors=tuple(quantized)),
            start,
            out,
            partial(self.quantized.rows_of, self.spec, index, layout, self.tensors),
            DTYPES[self.spec.dtype],
        )
        plain = replace(layout, tensors=tuple(t for t in layout.tensors if t not in quantized))
        for part, first, target in overlaps(self.spec, index, plain, start, out):
            entry = self.tensors[part.name]
            if part.strides is None or part.strides.is_contiguous:
                read_elements(entry, part.first_element + first, target)
            else:
                read_strided(entry, part.strides, first, target)
                if part.strides.ends_matrix and first + len(target) == part.num_elements:
                    drop_pages(entry)

    def _is_quantized(self, index: int, layout: ComponentLayout, tensor: TensorLayout) -> bool:
        name = tensor.matrix_name
        # Beside vectors that stand alone, vectors are parts of a matrix.
        is_part = len(tensor.shape) == 2 or name != tensor.name
        return is_part and self.quantized.has(self.spec, index, layout, name)

    def _digest(self) -> str:
        return contents_digest({**self.tensors, **{e.name: e for e in self.quantized.entries}})


def _find_tensors(
    stored: StoredTensors, spec: ModelSpec, quantized: QuantizedMatrices
) -> tuple[ModelSpec, dict[str, TensorEntry]]:
    """Find all plain tensors that a model needs.

    In the returned model, the head is not tied where it differs from the embedding.
    """
    every = needed_shapes(spec)
    shapes = {name: shape for name, shape in every.items() if name not in quantized.readers}
    tensors = {name: entry for name in shapes if (entry := stored.find(name))}
    head_name = f"{family_named(spec.family).head}.weight"
    head = stored.find(head_name) if spec.head.is_tied else None
    if head is not None:
        (table_name,) = family_named(spec.family).tensor_names(spec, "head.weight", 0)
        shape = shapes[table_name]
        table = tensors.setdefault(table_name, head)
        for name, entry in ((head_name, head), (table_name, table)):
            _check_tensor(name, entry, shape, spec)
        if table is not head and not are_equal(head, table):
            logger.warning(
                "%s: tie_word_embeddings is true, but %s differs from %s; both are used",
                stored.folder / "config.json",
                head_name,
                table_name,
            )
            spec = replace(spec, head=replace(spec.head, is_tied=False))
            shapes[head_name], tensors[head_name] = shape, head
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise stored.missing(missing, len(shapes))
    for name, shape in shapes.items():
        _check_tensor(name, tensors[name], shape, spec)
    # A head that is equal to the table counts as read, although only the table is used.
    read = {entry.name for entry in (*tensors.values(), *([head] if head else []))}
    _check_all_read(stored, spec, read, quantized)
    return spec, tensors


def _check_all_read(
    stored: StoredTensors, spec: ModelSpec, plain: Set[str], quantized: QuantizedMatrices
) -> None:
    """Refuse tensors that are neither read nor without effect."""
    family = family_named(spec.family)
    read = plain | {entry.name for entry in quantized.entries}
    unread = [
        n
        for n, entry in sorted(stored.entries.items())
        if entry.name not in read
        and not family.may_ignore(n, spec.num_layers)
        and not quantized.may_ignore(n, entry)
    ]
    refuse_unread(
        unread,
        source=f"checkpoint {spec.name}",
        description="config",
        hint="another config.json, or saving the model again without them",
    )


def _check_tensor(name: str, entry: TensorEntry, shape: tuple[int, ...], spec: ModelSpec) -> None:
    label = f"tensor {name} of checkpoint {spec.name}"
    if entry.shape != shape:
        raise InputError(
            label, got=f"shape {list(entry.shape)}", allowed=f"{list(shape)} as its config says"
        )
    if entry.dtype not in SOURCE_DTYPES:
        raise InputError(label, got=f"dtype {entry.dtype}", allowed=", ".join(SOURCE_DTYPES))
