"""The cost of grouping tokens by expert, beside the products of the experts."""

from __future__ import annotations

import torch

from profiles import kernels
from profiles.compute_plan import DTYPES, measure_rate, noise
from profiles.repeats import Repeater

DTYPE = "bfloat16"
# A mixture of today: experts, those of a token, and elements of a token. No processor's cache holds
# the rows of so many tokens.
EXPERTS, CHOSEN, HIDDEN = 64, 8, 2048
TOKENS = 1024


def measure_grouping(device: str, repeater: Repeater) -> float:
    """Measure routing as in a run: tokens are scored and sorted by expert, copied to the rows of
    their experts, and added up again. Return bytes of these rows per second."""
    logits = torch.randn(TOKENS, EXPERTS).to(device)
    x = noise(device, DTYPE, TOKENS, HIDDEN)
    rows = torch.empty(TOKENS * CHOSEN, HIDDEN, dtype=DTYPES[DTYPE], device=device)
    out = torch.empty_like(x)

    def group() -> None:
        weights, experts = logits.softmax(dim=-1).topk(CHOSEN)
        order = experts.flatten().argsort(stable=True)
        tokens = order // CHOSEN
        torch.index_select(x, 0, tokens, out=rows)
        out.zero_()
        kernels.add_routed_rows(out, tokens, rows, weights.flatten()[order, None])

    return measure_rate(device, "grouping", "bytes_per_s", group, rows.nbytes, repeater)
