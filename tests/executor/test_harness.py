"""The model for lm-evaluation-harness, held to transformers."""

from __future__ import annotations

import importlib
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import LanePolicy
from executor.checkpoint.folder import Checkpoint
from executor.data import MODEL
from executor.harness.task_sampling import make_sampler
from executor.lm_eval import main
from executor.model.generation_config import GenerationConfig
from profiles.errors import InputError
from tests.executor import harness_stub
from tests.executor.harness_stub import Instance
from tests.executor.tiny_machines import ON_CPU, draw_policy, make_hardware, make_policy

CONTEXTS = ("And God said,", "In the beginning God created the heaven ", "", "The LORD")
ENDS = (" Let there be light", " and the earth.", " is", " was")
TEXT = "And the king said unto him, Go thou, and bring the ark of the LORD unto the city.\n"
MAX_LENGTH = 48


@pytest.fixture(scope="module")
def theirs() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(params=["blocks", "lanes"])
def model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Any]:
    """The class over a stub of the harness, with a policy by chance and some weights on disk."""
    harness_stub.install(monkeypatch)
    importlib.import_module("executor.harness.model")
    spec = Checkpoint.open(MODEL, dtype="float32").spec
    yield harness_stub.registered["zigzag"](
        MODEL,
        policy=_save_policy(tmp_path, spec, has_lanes=request.param == "lanes"),
        offload_dir=tmp_path,
        max_length=MAX_LENGTH,
        batch_size=1,
        device="cpu",
    )
    del sys.modules["executor.harness.model"]


def _save_policy(folder: Path, spec: ModelSpec, *, has_lanes: bool = False) -> Path:
    hardware = make_hardware()
    base = make_policy(spec, prompt_len=8, gen_len=1)
    policies = (draw_policy(base, random.Random(seed), gpu=False) for seed in range(100))
    policy = next(p for p in policies if p.weights["mlp"].disk > 0 and p.block_size > 4)
    if has_lanes:
        lanes = LanePolicy(pool_tokens=4 * 2 * MAX_LENGTH, pass_rows=4 * MAX_LENGTH)
        policy = replace(policy, lanes=lanes, cache=ON_CPU, activations=ON_CPU)
    path = folder / "policy.json"
    replace(policy, hardware=hardware).save(path)
    return path


def _expected(theirs: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    whole = [*context, *continuation][-MAX_LENGTH - 1 :]
    with torch.no_grad():
        logits = theirs(torch.tensor([whole[:-1]])).logits[0, -len(continuation) :]
    found = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
    return float(found.sum()), logits.argmax(-1).tolist() == continuation


def test_log_likelihoods_are_those_of_transformers(model: Any, theirs: Any, tokenizer: Any) -> None:
    pairs = [(context, end) for context in CONTEXTS for end in ENDS]
    # Longer than the model takes; and what greedy decoding gives.
    pairs += [(TEXT * 4, " and the people"), ("And the", " LORD"), ("And the", " king of")]
    found = model.loglikelihood([Instance(pair) for pair in pairs])
    for (context, end), (log_prob, is_greedy) in zip(pairs, found, strict=True):
        begin = tokenizer.encode(context.rstrip()) if context else [tokenizer.bos_token_id]
        whole = tokenizer.encode(context + end, add_special_tokens=bool(context))
        continuation = whole[len(begin) :] if context else whole
        expected = _expected(theirs, begin, continuation)
        assert log_prob == pytest.approx(expected[0], abs=1e-3), (context, end)
        assert is_greedy == expected[1]
    assert {greedy for _, greedy in found} == {True, False}
    assert [told[:2] for told in model.cache_hook.told] == [("loglikelihood", p) for p in pairs]


def test_texts_longer_than_the_model_takes_are_scored_in_windows(
    model: Any, theirs: Any, tokenizer: Any
) -> None:
    texts = [TEXT * count for count in (6, 1, 3)]
    found = model.loglikelihood_rolling([Instance((text,)) for text in texts])
    for text, log_prob in zip(texts, found, strict=True):
        ids = tokenizer.encode(text)
        pairs = harness_stub.rolling_windows(ids, tokenizer.bos_token_id, MAX_LENGTH, 1)
        windows = [harness_stub.disjoint_window(pair) for pair in pairs]
        assert sum(len(predicted) for _, predicted in windows) == len(ids)
        expected = math.fsum(_expected(theirs, *window)[0] for window in windows)
        assert log_prob == pytest.approx(expected, abs=1e-3)


def test_generation_ends_at_stop_strings(model: Any, theirs: Any, tokenizer: Any) -> None:
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("And the king said", {"until": [","], "max_gen_toks": 12}),
        ("Blessed is the man", {"until": ["zzz"], "max_gen_toks": 12}),
        ("And the king said", {"until": ["zzz", " the"], "max_gen_toks": 12}),
        (TEXT * 4, {"until": ".", "max_gen_toks": 5}),
    ]
    found = model.generate_until([Instance(request) for request in wanted])
    for (context, options), text in zip(wanted, found, strict=True):
        count = options["max_gen_toks"]
        ids = tokenizer.encode(context)[-(MAX_LENGTH - count) :]
        with torch.no_grad():
            out = theirs.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)
        expected = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        stops = options["until"] if isinstance(options["until"], list) else [options["until"]]
        assert text == harness_stub.cut_at_stops(expected, stops, None)
    assert found[0] != found[2]


def test_a_text_in_a_chat_template_has_its_special_tokens(model: Any, tokenizer: Any) -> None:
    begin = tokenizer.decode(model.prefix_token_id)
    assert model.tok_encode(begin + "And") == tokenizer.encode("And")
    messages = [{"role": "user", "content": "Hello"}]
    with pytest.raises(InputError, match="chat template"):
        model.apply_chat_template(messages)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert model.apply_chat_template(messages) == "user: Hello\nassistant:"
    assert model.apply_chat_template(messages, add_generation_prompt=False) == "user: Hello"
    assert "/" not in model.tokenizer_name


def test_what_tasks_ask_for_is_followed_or_refused() -> None:
    config = GenerationConfig(path=Path("g.json"), values={"top_p": 0.5, "do_sample": True})
    greedy = make_sampler({"do_sample": False, "temperature": 0.0, "num_beams": 1}, config, 10)
    assert greedy.is_greedy
    drawn = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2, "until": ["."]}
    sampler = make_sampler(drawn, config, 10)
    assert (sampler.temperature, sampler.top_k, sampler.top_p) == (0.7, 50, 0.5)
    assert sampler.processors.repetition_penalty == 1.2
    with pytest.raises(InputError, match="num_beams"):
        make_sampler({"do_sample": False, "num_beams": 4}, config, 10)
    with pytest.raises(InputError, match=r"top_p: .*a number"):
        make_sampler({"do_sample": True, "top_p": "half"}, config, 10)


def test_mistakes_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harness_stub.install(monkeypatch)
    make = importlib.import_module("executor.harness.model").ZigzagLM
    for options, said in (
        ({"cpu_memory": "8"}, "8GiB"),
        ({"max_length": 1000}, "2 to 512"),
        ({"batches": 3}, "--batches"),
        ({"requantize": True}, "--requantize"),
        ({"policy": tmp_path / "none.json"}, "none.json"),
    ):
        with pytest.raises(InputError, match=said):
            make(MODEL, **options)
    del sys.modules["executor.harness.model"]


def test_tasks_that_cannot_be_had_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    harness_stub.install(monkeypatch)
    tasks = importlib.import_module("executor.harness.tasks")
    manager = tasks.ToldTasks()
    (tmp_path / "task.yaml").touch()
    tasks.check_tasks(["known", str(tmp_path / "task.yaml")], manager)
    with pytest.raises(InputError, match="got unknown; allowed: a task"):
        tasks.check_tasks(["known", "unknown"], manager)
    with pytest.raises(InputError, match="ConnectionError: cannot reach the documents of known"):
        manager.load(["known"])
    del sys.modules["executor.harness.tasks"]


@pytest.mark.parametrize(
    ("flags", "has_packages", "said"),
    [
        ((), False, r"lm_eval.*not installed.*pip install"),
        (("--limit", "-3"), True, "above 0"),
        (("--gen-kwargs", "greedy"), True, "temperature=0.5"),
    ],
)
def test_the_command_refuses_before_any_work(
    flags: tuple[str, ...], has_packages: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = object() if has_packages else None
    monkeypatch.setattr("executor.lm_eval.find_spec", lambda name: found)
    with pytest.raises(InputError, match=said):
        main(["--model", str(MODEL), "--tasks", "none", *flags])
