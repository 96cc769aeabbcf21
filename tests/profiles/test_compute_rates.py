"""Rates of products between the widths and rows that were measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from profiles import ComputeRates, InputError, RateCurve
from profiles.compute_rates import (
    GROUP_SIZE,
    HEAD_DIM,
    MANY_QUERIES,
    NARROW_WIDTH,
    SHORT_HEAD_DIM,
    WIDTH,
)
from profiles.encodings import Kind

DTYPE = "bfloat16"


def _rates(**others: object) -> ComputeRates:
    wide = RateCurve(sizes=(1.0, 4.0, 1024.0), rates=(10.0, 20.0, 80.0))
    given: dict[str, object] = {
        "matmul": {DTYPE: wide},
        "attention_prefill": {DTYPE: 1.0},
        "attention_decode": {DTYPE: 1.0},
        "narrow_matmul": {DTYPE: RateCurve(sizes=(1.0, 4.0), rates=(5.0, 16.0))},
    }
    return ComputeRates(**(given | others))  # type: ignore[arg-type]


def test_measured_widths_have_their_rates() -> None:
    rates = _rates()
    assert rates.matmul_rate(DTYPE, 4, WIDTH) == pytest.approx(20)
    assert rates.matmul_rate(DTYPE, 4, NARROW_WIDTH) == pytest.approx(16)


def test_seconds_are_linear_in_one_over_the_width() -> None:
    # With one row: 1/10 s a FLOP at 4096, 1/5 at 1024, so 1/30 more for each 1/4096 more.
    rates = _rates()
    assert rates.matmul_rate(DTYPE, 1, 2048) == pytest.approx(1 / (1 / 10 + 1 / 30))
    assert rates.matmul_rate(DTYPE, 1, 512) == pytest.approx(1 / (1 / 10 + 7 / 30))
    # Wider weights than were measured are no faster.
    assert rates.matmul_rate(DTYPE, 1, 10 * WIDTH) == pytest.approx(10)


def test_more_rows_than_were_measured_narrow_are_no_cost_of_narrowness() -> None:
    rates = _rates()
    added_s = 1 / 16 - 1 / 20
    assert rates.matmul_rate(DTYPE, 1024, NARROW_WIDTH) == pytest.approx(1 / (1 / 80 + added_s))


def test_narrow_weights_that_were_faster_or_not_measured_cost_nothing_more() -> None:
    faster = {DTYPE: RateCurve.constant(100.0)}
    for rates in (_rates(narrow_matmul=faster), _rates(narrow_matmul={})):
        assert rates.matmul_rate(DTYPE, 4, 64) == pytest.approx(20)


def test_packed_products_have_their_own_widths() -> None:
    rates = _rates(
        packed_matmul={DTYPE: RateCurve.constant(40.0)},
        narrow_packed_matmul={DTYPE: RateCurve.constant(30.0)},
    )
    assert rates.matmul_rate(DTYPE, 4, WIDTH, packed=True) == pytest.approx(40)
    assert rates.matmul_rate(DTYPE, 4, NARROW_WIDTH, packed=True) == pytest.approx(30)


def test_eight_bits_have_their_own_rates_or_those_of_four() -> None:
    rates = _rates(unpack_bytes_per_s=3.0, packed_attention_bytes_per_s=7.0)
    assert rates.unpack_rate(8) == rates.unpack_rate(4) == 3
    assert _attention(rates, 8) == _attention(rates, 4) == pytest.approx(7)
    rates = _rates(
        unpack_bytes_per_s=3.0,
        unpack_8bit_bytes_per_s=2.0,
        packed_attention_bytes_per_s=7.0,
        packed_attention_8bit_bytes_per_s=5.0,
    )
    assert (rates.unpack_rate(8), rates.unpack_rate(4)) == (2, 3)
    assert (_attention(rates, 8), _attention(rates, 4)) == pytest.approx((5, 7))


def _attention(rates: ComputeRates, bits: int | None) -> float:
    return rates.attention_rate(DTYPE, bits, GROUP_SIZE, HEAD_DIM)


def test_queries_beyond_those_measured_first_cost_seconds_in_proportion() -> None:
    rates = _rates(attention_decode={DTYPE: 12.0}, attention_many_queries={"full": 0.5})
    assert rates.attention_rate(DTYPE, None, MANY_QUERIES, SHORT_HEAD_DIM) == pytest.approx(6)
    # 4 of 64 lie a third of the way from 4 of 128 to 8 of 64.
    assert rates.attention_rate(DTYPE, None, 4, 64) == pytest.approx(12 / (1 + 1 / 3))
    assert rates.attention_rate(DTYPE, None, 1, HEAD_DIM) == pytest.approx(12)
    rates = _rates(attention_decode={DTYPE: 12.0}, attention_one_query={"full": 2.0})
    assert rates.attention_rate(DTYPE, None, 1, HEAD_DIM) == pytest.approx(24)
    # Fewer queries for an element than were measured cost no less.
    assert rates.attention_rate(DTYPE, None, 1, 2 * HEAD_DIM) == pytest.approx(24)
    # 2 of 128 lie a third of the way from 1 to 4.
    assert rates.attention_rate(DTYPE, None, 2, HEAD_DIM) == pytest.approx(12 / (1 - 2 / 3 / 2))
    packed = _rates(unpack_bytes_per_s=4.0, attention_decode={DTYPE: 12.0})
    assert packed.attention_rate(DTYPE, 4, MANY_QUERIES, SHORT_HEAD_DIM) == pytest.approx(3)


def test_each_precision_has_its_own_rate_token_by_token() -> None:
    rates = _rates(
        attention_decode={DTYPE: 10.0},
        packed_attention_bytes_per_s=8.0,
        packed_attention_8bit_bytes_per_s=6.0,
        attention_by_token={"full": 0.9, "8": 0.5, "4": 0.25},
        attention_one_query={"full": 2.0, "8": 2.0, "4": 2.0},
    ).over_tokens()
    measured = [_attention(rates, bits) for bits in (None, 8, 4)]
    assert measured == pytest.approx([9, 3, 2])
    assert rates.attention_rate(DTYPE, 4, 1, HEAD_DIM) == pytest.approx(2)
    assert rates.over_tokens() == rates


def test_a_share_of_a_rate_is_at_most_all_of_it() -> None:
    for share in (0.0, 1.5):
        with pytest.raises(InputError, match=r"attention_by_token\.4"):
            _rates(attention_by_token={"4": share})
    with pytest.raises(InputError, match=r"attention_one_query\.4"):
        _rates(attention_one_query={"4": 0.9})


def _encoded(rate: float, *others: float) -> RateCurve:
    """The rate of a product with one row, and with 64."""
    return RateCurve(sizes=(1.0, 64.0)[: 1 + len(others)], rates=(rate, *others))


def test_seconds_of_encoded_products_are_linear_in_their_rows() -> None:
    # One row takes 1/10 s a FLOP of a row, 64 rows 1: another row takes 1/70.
    rates = _rates(narrow_matmul={}, encoded_matmul={"Q4_K": _encoded(10.0, 64.0)})
    for rows in (1, 2, 8, 64):
        seconds = 0.1 + (rows - 1) / 70
        found = rates.encoded_matmul_rate(Kind.Q4_K, DTYPE, rows, WIDTH)
        assert rows / found == pytest.approx(seconds)


def test_more_rows_take_a_plain_product_and_decoding() -> None:
    plain = RateCurve.constant(80.0)
    # 64 rows take 1 s, of which 0.8 are the products'.
    rates = _rates(
        matmul={DTYPE: plain}, narrow_matmul={}, encoded_matmul={"Q6_K": _encoded(10.0, 64.0)}
    )
    for rows in (65, 256, 512):
        found = rates.encoded_matmul_rate(Kind.Q6_K, DTYPE, rows, WIDTH)
        assert rows / found == pytest.approx(rows / 80 + 0.2)
    # Windows of 512 rows are decoded one by one.
    found = rates.encoded_matmul_rate(Kind.Q6_K, DTYPE, 1024, WIDTH)
    assert 1024 / found == pytest.approx(1024 / 80 + 2 * 0.2)


def test_more_rows_are_no_slower_than_fewer() -> None:
    # Encoded weights are faster than plain ones where the memory is the limit.
    rates = _rates(narrow_matmul={}, encoded_matmul={"MXFP4": _encoded(30.0)})
    assert rates.encoded_matmul_rate(Kind.MXFP4, DTYPE, 2, WIDTH) == pytest.approx(30)
    assert rates.encoded_matmul_rate(Kind.MXFP4, DTYPE, 1024, WIDTH) == pytest.approx(80)


def test_an_unknown_kind_costs_what_packed_weights_do_or_unpacking() -> None:
    packed = {DTYPE: _encoded(20.0, 40.0)}
    rates = _rates(narrow_matmul={}, packed_matmul=packed, unpack_bytes_per_s=5.0)
    assert rates.encoded_matmul_rate(Kind.Q2_K, DTYPE, 1, WIDTH) == pytest.approx(20)
    assert rates.encoded_unpack_rate(Kind.Q2_K) == 5
    # Two bytes of output for each element, which is two FLOP for each of four rows.
    rates = replace(rates, packed_matmul={})
    found = rates.encoded_matmul_rate(Kind.Q2_K, DTYPE, 4, WIDTH)
    assert 4 / found == pytest.approx(4 / 20 + 1 / 5)
    rates = replace(rates, encoded_unpack_bytes_per_s={"Q2_K": 3.0})
    assert (rates.encoded_unpack_rate(Kind.Q2_K), rates.encoded_unpack_rate(Kind.Q3_K)) == (3, 5)


def test_narrow_encoded_weights_cost_what_narrow_plain_ones_do_besides() -> None:
    rates = _rates(encoded_matmul={"Q4_K": _encoded(10.0, 64.0)})
    found = rates.encoded_matmul_rate(Kind.Q4_K, DTYPE, 4, NARROW_WIDTH)
    wide = rates.encoded_matmul_rate(Kind.Q4_K, DTYPE, 4, WIDTH)
    assert 1 / found - 1 / wide == pytest.approx(1 / 16 - 1 / 20)


def test_rates_of_no_encoding_are_refused() -> None:
    for name, rate in (
        ("encoded_matmul", _encoded(1.0)),
        ("encoded_unpack_bytes_per_s", 1.0),
    ):
        with pytest.raises(InputError, match="Q9_K"):
            _rates(**{name: {"Q9_K": rate}})
    with pytest.raises(InputError, match=r"bytes_per_s\.Q4_K"):
        _rates(encoded_unpack_bytes_per_s={"Q4_K": 0.0})
