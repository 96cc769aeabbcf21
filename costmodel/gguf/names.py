"""Which rows of which tensors of a GGUF file make each of ours.

Names hardly depend on the architecture. Where files differ, the first of several ways is taken
that the file has all tensors of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from costmodel.gguf.metadata import ArchMetadata
from costmodel.gguf.model import GgufModel
from costmodel.gguf.rotary import DIVISORS
from costmodel.model.shapes import component_shapes, embedding_shapes, head_shapes
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_entry import TensorEntry, refuse_unread
from profiles.errors import InputError

# For each of our modules (see ``costmodel.model.shapes``), or for a whole tensor, the modules that
# are stacked to make it: one or more ways, the first that the file has counts.
_WAYS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "tokens": (("token_embd",),),
    "positions": (("position_embd",),),
    "embedding_norm": (("token_embd_norm",),),
    "final_norm": (("output_norm",),),
    "head": (("output",), ("token_embd",)),
    "attention_norm": (("attn_norm",),),
    "attention_output_norm": (("post_attention_norm",),),
    # gpt-oss names the norm before its experts after attention.
    "mlp_norm": (("ffn_norm",), ("post_attention_norm",)),
    "mlp_output_norm": (("post_ffw_norm",),),
    "qkv": (("attn_qkv",), ("attn_q", "attn_k", "attn_v")),
    "q_norm": (("attn_q_norm",),),
    "k_norm": (("attn_k_norm",),),
    "output": (("attn_output",),),
    # Phi 3 stores gate and up in one, in this order.
    "gate_up": (("ffn_gate", "ffn_up"), ("ffn_up",)),
    "up": (("ffn_up",),),
    "down": (("ffn_down",),),
    "router": (("ffn_gate_inp",),),
    "shared_gate": (("ffn_gate_inp_shexp",),),
    "shared_gate_up": (("ffn_gate_shexp", "ffn_up_shexp"),),
    "shared_down": (("ffn_down_shexp",),),
    "expert_gate_up": (("ffn_gate_up_exps",), ("ffn_gate_exps", "ffn_up_exps")),
    "expert_down": (("ffn_down_exps",),),
    "attention.sinks": (("attn_sinks.weight",),),
    "router.bias": (("ffn_gate_inp.bias",), ("exp_probs_b.bias",)),
}
# Modules outside of layers.
_OUTSIDE = ("tokens", "positions", "embedding_norm", "final_norm", "head")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Rows of a stored tensor: ``count`` from ``first`` on.

    A row is what the tensor's last dimension runs over, so a vector is one row.
    """

    entry: TensorEntry
    first: int
    count: int


def stored_rows(
    model: GgufModel, spec: ModelSpec, name: str, *, layer: int = 0, expert: int = 0
) -> tuple[StoredRows, ...]:
    """Return what is stacked to make one of our tensors.

    Parameters
    ----------
    name
        A name of ``costmodel.model.shapes``, such as ``qkv.weight``.
    layer, expert
        Numbers from zero; ignored for tensors outside of layers or experts.

    Returns
    -------
    tuple
        Rows of stored tensors, in the order of ours. Elements of a matrix are in order, too.

    Raises
    ------
    InputError
        Where a tensor is missing, or has another shape than the description says.
    """
    shape = _shapes(spec, layer)[name]
    experts = spec.layer(layer).num_experts if name.startswith("expert_") else 0
    entries = _entries(model, name, layer)
    elements = 0
    for entry in entries:
        outer, inner = entry.shape[:-1], entry.shape[-1]
        is_vector = len(shape) == 1
        if (experts and outer[:1] != (experts,)) or (not is_vector and inner != shape[-1]):
            raise _misshaped([entry], name, shape, experts)
        elements += math.prod(outer[1:] if experts else outer) * inner
    if elements != math.prod(shape):
        raise _misshaped(entries, name, shape, experts)
    rows = [math.prod(entry.shape[:-1]) // max(experts, 1) for entry in entries]
    return tuple(
        StoredRows(entry=entry, first=expert * count if experts else 0, count=count)
        for entry, count in zip(entries, rows, strict=True)
    )


def check_tensors(model: GgufModel, spec: ModelSpec) -> None:
    """Refuse a file whose tensors are others than those of its description.

    Raises
    ------
    InputError
        Where a tensor is missing, has another shape, or is not read: a computation without it is
        not that of the file.
    """
    read = set(DIVISORS)
    for name, layer in _our_tensors(spec):
        read |= {rows.entry.name for rows in stored_rows(model, spec, name, layer=layer)}
    count = ArchMetadata(model=model, name=spec.name).num_predicting()
    behind = range(spec.num_layers, spec.num_layers + count)
    unread = [n for n in model.tensors if n not in read and _layer_number(n) not in behind]
    refuse_unread(
        unread,
        source=f"GGUF file {spec.name}",
        description="metadata",
        hint="another conversion of the model",
    )


def _layer_number(name: str) -> int:
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def _our_tensors(spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """Yield the name and layer of each of our tensors, one expert for all."""
    for name in (*embedding_shapes(spec), *head_shapes(spec, spec.vocab_size, is_first=True)):
        yield name, 0
    for layer in range(spec.num_layers):
        for shapes, _ in component_shapes(spec, spec.layer(layer)).values():
            for name in shapes:
                yield name, layer


def _shapes(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    found = dict(embedding_shapes(spec))
    found |= head_shapes(spec, spec.vocab_size, is_first=True)
    for shapes, _ in component_shapes(spec, spec.layer(layer)).values():
        found |= shapes
    return found


def _entries(model: GgufModel, name: str, layer: int) -> list[TensorEntry]:
    """Return the stored tensors that one of ours is made of, those of all experts."""
    module, _, kind = name.rpartition(".")
    kind = kind.removeprefix("float32_")
    prefix = "" if module in _OUTSIDE else f"blk.{layer}."
    ways = _WAYS.get(name)
    if ways is None:
        ways = tuple(tuple(f"{part}.{kind}" for part in way) for way in _WAYS.get(module, ()))
    for way in ways:
        found = [model.tensors.get(prefix + part) for part in way]
        if all(found):
            return [entry for entry in found if entry is not None]
    told = " or ".join(" and ".join(prefix + part for part in way) for way in ways)
    raise InputError(
        "GGUF file",
        got=f"no tensor for {name} of layer {layer}" if prefix else f"no tensor for {name}",
        allowed=told or "a model without it",
        hint="another conversion of the model",
    )


def _misshaped(
    entries: list[TensorEntry], name: str, shape: tuple[int, ...], experts: int
) -> InputError:
    told = f"{list(shape)} in all for {name}"
    return InputError(
        f"{' and '.join(entry.name for entry in entries)} of {entries[0].path.name}",
        got=f"a shape of {' and '.join(str(list(entry.shape)) for entry in entries)}",
        allowed=f"{told} of each of {experts} experts" if experts else told,
    )
