"""Random routers whose experts are chosen as Zipf's law says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from costmodel.families import spec_from_config
from costmodel.model.expert_use import chances
from costmodel.model.layout import model_layers
from executor.checkpoint.dummy import DummyCheckpoint, write_random_checkpoint
from executor.checkpoint.folder import Checkpoint
from executor.model.experts import route
from tests.plain_models import plain_config

CONFIG = plain_config(family="qwen3_moe", num_kv_heads=2, hidden_size=128, vocab_size=400) | {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}


def test_random_routers_choose_as_the_law_says() -> None:
    config = CONFIG | {"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 2}
    spec = spec_from_config(config, name="many")
    experts = spec.layer(0).experts
    assert experts is not None
    rows = torch.randn(4000, 128, generator=torch.Generator().manual_seed(0))
    for skew in (0.0, 0.6, 1.2):
        orders = []
        for index, layer in enumerate(model_layers(spec)):
            if layer.kind != "experts":
                continue
            (layout,) = (c for c in layer.components if c.name == "router")
            raw = torch.empty(layout.num_bytes, dtype=torch.uint8)
            source = DummyCheckpoint(spec=spec, router_skew=skew)
            source.read_range(index, layout, 0, raw)
            (tensor,) = (t for t in layout.tensors if t.name == "router.weight")
            part = raw[tensor.offset_bytes : tensor.end_bytes]
            weight = part.view(getattr(torch, spec.dtype)).view(tensor.shape)
            routing = route(rows.to(weight.dtype), {"router.weight": (weight,)}, experts)
            shares = routing.counts(64).numpy() / len(rows)
            orders.append(np.argsort(-shares).tolist())
            law, ranked = chances(64, 8, skew), np.sort(shares)[::-1]
            # Of one random matrix, some rows are longer than others, so that none is uniform.
            assert np.abs(ranked.cumsum() - law.cumsum()).max() < 0.6, skew
        assert orders[0] != orders[1]


def test_skewed_weights_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, CONFIG, seed=3, router_skew=0.8)
    checkpoint = Checkpoint.open(tmp_path)
    made = DummyCheckpoint(spec=checkpoint.spec, seed=3, router_skew=0.8)
    plain = DummyCheckpoint(spec=checkpoint.spec, seed=3)
    assert made.fingerprint != plain.fingerprint
    for index, layer in enumerate(model_layers(checkpoint.spec)):
        for layout in layer.components:
            here, there, uniform = (
                torch.empty(layout.num_bytes, dtype=torch.uint8) for _ in range(3)
            )
            for source, out in ((checkpoint, here), (made, there), (plain, uniform)):
                source.read_range(index, layout, 0, out)
            assert torch.equal(here, there)
            assert torch.equal(here, uniform) == (layout.name != "router")
