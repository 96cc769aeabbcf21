"""Rotary position embedding, as configs state it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from costmodel.model.hf_config import HFConfig
from costmodel.model.rotary_spec import ROTARY_KINDS, RotarySpec

# The base of the rotation in most families, where a config names none.
DEFAULT_THETA = 10000.0
# transformers' kinds, and ours. Up to the positions of a model, ``dynamic`` changes nothing.
KINDS: Mapping[str, str] = {kind: kind for kind in ROTARY_KINDS} | {"dynamic": "default"}


def rotary(
    config: HFConfig,
    theta: float = DEFAULT_THETA,
    *,
    head_dim: int,
    share: float = 1.0,
    is_interleaved: bool = False,
    kinds: Mapping[str, str] = KINDS,
) -> RotarySpec:
    """Read the rotary embedding from any of the places where configs keep its keys.

    Parameters
    ----------
    theta, share
        The base, and the share of each head that is rotated, where no key names one.
    kinds
        The kinds that transformers accepts for the family, and ours.
    """
    found = rope_keys(config)
    kind = found.get("rope_type", found.get("type", "default"))
    if not isinstance(kind, str) or kind not in kinds:
        raise config.refusal("rope_type", kind, ", ".join(kinds))
    kind = kinds[kind]
    name = "partial_rotary_factor"
    outside = config.raw.get(name)
    named = found.get(name, share if outside is None else outside)
    dim = int(head_dim * config.positive(name, named))
    if dim % 2 or not 0 < dim <= head_dim:
        raise config.refusal(name, named, f"an even number of the {head_dim} elements of a head")
    base = found.get("rope_theta", config.raw.get("rope_theta", theta))
    spec = RotarySpec(
        theta=config.positive("rope_theta", base),
        kind=kind,
        dim=None if dim == head_dim else dim,
        is_interleaved=is_interleaved,
    )
    readers = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
    return readers[kind](config, found, spec) if kind in readers else spec


def rotary_keys_of(
    config: HFConfig, kind: str, theta_key: str | None, theta: float, *, is_scaled: bool
) -> HFConfig:
    """Return a config with the rotation of one kind of layer as that of all.

    Parameters
    ----------
    kind
        Its key in ``rope_parameters``.
    theta_key, theta
        The key outside of ``rope_parameters`` that has the base, and the base without any.
    is_scaled
        Whether ``rope_scaling`` is of this kind.
    """
    nested = config.raw.get("rope_parameters")
    nested = {} if nested is None else nested
    if not isinstance(nested, Mapping) or any(
        not isinstance(value, Mapping | None) for value in nested.values()
    ):
        raise config.refusal("rope_parameters", nested, "an object for each kind of layer")
    own: dict[str, Any] = dict(nested.get(kind) or {})
    scaling = config.raw.get("rope_scaling") if is_scaled else None
    if scaling is not None:
        if not isinstance(scaling, Mapping):
            raise config.refusal("rope_scaling", scaling, "an object with rope_type")
        if config.raw.get("rope_parameters") is not None and nested.get(kind) is None:
            raise config.refusal("rope_parameters", nested, f"{kind} beside rope_scaling")
        own |= scaling
    own.setdefault("rope_theta", config.raw.get(theta_key, theta) if theta_key else theta)
    kept = {k: v for k, v in config.raw.items() if k not in ("rope_scaling", "rope_theta")}
    return replace(config, raw=kept | {"rope_parameters": own})


def with_rotary_keys(config: HFConfig, keys: Mapping[str, Any]) -> HFConfig:
    """Return a config with the ``rope_parameters`` that its class has where a file has none."""
    if config.raw.get("rope_parameters") is not None:
        return config
    return replace(config, raw={**config.raw, "rope_parameters": dict(keys)})


def rope_keys(config: HFConfig) -> Mapping[str, Any]:
    """Return the keys of the rotary embedding, from any of their places."""
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
    return found


def _number(config: HFConfig, found: Mapping[str, Any], name: str, kind: str) -> float:
    if name not in found:
        raise config.refusal(f"rope scaling {kind!r}", f"no {name}", f"a {name} above 0")
    return config.positive(name, found[name])


def _linear(config: HFConfig, found: Mapping[str, Any], spec: RotarySpec) -> RotarySpec:
    return replace(spec, factor=_number(config, found, "factor", spec.kind))


def _llama3(config: HFConfig, found: Mapping[str, Any], spec: RotarySpec) -> RotarySpec:
    factor, low, high = (
        _number(config, found, name, spec.kind)
        for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    if high < low:
        raise config.refusal("high_freq_factor", high, f"at least low_freq_factor {low}")
    return replace(
        spec,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=_original_positions(config, found),
    )


def _yarn(config: HFConfig, found: Mapping[str, Any], spec: RotarySpec) -> RotarySpec:
    original = _original_positions(config, found)
    # As in transformers, the positions decide where the file names the original ones.
    factor = _number(config, found, "factor", spec.kind)
    scale = found.get("attention_factor")
    if scale is None:
        scale = yarn_scale(factor)
        if found.get("mscale") and found.get("mscale_all_dim"):
            one, other = (
                yarn_scale(factor, config.positive(name, found[name]))
                for name in ("mscale", "mscale_all_dim")
            )
            scale = one / other
    return replace(
        spec,
        factor=factor,
        original_max_positions=original,
        attention_factor=config.positive("attention_factor", scale),
        beta_fast=config.positive("beta_fast", found.get("beta_fast") or 32),
        beta_slow=config.positive("beta_slow", found.get("beta_slow") or 1),
        truncates=bool(found.get("truncate", True)),
    )


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """Return the factor of attention of Peng et al. 2023, equation 22, times ``mscale``."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(config: HFConfig, found: Mapping[str, Any], spec: RotarySpec) -> RotarySpec:
    factors = {}
    for name in ("short_factor", "long_factor"):
        listed = found.get(name)
        if not isinstance(listed, list):
            raise config.refusal(name, listed, "a list of numbers above 0")
        factors[name] = tuple(config.positive(name, value) for value in listed)
    original = _original_positions(config, found)
    scale = found.get("attention_factor")
    if scale is None:
        grown = config.whole("max_position_embeddings") / original
        factor = found.get("factor") or grown
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return replace(
        spec,
        original_max_positions=original,
        attention_factor=config.positive("attention_factor", scale),
        short_factors=factors["short_factor"],
        long_factors=factors["long_factor"],
    )


def _original_positions(config: HFConfig, found: Mapping[str, Any]) -> float:
    # Unlike the other keys, this one wins where it is outside of the scaling's own object.
    name = "original_max_position_embeddings"
    positions = found.get(name, config.whole("max_position_embeddings"))
    return config.positive(name, config.raw.get(name, positions))
