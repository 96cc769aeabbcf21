"""The command ``python -m costmodel.calibrate``: fit a machine's rates to measured runs."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from costmodel.calibration.factors import (
    UNHIDDEN,
    Fit,
    calibrate,
    check_run,
    leave_one_out,
    mean_error,
)
from costmodel.calibration.measured_runs import MeasuredRun, read_runs
from costmodel.cli.flags import check_outputs
from costmodel.cli.stored_weights import stored_weights
from profiles.command import Parser, run
from profiles.errors import InputError
from profiles.output_checks import output_path
from profiles.recorded import find_profile
from profiles.units import format_figure

logger = logging.getLogger(__name__)


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="costmodel.calibrate",
        description="Fit the rates of a profile to a table of measured runs.",
        example="python -m costmodel.calibrate --hardware t4-flexgen --runs runs.csv"
        " --output calibrated.json",
    )
    add = parser.add_argument
    add("--hardware", required=True, help="profile file, or the name of a recorded machine")
    add(
        "--runs",
        required=True,
        type=Path,
        help="CSV table of runs, as written by zigzag bench --runs",
    )
    add(
        "--output",
        type=output_path,
        default=Path("calibrated.json"),
        help="fitted profile to write (default: calibrated.json)",
    )
    add(
        "--leave-one-out",
        action="store_true",
        help="also predict each run from a fit to the other runs",
    )
    add(
        "--skip-broken",
        action="store_true",
        help="skip rows that cannot be read or are of another machine, and name each",
    )
    add(
        "--json",
        action="store_true",
        help="print factors and errors as one line of JSON at the end",
    )
    return parser


def main(arguments: list[str]) -> None:
    """Fit, print, write."""
    flags = parser().parse_args(arguments)
    with check_outputs(flags, "output"):
        _fit(flags)


def _fit(flags: argparse.Namespace) -> None:
    hardware = find_profile(flags.hardware)
    runs = read_runs(
        flags.runs,
        check=partial(check_run, hardware),
        skip=_tell_skipped if flags.skip_broken else None,
    )
    if not runs:
        raise InputError(
            f"runs {flags.runs}", got="no line that can be used", allowed="one or more"
        )
    if hardware.calibrations:
        logger.warning(
            "%s was fitted to runs before, which is trusted like a measurement: fit the profile as"
            " it was measured",
            flags.hardware,
        )
    fit = calibrate(hardware, runs, source=flags.runs.name)
    left_out: tuple[float, ...] = ()
    if flags.leave_one_out:
        with tqdm(total=len(runs), desc="leaving one out", leave=False, disable=None) as bar:
            left_out = leave_one_out(hardware, runs, source=flags.runs.name, on_fit=bar.update)
    fit.hardware.save(flags.output)
    print(format_fit(fit, runs, left_out))
    if mean_error(fit.errors_after) > mean_error(fit.errors_before):
        logger.warning("the fit makes the mean error larger: is every run of this machine?")
    print(f"\nprofile written to {flags.output}")
    if flags.json:
        print(json.dumps(_figures(fit, left_out)))


def _tell_skipped(error: InputError) -> None:
    logger.warning("skipped: %s", error)


def format_fit(fit: Fit, runs: Sequence[MeasuredRun], left_out: Sequence[float]) -> str:
    """Lay out how far each efficiency moved, and the error of every run."""
    lines = ["efficiency        the profile's rate times"]
    lines += [
        f"  {name:<16}{factor:8.3f}" for name, factor in fit.factors.items() if name != UNHIDDEN
    ]
    lines.append(
        f"  {UNHIDDEN:<16}{fit.factors[UNHIDDEN]:8.3f} of the other channels' time adds up"
    )
    columns = ["run", "measured", "before", "fitted"] + (["left out"] if left_out else [])
    width = max(len(name_of(measured)) for measured in runs) + 1
    lines += ["", f"{columns[0]:<{width}}" + "".join(f"{name:>10}" for name in columns[1:])]
    for i, measured in enumerate(runs):
        cells = [f"{format_figure(measured.throughput_tok_per_s, 4):>10}"]
        errors = (fit.errors_before, fit.errors_after, *([left_out] if left_out else []))
        cells += [f"{error[i]:+10.1%}" for error in errors]
        lines.append(f"{name_of(measured):<{width}}" + "".join(cells))
    means = [mean_error(fit.errors_before), mean_error(fit.errors_after)]
    means += [mean_error(left_out)] if left_out else []
    lines.append(
        f"{'mean absolute error':<{width + 10}}" + "".join(f"{mean:10.1%}" for mean in means)
    )
    return "\n".join(lines)


def name_of(measured: MeasuredRun) -> str:
    """Name a run by its model, lengths, block, bits and place of attention."""
    policy = measured.policy
    stored = stored_weights(policy)
    bits = f"w{stored.bits if stored else policy.weight_bits:.2g} c{policy.cache_bits}"
    place = " cpu attention" if policy.cpu_attention and policy.cache.gpu < 1 else ""
    if policy.lanes:
        place = " lanes"
    return (
        f"{policy.model.name} {policy.workload.prompt_len}/{policy.workload.gen_len}"
        f" {policy.gpu_batch_size}x{policy.num_gpu_batches} {bits}{place}"
    )


def _figures(fit: Fit, left_out: Sequence[float]) -> dict[str, object]:
    figures: dict[str, object] = {
        "factors": dict(fit.factors),
        "mean_error_before": mean_error(fit.errors_before),
        "mean_error_after": mean_error(fit.errors_after),
    }
    if left_out:
        figures["mean_error_left_out"] = mean_error(left_out)
    return figures


if __name__ == "__main__":
    run(main)
