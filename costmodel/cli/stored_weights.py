"""How the weights of a policy are stored, in words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from costmodel.model.tensor_layout import ORDER, TABLE
from costmodel.plan.policy import Policy
from costmodel.pricing.sizes import sizes_of

# Encodings with a smaller share of the bytes are not named.
LEAST_SHARE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """The matrices of a model whose checkpoint is quantized.

    Parameters
    ----------
    shares
        Share of the bytes by encoding, the largest first; a dtype stands for plain matrices.
    bits
        Bits of an element on average, scales included.
    """

    shares: dict[str, float]
    bits: float

    def __str__(self) -> str:
        told = [f"{n} {s:.0%}" for n, s in self.shares.items() if s >= LEAST_SHARE]
        return f"{', '.join(told)} of bytes, {self.bits:.2g} bits an element"


def stored_weights(policy: Policy) -> StoredWeights | None:
    """Return how weights are stored; ``None`` where all have ``policy.weight_bits``."""
    model = policy.model
    if not model.is_encoded or policy.weight_bits < model.full_bits:
        return None
    sizes = sizes_of(model, policy.weight_bits, policy.group_size)
    counts: Counter[str] = Counter()
    beside = elements = 0
    for layer in sizes.layers:
        for component in layer.components:
            for tensor in component.tensors:
                num_bytes = tensor.num_bytes * component.num_units
                if len(tensor.shape) == 2:
                    how = tensor.encoding
                    counts[how.name if how else tensor.dtype or model.dtype] += num_bytes
                    elements += tensor.num_elements * component.num_units
                elif TABLE in tensor.name or ORDER in tensor.name:
                    beside += num_bytes
    total = counts.total()
    shares = {name: count / total for name, count in counts.most_common()}
    return StoredWeights(shares=shares, bits=8 * (total + beside) / elements)


def told_weights(policy: Policy) -> str:
    """Say in a few words how weights are stored, such as ``in 16 bits``."""
    stored = stored_weights(policy)
    return f"as stored: {stored}" if stored else f"in {policy.weight_bits} bits"
