"""Attention as a description: grouped-query or latent. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from costmodel.model.checks import check_choice, check_least, check_positive
from costmodel.model.norm_spec import NormSpec
from costmodel.model.rotary_spec import RotarySpec
from profiles.errors import InputError

# More than any model has; a check of the input, where each head has numbers or names of its own.
MAX_HEADS = 4096


def check_heads(num_heads: int) -> None:
    """Refuse more heads than any model has."""
    if num_heads > MAX_HEADS:
        raise InputError("model num_heads", got=num_heads, allowed=f"at most {MAX_HEADS}")


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
        For latent attention; ``None`` is grouped-query attention. Decode multiplies each query by
        its head's part of the key projection. So it attends to the cached rows themselves. All
        heads share one key head, whose ``head_dim`` is ``LatentSpec.row_dim``. The value is the
        latent in the same row.
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
        if count and (others := self._given("window", "has_sinks")):
            raise InputError(
                "alibi_slopes", got=others, allowed="neither a window nor sinks with ALiBi"
            )

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
        if others := self._given("qk_norm", "window", "soft_cap", "clip", "has_sinks"):
            raise InputError(
                "latent attention",
                got=others,
                allowed="no norms of heads, window, soft cap, clip or sinks",
            )
        if self.scale is None:
            raise InputError("latent attention", got="no scale", allowed="a factor of the scores")
        rotated = 0 if self.rotary is None else self.rotary.dim or self.head_dim
        if rotated != latent.rope_dim:
            raise InputError(
                "latent attention",
                got=f"a rotation of {rotated} elements",
                allowed=f"one of {latent.rope_dim}",
            )

    def _given(self, *names: str) -> str:
        """Return which of these fields are not at their defaults, with their values."""
        defaults = {field.name: field.default for field in fields(self)}
        values = {name: getattr(self, name) for name in names}
        return ", ".join(f"{n} {value}" for n, value in values.items() if value != defaults[n])

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
