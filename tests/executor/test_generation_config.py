"""A checkpoint's generation_config.json, held against what transformers makes of the same file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers import GenerationConfig as TheirConfig

from executor import generate
from executor.checkpoint.folder import Checkpoint
from executor.cli.sampling_flags import (
    Sampling,
    add_sampling_flags,
    choose_sampling,
    read_sampling_params,
)
from executor.model.generation_config import (
    FOLLOWED,
    HARMLESS,
    LENGTHS,
    NOT_FOLLOWED,
    GenerationConfig,
)
from executor.model.logits_processors import LogitsProcessors
from executor.model.sampling import Sampler
from executor.run.batch import Batch
from profiles.command import Parser
from profiles.errors import InputError, RunError
from tests.executor.commands import Ended, end_command
from tests.executor.reference import ReferenceModel
from tests.executor.tiny_machines import make_hardware, make_policy
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

GEN_LEN = 8
PROMPTS = [[5, 9, 170, 3, 9, 170], [12], [88, 1, 2, 3, 4, 5, 1, 2], [9, 8, 7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama")
    return folder, AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def run(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Write a generation config into the model's folder and run the command on PROMPTS."""
    policy = tmp_path / "policy.json"
    spec = Checkpoint.open(model[0]).spec
    base = make_policy(spec, prompt_len=max(map(len, PROMPTS)), gen_len=GEN_LEN)
    replace(base, hardware=make_hardware()).save(policy)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": ids}) + "\n" for ids in PROMPTS))

    def run_command(values: dict[str, Any] | None, *more: str) -> Ended:
        path = model[0] / "generation_config.json"
        path.unlink(missing_ok=True)
        if values is not None:
            path.write_text(json.dumps(values))
        flags = ["--model", model[0], "--prompts", prompts, "--output", tmp_path / "out.jsonl"]
        flags += ["--policy", policy, "--offload-dir", tmp_path]
        return end_command(generate.main, [*flags, *more], monkeypatch, capfd)

    return run_command


def outputs(tmp_path: Path) -> list[list[int]]:
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    return [json.loads(line)["output_ids"] for line in lines]


def theirs(folder: Path, *, until_end: bool = True) -> list[list[int]]:
    """Generate with transformers from the same folder, cut at the end token as ours is."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generation_config.eos_token_id if until_end else None
    ends = ids if isinstance(ids, list) else [ids]
    rows = []
    for prompt in PROMPTS:
        found = model.generate(torch.tensor([prompt]), max_new_tokens=GEN_LEN)[0].tolist()
        ids = found[len(prompt) :]
        rows.append(ids[: next((i for i, token in enumerate(ids) if token in ends), None)])
    return rows


def choose(values: dict[str, Any], *flags: str, name: str = "generation_config.json") -> Sampling:
    parser = Parser(prog="x", description="x", example="x")
    add_sampling_flags(parser)
    parser.add_argument("--ignore-eos", action="store_true")
    config = GenerationConfig(path=Path("m") / name, values=values)
    params = read_sampling_params(parser.parse_args(list(flags)))
    return choose_sampling(params, config, vocab_size=VOCAB_SIZE, has_length=True)


def test_every_key_of_transformers_has_its_place() -> None:
    groups = [set(FOLLOWED), set(NOT_FOLLOWED), set(LENGTHS), set(HARMLESS)]
    known = {key for key in TheirConfig().to_dict() if not key.startswith("_")}
    assert known - set().union(*groups) == set()
    assert sum(map(len, groups)) == len(set().union(*groups))
    # What we call its default is transformers' own.
    defaults = TheirConfig._get_default_generation_params()
    assert choose({}, "--temperature=1").sampler.top_k == defaults["top_k"]
    for key, neutral in NOT_FOLLOWED.items():
        assert defaults.get(key) in (None, *neutral), key


GREEDY: dict[str, dict[str, Any]] = {
    "penalty": {"repetition_penalty": 1.3, "do_sample": False, "temperature": 0.3, "top_p": 0.5},
    "runs": {
        "repetition_penalty": 0.7,
        "no_repeat_ngram_size": 2,
        "begin_suppress_tokens": [160, 161],
        "sequence_bias": [[[7], 2.5], [[7, 9], 4.0], [[170, 8], 9.0], [[9, 170, 4], -3.0]],
        "bad_words_ids": [[i] for i in range(60)] + [[i, i + 1] for i in range(60, 170)],
    },
    "several ends": {"eos_token_id": [*range(120)], "min_new_tokens": 3, "suppress_tokens": [130]},
    "least length": {"eos_token_id": [*range(172)], "min_length": 9},
}


@pytest.mark.parametrize("case", GREEDY)
def test_greedy_tokens_equal_transformers(
    case: str, model: Any, run: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = run(GREEDY[case])
    assert (ended.status, ended.err) == (0, "")
    assert outputs(tmp_path) == theirs(model[0])
    # Each key that counts is told, with the file.
    line = next(line for line in ended.out.splitlines() if line.startswith("tokens: "))
    assert str(model[0] / "generation_config.json") in line
    assert all(key in line for key in GREEDY[case] if key != "do_sample")


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "min_p": 0.1, "temperature": 2.0},
        {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[5], [3, 9]], "suppress_tokens": [7]},
        {
            "top_k": 0,
            "eos_token_id": 4,
            "sequence_bias": [[[5], 3.0], [[2, 6], 9.0], [[2, 6], -2.0], [[5], 1.0]],
            "min_length": 9,
            "begin_suppress_tokens": [8],
        },
        {"eos_token_id": [4, 6], "min_new_tokens": 3, "top_k": 40},
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_probabilities_equal_transformers(values: dict[str, Any], ties: bool, model: Any) -> None:
    """At steps 0 and 3, with random tokens so far, one sequence at a time."""
    values = {"do_sample": True, **values}
    sampler = choose(values).sampler
    generator = torch.Generator().manual_seed(3)
    for length, step in ((2, 0), (9, 3), (40, 3), (3, 3)):
        ids = torch.randint(0, 12, (1, length + step), generator=generator)
        logits = torch.randn(1, VOCAB_SIZE, generator=generator) * 3
        if ties and sampler.top_p == 1:
            # Whichever of equal tokens top-p keeps is left open.
            logits = logits.bfloat16().float().round()
        config, _ = model[1]._prepare_generation_config(None, **values)
        model[1]._prepare_special_tokens(config, device="cpu")
        if "min_new_tokens" in values:
            config.min_length = 0
        processors = model[1]._get_logits_processor(config, input_ids_seq_length=length)
        expected = processors(ids, logits.clone()).softmax(-1).double()

        sampler.processors.apply(logits, step, partial(torch.clone, ids))
        weights, kept = sampler.weights(logits)
        if kept is not None:
            weights = torch.zeros(1, VOCAB_SIZE, dtype=weights.dtype).scatter(1, kept, weights)
        found = (weights / weights.sum()).double()
        assert torch.equal(found > 1e-9, expected > 1e-9)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


def test_tokens_so_far_end_together_whatever_the_prompts_length() -> None:
    batch = Batch([[4, 5], [6, 7, 8]], [0, 1], prompt_len=3, gen_len=2)
    batch.generated[:] = torch.tensor([[1, 2], [3, 4]])
    assert batch.history(0).tolist() == [[-1, 4, 5], [6, 7, 8]]
    assert batch.history(1).tolist() == [[-1, 4, 5, 1], [6, 7, 8, 3]]


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 4},
        {"bad_words_ids": [[2, 3, 9], [5]]},
        {"eos_token_id": 3, "min_length": 6},
    ],
)
def test_processors_do_not_depend_on_the_batch(values: dict[str, Any]) -> None:
    processors = choose(values).sampler.processors
    prompts = [[2, 3], [1, 2, 3, 4, 1, 2, 3], [5, 5, 5, 5]]
    logits = torch.randn(3, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    together = Batch(prompts, range(3), prompt_len=9, gen_len=1)
    changed = logits.clone()
    processors.apply(changed, 0, partial(together.history, 0))
    assert not torch.equal(changed, logits)
    for row, prompt in enumerate(prompts):
        alone = Batch([prompt], [0], prompt_len=len(prompt), gen_len=1)
        expected = logits[row : row + 1].clone()
        processors.apply(expected, 0, partial(alone.history, 0))
        assert torch.equal(changed[row], expected[0])


def test_flags_override_the_file() -> None:
    values = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.1}
    file = choose(values, "--seed=3").sampler
    flags = ("--temperature=1.5", "--top-p=.9", "--repetition-penalty=1.1")
    assert choose({}, "--seed=3", *flags).sampler == file
    assert (file.temperature, file.top_k, file.top_p, file.seed) == (1.5, 50, 0.9, 3)
    assert file.processors.repetition_penalty == 1.1
    hotter = choose(values, "--seed=3", "--temperature=3")
    assert hotter.sampler == replace(file, temperature=3.0)
    assert "temperature 3.0 from the flags" in hotter.describe()
    logits = torch.randn(4, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    for sampler in (
        choose(values, "--temperature=0", "--repetition-penalty=1").sampler,
        choose(values, "--ignore-generation-config").sampler,
    ):
        assert sampler.temperature == 0 and sampler.processors.is_idle
        assert torch.equal(sampler.sample(logits.clone(), range(4), 0), logits.argmax(-1))


def test_draws_follow_the_file(model: Any, run: Callable[..., Ended], tmp_path: Path) -> None:
    values = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.1}
    ended = run(values, "--seed=3", "--json")
    assert (ended.status, ended.err) == (0, "")
    assert "do_sample true, temperature 1.5, top_p 0.9, repetition_penalty 1.1" in ended.out
    assert "top_k 50 by default" in ended.out
    told = json.loads(ended.out.splitlines()[-1])["sampling"]
    assert told | values | {"top_k": 50, "seed": 3} == told
    greedy = ReferenceModel(Checkpoint.open(model[0])).generate(PROMPTS, GEN_LEN)
    assert all(row != likeliest for row, likeliest in zip(outputs(tmp_path), greedy, strict=True))


def test_config_json_counts_only_without_a_generation_config(
    model: Any, run: Callable[..., Ended], tmp_path: Path
) -> None:
    config = json.loads((model[0] / "config.json").read_text())
    try:
        for generation, changes in (
            (None, {"repetition_penalty": 1.5, "eos_token_id": list(range(40))}),
            ({"no_repeat_ngram_size": 1}, {"repetition_penalty": 1.5, "eos_token_id": [1, 2]}),
        ):
            (model[0] / "config.json").write_text(json.dumps(config | changes))
            assert run(generation).status == 0
            assert outputs(tmp_path) == theirs(model[0])
    finally:
        (model[0] / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_beams": 4}, "num_beams 4"),
        ({"stop_strings": ["\n"], "watermarking_config": {}}, "stop_strings"),
        ({"some_new_key": 3}, "some_new_key 3"),
        ({"max_new_tokens": 5}, None),
        ({"num_beams": 1, "guidance_scale": 1.0, "typical_p": 0.2, "_private": 1}, None),
        ({"num_beams": None, "use_cache": False, "pad_token_id": 3, "length_penalty": 2}, None),
        ({"do_sample": True, "typical_p": 0.2, "eta_cutoff": 0.0}, "typical_p 0.2"),
    ],
)
def test_what_is_not_followed_is_told(values: dict[str, Any], told: str | None) -> None:
    given = {key: value for key, value in values.items() if value is not None}
    found = choose(given)
    assert bool(found.not_followed) == (told is not None)
    if told:
        assert f"{told}" in ", ".join(f"{k} {v}" for k, v in found.not_followed.items())
    assert choose(given, "--ignore-generation-config").not_followed == {}


def test_what_is_not_followed_is_one_line(
    run: Callable[..., Ended], caplog: pytest.LogCaptureFixture
) -> None:
    assert run({"num_beams": 4, "penalty_alpha": 0.6, "max_length": 99}).status == 0
    assert len(caplog.messages) == 1
    assert "not followed here: num_beams 4, penalty_alpha 0.6;" in caplog.messages[0]
    idle = run({"temperature": 0.9, "top_p": 0.6})
    assert "temperature 0.9, top_p 0.6 there would need do_sample true" in idle.out
    assert len(caplog.messages) == 1


def test_lengths_are_told_unless_the_user_says_them() -> None:
    config = GenerationConfig(path=Path("generation_config.json"), values={"max_new_tokens": 9})
    assert config.not_followed(draws=False, has_length=False) == {"max_new_tokens": 9}
    assert config.not_followed(draws=False, has_length=True) == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"do_sample": "yes"}, ("do_sample", "yes", "true or false")),
        ({"do_sample": True, "temperature": 0}, ("temperature in m/gen",)),
        ({"do_sample": True, "temperature": "hot"}, ("temperature in m/gen", "hot")),
        ({"do_sample": True, "temperature": 10**400}, ("temperature in m/gen", "finite")),
        ({"do_sample": True, "temperature": float("inf")}, ("temperature in m/gen", "finite")),
        ({"do_sample": True, "top_k": -1}, ("top_k in m/gen", "-1")),
        ({"do_sample": True, "top_k": 2.5}, ("top_k in m/gen", "2.5")),
        ({"do_sample": True, "top_p": 1.5}, ("top_p in m/gen", "1.5")),
        ({"do_sample": True, "min_p": -0.1}, ("min_p in m/gen", "-0.1")),
        ({"repetition_penalty": 0}, ("repetition_penalty in m/gen", "0.0")),
        ({"repetition_penalty": True}, ("repetition_penalty in m/gen", "true")),
        ({"no_repeat_ngram_size": -1}, ("no_repeat_ngram_size in m/gen",)),
        ({"suppress_tokens": 5}, ("suppress_tokens in m/gen",)),
        ({"bad_words_ids": [[]]}, ("bad_words_ids in m/gen",)),
        ({"bad_words_ids": [[VOCAB_SIZE]]}, ("bad_words_ids in m/gen", "vocabulary")),
        ({"sequence_bias": {"5": 1.0}}, ("sequence_bias in m/gen",)),
        ({"eos_token_id": "x"}, ("eos_token_id in m/gen",)),
        ({"eos_token_id": 2**70}, ("eos_token_id in m/gen",)),
    ],
)
def test_bad_values_are_refused_by_file_and_key(
    values: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        choose(values)
    assert all(word in str(caught.value) for word in words), caught.value
    # What a flag replaces need not be right.
    key = next(key for key in values if key != "do_sample") if len(values) > 1 else ""
    flag = {"temperature": "--temperature=1", "top_k": "--top-k=3"}.get(key)
    if flag:
        choose(values, flag)


@pytest.mark.parametrize(
    "flag", ["--min-p=2", "--repetition-penalty=0", "--repetition-penalty=nan"]
)
def test_bad_flags_are_told_as_flags(flag: str) -> None:
    with pytest.raises(InputError, match=r"^(min-p|repetition-penalty): got"):
        choose({}, "--temperature=1", flag)


def test_a_run_ends_where_every_token_is_forbidden() -> None:
    sampler = Sampler(processors=LogitsProcessors(suppress_tokens=tuple(range(5))))
    with pytest.raises(RunError, match="no token with a finite"):
        sampler.sample(torch.zeros(1, 5), [0], 0)


NUMBERS = st.one_of(
    st.integers(-2, 9), st.floats(), st.sampled_from([10**400, 2**63, 2**64, 1e39, VOCAB_SIZE])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*FOLLOWED, "do_sample", "num_beams", "x"]), JSON))
def test_any_value_is_followed_or_refused_by_name(values: dict[str, Any]) -> None:
    values = {key: value for key, value in values.items() if value is not None}
    try:
        found = choose(values)
    except InputError as error:
        assert any(f"{key} in m/generation_config.json" in str(error) for key in values)
        return
    assert "\n" not in found.describe()
    history = torch.tensor([[-1, 3, 4], [3, 4, 3]])
    with contextlib.suppress(RunError):
        found.sampler.sample(torch.randn(2, VOCAB_SIZE), [0, 1], 3, partial(torch.clone, history))


@pytest.mark.gpu
def test_a_gpu_chooses_the_same_tokens() -> None:
    values = {
        "repetition_penalty": 1.4,
        "no_repeat_ngram_size": 2,
        "suppress_tokens": [5],
        "bad_words_ids": [[7], [3, 9]],
        "sequence_bias": [[[2, 6], 4.0]],
        "eos_token_id": 4,
        "min_length": 9,
        "top_p": 0.9,
        "min_p": 0.01,
    }
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, VOCAB_SIZE, generator=generator) * 3
    history = partial(torch.clone, torch.randint(-1, 12, (64, 9), generator=generator))
    for draws in (False, True):
        sampler = choose({"do_sample": draws, **values}).sampler
        here = sampler.sample(logits.clone(), range(64), 3, history)
        there = sampler.sample(logits.cuda(), range(64), 3, history).cpu()
        assert (here == there).double().mean() > 0.95 and (draws or torch.equal(here, there))


def test_end_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    assert GenerationConfig.load(tmp_path).eos_ids == frozenset()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert GenerationConfig.load(tmp_path).eos_ids == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert GenerationConfig.load(tmp_path).eos_ids == {4, 5}
    # As transformers has it, the file replaces what config.json says even where it says nothing.
    (tmp_path / "generation_config.json").write_text("{}")
    assert GenerationConfig.load(tmp_path).eos_ids == frozenset()
    assert TheirConfig.from_pretrained(tmp_path).eos_token_id is None


def test_defaults_change_nothing() -> None:
    assert LogitsProcessors().is_idle and LogitsProcessors(eos_token_id=(3,)).is_idle
    for field in fields(LogitsProcessors):
        if field.name != "eos_token_id":
            changed = LogitsProcessors(**{field.name: 2})  # type: ignore[arg-type]
            assert not changed.is_idle
