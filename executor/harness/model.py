"""``zigzag`` among the models of lm-evaluation-harness.

Importing this module registers it. Whatever the harness asks for in one call is one job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoTokenizer

from costmodel.gguf.paths import is_gguf
from executor.cli.job_flags import add_offload_flags
from executor.harness.job_maker import JobMaker, ScoreRequest
from executor.harness.task_sampling import make_sampler
from executor.text.loading import load_generation_config
from profiles.command import Parser
from profiles.errors import InputError

DEFAULT_MAX_GEN_TOKS = 256
SIZES = ("gpu_memory", "cpu_memory", "disk")


@register_model("zigzag")
class ZigzagLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types where it is absent
    """A model that need not fit the memory, for lm-evaluation-harness.

    Log-likelihoods and answers are those of the harness's own ``hf`` model on the same checkpoint.

    Parameters
    ----------
    pretrained
        Checkpoint folder.
    max_length
        Most tokens that the model is given at once; ``None`` for as many as it has positions.
    max_gen_toks
        Tokens to generate where a task does not say.
    enable_thinking
        Passed on to the chat template; ``None`` leaves it to the template.
    batch_size, max_batch_size, device
        Are given to every model by the harness. The policy decides what they would.
    options
        The flags of the commands by their names in Python, such as ``cpu_memory="8GiB"``,
        ``policy``, ``hardware``, ``offload_dir``, ``dtype`` or ``weight_bits``.
    """

    def __init__(
        self,
        pretrained: str | Path,
        *,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        enable_thinking: bool | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        folder = Path(pretrained)
        parser = Parser(prog="executor.lm_eval", description="", example="")
        add_offload_flags(parser)
        flags = parser.parse_args(_flags_of(options))
        self._jobs = JobMaker(folder, flags, max_length=max_length)
        self._config = load_generation_config(folder)
        self._max_gen_toks = max_gen_toks
        self._template_options = (
            {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        )
        if is_gguf(folder):
            allowed = "a Hugging Face folder, whose tokenizer the harness reads"
            raise InputError("model", got=f"{folder}, a GGUF file", allowed=allowed)
        self.tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"tokenizer of {folder}", got="no end token", allowed="one with it")

    @property
    def max_length(self) -> int:
        """Most tokens that the model is given at once."""
        return self._jobs.max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task does not say."""
        return self._max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, with which the harness tells its request caches apart."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text that the tokenizer's chat template makes of messages."""
        if self.tokenizer.chat_template is None:
            raise InputError(
                f"chat template of {self.tokenizer.name_or_path}",
                got="none",
                allowed="a checkpoint with one",
                hint="running without --apply-chat-template",
            )
        return str(
            self.tokenizer.apply_chat_template(
                list(chat_history),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_options,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text. A text that begins with the first special token, as chat
        templates make them, is given no other."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        told = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **told))

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, in windows of the model's whole context."""
        windows, counts = [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            found = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue each text up to the first of its stop strings. Requests that are to be sampled
        alike are one job."""
        groups: dict[str, list[int]] = {}
        wanted = [self._settings_of(request) for request in requests]
        for index, options in enumerate(wanted):
            alike = {name: value for name, value in options.items() if name != "until"}
            groups.setdefault(repr(sorted(alike.items())), []).append(index)
        texts = [""] * len(requests)
        for indices in groups.values():
            made = self._continue(
                [requests[i].args[0] for i in indices], [wanted[i] for i in indices]
            )
            for index, text in zip(indices, made, strict=True):
                texts[index] = text
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _settings_of(self, request: Instance) -> dict[str, Any]:
        given = request.args[1]
        try:
            return dict(normalize_gen_kwargs(given, self.max_gen_toks))
        except (TypeError, ValueError) as error:
            raise InputError(
                "generation_kwargs", got=given, allowed="numbers where they are due"
            ) from error

    def _continue(self, contexts: Sequence[str], wanted: Sequence[dict[str, Any]]) -> list[str]:
        end = self.tokenizer.decode(self.eot_token_id)
        stops = [handle_stop_sequences(list(o["until"]), eos=end) for o in wanted]
        outputs = self._jobs.generate(
            [self.tok_encode(context) or [self.prefix_token_id] for context in contexts],
            stops,
            gen_len=wanted[0]["max_gen_toks"],
            sampler=make_sampler(wanted[0], self._config, self._jobs.vocab_size),
            eos_ids=self._config.eos_ids | {self.eot_token_id},
            decode=self.tokenizer.decode,
        )
        texts = (self.tokenizer.decode(ids, skip_special_tokens=True) for ids in outputs)
        return [
            postprocess_generated_text(text, stop, None)
            for text, stop in zip(texts, stops, strict=True)
        ]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        wanted = [ScoreRequest(context=c, continuation=t) for _, c, t in requests]
        answers = [(score.log_prob, score.is_greedy) for score in self._jobs.score(wanted)]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers


def _flags_of(options: Mapping[str, Any]) -> list[str]:
    """Write options as flags of a command line. Sizes may be bytes, other options lists."""
    told = {name: value for name, value in options.items() if value is not None}
    for name, value in told.items():
        if name in SIZES and isinstance(value, int):
            told[name] = f"{value}B"
        elif isinstance(value, list | tuple):
            told[name] = ",".join(map(str, value))
    flags = {f"--{name.replace('_', '-')}": value for name, value in told.items()}
    # The harness gives True as a bool, its command line as a word.
    switches = [flag for flag, value in flags.items() if str(value) == "True"]
    return switches + [f"{flag}={v}" for flag, v in flags.items() if flag not in switches]
