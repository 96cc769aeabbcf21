"""OpenAI's batch files: what is read of them, and that its own types parse every answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executor.jobs.reading import ReadJob
from executor.model.sampling_params import SamplingParams
from executor.model.token_scores import TokenScores
from executor.run.finished import Finished
from tests.executor.job_files import done, prompts_of, read

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
# The lines of vLLM's guide to this format, with shorter messages.
GUIDE = (
    '{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model":'
    ' "meta-llama/Meta-Llama-3-8B-Instruct", "messages": [{"role": "system", "content": "a"},'
    '{"role": "user", "content": "b"}],"max_completion_tokens": 3}}\n'
    '{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model":'
    ' "meta-llama/Meta-Llama-3-8B-Instruct", "messages": [{"role": "system", "content": "c"},'
    '{"role": "user", "content": "d"}],"max_completion_tokens": 2}}\n'
)


def line(name: str, *, url: str = CHAT, **body: Any) -> str:
    default = {"messages": MESSAGES} if url == CHAT else {"prompt": "hi"}
    request = {"custom_id": name, "method": "POST", "url": url, "body": default | body}
    return json.dumps(request) + "\n"


def read_lines(tmp_path: Path, *lines: str, **more: Any) -> ReadJob:
    path = tmp_path / "batch.jsonl"
    path.write_text("".join(lines))
    return read(path, **more)


def ids(text: str) -> list[int]:
    return [ord(c) % 100 for c in text]


def test_the_example_of_vllm_reads_without_change(tmp_path: Path) -> None:
    job = read_lines(tmp_path, GUIDE)
    assert job.form.name == "batch" and not job.table.errors
    assert prompts_of(job) == [ids("s:a;u:b;a:"), ids("s:c;u:d;a:")]
    assert [job.table.params(row).max_tokens for row in (0, 1)] == [3, 2]
    # Without a temperature anywhere, the API draws.
    assert {job.table.params(row).sampler.temperature for row in (0, 1)} == {1.0}


def test_parameters_of_each_line(tmp_path: Path) -> None:
    flags = SamplingParams(temperature=0.5, seed=3)
    config = {"eos_token_id": 7, "do_sample": True, "top_p": 0.9}
    job = read_lines(
        tmp_path,
        line("a", max_tokens=2, temperature=0, top_p=0.1, stop="x", n=2),
        line("b", top_k=-1, min_p=0.2, stop=["y", "zz"], stop_token_ids=[5], seed=9),
        line("c", ignore_eos=True, repetition_penalty=1.5, include_stop_str_in_output=True),
        line("d", logprobs=True, top_logprobs=3, user="me", stream=False, tools=[], seed=None),
        params=flags,
        config=config,
    )
    assert not job.table.errors
    assert [list(job.table.rows_of(number)) for number in range(4)] == [[0, 1], [2], [3], [4]]
    a, b, c, d = (job.table.params(row) for row in (0, 2, 3, 4))
    assert (a.max_tokens, a.stops, a.sampler.is_greedy, a.sampler.top_p) == (2, ("x",), True, 1.0)
    assert (b.stops, b.end_ids, b.sampler.top_k) == (("y", "zz"), frozenset({5, 7}), 0)
    assert (b.sampler.min_p, b.sampler.temperature, b.sampler.top_p) == (0.2, 0.5, 0.9)
    assert (c.end_ids, c.keeps_stop) == (frozenset(), True)
    assert c.sampler.processors.repetition_penalty == 1.5
    assert (d.logprobs, d.end_ids, d.max_tokens) == (3, frozenset({7}), 4)
    assert len(set(job.table.identities)) == 5


def test_prompts_of_plain_completions(tmp_path: Path) -> None:
    job = read_lines(
        tmp_path,
        line("a", url=PLAIN, prompt="ab"),
        line("b", url=PLAIN, prompt=["c", "d"], n=2),
        line("c", url=PLAIN, prompt=[1, 2]),
        line("d", url=PLAIN, prompt=[[3], [4, 5]], logprobs=2),
    )
    assert not job.table.errors
    c, d = ids("c"), ids("d")
    assert prompts_of(job) == [ids("ab"), c, c, d, d, [1, 2], [3], [4, 5]]
    assert job.table.params(7).logprobs == 2


def test_draws_depend_on_the_name_the_seed_and_the_choice(tmp_path: Path) -> None:
    one = read_lines(tmp_path, line("a", n=2), line("b")).table.identities
    other = read_lines(tmp_path, line("b"), line("a", n=3)).table.identities
    assert list(one) == [other[1], other[2], other[0]]
    assert read_lines(tmp_path, line("a", seed=1)).table.identities[0] != one[0]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (line("b", presence_penalty=0.5), "presence_penalty: got 0.5; allowed: 0"),
        (line("b", tools=[{"type": "function"}]), "tools"),
        (line("b", response_format={"type": "json_object"}), "response_format"),
        (line("b", stream=True), "stream"),
        (line("b", beam=4), "beam: got 4; allowed: parameters of the reference"),
        (line("b", prompt="x"), "prompt"),
        (line("b", url=PLAIN, messages=MESSAGES), "messages"),
        (line("b", temperature=-1), "temperature: got -1"),
        (line("b", temperature="hot"), "temperature: got 'hot'"),
        (line("b", top_p=0), "top-p: got 0"),
        (line("b", max_tokens=0), "max_tokens: got 0"),
        (line("b", max_tokens=2.5), "max_tokens: got 2.5"),
        (line("b", max_tokens=10**30), "positions"),
        (line("b", n=0), "n: got 0; allowed: 1 to 128"),
        (line("b", stop=[""]), "stop"),
        (line("b", stop_token_ids=[1.5]), "stop_token_ids"),
        (line("b", top_logprobs=2), "top_logprobs: got 2 without logprobs"),
        (line("b", logprobs=True, top_logprobs=21), "0 to 20"),
        (line("b", seed=1.5), "seed"),
        (line("b", max_tokens=30), "30 generated; allowed: 16 positions"),
        (line("b", messages=[]), "an empty conversation"),
        (line("b", messages=[{"content": "x"}]), "message 1 of messages"),
        (line("b", messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "a part"),
        (line("b", model="other"), "model: got 'other'; allowed: 'tiny'"),
        (line("b", url="/v1/embeddings"), "url"),
        (line("b", url=PLAIN, prompt=""), "an empty prompt"),
        (line("b", url=PLAIN, prompt=[[1], []]), "an empty prompt"),
        (line("b", url=PLAIN, prompt=[100]), "token id 100"),
        (line("b", url=PLAIN, prompt=None), "not text"),
        (line("a"), "custom_id: got 'a' again"),
        (line(""), "custom_id: got ''"),
        ('{"custom_id": "b", "method": "GET", "url": "/v1/completions", "body": {}}\n', "method"),
        ('{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": 3}\n', "body"),
        ('{"custom_id": "b"\n', "not JSON"),
    ],
)
def test_a_bad_line_fails_alone(bad: str, words: str, tmp_path: Path) -> None:
    job = read_lines(tmp_path, line("a"), bad, line("z"))
    (error,) = job.table.errors
    assert words in error.message and error.message.startswith("line 2 of batch.jsonl: ")
    assert error.number == 2
    assert [len(job.table.rows_of(number)) for number in range(3)] == [1, 0, 1]
    assert [job.table.line_of(row) for row in (0, 1)] == [0, 2]
    told = json.loads(job.form.refusal(error))
    assert told["response"] is None and told["error"]["message"] == error.message


def test_a_first_line_that_is_broken_does_not_hide_the_form(tmp_path: Path) -> None:
    job = read_lines(tmp_path, "{\n", line("a"))
    assert job.form.name == "batch" and job.table.num_rows == 1


def test_settings_of_the_template_and_parts_of_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    job = read_lines(
        tmp_path,
        line("a", chat_template_kwargs={"shouts": True}, max_tokens=1),
        line("b", messages=[{"role": "user", "content": parts}]),
    )
    assert prompts_of(job) == [ids("u:hi;!a:"), ids("u:a\nb;a:")]


def scores(num_tokens: int) -> TokenScores:
    tops = np.array([[65, 66, 67]] * num_tokens)
    return TokenScores(
        log_probs=np.full(num_tokens, -1.5, np.float32),
        is_greedy=np.zeros(num_tokens, bool),
        top_ids=tops,
        top_log_probs=np.array([[-0.5, -1.0, -2.0]] * num_tokens, np.float32),
    )


def answer(job: ReadJob, text: str, *found: Finished) -> dict[str, Any]:
    prompts = prompts_of(job)[: len(found)]
    told: dict[str, Any] = json.loads(job.form.answer(text.encode(), prompts, found))
    return told


def test_an_answer_to_a_chat(tmp_path: Path) -> None:
    text = line("a", n=2, stop="Y", model="m", logprobs=True, top_logprobs=2)
    job = read_lines(tmp_path, text)
    first = done([65, 89, 66], "stop", stop="Y", scores=scores(3))
    told = answer(job, text, first, done([66, 67], "stop", stop=1, scores=scores(2)))
    body = told["response"]["body"]
    assert (told["custom_id"], told["error"]) == ("a", None)
    assert told["response"]["status_code"] == 200
    assert (body["object"], body["model"], body["created"]) == ("chat.completion", "m", 1700000000)
    one, two = body["choices"]
    assert (one["index"], one["message"]["content"], one["finish_reason"]) == (0, "A", "stop")
    assert (two["index"], two["message"]["content"], two["finish_reason"]) == (1, "BC", "stop")
    entry = one["logprobs"]["content"][1]
    assert (entry["token"], entry["logprob"], entry["bytes"]) == ("Y", -1.5, [89])
    assert [(top["token"], top["logprob"]) for top in entry["top_logprobs"]] == [
        ("A", -0.5),
        ("B", -1.0),
    ]
    num = len("u:hi;a:")
    assert body["usage"] == {
        "prompt_tokens": num,
        "completion_tokens": 6,
        "total_tokens": num + 6,
    }


def test_an_answer_to_a_plain_completion(tmp_path: Path) -> None:
    text = line("a", url=PLAIN, prompt=["ab", "c"], stop=["D"], include_stop_str_in_output=True)
    job = read_lines(tmp_path, text)
    told = answer(job, text, done([67, 68, 69], "stop", stop="D"), done([70]))
    choices = told["response"]["body"]["choices"]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (0, "CD", "stop"),
        (1, "F", "length"),
    ]
    assert told["response"]["body"]["usage"]["prompt_tokens"] == 3
    text = line("a", url=PLAIN, logprobs=1).replace(
        '"logprobs"', f'"user": {"7" * 5000}, "logprobs"'
    )
    told = answer(read_lines(tmp_path, text), text, done([68, 69], scores=scores(2)))
    (choice,) = told["response"]["body"]["choices"]
    assert choice["logprobs"] == {
        "tokens": ["D", "E"],
        "token_logprobs": [-1.5, -1.5],
        "top_logprobs": [{"D": -1.5, "A": -0.5}, {"E": -1.5, "A": -0.5}],
        "text_offset": [0, 1],
    }


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("url", [CHAT, PLAIN])
def test_the_types_of_openai_parse_answers(url: str, with_scores: bool, tmp_path: Path) -> None:
    types = pytest.importorskip("openai.types")
    wanted: dict[str, Any] = {}
    if with_scores:
        wanted = {"logprobs": True, "top_logprobs": 1} if url == CHAT else {"logprobs": 1}
    text = line("a", url=url, n=2, **wanted)
    job = read_lines(tmp_path, text)
    more: dict[str, Any] = {"scores": scores(2)} if with_scores else {}
    told = answer(job, text, done([65, 66], **more), done([65, 66], "stop", stop=7, **more))
    kind = types.chat.ChatCompletion if url == CHAT else types.Completion
    body = told["response"]["body"]
    parsed = kind.model_validate(body, strict=True)
    assert parsed.to_dict() == {key: value for key, value in body.items() if value is not None}
