"""Train the bundled model: a small Llama on the King James Version of the Bible.

The text is in the public domain. On Debian: ``apt-get install bible-kjv bible-kjv-text``, then
``bible -f gen1:1-rev22:21 > kjv.txt`` (one verse a line, each with its reference).

    python models/train_kjv.py --text kjv.txt --output executor/data/kjv --minutes 40

Every twentieth chapter is held out, and written beside the checkpoint's folder. The checkpoint
with the lowest held-out loss is kept, in Hugging Face format, weights in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512
HELD_OUT_EVERY = 20
BATCH = 8
PEAK_RATE = 1.5e-3
WARMUP_STEPS = 100
EVALUATE_EVERY_S = 120.0


def read_chapters(path: Path) -> list[str]:
    """Read verses such as ``Ge1:1 In the beginning ...`` and join them into chapters."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"(\S+?):\d+\s+(.*)", line)
        if match:
            chapters.setdefault(match.group(1), []).append(match.group(2).strip())
    return ["\n".join(verses) for verses in chapters.values()]


def train_tokenizer(chapters: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose encoding begins with the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def make_model(end_id: int) -> LlamaForCausalLM:
    """Make the model in float32, about five and a half million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end_id,
        eos_token_id=end_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, chapters: list[str]) -> torch.Tensor:
    """Encode chapters one behind the other, each begun by the end-of-text token."""
    return torch.tensor([i for chapter in chapters for i in tokenizer.encode(chapter)])


def batches(tokens: torch.Tensor, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield windows [BATCH, CONTEXT] at random places, for ever."""
    while True:
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
        yield torch.stack([tokens[s : s + CONTEXT] for s in starts.tolist()])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Return the mean loss in nats per token over consecutive windows."""
    model.eval()
    losses: list[float] = []
    for window in tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT).split(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(input_ids=window, labels=window).loss.float().item() * len(window))
    model.train()
    return sum(losses) / (len(tokens) // CONTEXT)


def train(
    model: LlamaForCausalLM, text: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Train for the given minutes, saving the best model; returns figures about it."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    source = batches(text, torch.Generator().manual_seed(args.seed))
    start = last = time.monotonic()
    best: dict[str, float] = {"held_out_loss": math.inf}
    step, share = 0, 0.0
    while share < 1:
        share = (time.monotonic() - start) / (60 * args.minutes)
        cosine = 0.52 + 0.48 * math.cos(math.pi * min(share, 1))
        rate = PEAK_RATE * min(1, (step + 1) / WARMUP_STEPS) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        window = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if time.monotonic() - last > EVALUATE_EVERY_S or share >= 1:
            last = time.monotonic()
            found = held_out_loss(model, held_out)
            print(f"step {step} train {loss.item():.3f} held out {found:.3f}", flush=True)
            if found < best["held_out_loss"]:
                best = {"held_out_loss": found, "tokens": step * BATCH * CONTEXT}
                save(model, args.output)
    return best


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16 beside the tokenizer."""
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    copy.tie_weights()
    copy.save_pretrained(folder)


def main() -> None:
    """Parse the flags and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="one verse a line")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    chapters = read_chapters(args.text)
    held_out = chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    args.output.with_name("held_out.txt").write_text("\n\n".join(held_out), encoding="utf-8")
    seen = [c for i, c in enumerate(chapters) if (i + 1) % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(seen)
    tokenizer.save_pretrained(args.output)
    model = make_model(int(tokenizer.eos_token_id))
    figures = train(model, encode(tokenizer, seen), encode(tokenizer, held_out), args)
    figures["perplexity"] = math.exp(figures["held_out_loss"])
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
