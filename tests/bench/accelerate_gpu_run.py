"""The peer: transformers with accelerate's CPU offload and empty weights, in its own process.

Without a GPU, for a rehearsal, everything is placed and computed on the CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import transformers
from accelerate import dispatch_model, infer_auto_device_map
from transformers_run import FirstTokenClock

from costmodel.model.loading import load_model_spec
from profiles.compute_plan import DTYPES
from profiles.files import read_json


def main() -> None:
    """Place the model, generate greedily in one batch, write the seconds."""
    flags = _parse()
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, flags.gpu_memory / total))
    settings = read_json(flags.config, "model config")
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[flags.dtype])
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.zero_()
    model.tie_weights()
    room: dict[int | str, int] = {0: _room(flags)} if has_gpu else {}
    places = infer_auto_device_map(
        model,
        max_memory={**room, "cpu": 10**12},
        no_split_module_classes=model._no_split_modules,
    )
    if has_gpu:
        model = dispatch_model(model, places, main_device=0, offload_buffers=True)
    ids = torch.full((flags.batch, flags.prompt_len), 5, device="cuda" if has_gpu else "cpu")
    clock = FirstTokenClock()
    start = time.perf_counter()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=flags.gen_len,
        max_new_tokens=flags.gen_len,
        do_sample=False,
        pad_token_id=0,
        logits_processor=transformers.LogitsProcessorList([clock]),
    )
    if has_gpu:
        torch.cuda.synchronize()
    end = time.perf_counter()
    assert clock.first_s is not None
    figures = {
        "prefill_s": clock.first_s - start,
        "decode_s": end - clock.first_s,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if has_gpu else None,
        "modules_on_gpu": sum(place == 0 for place in places.values()),
        "modules": len(places),
    }
    flags.output.write_text(json.dumps(figures), encoding="utf-8")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run a peer of tests/bench/gpu.py.")
    add = parser.add_argument
    add("--config", type=Path, required=True, help="a config.json")
    add("--dtype", required=True)
    add("--gpu-memory", type=int, required=True, help="bytes")
    add("--batch", type=int, required=True)
    add("--prompt-len", type=int, required=True)
    add("--gen-len", type=int, required=True)
    add("--output", type=Path, required=True)
    return parser.parse_args()


def _room(flags: argparse.Namespace) -> int:
    """Return the bytes that weights may take on the GPU: the cache is there with what a layer
    computes."""
    spec = load_model_spec(str(flags.config))
    context = flags.batch * (flags.prompt_len + flags.gen_len)
    elements = sum(2 * count * kind.attention.kv_size for kind, count in spec.kinds_and_counts)
    cache_bytes = context * elements * DTYPES[flags.dtype].itemsize
    return max(0, int(flags.gpu_memory - 2 * cache_bytes - 2**30))


if __name__ == "__main__":
    main()
