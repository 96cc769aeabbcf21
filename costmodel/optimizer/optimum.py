"""Find the policy: enumerate the choices, solve a linear program for each, and branch on the
block size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from costmodel.model.layout import decoder_numbers, model_layers, token_elements
from costmodel.model.spec import ModelSpec
from costmodel.optimizer.choices import (
    DEFAULT_PERMITTED,
    Permitted,
    Pipeline,
    check_permitted,
    open_problems,
    problems_of,
    smallest_problem,
)
from costmodel.optimizer.fitting import fit
from costmodel.optimizer.job_throughput import seconds_in_step
from costmodel.optimizer.lane_search import FoundLanes, LaneSearch
from costmodel.optimizer.program import Limits, Program, Solution, solve
from costmodel.optimizer.rows import RowTable
from costmodel.optimizer.shortage import shortage_of
from costmodel.optimizer.solver import Infeasible
from costmodel.optimizer.tree import Tree
from costmodel.plan.policy import Policy, Prediction
from costmodel.plan.workload import Workload
from costmodel.pricing.memory import with_capacities, with_margin
from costmodel.pricing.price import check_work, estimate
from costmodel.pricing.problem import Problem
from costmodel.schedule.prediction import predict, slowdown
from profiles.errors import InfeasibleError, InputError
from profiles.hardware import HardwareProfile

# Share of every capacity that is left free, unless the user asks for another.
DEFAULT_MARGIN = 0.01
# Lanes are taken where a block in step is faster by less: answers that end sooner than expected
# make room for others.
WORTH_OF_LANES = 0.05
# Shares of a tier's capacity that advice adds to the missing bytes; the first that suffices counts.
ADVICE_MARGINS = (0.001, 0.02, 0.1, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The best policy found, and a bound on all policies.

    Parameters
    ----------
    policy
        Rounded to whole rows, with its prediction.
    job_tok_per_s
        Throughput over all prompts, a partly filled last block included.
    bound_tok_per_s
        No policy of the tried batch sizes exceeds this throughput, for any placement. Where the
        policy has lanes, none with lanes does.
    margin
        Share of every capacity that the search left free.
    limit_tok_per_s
        The job's throughput by the limits alone, as the bound counts it: of the policy, or where
        policies wait (see ``prediction``), of the best one without waits.
    problem, solution
        The choices of the policy, with the capacities less the margin, and the program's optimum at
        the policy's block size, with its duals.
    """

    policy: Policy
    job_tok_per_s: float
    bound_tok_per_s: float
    margin: float
    problem: Problem
    solution: Solution
    limit_tok_per_s: float

    @property
    def predicted(self) -> Prediction:
        """The policy's prediction."""
        assert self.policy.predicted is not None
        return self.policy.predicted

    @property
    def hardware(self) -> HardwareProfile:
        """The machine that the policy uses, without its GPU where that is faster."""
        assert self.policy.hardware is not None
        return self.policy.hardware

    @property
    def gap(self) -> float:
        """The distance of the limits from the bound, as a fraction of the bound."""
        return 1 - self.limit_tok_per_s / self.bound_tok_per_s

    @property
    def cost_of_waits(self) -> float:
        """What the waits of the schedule cost, as a fraction of the throughput without them."""
        return 1 - self.job_tok_per_s / self.limit_tok_per_s


class Search:
    """The search for the fastest policy. It can continue when more is permitted.

    Where the workload has lengths, policies with lanes are compared with those that run a block in
    step, which then count every prompt and answer as the longest; the faster one for the job is
    taken. Lanes run on a CPU alone, and have no latency of a block that could be limited.

    Parameters
    ----------
    max_latency_s
        Limit on the latency of one block.
    margin
        Share of every capacity that is left free.
    pipeline
        Of a stage of a pipeline, the number of its stages and the sequences of a block, which all
        stages share; ``None`` searches the block size.
    """

    def __init__(
        self,
        hardware: HardwareProfile,
        model: ModelSpec,
        workload: Workload,
        *,
        max_latency_s: float | None = None,
        margin: float = DEFAULT_MARGIN,
        pipeline: Pipeline | None = None,
    ) -> None:
        check_work(model, workload, hardware)
        self._pipeline = pipeline
        self.hardware, self._model = hardware, model
        self._lengths = workload.lengths
        # Sequences in step are padded, and none is shorter than the longest.
        self._workload = replace(workload, lengths=None)
        self._margin = margin
        self._machine = with_margin(hardware, margin)
        self._tree = Tree(max_latency_s, counts_waits=pipeline is None)
        # With a GPU, and without.
        self._tables: dict[bool, RowTable] = {}
        self._like: Mapping[bool, RowTable] = {}
        self._planted: set[tuple[object, ...]] = set()
        self._lanes: LaneSearch | None = None
        if workload.lengths is not None and max_latency_s is None and not hardware.is_emulated:
            self._lanes = LaneSearch(self._without_gpu, model, workload)

    def on(self, hardware: HardwareProfile, result: SearchResult) -> Search:
        """Return the same search on a similar machine, which begins with this one's ``result``.

        It looks only for policies that are faster by more than ``NEARLY_AS_FAST``.
        """
        other = Search(
            hardware,
            self._model,
            replace(self._workload, lengths=self._lengths),
            max_latency_s=self._tree.max_latency_s,
            margin=self._margin,
        )
        if other._lanes is not None and self._lanes is not None:
            other._lanes.begin_like(self._lanes)
            if result.policy.lanes is not None:
                return other
        other._tree = Tree(self._tree.max_latency_s, is_choosy=False)
        other._like = self._tables
        machine = other._machine if result.hardware.has_gpu else other._without_gpu
        problem = replace(result.problem, hardware=machine)
        other._tree.begin_with(problem, other._table(machine), result.policy.num_gpu_batches)
        return other

    def run(self, permitted: Permitted = DEFAULT_PERMITTED) -> SearchResult:
        """Return the policy with the highest predicted throughput over the whole job, of all
        that this and earlier runs permit.

        Raises
        ------
        InfeasibleError
            When nothing fits: the tiers that are short, the missing bytes, and enough budgets.
        """
        check_permitted(permitted, self.hardware, self._model)
        lanes = self._lanes.run(permitted) if self._lanes is not None else None
        try:
            result = self._run_in_step(permitted)
        except (InfeasibleError, InputError):
            # Padded, no prompt may fit, or have too few positions.
            if lanes is None:
                raise
            return self._result_of(lanes)
        if lanes is None or self._lanes is None:
            return result
        lengths = self._lanes.lengths
        in_step_s = seconds_in_step(result.policy, result.hardware, lengths)
        in_step_s *= slowdown(result.policy, result.hardware)
        if lanes.seconds <= in_step_s * (1 + WORTH_OF_LANES):
            return self._result_of(lanes)
        return result

    def _result_of(self, lanes: FoundLanes) -> SearchResult:
        """Return the result of a policy with lanes."""
        assert self._lanes is not None
        used = with_capacities(self.hardware, {"gpu": 0})
        predicted = estimate(lanes.policy, used)
        tokens = predicted.throughput_tok_per_s * predicted.latency_s
        return SearchResult(
            policy=replace(
                lanes.policy, hardware=replace(used, measurements=()), predicted=predicted
            ),
            job_tok_per_s=predicted.throughput_tok_per_s,
            limit_tok_per_s=predicted.throughput_tok_per_s,
            bound_tok_per_s=tokens / min(self._lanes.bound_s, predicted.latency_s),
            margin=self._margin,
            problem=lanes.problem,
            solution=lanes.solution,
        )

    def run_in_step(self, permitted: Permitted = DEFAULT_PERMITTED) -> SearchResult | None:
        """Return the best policy that runs a block in step, or ``None`` where nothing fits."""
        machine, tree = self._machine, self._tree
        check_work(self._model, self._workload, self.hardware)
        size = self._pipeline.block_size if self._pipeline else None
        tree.plant(self._new_problems(machine, permitted), self._table(machine), size)
        if machine.has_gpu and not machine.is_emulated:
            # A GPU with little memory can be slower than none, if only rarely.
            alone = self._without_gpu
            if _least_seconds(alone, self._model, self._workload) < tree.best_s:
                tree.plant(self._new_problems(alone, permitted), self._table(alone), size)
        return self._best_in_step() if tree.found else None

    def _run_in_step(self, permitted: Permitted) -> SearchResult:
        """Return the best policy that runs a block in step, or say why nothing fits."""
        if (found := self.run_in_step(permitted)) is not None:
            return found
        question = (self._model, self._workload, permitted)
        raise _reason_of(
            smallest_problem(self.hardware, *question),
            problems_of(self._machine, *question),
            self._tree.max_latency_s,
            self._margin,
        )

    def _best_in_step(self) -> SearchResult:
        hardware, tree = self.hardware, self._tree
        best = tree.choose()
        used = hardware if best.problem.hardware.has_gpu else with_capacities(hardware, {"gpu": 0})
        # Of the stages of a pipeline, the limits alone count.
        predict_block = estimate if self._pipeline else predict
        return SearchResult(
            policy=replace(
                best.policy,
                hardware=replace(used, measurements=()),
                predicted=predict_block(best.policy, used),
            ),
            job_tok_per_s=best.predicted_tok_per_s,
            limit_tok_per_s=tree.fastest.tok_per_s if best.slowdown > 1 else best.tok_per_s,
            bound_tok_per_s=self._workload.gen_len / tree.bound_s,
            margin=self._margin,
            problem=best.problem,
            solution=best.solution,
        )

    @property
    def _without_gpu(self) -> HardwareProfile:
        return with_capacities(self._machine, {"gpu": 0})

    def _table(self, machine: HardwareProfile) -> RowTable:
        key = machine.has_gpu
        if key not in self._tables:
            self._tables[key] = RowTable(machine, self._like.get(key))
        return self._tables[key]

    def _new_problems(self, machine: HardwareProfile, permitted: Permitted) -> Iterator[Problem]:
        """Yield the problems that no earlier run has added."""
        question = (machine, self._model, self._workload, permitted)
        for problem in open_problems(*question, pipeline=self._pipeline):
            key = (
                machine.has_gpu,
                problem.gpu_batch_size,
                problem.cpu_experts,
                problem.loads_on_demand,
                problem.weight_bits,
                problem.cache_bits,
                problem.group_size,
                problem.attention_sparsity,
            )
            if key not in self._planted:
                self._planted.add(key)
                yield problem


def search(
    hardware: HardwareProfile,
    model: ModelSpec,
    workload: Workload,
    *,
    max_latency_s: float | None = None,
    margin: float = DEFAULT_MARGIN,
    permitted: Permitted = DEFAULT_PERMITTED,
) -> SearchResult:
    """Search once, see ``Search``."""
    whole = Search(hardware, model, workload, max_latency_s=max_latency_s, margin=margin)
    return whole.run(permitted)


def _least_seconds(hardware: HardwareProfile, model: ModelSpec, workload: Workload) -> float:
    """Return the least seconds of one sequence on a machine: its products at the best rate."""
    numbers = decoder_numbers(model)[1:]
    layouts = model_layers(model)[1 : len(numbers) + 1]
    *elements, last = (
        token_elements(layout, model.layer(number).experts)
        for layout, number in zip(layouts, numbers, strict=True)
    )
    # In prefill, the last layer finishes each prompt's last token only.
    tokens = workload.num_positions
    flop = 2 * (sum(elements) * tokens + last * workload.gen_len)
    rates = hardware.compute
    encoded = rates.encoded_matmul.values() if model.is_encoded else ()
    peak = max(curve.peak for curve in (rates.matmul[model.dtype], *encoded))
    return float(flop / peak)


def _reason_of(
    smallest: Problem, problems: Iterable[Problem], max_latency_s: float | None, margin: float
) -> InfeasibleError:
    """Make the error for a search that found nothing: time, or memory."""
    hardware = smallest.hardware
    least_s = min((_latency_alone(p) for p in problems if p.gpu_batch_size == 1), default=math.inf)
    if max_latency_s is not None and math.inf > least_s > max_latency_s * 0.999:
        return InfeasibleError(
            f"no policy meets --max-latency {max_latency_s:g}s: a block of one sequence takes at"
            f" least {least_s:.4g} s; try a longer one, or more memory"
        )
    for share in ADVICE_MARGINS:
        shortage = shortage_of(smallest, margin=share + margin)
        roomier = with_capacities(hardware, shortage.budget_bytes)
        enough = replace(smallest, hardware=with_margin(roomier, margin))
        if fit(Program(enough), 1, max_latency_s=max_latency_s) is not None:
            break
    return InfeasibleError(str(shortage))


def _latency_alone(problem: Problem) -> float:
    """Return the least seconds of a block of one sequence, or infinity where it does not fit."""
    try:
        return solve(problem, Limits(block_sizes=(1, 1))).latency_per_sequence_s
    except Infeasible:
        return math.inf
