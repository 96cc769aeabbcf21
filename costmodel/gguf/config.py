"""The description of a model in GGUF, through the config that its family reads.

The metadata of a file become the ``config.json`` of a family. What a file stores in another way
than transformers' checkpoints is then replaced in the description, so that no row of a file has to
move: see ``costmodel.gguf.stored``.
"""

from __future__ import annotations

from typing import Any

from costmodel.families import spec_from_config
from costmodel.gguf.archs import ARCHS, COMMON_KEYS, OPTIONAL, Arch
from costmodel.gguf.metadata import PREDICTING_LAYERS, ArchMetadata
from costmodel.gguf.model import GgufModel
from costmodel.gguf.names import check_tensors
from costmodel.gguf.rotary import rope_parameters
from costmodel.gguf.stored import as_stored
from costmodel.model.spec import MAX_LAYERS, ModelSpec
from profiles.errors import InputError

# Keys that are read in a place of their own, or that change nothing.
READ = (
    "vocab_size",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    PREDICTING_LAYERS,
)
# Keys of any architecture that change the computation, with the values that are supported.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0,),
}


def arch_of(model: GgufModel, name: str) -> Arch:
    """Return what is known of a file's architecture, or refuse it."""
    kind = model.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise InputError(f"general.type of {name}", got=repr(kind), allowed="model")
    arch = ArchMetadata(model=model, name=name).arch
    if arch not in ARCHS:
        raise InputError(
            f"architecture of {name}", got=f"{arch!r}", allowed=", ".join(sorted(ARCHS))
        )
    return ARCHS[arch]


def config_from_gguf(model: GgufModel, name: str) -> dict[str, Any]:
    """Return the metadata of a file as the ``config.json`` of a family.

    Parameters
    ----------
    name
        The model's name in messages.

    Raises
    ------
    InputError
        For an architecture that is not read, or a key that would change the computation.
    """
    arch, found = arch_of(model, name), ArchMetadata(model=model, name=name)
    _check_keys(arch, found)
    if found.whole("block_count") > MAX_LAYERS:
        # Lists of layers are made below.
        raise found.refusal("block_count", f"at most {MAX_LAYERS}")
    family = _family(arch, found)
    config: dict[str, Any] = {"model_type": family, **arch.implied}
    for key, common in {**COMMON_KEYS, **arch.keys}.items():
        if (value := found.get(key)) is not None:
            config[common] = value
    # As in llama.cpp, each query head has a key head of its own where nothing else is said.
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    head_dim = _head_dim(found)
    config |= {
        "num_hidden_layers": found.whole("block_count") - found.num_predicting(),
        "vocab_size": _vocab_size(model, name),
        "head_dim": head_dim,
        "rope_parameters": rope_parameters(arch, found, family),
        arch.share_key: found.whole("rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in model.tensors,
    }
    for flag, (tensor, is_set) in arch.flags.items():
        config[flag] = (f"blk.0.{tensor}" in model.tensors) == is_set
    return config | _windows(found, config) | _gemma_scale(found, config)


def spec_from_gguf(model: GgufModel, name: str) -> ModelSpec:
    """Return the description of a model in GGUF.

    Raises
    ------
    InputError
        See ``config_from_gguf`` and ``costmodel.families.spec_from_config``; and where the tensors
        are others than those of the description.
    """
    spec = spec_from_config(config_from_gguf(model, name), name=name)
    spec = as_stored(spec, model, arch_of(model, name))
    check_tensors(model, spec)
    return spec


def _check_keys(arch: Arch, found: ArchMetadata) -> None:
    """Refuse keys that may change the computation and are not followed, and missing ones."""
    names = {**COMMON_KEYS, **arch.keys}
    needed = {key for key, common in names.items() if common not in arch.implied}
    needed.difference_update(OPTIONAL)
    if found.get("expert_count"):
        needed.add("expert_used_count")
    for key in sorted(needed):
        if found.get(key) is None:
            raise found.refusal(key, "a value", "another conversion of the model")
    known = {*COMMON_KEYS, *arch.keys, *arch.rope_keys, *READ, *arch.unread}
    fixed = {k: v for k, v in FIXED.items() if k not in arch.keys} | dict(arch.fixed)
    for key in found:
        value = found.get(key)
        if key in fixed and value not in fixed[key]:
            raise found.refusal(key, " or ".join(str(v) for v in fixed[key]))
        is_set = value not in (None, 0, False, "", [])
        if key not in known and key not in fixed and is_set:
            raise found.refusal(key, "no such key", "another conversion of the model")


def _family(arch: Arch, found: ArchMetadata) -> str:
    for key, family in arch.variants.items():
        value = found.get(key)
        if isinstance(value, int | float) and value > 0:
            return family
    return arch.family


def _vocab_size(model: GgufModel, name: str) -> int:
    table = model.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        got = "none" if table is None else f"a shape of {list(table.shape)}"
        raise InputError(f"token_embd.weight of {name}", got=got, allowed="[tokens, hidden size]")
    return table.shape[0]


def _head_dim(found: ArchMetadata) -> int:
    heads = found.whole("attention.head_count")
    equal = max(found.whole("embedding_length") // heads, 1)
    head_dim = found.whole("attention.key_length", equal)
    if found.whole("attention.value_length", equal) != head_dim:
        raise found.refusal("attention.value_length", f"{head_dim}, as attention.key_length")
    return head_dim


def _windows(found: ArchMetadata, config: dict[str, Any]) -> dict[str, Any]:
    """Read which layers have a window: a flag for each, or the period of the layers without one."""
    count = config["num_hidden_layers"]
    if "sliding_window" not in config:
        return {}
    if not config["sliding_window"]:
        # llama.cpp takes 0 for a model without windows.
        return {"sliding_window": None, "layer_types": ["full_attention"] * count}
    pattern = found.get("attention.sliding_window_pattern")
    if pattern is None:
        return {}
    if isinstance(pattern, bool):
        pattern = [pattern] * count
    elif type(pattern) is int and pattern >= 0:
        # A period of 0 gives all layers a window.
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(count)]
    if not isinstance(pattern, list) or len(pattern) != count:
        raise found.refusal("attention.sliding_window_pattern", f"a period, or {count} flags")
    kinds = ["sliding_attention" if has_window else "full_attention" for has_window in pattern]
    return {"layer_types": kinds}


def _gemma_scale(found: ArchMetadata, config: dict[str, Any]) -> dict[str, Any]:
    """Return what the scores of Gemma 2 and 3 are scaled by, which their files leave unsaid."""
    largest = {"gemma2": 46, "gemma3": 62}.get(found.arch)
    if largest is None:
        return {}
    # The models with 27 billion parameters.
    if found.get("block_count") == largest:
        equal = found.whole("embedding_length") // found.whole("attention.head_count")
        return {"query_pre_attn_scalar": equal}
    return {"query_pre_attn_scalar": config["head_dim"]}
