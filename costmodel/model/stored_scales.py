"""The dtype of the scales of quantized integers, which files know and configs do not. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from costmodel.model.safetensors_header import open_safetensors
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_entry import TensorEntry
from profiles.encodings import Kind, find_encoding
from profiles.errors import InputError

# Scales of another dtype are refused when the checkpoint is opened.
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# The ends of the names of scales: of GPTQ and AWQ, of compressed-tensors.
_ENDS = (".scales", ".weight_scale")
_INTEGERS = (Kind.INT4, Kind.INT8)


def stored_scales(folder: Path, spec: ModelSpec) -> str | None:
    """Return the dtype of the first scales in a checkpoint's folder; ``None`` where none are found.

    Faults of files are told when the checkpoint is opened, not here.

    Parameters
    ----------
    spec
        The model by its config alone. No file is read for one without quantized integers.
    """
    encoded = [*spec.encoded, *(part for kind in spec.layer_kinds for part in kind.encoded)]
    names = {part.encoding for part in encoded if part.encoding}
    if not any(find_encoding(name).kind in _INTEGERS for name in names):
        return None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = dtypes_of_scales(open_safetensors(path).values())
        except InputError:
            return None
        if found:
            return next(iter(found))
    return None


def dtypes_of_scales(entries: Iterable[TensorEntry]) -> dict[str, TensorEntry]:
    """Return the dtypes of scales among tensors, each with a tensor that has it."""
    found = {e.dtype: e for e in entries if e.name.endswith(_ENDS) and e.dtype in _DTYPES}
    return {_DTYPES[dtype]: found[dtype] for dtype in sorted(found)}
