"""The peer: Hugging Face transformers, plain or offloading to disk, in a process of its own."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from profiles.files import write_json
from profiles.runtime import peak_resident_bytes


class FirstTokenClock(transformers.LogitsProcessor):  # type: ignore[misc]  # untyped base
    """Changes nothing; notes when the first logits arrive, which is when prefill ends."""

    def __init__(self) -> None:
        self.first_s: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Pass the logits on."""
        if self.first_s is None:
            self.first_s = time.perf_counter()
        return scores


def main() -> None:
    """Load, generate greedily in one batch, write the times."""
    flags = _parse()
    start = time.perf_counter()
    model = load_model(flags)
    load_s = time.perf_counter() - start
    lines = flags.prompts.read_text(encoding="utf-8").splitlines()
    ids = torch.tensor([json.loads(line)["prompt_ids"] for line in lines])
    clock = FirstTokenClock()
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=flags.gen_len,
        max_new_tokens=flags.gen_len,
        do_sample=False,
        pad_token_id=0,
        logits_processor=transformers.LogitsProcessorList([clock]),
    )
    end = time.perf_counter()
    assert clock.first_s is not None
    assert output.shape == (ids.shape[0], ids.shape[1] + flags.gen_len)
    places = list(getattr(model, "hf_device_map", {"": "cpu"}).values())
    write_json(
        flags.output,
        {
            "load_s": load_s,
            "prefill_s": clock.first_s - start,
            "decode_s": end - clock.first_s,
            "resident_peak_bytes": peak_resident_bytes(),
            "modules_on_disk": places.count("disk"),
            "modules": len(places),
        },
    )


def load_model(flags: argparse.Namespace) -> Any:
    """Load a model, which is offloaded where ``flags`` have a folder for that."""
    offload: dict[str, Any] = {}
    if flags.offload_dir is not None:
        offload = {
            "device_map": "auto",
            "max_memory": {"cpu": flags.max_memory},
            "offload_folder": flags.offload_dir,
        }
    return transformers.AutoModelForCausalLM.from_pretrained(
        flags.model, dtype=getattr(torch, flags.dtype), **offload
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a peer of tests/bench/offload.py.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help='lines with "prompt_ids"')
    parser.add_argument("--gen-len", type=int, required=True)
    parser.add_argument("--offload-dir", type=Path, help="without it, nothing is offloaded")
    parser.add_argument("--max-memory", type=int, help="bytes of weights in memory, if offloading")
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    if (flags.offload_dir is None) != (flags.max_memory is None):
        parser.error("--offload-dir and --max-memory go together")
    return flags


if __name__ == "__main__":
    main()
