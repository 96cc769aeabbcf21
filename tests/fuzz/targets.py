"""What reads files of users: one function each, and what must hold where it accepts its input.

Whatever is wrong must come as a ``ZigzagError`` of one line. Whatever is accepted must make sense:
each function asserts what can be known about a sound result.
"""

from __future__ import annotations

import io
import json
import math
import struct
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from costmodel.calibration.measured_runs import MeasuredRun, read_runs, row_of
from costmodel.gguf.config import spec_from_gguf
from costmodel.gguf.model import GgufModel
from costmodel.model.layout import model_layers
from costmodel.model.loading import load_model_spec
from costmodel.model.safetensors_header import open_safetensors
from costmodel.optimizer.optimum import search
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import PHASES
from costmodel.pricing.price import estimate
from costmodel.report.run_record import Measured, RunRecord
from costmodel.report.trace_file import read_run
from costmodel.schedule.chrome_trace import begin_trace
from costmodel.schedule.timeline import simulate
from executor.checkpoint.folder import Checkpoint
from executor.checkpoint.stored_tensors import INDEX_NAME, SINGLE_NAME
from executor.data import MODEL
from executor.jobs.limits import RequestLimits
from executor.model.gguf_generation import gguf_generation_config
from executor.text.gguf_tokenizer import load_gguf_tokenizer
from executor.text.loading import load_tokenizer
from profiles.files import read_json, to_json
from profiles.hardware import HardwareProfile
from profiles.recorded import find_profile
from tests.costmodel.run_tables import write_rows
from tests.executor.gguf_files import ARRAY, F32, TEXT, gguf_bytes, metadatum, text, texts, u32
from tests.executor.job_files import done, read
from tests.fuzz.mutations import as_bytes
from tests.fuzz.quantized_documents import quantized_documents, read_quantized_document

WORKLOAD = Workload(prompt_len=8, gen_len=4, num_prompts=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A reader: sound documents to begin with, and the function that reads one in a folder."""

    read: Callable[[bytes, Path], None]
    documents: tuple[Any, ...] = ()
    texts: tuple[bytes, ...] = ()

    @property
    def seeds(self) -> tuple[bytes, ...]:
        """All sound documents as bytes."""
        return (*map(as_bytes, self.documents), *self.texts)


def _read_config(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    spec = load_model_spec(str(folder))
    assert sum(layer.num_bytes for layer in model_layers(spec)) > 0
    _link(MODEL / SINGLE_NAME, folder / SINGLE_NAME)
    assert Checkpoint.open(folder).spec == spec


def _read_shard(data: bytes, folder: Path) -> None:
    path = folder / SINGLE_NAME
    path.write_bytes(data)
    found = open_safetensors(path)
    try:
        reference = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        # A dtype that is not known spoils its own tensor only.
        assert "unknown variant" in str(error)
        return
    assert {name: list(entry.shape) for name, entry in found.items()} == {
        name: list(tensor.shape) for name, tensor in reference.items()
    }


def _read_header(data: bytes, folder: Path) -> None:
    body = _shard()[8 + int.from_bytes(_shard()[:8], "little") :]
    _read_shard(len(data).to_bytes(8, "little") + data + body, folder)


def _read_gguf(data: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    end = 0
    entries = GgufModel.open(path).tensors.values()
    for entry in sorted(entries, key=lambda entry: entry.offset_bytes):
        assert end <= entry.offset_bytes
        end = entry.offset_bytes + entry.num_bytes
    assert end <= len(data)


def _read_gguf_model(data: bytes, folder: Path) -> None:
    path = folder / "model.gguf"
    path.write_bytes(data)
    model = GgufModel.open(path)
    spec = spec_from_gguf(model, "model")
    assert sum(layer.num_bytes for layer in model_layers(spec)) > 0
    tokenizer = load_gguf_tokenizer(model, path)
    tokenizer.decode(tokenizer.encode("a <s> b"))
    assert all(number >= 0 for number in gguf_generation_config(model, path).eos_ids)


def _read_index(data: bytes, folder: Path) -> None:
    _link(MODEL / "config.json", folder / "config.json")
    _link(MODEL / SINGLE_NAME, folder / "shard.safetensors")
    (folder / INDEX_NAME).write_bytes(data)
    source = Checkpoint.open(folder)
    for layout in model_layers(source.spec)[1].components:
        out = torch.empty(layout.num_bytes, dtype=torch.uint8)
        source.read_range(1, layout, 0, out)


def _read_tokenizer(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    _use_tokenizer(folder)


def _read_tokenizer_config(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(_tokenizer().to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes(data)
    _use_tokenizer(folder)


def _use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("And the LORD said <unk> \u00e9\U0001f600")
    assert all(type(i) is int and i >= 0 for i in ids)
    assert isinstance(tokenizer.decode(ids), str)


def _read_prompts(data: bytes, folder: Path) -> None:
    path = folder / "prompts.jsonl"
    path.write_bytes(data)
    limits = RequestLimits(vocab_size=1000, max_positions=512)
    job = read(path, lambda: load_tokenizer(MODEL), limits=limits)
    lines = path.read_bytes()
    for number in range(job.table.num_lines):
        for row in job.table.rows_of(number):
            ids = list(job.table.prompt_ids(row))
            assert 0 < len(ids) <= limits.max_positions - job.table.params(row).max_tokens
            position, count = job.table.place_of(number)
            line = lines[position : position + count]
            if job.form.name != "lines":
                continue
            answer = job.form.answer(line, [ids], [done([1])])
            given, back = json.loads(line.decode("utf-8-sig")), json.loads(answer)
            added = {"text": back["text"], "output_ids": [1], "finish_reason": "length"}
            # NaN is not equal to itself: compared as text.
            assert repr({**given, **added}) == repr(back)


def _read_profile(data: bytes, folder: Path) -> None:
    path = folder / "profile.json"
    path.write_bytes(data)
    hardware = HardwareProfile.load(path)
    assert 0 < estimate(_policy(), hardware).throughput_tok_per_s < math.inf


def _read_policy(data: bytes, folder: Path) -> None:
    path = folder / "policy.json"
    path.write_bytes(data)
    policy = Policy.load(path)
    policy.save(path)
    assert Policy.load(path) == policy
    if policy.hardware is not None:
        assert 0 < estimate(policy, policy.hardware).throughput_tok_per_s < math.inf


def _read_runs(data: bytes, folder: Path) -> None:
    path = folder / "runs.csv"
    path.write_bytes(data)
    for run in read_runs(path):
        assert 0 < run.throughput_tok_per_s < math.inf


def _read_trace(data: bytes, folder: Path) -> None:
    path = folder / "trace.json"
    path.write_bytes(data)
    record, sample = read_run(read_json(path, "run"), f"run {path}")
    assert 0 < record.measured.tok_per_s < math.inf
    assert record.first_block.workload.prompt_len == record.measured.prompt_len
    for phase, tasks in sample.phases.items():
        for task in tasks:
            assert (task.token == 0) == (phase == "prefill")
            assert -math.inf < task.start_s <= task.end_s < math.inf


def _document(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _link(existing: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(existing)


@cache
def _shard() -> bytes:
    """Return a small safetensors file of three tensors."""
    tensors = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    return safetensors.torch.save({**tensors, "c": torch.zeros(0, 2)}, {"format": "pt"})


def _gguf() -> bytes:
    """Return a small GGUF file."""
    metadata = [u32("general.alignment", 32), texts("tokenizer.ggml.tokens", ["<s>", "a"])]
    return gguf_bytes(metadata, {"a": ("F32", (3, 5)), "b": ("Q4_K", (2, 256))})


def _gguf_model() -> bytes:
    """Return a Llama of one layer with a vocabulary of SentencePiece."""
    keys = {"context_length": 32, "embedding_length": 8, "feed_forward_length": 4}
    keys |= {"block_count": 1, "attention.head_count": 2, "rope.dimension_count": 4}
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    metadata = [
        metadatum("general.architecture", TEXT, text("llama")),
        metadatum("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
        *(u32(f"llama.{key}", value) for key, value in keys.items()),
        metadatum("tokenizer.ggml.model", TEXT, text("llama")),
        texts("tokenizer.ggml.tokens", tokens),
        metadatum("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ6f", F32, 6, *range(6))),
        metadatum("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ6i", 5, 6, 2, 3, 3, 1, 1, 1)),
        u32("tokenizer.ggml.eos_token_id", 2),
    ]
    block = {
        **dict.fromkeys(("attn_norm", "ffn_norm"), (8,)),
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (8, 8)),
        "ffn_gate": (4, 8),
        "ffn_up": (4, 8),
        "ffn_down": (8, 4),
    }
    tensors = {"token_embd": (6, 8), "output_norm": (8,)}
    tensors |= {f"blk.0.{name}": shape for name, shape in block.items()}
    return gguf_bytes(metadata, {f"{n}.weight": ("F32", shape) for n, shape in tensors.items()})


def _header() -> Any:
    length = int.from_bytes(_shard()[:8], "little")
    return json.loads(_shard()[8 : 8 + length])


@cache
def _tokenizer() -> Tokenizer:
    """Return a tokenizer of bytes and a few merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("an", "d")]
    words = [*letters, *(left + right for left, right in merges), "<unk>"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _index() -> Any:
    with safetensors.safe_open(MODEL / SINGLE_NAME, "pt") as file:
        names = file.keys()
    return {"metadata": {}, "weight_map": dict.fromkeys(names, "shard.safetensors")}


@cache
def _policy() -> Policy:
    hardware = find_profile("cpu-2core")
    return search(hardware, load_model_spec(str(MODEL)), WORKLOAD).policy


def _runs(folder: Path) -> bytes:
    run = MeasuredRun(policy=_policy(), throughput_tok_per_s=9.0)
    write_rows(folder / "runs.csv", [row_of(run, model="opt-125m")] * 2)
    return (folder / "runs.csv").read_bytes()


def _trace() -> Any:
    """Return the timeline of a run whose tasks took as long as simulated."""
    hardware = find_profile("cpu-2core")
    seconds, bytes_ = dict.fromkeys(PHASES, 1.5), {"cpu": 5, "disk": 0}
    busy = {phase: {"cpu_compute": 1.0} for phase in PHASES}
    measured = Measured(
        num_blocks=1,
        num_prompts=3,
        prompt_len=8,
        num_passes=2,
        generated_tokens=6,
        tok_per_s=2.0,
        predicted_tok_per_s=2.5,
        phase_s=seconds,
        predicted_phase_s=seconds,
        busy_s=busy,
        predicted_busy_s=busy,
        peak_bytes=bytes_,
        predicted_peak_bytes=bytes_,
    )
    text = io.StringIO()
    trace = begin_trace(text.write)
    for pid, label in ((1, "measured"), (2, "simulated")):
        trace.begin_process(pid, label)
        for timed in simulate(_policy(), hardware, num_passes=2).tasks[:4]:
            trace.add(pid, timed, block=0)
    policy = replace(_policy(), hardware=hardware)
    trace.end(run=to_json(RunRecord(policy=policy, measured=measured)))
    return json.loads(text.getvalue())


OPT = {
    "model_type": "opt",
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "ffn_dim": 704,
    "hidden_size": 256,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 4096,
    "word_embed_proj_dim": 256,
    "enable_bias": True,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
QWEN = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 704,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "rope_theta": 1e6,
    "sliding_window": 64,
    "use_sliding_window": False,
    "max_window_layers": 1,
    "tie_word_embeddings": True,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "rms_norm_eps": 1e-6,
}
EXPERTS = QWEN | {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 96,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
QUANTIZED = EXPERTS | {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": False,
                    "strategy": "group",
                    "group_size": 32,
                    "actorder": "group",
                },
            }
        },
        "ignore": ["lm_head", "re:.*mlp.gate$", "model.layers.0.self_attn.q_proj"],
    }
}
PROMPTS = (
    b'{"prompt": "And the LORD", "id": 7}\n{"prompt_ids": [5, 6], "x": {"y": [1.5, null]}}\n\n',
    b'\xef\xbb\xbf{"prompt": "\xc3\xa9"}\r\n{"prompt_ids": [0]}',
)


@cache
def targets() -> Mapping[str, Target]:
    """Return all readers by name; made at first use, because a policy is searched for."""
    with tempfile.TemporaryDirectory() as folder:
        runs = _runs(Path(folder))
    return {
        "config": Target(
            read=_read_config,
            documents=(_document(MODEL / "config.json"), OPT, QWEN, EXPERTS, QUANTIZED),
        ),
        "shard": Target(read=_read_shard, texts=(_shard(),)),
        "header": Target(read=_read_header, documents=(_header(),)),
        "index": Target(read=_read_index, documents=(_index(),)),
        "quantized": Target(read=read_quantized_document, documents=quantized_documents()),
        "gguf_model": Target(read=_read_gguf_model, texts=(_gguf_model(),)),
        "gguf": Target(read=_read_gguf, texts=(_gguf(),)),
        "tokenizer": Target(read=_read_tokenizer, documents=(json.loads(_tokenizer().to_str()),)),
        "tokenizer_config": Target(
            read=_read_tokenizer_config, documents=(_document(MODEL / "tokenizer_config.json"),)
        ),
        "prompts": Target(read=_read_prompts, texts=PROMPTS),
        "profile": Target(read=_read_profile, documents=(to_json(find_profile("cpu-2core")),)),
        "policy": Target(read=_read_policy, documents=(to_json(_policy()),)),
        "runs": Target(read=_read_runs, texts=(runs,)),
        "trace": Target(read=_read_trace, documents=(_trace(),)),
    }
