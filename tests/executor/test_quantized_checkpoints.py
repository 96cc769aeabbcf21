"""Quantized checkpoints of every layout: values, logits and tokens against transformers' models of
what the layouts' own formulas give."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from costmodel.model.encoded_model import without_encodings
from costmodel.model.layout import ComponentLayout, model_layers
from costmodel.model.loading import load_model_spec
from costmodel.model.quantized import read_quantized
from costmodel.model.safetensors_header import ITEM_BYTES
from costmodel.plan.policy import Placement
from executor.checkpoint.folder import Checkpoint, WeightSource
from executor.checkpoint.quantized_layouts import STORED_LAYOUTS, Matrix
from profiles.errors import InputError, RunError
from tests.covering import at_most
from tests.executor.model_cases import draw_prompts, greedy
from tests.executor.quantized_files import (
    Awq,
    Bnb4,
    Bnb8,
    Fp8,
    Gptq,
    Int8,
    Mxfp4,
    Packed4,
    save_quantized,
)
from tests.executor.reference import Compression, ReferenceModel
from tests.executor.tiny_machines import ExpectedCase, draw_policy, make_hardware

GEN_LEN = 4
LENGTHS = (23, 2, 9, 1)
MACHINES = {False: make_hardware(), True: make_hardware(gpu=True)}
LLAMA: dict[str, Any] = {"family": "llama", "intermediate_size": 128}
QWEN3_MOE: dict[str, Any] = {
    "family": "qwen3_moe",
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
}
CASES: dict[str, dict[str, Any]] = {
    "gptq": {**LLAMA, "draw": Gptq()},
    "gptq-8-bits": {**LLAMA, "draw": Gptq(bits=8, group=64, is_v1=False)},
    "gptq-rows": {**LLAMA, "draw": Gptq(group=-1)},
    "gptq-act-order": {**LLAMA, "draw": Gptq(order="scattered")},
    "gptq-said-to-be-scattered": {**LLAMA, "draw": Gptq(order="as they are")},
    "awq": {**LLAMA, "draw": Awq()},
    "packed": {**LLAMA, "draw": Packed4()},
    "packed-zeros": {
        **LLAMA,
        "draw": Packed4(is_symmetric=False, dtype=torch.bfloat16, order="scattered"),
    },
    "packed-8-bits": {**LLAMA, "draw": Packed4(bits=8, group=-1, dtype=torch.float16)},
    "int8": {**LLAMA, "draw": Int8()},
    "fp8-tiles": {**LLAMA, "draw": Fp8()},
    "fp8-one-tile": {**LLAMA, "draw": Fp8(tile=(128, 128))},
    "fp8-matrix": {**LLAMA, "draw": Fp8(tile=None)},
    "fp8-channels": {**LLAMA, "draw": Fp8(strategy="channel", dtype=torch.bfloat16)},
    "fp8-tensor": {**LLAMA, "draw": Fp8(strategy="tensor", dtype=torch.bfloat16)},
    "bnb-4-bits": {**LLAMA, "draw": Bnb4(is_nested=False)},
    "bnb-nested": {**LLAMA, "draw": Bnb4()},
    "bnb-8-bits": {**LLAMA, "draw": Bnb8()},
    "gpt-oss": {"family": "gpt_oss", "draw": Mxfp4(), "intermediate_size": 96},
    "qwen3-moe-fp8": {**QWEN3_MOE, "draw": Fp8()},
    "mixtral-act-order": {
        "family": "mixtral",
        "draw": Gptq(order="scattered"),
        "intermediate_size": 96,
    },
    "deepseek-v3-fp8": {
        "family": "deepseek_v3",
        "draw": Fp8(),
        "kv_lora_rank": 32,
        "q_lora_rank": 64,
        "moe_intermediate_size": 64,
        "v_head_dim": 16,
    },
    "phi3-awq": {"family": "phi3", "draw": Awq(), "intermediate_size": 128},
    "gpt-neox-gptq": {"family": "gpt_neox", "draw": Gptq(), "intermediate_size": 128},
    "gpt2-gptq": {"family": "gpt2", "draw": Gptq(order="scattered")},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with a layout of decoded matrices."""
    return replace(checkpoint, spec=without_encodings(checkpoint.spec))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens(name: str, tmp_path: Path) -> None:
    options = dict(CASES[name])
    torch.manual_seed(1)
    theirs = save_quantized(tmp_path / "model", options.pop("family"), num_layers=3, **options)
    source = Checkpoint.open(tmp_path / "model")
    assert source.spec.is_encoded
    prompts = draw_prompts(LENGTHS)
    expected = theirs(input_ids=torch.tensor([prompts[0]]), use_cache=False).logits[0]
    found = ReferenceModel(_plain(source)).logits(prompts[0])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)
    (tmp_path / "offload").mkdir()
    case = ExpectedCase(
        source=source,
        prompts=prompts,
        folder=tmp_path / "offload",
        tokens=[greedy(theirs, prompt, GEN_LEN) for prompt in prompts],
    )
    rng = random.Random(name)
    for number in range(at_most(3, 8)):
        policy = draw_policy(case.policy(), rng, gpu=number % 2 == 1)
        assert case.generate(policy, MACHINES[number % 2 == 1]) == case.tokens, policy


@pytest.mark.parametrize("name", CASES)
def test_values_and_any_range_of_them(name: str, tmp_path: Path) -> None:
    options = dict(CASES[name])
    torch.manual_seed(2)
    save_quantized(tmp_path / "model", options.pop("family"), num_layers=2, **options)
    source, values = Checkpoint.open(tmp_path / "model"), Checkpoint.open(tmp_path / "model-values")
    rng = random.Random(name)
    for checkpoint in (source, _plain(source)):
        for index, layer in enumerate(model_layers(checkpoint.spec)):
            for layout in layer.components:
                whole = _read(checkpoint, index, layout)
                if checkpoint is not source:
                    # As numbers: zeros of MXFP4 have no sign.
                    expected = _read(values, index, layout).view(torch.float32)
                    assert torch.equal(whole.view(torch.float32), expected)
                for _ in range(3):
                    ends = sorted(4 * rng.randint(0, len(whole) // 4) for _ in range(2))
                    part = torch.empty(ends[1] - ends[0], dtype=torch.uint8)
                    checkpoint.read_range(index, layout, ends[0], part)
                    assert torch.equal(part, whole[slice(*ends)])


def _read(source: WeightSource, index: int, layout: ComponentLayout) -> torch.Tensor:
    out = torch.full((layout.num_bytes,), 255, dtype=torch.uint8)
    source.read_range(index, layout, 0, out)
    return out


def test_a_second_quantization(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "llama", Gptq(order="scattered"), intermediate_size=128)
    source, prompts = Checkpoint.open(tmp_path / "model"), draw_prompts(LENGTHS)
    lost = Compression(weight_bits=4, group_size=32)
    tokens = ReferenceModel(_plain(source), compression=lost).generate(prompts, GEN_LEN)
    (tmp_path / "offload").mkdir()
    case = ExpectedCase(source=source, prompts=prompts, folder=tmp_path / "offload", tokens=tokens)
    policy = case.policy(weight_bits=4, group_size=32, weights=Placement(cpu=0.5, disk=0.5))
    assert case.generate(policy, MACHINES[False]) == tokens


def test_another_dtype_keeps_the_encodings(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "llama", Packed4(), intermediate_size=128)
    source = Checkpoint.open(tmp_path / "model", dtype="bfloat16")
    encoded = source.spec.layer(0).encoded
    assert {part.encoding for part in encoded} == {"INT4_G32_F32"}
    assert source.spec.dtype == "bfloat16"
    assert source.in_dtype("float16").spec.layer(0).encoded == encoded


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["family"] == "llama"])
@pytest.mark.parametrize(("outputs", "inputs"), [(1024, 4096), (14336, 4096), (4096, 14336)])
def test_rows_take_the_bytes_of_their_tensors(name: str, outputs: int, inputs: int) -> None:
    draw = CASES[name]["draw"]
    how = read_quantized({"quantization_config": draw.config}, "float16")
    assert how is not None
    stored = STORED_LAYOUTS[how.layout].parts(Matrix(outputs=outputs, inputs=inputs, how=how))
    shipped = sum(
        math.prod(part.shapes[0]) * ITEM_BYTES[part.dtypes[0]]
        for part in stored.values()
        if not part.is_optional
    )
    order = 4 * inputs if how.is_sorted else 0
    table = 4 * how.encoding.table_elements(outputs, inputs)
    assert outputs * how.encoding.row_bytes(inputs) + table + order < 1.01 * shipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_search_and_run_describe_one_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Though only the files say which dtype scales have."""
    save_quantized(tmp_path / "model", "llama", Packed4(dtype=dtype), intermediate_size=128)
    found = load_model_spec(str(tmp_path / "model"))
    assert found == Checkpoint.open(tmp_path / "model").spec
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((tmp_path / "model/config.json").read_bytes())
    (alone / "model.safetensors").write_bytes(b"\xff" * 20)
    assert {part.encoding for part in load_model_spec(str(alone)).layer(0).encoded} == {
        "INT4_G32_F32"
    }


def test_modules_that_stay_plain(tmp_path: Path) -> None:
    """As the config says, in one matrix with others that do not."""

    def keeps(name: str) -> bool:
        return "k_proj" in name or "layers.0.mlp" in name

    draw = Fp8(keeps=("model.layers.0.mlp", "k_proj"))
    theirs = save_quantized(tmp_path / "model", "llama", draw, keeps=keeps, intermediate_size=128)
    source = Checkpoint.open(tmp_path / "model")
    parts = [part for part in source.spec.layer(0).encoded if part.tensor == "qkv.weight"]
    assert [(part.rows, part.encoding) for part in parts] == [
        (64, "E4M3_32X32"),
        (32, ""),
        (32, "E4M3_32X32"),
    ]
    prompts = draw_prompts(LENGTHS)
    (tmp_path / "offload").mkdir()
    tokens = [greedy(theirs, prompt, GEN_LEN) for prompt in prompts]
    case = ExpectedCase(source=source, prompts=prompts, folder=tmp_path / "offload", tokens=tokens)
    for share in (0, 0.4, 1):
        policy = case.policy(weights=Placement(cpu=1 - share, disk=share))
        assert case.generate(policy, MACHINES[False]) == tokens


def test_the_decoder_of_a_model_for_images(tmp_path: Path) -> None:
    """Its modules have other names in the config and in the file."""
    inside = "model.language_model.layers.0.mlp"
    draw = Fp8(keeps=(inside, "model.vision_tower"))
    save_quantized(tmp_path / "plain", "llama", draw, intermediate_size=128)
    config = json.loads((tmp_path / "plain/config.json").read_text(encoding="utf-8"))
    outer = {
        "model_type": "llava",
        "text_config": config,
        "quantization_config": config.pop("quantization_config"),
        "dtype": "float32",
    }
    tensors = load_file(tmp_path / "plain/model.safetensors")
    values = load_file(tmp_path / "plain-values/model.safetensors")
    moved = {"model.vision_tower.x.weight": torch.ones(2, 2)}
    for name, tensor in tensors.items():
        own = name.replace("model.", "model.language_model.", 1)
        if not own.startswith(inside):
            moved[own] = tensor
        elif name in values:
            moved[own] = values[name]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(outer), encoding="utf-8")
    save_file(moved, tmp_path / "model/model.safetensors")
    source = Checkpoint.open(tmp_path / "model")
    assert {part.tensor for part in source.spec.layer(0).encoded} == {
        "qkv.weight",
        "output.weight",
    }
    assert {part.tensor for part in source.spec.layer(1).encoded} >= {"gate_up.weight"}
    plain = Checkpoint.open(tmp_path / "plain-values")
    for index, layer in enumerate(model_layers(plain.spec)):
        for layout in layer.components:
            assert torch.equal(_read(source, index, layout), _read(plain, index, layout))


def test_quantized_routers_are_decoded(tmp_path: Path) -> None:
    """Some writers quantize them although routers are not to be rounded again."""
    options: dict[str, Any] = {"intermediate_size": 96, "also": ("block_sparse_moe.gate",)}
    theirs = save_quantized(tmp_path / "model", "mixtral", Gptq(), num_local_experts=8, **options)
    source, prompt = Checkpoint.open(tmp_path / "model"), draw_prompts((9,))[0]
    expected = theirs(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
    found = ReferenceModel(_plain(source)).logits(prompt)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


Q_PROJ = "model.layers.0.self_attn.q_proj."
# What is wrong with a checkpoint: its layout, what changes a tensor (by its name behind q_proj) or
# the config, words of the error, and whether it is found at once.
FAULTS: dict[str, tuple[Any, str, Callable[[torch.Tensor], torch.Tensor | None], str, bool]] = {
    "no scales": (Gptq(), "scales", lambda _: None, "no tensor .*q_proj.scales", True),
    "no codes": (Awq(), "qweight", lambda _: None, "no tensor .*q_proj.qweight", True),
    "no order": (
        Gptq(order="scattered"),
        "g_idx",
        lambda _: None,
        "no tensor .*q_proj.g_idx",
        True,
    ),
    "other shape": (Gptq(), "qzeros", lambda t: t[:1], r"q_proj.qzeros.*\[1, 8\].*\[2, 8\]", True),
    "other dtype": (Gptq(), "qweight", lambda t: t.long(), "q_proj.qweight.*I64.*I32", True),
    "mixed scales": (Gptq(), "scales", lambda t: t.float(), "F16 and F32", True),
    "NaN": (Gptq(), "scales", lambda t: t * torch.nan, "q_proj.*scales.*NaN", False),
    "NaN in FP8": (Fp8(), "weight_scale_inv", lambda t: t / 0, "scales of .*q_proj.*NaN", False),
    "NaN in NF4": (Bnb4(is_nested=False), "weight.absmax", lambda t: t / 0, "q_proj.*NaN", False),
    "NaN nested": (Bnb4(), "weight.nested_absmax", lambda t: t / 0, "q_proj.*NaN", False),
    "NaN in int8": (Bnb8(), "SCB", lambda t: t / 0, "q_proj.*NaN", False),
    "group beyond": (
        Gptq(order="scattered"),
        "g_idx",
        lambda t: t + 1,
        "g_idx.*q_proj|q_proj.*g_idx",
        False,
    ),
    "other sizes": (
        Gptq(order="scattered"),
        "g_idx",
        lambda t: t.clamp(max=0),
        "q_proj.*g_idx.*other sizes",
        False,
    ),
    "scattered": (Gptq(), "g_idx", lambda t: t.flip(0), "g_idx of .*q_proj.*scattered", False),
    "shape told": (Packed4(), "weight_shape", lambda t: t + 1, "weight_shape.*65", False),
    "no state": (
        Bnb4(),
        "weight.quant_state.bitsandbytes__nf4",
        lambda _: None,
        "no tensor .*quant_state",
        True,
    ),
    "state": (
        Bnb4(),
        "weight.quant_state.bitsandbytes__nf4",
        lambda t: t[1:],
        "quant_state.*no JSON object",
        True,
    ),
    "not quantized": (
        Int8(),
        "weight",
        lambda t: t.float(),
        "q_proj.weight.*F32, not quantized",
        True,
    ),
    "a bias": (Gptq(), "bias", lambda _: torch.ones(64), "q_proj.bias", True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told(fault: str, tmp_path: Path) -> None:
    draw, part, change, words, is_at_once = FAULTS[fault]
    save_quantized(tmp_path / "model", "llama", draw, num_layers=1, intermediate_size=128)
    Checkpoint.open(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(Q_PROJ + part, torch.ones(0)))
    if changed is not None:
        tensors[Q_PROJ + part] = changed.contiguous()
    save_file(tensors, path)
    with pytest.raises(InputError, match=words) as caught:
        source = Checkpoint.open(tmp_path / "model")
        assert not is_at_once
        for component in model_layers(source.spec)[1].components:
            _read(source, 1, component)
    assert "\n" not in str(caught.value) and "; allowed: " in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, r"qweight.*\[8, 64\].*\[16, 64\]"),
        ({"group_size": 64}, r"qzeros.*\[2, 8\].*\[1, 8\]"),
        ({"desc_act": 1}, "desc_act"),
        ({"quant_method": "quip"}, "quant_method"),
        ({"quant_method": "awq"}, r"qweight"),
        ({"quant_method": "fp8"}, "no tensor .*q_proj.weight"),
        ({"quant_method": "mxfp4"}, "no tensor"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format"),
        ({"dynamic": {"x": 1}}, "dynamic"),
    ],
)
def test_configs_that_do_not_fit_are_told(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    save_quantized(tmp_path / "model", "llama", Gptq(), num_layers=1, intermediate_size=128)
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=words) as caught:
        Checkpoint.open(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_biases_of_zeros_and_scales_of_activations_are_skipped(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "llama", Gptq(), num_layers=1, intermediate_size=128)
    path = tmp_path / "model/model.safetensors"
    extra = {f"{Q_PROJ}bias": torch.zeros(64), f"{Q_PROJ}input_scale": torch.ones(1)}
    save_file(load_file(path) | extra, path)
    before = Checkpoint.open(tmp_path / "model")
    assert Checkpoint.open(tmp_path / "model").fingerprint == before.fingerprint


def test_the_fingerprint_covers_quantized_tensors(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "llama", Gptq(), num_layers=1, intermediate_size=128)
    path = tmp_path / "model/model.safetensors"
    source = Checkpoint.open(tmp_path / "model")
    names = set(load_file(path))
    assert {entry.name for entry in (*source.tensors.values(), *source.quantized.entries)} == names
    tensors = load_file(path)
    tensors[f"{Q_PROJ}qzeros"] ^= 1
    save_file(tensors, path)
    with pytest.raises(RunError, match="changed"):
        source.check_unchanged()


def test_a_cut_shard_is_told(tmp_path: Path) -> None:
    save_quantized(tmp_path / "model", "llama", Gptq(), num_layers=1, intermediate_size=128)
    path = tmp_path / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="bytes; allowed"):
        Checkpoint.open(tmp_path / "model")
