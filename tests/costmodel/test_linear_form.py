"""Linear forms: what formulas do with numbers, they do with coefficients."""

from __future__ import annotations

import pytest
from costmodel.shares import SHARE_NAMES, UNIT_SHARES, VARIABLES, Shares, product_name

from costmodel.pricing.linear_form import LinearForm, total

X, Y = LinearForm({"x": 1.0}), LinearForm({"y": 1.0})


def test_sums_and_multiples_are_taken_by_coefficient() -> None:
    form = X * 2.0 + Y - X * 0.5
    assert form.terms == {"x": 1.5, "y": 1.0}
    assert total([X, Y, form]).terms == {"x": 2.5, "y": 2.0}
    assert (X.terms, Y.terms) == ({"x": 1.0}, {"y": 1.0})
    assert total([1.0, 2.0, 4.0]) == 7.0


def test_a_factor_of_zero_leaves_no_terms() -> None:
    assert (X * 0.0).terms == {}
    assert (Y + X * 0.0).terms == {"y": 1.0}


def test_zero_is_the_only_constant_and_no_product_is_linear() -> None:
    assert sum([X, Y], 0.0).terms == {"x": 1.0, "y": 1.0}  # type: ignore[union-attr]
    with pytest.raises(TypeError, match="no constant term"):
        X + 1.0
    with pytest.raises(TypeError):
        X * Y  # type: ignore[operator]


def test_a_form_has_a_value_at_shares_and_at_other_forms() -> None:
    form = UNIT_SHARES.cache_cpu * 3.0 + UNIT_SHARES.whole * 2.0
    point = Shares(**dict.fromkeys(SHARE_NAMES, 0.5))
    assert point.value_of(form) == 2.5
    assert point.value_of(form * 0.0) == 0.0
    assert UNIT_SHARES.value_of(form).terms == form.terms
    batch = UNIT_SHARES.of_one_batch(4).value_of(form)
    assert batch.terms == {"cache_cpu_per_block": 12.0, "per_block": 8.0}


def test_every_share_is_a_variable_or_made_of_some() -> None:
    """A share that the table lacks would be bounded and tied by nothing."""
    products = [product_name(name) for name, v in VARIABLES.items() if v.needs_product]
    assert sorted(SHARE_NAMES) == sorted(["whole", "per_block", *VARIABLES, *products])
