"""A family of models: how to read its config, and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec
from costmodel.model.stacked import StackedTensor

# Buffers in old checkpoints; they are computed from the config instead.
ROTARY_BUFFERS = r".*\.rotary_emb\.inv_freq"
Modules = Mapping[str, tuple[str, ...]]
LAYER_NUMBER = re.compile(r"\blayers\.(\d+)\.")
# The class in transformers that uses a ``tokenizer.json`` unchanged.
GENERIC_TOKENIZER = "TokenizersBackend"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One family, by its ``model_type``: each file of ``costmodel.families`` defines one.

    Parameters
    ----------
    defaults
        Values for absent keys, those of its config class in transformers. A test compares every
        entry with that class.
    aliases
        Its own names for common keys, such as ``n_embd`` for ``hidden_size``.
    describe
        Makes the description, or raises ``InputError`` naming the key that is not supported.
    modules
        For each of our module names (see ``costmodel.model.shapes``) the checkpoint's modules
        whose rows are stacked to make it, or for a tensor's name the checkpoint's tensors.
        ``{layer}`` and ``{expert}`` stand for numbers. A function where they depend on the model.
    row_blocks
        For a module that is stored as one tensor with its rows in another order, the blocks of rows
        that make ours: the first row and the number of rows of each.
    by_head
        Modules whose vectors are stored as matrices, [heads, head_dim].
    transposed
        Modules whose matrices are stored as [inputs, outputs].
    prefix
        The path of the decoder in transformers' causal model.
    head
        The module of the head in transformers' causal model.
    unread
        Patterns of tensors that a checkpoint may have although nothing reads them.
    ignores_later_layers
        Whether layers beyond those of the config are left out: they predict further tokens.
    tokenizer_class
        The class in transformers that reads its ``tokenizer.json`` where no file names a class.
    fixes_tokenizer_class
        Whether that class is used even where a file names another.
    stacked
        For a tensor of ours that is stored for all experts at once, or in another order, how.
    """

    defaults: Mapping[str, object]
    describe: Callable[[HFConfig], ModelSpec]
    modules: Modules | Callable[[ModelSpec], Modules]
    row_blocks: Mapping[str, Callable[[LayerSpec], list[tuple[int, int]]]] = field(
        default_factory=dict
    )
    aliases: Mapping[str, str] = field(default_factory=dict)
    by_head: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    prefix: str = "model."
    head: str = "lm_head"
    unread: tuple[str, ...] = (ROTARY_BUFFERS,)
    ignores_later_layers: bool = False
    tokenizer_class: str = GENERIC_TOKENIZER
    fixes_tokenizer_class: bool = False
    stacked: Mapping[str, StackedTensor] = field(default_factory=dict)

    @property
    def base_prefix(self) -> str:
        """The path of the base model, which a checkpoint's names may leave out."""
        return self.prefix.partition(".")[0] + "."

    def tensor_names(
        self, spec: ModelSpec, name: str, layer: int, expert: int = 0
    ) -> tuple[str, ...]:
        """Return the tensors of transformers' causal model that are stacked to make one of ours.

        Parameters
        ----------
        name
            A name of ``costmodel.model.shapes``, such as ``qkv.weight``.
        layer, expert
            Numbers from zero; ignored for tensors outside of layers or experts. The layers of a
            stage of a pipeline are numbered from the stage's first.
        """
        layer += spec.stage.first if spec.stage is not None else 0
        module, _, kind = name.rpartition(".")
        if module == "head":
            if not spec.head.is_tied or kind == "bias":
                return (f"{self.head}.{kind}",)
            module = "tokens"
        kind = kind.removeprefix("float32_")
        # A whole tensor may have a name of its own, or else it is a part of its module.
        modules = self.modules(spec) if callable(self.modules) else self.modules
        parts = modules.get(name) or [f"{part}.{kind}" for part in modules[module]]
        return tuple(self.prefix + part.format(layer=layer, expert=expert) for part in parts)

    def may_ignore(self, name: str, num_layers: int) -> bool:
        """Return whether a checkpoint may have this tensor although nothing reads it."""
        found = LAYER_NUMBER.search(name)
        if self.ignores_later_layers and found and int(found[1]) >= num_layers:
            return True
        return any(re.fullmatch(pattern, name) for pattern in self.unread)
