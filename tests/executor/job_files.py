"""Files of jobs, read without a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from executor.jobs.input_file import InputFile
from executor.jobs.limits import RequestLimits
from executor.jobs.lines import PromptLines
from executor.jobs.openai import BatchLines
from executor.jobs.params import ParamsMaker
from executor.jobs.reading import ReadJob, read_job
from executor.model.generation_config import GenerationConfig
from executor.model.sampling_params import SamplingParams
from executor.run.finished import Finished
from executor.text.chat import ChatTemplate

LIMITS = RequestLimits(vocab_size=100, max_positions=16)
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if shouts is defined and shouts %}!{% endif %}a:"
)


class LetterTokenizer:
    """One token for each character: its code modulo 100."""

    special_tokens: dict[str, str] = {}  # noqa: RUF012 - a protocol's property

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 100 for c in text]

    encode_rendered = encode

    def encode_batch(self, texts: Sequence[str], *, is_rendered: bool) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def decode_token(self, token_id: int) -> str:
        return chr(token_id)


def read(
    path: Path,
    load_tokenizer: Callable[[], Any] = LetterTokenizer,
    *,
    limits: RequestLimits = LIMITS,
    is_strict: bool = False,
    params: SamplingParams | None = None,
    config: dict[str, Any] | None = None,
    gen_len: int = 4,
) -> ReadJob:
    """Read a job whose outputs have 4 tokens where a line does not say."""
    maker = ParamsMaker(
        params or SamplingParams(),
        GenerationConfig(path=Path("generation_config.json"), values=config or {}),
        vocab_size=limits.vocab_size,
        gen_len=gen_len,
    )
    plain = PromptLines(limits, maker, load_tokenizer)
    batch = BatchLines(
        limits,
        maker,
        load_tokenizer,
        lambda: ChatTemplate(TEMPLATE, "template"),
        model="tiny",
        created=1700000000,
    )
    with InputFile(path, Path(tempfile.gettempdir())) as file:
        return read_job(file, [plain, batch], is_strict=is_strict)


def prompts_of(job: ReadJob) -> list[list[int]]:
    """Return the tokens of each request's prompt."""
    return [list(job.table.prompt_ids(row)) for row in range(job.table.num_rows)]


def done(ids: Sequence[int], reason: str = "length", **more: Any) -> Finished:
    """Return a request that has ended."""
    return Finished(request=0, ids=tuple(ids), reason=reason, **more)
