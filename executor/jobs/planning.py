"""What a job is, and whether a later run may go on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import Permitted
from costmodel.plan.lengths import Lengths
from costmodel.plan.policy import Policy
from costmodel.plan.workload import Workload
from executor.jobs.journal import hash_of
from executor.jobs.reading import ReadJob
from executor.jobs.table import JobTable
from executor.length_history import expected_outputs
from profiles.errors import InputError

# What changes tokens and a search may choose.
CHOSEN = ("weight_bits", "cache_bits", "group_size", "attention_sparsity")
Manifest = Mapping[str, Any]


def workload_of(
    job: ReadJob, lengths: Lengths | None, model: ModelSpec, old: Manifest | None
) -> Workload:
    """Return the work that is left of a job: prompts of these lengths, or none.

    Where rotary positions depend on the longest sequence, that is the one of the whole job: a
    policy without lanes would make other tokens of what is left.
    """
    table = job.table
    logprobs = [p.logprobs for p in table.distinct_params if p.logprobs is not None]
    workload = Workload(
        prompt_len=max(table.longest_prompt, (old or {}).get("prompt_len", 1)),
        gen_len=max(
            max(params.max_tokens for params in table.distinct_params),
            (old or {}).get("gen_len", 1),
        ),
        num_prompts=1 if lengths is None else len(lengths),
        logprobs=max(logprobs) if logprobs else None,
    )
    if lengths is None:
        return workload
    longest = {"prompt_len": int(lengths.prompts.max()), "gen_len": int(lengths.limits.max())}
    is_whole = all(getattr(workload, name) == value for name, value in longest.items())
    if not is_whole and _depends_on_longest(model):
        return workload
    return replace(workload, **longest, lengths=lengths.sketch())


def _depends_on_longest(model: ModelSpec) -> bool:
    rotaries = (kind.attention.rotary for kind in model.layer_kinds)
    return any(rotary is not None and rotary.kind == "longrope" for rotary in rotaries)


def lengths_of(
    table: JobTable, rows: Sequence[int], model: ModelSpec | None, expected_len: int | None
) -> Lengths | None:
    """Return the lengths of some requests in their order; ``None`` where there are none.

    Outputs that may end early are expected to have ``expected_len`` tokens, or as many as those of
    earlier runs of ``model``. Without either, and else, they have as many as they may have.
    """
    if not rows:
        return None
    params = [table.params(row) for row in rows]
    prompts = np.array([table.prompt_len(row) for row in rows])
    limits = np.array([each.max_tokens for each in params])
    outputs = limits.copy()
    ends = np.array([each.may_end_early for each in params])
    if expected_len is not None:
        outputs[ends] = expected_len
    elif model is not None and ends.any():
        outputs[ends] = expected_outputs(model, prompts[ends], limits[ends])
    return Lengths(prompts, outputs, limits)


def manifest_of(
    job: ReadJob, policy: Policy, *, model: str, sampling: Mapping[str, Any], created: int
) -> dict[str, Any]:
    """Return what a job is: its lines, model, approximations and sampling."""
    told = json.dumps(sampling, sort_keys=True, default=str)
    return {
        "form": job.form.name,
        "lines": len(job.digests),
        "digest": f"{job.digests[-1]:016x}",
        "model": model,
        "sampling": f"{hash_of(told.encode()):016x}",
        **{name: getattr(policy, name) for name in CHOSEN},
        "prompt_len": policy.workload.prompt_len,
        "gen_len": policy.workload.gen_len,
        "created": created,
    }


def chosen_before(permitted: Permitted, old: Manifest) -> Permitted:
    """Return what a search may choose to go on with a job: what it has chosen before."""
    return replace(
        permitted,
        weight_bits=(old["weight_bits"],),
        cache_bits=(old["cache_bits"],),
        group_size=old["group_size"],
    )


def check_same_job(job: ReadJob, new: Manifest, old: Manifest, journal: str) -> None:
    """Refuse to go on with a job that is another one by now.

    Lines may have been added at the end of its input.

    Raises
    ------
    InputError
        With the first difference.
    """
    count = old["lines"]
    told = {
        "model": "another model",
        "form": "another form of lines",
        "sampling": "other settings of sampling, or another length",
        **dict.fromkeys(CHOSEN, "a policy with other approximations"),
    }
    is_same = count <= len(job.digests) and f"{job.digests[count - 1]:016x}" == old["digest"]
    if not is_same:
        got, allowed = "prompts that have changed", f"the same {count} lines, and more behind them"
    else:
        name = next((name for name in told if new[name] != old[name]), None)
        if name is None:
            return
        got, allowed = told[name], "what the job has begun with"
    raise InputError(
        f"--resume: {journal}",
        got=got,
        allowed=allowed,
        hint="another --output, which begins anew",
    )
