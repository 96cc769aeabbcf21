"""The command ``python -m costmodel.estimate``: the price of any policy."""

from __future__ import annotations

import json
from pathlib import Path

from costmodel.cli.policy_report import format_prediction
from costmodel.plan.policy import Policy
from costmodel.pricing.price import check_fits
from costmodel.schedule.prediction import predict
from profiles.command import Parser, run
from profiles.files import to_json
from profiles.recorded import find_profile


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="costmodel.estimate",
        description="Predict the time and memory of a policy on a machine.",
        example="python -m costmodel.estimate --hardware profile.json --policy policy.json",
    )
    parser.add_argument(
        "--hardware", required=True, help="profile file, or the name of a recorded machine"
    )
    parser.add_argument("--policy", required=True, type=Path, help="policy file")
    parser.add_argument(
        "--json", action="store_true", help="print the prediction as one line of JSON at the end"
    )
    return parser


def main(arguments: list[str]) -> None:
    """Price the policy, print, and end with status 3 where it does not fit."""
    flags = parser().parse_args(arguments)
    policy = Policy.load(flags.policy)
    hardware = find_profile(flags.hardware)
    prediction = predict(policy, hardware)
    print(format_prediction(policy, hardware, prediction))
    if flags.json:
        print(json.dumps(to_json(prediction)))
    check_fits(prediction, hardware)


if __name__ == "__main__":
    run(main)
