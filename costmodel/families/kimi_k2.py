"""Kimi K2: DeepSeek V3 under another name. transformers has no class of this name."""

from __future__ import annotations

from costmodel.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = DEEPSEEK_V3
