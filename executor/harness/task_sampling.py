"""How a task of lm-evaluation-harness wants its tokens chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from executor.model.generation_config import (
    DRAW_DEFAULTS,
    HARMLESS,
    NOT_FOLLOWED,
    GenerationConfig,
)
from executor.model.sampling import Sampler
from profiles.errors import InputError

# What the harness reads itself.
OF_THE_HARNESS = ("until", "max_gen_toks", "do_sample")
FOLLOWED = (*DRAW_DEFAULTS, "repetition_penalty", "seed")


def make_sampler(options: Mapping[str, Any], config: GenerationConfig, vocab_size: int) -> Sampler:
    """Put a task's ``generation_kwargs`` and a checkpoint's settings together; a task's count.

    Raises
    ------
    InputError
        On an option that would change the tokens and is not followed.
    """
    for name, value in options.items():
        is_idle = name in HARMLESS or value is None or value in NOT_FOLLOWED.get(name, ())
        if not is_idle and name not in (*OF_THE_HARNESS, *FOLLOWED):
            raise InputError(f"generation_kwargs {name}", got=value, allowed=", ".join(FOLLOWED))
        if name in FOLLOWED and not isinstance(value, int | float):
            raise InputError(f"generation_kwargs {name}", got=repr(value), allowed="a number")
    processors = config.processors(vocab_size)
    if "repetition_penalty" in options:
        processors = replace(processors, repetition_penalty=float(options["repetition_penalty"]))
    seed = int(options.get("seed", 0))
    if not options["do_sample"] or options.get("temperature") == 0:
        return Sampler(seed=seed, processors=processors)
    limits = {
        name: options.get(name, config.number(name, default))
        for name, default in DRAW_DEFAULTS.items()
    }
    return Sampler(**limits, seed=seed, processors=processors)
