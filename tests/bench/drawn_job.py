"""A job as public chat logs have it: many short prompts and answers, and a few long ones.

Every system gets the same token ids and the same number of tokens for each answer, so that all
generate the same amount.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from executor.jobs.openai import PLAIN

# Median and 95th percentile, in tokens.
PROMPTS, ANSWERS = (60, 600), (120, 500)
# Standard deviations between a normal distribution's median and its 95th percentile.
NINETY_FIFTH = 1.6449
MOST_PROMPT, MOST_ANSWER = 6000, 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnJob:
    """Token ids of each prompt, and the tokens of each answer."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.answers)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest answer."""
        return max(self.answers)

    @property
    def longest_context(self) -> int:
        """Most tokens of a prompt and its answer."""
        pairs = zip(self.prompts, self.answers, strict=True)
        return max(len(ids) + answer for ids, answer in pairs)

    def cohorts(self, count: int) -> list[DrawnJob]:
        """Return jobs of about as many prompts each, the longest answers first, so that what is
        computed together ends together."""
        order = sorted(range(len(self.answers)), key=lambda i: (-self.answers[i], i))
        size = -(-len(order) // count)
        parts = [order[first : first + size] for first in range(0, len(order), size)]
        return [self.only(part) for part in parts]

    def only(self, numbers: Sequence[int]) -> DrawnJob:
        """Return the job of some prompts."""
        prompts, answers = [self.prompts[i] for i in numbers], [self.answers[i] for i in numbers]
        return DrawnJob(prompts=prompts, answers=answers)

    def write(self, path: Path) -> None:
        """Write a batch file of greedy requests that end at their limits."""
        with path.open("w", encoding="utf-8") as handle:
            pairs = zip(self.prompts, self.answers, strict=True)
            for number, (ids, answer) in enumerate(pairs):
                body: dict[str, Any] = {"prompt": list(ids), "max_tokens": answer}
                body |= {"temperature": 0, "ignore_eos": True}
                line = {"custom_id": f"request-{number}", "method": "POST", "url": PLAIN}
                handle.write(json.dumps(line | {"body": body}) + "\n")

    def as_json(self) -> dict[str, Any]:
        """Return its size."""
        lengths = [len(ids) for ids in self.prompts]
        told: dict[str, Any] = {"num_prompts": len(lengths), "answer_tokens": self.num_tokens}
        for name, values in (("prompt", lengths), ("answer", list(self.answers))):
            told[name] = {
                "mean": sum(values) / len(values),
                "median": float(np.median(values)),
                "p95": float(np.percentile(values, 95)),
                "longest": max(values),
            }
        return told | {"prompt_tokens": sum(lengths)}


def draw_job(
    num_prompts: int, vocab_size: int, *, seed: int, prefix: int = 0, is_shared: bool = True
) -> DrawnJob:
    """Draw lengths and token ids.

    Parameters
    ----------
    prefix
        Tokens in front of each prompt, beside its drawn length.
    is_shared
        Whether they are the same for all prompts.
    """
    lengths = np.random.default_rng(seed)
    prompts = _draw(lengths, PROMPTS, MOST_PROMPT, num_prompts)
    answers = _draw(lengths, ANSWERS, MOST_ANSWER, num_prompts)
    ids = random.Random(seed)

    def some(count: int) -> list[int]:
        return [ids.randrange(vocab_size) for _ in range(count)]

    shared = some(prefix)
    return DrawnJob(
        prompts=[(shared if is_shared else some(prefix)) + some(count) for count in prompts],
        answers=answers,
    )


def _draw(rng: np.random.Generator, figures: tuple[int, int], most: int, count: int) -> list[int]:
    """Draw from the lognormal distribution of a median and a 95th percentile, cut to 1..most."""
    median, high = figures
    sigma = math.log(high / median) / NINETY_FIFTH
    drawn = median * np.exp(rng.normal(0.0, sigma, count))
    return [int(tokens) for tokens in np.clip(drawn, 1, most)]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of made-up words: answers are told as text, too."""
    words = WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
