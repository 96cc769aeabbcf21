"""A model's description from whatever names it: a preset, a folder, a file."""

from __future__ import annotations

import functools
from pathlib import Path

from costmodel.families import preset_config, spec_from_config
from costmodel.gguf.encoded import load_gguf_spec
from costmodel.gguf.paths import is_gguf, refuse_gguf_folder
from costmodel.model.spec import ModelSpec
from costmodel.model.stored_scales import stored_scales
from profiles.errors import InputError
from profiles.files import from_json, read_json


def load_model_spec(name_or_path: str) -> ModelSpec:
    """Load a model's description from a preset's name, a folder with a ``config.json``, a
    ``config.json``, a GGUF file, or a file with a saved ``ModelSpec``."""
    path = Path(name_or_path)
    if is_gguf(path):
        return load_gguf_spec(path)
    try:
        refuse_gguf_folder(path)
        path = path / "config.json" if path.is_dir() else path
        is_file = path.suffix == ".json" or path.is_file()
    except OSError as error:
        # The operating system refuses the name, so no file has it.
        raise InputError("model", got=error.strerror, allowed="a name or a path") from None
    if is_file:
        raw = read_json(path, "model config", takes_infinity=True)
        if "layer_kinds" in raw:
            return from_json(ModelSpec, read_json(path, "model"), f"model {path}")
        spec = spec_from_config(raw, name=path.resolve().parent.name)
        scales = stored_scales(path.parent, spec)
        return spec if scales is None else spec_from_config(raw, name=spec.name, scales=scales)
    return _preset_spec(name_or_path)


@functools.cache
def _preset_spec(name: str) -> ModelSpec:
    """Read a preset once: a config may leave any of a mixture's thousands of modules plain."""
    return spec_from_config(preset_config(name), name=name.lower())
