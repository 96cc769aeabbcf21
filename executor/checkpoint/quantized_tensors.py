"""The tensors of quantized modules in a checkpoint: found by their names, and checked.

Shapes and dtypes are checked when a checkpoint is opened, values when they are read.
"""

from __future__ import annotations

import json
import math
from typing import Any

from costmodel.model.tensor_entry import TensorEntry
from executor.checkpoint.quantized_floats import Bnb4Rows
from executor.checkpoint.quantized_layouts import STORED_LAYOUTS, Matrix, Part, StoredLayout
from executor.checkpoint.quantized_rows import QuantizedRows
from executor.checkpoint.stored_blocks import read_whole
from executor.checkpoint.stored_tensors import FLOATS, StoredTensors
from profiles.encodings import NESTED_RUN
from profiles.errors import InputError

# Longer than any description of a quantized tensor.
LONGEST_STATE = 65536


def find_rows(stored: StoredTensors, tensor: str, matrix: Matrix) -> QuantizedRows | None:
    """Find the tensors of a module; ``None`` where its matrix is not quantized.

    Parameters
    ----------
    tensor
        The name that its matrix would have in a plain checkpoint.

    Raises
    ------
    InputError
        Where a tensor is missing, or has another shape or dtype.
    """
    layout = STORED_LAYOUTS[matrix.how.layout]
    module = tensor.removesuffix("weight")
    parts = layout.parts(matrix)
    codes = stored.find(module + next(iter(parts)))
    if codes is None or codes.dtype in FLOATS:
        return None
    label = f"{module.removesuffix('.')} of checkpoint {stored.folder.name}"
    _check_multiples(layout, matrix, label)
    entries = {}
    for end, part in parts.items():
        entry = stored.find(module + end)
        if entry is not None:
            _check_part(entry, part, stored)
            entries[end] = entry
        elif not part.is_optional:
            raise stored.missing([module + end], len(parts))
    how = matrix.how.encoding
    own: dict[str, Any] = {"is_sorted": matrix.how.is_sorted}
    if layout.rows is Bnb4Rows:
        entries |= (state := _state_entry(stored, module))
        own = {"offset": _offset(next(iter(state.values())), matrix, label)}
    return layout.rows(
        name=label,
        stored=entries,
        encoding=how,
        num_rows=matrix.outputs,
        num_elements=matrix.inputs,
        **own,
    )


def names_of(tensor: str, matrix: Matrix) -> list[str]:
    """Return the names of a module's tensors, that of the codes first."""
    module = tensor.removesuffix("weight")
    return [module + end for end in STORED_LAYOUTS[matrix.how.layout].parts(matrix)]


def _check_multiples(layout: StoredLayout, matrix: Matrix, label: str) -> None:
    outputs, inputs = layout.multiples(matrix)
    if matrix.outputs % outputs or matrix.inputs % inputs:
        raise InputError(
            label,
            got=f"{matrix.outputs} x {matrix.inputs}",
            allowed=f"multiples of {outputs} and {inputs} in the layout {matrix.how.layout}",
        )


def _check_part(entry: TensorEntry, part: Part, stored: StoredTensors) -> None:
    label = f"tensor {entry.name} of checkpoint {stored.folder.name}"
    if entry.shape not in part.shapes:
        raise InputError(
            label,
            got=f"shape {list(entry.shape)}",
            allowed=f"{list(part.shapes[0])} as its config says",
        )
    if entry.dtype not in part.dtypes:
        raise InputError(label, got=f"dtype {entry.dtype}", allowed=", ".join(part.dtypes))


def _state_entry(stored: StoredTensors, module: str) -> dict[str, TensorEntry]:
    """Find the description of a 4-bit tensor of bitsandbytes, named by the kind of its floats."""
    for kind in ("nf4", "fp4"):
        end = f"weight.quant_state.bitsandbytes__{kind}"
        if (entry := stored.find(module + end)) is not None:
            return {end: entry}
    raise stored.missing([f"{module}weight.quant_state.bitsandbytes__nf4"], 1)


def _offset(entry: TensorEntry, matrix: Matrix, label: str) -> float | None:
    """Check the description of a 4-bit tensor, and return the offset of nested scales."""
    is_nested = matrix.how.encoding.scale == "code"
    wanted = {
        "blocksize": matrix.how.encoding.group_elements,
        "shape": [matrix.outputs, matrix.inputs],
    }
    if is_nested:
        wanted["nested_blocksize"] = NESTED_RUN
    state: Any = None
    if entry.dtype == "U8" and 0 < entry.num_bytes <= LONGEST_STATE:
        try:
            state = json.loads(bytes(read_whole(entry).tolist()))
        except (ValueError, RecursionError):
            state = None
    if not isinstance(state, dict):
        raise InputError(f"quant_state of {label}", got="no JSON object", allowed="an object")
    for key, value in wanted.items():
        if state.get(key) != value:
            raise InputError(f"{key} of {label}", got=state.get(key), allowed=str(value))
    offset = state.get("nested_offset")
    if not is_nested:
        return None
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise InputError(f"nested_offset of {label}", got=offset, allowed="a number")
    return offset
