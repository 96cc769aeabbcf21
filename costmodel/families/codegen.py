"""CodeGen: GPT-J with queries, keys and values stored together."""

from __future__ import annotations

from costmodel.families._plain import GPT2_ALIASES
from costmodel.families.gptj import GPTJ_DEFAULTS, GPTJ_MODULES, gptj_decoder
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.spec import ModelSpec

# Parts of the stored projection, one for each of the machines that it was trained on.
NUM_PARTS = 4


def _describe(config: HFConfig) -> ModelSpec:
    width = config.whole("hidden_size")
    if width % NUM_PARTS:
        raise config.refusal("n_embd", width, f"a multiple of {NUM_PARTS}")
    return gptj_decoder(config)


def _parts(layer: LayerSpec) -> list[tuple[int, int]]:
    """Return the blocks of rows: each part has queries, then values, then keys."""
    size = layer.attention.query_size // NUM_PARTS
    return [((3 * part + place) * size, size) for place in (0, 2, 1) for part in range(NUM_PARTS)]


FAMILY = Family(
    defaults=GPTJ_DEFAULTS,
    aliases=GPT2_ALIASES,
    describe=_describe,
    modules={**GPTJ_MODULES, "qkv": ("h.{layer}.attn.qkv_proj",)},
    row_blocks={"qkv": _parts},
    prefix="transformer.",
    # The mask, as old versions saved it.
    unread=(r".*\.attn\.causal_mask",),
    tokenizer_class="GPT2Tokenizer",
)
