"""What llama.cpp and transformers choose along an answer, and how near their second choice is.

A process of its own, without this folder on its path, where another module is named ``llama_cpp``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

# Tokens of the longest prompt and its answer.
CONTEXT = 512
F32 = gguf.GGMLQuantizationType.F32
# Of a prompt: ``tokens``, the likeliest one behind the prompt and behind each token of the answer
# but the last, and ``gaps``, the log-probability of each less that of the second likeliest.
Choices = dict[str, list[Any]]
# The logits behind every token: [tokens, words].
Logits = Callable[[list[int]], NDArray[np.float32]]


def main(request: Path, output: Path) -> None:
    """Read who is asked about which answers, and write a list of choices.

    Where all choices are those of an answer, it is the greedy answer of who is asked. Otherwise the
    greedy answer leaves it at the first choice that differs. One pass tells as much as a generation
    token by token.
    """
    asked = json.loads(request.read_text(encoding="utf-8"))
    logits_of = PEERS[asked["peer"]](Path(asked["model"]))
    pairs = zip(asked["prompts"], asked["answers"], strict=True)
    choices = [_choices(logits_of, prompt, answer) for prompt, answer in pairs]
    output.write_text(json.dumps(choices), encoding="utf-8")


def _choices(logits_of: Logits, prompt: list[int], answer: list[int]) -> Choices:
    logits = logits_of(prompt + answer[:-1])[len(prompt) - 1 :]
    # Logits less one number are log-probabilities.
    second, first = np.partition(logits, -2, axis=-1)[:, -2:].T
    return {"tokens": logits.argmax(axis=-1).tolist(), "gaps": (first - second).tolist()}


def llama_cpp_logits(model: Path) -> Logits:
    """Open llama.cpp; its cache is in float32 for a model in float32, else in float16."""
    llama_cpp = import_module("llama_cpp")
    threads = len(os.sched_getaffinity(0))
    kind = llama_cpp.GGML_TYPE_F32 if _is_plain(model) else llama_cpp.GGML_TYPE_F16
    llama = llama_cpp.Llama(
        str(model),
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=kind,
        type_v=kind,
        logits_all=True,
        verbose=False,
    )

    def logits_of(tokens: list[int]) -> NDArray[np.float32]:
        llama.reset()
        llama.eval(tokens)
        scores: NDArray[np.float32] = llama.scores[: len(tokens)]
        return scores

    return logits_of


def transformers_logits(model: Path) -> Logits:
    """Open transformers, which unpacks the weights to float32."""
    from transformers import AutoModelForCausalLM  # takes seconds

    theirs = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    ).eval()

    def logits_of(tokens: list[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = theirs(torch.tensor([tokens])).logits[0].numpy()
        return logits

    return logits_of


def write_float32(model: Path, path: Path) -> None:
    """Write a GGUF file with the same metadata and all its tensors unpacked to float32."""
    reader = gguf.GGUFReader(model)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _is_plain(model: Path) -> bool:
    return all(tensor.tensor_type == F32 for tensor in gguf.GGUFReader(model).tensors)


PEERS = {"transformers": transformers_logits, "llama.cpp": llama_cpp_logits}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
