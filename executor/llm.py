"""The Python interface: ``LLM`` runs prompts as the command ``executor.generate`` does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from costmodel.cli.flags import DEFAULT_GEN_LEN
from costmodel.plan.policy import Policy
from executor.checkpoint.opening import open_checkpoint
from executor.cli.arguments import arguments_told, read_arguments
from executor.cli.prompts import PromptLimits
from executor.cli.run_command import Job
from executor.cli.run_report import Report
from executor.cli.sampling_flags import choose_sampling
from executor.jobs.endings import RowChooser
from executor.jobs.limits import PromptNames
from executor.jobs.params import RowParams
from executor.machine.allocator import end_keeping
from executor.machine_profile import keep_run
from executor.model.sampling_params import SamplingParams
from executor.run.exclusive import TURN, ExclusiveRun, forget_frames
from executor.run.requests import Prompt, RequestOutput, output_of, read_requests
from executor.run.results import BlockResult
from executor.run.same_model import check_same_model
from executor.text.chat import ChatTemplate, check_messages
from executor.text.continuation import ChatTokenizer
from executor.text.loading import (
    has_tokenizer,
    load_generation_config,
    load_template,
    load_tokenizer,
)
from profiles.errors import InputError
from profiles.hardware import HardwareProfile
from profiles.start import called

Message = Mapping[str, Any]


class LLM:
    """A model that need not fit the memory. A context manager.

    Each call plans one run for all its prompts, loads the weights, and gives the memory back at
    the end. One call with many prompts is therefore the fastest way.

    Parameters
    ----------
    model
        Checkpoint folder in the format of Hugging Face, or GGUF file.
    policy
        A policy, or its file. ``None`` searches for one in each call, for exactly its prompts.
    hardware
        A profile, its file, or the name of a recorded machine. ``None`` takes the policy's
        machine, else measures this one once and keeps the profile.
    cpu_memory, gpu_memory, disk
        Budgets: bytes, or a size such as ``"8GiB"``. ``None`` takes what is free.
    offload_dir
        Folder for whatever the policy puts on disk.
    dtype
        ``float32``, ``float16`` or ``bfloat16``; ``None`` takes the model's.
    weight_bits, cache_bits
        Precisions that the search may choose: 16 (the model's own), 8, 4, or several of them.
    group_size
        Elements that share a scale where they are quantized.
    sparsity
        Share of the keys that each query of decode attends to.
    requantize
        Whether ``weight_bits`` may quantize a checkpoint again that is quantized.
    progress
        Whether a terminal or a notebook shows a progress bar.

    Raises
    ------
    InputError
        For a wrong argument or a broken checkpoint, in one line.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        policy: Policy | str | Path | None = None,
        hardware: HardwareProfile | str | Path | None = None,
        cpu_memory: int | str | None = None,
        gpu_memory: int | str | None = None,
        disk: int | str | None = None,
        offload_dir: str | Path = ".",
        dtype: str | None = None,
        weight_bits: int | Sequence[int] | None = None,
        cache_bits: int | Sequence[int] | None = None,
        group_size: int | None = None,
        sparsity: float | None = None,
        requantize: bool = False,
        progress: bool = True,
    ) -> None:
        planned = {
            "dtype": dtype,
            "cpu_memory": cpu_memory,
            "gpu_memory": gpu_memory,
            "disk": disk,
            "weight_bits": weight_bits,
            "cache_bits": cache_bits,
            "group_size": group_size,
            "sparsity": sparsity,
            "requantize": requantize or None,
        }
        self._folder = Path(model)
        self._progress = progress
        with arguments_told():
            self._options = read_arguments(policy, hardware, offload_dir, planned)
            if (made := self._options.policy) is None:
                self._source = open_checkpoint(self._folder, dtype=dtype)
            else:
                self._source = open_checkpoint(self._folder, dtype=made.model.dtype)
                check_same_model(made.model, self._source.spec)
            self._config = load_generation_config(self._folder)
        self._report: Report | None = None
        self._run: weakref.ref[ExclusiveRun[list[RequestOutput]]] | None = None

    @property
    def report(self) -> Report | None:
        """Predicted beside measured, of the last run that came to its end; can be printed."""
        return self._report

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[RequestOutput]:
        """Continue prompts; returns one output for each, in their order.

        Parameters
        ----------
        prompts
            One or a list of: text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``.
        params
            How tokens are chosen. ``None`` follows the model's ``generation_config.json``.
        """
        with TURN, closing(self.iter_blocks(prompts, params)) as blocks:
            outputs = [output for block in blocks for output in block]
        return sorted(outputs, key=lambda output: output.index)

    def iter_blocks(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> ExclusiveRun[list[RequestOutput]]:
        """Continue prompts as ``generate`` does, and yield the outputs of each block as it ends.

        Blocks with longer prompts come first. An interrupt loses only the block that it meets.
        The run holds its memory until the last block, or until ``close`` of the iterator.
        """
        with arguments_told():
            run = ExclusiveRun.begin(partial(self._begin, prompts, params))
        self._run = weakref.ref(run)
        return run

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations; returns one output for each, in their order.

        Parameters
        ----------
        conversations
            One or a list of: messages such as ``{"role": "user", "content": "Hello"}``.
        params
            As in ``generate``.
        chat_template_kwargs
            Further variables of the model's chat template, such as ``enable_thinking``.
        """
        return self.generate(self.chat_prompts(conversations, chat_template_kwargs), params)

    def chat_prompts(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[Prompt]:
        """Return the prompts that the model's chat template makes of conversations.

        ``generate`` and ``iter_blocks`` take them.
        """
        if not isinstance(conversations, list | tuple):
            allowed = "a list of messages, or a list of such lists"
            raise InputError("conversations", got=repr(conversations), allowed=allowed)
        is_one = bool(conversations) and isinstance(conversations[0], Mapping)
        listed: Sequence[object] = [conversations] if is_one else conversations
        prompts: list[Prompt] = []
        for number, conversation in enumerate(listed, start=1):
            messages = check_messages(conversation, f"conversation {number}")
            text = self._template.render(
                messages, self._tokenizer.special_tokens, chat_template_kwargs or {}
            )
            ids = self._tokenizer.encode_rendered(text)
            prompts.append({"prompt": text, "prompt_token_ids": ids})
        return prompts

    def close(self) -> None:
        """End a run that ``iter_blocks`` has begun, and give its memory back."""
        run = self._run() if self._run else None
        if run is not None:
            run.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @cached_property
    def _tokenizer(self) -> ChatTokenizer:
        return load_tokenizer(self._folder)

    @cached_property
    def _template(self) -> ChatTemplate:
        return load_template(self._folder)

    def _begin(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None
    ) -> Generator[list[RequestOutput]]:
        """Check everything and plan; the generator runs."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InputError("params", got=repr(params), allowed="SamplingParams")
        spec = self._source.spec
        sampling = choose_sampling(
            params,
            self._config,
            vocab_size=spec.vocab_size,
            has_length=self._options.policy is not None or params.max_tokens is not None,
        )
        gen_len = self._gen_len(params)
        limits = PromptLimits(
            vocab_size=spec.vocab_size, max_positions=spec.max_positions, gen_len=gen_len
        )
        requests = read_requests(prompts, limits, lambda: self._tokenizer)
        if not requests:
            return _nothing()
        # Before any work, although only the outputs may need it.
        tokenizer = self._tokenizer if has_tokenizer(self._folder) else None
        sampling.warn()
        ids = [request.prompt_token_ids for request in requests]
        job = Job.plan(
            self._options,
            self._source,
            ids,
            sampling,
            gen_len=gen_len,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )
        names = PromptNames(params.seed)
        asked = RowParams(
            max_tokens=gen_len,
            sampler=replace(sampling.sampler, seed=0),
            end_ids=sampling.eos_ids,
        )
        chooser = RowChooser([asked] * len(ids), [names.identity(each) for each in ids])
        job = replace(job, sampler=chooser, finish=chooser.finish, eos_ids=frozenset())
        make = partial(output_of, requests, tokenizer)
        return self._outputs(job, job.begin_report(job.predict()), make)

    def _gen_len(self, params: SamplingParams) -> int:
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

    def _outputs(
        self, job: Job, report: Report, make: Callable[[int, BlockResult], RequestOutput]
    ) -> Generator[list[RequestOutput]]:
        try:
            folder = self._options.offload_dir
            run = job.blocks(folder, report, shows_progress=self._progress)
            with arguments_told(), closing(run) as blocks:
                for block in blocks:
                    yield [make(index, block) for index in sorted(block.output_ids)]
        except BaseException as error:
            forget_frames(error)
            raise
        finally:
            end_keeping()
        self._report = report
        if self._options.uses_own_profile:
            keep_run(report, folder)


def _nothing() -> Generator[list[RequestOutput]]:
    yield from ()
