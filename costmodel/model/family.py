"""A family of models: how to read its config, and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

HEAD_MODULE = "lm_head"
# Buffers in old checkpoints; they are computed from the config instead.
ROTARY_BUFFERS = r".*\.rotary_emb\.inv_freq"
# The class in transformers that uses a ``tokenizer.json`` unchanged.
AS_IT_STANDS = "TokenizersBackend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family, by its ``model_type``: each file of ``costmodel.families`` defines one.

    Parameters
    ----------
    defaults
        Values for absent keys, those of its config class in transformers. A test compares every
        entry with that class.
    describe
        Makes the description, or raises ``InputError`` naming the key that is not supported.
    modules
        For each of our module names (see ``costmodel.model.shapes``) the checkpoint's modules
        whose rows are stacked to make it. ``{layer}`` and ``{expert}`` stand for numbers.
    prefix
        The path of the decoder in transformers' causal model.
    unread
        Patterns of tensors that a checkpoint may have although nothing reads them.
    tokenizer_class
        The class in transformers that reads its ``tokenizer.json`` where no file names a class.
    fixes_tokenizer_class
        Whether that class is used even where a file names another.
    """

    defaults: Mapping[str, object]
    describe: Callable[[HFConfig], ModelSpec]
    modules: Mapping[str, tuple[str, ...]]
    prefix: str = "model."
    unread: tuple[str, ...] = (ROTARY_BUFFERS,)
    tokenizer_class: str = AS_IT_STANDS
    fixes_tokenizer_class: bool = False

    def tensor_names(
        self, spec: ModelSpec, name: str, layer: int, expert: int = 0
    ) -> tuple[str, ...]:
        """Return the tensors of transformers' causal model that are stacked to make one of ours.

        Parameters
        ----------
        name
            A name of ``costmodel.model.shapes``, such as ``qkv.weight``.
        layer, expert
            Numbers from zero; ignored for tensors outside of layers or experts.
        """
        module, _, kind = name.rpartition(".")
        if module == "head":
            if not spec.head.is_tied:
                return (f"{HEAD_MODULE}.{kind}",)
            module = "tokens"
        return tuple(
            f"{self.prefix}{part.format(layer=layer, expert=expert)}.{kind}"
            for part in self.modules[module]
        )

    def may_ignore(self, name: str) -> bool:
        """Return whether a checkpoint may have this tensor although nothing reads it."""
        return any(re.fullmatch(pattern, name) for pattern in self.unread)
