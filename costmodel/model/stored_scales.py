"""The dtype of the scales of quantized integers, which files know and configs do not. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# Of a header of safetensors, as in the format's reference reader.
LENGTH_BYTES, MOST_BYTES = 8, 100 * 10**6
# The ends of the names of scales: of GPTQ and AWQ, of compressed-tensors.
METHODS = ("gptq", "awq", "compressed-tensors")
SCALES = (".scales", ".weight_scale")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_scales(folder: Path, quantization: object) -> str | None:
    """Return the dtype of the first scales in a checkpoint's folder; ``None`` where none are found.

    Faults of files are told when the checkpoint is opened, not here.

    Parameters
    ----------
    quantization
        The ``quantization_config``; most methods fix the dtype, and no file is read for them.
    """
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in METHODS:
        return None
    try:
        for path in sorted(folder.glob("*.safetensors")):
            if (found := _in_header(_header(path))) is not None:
                return found
    except OSError:
        return None
    return None


def _in_header(header: Any) -> str | None:
    if not isinstance(header, dict):
        return None
    for name, value in header.items():
        dtype = value.get("dtype") if isinstance(value, dict) else None
        if name.endswith(SCALES) and isinstance(dtype, str) and dtype in DTYPES:
            return DTYPES[dtype]
    return None


def _header(path: Path) -> Any:
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(LENGTH_BYTES), "little")
        if length > min(MOST_BYTES, path.stat().st_size):
            return None
        try:
            return json.loads(handle.read(length))
        except (ValueError, RecursionError):
            return None
