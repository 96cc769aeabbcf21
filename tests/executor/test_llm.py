"""``LLM`` beside the command, in notebooks and threads, after interrupts, and with bad input."""

from __future__ import annotations

import asyncio
import io
import json
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

import executor
from costmodel.plan.policy import Policy
from executor import LLM, RequestOutput, SamplingParams, generate
from executor.checkpoint.folder import Checkpoint
from executor.engine.channels import Engine
from executor.stores.weights import WeightStore
from profiles.errors import InfeasibleError, InputError, RunError
from profiles.memory_limits import held_memory
from profiles.units import MIB
from tests.covering import at_most
from tests.executor.tiny_machines import (
    ON_DISK,
    change_policy,
    draw_policy,
    make_hardware,
    make_policy,
)
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

GEN_LEN = 5
# A tokenizer whose words are its ids: w7 is token 7.
TEXTS = ["w5 w9 w170 w3", "w12", "w88 w1 w2 w3 w4 w5 w6 w7", "w33 w34", "w9 w8 w7"]
IDS = [[int(word[1:]) for word in text.split()] for text in TEXTS]
TEMPLATE = "{% for m in messages %}w1 {{ m.content }} {% endfor %}w2"
NUM_POLICIES = at_most(5, 10)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, a chat template and a token that ends texts."""
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama", num_layers=3)
    vocabulary = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(40)]}))
    return folder


def policy_for(model: Path, **changes: Any) -> Policy:
    """A policy for all prompts in blocks of four; all is in CPU memory but for ``changes``."""
    spec = Checkpoint.open(model).spec
    base = make_policy(spec, prompt_len=max(map(len, IDS)), gen_len=GEN_LEN)
    return change_policy(base, hardware=make_hardware(), **changes)


def open_llm(model: Path, folder: Path, **changes: Any) -> LLM:
    return LLM(model, policy=policy_for(model, **changes), offload_dir=folder)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def parts(outputs: list[RequestOutput]) -> list[tuple[list[int], str, str]]:
    found = [output.outputs[0] for output in outputs]
    return [(output.token_ids, output.text, output.finish_reason) for output in found]


def run_command(model: Path, folder: Path, *flags: object) -> list[tuple[list[int], str, str]]:
    """Return tokens, text and end of each prompt, as the command writes them."""
    prompts, output = folder / "prompts.jsonl", folder / "outputs.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    paths = {"model": model, "prompts": prompts, "output": output, "offload-dir": folder}
    generate.main([*(f"--{name}={path}" for name, path in paths.items()), *map(str, flags)])
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    return [(line["output_ids"], line["text"], line["finish_reason"]) for line in lines]


def test_tokens_are_those_of_the_command(model: Path, tmp_path: Path) -> None:
    """For policies with everything everywhere, greedy and drawn, to the end and beyond it."""
    rng, ends = random.Random(0), set()
    for number in range(NUM_POLICIES):
        gpu = number % 2 == 1
        policy = draw_policy(policy_for(model), rng, gpu=gpu)
        path = tmp_path / "policy.json"
        replace(policy, hardware=make_hardware(gpu=gpu)).save(path)
        settings: dict[str, Any] = {"temperature": 1.5, "top_k": 40, "seed": number}
        params = SamplingParams(**settings if number % 3 else {}, ignore_eos=number % 4 == 3)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in params.choices.items()]
        flags += [f"--seed={params.seed}", *["--ignore-eos"] * params.ignore_eos]
        expected = run_command(model, tmp_path, f"--policy={path}", *flags)
        with LLM(model, policy=path, offload_dir=tmp_path) as llm:
            outputs = llm.generate(TEXTS, params)
        assert parts(outputs) == expected, policy
        assert [output.index for output in outputs] == list(range(len(TEXTS)))
        ends |= {reason for _, _, reason in expected}
    assert ends == {"stop", "length"}


def test_searches_as_the_command_does(model: Path, tmp_path: Path) -> None:
    flags = ("--hardware=cpu-2core", f"--gen-len={GEN_LEN}", "--weight-bits=4", "--cpu-memory=1GiB")
    expected = run_command(model, tmp_path, *flags)
    llm = LLM(
        model, hardware="cpu-2core", weight_bits=4, cpu_memory="1GiB", offload_dir=str(tmp_path)
    )
    assert parts(llm.generate(TEXTS, SamplingParams(max_tokens=GEN_LEN))) == expected
    assert llm.report is not None and llm.report.policy.weight_bits == 4
    assert llm.report.policy.workload.num_prompts == len(TEXTS)
    assert "throughput" in str(llm.report)


def check_candidates(found: list[Any], logits: torch.Tensor, ids: list[int], num_top: int) -> None:
    """Compare with the logits [tokens, vocabulary] that predict ``ids``."""
    expected = logits.log_softmax(-1)
    assert len(found) == len(ids)
    for candidates, row, token in zip(found, expected, ids, strict=True):
        best = row.topk(num_top).indices.tolist()
        assert list(candidates) == [token, *(i for i in best if i != token)]
        for i, candidate in candidates.items():
            assert candidate.logprob == pytest.approx(float(row[i]), abs=1e-4)
            rank = 1 + int((row > row[i]).sum())
            assert candidate.rank == (rank if rank <= max(1, num_top) else None)
            assert candidate.decoded_token == f"w{i}"


def test_log_probabilities_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    """Of the model itself, whatever changes the logits before a token is drawn."""
    reference = AutoModelForCausalLM.from_pretrained(model)
    rng = random.Random(1)
    asked = [(3, 2), (0, None), (None, 0), (None, None)]
    for number, (logprobs, prompt_logprobs) in enumerate(asked):
        policy = draw_policy(policy_for(model), rng, gpu=number % 2 == 1)
        policy = replace(policy, hardware=make_hardware(gpu=number % 2 == 1))
        llm = LLM(model, policy=policy, offload_dir=tmp_path)
        params = SamplingParams(
            logprobs=logprobs, prompt_logprobs=prompt_logprobs, temperature=2.0, ignore_eos=True
        )
        for output, prompt in zip(llm.generate(IDS, params), IDS, strict=True):
            (found,) = output.outputs
            with torch.inference_mode():
                logits = reference(torch.tensor([prompt + found.token_ids])).logits[0]
            assert (found.logprobs is None) == (logprobs is None)
            if found.logprobs is not None and logprobs is not None:
                known = logits[len(prompt) - 1 : -1]
                check_candidates(found.logprobs, known, found.token_ids, logprobs)
            assert (output.prompt_logprobs is None) == (prompt_logprobs is None)
            if output.prompt_logprobs is not None and prompt_logprobs is not None:
                first, *others = output.prompt_logprobs
                assert first is None
                check_candidates(others, logits[: len(prompt) - 1], prompt[1:], prompt_logprobs)


def test_prompts_of_every_form(model: Path, tmp_path: Path) -> None:
    llm = open_llm(model, tmp_path)
    expected = parts(llm.generate(TEXTS))
    assert parts(llm.generate(IDS)) == expected
    mixed: list[Any] = [{"prompt": TEXTS[0]}, {"prompt_token_ids": IDS[1]}, TEXTS[2], tuple(IDS[3])]
    outputs = llm.generate(mixed)
    assert parts(outputs) == expected[:4]
    assert [output.prompt for output in outputs] == [TEXTS[0], None, TEXTS[2], None]
    assert [output.prompt_token_ids for output in outputs] == IDS[:4]
    for one in (TEXTS[1], IDS[1], {"prompt": TEXTS[1]}):
        assert parts(llm.generate(one)) == expected[1:2]
    assert llm.generate([]) == []


def test_fewer_tokens_than_the_policy_are_the_first_ones(model: Path, tmp_path: Path) -> None:
    llm = open_llm(model, tmp_path, weights=ON_DISK)
    expected = tokens(llm.generate(IDS, SamplingParams(ignore_eos=True)))
    assert {len(ids) for ids in expected} == {GEN_LEN}
    few = llm.generate(IDS, SamplingParams(max_tokens=2, ignore_eos=True))
    assert tokens(few) == [ids[:2] for ids in expected]


def test_no_tokenizer_is_needed_for_ids(model: Path, tmp_path: Path) -> None:
    expected = tokens(open_llm(model, tmp_path).generate(IDS))
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model.iterdir():
        if path.name != "tokenizer.json":
            (folder / path.name).symlink_to(path)
    llm = open_llm(folder, tmp_path)
    outputs = llm.generate(IDS)
    assert tokens(outputs) == expected
    assert {output.outputs[0].text for output in outputs} == {""}
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        llm.generate("w1")


def test_chat_continues_what_the_template_makes(model: Path, tmp_path: Path) -> None:
    llm = open_llm(model, tmp_path)
    user = {"role": "user", "content": "w5 w9"}
    other = [user, {"role": "assistant", "content": "w7"}, user]
    (output,) = llm.chat([user])
    assert output.prompt == "w1 w5 w9 w2" and output.prompt_token_ids == [1, 5, 9, 2]
    assert parts([output]) == parts(llm.generate([[1, 5, 9, 2]]))
    ids = [output.prompt_token_ids for output in llm.chat([[user], other[1:]])]
    assert ids == [[1, 5, 9, 2], [1, 7, 1, 5, 9, 2]]
    blocks = llm.iter_blocks(llm.chat_prompts([[user]] * 5))
    assert [len(block) for block in blocks] == [4, 1]
    with pytest.raises(InputError, match="conversations: got 'w5'; allowed: a list of messages"):
        llm.chat("w5")  # type: ignore[arg-type]


def test_blocks_come_as_they_end(model: Path, tmp_path: Path) -> None:
    llm = open_llm(model, tmp_path)
    expected = llm.generate(TEXTS)
    blocks = list(llm.iter_blocks(TEXTS))
    assert [[output.index for output in block] for block in blocks] == [[0, 2, 3, 4], [1]]
    found = sorted((output for block in blocks for output in block), key=lambda o: o.index)
    assert found == expected


def test_another_run_ends_an_unfinished_one_and_says_so(model: Path, tmp_path: Path) -> None:
    first, second = open_llm(model, tmp_path), open_llm(model, tmp_path)
    expected = first.generate(TEXTS)
    blocks = first.iter_blocks(TEXTS)
    assert next(blocks) == [expected[i] for i in (0, 2, 3, 4)]
    report = first.report
    assert second.generate(TEXTS) == expected
    for _ in range(2):
        with pytest.raises(RunError, match="ended by another one"):
            next(blocks)
    assert first.report is report
    blocks = first.iter_blocks(TEXTS)
    next(blocks)
    first.close()
    assert list(blocks) == []
    assert first.generate(TEXTS) == expected


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 26 MiB."""
    folder = tmp_path_factory.mktemp("large")
    save_tiny_model(folder, "llama", num_layers=8, hidden_size=256, intermediate_size=1024)
    assert (folder / "model.safetensors").stat().st_size > 25 * MIB
    return folder


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_runs_and_interrupts_give_their_memory_back(large: Path, tmp_path: Path) -> None:
    """In a process of its own: arrays would fill gaps that other tests left in the heap, and the
    system gets pages in gaps back only when somebody asks for it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(interrupt_runs, large, tmp_path).result()


def interrupt_runs(large: Path, folder: Path) -> None:
    """Also where somebody keeps the error, with the frames that it went through."""
    expected = open_llm(large, folder).generate(IDS)
    held = held_memory().resident
    errors: list[BaseException] = []
    for owner, name in ((WeightStore, "load"), (Engine, "wait"), (Engine, "drain")):
        llm = open_llm(large, folder)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
            original = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, do=original, **k: interrupt(do(*a, **k)))
            llm.generate(IDS)
        errors.append(caught.value)
        assert llm.generate(IDS) == expected
    blocks = llm.iter_blocks(IDS)
    next(blocks)
    assert held_memory().resident > held + 20 * MIB
    del blocks
    assert open_llm(large, folder).generate(IDS) == expected
    # What the program itself allocates goes back as before, too.
    arrays = [torch.ones(8 * MIB) for _ in range(2)]
    assert held_memory().resident > held + 60 * MIB
    del arrays
    assert held_memory().resident < held + 10 * MIB
    assert len(errors) == 3


def test_an_interrupt_loses_only_its_block(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = open_llm(model, tmp_path)
    expected = llm.generate(TEXTS)
    outputs: list[RequestOutput] = []
    with suppress(KeyboardInterrupt):
        for block in llm.iter_blocks(TEXTS):
            outputs += block
            monkeypatch.setattr(Engine, "wait", interrupt)
    monkeypatch.undo()
    assert outputs == [expected[i] for i in (0, 2, 3, 4)]
    assert llm.generate(TEXTS) == expected


def test_runs_anywhere_and_leaves_signals_alone(model: Path, tmp_path: Path) -> None:
    """In a loop as a notebook has one, in threads, and in several threads at once."""
    llm = open_llm(model, tmp_path)
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    expected = llm.generate(TEXTS)

    async def both() -> list[list[RequestOutput]]:
        here = llm.generate(TEXTS)
        threads = [asyncio.to_thread(llm.generate, TEXTS) for _ in range(2)]
        return [here, *await asyncio.gather(*threads)]

    assert asyncio.run(both()) == [expected] * 3
    with ThreadPoolExecutor(3) as pool:
        others = [open_llm(model, tmp_path, weights=ON_DISK) for _ in range(3)]
        found = list(pool.map(lambda other: tokens(other.generate(TEXTS)), others))
    assert found == [tokens(expected)] * 3
    assert {number: signal.getsignal(number) for number in before} == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_can_be_turned_off(
    progress: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    LLM(model, policy=policy_for(model), offload_dir=tmp_path, progress=progress).generate(TEXTS)
    assert ("loading weights" in terminal.getvalue()) == progress
    assert ("block 2/2" in terminal.getvalue()) == progress


def test_the_package_is_cheap_to_import() -> None:
    code = "import sys, executor; assert not {'torch', 'scipy', 'tokenizers'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = executor.LLMs


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"cpu_memory": "8"}, "cpu_memory: got '8' without a unit"),
    ({"cpu_memory": -1}, "cpu_memory: got -1"),
    ({"disk": 1.5}, "disk: got 1.5"),
    ({"weight_bits": 3}, "weight_bits: got 3; allowed: 16, 8, 4"),
    ({"cache_bits": "4"}, "cache_bits: got '4'"),
    ({"requantize": True}, "requantize: got weights in 16 bits"),
    ({"group_size": 64}, "group_size: got 16 bits everywhere"),
    ({"sparsity": "half"}, "sparsity: got 'half'"),
    ({"sparsity": 2}, "sparsity: got 2"),
    ({"dtype": "int3"}, "dtype: got 'int3'"),
    ({"policy": "nowhere.json"}, "policy nowhere.json: got no such file"),
    ({"policy": "nowhere.json", "disk": 0}, "disk: got disk together with policy"),
    ({"policy": 5}, "policy: got 5; allowed: a Policy, or its file"),
    ({"hardware": 5}, "hardware: got 5"),
    ({"hardware": "abacus"}, "profile abacus: got no such file"),
    ({"offload_dir": "/dev/null"}, "offload_dir /dev/null: got Not a directory"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_one_line(
    arguments: dict[str, Any], said: str, model: Path
) -> None:
    with pytest.raises(InputError) as caught:
        LLM(model, **arguments).generate(IDS)
    assert said in str(caught.value) and "\n" not in str(caught.value)


BAD_PROMPTS: list[tuple[Any, str]] = [
    (3, "prompts: got 3; allowed: one or a list of: text"),
    (["w1", ""], "prompt 2: got an empty prompt"),
    (["w1", 2.5], "prompt 2: got 2.5"),
    ([[1, VOCAB_SIZE]], f"prompt 1: got token id {VOCAB_SIZE}"),
    ([[1], []], "prompt 2: got an empty prompt"),
    ([[1], [True]], "prompt 2: got token ids of another kind"),
    ({"text": "w1"}, "prompt 1: got {'text': 'w1'}"),
    ({"prompt_token_ids": "w1"}, "prompt 1: got token ids of another kind"),
    ({"prompt": 5}, "prompt 1: got a prompt that is not text"),
    ([[1] * 9], "prompt 1: got 9 tokens; allowed: 8, for which the policy was made"),
    ([[1] * 95], "prompt 1: got 95 tokens + 5 generated; allowed: 96 positions"),
]


@pytest.mark.parametrize(("prompts", "said"), BAD_PROMPTS)
def test_bad_prompts_are_refused_in_one_line(
    prompts: Any, said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        open_llm(model, tmp_path).generate(prompts)
    assert said in str(caught.value) and "\n" not in str(caught.value)


BAD_PARAMS: list[tuple[Callable[[], Any], str]] = [
    (lambda: SamplingParams(temperature="warm"), "temperature: got 'warm'"),  # type: ignore[arg-type]
    (lambda: SamplingParams(top_k=1.5), "top_k: got 1.5"),  # type: ignore[arg-type]
    (lambda: SamplingParams(seed=None), "seed: got None"),  # type: ignore[arg-type]
    (lambda: SamplingParams(ignore_eos=1), "ignore_eos: got 1"),  # type: ignore[arg-type]
    (lambda: SamplingParams(max_tokens=True), "max_tokens: got True"),
    (lambda: SamplingParams(max_tokens=0), "max_tokens: got 0"),
    (lambda: SamplingParams(logprobs=-1), "logprobs: got -1; allowed: 0 or more"),
    (lambda: SamplingParams(temperature=-1), "temperature: got -1"),
    (lambda: SamplingParams(top_p=0.5, temperature=0), "temperature 0"),
    (lambda: SamplingParams(max_tokens=6), "max_tokens: got 6; allowed: at most 5"),
    (lambda: 0, "params: got 0; allowed: SamplingParams"),
]


@pytest.mark.parametrize(("make", "said"), BAD_PARAMS)
def test_bad_params_are_refused_in_one_line(
    make: Callable[[], Any], said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        open_llm(model, tmp_path).generate(IDS, make())
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_too_little_memory_names_the_argument(model: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"cpu is short by .* try: cpu_memory \d+MiB"):
        LLM(model, hardware="cpu-2core", cpu_memory="10MiB").generate(IDS)


@pytest.fixture(autouse=True)
def leaves_nothing_behind(tmp_path: Path) -> Iterator[None]:
    """No scratch file of any run stays."""
    yield
    assert list(tmp_path.glob(".zigzag*")) == []
