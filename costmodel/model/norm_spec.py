"""The normalisation of vectors as a description. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.checks import check_choice


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
