"""Experts of a layer of which some are plain and others quantized have no common layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from costmodel.model.loading import load_model_spec
from executor.checkpoint.folder import Checkpoint
from profiles.errors import InputError
from tests.executor.quantized_files import Fp8, save_quantized


def _is_plain(name: str) -> bool:
    return "experts.0." in name


def test_a_config_that_keeps_some_experts_is_told(tmp_path: Path) -> None:
    draw = Fp8(keeps=("model.layers.*.experts.0",))
    save_quantized(tmp_path / "model", "qwen3_moe", draw, keeps=_is_plain, num_layers=1)
    words = r"plain model.layers.0.mlp.experts.0.gate_proj, but quantized .*experts.1.gate_proj"
    for read in (lambda path: load_model_spec(str(path)), Checkpoint.open):
        with pytest.raises(InputError, match=words) as caught:
            read(tmp_path / "model")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("plain", ["experts.0.", "experts.1."])
def test_files_that_keep_some_experts_are_told(plain: str, tmp_path: Path) -> None:
    """Though their config says that all are plain, or that all are quantized."""
    draw = Fp8()
    folder = tmp_path / "model"
    options: dict[str, Any] = {"moe_intermediate_size": 64, "num_layers": 1}
    save_quantized(folder, "qwen3_moe", draw, keeps=lambda name: plain in name, **options)
    with pytest.raises(InputError, match=r"experts.\d.gate_proj.*not quantized"):
        Checkpoint.open(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.*.experts"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"plain .*experts.\d.gate_proj.*but quantized"):
        Checkpoint.open(folder)
