"""The Python interface: ``LLM`` runs prompts as the command ``executor.generate`` does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from costmodel.plan.policy import Policy
from executor.checkpoint.opening import open_checkpoint
from executor.cli.arguments import arguments_told, read_arguments
from executor.cli.run_command import Job
from executor.cli.run_report import Report
from executor.jobs.calls import CallPlanner, Params
from executor.machine.allocator import end_keeping
from executor.machine_profile import keep_run
from executor.run.exclusive import TURN, ExclusiveRun, forget_frames
from executor.run.requests import OutputMaker, Prompt, RequestOutput
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

Message = Mapping[str, Any]
T = TypeVar("T")


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
        self._run: weakref.ref[ExclusiveRun[Any]] | None = None

    @property
    def report(self) -> Report | None:
        """Predicted beside measured, of the last run that came to its end; can be printed."""
        return self._report

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None
    ) -> list[RequestOutput]:
        """Continue prompts; returns one output for each, in their order.

        Parameters
        ----------
        prompts
            One or a list of: text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``.
        params
            How tokens are chosen: ``SamplingParams`` for all prompts, or a list with one for each.
            ``None`` follows the model's ``generation_config.json``.
        """
        with TURN, closing(self.iter_blocks(prompts, params)) as blocks:
            outputs = [output for block in blocks for output in block]
        return sorted(outputs, key=lambda output: output.index)

    def iter_outputs(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None
    ) -> ExclusiveRun[RequestOutput]:
        """Continue prompts as ``generate`` does, and yield each output as it ends.

        The run holds its memory until the last output, or until ``close`` of the iterator.
        """
        return self._exclusive(lambda: _each(self._begin(prompts, params)))

    def iter_blocks(
        self, prompts: Prompt | Sequence[Prompt], params: Params = None
    ) -> ExclusiveRun[list[RequestOutput]]:
        """Continue prompts as ``generate`` does, and yield the outputs that end together.

        These are the outputs of a block, and blocks with longer prompts come first. Where prompts
        begin as others end, they are those of one pass over the model. An interrupt loses only what
        has not ended. The run holds its memory until the end, or until ``close`` of the iterator.
        """
        return self._exclusive(partial(self._begin, prompts, params))

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
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

    def _exclusive(self, plan: Callable[[], Generator[T]]) -> ExclusiveRun[T]:
        with arguments_told():
            run = ExclusiveRun.begin(plan)
        self._run = weakref.ref(run)
        return run

    def _begin(
        self, prompts: Prompt | Sequence[Prompt], params: Params
    ) -> Generator[list[RequestOutput]]:
        """Check everything and plan; the generator runs."""
        planner = CallPlanner(
            self._options,
            self._source,
            self._config,
            lambda: self._tokenizer,
            has_tokenizer=has_tokenizer(self._folder),
        )
        planned = planner.plan(prompts, params)
        if planned is None:
            return _nothing()
        job, maker = planned
        return self._outputs(job, job.begin_report(job.predict()), maker)

    def _outputs(
        self, job: Job, report: Report, maker: OutputMaker
    ) -> Generator[list[RequestOutput]]:
        try:
            folder = self._options.offload_dir
            run = job.blocks(folder, report, shows_progress=self._progress)
            with arguments_told(), closing(run) as blocks:
                for block in blocks:
                    if outputs := maker.take(block):
                        yield outputs
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


def _each(blocks: Generator[list[T]]) -> Generator[T]:
    with closing(blocks):
        for block in blocks:
            yield from block
