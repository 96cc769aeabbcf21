"""Choose the likeliest of several answers by the log-probabilities of their tokens."""

from __future__ import annotations

import sys
from pathlib import Path

from executor import LLM, RequestOutput, SamplingParams
from executor.data import MODEL

QUESTION = "And God said, Let there be"
ANSWERS = [" light", " bread", " a computer"]


def main(model: Path) -> str:
    """Print the answers with their scores, and return the likeliest one."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    with LLM(model) as llm:
        question, *results = llm.generate([QUESTION, *(QUESTION + a for a in ANSWERS)], params)
    first = len(question.prompt_token_ids)
    scores = {
        answer: answer_logprob(result, first)
        for answer, result in zip(ANSWERS, results, strict=True)
    }
    for answer, score in scores.items():
        print(f"{score:8.2f} {answer}")
    return max(scores, key=scores.__getitem__)


def answer_logprob(result: RequestOutput, first: int) -> float:
    """Return the log-probability in nats of all tokens of a prompt from ``first`` on."""
    assert result.prompt_logprobs is not None
    total = 0.0
    tokens = zip(result.prompt_token_ids, result.prompt_logprobs, strict=True)
    for token, candidates in list(tokens)[first:]:
        assert candidates is not None
        total += candidates[token].logprob
    return total


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
