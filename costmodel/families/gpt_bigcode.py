"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one key head."""

from __future__ import annotations

from costmodel.families._plain import GPT2_ALIASES, GPT2_DEFAULTS, GPT2_MODULES, gpt2_decoder
from costmodel.families._shared import heads_in_groups, require
from costmodel.model.family import Family
from costmodel.model.hf_config import HFConfig
from costmodel.model.spec import ModelSpec


def _describe(config: HFConfig) -> ModelSpec:
    require(config, add_cross_attention=False)
    return gpt2_decoder(config, has_one_kv_head=config.flag("multi_query"), dtype="bfloat16")


FAMILY = Family(
    defaults={
        **GPT2_DEFAULTS,
        "activation_function": "gelu_pytorch_tanh",
        "multi_query": True,
    },
    aliases=GPT2_ALIASES,
    describe=_describe,
    modules=GPT2_MODULES,
    row_blocks={"qkv": heads_in_groups},
    prefix="transformer.",
    # The mask, as old versions saved it.
    unread=(r".*\.attn\.bias", r"(transformer\.)?bias"),
    fixes_tokenizer_class=True,
)
