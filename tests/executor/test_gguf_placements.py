"""Models in GGUF against transformers, in every encoding and in mixtures, over placements."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from costmodel.gguf.model import GgufModel
from costmodel.model.loading import load_model_spec
from costmodel.model.tensor_layout import plain_or_packed
from executor.checkpoint.gguf_checkpoint import GgufCheckpoint
from executor.checkpoint.row_reader import RowRange, fill_tensor
from executor.checkpoint.tensor_rows import TensorRows
from executor.model.logits_processors import History, Steps
from executor.model.sampling import no_history
from profiles.encodings import BLOCK_ENCODINGS
from profiles.errors import InputError
from tests.covering import at_most
from tests.executor.gguf_files import gguf_bytes
from tests.executor.model_cases import draw_prompts, greedy
from tests.executor.tiny_gguf import load_theirs, write_tiny_gguf
from tests.executor.tiny_machines import (
    ON_GPU,
    Case,
    ExpectedCase,
    change_policy,
    draw_policy,
    make_hardware,
    make_policy,
    on_cuda,
)

LENGTHS, GEN_LEN = (9, 5, 7), 4
MACHINES = {has_gpu: make_hardware(gpu=has_gpu) for has_gpu in (False, True)}
NUM_POLICIES = at_most(3, 8)


def _mixed(name: str) -> str:
    """As in files that people have: several encodings in one layer, and plain tensors."""
    encodings = {
        "attn_q": "Q4_K",
        "attn_k": "Q5_K" if "blk.0" in name else "Q4_K",
        "attn_v": "Q6_K",
        "attn_output": "BF16",
        "ffn_gate_inp": "F32",
        "ffn_gate": "Q4_0",
        "ffn_up": "Q4_0" if "blk.0" in name else "IQ4_NL",
        "ffn_gate_exps": "MXFP4",
        "ffn_up_exps": "MXFP4" if "blk.0" in name else "Q3_K",
        "ffn_down_exps": "Q6_K",
        "ffn_down": "Q8_0",
        "token_embd": "Q2_K",
        "output": "Q6_K",
    }
    return encodings[name.split(".")[-2]]


CASES: dict[str, tuple[str, Callable[[str], str]]] = {
    **{
        name: ("llama", lambda tensor, encoding=name: encoding)  # type: ignore[misc]
        for name in BLOCK_ENCODINGS
    },
    "mixed": ("llama", _mixed),
    "experts": ("qwen3moe", _mixed),
    "encoded routers": ("qwen3moe", lambda tensor: "Q8_0"),
}


def test_a_value_that_float16_cannot_hold_is_told_with_its_tensor(tmp_path: Path) -> None:
    tensors = {f"w{number}": ("F32", (2, 8)) for number in range(2)}
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([], tensors))
    entry = GgufModel.open(path).tensors["w1"]
    data = bytearray(path.read_bytes())
    data[entry.offset_bytes :] = struct.pack("<16f", *range(15), 1e6)
    path.write_bytes(data)
    layout = plain_or_packed("w", (2, 8), load_model_spec("opt-125m"), 16, 64)
    rows = [RowRange(reader=TensorRows(entry), first_row=0, num_rows=2)]
    out = torch.empty(32, dtype=torch.uint8)
    with pytest.raises(InputError) as caught:
        fill_tensor(layout, rows, 0, out, torch.float16)
    assert str(caught.value).startswith(
        "tensor w1 of model.gguf: got a value that float16 cannot hold"
    )


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_equal_those_of_unpacked_weights(tmp_path: Path, name: str) -> None:
    arch, encoding_of = CASES[name]
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, arch, encoding_of)
    theirs = load_theirs(path)
    prompts = draw_prompts(LENGTHS)
    (tmp_path / "offload").mkdir()
    case = ExpectedCase(
        source=GgufCheckpoint.open(path, "float32"),
        prompts=prompts,
        folder=tmp_path / "offload",
        tokens=[greedy(theirs, prompt, GEN_LEN) for prompt in prompts],
    )
    rng = random.Random(name)
    for number in range(NUM_POLICIES):
        has_gpu = number % 2 == 1
        policy = draw_policy(case.policy(), rng, gpu=has_gpu)
        seen = Logits()
        assert case.generate(policy, MACHINES[has_gpu], sampler=seen) == case.tokens, policy
        for index, prompt in enumerate(prompts):
            with torch.no_grad():
                made = theirs(torch.tensor([prompt + case.tokens[index]])).logits[0]
            expected = made[len(prompt) - 1 : -1]
            bound = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(seen.of(index), expected, rtol=1e-4, atol=bound)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_placements_agree(tmp_path: Path, name: str) -> None:
    """Kernels differ between devices, so CUDA is compared with itself, all on the GPU."""
    arch, encoding_of = CASES[name]
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, arch, encoding_of)
    (tmp_path / "offload").mkdir()
    source, folder = GgufCheckpoint.open(path, "float32"), tmp_path / "offload"
    case = Case(source=source, prompts=draw_prompts(LENGTHS), folder=folder)
    base = make_policy(source.spec, prompt_len=max(LENGTHS), gen_len=GEN_LEN)
    hardware, rng = on_cuda(MACHINES[True]), random.Random(name)
    everything = change_policy(base, weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
    expected = case.generate(everything, hardware)
    for _ in range(2):
        policy = draw_policy(base, rng, gpu=True)
        assert case.generate(policy, hardware) == expected, policy


class Logits:
    """Chooses the likeliest tokens, and keeps what they are chosen from."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Return one token for each sequence."""
        assert isinstance(step, int)
        for index, row in zip(list(sequence_ids), logits, strict=True):
            self._kept[int(index), int(step)] = row.clone().cpu()
        return logits.argmax(-1)

    def of(self, index: int) -> torch.Tensor:
        """Return the logits of a prompt, [steps, vocabulary]."""
        return torch.stack([self._kept[index, step] for step in range(GEN_LEN)])
