"""A call of the Python interface as a job: its prompts, each with parameters of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from costmodel.cli.flags import DEFAULT_GEN_LEN
from costmodel.plan.lengths import Lengths
from executor.checkpoint.opening import OpenedCheckpoint
from executor.cli.job_options import JobOptions
from executor.cli.prompts import PromptLimits
from executor.cli.run_command import Job
from executor.cli.sampling_flags import Sampling, choose_sampling
from executor.jobs.endings import RowChooser
from executor.jobs.lane_room import room_lacks
from executor.jobs.limits import PromptNames
from executor.jobs.params import RowParams, row_params
from executor.model.generation_config import GenerationConfig
from executor.model.sampling_params import SamplingParams
from executor.run.requests import OutputMaker, Prompt, Request, list_prompts, read_requests
from executor.text.continuation import ChatTokenizer
from profiles.errors import InputError
from profiles.start import called

Params = SamplingParams | Sequence[SamplingParams] | None


class CallPlanner:
    """Plans calls of one model.

    Parameters
    ----------
    options
        How runs are planned.
    source, config
        The model, and its ``generation_config.json``.
    load_tokenizer
        Called where a call has text.
    has_tokenizer
        Whether the model has one.
    """

    def __init__(
        self,
        options: JobOptions,
        source: OpenedCheckpoint,
        config: GenerationConfig,
        load_tokenizer: Callable[[], ChatTokenizer],
        *,
        has_tokenizer: bool,
    ) -> None:
        self._options, self._source, self._config = options, source, config
        self._load_tokenizer, self._has_tokenizer = load_tokenizer, has_tokenizer

    def plan(
        self, prompts: Prompt | Sequence[Prompt], params: Params
    ) -> tuple[Job, OutputMaker] | None:
        """Check everything and plan; ``None`` for no prompts."""
        listed = list_prompts(prompts)
        asked = _params_of_each(params, len(listed))
        if not listed:
            return None
        samplings = {each: self._sampling(each) for each in asked}
        rules = {
            each: row_params(each, sampling, max_tokens=self._max_tokens(each))
            for each, sampling in samplings.items()
        }
        most = {each: self._limits(rule.max_tokens) for each, rule in rules.items()}
        requests = read_requests(listed, [most[each] for each in asked], self._load_tokenizer)
        if not self._has_tokenizer and any(rule.stops for rule in rules.values()):
            raise InputError("stop", got="a model without a tokenizer", allowed="stop_token_ids")
        # Before any work, although only the outputs may need it.
        tokenizer = self._load_tokenizer() if self._has_tokenizer else None
        next(iter(samplings.values())).warn()
        maker = OutputMaker(requests, asked, tokenizer)
        rows = [rules[asked[index]] for index in maker.prompts]
        return self._plan(requests, asked, rows, maker.prompts), maker

    def _plan(
        self,
        requests: Sequence[Request],
        asked: Sequence[SamplingParams],
        rules: Sequence[RowParams],
        owners: Sequence[int],
    ) -> Job:
        """Plan the run of all outputs: how each ends, and the place of its prompt."""
        names = PromptNames()
        identities = [
            identity
            for request, params in zip(requests, asked, strict=True)
            for identity in names.identities(request.prompt_token_ids, params.seed, params.n)
        ]
        prompts = [requests[index].prompt_token_ids for index in owners]
        job = Job.plan(
            self._options,
            self._source,
            prompts,
            RowChooser(
                rules.__getitem__,
                identities.__getitem__,
                lambda ids: self._load_tokenizer().decode(ids),
            ),
            Lengths([len(ids) for ids in prompts], [rule.max_tokens for rule in rules]),
            logprobs=_largest(params.logprobs for params in asked),
            prompt_logprobs=_largest(params.prompt_logprobs for params in asked),
        )
        for place, lack in room_lacks(job.policy, job.lengths).items():
            raise lack.error(f"prompt {owners[place] + 1}")
        return job

    def _sampling(self, params: SamplingParams) -> Sampling:
        return choose_sampling(
            params,
            self._config,
            vocab_size=self._source.spec.vocab_size,
            has_length=self._options.policy is not None or params.max_tokens is not None,
        )

    def _limits(self, max_tokens: int) -> PromptLimits:
        spec = self._source.spec
        return PromptLimits(
            vocab_size=spec.vocab_size, max_positions=spec.max_positions, gen_len=max_tokens
        )

    def _max_tokens(self, params: SamplingParams) -> int:
        if (policy := self._options.policy) is None:
            return params.max_tokens or DEFAULT_GEN_LEN
        most = policy.workload.gen_len
        if params.max_tokens is not None and params.max_tokens > most:
            raise InputError(
                "max_tokens",
                got=params.max_tokens,
                allowed=f"at most {most}, for which the policy was made",
                hint=f"{called('costmodel.search')} --gen-len {params.max_tokens}",
            )
        return params.max_tokens or most


def _params_of_each(params: Params, count: int) -> list[SamplingParams]:
    """Return the parameters of each of so many prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    allowed = "SamplingParams, or a list of them with one for each prompt"
    if not isinstance(params, list | tuple):
        raise InputError("params", got=repr(params), allowed=allowed)
    for each in params:
        if not isinstance(each, SamplingParams):
            raise InputError("params", got=repr(each), allowed=allowed)
    if len(params) != count:
        raise InputError("params", got=f"{len(params)} for {count} prompts", allowed=allowed)
    return list(params)


def _largest(counts: Iterable[int | None]) -> int | None:
    return max((count for count in counts if count is not None), default=None)
