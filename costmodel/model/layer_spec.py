"""A decoder layer as a description: attention, norms, and a feed-forward network. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.checks import check_choice, check_least, check_positive
from costmodel.model.feed_forward_spec import ExpertsSpec, MlpSpec
from profiles.errors import InputError

ROTARY_KINDS = ("default", "linear", "llama3", "yarn", "longrope")
# More than any model has; a check of the input, where each head has numbers or names of its own.
MAX_HEADS = 4096
NORM_PLACES = ("before", "after", "sum")


def check_heads(num_heads: int) -> None:
    """Refuse more heads than any model has."""
    if num_heads > MAX_HEADS:
        raise InputError("model num_heads", got=num_heads, allowed=f"at most {MAX_HEADS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """The normalisation of vectors.

    Parameters
    ----------
    kind
        ``rms`` divides by the root mean square (Zhang and Sennrich 2019); ``layer`` uses mean and
        variance (Ba et al. 2016); ``none`` does nothing.
    eps
        Added to the variance.
    has_weight, has_bias
        Whether the result is scaled, and for ``layer`` shifted.
    adds_one
        Whether the result is scaled by the weight plus one (Gemma, Nemotron).
    """

    kind: str = "rms"
    eps: float = 1e-6
    has_weight: bool = True
    has_bias: bool = True
    adds_one: bool = False

    def __post_init__(self) -> None:
        check_choice("norm", self.kind, ("rms", "layer", "none"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec:
    """Rotary position embedding: its base, and the scaling of its frequencies.

    Parameters
    ----------
    dim
        Elements of each head that are rotated, the first ones; ``None`` rotates all.
    is_interleaved
        Whether neighbours form a pair, instead of elements half of ``dim`` apart.
    factor
        How much longer contexts are than in training: ``linear``, ``llama3``, ``yarn``.
    low_freq_factor, high_freq_factor
        Of ``llama3``.
    original_max_positions
        The longest context in training: ``llama3``, ``yarn``, ``longrope``.
    attention_factor
        Factor of cosines and sines: ``yarn``, ``longrope``.
    beta_fast, beta_slow, truncates
        Of ``yarn``: turns within the training context between which frequencies are blended, and
        whether the bounds are rounded to whole elements (Peng et al. 2023).
    short_factors, long_factors
        Of ``longrope``: divisors of the frequencies, for contexts up to the original length and
        beyond (Ding et al. 2024).
    turns_back
        Whether pairs turn the other way (NanoChat).
    """

    theta: float
    kind: str = "default"
    dim: int | None = None
    is_interleaved: bool = False
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: float = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    turns_back: bool = False

    def is_long(self, num_positions: int) -> bool:
        """Whether a sequence goes beyond the original length, which ``longrope`` depends on."""
        return num_positions > self.original_max_positions

    def __post_init__(self) -> None:
        check_choice("rotary scaling", self.kind, ROTARY_KINDS)
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor"):
            check_positive(f"rotary {name}", getattr(self, name))
        if self.kind == "llama3" and self.high_freq_factor < self.low_freq_factor:
            raise InputError(
                "rotary high_freq_factor",
                got=self.high_freq_factor,
                allowed=f"at least low_freq_factor {self.low_freq_factor}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Keys and values that all heads derive from one short vector of each token, its latent
    (multi-head latent attention, DeepSeek-V2).

    A head's key is a product of the latent, ``nope_dim`` elements, and a part with the token's
    position, ``rope_dim`` elements, which all heads share. Its value is another product. Queries
    have the same two parts.

    Parameters
    ----------
    rank
        Elements of the latent.
    query_rank
        Elements of the vector that all queries derive from; ``None`` derives them from the hidden
        state.
    value_dim
        Elements of a head's value.
    eps
        Of the RMSNorms of both vectors.
    """

    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    query_rank: int | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_least(self, 1, "rank", "nope_dim", "rope_dim", "value_dim")
        if self.query_rank is not None:
            check_least(self, 1, "query_rank")

    @property
    def key_dim(self) -> int:
        """Elements of a head's query, and of its key."""
        return self.nope_dim + self.rope_dim

    @property
    def row_dim(self) -> int:
        """Elements that are cached of a token: its latent, and the part with its position."""
        return self.rank + self.rope_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Grouped-query attention, or latent attention.

    Parameters
    ----------
    num_kv_heads
        Heads of keys and values; fewer than ``num_heads`` is grouped-query attention.
    rotary
        ``None`` for attention without rotary positions.
    scale
        Factor of the scores; ``None`` stands for ``head_dim ** -0.5``.
    qk_norm
        Norm of queries and keys before the rotation: ``none``, one for each ``head`` with the same
        weights for all, ``heads`` with weights of their own, or one over all heads of a
        ``projection``.
    norms_rotated
        Whether that norm comes after the rotation instead.
    window
        Tokens that a query sees: itself and those just before it. ``None`` is all of them.
    soft_cap
        ``c`` in ``c tanh(scores / c)``, after the scale and before the mask; ``None`` leaves the
        scores.
    has_sinks
        Whether each query head has a learned score that takes part in the softmax and has no value
        (Xiao et al. 2024).
    clip
        The largest absolute value of queries, keys and values; ``None`` does not limit them.
    qkv_bias, output_bias
        Whether the projections have biases.
    alibi_slopes
        For each query head, how much its scores fall with each token between query and key (ALiBi,
        Press et al. 2022), after the scale and the soft cap. Empty without ALiBi.
    latent
        For latent attention. Decode multiplies each query by its head's part of the key projection,
        so that it attends to the cached rows themselves: all heads share one key head, whose
        ``head_dim`` is ``LatentSpec.row_dim``, and the value is the latent in the same row.
        ``None`` is grouped-query attention.
    qk_norm_spec
        That norm of queries and keys; ``None`` is of the same kind as the layer's norms.
    is_chunked
        Whether a query sees the tokens of its own chunk of ``window`` tokens instead: those from
        the last multiple of ``window`` on (Llama 4).
    temperature_floor, temperature_strength, temperature_offset
        Queries at position ``p`` are multiplied by ``1 + temperature_strength * log(1 + floor((p +
        temperature_offset) / temperature_floor))`` (Nakanishi 2025), after the rotation. A
        ``temperature_floor`` of ``None`` leaves them.
    has_output_gate
        Whether the attended values are multiplied by the sigmoid of one more projection of the
        layer's input, element by element.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotarySpec | None = None
    scale: float | None = None
    qk_norm: str = "none"
    norms_rotated: bool = False
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    clip: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    alibi_slopes: tuple[float, ...] = ()
    latent: LatentSpec | None = None
    qk_norm_spec: NormSpec | None = None
    is_chunked: bool = False
    temperature_floor: int | None = None
    temperature_strength: float = 0.1
    has_output_gate: bool = False
    temperature_offset: int = 1

    def __post_init__(self) -> None:
        check_least(self, 1, "num_heads", "num_kv_heads", "head_dim")
        if self.temperature_floor is not None:
            check_least(self, 1, "temperature_floor")
        if self.latent is not None:
            self._check_latent(self.latent)
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                "model num_kv_heads",
                got=self.num_kv_heads,
                allowed=f"a divisor of num_heads {self.num_heads}",
            )
        check_choice("qk_norm", self.qk_norm, ("none", "head", "heads", "projection"))
        if self.qk_norm == "heads":
            check_heads(self.num_heads)
        if self.window is not None:
            check_least(self, 1, "window")
        if self.soft_cap is not None:
            check_positive("attention soft_cap", self.soft_cap)
        if self.rotary is not None:
            self._check_rotary(self.rotary)
        self._check_alibi()

    def _check_alibi(self) -> None:
        count = len(self.alibi_slopes)
        if count not in (0, self.num_heads):
            raise InputError(
                "alibi_slopes", got=f"{count} numbers", allowed=f"one for each of {self.num_heads}"
            )
        for slope in self.alibi_slopes:
            check_positive("alibi slope", slope)
        # Slots of a ring have no order, and kernels shift all scores of a query, but no sink.
        if count and (self.window is not None or self.has_sinks):
            raise InputError("alibi_slopes", got="a window or sinks", allowed="neither with ALiBi")

    def _check_rotary(self, rotary: RotarySpec) -> None:
        dim = rotary.dim or self.head_dim
        if dim % 2 or dim > self.head_dim:
            raise InputError(
                "rotary dim", got=dim, allowed=f"an even number of at most head_dim {self.head_dim}"
            )
        factors = (rotary.short_factors, rotary.long_factors)
        if rotary.kind == "longrope" and any(len(found) != dim // 2 for found in factors):
            raise InputError(
                "rotary factors",
                got=" and ".join(str(len(found)) for found in factors),
                allowed=f"{dim // 2}, one for each pair",
            )

    def _check_latent(self, latent: LatentSpec) -> None:
        shape = (self.num_kv_heads, self.head_dim)
        if shape != (1, latent.row_dim):
            raise InputError(
                "latent attention",
                got=f"{shape[0]} key heads of {shape[1]} elements",
                allowed=f"1 of {latent.row_dim}, as wide as a cached row",
            )
        others = (self.window, self.soft_cap, self.clip, self.has_sinks or None)
        if self.qk_norm != "none" or any(other is not None for other in others):
            raise InputError(
                "latent attention",
                got="norms of heads, a window, a soft cap, a clip or sinks",
                allowed="none of these",
            )
        if self.scale is None or self.rotary is None or self.rotary.dim != latent.rope_dim:
            raise InputError(
                "latent attention",
                got="no scale, or another rotation",
                allowed=f"a scale, and a rotation of {latent.rope_dim} elements",
            )

    @property
    def has_plain_softmax(self) -> bool:
        """Whether the shares are the softmax of the scores alone."""
        return self.soft_cap is None and not self.has_sinks and not self.alibi_slopes

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def query_size(self) -> int:
        """Width of all query heads of decode together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; all value heads together have the same."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_parts(self) -> tuple[int, ...]:
        """Widths of the projections of the hidden state, which are stacked in one matrix."""
        if self.latent is None:
            return (self.query_size, self.kv_size, self.kv_size)
        queries = self.latent.query_rank or self.num_heads * self.latent.key_dim
        return (queries, self.latent.row_dim)

    @property
    def qkv_size(self) -> int:
        """Width of these projections together."""
        return sum(self.qkv_parts)

    @property
    def cached_vectors(self) -> int:
        """Vectors of ``head_dim`` that are cached of each key head: a key and a value, or one row
        with both."""
        return 2 if self.latent is None else 1

    @property
    def cached_size(self) -> int:
        """Elements that are cached of a token."""
        return self.cached_vectors * self.kv_size

    @property
    def attended_dim(self) -> int:
        """Elements of a head in the result of decode's attention."""
        return self.head_dim if self.latent is None else self.latent.rank

    @property
    def attended_size(self) -> int:
        """Width of the result of decode's attention, all heads together."""
        return self.num_heads * self.attended_dim

    @property
    def output_size(self) -> int:
        """Width of the input of the output projection."""
        value_dim = self.head_dim if self.latent is None else self.latent.value_dim
        return self.num_heads * value_dim

    @property
    def prompt_size(self) -> int:
        """Width of the keys of prefill, those of all query heads together. Values are as wide; the
        shorter ones of latent attention are padded."""
        if self.latent is None:
            return self.query_size
        return self.num_heads * max(self.latent.key_dim, self.latent.value_dim)


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
    """

    attention: AttentionSpec
    mlp: MlpSpec | None = None
    experts: ExpertsSpec | None = None
    norm: NormSpec = NormSpec()
    norm_places: tuple[str, ...] = ("before",)
    residual_scale: float = 1.0
    is_parallel: bool = False
    shares_norm: bool = False

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
