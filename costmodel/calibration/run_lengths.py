"""The lengths of a run over lanes, in few numbers, as a cell of a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from costmodel.plan.lengths import IntArray, Lengths, means_of
from profiles.errors import InputError

FORM = "entries such as 60:128:256:97*3"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLengths:
    """Prompts and answers of a run that has ended.

    Entry ``i`` stands for ``weights[i]`` prompts of ``prompts[i]`` tokens, whose answers were
    expected to have ``outputs[i]`` tokens, could have ``limits[i]``, and had ``answers[i]``.
    """

    prompts: tuple[int, ...]
    outputs: tuple[int, ...]
    limits: tuple[int, ...]
    answers: tuple[int, ...]
    weights: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Lengths, answers: IntArray) -> RunLengths:
        """Return those of a run; similar requests become one entry of their means."""
        groups = lengths.expecting(answers).groups()
        columns = (lengths.prompts, lengths.outputs, lengths.limits, answers)
        prompts, outputs, limits, had = (means_of(column, groups) for column in columns)
        weights = tuple(len(group) for group in groups)
        return cls(prompts=prompts, outputs=outputs, limits=limits, answers=had, weights=weights)

    @classmethod
    def read(cls, text: str) -> RunLengths:
        """Read a cell that ``str`` made; raises ``InputError`` for any other text."""
        rows = []
        for entry in text.split():
            try:
                tokens, weight = entry.split("*")
                prompt, output, limit, answer = map(int, tokens.split(":"))
                row = (prompt, output, limit, answer, int(weight))
            except ValueError:
                raise InputError("lengths", got=entry, allowed=FORM) from None
            if min(row) < 1 or max(output, answer) > limit:
                raise InputError(
                    "lengths", got=entry, allowed="numbers of 1 or more, answers within the limit"
                )
            rows.append(row)
        if not rows:
            raise InputError("lengths", got="nothing", allowed=FORM)
        prompts, outputs, limits, answers, weights = zip(*rows, strict=True)
        return cls(
            prompts=prompts, outputs=outputs, limits=limits, answers=answers, weights=weights
        )

    def __str__(self) -> str:
        columns = (self.prompts, self.outputs, self.limits, self.answers, self.weights)
        entries = zip(*columns, strict=True)
        return " ".join(f"{p}:{o}:{most}:{a}*{w}" for p, o, most, a, w in entries)

    def lengths(self) -> Lengths:
        """Return the requests as they were admitted."""
        columns = (self.prompts, self.outputs, self.limits)
        return Lengths(*(np.repeat(column, self.weights) for column in columns))

    @property
    def all_answers(self) -> IntArray:
        """Tokens of each answer, int64 [requests]."""
        return np.repeat(np.array(self.answers, np.int64), self.weights)

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return int(self.all_answers.sum())
