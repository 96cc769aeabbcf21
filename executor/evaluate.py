"""The command ``python -m executor.evaluate``: what compression does to a model's quality.

A text is cut into windows. The first tokens of each are its prompt; behind them the engine
generates as it always does, but goes on with the text's own tokens, whatever the model would have
chosen. Scores begin with the second of them: they come from decode, with weights and cache as the
policy keeps them. The first comes from prefill, which attends to keys that are not packed yet.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from costmodel.cli.flags import check_outputs, choose_dtype, read_permitted
from costmodel.optimizer.choices import DEFAULT_PERMITTED, Permitted
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from executor.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from executor.cli.job_flags import add_job_flags, check_job_flags, choose_hardware
from executor.cli.job_options import search_policy
from executor.cli.run_command import Job
from executor.model.logits_processors import History, Steps
from executor.model.sampling import Sampler, no_history
from executor.model.token_scores import log_sums
from executor.run.recorder import Recorder
from executor.text.continuation import shared_length
from executor.text.loading import load_tokenizer
from profiles.command import Parser, run
from profiles.errors import InfeasibleError, InputError
from profiles.files import to_json
from profiles.hardware import HardwareProfile

DEFAULT_PROMPT_LEN = 16
DEFAULT_WINDOWS = 64
# Of models with longer contexts, so much is evaluated unless more is asked for.
MOST_TOKENS = 2048


class Scorer:
    """Goes on with the text's own tokens, and keeps what the model made of them.

    Parameters
    ----------
    targets
        int64 [windows, gen_len]: the tokens that follow each prompt.
    """

    def __init__(self, targets: torch.Tensor) -> None:
        self.targets = targets
        # Log probability of each target in nats, and the likeliest token in its place.
        self.log_probs = torch.zeros(targets.shape, dtype=torch.float64)
        self.likeliest = torch.zeros_like(targets)

    def sample(
        self,
        logits: torch.Tensor,
        sequence_ids: Sequence[int] | torch.Tensor,
        step: Steps,
        history: History = no_history,
    ) -> torch.Tensor:
        """Return the text's tokens [batch]; ``logits`` are float32 [batch, vocabulary]."""
        ids = torch.as_tensor(sequence_ids)
        targets = self.targets[ids, step].to(logits.device)
        self.likeliest[ids, step] = logits.argmax(-1).cpu()
        found = logits.gather(1, targets[:, None])[:, 0] - log_sums(logits)
        self.log_probs[ids, step] = found.double().cpu()
        return targets

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss in nats per token of decode."""
        return float((-self.log_probs[:, 1:].mean()).exp())

    def agreement(self, other: Scorer) -> float:
        """Return the share of places in which both find the same token likeliest."""
        return float((self.likeliest == other.likeliest)[:, 1:].double().mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """A policy's scores beside those of the uncompressed model on the same tokens.

    ``agreement`` is the share of places in which both find the same token likeliest. What needs the
    uncompressed model is ``None`` where that does not fit.
    """

    weight_bits: int
    cache_bits: int
    group_size: int
    sparsity: float
    num_tokens: int
    perplexity: float
    uncompressed_perplexity: float | None = None
    ratio: float | None = None
    agreement: float | None = None


def score(
    job: Job, offload_dir: Path, targets: torch.Tensor, *, recorder: Recorder | None = None
) -> Scorer:
    """Run a job over its prompts and score ``targets``, int64 [windows, gen_len]."""
    scorer = Scorer(targets)
    replace(job, sampler=scorer).run(offload_dir, planned=job.predict(), recorder=recorder)
    return scorer


def compare(policy: Policy, found: Scorer, uncompressed: Scorer | None) -> Quality:
    """Put a policy's scores beside the uncompressed model's."""
    quality = Quality(
        weight_bits=policy.weight_bits,
        cache_bits=policy.cache_bits,
        group_size=policy.group_size,
        sparsity=policy.attention_sparsity,
        num_tokens=found.targets[:, 1:].numel(),
        perplexity=found.perplexity,
    )
    if uncompressed is None:
        return quality
    return replace(
        quality,
        uncompressed_perplexity=uncompressed.perplexity,
        ratio=found.perplexity / uncompressed.perplexity,
        agreement=found.agreement(uncompressed),
    )


def main(arguments: list[str]) -> None:
    """Plan both runs, score, print."""
    flags = parser().parse_args(arguments)
    check_job_flags(flags, "prompt_len")
    with check_outputs(flags, "trace", "report"):
        job, uncompressed, targets = _plan(flags)
        with job.recording(flags.trace, flags.report) as recorder:
            _run(job, uncompressed, targets, flags, recorder)


def _run(
    job: Job,
    uncompressed: Job | None,
    targets: torch.Tensor,
    flags: argparse.Namespace,
    recorder: Recorder | None,
) -> None:
    found = score(job, flags.offload_dir, targets, recorder=recorder)
    reference = score(uncompressed, flags.offload_dir, targets) if uncompressed else None
    quality = compare(job.policy, found, reference)
    line = f"{quality.num_tokens} tokens of {flags.text}: perplexity {quality.perplexity:.3f}"
    if reference is not None:
        line += (
            f", uncompressed {quality.uncompressed_perplexity:.3f} (ratio {quality.ratio:.4f});"
            f" the same token is likeliest in {quality.agreement:.1%} of the places"
        )
    print(line)
    if flags.json:
        print(json.dumps(to_json(quality)))


def parser() -> Parser:
    """Return the parser of the command's flags."""
    parser = Parser(
        prog="executor.evaluate",
        description="Score a text under a policy and with the uncompressed model.",
        example="python -m executor.evaluate --model DIR --text text.txt --weight-bits 4"
        " --cache-bits 4",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face folder, or GGUF file")
    add("--text", type=Path, required=True, help="text file to score, in UTF-8")
    add(
        "--prompt-len",
        type=int,
        help=f"unscored tokens of each window; not with --policy (default: {DEFAULT_PROMPT_LEN})",
    )
    add(
        "--num-prompts",
        type=int,
        default=DEFAULT_WINDOWS,
        help=f"number of windows of the text (default: {DEFAULT_WINDOWS})",
    )
    add_job_flags(parser, gen_len=f"the rest of the model's context, up to {MOST_TOKENS} in all")
    add("--json", action="store_true", help="print the figures as one line of JSON at the end")
    return parser


def _plan(flags: argparse.Namespace) -> tuple[Job, Job | None, torch.Tensor]:
    """Return the job, the uncompressed one if that fits, and the tokens to score."""
    policy = Policy.load(flags.policy) if flags.policy else None
    source = open_checkpoint(flags.model, dtype=policy.model.dtype if policy else None)
    hardware = choose_hardware(flags, policy)
    if policy is None:
        spec = choose_dtype(source.spec, hardware, flags.dtype)
        source = source.in_dtype(spec.dtype)
    if flags.num_prompts < 1:
        raise InputError("--num-prompts", got=flags.num_prompts, allowed="1 or more")
    workload = replace(policy.workload, lengths=None) if policy else _workload(flags, source)
    if workload.gen_len < 2:
        raise InputError(
            "tokens behind a window's prompt",
            got=workload.gen_len,
            allowed="2 or more: the first comes from prefill and is not scored",
        )
    windows = read_windows(flags.text, flags.model, workload, flags.num_prompts)
    if (highest := int(windows.max())) >= source.spec.vocab_size:
        raise InputError(
            f"--text {flags.text}",
            got=f"token id {highest}",
            allowed=f"0 to {source.spec.vocab_size - 1}, the model's vocabulary",
        )
    if len(windows) < flags.num_prompts:
        print(f"note: the text holds {len(windows)} windows", file=sys.stderr)
    if policy is None:
        job = plan_job(hardware, source, workload, windows, read_permitted(flags))
        if flags.sparsity is not None:
            # Asked for to be scored, also where the search finds that it saves no time.
            policy = replace(job.policy, attention_sparsity=flags.sparsity)
            job = replace(job, policy=policy)
    else:
        workload = replace(workload, num_prompts=len(windows))
        policy = replace(policy, workload=workload)
        job = _job(policy, hardware, source, windows)
    uncompressed = None
    try:
        uncompressed = plan_job(hardware, source, workload, windows, DEFAULT_PERMITTED)
    except InfeasibleError as error:
        print(
            f"note: no comparison with the uncompressed model, which does not fit: {error}",
            file=sys.stderr,
        )
    if not job.policy.is_compressed:
        print("note: this policy compresses nothing", file=sys.stderr)
    return job, uncompressed, windows[:, workload.prompt_len :]


def plan_job(
    hardware: HardwareProfile,
    source: OpenedCheckpoint,
    workload: Workload,
    windows: torch.Tensor,
    permitted: Permitted,
) -> Job:
    """Search for the policy that runs the prompts of ``windows``, int64 [windows, tokens]."""
    workload = replace(workload, num_prompts=len(windows))
    policy, machine = search_policy(hardware, source.spec, workload, permitted)
    return _job(policy, machine, source, windows)


def _job(
    policy: Policy, hardware: HardwareProfile, source: OpenedCheckpoint, windows: torch.Tensor
) -> Job:
    prompts = windows[:, : policy.workload.prompt_len].tolist()
    return Job(policy=policy, hardware=hardware, source=source, prompts=prompts, sampler=Sampler())


def _workload(flags: argparse.Namespace, source: OpenedCheckpoint) -> Workload:
    prompt_len = DEFAULT_PROMPT_LEN if flags.prompt_len is None else flags.prompt_len
    context = min(source.spec.max_positions, MOST_TOKENS)
    gen_len = context - prompt_len if flags.gen_len is None else flags.gen_len
    if gen_len < 1:
        raise InputError("--prompt-len", got=prompt_len, allowed=f"less than {context}")
    return Workload(prompt_len=prompt_len, gen_len=gen_len)


def read_windows(path: Path, model: Path, workload: Workload, most: int) -> torch.Tensor:
    """Cut a text into at most so many windows: int64 [windows, prompt_len + gen_len]."""
    try:
        # As bytes: reading as text would change the ends of lines. The signature is no text.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--text {path}", got=error.strerror, allowed="a file of text") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text {path}", got=error, allowed="UTF-8 text") from error
    tokenizer = load_tokenizer(model)
    # Every window begins as the model's texts do; no window ends as they do.
    empty, full = tokenizer.encode(""), tokenizer.encode(text)
    num_begin = shared_length(empty, full)
    begin, num_end = full[:num_begin], len(empty) - num_begin
    ids = torch.tensor(full[num_begin : len(full) - num_end])
    size = workload.prompt_len + workload.gen_len - len(begin)
    if len(ids) < size:
        raise InputError(
            f"--text {path}",
            got=f"{len(ids)} tokens",
            allowed=f"{size} or more",
            hint="a smaller --gen-len or --prompt-len",
        )
    count = min(len(ids) // size, most)
    begins = torch.tensor(begin, dtype=torch.int64).expand(count, -1)
    return torch.cat([begins, ids[: count * size].view(count, size)], dim=1)


if __name__ == "__main__":
    run(main)
