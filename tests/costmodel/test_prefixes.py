"""Prefixes that save the most tokens, against all ways to choose them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.plan.pages import PAGE
from costmodel.plan.prefixes import LEAST_TOKENS, Prefixes, find_prefixes

Prompt = tuple[int, ...]


def _find(prompts: Sequence[Sequence[int]], groups: Sequence[int] | None = None) -> Prefixes:
    offsets = np.cumsum([0, *map(len, prompts)])
    ids = np.array([token for prompt in prompts for token in prompt], np.uint32)
    return find_prefixes(ids, offsets, None if groups is None else np.array(groups))


def _choices(prompt: Prompt, group: int) -> list[tuple[int, Prompt]]:
    """Return every beginning that may be a prompt's prefix, and none."""
    ends = range(LEAST_TOKENS, len(prompt), PAGE)
    return [(0, ()), *((group, prompt[:end]) for end in ends)]


def _saved(chosen: Sequence[tuple[int, Prompt]]) -> int:
    return sum(len(prefix) for _, prefix in chosen) - sum(len(prefix) for _, prefix in set(chosen))


@st.composite
def jobs(draw: st.DrawFn) -> list[Prompt]:
    """Draw prompts that extend each other, in pages and parts of pages."""
    prompts: list[Prompt] = [()]
    for _ in range(draw(st.integers(1, 5))):
        base = draw(st.sampled_from(prompts))
        cut = draw(st.integers(0, len(base) // PAGE)) * PAGE
        pages = draw(st.lists(st.integers(0, 1), max_size=3))
        more = draw(st.integers(0, PAGE))
        added = [token for page in pages for token in [page] * PAGE]
        prompts.append((*base[: draw(st.sampled_from([cut, len(base)]))], *added, *[7] * more))
    return [prompt for prompt in prompts if prompt] or [(1,)]


@settings(deadline=None, max_examples=100)
@given(jobs(), st.data())
def test_no_choice_saves_more(prompts: list[Prompt], data: st.DataObject) -> None:
    groups = [data.draw(st.integers(0, 1)) for _ in prompts]
    found = _find(prompts, groups)
    assert set(found.numbers.tolist()) | {-1} == {-1, *range(len(found.tokens))}
    chosen: list[tuple[int, Prompt]] = []
    for prompt, group, number in zip(prompts, groups, found.numbers.tolist(), strict=True):
        tokens = int(found.tokens[number]) if number >= 0 else 0
        assert tokens < len(prompt)
        chosen.append((group if tokens else 0, prompt[:tokens]))
    by_number = dict(zip(found.numbers.tolist(), chosen, strict=True))
    for number, prefix in zip(found.numbers.tolist(), chosen, strict=True):
        assert number < 0 or by_number[number] == prefix
    for number, tokens in enumerate(found.tokens.tolist()):
        assert tokens >= LEAST_TOKENS and tokens % PAGE == 0
        assert found.numbers.tolist().count(number) >= 2
    ways = product(*(_choices(p, g) for p, g in zip(prompts, groups, strict=True)))
    assert _saved(chosen) == max(map(_saved, ways))
    assert found.of_prompts.tolist() == [len(prefix) for _, prefix in chosen]


def test_nested_prefixes_are_chosen_for_all_prompts_together() -> None:
    system = [1] * 64
    shots = [[2] * 64, [3] * 64]
    prompts = [system + shots[i % 2] + [10 + i] for i in range(6)]
    # Three prompts each save 2 * 128 tokens with examples, and all of them 5 * 64 without.
    assert _find(prompts).tokens.tolist() == [128, 128]
    # Beside ten others, the longer prefixes of two are not worth a second copy of the first.
    others = [[*system, 50 + i] for i in range(10)]
    assert _find(prompts[:4] + others).tokens.tolist() == [64]


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    found = _find([[5] * 128] * 3 + [[5] * 129] * 2)
    assert found.of_prompts.tolist() == [96, 96, 96, 96, 96]
    assert _find([[5] * 129] * 2).of_prompts.tolist() == [128, 128]
    assert _find([[5] * 64] * 2).numbers.tolist() == [-1, -1]
    assert not len(_find([[5] * 65]).tokens)
