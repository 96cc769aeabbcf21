"""The files of a job, and a tiny model whose tokens are words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from costmodel.plan.policy import LanePolicy
from executor.checkpoint.folder import Checkpoint
from tests.executor.tiny_machines import change_policy, make_hardware, make_policy
from tests.executor.tiny_models import VOCAB_SIZE, save_tiny_model

GEN_LEN = 6
PROMPT_LEN = 8
PLAIN = "/v1/completions"
PROMPTS = [[5, 9, 170, 3], [12], [88, 1, 2, 3, 4, 5, 6, 7], [33, 34], [9, 8, 7]]
# Two batches of two lanes, with room for any four requests.
LANES = LanePolicy(pool_tokens=4 * 32, pass_rows=32, chunk_rows=16)


def save_job_model(folder: Path, **options: Any) -> Path:
    """Write a checkpoint whose token ``i`` is the word ``wi``."""
    whole: dict[str, Any] = {"family": "llama", "num_layers": 3} | options
    save_tiny_model(folder, **whole)
    vocabulary = {f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text("{}")
    return folder


class Desk:
    """The files of one job."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.prompts, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.errors, self.policy = folder / "out.errors.jsonl", folder / "policy.json"
        self.write_policy()

    def write_policy(
        self, *, prompt_len: int = PROMPT_LEN, gen_len: int = GEN_LEN, **changes: Any
    ) -> None:
        """Write the policy of a run: two batches of two, all in CPU memory, but for changes."""
        spec = Checkpoint.open(self.model).spec
        hardware = changes.pop("hardware", make_hardware())
        base = make_policy(spec, prompt_len=prompt_len, gen_len=gen_len)
        change_policy(base, hardware=hardware, **changes).save(self.policy)

    def write(self, *lines: dict[str, Any] | str) -> None:
        """Write the prompts."""
        texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
        self.prompts.write_text("".join(text + "\n" for text in texts))

    def arguments(self, *more: object) -> list[str]:
        """Return the arguments of a run."""
        flags = {"model": self.model, "prompts": self.prompts, "output": self.output}
        flags |= {"policy": self.policy, "offload-dir": self.folder}
        return [*(f"--{key}={value}" for key, value in flags.items()), *map(str, more)]

    def answers(self) -> dict[str, Any]:
        """Return the bodies of the answers by their names."""
        told = [json.loads(line) for line in self.output.read_text().splitlines()]
        assert len({each["custom_id"] for each in told}) == len(told)
        return {each["custom_id"]: each["response"]["body"] for each in told}


def request(number: int, prompt: list[Any] | None = None, **body: Any) -> dict[str, Any]:
    """Return the line that asks for the likeliest tokens behind a prompt."""
    body = {"prompt": prompt or PROMPTS[number], "temperature": 0} | body
    return {"custom_id": f"r{number}", "method": "POST", "url": PLAIN, "body": body}


def words(ids: list[int]) -> str:
    """Return the text of tokens behind others."""
    return "".join(f" w{i}" for i in ids)
