"""A model as a description: everything that a decoder computes with. No torch.

A model is a list of decoder layers. Equal layers form a kind: costs are sums over the kinds and
their counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from costmodel.model.checks import check_choice, check_least
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.stage_spec import StageSpec
from profiles.errors import InputError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# More than any model has; a check of the input, because every layer takes memory in a plan.
MAX_LAYERS = 10_000
# In all layers together, more than any model has; each expert has tensors of its own.
MAX_EXPERTS = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingSpec:
    """The input of the first decoder layer: the rows that are looked up for a token.

    Parameters
    ----------
    has_positions
        Whether a learned row for the token's position is added.
    position_offset
        The row of the table of positions for the first position.
    scale
        Factor of the token's row.
    norm
        The norm of the sum (BLOOM); ``None`` leaves it.
    width
        Elements of a token's row where it is projected to the hidden size, and the last hidden
        states back to it (OPT-350M); ``None`` is the hidden size, without projections.
    rounds_scale
        Whether ``scale`` is rounded to the model's dtype first (Gemma).
    """

    has_positions: bool = False
    position_offset: int = 0
    scale: float = 1.0
    norm: NormSpec | None = None
    width: int | None = None
    rounds_scale: bool = False

    def __post_init__(self) -> None:
        if self.width is not None:
            check_least(self, 1, "width")

    @property
    def has_tensors(self) -> bool:
        """Whether it has tensors besides the table of tokens."""
        return self.has_positions or self.norm is not None or self.width is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """The output head, which makes the logits.

    Parameters
    ----------
    is_tied
        Whether the head's matrix is the token embedding table.
    scale
        Factor of the logits.
    has_bias
        Whether a bias is added to the logits.
    soft_cap
        ``c`` in ``c tanh(logits / c)``, after the scale; ``None`` leaves them.
    """

    is_tied: bool = False
    scale: float = 1.0
    has_bias: bool = False
    soft_cap: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer.

    Parameters
    ----------
    name
        Preset name, or the folder that the config came from.
    family
        The file of ``costmodel.families`` that reads its config and names its tensors.
    max_positions
        The longest context: prompt and generated tokens together.
    layer_kinds
        The descriptions of the layers, each different one once.
    layer_order
        For each layer, the number of its kind.
    dtype
        The dtype that the model computes in.
    encoded
        The matrices outside of layers that are encoded: all rows of each, in order.
    stage
        Where these layers are one stage of a larger model (see ``costmodel.cluster``), which ones;
        ``None`` is a whole model.
    """

    name: str
    family: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    layer_kinds: tuple[LayerSpec, ...]
    layer_order: tuple[int, ...]
    embedding: EmbeddingSpec = EmbeddingSpec()
    final_norm: NormSpec = NormSpec()  # noqa: RUF009  # frozen
    head: HeadSpec = HeadSpec()
    dtype: str = "bfloat16"
    encoded: tuple[EncodedRows, ...] = ()
    stage: StageSpec | None = None

    def __post_init__(self) -> None:
        check_choice("model dtype", self.dtype, tuple(DTYPE_BYTES))
        check_least(self, 1, "vocab_size", "hidden_size", "max_positions")
        if not 1 <= len(self.layer_order) <= MAX_LAYERS:
            raise InputError(
                "model layers", got=len(self.layer_order), allowed=f"1 to {MAX_LAYERS}"
            )
        if set(self.layer_order) != set(range(len(self.layer_kinds))):
            raise InputError(
                "model layer_order",
                got="numbers of other kinds",
                allowed=f"each of the {len(self.layer_kinds)} kinds of layer_kinds",
            )
        if self.stage is not None and self.stage.count != self.num_layers:
            raise InputError(
                "model stage",
                got=f"a stage of {self.stage.count} layers",
                allowed=f"the {self.num_layers} layers of layer_order",
            )
        experts = sum(self.layer(i).num_experts for i in range(self.num_layers))
        if experts > MAX_EXPERTS:
            raise InputError("model experts", got=experts, allowed=f"at most {MAX_EXPERTS} in all")

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layer_order)

    def layer(self, number: int) -> LayerSpec:
        """Return one decoder layer, by its number from zero."""
        return self.layer_kinds[self.layer_order[number]]

    @property
    def kinds_and_counts(self) -> list[tuple[LayerSpec, int]]:
        """Each kind of layer, with the number of its layers."""
        return [(kind, self.layer_order.count(i)) for i, kind in enumerate(self.layer_kinds)]

    @property
    def component_names(self) -> tuple[str, ...]:
        """The classes of components; components of one name are one class."""
        is_stored = self.embedding.has_tensors or not self.shares_table
        names = [name for kind in self.layer_kinds for name in kind.component_names]
        first, last = ["embedding"] * (self.has_embedding and is_stored), ["head"] * self.has_head
        return tuple(dict.fromkeys((*first, *names, *last)))

    @property
    def has_embedding(self) -> bool:
        """Whether these layers begin with tokens; a later stage begins with hidden states."""
        return self.stage is None or self.stage.has_embedding

    @property
    def has_head(self) -> bool:
        """Whether these layers end with the choice of tokens; an earlier stage ends before it."""
        return self.stage is None or self.stage.has_head

    @property
    def shares_table(self) -> bool:
        """Whether the head's matrix is the table of tokens, and both are here.

        The first and the last stage of a tied model have a copy each.
        """
        return self.head.is_tied and self.has_embedding and self.has_head

    @property
    def head_width(self) -> int:
        """Elements of a row of the head, and of the table of tokens."""
        return self.embedding.width or self.hidden_size

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element in the compute dtype."""
        return DTYPE_BYTES[self.dtype]

    @property
    def is_encoded(self) -> bool:
        """Whether any matrix is encoded."""
        return bool(self.encoded) or any(kind.encoded for kind in self.layer_kinds)

    @property
    def full_bits(self) -> int:
        """Bits of one element in the compute dtype."""
        return 8 * self.dtype_bytes

    def with_dtype(self, dtype: str) -> ModelSpec:
        """Return the same model with another compute dtype."""
        return replace(self, dtype=dtype)


def model_of_layers(layers: list[LayerSpec], **fields: Any) -> ModelSpec:
    """Make a model of a list of layers; equal layers become one kind."""
    kinds = tuple(dict.fromkeys(layers))
    numbers = {kind: i for i, kind in enumerate(kinds)}
    order = tuple(numbers[layer] for layer in layers)
    return ModelSpec(layer_kinds=kinds, layer_order=order, **fields)
