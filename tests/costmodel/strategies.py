"""Random placements and policies for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy
from costmodel.plan.workload import Workload
from tests.costmodel.encoded_models import as_q4_k_m
from tests.costmodel.machines import make_mixture, make_model, make_policy

SHARES = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def placements(draw: st.DrawFn, *, has_gpu: bool = True) -> Placement:
    """Draw three fractions, corners often."""
    gpu = draw(SHARES) if has_gpu else 0.0
    cpu = (1 - gpu) * draw(SHARES)
    return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu))


@st.composite
def weights_of(draw: st.DrawFn, model: ModelSpec, *, has_gpu: bool = True) -> dict[str, Placement]:
    """Draw a placement for each component, or one for all."""
    one = draw(st.none() | placements(has_gpu=has_gpu))
    return {name: one or draw(placements(has_gpu=has_gpu)) for name in model.component_names}


@st.composite
def mixtures(draw: st.DrawFn, *, has_gpu: bool = True) -> Policy:
    """Draw a policy of a mixture of experts: two layers that have them, or the second of them."""
    model = make_mixture(
        num_hidden_layers=2,
        mlp_only_layers=draw(st.sampled_from([[], [0]])),
        intermediate_size=512,
        num_experts=draw(st.sampled_from([4, 8])),
    )
    model = as_q4_k_m(model) if draw(st.booleans()) else model
    # The tokens of all batches pass through experts together.
    here = Placement(gpu=1) if has_gpu else Placement(cpu=1)
    loads_on_demand = draw(st.booleans())
    cpu_experts = draw(SHARES) if has_gpu else 0.0
    is_together = loads_on_demand or cpu_experts > 0
    skew = draw(st.sampled_from([0.0, 0.7, 1.5]))
    return make_policy(
        model=model,
        workload=Workload(prompt_len=16, gen_len=5, expert_skew=skew),
        gpu_batch_size=draw(st.integers(2, 13)),
        weights=draw(weights_of(model, has_gpu=has_gpu)),
        cache=draw(placements(has_gpu=has_gpu)),
        activations=here if is_together else draw(placements(has_gpu=has_gpu)),
        cpu_attention=draw(SHARES) if has_gpu else 1.0,
        cpu_experts=cpu_experts,
        loads_on_demand=loads_on_demand,
    )


@st.composite
def policies(draw: st.DrawFn, *, has_gpu: bool = True) -> Policy:
    """Draw a policy of two layers with heads of many sizes."""
    model = make_model(
        num_layers=2,
        num_heads=8,
        num_kv_heads=draw(st.sampled_from([1, 2, 8])),
        head_dim=draw(st.sampled_from([16, 64, 80, 128])),
        # The head in one chunk, and in several.
        vocab_size=draw(st.sampled_from([1000, 5003])),
    )
    model = as_q4_k_m(model) if draw(st.booleans()) else model
    scored = draw(st.sampled_from([None, 0]))
    return make_policy(
        model=model,
        workload=Workload(prompt_len=16, gen_len=5, prompt_logprobs=scored),
        gpu_batch_size=draw(st.integers(2, 13)),
        weights=draw(weights_of(model, has_gpu=has_gpu)),
        cache=draw(placements(has_gpu=has_gpu)),
        activations=draw(placements(has_gpu=has_gpu)),
        cpu_attention=draw(SHARES) if has_gpu else 1.0,
    )
