"""What is known of a family of models: how to read its config, and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec

HEAD_MODULE = "lm_head"
# Buffers that old checkpoints hold and that are made anew from the config.
ROTARY_BUFFERS = r".*\.rotary_emb\.inv_freq"
# The class of transformers that takes a ``tokenizer.json`` as it stands.
AS_IT_STANDS = "TokenizersBackend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family, by its ``model_type``: each file of ``costmodel.families`` defines one.

    Parameters
    ----------
    defaults
        What its config class in transformers takes for keys that are absent. A test holds every
        entry against that class.
    describe
        Makes the description, or raises ``InputError`` naming the key that is not followed.
    modules
        Our module names (see ``costmodel.model.layout``) and the checkpoint's modules whose rows
        are stacked to make each. ``{layer}`` and ``{expert}`` stand for numbers.
    prefix
        Where the decoder is in transformers' causal model.
    unread
        Patterns of tensors that a checkpoint may hold although nothing reads them.
    tokenizer_class
        The class in transformers that reads its ``tokenizer.json`` where no file names one.
    fixes_tokenizer_class
        Whether it is that class even where a file names another.
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
        """Translate one of our tensor names into those, in transformers' causal model, that are
        stacked to make it.

        Parameters
        ----------
        name
            A name of ``costmodel.model.layout``, such as ``qkv.weight``.
        layer, expert
            Numbers from zero; not read for tensors that have none.
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
        """Whether a tensor of a checkpoint is one that nothing needs to read."""
        return any(re.fullmatch(pattern, name) for pattern in self.unread)
