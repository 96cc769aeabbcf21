"""Tiny quantized checkpoints, each beside one of the values that its layout's formula gives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.executor.tiny_models import save_tiny_model

Tensors = dict[str, torch.Tensor]
# What a layout stores for a matrix: its tensors, by the ends of their names, and its values.
Packed = tuple[Tensors, torch.Tensor]
# Modules that quantizers take: projections of attention, of MLPs and of experts.
QUANTIZED = re.compile(
    r".*\.(\w*_proj\w*|w[123]|c_attn|c_fc|c_proj|query_key_value|dense\w*)\.weight"
)
EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|down_proj)")
# Of each place in a word of AWQ, the output whose code it has.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes into int32 along the first dimension, the first one lowest."""
    per = 32 // bits
    padded = F.pad(codes.long(), (0, 0, 0, -len(codes) % per)).unflatten(0, (-1, per))
    shifts = bits * torch.arange(per).view(1, per, *[1] * (codes.dim() - 1))
    packed = (padded << shifts).sum(1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).int()


def _codes(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(2**bits, shape)


def _scales(bits: int, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Draw scales with which values are about those of tiny models."""
    scales: torch.Tensor = (torch.rand(shape) + 0.5) * 0.5 / 2**bits
    return scales.to(dtype)


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """GPTQ; ``order`` is ``scattered`` where each input has any group."""

    bits: int = 4
    group: int = 32
    is_v1: bool = True
    order: str = "adjacent"

    @property
    def config(self) -> dict[str, Any]:
        """Its ``quantization_config``."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group,
            "desc_act": self.order != "adjacent",
            "checkpoint_format": "gptq" if self.is_v1 else "gptq_v2",
        }

    def __call__(self, outputs: int, inputs: int) -> Packed:
        """Draw a matrix."""
        size = inputs if self.group < 0 else self.group
        groups = -(-inputs // size)
        g_idx = (torch.arange(inputs) // size).int()
        if self.order == "scattered":
            g_idx = g_idx[torch.randperm(inputs)]
        codes, zeros = _codes(self.bits, outputs, inputs), _codes(self.bits, groups, outputs)
        scales = _scales(self.bits, groups, outputs)
        stored_zeros = (zeros - int(self.is_v1)) % 2**self.bits
        values = scales.float()[g_idx.long()] * (codes.t() - zeros[g_idx.long()])
        packed = {
            "qweight": words(codes.t(), self.bits),
            "qzeros": words(stored_zeros.t(), self.bits).t().contiguous(),
            "scales": scales,
            "g_idx": g_idx,
        }
        return packed, values.t().contiguous()


@dataclass(frozen=True, kw_only=True)
class Awq:
    """AWQ, ``gemm``."""

    group: int = 32

    @property
    def config(self) -> dict[str, Any]:
        """Its ``quantization_config``."""
        return {"quant_method": "awq", "bits": 4, "group_size": self.group, "zero_point": True}

    def __call__(self, outputs: int, inputs: int) -> Packed:
        """Draw a matrix."""
        groups = -(-inputs // self.group)
        codes, zeros = _codes(4, inputs, outputs), _codes(4, groups, outputs)
        scales = _scales(4, groups, outputs)
        own = (torch.arange(inputs) // self.group).long()
        values = scales.float()[own] * (codes - zeros[own])

        def pack(x: torch.Tensor) -> torch.Tensor:
            placed = x.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1)
            return words(placed.t(), 4).t().contiguous()

        packed = {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}
        return packed, values.t().contiguous()


@dataclass(frozen=True, kw_only=True)
class Packed4:
    """compressed-tensors, ``pack-quantized``."""

    bits: int = 4
    group: int = 32
    is_symmetric: bool = True
    order: str = "adjacent"
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> dict[str, Any]:
        """Its ``quantization_config``."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.is_symmetric,
            "strategy": "group" if self.group > 0 else "channel",
            "group_size": self.group if self.group > 0 else None,
            "actorder": "group" if self.order == "scattered" else None,
        }
        return compressed_config("pack-quantized", weights)

    def __call__(self, outputs: int, inputs: int) -> Packed:
        """Draw a matrix."""
        size, half = inputs if self.group < 0 else self.group, 2 ** (self.bits - 1)
        groups = -(-inputs // size)
        g_idx = (torch.arange(inputs) // size).int()
        if self.order == "scattered":
            g_idx = g_idx[torch.randperm(inputs)]
        codes = _codes(self.bits, outputs, inputs)
        scales = _scales(self.bits, outputs, groups, dtype=self.dtype)
        packed = {
            "weight_packed": words(codes.t(), self.bits).t().contiguous(),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        zeros = torch.full((outputs, groups), half)
        if not self.is_symmetric:
            zeros = _codes(self.bits, outputs, groups)
            packed["weight_zero_point"] = words(zeros, self.bits)
        if self.order == "scattered":
            packed["weight_g_idx"] = g_idx
        values = scales.float()[:, g_idx.long()] * (codes - zeros[:, g_idx.long()])
        return packed, values


@dataclass(frozen=True, kw_only=True)
class Int8:
    """compressed-tensors, ``int-quantized``."""

    config = property(
        lambda _: compressed_config(
            "int-quantized",
            {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        )
    )

    def __call__(self, outputs: int, inputs: int) -> Packed:
        """Draw a matrix."""
        codes = (_codes(8, outputs, inputs) - 128).to(torch.int8)
        scales = _scales(8, outputs, 1, dtype=torch.bfloat16)
        return {"weight": codes, "weight_scale": scales}, codes * scales.float()


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """FP8; ``tile`` is ``None`` for one scale a matrix."""

    tile: tuple[int, int] | None = (32, 32)
    strategy: str = ""
    dtype: torch.dtype = torch.float32
    keeps: tuple[str, ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        """Its ``quantization_config``."""
        if self.strategy:
            weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": self.strategy}
            return compressed_config("float-quantized", weights)
        size = None if self.tile is None else list(self.tile)
        return {
            "quant_method": "fp8",
            "weight_block_size": size,
            "activation_scheme": "dynamic",
            "modules_to_not_convert": list(self.keeps),
        }

    def __call__(self, outputs: int, inputs: int) -> Packed:
        """Draw a matrix."""
        codes = (torch.randn(outputs, inputs) * 30).to(torch.float8_e4m3fn)
        rows, columns = self.tile or (outputs, inputs)
        if self.strategy:
            rows, columns = (1 if self.strategy == "channel" else outputs), inputs
        shape = -(-outputs // rows), -(-inputs // columns)
        scales = _scales(7, *shape, dtype=self.dtype)
        spread = scales.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        values = codes.float() * spread[:outputs, :inputs]
        if self.tile is None and not self.strategy:
            scales = scales[0, 0]
        elif self.strategy == "tensor":
            scales = scales[0]
        name = "weight_scale" if self.strategy else "weight_scale_inv"
        return {"weight": codes, name: scales, "input_scale": torch.ones(1)}, values


@dataclass(frozen=True, kw_only=True)
class Bnb4:
    """bitsandbytes in 4 bits."""

    is_nested: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """Its ``quantization_config``."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.is_nested,
        }

    def __call__(self, outputs: int, inputs: int) -> Packed:
        """Draw a matrix."""
        count = outputs * inputs // 64
        codes, meanings = _codes(4, outputs * inputs), torch.linspace(-1, 1, 16) ** 3
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": 64,
            "dtype": "float32",
            "shape": [outputs, inputs],
        }
        scales = torch.rand(count) * 0.5 + 0.1
        packed = {"weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]}
        if self.is_nested:
            inner, factors = torch.rand(256) - 0.3, torch.rand(-(-count // 256)) * 0.3
            small = _codes(8, count).to(torch.uint8)
            scales = inner[small.long()] * factors.repeat_interleave(256)[:count] + 0.25
            packed["weight.absmax"] = small
            packed["weight.nested_absmax"], packed["weight.nested_quant_map"] = factors, inner
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.25}
        else:
            packed["weight.absmax"] = scales
        packed["weight.quant_map"] = meanings
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        packed["weight.quant_state.bitsandbytes__nf4"] = text
        values = meanings[codes] * scales.repeat_interleave(64)
        return packed, values.view(outputs, inputs)


@dataclass(frozen=True, kw_only=True)
class Bnb8:
    """bitsandbytes in 8 bits."""

    config = property(lambda _: {"quant_method": "bitsandbytes", "load_in_8bit": True})

    def __call__(self, outputs: int, inputs: int) -> Packed:
        """Draw a matrix."""
        codes = (_codes(8, outputs, inputs) - 128).to(torch.int8)
        largest = torch.rand(outputs) * 0.4
        values = codes * largest[:, None] * (1 / 127)
        packed = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0).to(torch.uint8)}
        return packed, values


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    """Experts of gpt-oss."""

    config = property(
        lambda _: {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        }
    )

    def experts(self, count: int, outputs: int, inputs: int) -> Packed:
        """Draw the matrices of all experts; values are [experts, inputs, outputs]."""
        half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        meanings = torch.tensor([*half, *(-x for x in half)])
        codes = _codes(4, count, outputs, inputs // 32, 32)
        scales = torch.randint(121, 125, (count, outputs, inputs // 32)).to(torch.uint8)
        factors = torch.exp2(scales.float() - 127)
        values = (meanings[codes] * factors[..., None]).flatten(2).transpose(1, 2)
        blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        return {"_blocks": blocks, "_scales": scales}, values.contiguous()


def compressed_config(layout: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": dict(weights)}},
        "ignore": ["lm_head", r"re:.*\.gate$", r"re:.*router.*"],
    }


def save_quantized(
    folder: Path,
    family: str,
    draw: Callable[[int, int], Packed] | Mxfp4,
    *,
    keeps: Callable[[str], bool] = lambda _: False,
    also: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """Write a quantized model into ``folder``, and return transformers' model of its values.

    Parameters
    ----------
    draw
        Draws a matrix, [outputs, inputs].
    keeps
        Whether a tensor stays plain.
    also
        Modules that are quantized besides those that quantizers take, by the ends of their names.
    options
        Those of ``save_tiny_model``.
    """
    reference = folder.with_name(f"{folder.name}-values")
    save_tiny_model(reference, family, **options)
    plain = load_file(reference / "model.safetensors")
    stored: Tensors = {}
    transposed = family == "gpt2"
    for name, tensor in list(plain.items()):
        if keeps(name):
            stored[name] = tensor
        elif isinstance(draw, Mxfp4) and EXPERTS.fullmatch(name):
            count, inputs, outputs = tensor.shape
            parts, plain[name] = draw.experts(count, outputs, inputs)
            stored |= {name + end: part for end, part in parts.items()}
        elif not isinstance(draw, Mxfp4) and _is_taken(name, also) and tensor.dim() == 2:
            outputs, inputs = reversed(tensor.shape) if transposed else tensor.shape
            parts, values = draw(outputs, inputs)
            plain[name] = values.t().contiguous() if transposed else values
            module = name.removesuffix("weight")
            stored |= {module + end: part.clone() for end, part in parts.items()}
        else:
            stored[name] = tensor
    save_file(plain, reference / "model.safetensors", {"format": "pt"})
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((reference / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = draw.config  # type: ignore[union-attr]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(reference, attn_implementation="eager").eval()


def _is_taken(name: str, also: tuple[str, ...]) -> bool:
    ends = tuple(f"{module}.weight" for module in also)
    return QUANTIZED.fullmatch(name) is not None or name.endswith(ends)
