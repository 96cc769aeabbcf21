"""Jobs of very different lengths: ours over lanes against lockstep and against what others do.

Run as root, from an environment with the extra ``bench``. Lengths are drawn as in public chat logs
(see ``drawn_job.py``). Every answer has its own number of tokens, the same for all
systems. In every round all systems run one after the other, each under a memory control group that
counts the page cache, with the same threads, no GPU, and its files dropped from the page cache.

token/s are generated tokens over the seconds from the first request to the last answer. Loading is
in ``process_s`` only. What was not run to its end is marked: ``is_part`` (llama.cpp's server within
a time limit), ``is_predicted_only`` (lockstep that would take hours), ``is_extrapolated``
(accelerate, from its first passes). One JSON line goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from contest import Contender, System
from drawn_job import draw_job
from job_bench import JobBench
from job_ours import OurJob
from job_peers import AccelerateJob
from llama_server import LlamaServer
from memory_cgroup import MemoryCgroup
from workload_run import BenchParser, Runs, circumstances, config_of, keep_result, say, work_folder

from costmodel.families import spec_from_config
from costmodel.model.loading import load_model_spec
from profiles.command import run
from profiles.errors import InputError, RunError
from profiles.files import write_json

OURS, UNSHARED = "lanes", "lanes-unshared"
NAMES = (OURS, "lockstep", "lockstep-cohorts", "llama.cpp-server", "accelerate")
VERSIONED = ("torch", "transformers", "accelerate", "numpy")


def main(arguments: list[str]) -> None:
    """Draw, make, run, compare, print."""
    flags = _parser().parse_args(arguments)
    if flags.rounds < 1:
        raise InputError("--rounds", got=flags.rounds, allowed="1 or more")
    with _open(flags) as bench:
        systems = _systems(Runs(bench), bench, flags)
        if flags.dry_run:
            _tell(bench, systems)
            return
        # Say that the limit cannot be set before the minutes that the model takes.
        with MemoryCgroup(bench.limit_bytes):
            pass
        bench.make_inputs()
        contenders = [
            Contender(system=system, limit_s=flags.limit, trial_s=flags.trial) for system in systems
        ]
        for contender in contenders:
            contender.prepare()
        for number in range(1, flags.rounds + 1):
            say(f"round {number} of {flags.rounds}")
            for contender in contenders:
                contender.run_round()
                # After every run, so that hours survive what goes wrong in the last one.
                if flags.result is not None:
                    write_json(flags.result, _result(bench, contenders, number, arguments))
        keep_result(flags, _result(bench, contenders, flags.rounds, arguments))
    _complain(contenders)


def _parser() -> BenchParser:
    parser = BenchParser(
        "jobs.py",
        description=(__doc__ or "").strip(),
        example="--num-prompts 64 --work-dir bench --result tests/bench/results/jobs.json",
    )
    add = parser.add_argument
    parser.add_model(default="llama-3.2-3b")
    parser.add_bytes("--memory", default=4 * 10**9, help="limit for each run (4GB)")
    add("--num-prompts", type=int, default=256, help="(256)")
    add("--prefix", type=int, default=0, help="tokens in front of all prompts, the same (0)")
    add("--own-prefixes", action="store_true", help="as long, but not the same: nothing is shared")
    add("--rounds", type=int, default=3, help="how often each system runs (3)")
    only = "leave others out; may be repeated; lanes-unshared shares no prefix"
    add("--only", action="append", choices=(*NAMES, UNSHARED), help=only)
    keeps = "keeps the model and the tools for the next command; default: a temporary one"
    add("--work-dir", type=Path, metavar="DIR", help=keeps)
    add("--dry-run", action="store_true", help="tell what would run, and run nothing")
    add("--limit", type=float, default=4 * 3600.0, help="seconds of any one run (14400)")
    trial = "seconds of each setting of a peer while its best is sought (600)"
    add("--trial", type=float, default=600.0, help=trial)
    add("--policy", type=Path, help="ours over lanes; default: searched by the run itself")
    longest = "lockstep that is predicted to take more seconds is not run (3600)"
    add("--longest-lockstep", type=float, default=3600.0, help=longest)
    add("--cohorts", type=int, default=8, help="of like answers, in lockstep (8)")
    add("--llama-server", type=Path, metavar="PATH", help="default: built in the work folder")
    one = "SEQUENCES,CONTEXT with a shared cache, or SEQUENCES,CONTEXT,apart; default: its best"
    add("--llama-setting", type=_llama_setting, metavar="SETTING", help=one)
    passes = "passes of each cohort of accelerate, from which the rest is extrapolated (16)"
    add("--peer-passes", type=int, default=16, help=passes)
    add("--quick-profile", action="store_true", help="measure ours with --quick: for rehearsals")
    add("--seed", type=int, default=0, help="of weights, lengths and prompts (0)")
    return parser


def _llama_setting(text: str) -> dict[str, Any]:
    numbers = text.removesuffix(",apart").split(",")
    if len(numbers) != 2 or not all(map(str.isdecimal, numbers)):
        raise argparse.ArgumentTypeError("SEQUENCES,CONTEXT or SEQUENCES,CONTEXT,apart")
    parallel, context = map(int, numbers)
    return {"parallel": parallel, "context": context, "unified": not text.endswith(",apart")}


@contextlib.contextmanager
def _open(flags: argparse.Namespace) -> Iterator[JobBench]:
    with work_folder(flags) as folder:
        config = config_of(flags.preset, flags.num_layers)
        model = spec_from_config(config, name=load_model_spec(flags.preset).name)
        job = draw_job(
            flags.num_prompts,
            model.vocab_size,
            seed=flags.seed,
            prefix=flags.prefix,
            is_shared=not flags.own_prefixes,
        )
        yield JobBench(
            config=config,
            model=model,
            num_prompts=flags.num_prompts,
            prompt_len=job.longest_prompt,
            gen_len=max(2, job.longest_answer),
            limit_bytes=flags.memory,
            seed=flags.seed,
            folder=folder,
            job=job,
        )


def _systems(runs: Runs, bench: JobBench, flags: argparse.Namespace) -> Sequence[System]:
    job = bench.job
    common: dict[str, Any] = {"runs": runs, "job": job}
    ours = common | {
        "quick_profile": flags.quick_profile,
        "longest_s": flags.longest_lockstep,
    }
    tool = flags.llama_server.resolve() if flags.llama_server else None
    systems: list[System] = [
        OurJob(**ours, name=OURS, policy=flags.policy),
        OurJob(**ours, name=UNSHARED, policy=flags.policy, shares_prefixes=False),
        OurJob(**ours, name="lockstep", cohorts=1),
        OurJob(**ours, name="lockstep-cohorts", cohorts=flags.cohorts),
        LlamaServer(**common, tool=tool, chosen=flags.llama_setting),
        AccelerateJob(**common, passes=flags.peer_passes),
    ]
    return [system for system in systems if system.name in (flags.only or NAMES)]


def _tell(bench: JobBench, systems: Sequence[System]) -> None:
    """Print the job and what each system would run."""
    print(json.dumps(bench.job.as_json(), indent=1))
    print(f"a token takes {bench.token_bytes} bytes of cache")
    for system in systems:
        print(system.name, system.why_not() or "")
        for setting in system.settings():
            print("  ", dict(setting))


def _result(
    bench: JobBench, contenders: Sequence[Contender], rounds: int, arguments: Sequence[str]
) -> dict[str, Any]:
    rates = {c.system.name: c.medians["tok_per_s"] for c in contenders if c.medians}
    return {
        "benchmark": "a job of drawn lengths",
        "model": bench.model.name,
        "dtype": bench.model.dtype,
        "job": bench.job.as_json(),
        "limit_bytes": bench.limit_bytes,
        "rounds": rounds,
        "systems": {each.system.name: each.as_json() for each in contenders},
        "speedup_of_medians": {
            name: rates[OURS] / rate
            for name, rate in rates.items()
            if OURS in rates and name != OURS
        },
        **circumstances("jobs.py", arguments, *VERSIONED),
    }


def _complain(contenders: Sequence[Contender]) -> None:
    """End with an error where ours did not run, or a system did only in some rounds."""
    wrong = [f"{each.system.name} {what}" for each in contenders for what in each.failures]
    wrong += [f"{OURS} {c.skipped}" for c in contenders if c.skipped and c.system.name == OURS]
    if wrong:
        raise RunError("; ".join(wrong))


if __name__ == "__main__":
    run(main)
