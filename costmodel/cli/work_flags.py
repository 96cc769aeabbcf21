"""Flags that say how long prompts and answers are."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from costmodel.plan.lengths import Lengths
from costmodel.plan.lengths_table import read_lengths
from costmodel.plan.workload import Workload
from profiles.command import Parser
from profiles.errors import InputError

# FlexGen's main workload (ICML 2023, table 2).
DEFAULT_PROMPT_LEN = 512
DEFAULT_GEN_LEN = 32
# Prompts of a job whose number is open, of which answers have another length than the limit.
OPEN_NUM_PROMPTS = 1024
OF_FILE = ("prompt_len", "gen_len", "num_prompts", "expected_len")


def add_work_flags(parser: Parser) -> None:
    """Add the flags that ``read_workload`` reads."""
    add_prompts(parser)
    parser.add_argument(
        "--gen-len",
        type=int,
        metavar="TOKENS",
        help=f"tokens to generate for each prompt (default: {DEFAULT_GEN_LEN})",
    )
    add_expected_len(parser)
    add_lengths(parser)


def add_prompts(parser: Parser) -> None:
    """Add the flags for the number and the length of prompts."""
    add = parser.add_argument
    add(
        "--prompt-len",
        type=int,
        metavar="TOKENS",
        help=f"length of the longest prompt (default: {DEFAULT_PROMPT_LEN})",
    )
    add(
        "--num-prompts",
        type=int,
        help="number of prompts (default: as many as the best block holds)",
    )


def add_lengths(parser: Parser) -> None:
    """Add the flag for a table of lengths."""
    parser.add_argument(
        "--lengths",
        type=Path,
        metavar="FILE",
        help="CSV table of a job's lengths, instead of the flags above: prompt_len, gen_len, and"
        " perhaps max_tokens and count",
    )


def add_expected_len(parser: Parser, *, otherwise: str = "--gen-len") -> None:
    """Add the flag for the length of answers that end before their limit."""
    parser.add_argument(
        "--expected-len",
        type=int,
        metavar="TOKENS",
        help=f"tokens that an answer is expected to have on average (default: {otherwise})",
    )


def check_expected_len(value: int | None) -> None:
    """Refuse an expected length below 1."""
    if value is not None and value < 1:
        raise InputError("--expected-len", got=value, allowed="1 or more")


def read_workload(flags: argparse.Namespace) -> Workload:
    """Return the work that the flags tell of."""
    check_expected_len(flags.expected_len)
    if (lengths := read_lengths_flag(flags)) is not None:
        return workload_of(lengths)
    prompt_len = DEFAULT_PROMPT_LEN if flags.prompt_len is None else flags.prompt_len
    gen_len = DEFAULT_GEN_LEN if flags.gen_len is None else flags.gen_len
    work = Workload(prompt_len=prompt_len, gen_len=gen_len, num_prompts=flags.num_prompts)
    if flags.expected_len is None or flags.expected_len >= gen_len:
        return work
    count = flags.num_prompts or OPEN_NUM_PROMPTS
    columns = (prompt_len, flags.expected_len, gen_len)
    return workload_of(Lengths(*(np.full(count, value) for value in columns)))


def read_lengths_flag(flags: argparse.Namespace) -> Lengths | None:
    """Return the table of ``--lengths``, if there is one; refuses flags that it replaces."""
    if flags.lengths is None:
        return None
    for name in OF_FILE:
        if getattr(flags, name, None) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(flag, got=f"{flag} together with --lengths", allowed="one of them")
    return read_lengths(flags.lengths)


def workload_of(lengths: Lengths) -> Workload:
    """Return the work of a job with these lengths."""
    return Workload(
        prompt_len=int(lengths.prompts.max()),
        gen_len=int(lengths.limits.max()),
        num_prompts=len(lengths),
        lengths=lengths.sketch(),
    )
