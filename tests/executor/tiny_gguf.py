"""Tiny random models in GGUF, and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM

from profiles.encodings import BLOCK_ENCODINGS
from tests.executor.tiny_models import VOCAB_SIZE
from tests.profiles.encoded_matrices import sound_matrix

# Blocks of k-quants have 256 elements. Experts are as wide as transformers takes for granted.
HIDDEN, INNER, HEADS, KEY_HEADS, HEAD_DIM = 256, 768, 4, 2, 64
NUM_LAYERS, NUM_EXPERTS = 2, 4
# For a tensor's name, the name of its encoding.
EncodingOf = Callable[[str], str]


def write_tiny_gguf(path: Path, arch: str, encoding_of: EncodingOf) -> None:
    """Write a model of an architecture: ``llama``, or ``qwen3moe`` with experts."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(NUM_LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(VOCAB_SIZE)
    if arch == "qwen3moe":
        writer.add_expert_count(NUM_EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(INNER)
    else:
        writer.add_rope_dimension_count(HEAD_DIM)
    for number, (name, shape) in enumerate(_shapes(arch).items()):
        encoding = BLOCK_ENCODINGS[encoding_of(name) if len(shape) > 1 else "F32"]
        rows = sound_matrix(encoding, shape.numel() // shape[-1], shape[-1], seed=number).rows
        if len(shape) == 1:
            rows = torch.rand(shape, generator=torch.Generator().manual_seed(number)) + 0.5
            rows = rows.view(torch.uint8)
        kind = gguf.GGMLQuantizationType[encoding.name]
        raw = rows.view(*shape[:-1], -1).numpy()
        writer.add_tensor(name, raw, raw_dtype=kind, raw_shape=raw.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_theirs(path: Path) -> Any:
    """Load the model into transformers, with weights that it unpacks to float32."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def _shapes(arch: str) -> Mapping[str, torch.Size]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB_SIZE, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCAB_SIZE, HIDDEN),
    }
    for layer in range(NUM_LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KEY_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KEY_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
        }
        if arch == "qwen3moe":
            block |= {
                "attn_q_norm": (HEAD_DIM,),
                "attn_k_norm": (HEAD_DIM,),
                "ffn_gate_inp": (NUM_EXPERTS, HIDDEN),
                "ffn_gate_exps": (NUM_EXPERTS, INNER, HIDDEN),
                "ffn_up_exps": (NUM_EXPERTS, INNER, HIDDEN),
                "ffn_down_exps": (NUM_EXPERTS, HIDDEN, INNER),
            }
        else:
            block |= {
                "ffn_gate": (INNER, HIDDEN),
                "ffn_up": (INNER, HIDDEN),
                "ffn_down": (HIDDEN, INNER),
            }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {name: torch.Size(shape) for name, shape in shapes.items()}
