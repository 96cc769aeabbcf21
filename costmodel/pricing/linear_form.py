"""Linear forms of the program's variables: a formula evaluated on the variables gives one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar


class LinearForm:
    """Coefficients by the name of their variable; they are zero for variables without an entry.

    Formulas use ``+``, ``-`` and ``*`` only, so that they take numbers as well as forms. A form
    has no constant term: zero is the only number that can be added to it.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[str, float]) -> None:
        self.terms = terms

    def __add__(self, other: LinearForm | float) -> LinearForm:
        added = _terms(other)
        if not added:
            return self
        terms = dict(self.terms)
        for name, coefficient in added.items():
            terms[name] = terms.get(name, 0.0) + coefficient
        return LinearForm(terms)

    def plus(self, others: Iterable[LinearForm]) -> LinearForm:
        """Add several forms at once."""
        terms = dict(self.terms)
        for other in others:
            for name, coefficient in other.terms.items():
                terms[name] = terms.get(name, 0.0) + coefficient
        return LinearForm(terms)

    # ``sum`` begins with the number zero.
    __radd__ = __add__

    def __sub__(self, other: LinearForm | float) -> LinearForm:
        taken = _terms(other)
        if not taken:
            return self
        terms = dict(self.terms)
        for name, coefficient in taken.items():
            terms[name] = terms.get(name, 0.0) - coefficient
        return LinearForm(terms)

    def __mul__(self, factor: float) -> LinearForm:
        if not factor:
            return ZERO
        return LinearForm({name: value * factor for name, value in self.terms.items()})


def _terms(value: LinearForm | float) -> Mapping[str, float]:
    if isinstance(value, LinearForm):
        return value.terms
    if value == 0:
        return {}
    raise TypeError(f"a linear form has no constant term: cannot add {value!r}")


ZERO = LinearForm({})

# Formulas are evaluated on numbers, or on forms of the variables.
Quantity = TypeVar("Quantity", float, LinearForm)


def total(quantities: Iterable[Quantity]) -> Quantity:
    """Add up one quantity or more; forms are added without a copy for each."""
    first, *others = quantities
    if isinstance(first, LinearForm):
        return first.plus(others)  # type: ignore[arg-type]  # forms follow a form
    return sum(others, first)
