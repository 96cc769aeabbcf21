"""Rotary position embedding, as configs state it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import ROTARY_KINDS, RotarySpec

# The base of the rotation in most families, where a config names none.
DEFAULT_THETA = 10000.0


def rotary(config: HFConfig, theta: float = DEFAULT_THETA) -> RotarySpec:
    """Read the rotary embedding from any of the places where configs keep its keys.

    ``theta`` is the base where no key names one.
    """
    # As in transformers 5, the older key wins, and the newer one is then not read at all.
    found = config.raw.get("rope_parameters")
    found = {} if found is None else found
    for key, values in (
        ("rope_parameters", found),
        ("rope_scaling", config.raw.get("rope_scaling") or found),
    ):
        if not isinstance(values, Mapping):
            raise config.refusal(key, values, "an object with rope_type and its numbers")
        if any(isinstance(value, Mapping) for value in values.values()):
            raise config.refusal(key, "one set per kind of layer", "one for all")
        found = values
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ROTARY_KINDS:
        raise config.refusal("rope_type", kind, ", ".join(ROTARY_KINDS))
    name = "partial_rotary_factor"
    share = found[name] if name in found else config.raw.get(name) or 1
    if share != 1:
        raise config.refusal(name, share, "1 (whole heads)")
    base = found.get("rope_theta", config.raw.get("rope_theta", theta))
    spec = RotarySpec(theta=config.positive("rope_theta", base))
    return spec if kind == "default" else _scaled(config, found, replace(spec, kind=kind))


def _scaled(config: HFConfig, found: Mapping[str, Any], spec: RotarySpec) -> RotarySpec:
    names = ["factor"] + ["low_freq_factor", "high_freq_factor"] * (spec.kind == "llama3")
    for name in names:
        if name not in found:
            raise config.refusal(f"rope scaling {spec.kind!r}", f"no {name}", f"a {name} above 0")
    if spec.kind == "linear":
        return replace(spec, factor=config.positive("factor", found["factor"]))
    # Unlike the other keys, this one wins where it is outside of the scaling's own object.
    name = "original_max_position_embeddings"
    positions = found.get(name, config.whole("max_position_embeddings"))
    positions = config.raw.get(name, positions)
    low, high = (config.positive(name, found[name]) for name in names[1:])
    if high <= low:
        raise config.refusal("high_freq_factor", high, f"more than low_freq_factor {low}")
    return replace(
        spec,
        factor=config.positive("factor", found["factor"]),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=config.positive(name, positions),
    )
