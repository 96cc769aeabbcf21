"""What GGUF files store in another way than transformers' checkpoints, told in the description."""

from __future__ import annotations

from dataclasses import replace

from costmodel.gguf.archs import Arch
from costmodel.gguf.model import GgufModel
from costmodel.gguf.rotary import freq_divisors
from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.feed_forward_spec import MlpSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.norm_spec import NormSpec
from costmodel.model.spec import ModelSpec


def as_stored(spec: ModelSpec, model: GgufModel, arch: Arch) -> ModelSpec:
    """Replace in a description what the file stores in another way than transformers.

    Biases are those that the file has. Pairs of a rotation, weights of norms and divisors of the
    frequencies are as the converter left them.
    """
    divisors = freq_divisors(model, spec)
    kinds = []
    for number, kind in enumerate(spec.layer_kinds):
        prefix = f"blk.{spec.layer_order.index(number)}."
        present = {n.removeprefix(prefix) for n in model.tensors if n.startswith(prefix)}
        kinds.append(_layer_as_stored(kind, present, arch, divisors, spec))
    return replace(
        spec,
        layer_kinds=tuple(kinds),
        final_norm=_norm_as_stored(spec.final_norm, arch),
        head=replace(spec.head, has_bias="output.bias" in model.tensors),
    )


def _layer_as_stored(
    layer: LayerSpec,
    present: set[str],
    arch: Arch,
    divisors: tuple[float, ...],
    spec: ModelSpec,
) -> LayerSpec:
    attention = _attention_as_stored(layer.attention, present, arch)
    rotary = attention.rotary
    if rotary is not None:
        rotary = replace(rotary, is_interleaved=arch.is_interleaved)
        if divisors:
            # Both lists are the same, so that no length of a context changes the rotation.
            rotary = replace(
                rotary,
                kind="longrope",
                short_factors=divisors,
                long_factors=divisors,
                original_max_positions=float(spec.max_positions),
            )
        attention = replace(attention, rotary=rotary)
    return replace(
        layer,
        attention=attention,
        mlp=None if layer.mlp is None else _mlp_as_stored(layer.mlp, present),
        norm=_norm_as_stored(layer.norm, arch),
    )


def _attention_as_stored(attention: AttentionSpec, present: set[str], arch: Arch) -> AttentionSpec:
    norm = attention.qk_norm_spec
    return replace(
        attention,
        qkv_bias=bool(present & {"attn_qkv.bias", "attn_q.bias"}),
        output_bias="attn_output.bias" in present,
        qk_norm_spec=None if norm is None else _norm_as_stored(norm, arch),
    )


def _mlp_as_stored(mlp: MlpSpec, present: set[str]) -> MlpSpec:
    return replace(mlp, has_bias="ffn_up.bias" in present)


def _norm_as_stored(norm: NormSpec, arch: Arch) -> NormSpec:
    return replace(norm, adds_one=False) if arch.has_added_one else norm
