"""The pages of a search, of a policy and of a run: one HTML file each, which needs no other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path

from bokeh.resources import Resources
from jinja2 import Environment, StrictUndefined, Template

from costmodel.optimizer.optimum import SearchResult
from costmodel.optimizer.whatif import Change
from costmodel.plan.policy import Policy
from costmodel.pricing.memory import LANE_PHASE
from costmodel.report.buying import Purchases, purchases_of_policy
from costmodel.report.buying_section import buying_section
from costmodel.report.memory_sections import memory_section, placement_section
from costmodel.report.parts import Plan
from costmodel.report.passes_section import passes_section
from costmodel.report.planned_lanes import PlannedLanes
from costmodel.report.run_record import RunRecord
from costmodel.report.task_sample import TaskSample, simulate_sample
from costmodel.report.time_sections import limits_section, phases_section
from costmodel.report.timeline_section import timeline_section
from costmodel.report.trace_file import MEASURED, SIMULATED
from costmodel.schedule.prediction import predict
from profiles.files import to_json
from profiles.hardware import HardwareProfile
from profiles.outputs import write_output
from profiles.units import format_count, format_figure, format_seconds


def write_search_page(path: Path, result: SearchResult, changes: Sequence[Change]) -> None:
    """Write the page of a search, with what would change its answer."""
    purchases = Purchases(job_tok_per_s=result.job_tok_per_s, changes=changes)
    _write_plan_page(path, result.policy, result.hardware, purchases)


def write_policy_page(path: Path, policy: Policy, hardware: HardwareProfile) -> None:
    """Write the page of a policy that was not run, and ask the search what to buy."""
    _write_plan_page(path, policy, hardware, purchases_of_policy(policy, hardware))


def _write_plan_page(
    path: Path, policy: Policy, hardware: HardwareProfile, purchases: Purchases
) -> None:
    lanes = PlannedLanes.simulate(policy, hardware) if policy.lanes else None
    prediction = predict(policy, hardware)
    plan = Plan(policy=policy, hardware=hardware, prediction=prediction, lanes=lanes)
    samples = {} if lanes else {SIMULATED: simulate_sample(policy, hardware)}
    _write(path, plan, samples, purchases)


def write_run_page(path: Path, record: RunRecord, sample: TaskSample) -> None:
    """Write the page of a run; ``sample`` holds the measured tasks of its first block."""
    policy, hardware = record.policy, record.hardware
    plan = Plan(
        policy=policy,
        hardware=hardware,
        prediction=predict(policy, hardware),
        measured=record.measured,
        lanes=PlannedLanes.of_run(record) if record.lanes else None,
    )
    samples = {MEASURED: sample}
    if not record.lanes:
        num_passes = record.measured.num_passes
        samples[SIMULATED] = simulate_sample(record.first_block, hardware, num_passes=num_passes)
    _write(path, plan, samples, purchases_of_policy(policy, hardware))


def _write(path: Path, plan: Plan, samples: Mapping[str, TaskSample], purchases: Purchases) -> None:
    policy = replace(plan.policy, hardware=plan.hardware, predicted=plan.prediction)
    sections = [
        placement_section(plan),
        memory_section(plan),
        *([passes_section(policy, plan.lanes)] if plan.lanes else []),
        *([timeline_section(samples, plan.phases)] if samples else []),
        phases_section(plan),
        limits_section(plan),
        buying_section(purchases),
    ]
    text = _template().render(
        title=f"{policy.model.name} on {plan.hardware.name}",
        facts=_facts(plan),
        about=_about(plan),
        sections=sections,
        scripts=Resources(mode="inline", components=["bokeh"]).js_raw,
        policy=json.dumps(to_json(policy), indent=1),
    )
    write_output(path, lambda handle: handle.write(text))


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Of a picture's parts, later ones refer to earlier ones.
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    text = files("costmodel.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(text)


def _facts(plan: Plan) -> Mapping[str, str]:
    """Return the figures at the top of the page."""
    policy, measured = plan.policy, plan.measured
    facts = {}
    if measured is None:
        rate = format_figure(plan.prediction.throughput_tok_per_s)
        facts["predicted throughput"] = f"{rate} token/s"
        takes = "a block takes" if plan.lanes is None else "the job takes"
        facts[takes] = format_seconds(sum(plan.predicted_phase_s.values()))
    else:
        facts["measured throughput"] = f"{format_figure(measured.tok_per_s)} token/s"
        facts["predicted throughput"] = f"{format_figure(measured.predicted_tok_per_s)} token/s"
        facts["the run took"] = format_seconds(sum(measured.phase_s.values()))
    if plan.lanes is not None:
        return facts | {"lanes": str(policy.block_size), "limited by": plan.limits[LANE_PHASE]}
    facts["block"] = f"{policy.block_size} sequences"
    facts |= {f"{phase} limited by": name for phase, name in plan.limits.items()}
    return facts


def _about(plan: Plan) -> list[str]:
    """Return what was planned or run, in sentences."""
    policy, hardware, measured = plan.policy, plan.hardware, plan.measured
    work = policy.workload
    count = measured.num_prompts if measured else work.num_prompts
    prompts = f"{count} prompts" if count else "Any number of prompts"
    batches = format_count(policy.num_gpu_batches, "batch")
    if policy.lanes is None:
        lines = [
            f"{prompts} of at most {work.prompt_len} tokens, {work.gen_len} generated for each.",
            f"A block has {batches} of {format_count(policy.gpu_batch_size, 'sequence')};"
            f" prefill takes {policy.prefill_batch_size} at a time.",
        ]
    else:
        lines = [
            f"{prompts} of at most {work.prompt_len} tokens, at most {work.gen_len} generated for"
            " each.",
            f"Sequences begin as others end, in {policy.block_size} lanes: {batches} of"
            f" {policy.gpu_batch_size}. A pass has at most {policy.lanes.pass_rows} rows.",
        ]
    lines += [
        f"The model computes in {policy.model.dtype}.",
    ]
    if hardware.is_emulated:
        lines.append("The GPU is emulated.")
    if measured is None:
        lines.append("Nothing was run: all figures are predictions.")
    return lines
