"""Reading checkpoints: every conversion, and every fault said before any work."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from costmodel.families import family_names, spec_from_config
from costmodel.model.layout import model_layers
from costmodel.model.spec import ModelSpec
from executor.checkpoint.dummy import DummyCheckpoint, write_random_checkpoint
from executor.checkpoint.folder import Checkpoint, WeightSource
from executor.checkpoint.stored_tensors import INDEX_NAME, SINGLE_NAME
from profiles.errors import InputError
from tests.executor.reference import ReferenceModel, read_layer, view_layer
from tests.executor.tiny_keys import LLAMA3_ROPE, MORE_KEYS
from tests.executor.tiny_models import save_tiny_model
from tests.plain_models import plain_config

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "single", "llama")
    save_tiny_model(folder / "sharded", "llama", max_shard_size="60KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def single(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "single", tmp_path / "single"))


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine / "sharded", tmp_path / "sharded"))


def read_all(source: WeightSource) -> list[torch.Tensor]:
    layouts = model_layers(source.spec)
    return [read_layer(source, index, layout) for index, layout in enumerate(layouts)]


def test_shards_hold_what_the_single_file_does(pristine: Path) -> None:
    single = read_all(Checkpoint.open(pristine / "single"))
    sharded = read_all(Checkpoint.open(pristine / "sharded"))
    assert all(torch.equal(a, b) for a, b in zip(single, sharded, strict=True))


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_converted_to_every_other(
    stored: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pieces that do not divide a tensor, as large ones have.
    monkeypatch.setattr("executor.checkpoint.tensor_reads.READ_BYTES", 1000)
    monkeypatch.setattr("executor.checkpoint.safetensors_file.READ_BYTES", 777)
    save_tiny_model(tmp_path, "qwen2", dtype=stored)
    tensors = load_file(tmp_path / SINGLE_NAME)
    checkpoint = Checkpoint.open(tmp_path, wanted)
    layout = model_layers(checkpoint.spec)[1]
    dtype = getattr(torch, wanted)
    weights = view_layer(read_all(checkpoint)[1], layout, dtype)
    block = "model.layers.0.self_attn"
    for kind in ("weight", "bias"):
        parts = [tensors[f"{block}.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(weights[f"qkv.{kind}"][0], torch.cat(parts).to(dtype))
    gate, up = (tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.equal(weights["gate_up.weight"][0], torch.cat([gate, up]).to(dtype))


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_any_range_of_a_layer_is_that_part_of_the_whole(wanted: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen3", tied=True, vocab_size=1013)
    checkpoint = Checkpoint.open(tmp_path, wanted)
    dummy = DummyCheckpoint(spec=checkpoint.spec)
    generator = torch.Generator().manual_seed(0)
    for source in (checkpoint, dummy):
        # A decoder layer and a later chunk of the head.
        for index in (1, 4):
            components = model_layers(source.spec)[index].components
            wholes = read_all(source)[index].split([c.num_bytes for c in components])
            for layout, whole in zip(components, wholes, strict=True):
                for _ in range(20):
                    limit = layout.num_bytes // 4 + 1
                    bounds = torch.randint(0, limit, (2,), generator=generator) * 4
                    start, end = sorted(bounds.tolist())
                    out = torch.full((end - start,), 255, dtype=torch.uint8)
                    source.read_range(index, layout, start, out)
                    assert torch.equal(out, whole[start:end])


def test_head_chunks_are_the_rows_of_the_table(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "qwen3", tied=True, vocab_size=1013)
    checkpoint = Checkpoint.open(tmp_path)
    layouts = model_layers(checkpoint.spec)
    assert [layout.kind for layout in layouts[3:]] == ["head"] * (len(layouts) - 3)
    assert len(layouts) > 4
    chunks = [
        view_layer(buffer, layout, torch.float32)["head.weight"][0]
        for buffer, layout in zip(read_all(checkpoint)[3:], layouts[3:], strict=True)
    ]
    table = load_file(tmp_path / SINGLE_NAME)["model.embed_tokens.weight"]
    assert torch.equal(torch.cat(chunks), table)


def test_values_beyond_float16_are_refused(single: Path) -> None:
    rewrite(single, lambda t: t[Q_PROJ].fill_(1e6))
    with pytest.raises(InputError, match=r"q_proj\.weight.*float16 cannot hold"):
        read_all(Checkpoint.open(single, "float16"))


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_names_with_a_prefix_more_or_less_are_found(family: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path, family, tied=True)
    expected = read_all(Checkpoint.open(tmp_path))
    tensors = load_file(tmp_path / SINGLE_NAME)
    for rename in (
        lambda i, n: n.removeprefix("model."),
        lambda i, n: f"model.{n}",
        # As files that were put together from two have them.
        lambda i, n: n.removeprefix("model.") if i % 2 else n,
    ):
        renamed = {rename(i, name): t for i, (name, t) in enumerate(tensors.items())}
        save_file(renamed, tmp_path / SINGLE_NAME)
        assert all(map(torch.equal, read_all(Checkpoint.open(tmp_path)), expected))
    doubled = renamed | {"model.norm.weight": tensors[next(iter(tensors))].clone()}
    save_file(
        doubled | {"norm.weight": doubled["model.norm.weight"].clone()}, tmp_path / SINGLE_NAME
    )
    if family == "llama":
        with pytest.raises(InputError, match=r"got model\.norm\.weight and norm\.weight"):
            Checkpoint.open(tmp_path)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("shards", ["5GB", "60KB"])
def test_a_tied_model_is_what_transformers_makes_of_it(
    family: str, shards: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_model(tmp_path, family, tied=True, max_shard_size=shards)
    name = "model.decoder.embed_tokens.weight" if family == "opt" else "model.embed_tokens.weight"
    path = tmp_path / SINGLE_NAME
    if shards != "5GB":
        path = tmp_path / json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"][name]
    table = load_file(path)[name]

    def store(tied: bool, **tensors: torch.Tensor) -> None:
        others = {k: v for k, v in load_file(path).items() if k not in (name, "lm_head.weight")}
        found = {name if k == "table" else "lm_head.weight": v for k, v in tensors.items()}
        save_file(others | found, path, {"format": "pt"})
        edit_json(tmp_path / "config.json", lambda c: c.update(tie_word_embeddings=tied))

    for is_tied, tensors in (
        (True, {"table": table}),
        (True, {"head": table}),
        (True, {"table": table, "head": table.clone()}),
        (True, {"table": table, "head": table.flip(0)}),
        (False, {"table": table, "head": table.flip(0)}),
    ):
        store(is_tied, **tensors)
        checkpoint = Checkpoint.open(tmp_path)
        is_one = is_tied and (len(tensors) == 1 or torch.equal(*tensors.values()))
        assert checkpoint.spec.head.is_tied == is_one
        assert ("both are used" in caplog.text) == (is_tied and not is_one)
        caplog.clear()
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            expected = model(torch.tensor([[4, 5, 6]])).logits[0]
        got = ReferenceModel(checkpoint).logits([4, 5, 6])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    store(False, table=table)
    with pytest.raises(InputError, match=r"no tensor lm_head\.weight"):
        Checkpoint.open(tmp_path)
    store(True, table=table, head=table[:3].clone())
    with pytest.raises(InputError, match=r"lm_head\.weight.*shape \[3, 64\]; allowed: \[173, 64\]"):
        Checkpoint.open(tmp_path)


BLOCK = "model.layers.0.self_attn"
UNREAD: dict[str, dict[str, torch.Tensor]] = {
    f"tensor {BLOCK}.q_proj.bias": {f"{BLOCK}.q_proj.bias": torch.zeros(64)},
    f"tensor {BLOCK}.q_proj.scales": {f"{BLOCK}.q_proj.scales": torch.zeros(4, dtype=torch.int8)},
    "tensor model.layers.7.mlp.up_proj.weight (and 1 more)": {
        "vision.weight": torch.zeros(2),
        "model.layers.7.mlp.up_proj.weight": torch.full((2, 2), torch.nan),
    },
}


@pytest.mark.parametrize("said", UNREAD)
def test_tensors_that_nothing_reads_are_refused(said: str, single: Path, sharded: Path) -> None:
    rewrite(single, lambda t: t.update(UNREAD[said]))
    shard = "model-more.safetensors"
    save_file(UNREAD[said], sharded / shard)
    edit_json(
        sharded / INDEX_NAME, lambda i: i["weight_map"].update(dict.fromkeys(UNREAD[said], shard))
    )
    for folder in (single, sharded):
        with pytest.raises(InputError, match=re.escape(f"got {said}, which")) as caught:
            Checkpoint.open(folder)
        assert "\n" not in str(caught.value)


def test_a_layer_more_than_the_config_says_is_refused(single: Path) -> None:
    edit_json(single / "config.json", lambda c: c.update(num_hidden_layers=1))
    # Transformers would drop it and compute with one layer.
    with pytest.raises(InputError, match=r"tensor model\.layers\.1\.\S+ \(and 8 more\)"):
        Checkpoint.open(single)


def test_rotary_buffers_and_promises_of_an_index_are_not_looked_at(
    single: Path, sharded: Path
) -> None:
    expected = read_all(Checkpoint.open(single))
    buffer = f"{BLOCK}.rotary_emb.inv_freq"
    rewrite(single, lambda t: t.update({buffer: torch.zeros(4, dtype=torch.int8)}))
    rewrite_header(single, lambda h: h[buffer].update(dtype="F4_E9M9"))
    edit_json(
        sharded / INDEX_NAME,
        lambda i: i["weight_map"].update(
            {
                # Of a shard that was not downloaded, of none, and of one that does not hold it.
                "vision.weight": "model-vision.safetensors",
                "old.weight": "pytorch_model.bin",
                "text.weight": next(iter(i["weight_map"].values())),
                # What is held counts, whatever the index says of it.
                Q_PROJ: i["weight_map"]["lm_head.weight"],
            }
        ),
    )
    for folder in (single, sharded):
        assert all(map(torch.equal, read_all(Checkpoint.open(folder)), expected))


def test_a_dtype_that_no_config_names_is_that_of_the_weights(single: Path) -> None:
    edit_json(single / "config.json", lambda c: c.pop("dtype"))
    for stored in (torch.float32, torch.float16, torch.bfloat16):
        tensors = {k: v.to(stored) for k, v in load_file(single / SINGLE_NAME).items()}
        save_file(tensors, single / SINGLE_NAME)
        model = AutoModelForCausalLM.from_pretrained(single)
        assert Checkpoint.open(single).spec.dtype == str(model.dtype).removeprefix("torch.")
        assert Checkpoint.open(single, "float32").spec.dtype == "float32"


def test_a_dtype_that_only_the_index_names_comes_before_that_of_the_weights(sharded: Path) -> None:
    def name_dtype(dtype: object) -> None:
        edit_json(sharded / INDEX_NAME, lambda i: i["metadata"].update(dtype=dtype))

    name_dtype("float16")
    assert Checkpoint.open(sharded).spec.dtype == "float32"  # the config's
    edit_json(sharded / "config.json", lambda c: c.pop("dtype"))
    for dtype in ("float16", "bfloat16"):
        name_dtype(dtype)
        model = AutoModelForCausalLM.from_pretrained(sharded)
        assert Checkpoint.open(sharded).spec.dtype == str(model.dtype).removeprefix("torch.")
    for wrong in (16, "float64"):
        name_dtype(wrong)
        with pytest.raises(InputError, match=f"dtype.*: got '?{wrong}'?; allowed: "):
            Checkpoint.open(sharded)
        assert Checkpoint.open(sharded, "float32").spec.dtype == "float32"


def test_values_that_are_not_finite_stay_what_they_are(single: Path) -> None:
    name = "model.embed_tokens.weight"
    rewrite(single, lambda t: t[name][3].copy_(torch.tensor([torch.nan, torch.inf] * 32)))
    for dtype in ("float16", "bfloat16", "float32"):
        checkpoint = Checkpoint.open(single, dtype)
        layout = model_layers(checkpoint.spec)[0]
        table = view_layer(read_all(checkpoint)[0], layout, getattr(torch, dtype))["tokens.weight"]
        assert table[0][3].isnan().sum() == table[0][3].isinf().sum() == 32
        assert table[0][4:].isfinite().all()


def test_fingerprint_follows_the_weights_and_the_dtype(single: Path) -> None:
    first = Checkpoint.open(single).fingerprint
    assert Checkpoint.open(single).fingerprint == first
    assert Checkpoint.open(single, "bfloat16").fingerprint != first
    rewrite(single, lambda t: t[Q_PROJ].add_(1))
    assert Checkpoint.open(single).fingerprint != first


def test_fingerprint_does_not_rest_on_times_that_can_be_set(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = single / SINGLE_NAME
    offset = Checkpoint.open(single).tensors[Q_PROJ].offset_bytes

    def change(position: int) -> str:
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"\x7f")
        os.utime(path, (1, 1))
        return Checkpoint.open(single).fingerprint

    # Between the samples, where only the kernel's time of the change tells.
    seen = {change(offset + 5000), change(offset + 5001), change(offset + 5002)}
    assert len(seen) == 3
    # A file system that makes that time up.
    real = os.fstat
    monkeypatch.setattr(
        "executor.checkpoint.stored_tensors.os.fstat",
        lambda descriptor: os.stat_result((*real(descriptor)[:7], 1, 1, 1)),
    )
    seen = {Checkpoint.open(single).fingerprint}
    seen |= {change(offset + place) for place in (0, 8192, 16383)}
    assert len(seen) == 4


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME)


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = (folder / SINGLE_NAME).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (folder / SINGLE_NAME).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(folder: Path, num_bytes: int) -> None:
    data = (folder / SINGLE_NAME).read_bytes()
    (folder / SINGLE_NAME).write_bytes(data[:num_bytes])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shorter than its header": (
        lambda f: truncate(f, -5),
        r"shard model\.safetensors: got \d+ bytes; allowed: \d+ as its header says",
    ),
    "longer than its header": (
        lambda f: (f / SINGLE_NAME).open("ab").write(b"x"),
        "bytes; allowed: .* header says",
    ),
    "empty file": (lambda f: truncate(f, 0), "header length of 0"),
    "header cut off": (lambda f: truncate(f, 100), "contains its whole header"),
    "header not JSON": (
        lambda f: (f / SINGLE_NAME).write_bytes((4).to_bytes(8, "little") + b"nope"),
        "not JSON",
    ),
    "header length huge": (
        lambda f: (f / SINGLE_NAME).write_bytes(b"\xff" * 64),
        "contains its whole header",
    ),
    "header a list": (
        lambda f: (f / SINGLE_NAME).write_bytes((2).to_bytes(8, "little") + b"[]"),
        "a list",
    ),
    "tensor overlaps": (
        lambda f: rewrite_header(f, lambda h: h.update(extra=dict(h["model.norm.weight"]))),
        "where the tensor before it ends",
    ),
    "offsets do not fit the shape": (
        lambda f: rewrite_header(f, lambda h: h[Q_PROJ]["shape"].append(2)),
        r"q_proj\.weight in shard.*got 16384 bytes; allowed: 32768",
    ),
    "offsets negative": (
        lambda f: rewrite_header(f, lambda h: h[Q_PROJ].update(data_offsets=[-4, 16380])),
        "whole numbers",
    ),
    "dtype unknown": (
        lambda f: rewrite_header(f, lambda h: h[Q_PROJ].update(dtype="F33")),
        "dtype F33; allowed: F32, F16, BF16",
    ),
    "dtype not a name": (
        lambda f: rewrite_header(f, lambda h: h[Q_PROJ].update(dtype=16)),
        "got 16; allowed: a dtype's name",
    ),
    "offsets backwards": (
        lambda f: rewrite_header(f, lambda h: h[Q_PROJ].update(dtype="F33", data_offsets=[9, 1])),
        "got -8 bytes",
    ),
    "adapter beside the weights": (
        lambda f: (f / "adapter_config.json").write_text("{}"),
        "adapter_config.json, an adapter that is not applied",
    ),
    "dtype unsupported": (
        lambda f: rewrite(f, lambda t: t.update({Q_PROJ: t[Q_PROJ].double()})),
        "dtype F64; allowed: F32, F16, BF16",
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({Q_PROJ: t[Q_PROJ][:, :60].contiguous()})),
        r"tensor model\.layers\.0.*q_proj\.weight.*shape \[64, 60\]; allowed: \[64, 64\]",
    ),
    "tensor missing": (
        lambda f: rewrite(f, lambda t: (t.pop(Q_PROJ), t.pop("lm_head.weight"))),
        r"no tensor model\.layers\.0\.self_attn\.q_proj\.weight \(and 1 more\)",
    ),
    "embedding missing": (
        lambda f: rewrite(f, lambda t: t.pop("model.embed_tokens.weight")),
        r"no tensor model\.embed_tokens\.weight",
    ),
    "weights missing": (lambda f: (f / SINGLE_NAME).unlink(), r"no model\.safetensors"),
    "only pickled weights": (
        lambda f: (f / SINGLE_NAME).rename(f / "pytorch_model.bin"),
        r"only pytorch_model\.bin, which is never loaded",
    ),
    "config missing": (lambda f: (f / "config.json").unlink(), "no such file"),
    "family unsupported": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="mamba")),
        "'mamba'",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_file_are_told_when_opened(fault: str, single: Path) -> None:
    damage, message = FAULTS[fault]
    damage(single)
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.open(single)
    assert "\n" not in str(caught.value)


def remap(folder: Path, shard: object) -> None:
    edit_json(folder / INDEX_NAME, lambda i: i["weight_map"].update({Q_PROJ: shard}))


def edit_shard(
    folder: Path, tensor: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    path = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][tensor]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


INDEX_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "shard missing": (
        lambda f: sorted(f.glob("*.safetensors"))[1].unlink(),
        r"shard model-00002-of-\d+\.safetensors: got no such file",
    ),
    "absolute name": (lambda f: remap(f, "/etc/x.safetensors"), "own folder"),
    "parent folder": (lambda f: remap(f, "../single/model.safetensors"), "own folder"),
    "subfolder": (lambda f: remap(f, "sub/model.safetensors"), "own folder"),
    "other separators": (lambda f: remap(f, "..\\model.safetensors"), "own folder"),
    "pickled shard": (lambda f: remap(f, "pytorch_model.bin"), "own folder"),
    "not a name": (lambda f: remap(f, 7), "own folder"),
    "tensor in no shard": (
        lambda f: edit_shard(f, Q_PROJ, lambda tensors: tensors.pop(Q_PROJ)),
        r"shard model-0000.*got no tensor model\.layers\.0\.self_attn\.q_proj\.weight",
    ),
    "no map": (lambda f: (f / INDEX_NAME).write_text("{}"), "weight_map"),
    "index not JSON": (lambda f: (f / INDEX_NAME).write_text("{"), "not JSON"),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_faults_of_an_index_are_told_when_opened(fault: str, sharded: Path) -> None:
    damage, message = INDEX_FAULTS[fault]
    damage(sharded)
    with pytest.raises(InputError, match=message):
        Checkpoint.open(sharded)


LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
OPT = {
    "model_type": "opt",
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "ffn_dim": 112,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}


def read_config(config: dict[str, Any]) -> ModelSpec:
    return spec_from_config(config, name="tiny")


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "'ntk'"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn"}}, "no factor"),
        (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "short_factor"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "no factor"),
        (LLAMA, {"rope_parameters": {"full": {"rope_theta": 1.0}}}, "one for all"),
        (LLAMA, {"rope_theta": "big"}, "a number above 0"),
        (LLAMA, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.2}}, "partial_rotary_factor"),
        (LLAMA, {"hidden_act": "mish"}, "'mish'; allowed: relu, gelu"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA, {"layer_types": ["linear_attention"]}, "linear_attention"),
        (LLAMA, {"head_dim": 15}, "even"),
        (LLAMA, {"is_causal": False}, "is_causal.*allowed: true"),
        (LLAMA, {"quantization_config": {}}, "quantization_config"),
        (OPT, {"activation_function": "silu"}, "'silu'; allowed: relu, gelu"),
        (OPT, {"hidden_size": 66, "word_embed_proj_dim": 66}, "multiple of the 4 heads"),
    ],
)
def test_configs_that_would_compute_something_else_are_refused(
    base: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_config(base | change)


def test_rope_is_read_from_old_and_new_configs() -> None:
    new = read_config(LLAMA | {"rope_parameters": LLAMA3_ROPE})
    theta = LLAMA3_ROPE["rope_theta"]
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = read_config(LLAMA | {"rope_theta": theta, "rope_scaling": scaling})
    assert new == old
    rotary = new.layer(0).attention.rotary
    assert rotary is not None
    assert rotary.kind == "llama3"
    assert rotary.original_max_positions == 32


@pytest.mark.parametrize("family", family_names())
@pytest.mark.parametrize("tied", [True, False])
def test_random_checkpoints_on_disk_equal_those_made_on_the_spot(
    family: str, tied: bool, tmp_path: Path
) -> None:
    if tied and family == "dbrx":
        pytest.skip("its head is never tied")
    config = small_config(family, tied=tied)
    write_random_checkpoint(tmp_path, config, seed=3, shard_bytes=200_000)
    checkpoint = Checkpoint.open(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    made = read_all(DummyCheckpoint(spec=checkpoint.spec, seed=3))
    assert all(map(torch.equal, read_all(checkpoint), made))
    other = read_all(DummyCheckpoint(spec=checkpoint.spec, seed=4))
    assert not torch.equal(other[1], made[1])
    assert torch.isfinite(ReferenceModel(checkpoint).logits([1, 2, 3])).all()


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "qwen2_moe"])
def test_random_checkpoints_load_in_transformers(family: str, tmp_path: Path) -> None:
    config = small_config(family, tied=False, dtype="float32")
    write_random_checkpoint(tmp_path, config, shard_bytes=300_000)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.no_grad():
        expected = model(torch.tensor([[4, 5, 6]])).logits[0]
    got = ReferenceModel(Checkpoint.open(tmp_path)).logits([4, 5, 6])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def small_config(family: str, *, tied: bool, dtype: str = "bfloat16") -> dict[str, Any]:
    config = plain_config(
        family=family,
        hidden_size=128,
        ffn_size=256,
        num_kv_heads=4 if family == "opt" else 2,
        vocab_size=999,
        max_positions=64,
        tied=tied,
        dtype=dtype,
    )
    if family == "gpt_neox_japanese":
        # Refused, as one of the keys that transformers reads under the family's own names.
        del config["head_dim"]
    return config | MORE_KEYS.get(family, {})
