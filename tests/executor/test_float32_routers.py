"""Routers that keep float32 in models of other dtypes choose the experts that transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from costmodel.model.layout import model_layers
from executor.checkpoint.folder import Checkpoint
from executor.model.experts import route
from tests.executor.reference import read_layer, view_layer
from tests.executor.tiny_keys import HIDDEN_SIZE
from tests.executor.tiny_models import save_tiny_model

FAMILIES = ["dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "solar_open"]


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_a_bfloat16_model_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """The stored routers have float32 values that bfloat16 cannot hold."""
    save_tiny_model(tmp_path, family, num_layers=2)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    gate = theirs.model.layers[1].mlp.gate
    assert gate.weight.dtype is torch.float32
    spec = Checkpoint.open(tmp_path, "bfloat16").spec
    layers = model_layers(spec)
    experts = spec.layer(1).experts
    assert experts is not None
    # The last layer with experts is that before the head.
    index = max(i for i, layer in enumerate(layers) if layer.kind == "experts")
    checkpoint = Checkpoint.open(tmp_path, "bfloat16")
    buffer = read_layer(checkpoint, index, layers[index])
    weights = view_layer(buffer, layers[index], torch.bfloat16)
    x = torch.randn(200, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = route(x, weights, experts)
    with torch.no_grad():
        _, expected, chosen = gate(x)
    order, theirs_order = routing.experts.argsort(-1), chosen.argsort(-1)
    assert torch.equal(routing.experts.gather(1, order), chosen.gather(1, theirs_order))
    torch.testing.assert_close(
        routing.weights.gather(1, order).float(),
        expected.gather(1, theirs_order).float(),
        rtol=1e-5,
        atol=1e-6,
    )


def test_packed_models_leave_these_routers(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "ernie4_5_moe")
    spec = Checkpoint.open(tmp_path, "bfloat16").spec
    found = {
        tensor.name: (tensor.packing, tensor.row_bytes)
        for layer in model_layers(spec, 4)
        for component in layer.components
        for tensor in component.tensors
    }
    assert found["router.float32_weight"] == (None, 4 * HIDDEN_SIZE)
    assert found["expert_down.weight"][0] is not None
