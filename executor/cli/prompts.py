"""``prompts.jsonl`` in, ``outputs.jsonl`` out: every line checked before any work."""

from __future__ import annotations

import codecs
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from executor.text.continuation import TextTokenizer
from profiles.errors import InputError
from profiles.files import refuse_constant

PROMPT_KEYS = ("prompt", "prompt_ids")
OUTPUT_KEYS = ("text", "output_ids", "finish_reason")
LINE_FORM = 'an object with "prompt" (text) or "prompt_ids" (whole numbers)'
# Longer ones are no token ids, and Python reads no number of any length.
MOST_DIGITS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """One prompt.

    Parameters
    ----------
    index
        Its place among the prompts, from zero.
    line
        Its line, a JSON object, which comes back in the outputs as it is.
    prompt
        Its text, or ``None`` where the line held ids.
    prompt_ids
        Its tokens, at least one.
    """

    index: int
    line: str
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
    records: list[PromptRecord] = []
    tokenizer: TextTokenizer | None = None
    # Each number once: a file may hold millions of tokens.
    tokens: dict[int, int] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        parsed = _parse_line(line, where)
        text, ids = parsed.get("prompt"), parsed.get("prompt_ids")
        if text is not None:
            tokenizer = tokenizer or load_tokenizer()
            ids = tokenizer.encode(text)
        check_ids(ids, limits, where)
        assert ids is not None
        records.append(
            PromptRecord(
                index=len(records),
                # Between the parts of an object, a carriage return is a space.
                line=line.decode().replace("\r", " ").strip(),
                prompt=text,
                prompt_ids=tuple(tokens.setdefault(i, i) for i in ids),
            )
        )
    if not records:
        raise InputError(f"prompts {path}", got="no prompts", allowed="one prompt a line")
    return records


def write_outputs(handle: IO[str], results: Iterable[Completion]) -> None:
    """Write one line per result, in the order of the prompts: the prompt's line with further keys.

    What came with the prompt is not written anew, so that it cannot change or fail now.
    """
    for result in sorted(results, key=lambda r: r.record.index):
        added = {
            "text": result.text,
            "output_ids": list(result.output_ids),
            "finish_reason": result.finish_reason,
        }
        begun = result.record.line.removesuffix("}").rstrip()
        handle.write(f"{begun}, {json.dumps(added, ensure_ascii=False)[1:]}\n")


def _read_lines(path: Path) -> Iterator[bytes]:
    """Read line by line, without the byte order mark; JSON may hold other line ends of Unicode."""
    label = f"prompts {path}"
    try:
        with path.open("rb") as handle:
            if stat.S_ISCHR(os.fstat(handle.fileno()).st_mode) and not handle.isatty():
                raise InputError(label, got="a device", allowed="a file or a pipe")
            first = handle.readline()
            if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                hint = f"iconv -f UTF-16 -t UTF-8 {path}"
                raise InputError(label, got="text in UTF-16", allowed="UTF-8", hint=hint)
            yield first.removeprefix(codecs.BOM_UTF8)
            yield from handle
    except OSError as error:
        raise InputError(label, got=error.strerror, allowed="a readable file") from None


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(
            line.decode().strip(" \t\r\n"),
            parse_constant=refuse_constant,
            parse_int=lambda digits: int(digits) if len(digits) <= MOST_DIGITS else math.inf,
            object_pairs_hook=_refuse_two_prompts,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(where, got=f"text that is not JSON ({error})", allowed=LINE_FORM) from None
    except ValueError as error:
        raise InputError(where, got=error, allowed=LINE_FORM) from None
    if not isinstance(parsed, dict):
        raise InputError(where, got=f"a JSON {type(parsed).__name__}", allowed=LINE_FORM)
    keys = [key for key in PROMPT_KEYS if key in parsed]
    if len(keys) != 1:
        raise InputError(
            where,
            got="both prompt and prompt_ids" if keys else "neither prompt nor prompt_ids",
            allowed=LINE_FORM,
        )
    if keys == ["prompt"]:
        check_text(parsed["prompt"], where)
    taken = [key for key in OUTPUT_KEYS if key in parsed]
    if taken:
        raise InputError(
            where,
            got=f"a key {taken[0]!r}, which the outputs need for themselves",
            allowed="any other name",
        )
    return parsed


def check_text(text: object, where: str) -> None:
    """Refuse a prompt that is no text, or none that can be encoded."""
    if not (isinstance(text, str) and text):
        got = "an empty prompt" if text == "" else "a prompt that is not text"
        raise InputError(where, got=got, allowed="text of at least one character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            where, got="half of a surrogate pair in a prompt", allowed="whole characters"
        ) from None


def check_ids(ids: object, limits: PromptLimits, where: str) -> None:
    """Refuse token ids that the model cannot continue."""
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise InputError(where, got="token ids of another kind", allowed="a list of whole numbers")
    if not ids:
        raise InputError(where, got="an empty prompt", allowed="at least one token")
    outside = [i for i in ids if not 0 <= i < limits.vocab_size]
    if outside:
        raise InputError(
            where,
            got=f"token id {outside[0]}",
            allowed=f"0 to {limits.vocab_size - 1}, the model's vocabulary",
        )
    if len(ids) + limits.gen_len > limits.max_positions:
        raise InputError(
            where,
            got=f"{len(ids)} tokens + {limits.gen_len} generated",
            allowed=f"{limits.max_positions} positions",
            hint="a shorter prompt, or fewer tokens to generate",
        )


def _refuse_two_prompts(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    for key in PROMPT_KEYS:
        if counts[key] > 1:
            raise ValueError(f"{key} twice")
    return dict(pairs)
