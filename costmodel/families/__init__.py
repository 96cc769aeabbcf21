"""Model families, one file each, named by the ``model_type`` of their ``config.json``.

A family's file defines ``FAMILY``: it reads a config into a ``ModelSpec``, names the checkpoint's
tensors, and refuses settings that are not supported. A new family takes one file here and no other
change.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import pkgutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from costmodel.families._refused import REFUSED
from costmodel.families._text_parts import TEXT_PARTS, TextPart, check_head, text_config
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.quantized import QuantizedWeights, read_quantized
from costmodel.model.quantized_model import with_quantized
from costmodel.model.spec import ModelSpec
from profiles.errors import InputError

CHECKPOINT_FOLDER = "a Hugging Face folder, with config.json and safetensors files, or a GGUF file"


@functools.cache
def family_names() -> tuple[str, ...]:
    """Return the names of all families; modules with a leading underscore are shared code."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


@functools.cache
def family_named(name: str) -> Family:
    """Find a family by its ``model_type``."""
    if name not in family_names():
        raise InputError("model family", got=repr(name), allowed=", ".join(family_names()))
    family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return family


def tokenizer_owner(kind: object) -> Family | TextPart | None:
    """Find what says which class of tokenizer belongs to a ``model_type``."""
    name = str(kind)
    if name in TEXT_PARTS:
        return TEXT_PARTS[name]
    return family_named(name) if name in family_names() else None


def spec_from_config(raw: Mapping[str, Any], *, name: str, scales: str | None = None) -> ModelSpec:
    """Read a model's description from the ``config.json`` of a supported family.

    Of a model for images, this is the decoder of text.

    Parameters
    ----------
    scales
        The dtype of the scales of quantized integers, where it is known. ``None`` stands for the
        one that the method usually has.

    Raises
    ------
    InputError
        Naming the key whose value is not supported.
    """
    outer, raw = raw, text_config(raw, name)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in family_names():
        raise _no_family(kind, name)
    family = family_named(kind)
    config = HFConfig(
        family=kind, name=name, raw=raw, defaults=family.defaults, aliases=family.aliases
    )
    spec = family.describe(config)
    if is_text_part(outer):
        check_head(spec.head, name)
    quantized = quantized_weights(raw, spec, scales)
    if quantized is None:
        return spec
    return with_quantized(spec, family, quantized, is_text_part=is_text_part(outer))


def quantized_weights(
    raw: Mapping[str, Any], spec: ModelSpec, scales: str | None = None
) -> QuantizedWeights | None:
    """Read how a ``config.json`` says that matrices are encoded; ``None`` for plain ones.

    ``scales`` is as in ``spec_from_config``.
    """
    found = read_quantized(text_config(raw, spec.name), spec.dtype)
    return found.with_scales(scales) if found and scales else found


def is_text_part(raw: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a model for images, of which only the decoder is read."""
    return str(raw.get("model_type")) in TEXT_PARTS


def _no_family(kind: object, name: str) -> InputError:
    """Make the error for a ``model_type`` that is no family, with the nearest one that is."""
    what = f"model_type of {name}"
    if isinstance(kind, str) and kind in REFUSED:
        mechanism, nearest = REFUSED[kind]
        return InputError(
            what,
            got=f"{kind!r}, which needs {mechanism}",
            allowed="a family that runs",
            hint=f"a model of {nearest}, the nearest family",
        )
    near = difflib.get_close_matches(str(kind).lower(), family_names(), n=3)
    return InputError(
        what, got=repr(kind), allowed=", ".join(family_names()), hint=" or ".join(near)
    )


def preset_names() -> list[str]:
    """Return the names that ``load_model_spec`` knows without a file."""
    return sorted(_presets())


def preset_config(name: str) -> Mapping[str, Any]:
    """Return the ``config.json`` of a preset."""
    preset = _presets().get(name.lower())
    if preset is None:
        # The name of a hub may stand before that of the model.
        near = _near_presets(Path(name.lower()).name)
        listed = "" if near or "/" in name else f": {', '.join(preset_names())}"
        raise InputError(
            "model",
            got=f"{name!r}, which is no folder here",
            allowed=f"{CHECKPOINT_FOLDER} (nothing is downloaded), or a preset{listed}",
            hint=" or ".join(near),
        )
    return preset


def _near_presets(name: str) -> list[str]:
    """Return presets that begin with ``name``, else those that look like it."""
    longer = [preset for preset in preset_names() if name and preset.startswith(name)]
    return longer[:3] or difflib.get_close_matches(name, preset_names(), n=3)


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files(__name__).joinpath("presets.json").read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = json.loads(text)
    return presets
