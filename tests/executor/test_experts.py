"""Mixtures of experts against transformers' own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from costmodel.model import feed_forward_spec
from costmodel.model.feed_forward_spec import ExpertsSpec, MlpSpec, RouterSpec
from executor.model.experts import add_routed, experts_output, route
from executor.model.matrices import LayerWeights, Matrix, PackedRows
from executor.model.routing import Routing
from profiles import kernels
from profiles.errors import InputError
from profiles.packing import Packing

HIDDEN, SIZE, SHARED_SIZE, NUM_EXPERTS = 64, 24, 40, 12
MLP, SHARED = MlpSpec(size=SIZE), MlpSpec(size=SHARED_SIZE)
DEEPSEEK = {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 2, "routed_scaling_factor": 2.5}
DEEPSEEK_ROUTER = RouterSpec(
    score="sigmoid", scale=2.5, has_bias=True, in_float32=True, rounds_weights=False
)


def _spec(router: RouterSpec, experts_per_token: int = 3, **fields: Any) -> ExpertsSpec:
    return ExpertsSpec(
        num_experts=NUM_EXPERTS,
        experts_per_token=experts_per_token,
        expert=MLP,
        router=router,
        **fields,
    )


@dataclass(frozen=True, slots=True)
class Case:
    """A module of transformers, and how we describe it."""

    family: str
    module: Callable[[Any], torch.nn.Module]
    spec: ExpertsSpec
    config: dict[str, Any]

    def build(self) -> torch.nn.Module:
        """Make the module with random weights."""
        shapes: dict[str, Any] = {
            "hidden_size": HIDDEN,
            "intermediate_size": SIZE,
            "moe_intermediate_size": SIZE,
            "num_experts_per_tok": self.spec.experts_per_token,
        }
        counts = {"num_local_experts" if self.family == "mixtral" else "num_experts": NUM_EXPERTS}
        config = AutoConfig.for_model(self.family, **(shapes | counts | self.config))
        config._experts_implementation = "eager"  # as a model's own parts have it
        torch.manual_seed(1)
        module = self.module(config).eval()
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(torch.randn_like(tensor) * 0.3)
        return module


CASES = {
    "mixtral": Case(
        "mixtral", MixtralSparseMoeBlock, _spec(RouterSpec(rounds_weights=False), 2), {}
    ),
    "qwen2-moe": Case(
        "qwen2_moe",
        Qwen2MoeSparseMoeBlock,
        _spec(RouterSpec(renormalises=False), shared=SHARED, gates_shared=True),
        {"shared_expert_intermediate_size": SHARED_SIZE},
    ),
    "qwen3-moe": Case(
        "qwen3_moe", Qwen3MoeSparseMoeBlock, _spec(RouterSpec()), {"norm_topk_prob": True}
    ),
    "olmoe": Case("olmoe", OlmoeSparseMoeBlock, _spec(RouterSpec(renormalises=False), 8), {}),
    "granitemoe": Case(
        "granitemoe",
        GraniteMoeMoE,
        _spec(RouterSpec(selects_first=True, renormalises=False)),
        {"num_local_experts": NUM_EXPERTS},
    ),
    "deepseek-v3": Case(
        "deepseek_v3",
        DeepseekV3MoE,
        _spec(
            replace(DEEPSEEK_ROUTER, num_groups=4, groups_per_token=2),
            shared=MlpSpec(size=2 * SIZE),
        ),
        DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True},
    ),
    "glm4-moe": Case(
        "glm4_moe",
        Glm4MoeMoE,
        _spec(DEEPSEEK_ROUTER, shared=MlpSpec(size=2 * SIZE)),
        DEEPSEEK | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    ),
}
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")


def _our_weights(module: torch.nn.Module) -> LayerWeights:
    """Return a module's tensors by our names."""
    state = module.state_dict()
    router = "gate" if "gate.weight" in state else "router"
    weights: dict[str, Any] = {
        "router.weight": (state[f"{router}.weight"],),
        "router.float32_weight": (state[f"{router}.weight"].float(),),
        "expert_gate_up.weight": state["experts.gate_up_proj"].unbind(),
        "expert_down.weight": state["experts.down_proj"].unbind(),
    }
    if "gate.e_score_correction_bias" in state:
        weights["router.bias"] = (state["gate.e_score_correction_bias"],)
    if "shared_expert_gate.weight" in state:
        weights["shared_gate.weight"] = (state["shared_expert_gate.weight"],)
    for name in SHARED_NAMES:
        if f"{name}.down_proj.weight" in state:
            gate, up, down = (state[f"{name}.{p}_proj.weight"] for p in ("gate", "up", "down"))
            weights["shared_gate_up.weight"] = (gate[:7], torch.cat([gate[7:], up]))
            weights["shared_down.weight"] = (down,)
    return weights


def _tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed))


def _theirs(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = module(x[None])
    made: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return made[0]


def _ours(module: torch.nn.Module, x: torch.Tensor, spec: ExpertsSpec) -> torch.Tensor:
    weights = _our_weights(module)
    return experts_output(x, route(x, weights, spec), weights, spec)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """So small products are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[1, feed_forward_spec.EXPERT_ROWS_AT_ONCE])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply as few rows at once as is ever done, and all of them."""
    monkeypatch.setattr(feed_forward_spec, "EXPERT_ROWS_AT_ONCE", request.param)


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("name", CASES)
def test_output_is_that_of_transformers(name: str) -> None:
    case = CASES[name]
    module = case.build()

    @settings(max_examples=10, deadline=None)
    @given(num_tokens=st.integers(1, 40), seed=st.integers(0, 99), is_crowded=st.booleans())
    def check(num_tokens: int, seed: int, is_crowded: bool) -> None:
        x = _tokens(num_tokens, seed)
        # Equal tokens all choose the same experts.
        x = x[:1].repeat(num_tokens, 1) if is_crowded else x
        before = x.clone()
        expected = _theirs(module, x)
        torch.testing.assert_close(_ours(module, x, case.spec), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(x, before)

    check()


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_near_to_float32_as_transformers(name: str) -> None:
    case = CASES[name]
    module = case.build()
    rounded = copy.deepcopy(module).bfloat16()
    for key, value in module.named_buffers():
        # The bias of its scores is never rounded.
        rounded.get_buffer(key).data = value.data
    x = _tokens(300, 0).bfloat16()
    got, expected = _ours(rounded, x, case.spec).float(), _theirs(rounded, x).float()
    exact = _theirs(copy.deepcopy(rounded).float(), x.float())
    assert ((got - expected).abs() <= expected.abs().max() * 2**-7).all()
    assert (got - exact).abs().mean() <= 1.02 * (expected - exact).abs().mean()


@pytest.mark.usefixtures("rows_at_once")
def test_parts_of_the_experts_add_up() -> None:
    case = CASES["qwen3-moe"]
    weights, x = _our_weights(case.build()), _tokens(90, 0)
    routing = route(x, weights, case.spec)
    whole = experts_output(x, routing, weights, case.spec)
    out = torch.zeros_like(x)
    for experts in (range(0), range(5), range(5, 6), range(6, NUM_EXPERTS)):
        add_routed(out, x, routing.by_expert(case.spec.num_experts), weights, case.spec, experts)
    assert torch.equal(out, whole)


def test_experts_without_tokens_are_not_looked_at() -> None:
    case = CASES["mixtral"]
    weights, x = _our_weights(case.build()), _tokens(2, 0)
    routing = route(x, weights, case.spec)
    counts = routing.counts(NUM_EXPERTS)
    assert counts.sum() == 4 and (counts == 0).any()
    present = {
        name: [m if not name.startswith("expert_") or counts[i] else None for i, m in enumerate(t)]
        for name, t in weights.items()
    }
    got = experts_output(x, routing, cast(LayerWeights, present), case.spec)
    assert torch.equal(got, experts_output(x, routing, weights, case.spec))


def test_packed_experts_are_multiplied_as_if_unpacked() -> None:
    case = CASES["qwen2-moe"]
    weights, x = _our_weights(case.build()), _tokens(9, 0)
    packed, unpacked = dict(weights), dict(weights)
    for name in ("expert_gate_up.weight", "expert_down.weight"):
        pairs = [_packed(m) for m in weights[name] if isinstance(m, torch.Tensor)]
        packed[name], unpacked[name] = [p for p, _ in pairs], [u for _, u in pairs]
    routing = route(x, weights, case.spec)
    got, expected = (experts_output(x, routing, w, case.spec) for w in (packed, unpacked))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 9, 300, 3000])
def test_cuda_makes_what_the_cpu_makes(num_tokens: int, is_packed: bool) -> None:
    """Of few rows an expert, of more than a tile, and of so many that torch multiplies them."""
    case = CASES["qwen3-moe"]
    weights, x = dict(_our_weights(case.build())), _tokens(num_tokens, 0)
    routing = route(x, weights, case.spec)
    if is_packed:
        for name in ("expert_gate_up.weight", "expert_down.weight"):
            plain = [m for m in weights[name] if isinstance(m, torch.Tensor)]
            weights[name] = [_packed(m)[0] for m in plain]
    expected = experts_output(x, routing, weights, case.spec)
    moved = {name: [_on_cuda(m) for m in matrices] for name, matrices in weights.items()}
    routing = Routing(routing.experts.cuda(), routing.weights.cuda())
    got = experts_output(x.cuda(), routing, moved, case.spec)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)


def _on_cuda(matrix: Matrix) -> Matrix:
    if isinstance(matrix, PackedRows):
        return PackedRows(matrix.rows.cuda(), matrix.packing)
    assert isinstance(matrix, torch.Tensor)
    return matrix.cuda()


def _packed(matrix: torch.Tensor) -> tuple[PackedRows, torch.Tensor]:
    packing = Packing(num_elements=matrix.shape[1], bits=4, group_size=32)
    rows = torch.empty(1, len(matrix), packing.row_bytes, dtype=torch.uint8)
    kernels.pack_rows(matrix[None], packing, rows)
    unpacked = torch.empty_like(matrix[None])
    kernels.unpack_rows(rows, packing, unpacked)
    return PackedRows(rows[0], packing), unpacked[0]


@pytest.mark.parametrize(("num_experts", "chosen"), [(8, 2), (128, 8)])
def test_touched_experts_are_those_of_uniform_routing(num_experts: int, chosen: int) -> None:
    spec = ExpertsSpec(num_experts=num_experts, experts_per_token=chosen, expert=MLP)
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, *(num_experts * share // (4 * chosen) for share in (2, 4, 8, 16))):
        draws = torch.rand(300, num_tokens, num_experts, generator=generator)
        experts = draws.topk(chosen).indices
        routings = [Routing(e, torch.ones(e.shape)) for e in experts]
        counts = [float((r.counts(num_experts) > 0).sum()) for r in routings]
        found = torch.tensor(counts, dtype=torch.float64)
        error = float(found.std()) / len(found) ** 0.5
        assert abs(float(found.mean()) - spec.touched(num_tokens)) <= 3 * error + 1e-9


@pytest.mark.parametrize(("groups", "chosen"), [(5, 1), (4, 5), (12, 12), (6, 1), (0, 1)])
def test_groups_that_cannot_be_chosen_from_are_refused(groups: int, chosen: int) -> None:
    with pytest.raises(InputError):
        _spec(RouterSpec(num_groups=groups, groups_per_token=chosen))
