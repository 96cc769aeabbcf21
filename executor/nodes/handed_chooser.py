"""The choice of tokens for requests that are handed out while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from executor.jobs.endings import RowChooser
from executor.nodes.share import Handed
from executor.text.loading import load_tokenizer


def handed_chooser(model: Path, held: Mapping[int, Handed]) -> RowChooser:
    """Return what chooses the tokens of the requests in ``held``, which come and go by number.

    The tokenizer of ``model`` is loaded when a request with stop strings comes.
    """
    tokenizer = cache(lambda: load_tokenizer(model))
    return RowChooser(
        lambda request: held[request].params,
        lambda request: held[request].identity,
        lambda ids: tokenizer().decode(ids),
    )
