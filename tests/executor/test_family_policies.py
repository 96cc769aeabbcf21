"""Every family under random policies: plain against transformers, compressed against its loss."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from costmodel.families import family_names
from costmodel.plan.policy import Policy
from tests.covering import at_most
from tests.executor.model_cases import make_case
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.test_families import CASES
from tests.executor.tiny_machines import (
    ON_GPU,
    ExpectedCase,
    change_policy,
    draw_policy,
    make_hardware,
    on_cuda,
)

# Some prompts are longer than the windows, the original context and the chunks of the cases.
LENGTHS = (23, 2, 9, 1)
GEN_LEN = 4
# Seeds of the weights. With 3, noise of one in a million changes the tokens of this model's
# compressed run.
SEEDS = {"gpt_neo": 4}
# Policies of a family, and of a case that differs from its family in some keys.
NUM_POLICIES = {True: at_most(3, 8), False: at_most(1, 2)}
MACHINES = {False: make_hardware(), True: make_hardware(gpu=True)}
COMPRESSIONS = (
    Compression(weight_bits=4, group_size=32),
    Compression(cache_bits=4, group_size=32),
    Compression(sparsity=0.4),
    Compression(cache_bits=4, group_size=32, sparsity=0.4),
)
# One case of each kind of attention; other families have one compression each.
ATTENTION_KINDS = (
    "llama",
    "falcon",
    "glm",
    "mistral-window",
    "gemma2",
    "cohere2",
    "phi3-long",
    "bloom",
    "gpt_oss",
    "llama4_text",
    "deepseek_v3",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model is slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ExpectedCase]:
    """Make each model once, with transformers' tokens for each prompt by itself."""
    made: dict[str, ExpectedCase] = {}

    def make(name: str) -> ExpectedCase:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name], _ = make_case(
                folder, LENGTHS, GEN_LEN, seed=SEEDS.get(name, 3), **CASES[name]
            )
        return made[name]

    return make


def draw_policies(
    case: ExpectedCase, name: str, count: int, *, first: int = 0
) -> Iterator[tuple[Policy, bool]]:
    """Draw policies, those with odd numbers for a machine with a GPU."""
    rng = random.Random(name)
    for number in range(first, first + count):
        has_gpu = number % 2 == 1
        yield draw_policy(case.policy(), rng, gpu=has_gpu), has_gpu


@pytest.mark.parametrize("name", CASES)
def test_random_policies(cases: Callable[[str], ExpectedCase], name: str) -> None:
    case = cases(name)
    count, first = NUM_POLICIES[name in family_names()], list(CASES).index(name) % 2
    for policy, has_gpu in draw_policies(case, name, count, first=first):
        assert case.generate(policy, MACHINES[has_gpu]) == case.tokens, policy


@pytest.mark.parametrize("name", sorted({*family_names(), *ATTENTION_KINDS}))
def test_compressed_policies(cases: Callable[[str], ExpectedCase], name: str) -> None:
    case = cases(name)
    prompts = list(map(list, case.prompts))
    number = list(CASES).index(name) % len(COMPRESSIONS)
    losses = COMPRESSIONS if name in ATTENTION_KINDS else COMPRESSIONS[number : number + 1]
    policies = draw_policies(case, f"{name} compressed", len(losses))
    for (policy, has_gpu), lost in zip(policies, losses, strict=True):
        expected = ReferenceModel(case.source, compression=lost).generate(prompts, GEN_LEN)
        policy = replace(
            policy,
            weight_bits=lost.weight_bits or policy.weight_bits,
            cache_bits=lost.cache_bits or policy.cache_bits,
            group_size=lost.group_size,
            attention_sparsity=lost.sparsity,
        )
        assert case.generate(policy, MACHINES[has_gpu]) == expected, policy


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTENTION_KINDS)
def test_cuda_placements_agree(cases: Callable[[str], ExpectedCase], name: str) -> None:
    """Kernels differ between devices, so CUDA is compared with itself, all on the GPU: windows,
    soft caps, sinks, ALiBi, chunks and latent rows."""
    case, hardware = cases(name), on_cuda(MACHINES[True])
    everything = change_policy(case.policy(), weights=ON_GPU, cache=ON_GPU, activations=ON_GPU)
    expected = case.generate(everything, hardware)
    rng = random.Random(name)
    for _ in range(3):
        policy = draw_policy(case.policy(), rng, gpu=True)
        assert case.generate(policy, hardware) == expected, policy
