"""Processes of a job that are killed, and a script that kills them at 50 random times.

``python -m tests.executor.killed_jobs --model DIR --prompts FILE --output FILE --policy FILE`` runs
a job to its end with ``--resume``, and once without a kill. It compares the answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from executor import generate
from executor.engine.channels import Engine

# Its processes are copies of one that has imported everything.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def run_until(arguments: Sequence[str], num_events: int | None) -> int:
    """Run a job in a process that is killed at some event; returns its exit status.

    Events are the tasks of the run, and what is written and synced of answers and journal. So the
    moments are random, and the same on every machine. ``None`` kills nothing.
    """
    process = CONTEXT.Process(target=_run, args=(list(arguments), num_events))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(arguments: list[str], num_events: int | None) -> None:
    left = num_events

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **named: Any) -> Any:
            nonlocal left
            if left is not None:
                left -= 1
                if left <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        return called

    Engine.submit = counted(Engine.submit)  # type: ignore[method-assign]
    for name in ("write", "fsync", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        generate.main(arguments)


def answers_of(path: Path) -> list[str]:
    """Return the answers of a job without the time at which it began."""
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    for each in answers:
        each.get("response", {}).get("body", {}).pop("created", None)
    return [json.dumps(each) for each in answers]


def main() -> None:
    """Kill a job 50 times, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    flags, rest = parser.parse_known_args()
    undisturbed = flags.output.with_suffix(".undisturbed")
    command = [sys.executable, "-m", "executor.generate", *rest]
    start_s = time.perf_counter()
    process = subprocess.Popen([*command, f"--output={undisturbed}"], stdout=subprocess.DEVNULL)
    first_s = None
    while process.poll() is None:
        if first_s is None and undisturbed.exists() and undisturbed.stat().st_size:
            first_s = time.perf_counter() - start_s
        time.sleep(0.01)
    whole_s = time.perf_counter() - start_s
    assert process.returncode == 0 and first_s is not None
    draws, num_killed = random.Random(flags.seed), 0
    command += [f"--output={flags.output}", "--resume"]
    while num_killed < flags.kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            # One in five is killed before its first answer; the others answer a few lines.
            late_s = draws.uniform(0, 3 * (whole_s - first_s) / flags.kills)
            is_early = draws.random() < 0.2
            process.wait(timeout=draws.uniform(0, first_s) if is_early else first_s + late_s)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            num_killed += 1
            count = flags.output.read_bytes().count(b"\n") if flags.output.exists() else 0
            print(f"killed {num_killed} times, {count} answers", flush=True)
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    found, expected = sorted(answers_of(flags.output)), sorted(answers_of(undisturbed))
    same = sum(a == b for a, b in zip(found, expected, strict=False))
    print(f"{len(found)} answers for {len(expected)}, {same} equal to those of an undisturbed run")
    sys.exit(found != expected)


if __name__ == "__main__":
    main()
