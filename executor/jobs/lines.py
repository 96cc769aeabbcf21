"""Our own form of a job: a prompt a line, which comes back with three further keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from executor.cli.prompts import LINE_FORM, PROMPT_KEYS, check_text
from executor.jobs.drafts import Draft
from executor.jobs.limits import PromptNames, RequestLimits
from executor.jobs.params import Asked, ParamsMaker
from executor.jobs.table import LineError, ParsedLine
from executor.run.finished import Finished
from executor.text.continuation import TextTokenizer, decode_continuation
from profiles.errors import InputError

OUTPUT_KEYS = ("text", "output_ids", "finish_reason")


class PromptLines:
    """Lines with ``prompt`` or ``prompt_ids``.

    Parameters
    ----------
    load_tokenizer
        Called where a line has text: a file of ids needs no tokenizer.
    """

    name = "lines"
    keeps_order = True

    def __init__(
        self,
        limits: RequestLimits,
        maker: ParamsMaker,
        load_tokenizer: Callable[[], TextTokenizer],
    ) -> None:
        self._limits, self.load_tokenizer = limits, load_tokenizer
        asked = Asked()
        self._params, self._names = maker.make(asked), PromptNames()
        self._seed = maker.seed(asked)
        self._has_text = False

    @staticmethod
    def is_one(line: dict[str, Any]) -> bool:
        """Whether an object has this form."""
        return any(key in line for key in PROMPT_KEYS)

    @staticmethod
    def name_of(line: dict[str, Any]) -> None:
        """Lines have no names."""

    def draft(self, line: dict[str, Any], where: str) -> Draft:
        """Return the prompt of a line, or raise ``InputError``."""
        keys = [key for key in PROMPT_KEYS if key in line]
        if len(keys) != 1:
            got = "both prompt and prompt_ids" if keys else "neither prompt nor prompt_ids"
            raise InputError(where, got=got, allowed=LINE_FORM)
        taken = [key for key in OUTPUT_KEYS if key in line]
        if taken:
            got = f"a key {taken[0]!r}, which the outputs need for themselves"
            raise InputError(where, got=got, allowed="any other name")
        if keys == ["prompt_ids"]:
            return Draft(finish=partial(self._finish, where, line["prompt_ids"]))
        check_text(line["prompt"], where)
        self.load_tokenizer()
        return Draft(finish=partial(self._finish, where, None), texts=[line["prompt"]])

    def _finish(self, where: str, ids: object, encoded: Sequence[list[int]]) -> ParsedLine:
        ids = encoded[0] if encoded else ids
        self._limits.check(ids, self._params.max_tokens, where)
        assert isinstance(ids, list)
        self._has_text |= bool(encoded)
        identities = self._names.identities(ids, self._seed, 1)
        return ParsedLine(prompts=[ids], params=self._params, identities=identities)

    def answer(
        self, line: bytes, prompts: Sequence[Sequence[int]], done: Sequence[Finished]
    ) -> str:
        """Return the prompt's line with further keys.

        What came with the prompt is not written anew, so that it cannot change or fail now.
        """
        (finished,) = done
        text = None
        if self._has_text:
            text = decode_continuation(self.load_tokenizer(), prompts[0], finished.ids)
        added = {
            "text": text,
            "output_ids": list(finished.ids),
            "finish_reason": finished.reason,
        }
        # Between the parts of an object, a carriage return is a space.
        begun = line.decode("utf-8-sig").replace("\r", " ").strip()
        begun = begun.removesuffix("}").rstrip()
        return f"{begun}, {json.dumps(added, ensure_ascii=False)[1:]}"

    def refusal(self, error: LineError) -> str:
        """Return the line of the error file."""
        told = {"line": error.number, "error": {"message": error.message}}
        return json.dumps(told, ensure_ascii=False)
