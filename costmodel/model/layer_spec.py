"""A decoder layer as a description: an attention and a feed-forward of stated kinds. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from profiles.errors import InputError

ACTIVATIONS = ("silu", "relu", "gelu")
ROTARY_KINDS = ("default", "linear", "llama3")
NORM_PLACES = ("before", "after")
# Temporaries of so many rows of experts are small beside the experts.
EXPERT_ROWS_AT_ONCE = 1024


def check_least(spec: object, least: int, *names: str) -> None:
    """Refuse fields of a description that are below ``least``."""
    for name in names:
        if getattr(spec, name) < least:
            raise InputError(f"model {name}", got=getattr(spec, name), allowed=f"{least} or more")


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is none of ``allowed``."""
    if value not in allowed:
        raise InputError(what, got=repr(value), allowed=", ".join(allowed))


def check_positive(what: str, value: float) -> None:
    """Refuse a number that is not above zero and finite."""
    if not 0 < value < float("inf"):
        raise InputError(what, got=value, allowed="above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """How vectors are normalised.

    Parameters
    ----------
    kind
        ``rms``: by the root mean square, scaled by a weight (Zhang and Sennrich 2019); ``layer``:
        mean and variance, with weight and bias (Ba et al. 2016).
    eps
        Added to the variance.
    """

    kind: str = "rms"
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_choice("norm", self.kind, ("rms", "layer"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """Rotary position embedding: its base and how its frequencies are scaled.

    The last three numbers are read by the ``llama3`` kind only, ``factor`` also by ``linear``.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: float = 8192

    def __post_init__(self) -> None:
        check_choice("rotary scaling", self.kind, ROTARY_KINDS)
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            check_positive(f"rotary {name}", getattr(self, name))
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                "rotary high_freq_factor",
                got=self.high_freq_factor,
                allowed=f"more than low_freq_factor {self.low_freq_factor}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention.

    Parameters
    ----------
    num_kv_heads
        Heads of keys and values; fewer than ``num_heads`` is grouped-query attention.
    rotary
        ``None`` where queries and keys are not rotated.
    scale
        Factor of the scores; ``None`` is one over the root of ``head_dim``.
    qk_norm
        Whether queries and keys are normalised before they are rotated: not (``none``), each
        ``head`` by itself, or all heads as one ``projection``.
    qkv_bias, output_bias
        Which projections have biases.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotarySpec | None = None
    scale: float | None = None
    qk_norm: str = "none"
    qkv_bias: bool = False
    output_bias: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                "model num_kv_heads",
                got=self.num_kv_heads,
                allowed=f"a divisor of num_heads {self.num_heads}",
            )
        check_choice("qk_norm", self.qk_norm, ("none", "head", "projection"))
        if self.rotary is not None and self.head_dim % 2:
            raise InputError("model head_dim", got=self.head_dim, allowed="an even number")

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (the value heads are as wide)."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of queries, keys and values together."""
        return self.query_size + 2 * self.kv_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """A feed-forward network.

    Parameters
    ----------
    size
        Width of its inner vectors.
    activation
        ``silu``, ``relu`` or ``gelu`` (exact).
    is_gated
        Whether two projections are multiplied, one of them activated, before the last one.
    has_bias
        Whether its projections have biases.
    """

    size: int
    activation: str = "silu"
    is_gated: bool = True
    has_bias: bool = False

    def __post_init__(self) -> None:
        check_least(self, 1, "size")
        check_choice("activation", self.activation, ACTIVATIONS)

    @property
    def inner_rows(self) -> int:
        """Rows of the stacked projections into the inner vectors."""
        return (2 if self.is_gated else 1) * self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """How a token's experts are chosen and weighed, from one logit for each expert.

    Parameters
    ----------
    score
        ``softmax`` over all experts, or ``sigmoid`` of each logit.
    selects_first
        Whether the scores are taken over the chosen logits only (top-k before the softmax).
    renormalises
        Whether the weights of the chosen are divided by their sum.
    scale
        Factor of the weights.
    has_bias
        Whether each expert has a bias on its score when experts are chosen. It is not in the
        weights.
    num_groups, groups_per_token
        Experts are chosen from the best of so many groups, by the sum of a group's two best scores
        (DeepSeek-V3). One group: from all.
    in_float32
        Whether the logits are computed in float32.
    rounds_weights
        Whether the weights are rounded to the model's dtype before they multiply anything.
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

    def __post_init__(self) -> None:
        check_choice("router score", self.score, ("softmax", "sigmoid"))
        check_positive("router scale", self.scale)
        check_least(self, 1, "num_groups", "groups_per_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSpec:
    """A mixture of experts.

    Parameters
    ----------
    experts_per_token
        Experts that each token passes through.
    expert
        The network that each expert is.
    shared
        A network that every token passes through beside its experts.
    gates_shared
        Whether what ``shared`` adds is multiplied by the sigmoid of one more logit.
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
        if self.expert.has_bias or not self.expert.is_gated:
            raise InputError("experts", got="biases or no gate", allowed="gated, without biases")

    def _check_groups(self) -> None:
        groups, chosen = self.router.num_groups, self.router.groups_per_token
        if groups == 1 and chosen == 1:
            return
        size, rest = divmod(self.num_experts, groups)
        if rest or size < 2 or chosen > groups or chosen * size < self.experts_per_token:
            raise InputError(
                "router groups",
                got=f"{chosen} of {groups}",
                allowed=f"equal groups of 2 or more of the {self.num_experts} experts, and enough "
                f"of them for {self.experts_per_token} experts",
            )

    def rows_at_once(self, num_tokens: int) -> int:
        """Return how many rows, each a token of one expert, are multiplied at once: all of a few
        tokens, of many as many as there are tokens, however they are routed."""
        return min(num_tokens * self.experts_per_token, max(num_tokens, EXPERT_ROWS_AT_ONCE))

    def touched(self, num_tokens: float) -> float:
        """Return how many experts ``num_tokens`` tokens need on average, at most: those of uniform
        routing, ``E (1 - (1 - k/E)^n)``."""
        missed = 1 - self.experts_per_token / self.num_experts
        return float(self.num_experts * (1 - missed**num_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: an attention, then an MLP or a mixture of experts, each added to its
    input.

    Parameters
    ----------
    norm_places
        Whether a norm comes ``before`` each half, ``after`` it, before what it makes is added, or
        both.
    residual_scale
        Factor of what each half adds.
    """

    attention: AttentionSpec
    mlp: MlpSpec | None = None
    experts: ExpertsSpec | None = None
    norm: NormSpec = NormSpec()
    norm_places: tuple[str, ...] = ("before",)
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        if (self.mlp is None) == (self.experts is None):
            raise InputError("layer", got="not one feed-forward", allowed="an mlp or experts")
        for place in self.norm_places:
            check_choice("norm place", place, NORM_PLACES)

    @property
    def adds_plainly(self) -> bool:
        """Whether what each half makes is added to its input without a norm or a factor."""
        return "after" not in self.norm_places and self.residual_scale == 1

    @property
    def num_experts(self) -> int:
        """Experts of the layer, if it has any."""
        return self.experts.num_experts if self.experts else 0

    @property
    def component_names(self) -> tuple[str, ...]:
        """The parts that have placements of their own, in the order in which they compute."""
        if self.experts is None:
            return ("attention", "mlp")
        shared = ("shared_expert",) if self.experts.shared else ()
        return ("attention", "router", *shared, "experts")
