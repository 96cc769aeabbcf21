"""Scales in any dtype: a search knows that of the files, so that its policy runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from costmodel.model.loading import load_model_spec
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from executor.checkpoint.folder import Checkpoint
from executor.run.runner import check_runnable
from profiles.errors import InputError
from profiles.files import from_json, to_json
from tests.executor.model_cases import draw_prompts, greedy
from tests.executor.quantized_files import Awq, Gptq, Packed4, save_quantized
from tests.executor.tiny_machines import ExpectedCase, make_hardware

LENGTHS, GEN_LEN = (9, 3), 3
HARDWARE = make_hardware()


def _save(folder: Path, draw: Any, dtype: torch.dtype) -> Any:
    """Write a tiny model whose scales have a dtype, without a change of their values."""
    torch.manual_seed(3)
    theirs = save_quantized(folder, "llama", draw, num_layers=1, intermediate_size=128)
    path = folder / "model.safetensors"
    ends = (".scales", ".weight_scale")
    tensors = load_file(path)
    save_file({n: t.to(dtype) if n.endswith(ends) else t for n, t in tensors.items()}, path)
    return theirs


@pytest.mark.parametrize("draw", [Gptq(), Awq(), Packed4(dtype=torch.bfloat16)])
@pytest.mark.parametrize(
    ("dtype", "short"),
    [(torch.float16, "F16"), (torch.bfloat16, "BF16"), (torch.float32, "F32")],
)
def test_a_policy_of_the_search_runs(
    draw: Any, dtype: torch.dtype, short: str, tmp_path: Path
) -> None:
    theirs = _save(tmp_path / "model", draw, dtype)
    spec = load_model_spec(str(tmp_path / "model"))
    assert {part.encoding.split("_")[2] for part in spec.layer(0).encoded} == {short}
    prompts = draw_prompts(LENGTHS)
    workload = Workload(prompt_len=max(LENGTHS), gen_len=GEN_LEN, num_prompts=len(prompts))
    policy = from_json(Policy, to_json(search(HARDWARE, spec, workload).policy), "policy")
    source = Checkpoint.open(tmp_path / "model")
    check_runnable(policy, HARDWARE, source)
    (tmp_path / "offload").mkdir()
    tokens = [greedy(theirs, prompt, GEN_LEN) for prompt in prompts]
    case = ExpectedCase(source=source, prompts=prompts, folder=tmp_path / "offload", tokens=tokens)
    found = case.generate(policy, HARDWARE)
    # Scales of GPTQ and AWQ are drawn in float16, which bfloat16 rounds.
    if isinstance(draw, Packed4) or dtype is not torch.bfloat16:
        assert found == tokens


def test_a_config_alone_has_the_usual_dtype(tmp_path: Path) -> None:
    _save(tmp_path / "model", Gptq(), torch.float32)
    (tmp_path / "model/model.safetensors").unlink()
    spec = load_model_spec(str(tmp_path / "model/config.json"))
    assert {part.encoding for part in spec.layer(0).encoded} == {"INT4_G32_F16_Z"}


def test_the_config_of_a_decoder_may_have_the_encodings(tmp_path: Path) -> None:
    """Of a model for images, either config has them."""
    _save(tmp_path / "model", Gptq(), torch.float32)
    path = tmp_path / "model/config.json"
    inner = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({"model_type": "llava", "text_config": inner}), encoding="utf-8")
    spec = load_model_spec(str(tmp_path / "model"))
    assert {part.encoding for part in spec.layer(0).encoded} == {"INT4_G32_F32_Z"}


def test_scales_in_float64_are_told(tmp_path: Path) -> None:
    _save(tmp_path / "model", Gptq(), torch.float64)
    load_model_spec(str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"scales.*F64.*F16, BF16, F32"):
        Checkpoint.open(tmp_path / "model")
