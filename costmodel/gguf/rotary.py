"""The rotation of a model in GGUF: scalings in the metadata, divisors of frequencies in tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from costmodel.gguf.archs import Arch
from costmodel.gguf.metadata import ArchMetadata
from costmodel.gguf.model import GgufModel
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_entry import TensorEntry
from profiles.errors import InputError

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
# Tensors that are part of the description.
DIVISORS = (FREQS, LONG, SHORT)
# The base of a rotation where no key says it.
DEFAULT_THETA = 10000.0
# More pairs than any head has.
MAX_PAIRS = 2**14


def rope_parameters(arch: Arch, found: ArchMetadata, family: str) -> dict[str, Any]:
    """Return the ``rope_parameters`` of a config: one set, or one for each kind of layer."""
    theta = found.number("rope.freq_base", DEFAULT_THETA)
    if FREQS in found.model.tensors:
        _refuse_scaling(arch, found)
    keys = {"rope_theta": theta, **arch.implied.get("rope_parameters", {}), **_scaling(found)}
    for key, common in arch.rope_keys.items():
        if found.get(key) is not None:
            keys[common] = found.number(key, 1.0)
    if arch.window_theta is None or (arch.variants and family == arch.family):
        if found.number("rope.freq_base_swa", theta) != theta:
            raise found.refusal("rope.freq_base_swa", f"{theta}, as rope.freq_base")
        return keys
    own = found.number("rope.freq_base_swa", arch.window_theta)
    return {
        "full_attention": keys,
        "sliding_attention": {"rope_type": "default", "rope_theta": own},
    }


def _refuse_scaling(arch: Arch, found: ArchMetadata) -> None:
    """Refuse any other scaling beside ``FREQS``, whose divisors replace it in the description."""
    label, allowed = f"{FREQS} of {found.name}", f"no other scaling beside {FREQS}"
    beside = [name for name in (LONG, SHORT) if name in found.model.tensors]
    if beside:
        raise InputError(label, got=f"{beside[0]} beside it", allowed=allowed)
    if arch.window_theta is not None:
        got = f"a file of {found.arch}, whose layers with a window have a rotation of their own"
        raise InputError(label, got=got, allowed="a file without it")
    kind = found.get("rope.scaling.type")
    if kind == "none":
        return
    if kind not in (None, "linear"):
        raise found.refusal("rope.scaling.type", allowed)
    for key in ("rope.scaling.factor", "rope.scale_linear"):
        if found.number(key, 1.0) != 1:
            raise found.refusal(key, allowed)


def _scaling(found: ArchMetadata) -> dict[str, Any]:
    kind = found.get("rope.scaling.type")
    tensors = found.model.tensors
    if LONG in tensors or SHORT in tensors:
        return _longrope(found)
    if found.get("rope.scaling.attn_factor") not in (None, 1.0):
        raise found.refusal("rope.scaling.attn_factor", f"1.0 without {LONG}")
    # Without a type, llama.cpp takes the factor for a linear one.
    factor = found.number("rope.scaling.factor", found.number("rope.scale_linear", 1.0))
    if kind == "yarn":
        return _yarn(found, factor)
    if kind not in (None, "none", "linear"):
        allowed = "none, linear, yarn, or longrope with its tensors of factors"
        raise found.refusal("rope.scaling.type", allowed)
    if kind == "none" or factor == 1:
        return {"rope_type": "default"}
    return {"rope_type": "linear", "factor": factor}


def _longrope(found: ArchMetadata) -> dict[str, Any]:
    entries = found.model.tensors
    for name in (LONG, SHORT):
        if name not in entries:
            raise InputError(f"{name} of {found.name}", got="none", allowed="both lists of factors")
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": list(read_divisors(entries[SHORT])),
        "long_factor": list(read_divisors(entries[LONG])),
        "original_max_position_embeddings": found.whole(
            "rope.scaling.original_context_length", found.whole("context_length")
        ),
    }
    if found.get("rope.scaling.attn_factor") is not None:
        scaling["attention_factor"] = found.number("rope.scaling.attn_factor", 1.0)
    return scaling


def _yarn(found: ArchMetadata, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": found.whole(
            "rope.scaling.original_context_length", found.whole("context_length")
        ),
    }
    for key, common in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        if found.get(f"rope.scaling.{key}") is not None:
            scaling[common] = found.number(f"rope.scaling.{key}", 1.0)
    return scaling


def freq_divisors(model: GgufModel, spec: ModelSpec) -> tuple[float, ...]:
    """Return what divides the frequency of each pair, or nothing; Llama 3 has them."""
    entry = model.tensors.get(FREQS)
    if entry is None:
        return ()
    attention = spec.layer(0).attention
    rotary = next((k.attention.rotary for k in spec.layer_kinds if k.attention.rotary), None)
    pairs = 0 if rotary is None else (rotary.dim or attention.head_dim) // 2
    if entry.shape != (pairs,):
        raise InputError(
            f"{entry.name} of {entry.path.name}",
            got=f"a shape of {list(entry.shape)}",
            allowed=f"[{pairs}], one for each pair that is rotated",
        )
    divisors = read_divisors(entry)
    return () if set(divisors) == {1.0} else divisors


def read_divisors(entry: TensorEntry) -> tuple[float, ...]:
    """Read a short vector of F32 that divides frequencies.

    Raises
    ------
    InputError
        Where it is no such vector, or a number is not above 0.
    """
    label = f"{entry.name} of {entry.path.name}"
    if entry.dtype != "F32" or len(entry.shape) != 1 or entry.shape[0] > MAX_PAIRS:
        got = f"{entry.dtype} of shape {list(entry.shape)}"
        raise InputError(label, got=got, allowed=f"F32 of at most {MAX_PAIRS} numbers")
    with entry.path.open("rb") as file:
        file.seek(entry.offset_bytes)
        numbers = np.frombuffer(file.read(entry.num_bytes), dtype="<f4")
    if numbers.shape != entry.shape or not (np.isfinite(numbers) & (numbers > 0)).all():
        raise InputError(label, got="a number that divides nothing", allowed="numbers above 0")
    # The shortest decimals are what the model's own config has.
    return tuple(float(str(number)) for number in numbers)
