"""What a ``quantization_config`` says: how matrices of a checkpoint are encoded, and which are not.

It describes files. Quantized activations are not part of it: products are computed in the model's
dtype, which is more exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from costmodel.model.module_patterns import ModulePatterns
from profiles.encodings import (
    BLOCK_ENCODINGS,
    BNB_INT8,
    Encoding,
    Kind,
    four_bit_floats,
    fp8,
    integers,
)
from profiles.errors import InputError

# bitsandbytes writes neither size into the config.
BNB_BLOCK = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeights:
    """The encoding of a checkpoint's matrices.

    Parameters
    ----------
    layout
        How files have codes and scales: ``gptq``, ``gptq_v2``, ``awq``, ``pack-quantized``,
        ``int-quantized``, ``fp8``, ``float-quantized``, ``mxfp4``, ``bnb4`` or ``bnb8``.
    encoding
        What ``executor.checkpoint.repacking`` makes of them.
    skipped
        The modules that are plain.
    is_sorted
        Whether groups may be scattered over the inputs ("act-order"): inputs are then sorted.
    """

    layout: str
    encoding: Encoding
    skipped: ModulePatterns
    is_sorted: bool = False

    def with_scales(self, dtype: str) -> QuantizedWeights:
        """Return the same with the dtype that scales of groups have in the files."""
        how = self.encoding
        if how.kind not in (Kind.INT4, Kind.INT8):
            return self
        bits = 4 if how.kind is Kind.INT4 else 8
        encoding = integers(bits, how.group_elements, dtype, has_zeros=how.zero_bits > 0)
        return replace(self, encoding=encoding)

    def skips(self, module: str) -> bool:
        """Whether a module's weight is plain, by the module's name in the model."""
        return self.skipped.match(module)


def read_quantized(config: Mapping[str, Any], dtype: str) -> QuantizedWeights | None:
    """Read the ``quantization_config`` of a ``config.json``; ``None`` where it has none.

    Parameters
    ----------
    config
        The parsed ``config.json``.
    dtype
        The model's dtype, which scales of compressed-tensors have.

    Raises
    ------
    InputError
        For whatever is not read: another method, other bits, several groups of modules.
    """
    raw = config.get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise _refusal("", raw, "an object or null")
    method = raw.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        raise _refusal("quant_method", method, ", ".join(_READERS))
    return _READERS[method](raw, dtype)


def _gptq(raw: Mapping[str, Any], _: str) -> QuantizedWeights:
    bits = _one_of(raw, "bits", None, (4, 8))
    layout = _one_of(raw, "checkpoint_format", "gptq", ("gptq", "gptq_v2"))
    # Other bits for some modules; a part of the modules only.
    for key in ("dynamic", "modules_in_block_to_quantize"):
        if raw.get(key):
            raise _refusal(key, raw[key], "nothing")
    is_ordered = _one_of(raw, "desc_act", False, (True, False))
    is_head_plain = not _one_of(raw, "lm_head", False, (True, False))
    encoding = integers(bits, _group(raw), "float16", has_zeros=True)
    return QuantizedWeights(
        layout=layout,
        encoding=encoding,
        skipped=ModulePatterns(names=("lm_head",) if is_head_plain else ()),
        is_sorted=is_ordered and encoding.group_elements > 0,
    )


def _awq(raw: Mapping[str, Any], _: str) -> QuantizedWeights:
    _one_of(raw, "bits", None, (4,))
    version = raw.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _refusal("version", version, "gemm")
    _one_of(raw, "zero_point", True, (True,))
    encoding = integers(4, _group(raw), "float16", has_zeros=True)
    skipped = _skipped(raw, "modules_to_not_convert").with_names("lm_head")
    return QuantizedWeights(layout="awq", encoding=encoding, skipped=skipped)


def _compressed(raw: Mapping[str, Any], dtype: str) -> QuantizedWeights:
    groups = raw.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise _refusal("config_groups", groups, "one group")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or group.get("targets") != ["Linear"]:
        raise _refusal("config_groups", group, 'weights of the targets ["Linear"]')
    layouts = ("pack-quantized", "int-quantized", "float-quantized")
    layout = _one_of(raw, "format", None, layouts)
    # A group may have a format of its own.
    if group.get("format") not in (None, layout):
        raise _refusal("format of the group", group["format"], layout)
    if raw.get("kv_cache_scheme") is not None:
        raise _refusal("kv_cache_scheme", raw["kv_cache_scheme"], "null")
    skipped = _skipped(raw, "ignore", are_whole=True)
    encoding = _compressed_encoding(layout, weights, dtype)
    # Of the other orders, only the codes know.
    is_sorted = weights.get("actorder") in (True, "group") and encoding.group_elements > 0
    return QuantizedWeights(layout=layout, encoding=encoding, skipped=skipped, is_sorted=is_sorted)


def _compressed_encoding(layout: str, weights: Mapping[str, Any], dtype: str) -> Encoding:
    is_float = layout == "float-quantized"
    _one_of(weights, "type", "int", ("float" if is_float else "int",))
    strategies = ("tensor", "channel", "block") if is_float else ("group", "channel")
    strategy = _one_of(weights, "strategy", None, strategies)
    bits = _one_of(weights, "num_bits", None, (4, 8) if layout == "pack-quantized" else (8,))
    is_symmetric = _one_of(weights, "symmetric", True, (True, False))
    if is_float:
        if strategy == "block":
            return fp8(*_tile(weights, "block_structure"))
        return fp8(1, 0)
    if layout == "int-quantized" and (strategy != "channel" or not is_symmetric):
        raise _refusal("weights", dict(weights), "symmetric, with one scale for each channel")
    size = _group(weights) if strategy == "group" else 0
    return integers(bits, size, dtype, has_zeros=not is_symmetric)


def _fp8(raw: Mapping[str, Any], _: str) -> QuantizedWeights:
    _one_of(raw, "fmt", "e4m3", ("e4m3", "float8_e4m3fn"))
    # Absent, it has transformers' default; null stands for one scale a matrix, which is repeated
    # for each row: rows of several matrices can then be stacked.
    raw = {"weight_block_size": [128, 128], **raw}
    tile = (1, 0) if raw["weight_block_size"] is None else _tile(raw, "weight_block_size")
    skipped = _skipped(raw, "modules_to_not_convert").with_names("lm_head")
    return QuantizedWeights(layout="fp8", encoding=fp8(*tile), skipped=skipped)


def _mxfp4(raw: Mapping[str, Any], _: str) -> QuantizedWeights:
    skipped = _skipped(raw, "modules_to_not_convert")
    return QuantizedWeights(layout="mxfp4", encoding=BLOCK_ENCODINGS["MXFP4"], skipped=skipped)


def _bitsandbytes(raw: Mapping[str, Any], _: str) -> QuantizedWeights:
    skipped = _skipped(raw, "llm_int8_skip_modules").with_names("lm_head")
    if _one_of(raw, "load_in_8bit", False, (True, False)):
        return QuantizedWeights(layout="bnb8", encoding=BNB_INT8, skipped=skipped)
    _one_of(raw, "load_in_4bit", False, (True,))
    _one_of(raw, "bnb_4bit_quant_type", "fp4", ("fp4", "nf4"))
    is_nested = _one_of(raw, "bnb_4bit_use_double_quant", False, (True, False))
    encoding = four_bit_floats(BNB_BLOCK, is_nested=is_nested)
    return QuantizedWeights(layout="bnb4", encoding=encoding, skipped=skipped)


_READERS: Mapping[str, Callable[[Mapping[str, Any], str], QuantizedWeights]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "bitsandbytes": _bitsandbytes,
}


def _one_of(raw: Mapping[str, Any], key: str, default: object, allowed: tuple[Any, ...]) -> Any:
    """Return a key's value, of the kind and among the values that are allowed."""
    value = raw.get(key, default)
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise _refusal(key, value, ", ".join(str(one) for one in allowed))
    return value


def _group(raw: Mapping[str, Any]) -> int:
    """Return the inputs that share a scale; 0 for all of a row, which files call -1."""
    size = raw.get("group_size")
    if type(size) is not int or (size != -1 and not _is_power(size)):
        raise _refusal("group_size", size, "32, 64, 128, ... or -1")
    return max(0, size)


def _is_power(size: int) -> bool:
    return 32 <= size < 2**20 and not size & (size - 1)


def _tile(raw: Mapping[str, Any], key: str) -> tuple[int, int]:
    tile = raw.get(key)
    if not isinstance(tile, list) or [type(size) for size in tile] != [int, int]:
        raise _refusal(key, tile, "two whole numbers")
    rows, columns = tile
    if not 1 <= rows < 2**20 or not _is_power(columns):
        raise _refusal(key, tile, "rows, and columns that are 32, 64, 128, ...")
    return rows, columns


def _skipped(raw: Mapping[str, Any], key: str, *, are_whole: bool = False) -> ModulePatterns:
    return ModulePatterns.read(raw.get(key), f"{key} of quantization_config", are_whole=are_whole)


def _refusal(key: str, got: object, allowed: str) -> InputError:
    what = f"{key} of quantization_config" if key else "quantization_config"
    return InputError(what, got=got, allowed=allowed)
