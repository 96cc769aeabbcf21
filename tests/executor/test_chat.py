"""Chat templates, held to transformers' own rendering and token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from executor.text.chat import ChatTemplate, check_messages
from executor.text.loading import load_tokenizer
from profiles.errors import InputError
from tests.executor.tokenizer_structures import STRUCTURES, like

SYSTEM = {"role": "system", "content": "Answer in  one line.\n"}
USER = {"role": "user", "content": ' Who said: "it\'s <b>7</b> & 8"? é🙂'}
ANSWER = {"role": "assistant", "content": "Nobody\n", "reasoning": "hm", "name": None}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [SYSTEM, USER],
    [USER, ANSWER, USER],
    [SYSTEM, USER, ANSWER, USER],
]
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"où": {}}}},
}

# The ways in which public templates are written.
CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(count=0, last="") %}
Today Date: {{ date_string }}
{% for message in messages %}
    {% if message.role == "system" %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.last = message.content | trim %}
    {% generation %}
{{ ns.count }} {{ ns.last | upper }} {{ message | tojson(indent=2) }}
    {% endgeneration %}
    {%- if message.thinking is defined %}{{ message.thinking }}{{ message.name }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
TOKENS = "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ pad_token }}|{{ image_token }}"


TEMPLATES = (CHATML, LLAMA_2, LLAMA_3, TOKENS)


class Both:
    """A checkpoint's tokenizer and template, as we and as transformers read them."""

    def __init__(self, folder: Path) -> None:
        self.ours = load_tokenizer(folder)
        self.theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    def compare(self, template: ChatTemplate, chat: list[dict[str, Any]], **options: Any) -> None:
        messages = check_messages(chat, "chat")
        text = template.render(messages, self.ours.special_tokens, options)
        wanted = {"add_generation_prompt": True, "return_dict": False, **options}
        assert text == self.theirs.apply_chat_template(chat, tokenize=False, **wanted)
        assert self.ours.encode_rendered(text) == self.theirs.apply_chat_template(chat, **wanted)


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3", "Gemma 2", "Qwen 2.5", "Mistral Nemo"])
def test_text_and_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    STRUCTURES[name].write(tmp_path)
    both = Both(tmp_path)
    for text in TEMPLATES:
        if "bos_token" in text and "bos_token" not in both.theirs.special_tokens_map:
            continue
        both.theirs.chat_template = text
        template = ChatTemplate(text, "template")
        for chat in CHATS:
            both.compare(template, chat)
        both.compare(template, CHATS[0], add_generation_prompt=False, bos_token="B")
        options = {"enable_thinking": False, "date_string": "today"}
        both.compare(template, CHATS[0], tools=[WEATHER], **options)


def test_the_template_comes_from_where_transformers_takes_it(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ 'd' }}"}]
    structure = STRUCTURES["Llama 3"]
    like(structure, config={**structure.config, "chat_template": named}).write(tmp_path)
    Both(tmp_path).compare(ChatTemplate.load(tmp_path), CHATS[0])
    (tmp_path / "chat_template.jinja").write_text("of its own\n\n{{ messages[0].content }}\n")
    Both(tmp_path).compare(ChatTemplate.load(tmp_path), CHATS[0])


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "chat template of .*: got none; allowed: chat_template.jinja"),
        ([{"name": "tool_use", "template": "t"}], "got none"),
        ("{% if %}", "tokenizer_config.json: chat_template: got Expected an expression"),
        ("{{ raise_exception('no\nsuch role') }}", "got no such role; allowed: a template and"),
        ("{{ messages[0].content + 5 }}", "got can only concatenate str"),
        ("{{ 1 / 0 }}", "got division by zero"),
        ("{{ messages[7].content }}", "no element 7"),
        ("{{ messages.append(5) }}", "is not safe|unsafe|access to"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set x = namespace(__html__=1) %}", "begins with an underscore"),
        ("{% set x = namespace() %}{% set x.__html__ = 1 %}", "begins with an underscore"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
    ],
)
def test_templates_that_fail_are_told_in_one_line(
    template: object, said: str, tmp_path: Path
) -> None:
    config = {} if template is None else {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said) as caught:
        ChatTemplate.load(tmp_path).render(check_messages([USER], "chat"), {}, {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        ([], "chat: got an empty conversation"),
        ("Hello", "chat: got 'Hello'; allowed: a list of messages"),
        (["Hello"], "message 1 of chat: got 'Hello'"),
        ([USER, {"content": "x"}], "message 2 of chat: got {'content': 'x'}; allowed: an object"),
        ([{"role": "user", "content": b"x"}], "chat: got Object of type bytes"),
    ],
)
def test_bad_conversations_are_refused_in_one_line(chat: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_messages(chat, "chat")
    assert said in str(caught.value)
