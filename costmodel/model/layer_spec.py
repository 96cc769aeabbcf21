"""A decoder layer as a description: attention, norms, and a feed-forward network. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.checks import check_choice
from costmodel.model.encoded_rows import EncodedRows
from costmodel.model.feed_forward_spec import ExpertsSpec, MlpSpec
from costmodel.model.norm_spec import NormSpec
from profiles.errors import InputError

NORM_PLACES = ("before", "after", "sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: attention, then an MLP or a mixture of experts.

    The output of each half is added to its input.

    Parameters
    ----------
    norm_places
        Places of the norms: ``before`` each half, ``after`` it (on its output, before that is
        added), on the ``sum`` of its input and output, or several of them.
    residual_scale
        Factor of the output of each half.
    is_parallel
        Whether both halves have the layer's input (GPT-J), instead of one after the other.
    shares_norm
        Whether parallel halves have one norm, that of attention.
    encoded
        The matrices of the checkpoint that are encoded: all rows of each, in order.
    """

    attention: AttentionSpec
    mlp: MlpSpec | None = None
    experts: ExpertsSpec | None = None
    norm: NormSpec = NormSpec()  # noqa: RUF009  # frozen
    norm_places: tuple[str, ...] = ("before",)
    residual_scale: float = 1.0
    is_parallel: bool = False
    shares_norm: bool = False
    encoded: tuple[EncodedRows, ...] = ()

    def __post_init__(self) -> None:
        if self.is_parallel and (self.mlp is None or self.norm_places != ("before",)):
            raise InputError(
                "parallel layer", got="experts or norms after", allowed="an mlp and norms before"
            )
        is_plain = self.query_norm.kind == "layer" and not self.query_norm.has_bias
        if self.attention.qk_norm == "heads" and not is_plain:
            raise InputError("qk_norm heads", got="another norm", allowed="layer, without a bias")
        if (self.mlp is None) == (self.experts is None):
            raise InputError("layer", got="not one feed-forward", allowed="an mlp or experts")
        for place in self.norm_places:
            check_choice("norm place", place, NORM_PLACES)

    @property
    def query_norm(self) -> NormSpec:
        """The norm of queries and keys, where ``attention.qk_norm`` says that there is one."""
        return self.attention.qk_norm_spec or self.norm

    @property
    def adds_plainly(self) -> bool:
        """Whether the output of each half is added without a norm or a factor."""
        return "after" not in self.norm_places and self.residual_scale == 1

    @property
    def num_experts(self) -> int:
        """Number of experts; zero in a dense layer."""
        return self.experts.num_experts if self.experts else 0

    @property
    def component_names(self) -> tuple[str, ...]:
        """Names of the components, each with its own placement, in the order of computation."""
        if self.experts is None:
            return ("attention", "mlp")
        shared = ("shared_expert",) if self.experts.shared else ()
        return ("attention", "router", *shared, "experts")
