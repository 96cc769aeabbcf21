"""``prompts.jsonl`` in, ``outputs.jsonl`` out: every line checked before any work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executor.text import TextTokenizer
from profiles.errors import InputError
from profiles.files import atomic_writer

OUTPUT_KEYS = ("text", "output_ids", "finish_reason")
LINE_FORM = 'an object with "prompt" (text) or "prompt_ids" (whole numbers)'


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """One prompt.

    Parameters
    ----------
    index
        Its place among the prompts, from zero.
    extra
        All other keys of its line, which come back in the outputs.
    prompt
        Its text, or ``None`` where the line held ids.
    prompt_ids
        Its tokens, at least one.
    """

    index: int
    extra: Mapping[str, Any]
    prompt: str | None
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated for one prompt.

    ``text`` is ``None`` where there was no tokenizer; ``finish_reason`` is ``stop`` at an
    end-of-sequence token and ``length`` at the limit.
    """

    record: PromptRecord
    output_ids: tuple[int, ...]
    text: str | None
    finish_reason: str

    def __post_init__(self) -> None:
        assert self.finish_reason in ("stop", "length"), self.finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """What a model and a workload allow of a prompt."""

    vocab_size: int
    max_positions: int
    gen_len: int


def read_prompts(
    path: Path, limits: PromptLimits, load_tokenizer: Callable[[], TextTokenizer]
) -> list[PromptRecord]:
    """Read every prompt of a file; blank lines are skipped.

    Parameters
    ----------
    load_tokenizer
        Called once, when the first line with text comes: a file of ids needs no tokenizer.

    Raises
    ------
    InputError
        With the number of the line, on anything that could not be run.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"prompts {path}", got=error.strerror, allowed="a readable file") from None
    records: list[PromptRecord] = []
    tokenizer: TextTokenizer | None = None
    # Not splitlines: JSON may hold the other line ends of Unicode.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        parsed = _parse_line(line, where)
        text = parsed.pop("prompt", None)
        ids = parsed.pop("prompt_ids", None)
        if text is not None:
            tokenizer = tokenizer or load_tokenizer()
            ids = tokenizer.encode(text)
        _check_ids(ids, limits, where)
        records.append(
            PromptRecord(index=len(records), extra=parsed, prompt=text, prompt_ids=tuple(ids))
        )
    if not records:
        raise InputError(f"prompts {path}", got="no prompts", allowed="one prompt a line")
    return records


def write_outputs(path: Path, results: Iterable[Completion]) -> None:
    """Write one line per result, in the order of the prompts, whole or not at all."""
    with atomic_writer(path) as handle:
        for result in sorted(results, key=lambda r: r.record.index):
            record = result.record
            key, prompt = (
                ("prompt_ids", list(record.prompt_ids))
                if record.prompt is None
                else ("prompt", record.prompt)
            )
            line = {
                **record.extra,
                key: prompt,
                "text": result.text,
                "output_ids": list(result.output_ids),
                "finish_reason": result.finish_reason,
            }
            handle.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(line, parse_constant=_refuse_constant)
        # Half of a surrogate pair would be found out only when the outputs are written.
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(where, got=f"text that is not JSON ({error})", allowed=LINE_FORM) from None
    if not isinstance(parsed, dict):
        raise InputError(where, got=f"a JSON {type(parsed).__name__}", allowed=LINE_FORM)
    keys = [key for key in ("prompt", "prompt_ids") if key in parsed]
    if len(keys) != 1:
        raise InputError(
            where, got="both prompt and prompt_ids" if keys else "neither prompt nor prompt_ids",
            allowed=LINE_FORM,
        )  # fmt: skip
    if keys == ["prompt"] and not (isinstance(parsed["prompt"], str) and parsed["prompt"]):
        got = "an empty prompt" if parsed["prompt"] == "" else "a prompt that is not text"
        raise InputError(where, got=got, allowed="text of at least one character")
    taken = [key for key in OUTPUT_KEYS if key in parsed]
    if taken:
        raise InputError(
            where, got=f"a key {taken[0]!r}, which the outputs need for themselves",
            allowed="any other name",
        )  # fmt: skip
    return parsed


def _check_ids(ids: object, limits: PromptLimits, where: str) -> None:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise InputError(where, got="prompt_ids of another kind", allowed="a list of whole numbers")
    if not ids:
        raise InputError(where, got="an empty prompt", allowed="at least one token")
    outside = [i for i in ids if not 0 <= i < limits.vocab_size]
    if outside:
        raise InputError(
            where, got=f"token id {outside[0]}",
            allowed=f"0 to {limits.vocab_size - 1}, the model's vocabulary",
        )  # fmt: skip
    if len(ids) + limits.gen_len > limits.max_positions:
        raise InputError(
            where, got=f"{len(ids)} tokens + {limits.gen_len} generated",
            allowed=f"{limits.max_positions} positions",
            hint="a shorter prompt or a smaller --gen-len",
        )  # fmt: skip


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a finite number")
