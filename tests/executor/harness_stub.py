"""What ``executor.harness.model`` needs of lm-evaluation-harness, written down again.

The harness takes hundreds of megabytes, so the tests run without it. ``tests/bench/harness.py``
holds the model to the harness itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

registered: dict[str, type] = {}


@dataclass(frozen=True, slots=True)
class Instance:
    """One request."""

    args: tuple[Any, ...]


class CacheHook:
    """Keeps what a model tells of each request."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Take an answer."""
        self.told.append((kind, request, answer))


class TemplateLM:
    """Turns texts into tokens before they are scored."""

    def __init__(self) -> None:
        self.cache_hook = CacheHook()

    def loglikelihood(self: Any, requests: Sequence[Instance]) -> Any:
        """Score continuations; trailing spaces of a context belong to its continuation."""
        wanted = []
        for context, continuation in (request.args for request in requests):
            if context == "":
                ids = self.tok_encode(continuation, add_special_tokens=False)
                wanted.append(((context, continuation), [self.prefix_token_id], ids))
                continue
            kept = context.rstrip()
            begin = self.tok_encode(kept)
            whole = self.tok_encode(context + continuation)
            wanted.append(((context, continuation), begin, whole[len(begin) :]))
        return self._loglikelihood_tokens(wanted)


class TaskManager:
    """Knows one task, which cannot be loaded."""

    def match_tasks(self, names: list[str]) -> list[str]:
        """Return the tasks of these names."""
        return [name for name in names if name == "known"]

    def load(self, names: list[str]) -> None:
        """Fail as ``datasets`` does."""
        raise ConnectionError(f"cannot reach\nthe documents of {names[0]}")


def register_model(name: str) -> Callable[[type], type]:
    """Remember a class by a name."""

    def decorate(model: type) -> type:
        registered[name] = model
        return model

    return decorate


def rolling_windows(
    tokens: list[int], prefix: int, max_length: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield windows of inputs, and the tokens that they predict."""
    assert context_len == 1
    first = tokens[:max_length]
    yield [prefix, *first[:-1]], first
    for begin in range(max_length, len(tokens), max_length):
        end = min(begin + max_length, len(tokens))
        yield tokens[end - max_length - 1 : end - 1], tokens[begin:end]


def disjoint_window(pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    """Leave of the inputs what comes before the predicted tokens."""
    inputs, predicted = pair
    return inputs[: len(inputs) - len(predicted) + 1], predicted


def gen_kwargs(given: dict[str, Any], max_gen_toks: int) -> dict[str, Any]:
    """Fill in what a task leaves out."""
    stops = given.get("until", [])
    return {
        "do_sample": False,
        "max_gen_toks": max_gen_toks,
        **given,
        "until": stops if isinstance(stops, list) else [stops],
    }


def stop_sequences(until: list[str], *, eos: str) -> list[str]:
    """Add the text of the end token."""
    return [*until, eos]


def cut_at_stops(text: str, stops: Sequence[str], _: None) -> str:
    """Cut a text before the first stop string."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put these in the place of the harness's modules."""
    modules: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": Instance},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": register_model},
        "lm_eval.models": {},
        "lm_eval.models.utils": {
            "handle_stop_sequences": stop_sequences,
            "has_bos_prefix": lambda text, begin: text.startswith(begin),
            "normalize_gen_kwargs": gen_kwargs,
            "postprocess_generated_text": cut_at_stops,
        },
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.utils": {
            "get_rolling_token_windows": rolling_windows,
            "make_disjoint_window": disjoint_window,
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("executor.harness.model", None)
