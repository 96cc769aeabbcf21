"""The tensors of the decoder of text in a checkpoint of a model for images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

from executor.checkpoint.stored_tensors import StoredTensors
from profiles.errors import InputError

logger = logging.getLogger(__name__)

# Where checkpoints have the decoder's tensors, by the age of the file, and their names in its own
# causal model.
PREFIXES = {
    "model.language_model.": "model.",
    "model.text_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "language_model.": "model.",
}
# Names that need no change. In Qwen2-VL, the decoder has the plain ones.
OWN = ("lm_head.", "model.")


def language_part(stored: StoredTensors) -> StoredTensors:
    """Return the decoder's tensors by their names in its own causal model.

    One warning names the parts that are left out, such as the vision tower.

    Raises
    ------
    InputError
        Where a tensor is stored under two names.
    """
    every = {*stored.entries, *stored.promised}
    is_nested = any(name.startswith(tuple(PREFIXES)) for name in every)
    names: dict[str, str] = {}
    taken: set[str] = set()
    for name in sorted(every):
        own = _own_name(name, is_nested=is_nested)
        if own in taken:
            raise InputError(
                f"checkpoint {stored.folder.name}",
                got=f"{name} beside another tensor for {own}",
                allowed="one tensor for each name of the model",
            )
        if own is not None:
            names[name] = own
            taken.add(own)
    _warn(stored, every - set(names))
    return replace(
        stored,
        entries={names[name]: entry for name, entry in stored.entries.items() if name in names},
        promised={names[name]: shard for name, shard in stored.promised.items() if name in names},
        faults={names[name]: error for name, error in stored.faults.items() if name in names},
    )


def _own_name(name: str, *, is_nested: bool) -> str | None:
    """Return a tensor's name in the decoder's causal model, ``None`` where it is not of it."""
    for prefix, own in PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name if name.startswith(OWN[: 1 if is_nested else 2]) else None


def _warn(stored: StoredTensors, left: Iterable[str]) -> None:
    parts = sorted({name.removeprefix("model.").partition(".")[0] for name in left})
    if parts:
        logger.warning(
            "%s: only the decoder of text is read; left out: %s", stored.folder, ", ".join(parts)
        )
