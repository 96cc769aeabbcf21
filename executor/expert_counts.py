"""How often each expert was chosen before, kept by checkpoint beside this machine's profile.

Runs are counted in two halves in turn. The experts that are most used in one half are looked up in
the other. So chance, and the text of one run, do not pass for a habit of the router.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from costmodel.model.expert_use import skew_of
from costmodel.model.feed_forward_spec import ExpertsSpec
from costmodel.model.spec import ModelSpec
from executor.checkpoint.folder import WeightSource
from profiles.cache_folder import cache_folder
from profiles.errors import InputError, ZigzagError
from profiles.files import read_json
from profiles.whole_file import write_whole

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]
# For each layer with experts, the choices of each expert.
Counts = list[IntArray]

VERSION = 1
LONGEST_NAME = 120
# Choices of a layer's experts that a half keeps; beyond them the older ones count half.
MOST_CHOICES = 10_000_000


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """The choices of earlier runs, in two halves."""

    halves: tuple[Counts, Counts]

    def shares(self, model: ModelSpec) -> list[NDArray[np.float64]]:
        """Return the share of all tokens that chose each expert, float64 [experts], for each layer
        that has experts."""
        sums = [first + second for first, second in zip(*self.halves, strict=True)]
        return [
            counts * experts.experts_per_token / max(1, counts.sum())
            for experts, counts in zip(mixtures_of(model), sums, strict=True)
        ]

    def skew(self, model: ModelSpec) -> float:
        """Return the skew of Zipf's law that describes the routing (see ``skew_of``).

        It is that of the kind of layers with the least. It is zero until both halves have counts.
        """
        kinds: dict[ExpertsSpec, list[NDArray[np.float64]]] = {}
        for experts, first, second in zip(mixtures_of(model), *self.halves, strict=True):
            if not first.sum() or not second.sum():
                return 0.0
            for ranked, counted in ((first, second), (second, first)):
                shares = counted[np.argsort(-ranked, kind="stable")] / counted.sum()
                kinds.setdefault(experts, []).append(shares * experts.experts_per_token)
        means = {experts: np.mean(shares, axis=0) for experts, shares in kinds.items()}
        skews = (skew_of(mean, e.experts_per_token) for e, mean in means.items())
        return min(skews, default=0.0)


def mixtures_of(model: ModelSpec) -> list[ExpertsSpec]:
    """Return the experts of each layer that has any."""
    layers = (model.layer(number) for number in range(model.num_layers))
    return [layer.experts for layer in layers if layer.experts is not None]


def kept_counts(source: WeightSource) -> ExpertCounts | None:
    """Return the choices of earlier runs of a checkpoint; ``None`` where there are none."""
    path = counts_path(source) if mixtures_of(source.spec) else None
    return _read(path, source.spec) if path is not None and path.exists() else None


def kept_skew(source: WeightSource) -> float:
    """Return the skew that earlier runs of a checkpoint have shown, 0 without any."""
    counts = kept_counts(source)
    return counts.skew(source.spec) if counts else 0.0


def record_counts(source: WeightSource, counts: Sequence[IntArray]) -> None:
    """Keep the choices of a run for later ones. Only warns where that is not possible.

    Parameters
    ----------
    counts
        The choices of each expert, int64 [experts], for each layer that has experts.
    """
    if not sum(int(each.sum()) for each in counts):
        return
    try:
        path = counts_path(source)
        if path is None:
            return
        kept = _read(path, source.spec) if path.exists() else None
        nothing = [np.zeros_like(each) for each in counts]
        halves = kept.halves if kept else (nothing, nothing)
        fewest = min((0, 1), key=lambda half: int(halves[half][0].sum()))
        sums = [_bounded(old + new) for old, new in zip(halves[fewest], counts, strict=True)]
        raw = {
            "version": VERSION,
            "halves": [
                [each.tolist() for each in (sums if half == fewest else halves[half])]
                for half in (0, 1)
            ],
        }
        write_whole(path, partial(json.dump, raw))
    except (OSError, ZigzagError) as error:
        # The run itself is done.
        logger.warning("the counts of experts were not kept: %s", error)


def counts_path(source: WeightSource) -> Path | None:
    """Return where the choices of a checkpoint are kept, or will be; ``None`` for nowhere."""
    folder = cache_folder()
    if folder is None:
        return None
    key = hashlib.sha256(f"{source.fingerprint} {source.spec.stage}".encode()).hexdigest()[:16]
    name = re.sub(r"[^\w.+-]+", "-", source.spec.name)[:LONGEST_NAME]
    return folder / f"experts-{name}-{key}.json"


def _bounded(counts: IntArray) -> IntArray:
    while counts.sum() > MOST_CHOICES:
        counts = counts // 2
    return counts


def _read(path: Path, model: ModelSpec) -> ExpertCounts | None:
    """Read a file; one that is broken counts as none, and is told."""
    try:
        raw = read_json(path, "counts of experts")
        if raw.get("version") != VERSION:
            raise InputError(f"{path}", got=f"version {raw.get('version')}", allowed=str(VERSION))
        first, second = ([np.array(each, np.int64) for each in half] for half in raw["halves"])
        shapes = [(experts.num_experts,) for experts in mixtures_of(model)]
        for half in (first, second):
            if [each.shape for each in half] != shapes or any((each < 0).any() for each in half):
                raise ValueError("other experts than the model's")
        return ExpertCounts((first, second))
    except InputError as error:
        logger.warning("the counts of experts are not used: %s", error)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        logger.warning("the counts of experts are not used: %s: %r", path, error)
    return None
