"""The second half of a decoder layer as a description: an MLP or a mixture of experts. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.checks import check_choice, check_least, check_positive
from costmodel.model.expert_use import needed_of_rarest
from profiles.errors import InputError

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh", "relu2", "xielu")
# With so many rows at once, the temporaries of experts are small beside their weights.
EXPERT_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """A feed-forward network.

    Parameters
    ----------
    size
        Width of the inner vectors.
    activation
        ``silu``, ``relu`` or ``gelu`` (the exact one); ``gelu_tanh`` is its approximation,
        ``relu2`` the square of ``relu``. ``xielu`` has two learned parameters a layer (Huang and
        Schlag 2024), and no gate.
    is_gated
        Whether the activated projection is multiplied by a second one, as in SwiGLU.
    has_bias
        Whether the projections have biases.
    swiglu_limit
        ``c`` of a gate ``(up + 1) * gate * sigmoid(swiglu_alpha * gate)``, where ``gate`` is at
        most ``c`` and ``up`` is between ``-c`` and ``c`` (gpt-oss). ``None`` for a plain gate.
    swiglu_alpha
        Factor in the sigmoid of that gate.
    """

    size: int
    activation: str = "silu"
    is_gated: bool = True
    has_bias: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float = 1.0

    def __post_init__(self) -> None:
        check_least(self, 1, "size")
        if self.swiglu_limit is not None:
            check_positive("mlp swiglu_limit", self.swiglu_limit)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.activation == "xielu" and self.is_gated:
            raise InputError("mlp activation", got="xielu with a gate", allowed="xielu without one")

    @property
    def inner_rows(self) -> int:
        """Rows of the stacked matrix that makes the inner vectors."""
        return (2 if self.is_gated else 1) * self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How a router chooses and weighs the experts of a token, from one logit for each expert.

    Parameters
    ----------
    score
        ``softmax`` over all experts, or ``sigmoid`` of each logit.
    selects_first
        Whether only the chosen logits are scored (top-k before the softmax).
    renormalises
        Whether the weights of the chosen experts are divided by their sum.
    scale
        Factor of the weights.
    has_bias
        Whether a bias is added to each score for the choice of experts. The weights do not
        include it.
    num_groups, groups_per_token
        Experts are chosen from ``groups_per_token`` of ``num_groups`` groups. With one group,
        experts are chosen from all.
    in_float32
        Whether the logits are computed in float32, from a matrix that keeps float32 in models of
        any dtype.
    rounds_weights
        Whether the weights are rounded to the model's dtype before they are used.
    bias_in_logits
        Whether the bias is part of the logits, and so of the weights, instead (gpt-oss).
    scales_input
        Whether the weights are factors of each expert's input instead of its output (Llama 4).
    least_sum
        The least sum that weights are divided by where they are renormalised.
    jitter
        Chooses the experts one after the other (Sparsemixer, Liu et al. 2023). The weight of each
        is its share in the softmax of the logits that are left, without those that are further
        below it than twice this share of themselves. ``None`` chooses all at once.
    scores_per_group
        A group's rank is the sum of so many of its best scores: two (DeepSeek-V3) or one (V2).
    """

    score: str = "softmax"
    selects_first: bool = False
    renormalises: bool = True
    scale: float = 1.0
    has_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    in_float32: bool = False
    rounds_weights: bool = True
    bias_in_logits: bool = False
    scales_input: bool = False
    least_sum: float = 0.0
    jitter: float | None = None
    scores_per_group: int = 2

    def __post_init__(self) -> None:
        check_choice("router score", self.score, ("softmax", "sigmoid"))
        check_positive("router scale", self.scale)
        check_least(self, 1, "num_groups", "groups_per_token", "scores_per_group")
        if self.jitter is not None:
            check_positive("router jitter", self.jitter)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts.

    Parameters
    ----------
    experts_per_token
        Experts that each token passes through.
    expert
        The network of each expert.
    shared
        A network that every token passes through in addition to its experts.
    gates_shared
        Whether the output of ``shared`` is multiplied by the sigmoid of one more logit.
    """

    num_experts: int
    experts_per_token: int
    expert: MlpSpec
    router: RouterSpec = RouterSpec()
    shared: MlpSpec | None = None
    gates_shared: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "num_experts", "experts_per_token")
        if self.experts_per_token > self.num_experts:
            raise InputError(
                "model experts_per_token",
                got=self.experts_per_token,
                allowed=f"at most num_experts {self.num_experts}",
            )
        self._check_groups()
        if not self.expert.is_gated:
            raise InputError("experts", got="no gate", allowed="networks with a gate")

    def _check_groups(self) -> None:
        groups, chosen = self.router.num_groups, self.router.groups_per_token
        if groups == 1 and chosen == 1:
            return
        size, rest = divmod(self.num_experts, groups)
        least = self.router.scores_per_group
        if rest or size < least or chosen > groups or chosen * size < self.experts_per_token:
            raise InputError(
                "router groups",
                got=f"{chosen} of {groups}",
                allowed=f"equal groups of {least} or more of the {self.num_experts} experts, and "
                f"enough of them for {self.experts_per_token} experts",
            )

    def rows_at_once(self, num_tokens: int) -> int:
        """Return how many rows are multiplied at once; a row is one token at one expert.

        All rows of few tokens are multiplied at once. With many tokens, there are as many rows as
        tokens, whatever the routing.
        """
        return min(num_tokens * self.experts_per_token, max(num_tokens, EXPERT_ROWS_AT_ONCE))

    def touched(self, num_tokens: float, skew: float = 0.0, rarest: float = 1.0) -> float:
        """Return the number of experts that ``num_tokens`` tokens need on average, at most.

        Uniform routing needs the most: ``E (1 - (1 - k/E)^n)``.

        Parameters
        ----------
        skew
            The exponent of Zipf's law that describes how often experts are chosen.
        rarest
            Counts only this share of all experts, those that are chosen the least.
        """
        if not skew:
            missed = 1 - self.experts_per_token / self.num_experts
            return float(rarest * self.num_experts * (1 - missed**num_tokens))
        return needed_of_rarest(
            self.num_experts, self.experts_per_token, skew, float(num_tokens), rarest
        )
