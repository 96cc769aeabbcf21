"""Linear forms: what formulas do with numbers, they do with coefficients."""

from __future__ import annotations

import pytest

from costmodel.pricing.linear_form import LinearForm, total
from costmodel.pricing.shares import Shares, product_name, share_names, unit_shares, variables_of

COMPONENTS = ("attention", "router", "experts", "head")
UNITS = unit_shares(COMPONENTS)
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
    form = UNITS.cache_cpu * 3.0 + UNITS.whole * 2.0
    point = Shares.of(dict.fromkeys(share_names(COMPONENTS), 0.5), COMPONENTS)
    assert point.value_of(form) == 2.5
    assert point.value_of(form * 0.0) == 0.0
    assert UNITS.value_of(form).terms == form.terms
    # The experts' share of a tier is a variable of its own.
    experts = UNITS.weights["experts"].off_gpu
    assert experts.terms == {"weights_experts_cpu": 1.0, "weights_experts_disk": 1.0}
    assert point.value_of(experts) == 1.0
    batch = UNITS.of_one_batch(4).value_of(form)
    assert batch.terms == {"cache_cpu_per_block": 12.0, "per_block": 8.0}


def test_every_share_is_a_variable_or_made_of_some() -> None:
    """A share that the table lacks would be bounded and tied by nothing."""
    variables = variables_of(COMPONENTS)
    products = [product_name(name) for name, v in variables.items() if v.needs_product]
    known = ["whole", "per_block", *variables, *products]
    assert sorted(share_names(COMPONENTS)) == sorted(known)
