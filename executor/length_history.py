"""The lengths of answers of earlier runs, kept by model beside this machine's profile."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from costmodel.model.spec import ModelSpec
from costmodel.plan.answer_lengths import MOST_KINDS, AnswerCounts, AnswerHistory
from costmodel.plan.lengths import IntArray
from profiles.cache_folder import cache_folder
from profiles.errors import InputError, ZigzagError
from profiles.files import from_json, read_json, to_json
from profiles.whole_file import write_whole

logger = logging.getLogger(__name__)

VERSION = 1
LONGEST_NAME = 120


def expected_outputs(
    model: ModelSpec,
    prompts: ArrayLike,
    limits: ArrayLike,
    *,
    expected_len: int | None = None,
) -> IntArray:
    """Return the tokens to be expected of each answer, int64 [requests], from 1 to its limit.

    Parameters
    ----------
    model
        Whose earlier runs are asked.
    prompts, limits
        Tokens of each prompt, and most tokens of each answer; 1 or more, int [requests].
    expected_len
        What the user expects of every answer; ``None`` asks the earlier runs, and without any the
        limits.
    """
    most: IntArray = np.array(limits, np.int64)
    if expected_len is not None:
        expected: IntArray = np.minimum(most, expected_len)
        return expected
    path = history_path(model)
    history = _read(path) if path is not None and path.exists() else AnswerHistory()
    return history.expected(np.array(prompts, np.int64), most)


def record_outputs(
    model: ModelSpec, prompts: ArrayLike, outputs: ArrayLike, is_cut: ArrayLike
) -> None:
    """Keep the lengths of answers for later runs. Only warns where that is not possible.

    Parameters
    ----------
    prompts, outputs
        Tokens of each prompt, and tokens that were generated, with the end token; int [requests].
    is_cut
        Whether an answer was ended by its limit, bool [requests].
    """
    try:
        path = history_path(model)
        if path is None:
            return
        history = _read(path) if path.exists() else AnswerHistory()
        columns = (np.asarray(prompts), np.asarray(outputs), np.asarray(is_cut, bool))
        history.add(*(column.tolist() for column in columns))
        raw = {"version": VERSION, "kinds": to_json(history.kinds)}
        write_whole(path, partial(json.dump, raw))
    except (OSError, ZigzagError) as error:
        # The run itself is done.
        logger.warning("the lengths of the answers were not kept: %s", error)


def history_path(model: ModelSpec) -> Path | None:
    """Return where the lengths of a model's answers are kept, or will be; ``None`` for nowhere."""
    folder = cache_folder()
    if folder is None:
        return None
    # A number of a config may be whole where a policy's file makes a float of it.
    same = from_json(ModelSpec, to_json(model), "model")
    # Its precision hardly changes what it says.
    shapes = to_json(same) | {"dtype": ""}
    key = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.+-]+", "-", model.name)[:LONGEST_NAME]
    return folder / f"lengths-{name}-{key}.json"


def _read(path: Path) -> AnswerHistory:
    """Read a file; one that is broken counts as none, and is told."""
    try:
        raw = read_json(path, "lengths of answers")
        if raw.get("version") != VERSION:
            raise InputError(f"{path}", got=f"version {raw.get('version')}", allowed=str(VERSION))
        return AnswerHistory({int(k): _counts(v) for k, v in raw["kinds"].items() if _is_kind(k)})
    except InputError as error:
        logger.warning("the lengths of earlier answers are not used: %s", error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        logger.warning("the lengths of earlier answers are not used: %s: %r", path, error)
    return AnswerHistory()


def _is_kind(text: str) -> bool:
    if not 0 <= int(text) < MOST_KINDS:
        raise ValueError(f"a prompt of 2^{text} tokens")
    return True


def _counts(raw: Mapping[str, Any]) -> AnswerCounts:
    ended, cut = (Counter({int(n): int(c) for n, c in raw[k].items()}) for k in ("ended", "cut"))
    if any(length < 1 or count < 1 for counts in (ended, cut) for length, count in counts.items()):
        raise ValueError("lengths or counts below 1")
    return AnswerCounts(ended, cut)
