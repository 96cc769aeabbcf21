"""Random placements and policies for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from costmodel.plan.policy import Placement, Policy
from tests.costmodel.machines import make_model, make_policy

SHARES = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def placements(draw: st.DrawFn, *, has_gpu: bool = True) -> Placement:
    """Draw three fractions, corners often."""
    gpu = draw(SHARES) if has_gpu else 0.0
    cpu = (1 - gpu) * draw(SHARES)
    return Placement(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu))


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
    return make_policy(
        model=model,
        gpu_batch_size=draw(st.integers(2, 13)),
        weights=draw(placements(has_gpu=has_gpu)),
        cache=draw(placements(has_gpu=has_gpu)),
        activations=draw(placements(has_gpu=has_gpu)),
        cpu_attention=draw(SHARES) if has_gpu else 1.0,
    )
