"""MiMo 7B: Qwen 2 with layers that predict further tokens, which are left out.

transformers has no class of this name.
"""

from __future__ import annotations

from costmodel.families.qwen2 import FAMILY as QWEN2
from costmodel.model.family import ROTARY_BUFFERS, Family

FAMILY = Family(
    defaults=QWEN2.defaults,
    describe=QWEN2.describe,
    modules=QWEN2.modules,
    unread=(ROTARY_BUFFERS, r"model\.mtp_layers\..*"),
)
