"""Granite 3 with experts: the chosen logits alone are scored."""

from __future__ import annotations

from costmodel.families._granite_moe import (
    GRANITE_MOE_DEFAULTS,
    GRANITE_MOE_MODULES,
    GRANITE_MOE_STACKED,
    granite_moe,
)
from costmodel.model.family import Family

FAMILY = Family(
    defaults=GRANITE_MOE_DEFAULTS,
    describe=granite_moe,
    modules=GRANITE_MOE_MODULES,
    stacked=GRANITE_MOE_STACKED,
    fixes_tokenizer_class=True,
)
