"""Rotary position embedding as a description. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.checks import check_choice, check_positive
from profiles.errors import InputError

ROTARY_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


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
    is_inverse
        Whether pairs are rotated by the negative angles (NanoChat).
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
    is_inverse: bool = False

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
