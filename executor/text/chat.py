"""Chat templates: the messages of a conversation become the text of a prompt, as in transformers.

A template runs in the sandbox of Jinja. It sees the messages, the options and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from executor.text.special_tokens import read_if_there
from executor.text.tokenizer_json import refuse_pointer
from profiles.errors import InputError

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
# Names of a message's reasoning. Templates read the first, those of gpt-oss the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
MESSAGE_FORM = 'an object with "role" and "content"'


class ChatTemplate:
    """A compiled template.

    Parameters
    ----------
    text
        In Jinja's language.
    where
        The file that it comes from, for messages.
    """

    def __init__(self, text: str, where: str) -> None:
        self._where = where
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        environment.globals["namespace"] = _SafeNamespace
        try:
            self._template = environment.from_string(text)
        except TemplateError as error:
            raise self._error(error) from error

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """Read the template of a checkpoint folder: a file of its own, else ``tokenizer_config``.

        Raises
        ------
        InputError
            Where there is none, or none that is named ``default``.
        """
        path = Path(folder) / TEMPLATE_FILE
        if path.exists():
            refuse_pointer(path)
            return cls(path.read_text(encoding="utf-8"), str(path))
        path = Path(folder) / CONFIG_FILE
        found = read_if_there(path, "tokenizer config").get("chat_template")
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict)]
            found = next((e.get("template") for e in named if e.get("name") == "default"), None)
        if not isinstance(found, str):
            raise InputError(
                f"chat template of {folder}",
                got="none",
                allowed=f"{TEMPLATE_FILE}, or chat_template in {CONFIG_FILE}",
                hint="generate, with prompts in the form that the model was trained on",
            )
        return cls(found, f"{path}: chat_template")

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> str:
        """Return the text of a prompt that ends where the assistant's answer begins.

        Parameters
        ----------
        messages
            As ``check_messages`` returns them.
        special_tokens
            By their role, such as ``bos_token``.
        options
            Further variables of the template, such as ``tools`` or ``enable_thinking``.
        """
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        try:
            return self._template.render(
                given | dict(special_tokens) | dict(options) | {"messages": messages}
            )
        # Templates apply Python's operators to whatever a message holds.
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> InputError:
        got = f"{error or type(error).__name__}"
        allowed = "a template and messages that fit each other"
        return InputError(self._where, got=got, allowed=allowed)


def check_messages(messages: object, where: str) -> list[dict[str, Any]]:
    """Return a copy of a conversation as plain data, or refuse it.

    Keys without a value are dropped, because many templates would print them.
    """
    if not isinstance(messages, list | tuple) or not messages:
        got = "an empty conversation" if isinstance(messages, list | tuple) else repr(messages)
        raise InputError(where, got=got, allowed=f"a list of messages, each {MESSAGE_FORM}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(
                f"message {number} of {where}", got=repr(message), allowed=MESSAGE_FORM
            )
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps(messages))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(where, got=error, allowed="text, numbers, lists and objects") from error
    return [_with_reasoning({k: v for k, v in m.items() if v is not None}) for m in plain]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    found = next((message[name] for name in REASONING if name in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


class _SafeNamespace(Namespace):
    """Refuses names that Python itself would call, outside the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace with {name!r}, which begins with an underscore")


class _GenerationTag(Extension):
    """``{% generation %}``, which marks the assistant's own text for training."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration is no ClassVar

    def parse(self, parser: Parser) -> nodes.Node:
        """Return what is inside the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes what HTML would misread."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
