"""Rounds in which systems run one after the other, each with the setting that serves it best."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from memory_cgroup import Ended
from workload_run import TIMEOUT_S, say

# While settings are compared, a run that takes so much longer than the best is ended.
PATIENCE = 1.5
SPEEDS = ("prefill_s", "decode_s", "process_s")
# Names of figures that differ between rounds end so; others say what was run.
MEASURED = ("_s", "_bytes", "attainment")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One run; ``figures`` is empty where it did not reach its end."""

    ended: Ended
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> str:
        """How it ended, in words."""
        if self.ended.is_good:
            return "ended" if self.figures else f"told no figures: {self.ended.last_words}"
        if self.ended.status is None:
            return "took too long"
        if self.ended.was_killed_for_memory:
            return "was killed for memory"
        return f"ended with status {self.ended.status}: {self.ended.last_words}"


class System(Protocol):
    """One side of the benchmark."""

    @property
    def name(self) -> str:
        """What it is called on the command line and in the result."""

    def why_not(self) -> str | None:
        """Say why it cannot do this workload, or ``None``."""

    def prepare(self) -> None:
        """Make what it needs before the first round, outside the limit."""

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """List what a user might set; the first round finds the best."""

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Run the workload once under the limit."""

    def version(self) -> str:
        """Say which version ran."""


@dataclass(slots=True, kw_only=True)
class Contender:
    """A system and what it has done so far."""

    system: System
    # The longest run, and the longest one while settings are compared; ``None``: by the best.
    limit_s: float = TIMEOUT_S
    trial_s: float | None = None
    skipped: str | None = None
    setting: Mapping[str, Any] | None = None
    tried: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def prepare(self) -> None:
        """Find out whether it can run at all, and make what it needs."""
        self.skipped = self.system.why_not()
        if self.skipped is None:
            self.system.prepare()
        else:
            say(f"skipping {self.system.name}: {self.skipped}")

    def run_round(self) -> None:
        """Run once, or in the first round with every setting, of which the fastest counts."""
        if self.skipped is not None:
            return
        if self.setting is None:
            self._search()
            return
        attempt = self._attempt(self.setting, self.limit_s)
        self.rounds.append({"outcome": attempt.outcome, **attempt.figures})

    def _search(self) -> None:
        best: Attempt | None = None
        settings = self.system.settings()
        is_trial = self.trial_s is not None and len(settings) > 1
        for setting in settings:
            timeout_s = PATIENCE * best.ended.wall_s if best else self.limit_s
            if self.trial_s is not None and is_trial:
                timeout_s = self.trial_s
            attempt = self._attempt(setting, timeout_s)
            rate = attempt.figures.get("tok_per_s")
            self.tried.append({**setting, "outcome": attempt.outcome, "tok_per_s": rate})
            if rate is not None and (best is None or rate > best.figures["tok_per_s"]):
                best, self.setting = attempt, setting
        if best is None:
            outcomes = "; ".join(tried["outcome"] for tried in self.tried)
            self.skipped = f"did not reach its end with any setting: {outcomes}"
            say(f"{self.system.name} {self.skipped}")
        elif is_trial:
            self.run_round()
        else:
            self.rounds.append({"outcome": best.outcome, **best.figures})

    def _attempt(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        shown = ", ".join(f"{name} {value}" for name, value in setting.items())
        say(f"running {self.system.name}" + (f" with {shown}" if shown else ""))
        attempt = self.system.run(setting, timeout_s)
        rate = attempt.figures.get("tok_per_s")
        say(f"  {attempt.outcome}" + ("" if rate is None else f": {rate:.3g} token/s"))
        return attempt

    @property
    def failures(self) -> list[str]:
        """What went wrong in rounds that ran; a system that was left out has none."""
        return [each["outcome"] for each in self.rounds if each["outcome"] != "ended"]

    @property
    def medians(self) -> dict[str, float]:
        """Median of every figure over the rounds that reached their end."""
        ended = [each for each in self.rounds if each["outcome"] == "ended"]
        if not ended:
            return {}
        return {
            name: statistics.median(each[name] for each in ended)
            for name, value in ended[0].items()
            if name.endswith(MEASURED) and isinstance(value, int | float)
        }

    def as_json(self) -> dict[str, Any]:
        """Return the medians and all single figures."""
        if self.skipped is not None:
            return {"skipped": self.skipped, "tried": self.tried}
        return {
            "version": self.system.version(),
            "setting": dict(self.setting or {}),
            "tried": self.tried,
            "median": self.medians,
            "rounds": self.rounds,
        }


def speedups(ours: Mapping[str, float], peer: Mapping[str, float]) -> dict[str, float]:
    """Return ratios of medians, above 1 where ours is faster."""
    ratios = {"tok_per_s": ours["tok_per_s"] / peer["tok_per_s"]}
    return ratios | {name: peer[name] / ours[name] for name in SPEEDS}
