"""Rates, checked, and how they go with the size of the work."""

from __future__ import annotations

import bisect
import math
import sys
from dataclasses import dataclass

from profiles.errors import InputError


def require_positive(what: str, value: float) -> None:
    """Raise ``InputError`` unless ``value`` and its inverse are finite and above zero."""
    if not math.isfinite(value) or value < sys.float_info.min:
        raise InputError(what, got=value, allowed="a finite number above zero")


def require_not_negative(what: str, value: float) -> None:
    """Raise ``InputError`` unless ``value`` is a finite number, zero or more."""
    if not math.isfinite(value) or value < 0:
        raise InputError(what, got=value, allowed="a finite number, zero or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCurve:
    """A rate measured at several sizes of work.

    Parameters
    ----------
    sizes
        Increasing; rows of a matrix product, or bytes of one request.
    rates
        FLOP/s or bytes/s at each size.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.rates):
            got = f"{len(self.sizes)} sizes and {len(self.rates)} rates"
            raise InputError("rate curve", got=got, allowed="as many sizes as rates, at least one")
        for value in (*self.sizes, *self.rates):
            require_positive("rate curve", value)
        if any(a >= b for a, b in zip(self.sizes, self.sizes[1:], strict=False)):
            raise InputError("rate curve sizes", got=list(self.sizes), allowed="increasing sizes")

    @classmethod
    def constant(cls, rate: float) -> RateCurve:
        """Make a curve with one rate at every size."""
        return cls(sizes=(1.0,), rates=(rate,))

    def at(self, size: float) -> float:
        """Interpolate the log rate over log size; constant beyond the ends."""
        if size <= self.sizes[0]:
            return self.rates[0]
        if size >= self.sizes[-1]:
            return self.rates[-1]
        i = bisect.bisect_right(self.sizes, size)
        low, high = self.sizes[i - 1], self.sizes[i]
        share = math.log(size / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(self.rates[i - 1]) + share * math.log(self.rates[i]))

    @property
    def peak(self) -> float:
        """The highest rate measured."""
        return max(self.rates)
