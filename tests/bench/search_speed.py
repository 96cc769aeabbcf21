"""Our search against FlexGen's ``cost_model.py``: one workload and machine, wall clock.

FlexGen's optimizer is in PyPI's package ``flexgen`` 0.1.8, which asks for torch and transformers.
Install it beside this project, or keep it apart and name that environment's Python::

    python -m venv flexgen-venv
    flexgen-venv/bin/pip install flexgen==0.1.8
    python tests/bench/search_speed.py --flexgen-python flexgen-venv/bin/python

It is run unmodified on the same memory, in whole GiB rounded down, with its defaults: constants of
the same T4 machine, and a fifth of every memory left free. It knows only OPT: Llama-3.1-405B is put
beside its run for OPT-175B. Each round runs ours, theirs, ours, theirs, so that noise hits both. A
table goes to stdout, progress to stderr; the figures are printed, never judged.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from workload_run import BenchParser, circumstances

from costmodel.model.loading import load_model_spec
from costmodel.optimizer.optimum import search
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import capacities
from profiles.command import run
from profiles.errors import InputError, RunError
from profiles.files import write_json
from profiles.recorded import recorded_profile
from profiles.units import GIB

ROOT = Path(__file__).resolve().parents[2]
MACHINE = "t4-flexgen"
PROMPT_LEN, GEN_LEN = 512, 32
# Our preset, and the model for which FlexGen's optimizer is run beside it.
PAIRS = {"opt-30b": "opt-30b", "opt-175b": "opt-175b", "llama-3.1-405b": "opt-175b"}
FLEXGEN = "experimental.cost_model"
PROBE = (
    f"import {FLEXGEN}, json; from importlib.metadata import version;"
    "print(json.dumps({name: version(name) for name in"
    " ('flexgen', 'pulp', 'numpy', 'torch', 'transformers')}))"
)
FLEXGEN_VERSION = "0.1.8"
TIMEOUT_S = 600


def main(arguments: list[str]) -> None:
    """Time both, print the table."""
    flags = _parser().parse_args(arguments)
    if flags.rounds < 1:
        raise InputError("--rounds", got=flags.rounds, allowed="1 or more")
    with tempfile.TemporaryDirectory(prefix="zigzag-bench-") as name:
        result = compare(_find_python(flags.flexgen_python), flags.rounds, Path(name))
    if flags.result is not None:
        flags.result.parent.mkdir(parents=True, exist_ok=True)
        write_json(flags.result, result)
    print(format_table(result))


def _parser() -> BenchParser:
    parser = BenchParser(
        "search_speed.py",
        description=(__doc__ or "").partition("\n")[0],
        example="--flexgen-python flexgen/bin/python --result tests/bench/results/search.json",
    )
    add = parser.add_argument
    add(
        "--flexgen-python",
        default=sys.executable,
        metavar="PATH",
        help=f"a Python that has flexgen {FLEXGEN_VERSION}; default: this one",
    )
    add("--rounds", type=int, default=3, help="runs of each, of which the median counts (3)")
    return parser


def _find_python(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise InputError("--flexgen-python", got=name, allowed="a Python that can be run")
    # Links are kept: the Python of a virtual environment is one.
    return str(Path(found).absolute())


def compare(flexgen_python: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Time every side ``rounds`` times, and put the medians side by side."""
    # The first import reads cold files and writes bytecode, so that it is left out of the times.
    _say("importing both once")
    versions = _probe_flexgen(flexgen_python, folder)
    _time_process(_our_command("opt-30b", folder), ROOT)
    in_process = {preset: _median(_time_searches(preset, rounds)) for preset in PAIRS}
    ours: dict[str, list[float]] = {preset: [] for preset in PAIRS}
    theirs: dict[str, list[float]] = {model: [] for model in PAIRS.values()}
    imports: list[float] = []
    for index in range(rounds):
        _say(f"round {index + 1} of {rounds}")
        imports.append(_time_process([flexgen_python, "-c", f"import {FLEXGEN}"], folder))
        for preset, model in PAIRS.items():
            ours[preset].append(_time_process(_our_command(preset, folder), ROOT))
            if len(theirs[model]) == index:
                theirs[model].append(_time_process(_their_command(flexgen_python, model), folder))
    models = {
        preset: {
            "ours_in_process_s": in_process[preset],
            "ours_process_s": _median(ours[preset]),
            "flexgen_process_s": _median(theirs[model]),
            "flexgen_model": model,
            "ratio": _median(ours[preset])["median"] / _median(theirs[model])["median"],
        }
        for preset, model in PAIRS.items()
    }
    return {
        "benchmark": "time to find a policy",
        "workload": {"hardware": MACHINE, "prompt_len": PROMPT_LEN, "gen_len": GEN_LEN},
        "rounds": rounds,
        # ratio: of ours_process_s to flexgen_process_s, medians.
        "models": models,
        # Part of flexgen_process_s: mostly torch and transformers, which ours never imports.
        "flexgen_import_s": _median(imports),
        "flexgen_versions": versions,
        **circumstances("search_speed.py", sys.argv[1:], "highspy", "numpy"),
    }


def _time_searches(preset: str, rounds: int) -> list[float]:
    hardware, model = recorded_profile(MACHINE), load_model_spec(preset)
    workload = Workload(prompt_len=PROMPT_LEN, gen_len=GEN_LEN)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        search(hardware, model, workload)
        seconds.append(time.perf_counter() - start)
    return seconds


def _our_command(preset: str, folder: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "costmodel.search",
        "--hardware",
        MACHINE,
        "--model",
        preset,
        "--prompt-len",
        str(PROMPT_LEN),
        "--gen-len",
        str(GEN_LEN),
        "--output",
        str(folder / "policy.json"),
    ]


def _their_command(python: str, model: str) -> list[str]:
    memory = {tier: str(int(c // GIB)) for tier, c in capacities(recorded_profile(MACHINE)).items()}
    return [
        python,
        "-m",
        FLEXGEN,
        "--model",
        f"facebook/{model}",
        "--prompt-len",
        str(PROMPT_LEN),
        "--gen-len",
        str(GEN_LEN),
        "--gpu-mem",
        memory["gpu"],
        "--cpu-mem",
        memory["cpu"],
        "--nvme-mem",
        memory["disk"],
    ]


def _probe_flexgen(python: str, folder: Path) -> dict[str, str]:
    """Import FlexGen's optimizer once; return the versions of what it runs on."""
    try:
        versions: dict[str, str] = json.loads(_run([python, "-c", PROBE], folder))
    except RunError as error:
        raise RunError(
            f"{python} cannot import {FLEXGEN} ({str(error).rpartition(': ')[2]}); try: {python}"
            f" -m pip install flexgen=={FLEXGEN_VERSION}, or another --flexgen-python"
        ) from error
    if versions["flexgen"] != FLEXGEN_VERSION:
        raise InputError("flexgen", got=versions["flexgen"], allowed=FLEXGEN_VERSION)
    return versions


def _time_process(command: Sequence[str], folder: Path) -> float:
    start = time.perf_counter()
    _run(command, folder)
    return time.perf_counter() - start


def _run(command: Sequence[str], folder: Path) -> str:
    """Run to the end; return the last line of stdout."""
    try:
        ended = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{shlex.join(command)} took more than {TIMEOUT_S} s") from error
    if ended.returncode:
        reason = ended.stderr.rstrip().rpartition("\n")[2] or "no message"
        raise RunError(f"{shlex.join(command)} ended with status {ended.returncode}: {reason}")
    return ended.stdout.rstrip("\n").rpartition("\n")[2]


def _median(seconds: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(seconds), "runs": list(seconds)}


def format_table(result: Mapping[str, Any]) -> str:
    """Format one row per model, in seconds, and what was compared with what."""
    titles = ("model", "ours in process", "ours whole", "FlexGen whole", "ours / FlexGen")
    lines = ["{:<16}{:>17}{:>14}{:>16}{:>17}".format(*titles)]
    notes = []
    for preset, row in result["models"].items():
        is_other = row["flexgen_model"] != preset
        if is_other:
            notes.append(
                f"* FlexGen's optimizer knows only OPT: {preset} is put beside its run for"
                f" {row['flexgen_model']}"
            )
        seconds = [
            row[key]["median"]
            for key in ("ours_in_process_s", "ours_process_s", "flexgen_process_s")
        ]
        figures = "{:>15.3f} s{:>12.3f} s{:>14.3f} s{:>17.3f}".format(*seconds, row["ratio"])
        lines.append(f"{preset:<16}{figures}{'*' if is_other else ''}")
    notes.append(
        f"Medians of {result['rounds']}. Of FlexGen's seconds,"
        f" {result['flexgen_import_s']['median']:.3f} are its imports, torch and transformers"
        " among them."
    )
    return "\n".join([*lines, *notes])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
