"""Tiny models of every kind of cache that lanes keep, and free pages that hold NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from costmodel.plan.policy import Placement
from executor.checkpoint.folder import Checkpoint, WeightSource
from executor.run.lane_block import LaneBlock
from executor.run.lanes import LaneTable
from tests.executor.tiny_machines import make_hardware
from tests.executor.tiny_models import MIXTURES, save_tiny_model

MACHINE = make_hardware()
HALVES = Placement(cpu=0.5, disk=0.5)
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"family": "llama", "num_kv_heads": 2},
    "tied": {"family": "llama", "num_kv_heads": 1, "tied": True, "vocab_size": 900},
    "learned positions": {"family": "opt", "tied": True},
    "bfloat16": {"family": "llama", "dtype": "bfloat16"},
    "alibi": {"family": "bloom"},
    "small window": {"family": "mistral", "sliding_window": 6},
    "window": {"family": "mistral", "sliding_window": 40},
    "wide window": {"family": "mistral", "sliding_window": 70},
    "two windows": {"family": "gemma3_text", "num_layers": 3},
    "chunks": {"family": "llama4_text"},
    "sinks": {"family": "gpt_oss"},
    "latent": {"family": "deepseek_v3"},
    "latent bfloat16": {"family": "deepseek_v2", "dtype": "bfloat16"},
    "experts": {"family": "mixtral"},
    "mixed experts": MIXTURES["qwen2_moe"],
    "long rotations": {"family": "phi3"},
}


@dataclass(frozen=True, slots=True)
class LaneModel:
    """A checkpoint, and where a run of it may write."""

    source: WeightSource
    folder: Path


LaneModels = Callable[[str], LaneModel]


def lane_models(factory: pytest.TempPathFactory, **options: Any) -> LaneModels:
    """Return a function that makes each of ``MODELS`` once, with options of ``save_tiny_model``."""
    made: dict[str, LaneModel] = {}

    def make(name: str) -> LaneModel:
        if name not in made:
            folder = factory.mktemp(name)
            save_tiny_model(folder / "model", seed=3, **options, **MODELS[name])
            (folder / "offload").mkdir()
            made[name] = LaneModel(Checkpoint.open(folder / "model"), folder / "offload")
        return made[name]

    return make


def poison_freed_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill all pages with NaN at first, and again when a sequence or a prefix has ended."""
    blocks: dict[int, LaneBlock] = {}
    init = LaneBlock.__init__

    def begin(block: LaneBlock, *arguments: Any) -> None:
        init(block, *arguments)
        blocks[id(block.table)] = block
        for (layer,) in block.stores.cache.layers:
            _spoil(layer.pool)

    monkeypatch.setattr(LaneBlock, "__init__", begin)
    for name in ("release", "drop_prefixes"):
        original = getattr(LaneTable, name)

        def end(
            table: LaneTable, numbers: Iterable[int], original: Any = original
        ) -> list[list[int]]:
            freed: list[list[int]] = original(table, numbers)
            for (layer,) in blocks[id(table)].stores.cache.layers:
                for page in freed[layer.ring_number]:
                    _spoil(layer.pool[page])
            return freed

        monkeypatch.setattr(LaneTable, name, end)


def _spoil(pages: torch.Tensor) -> None:
    pages.fill_(255 if pages.dtype == torch.uint8 else torch.nan)
