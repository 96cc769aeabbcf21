"""Which layers have experts, where a config lists it."""

from __future__ import annotations

from costmodel.families._shared import num_layers
from costmodel.model.hf_config import HFConfig

DENSE, SPARSE = "dense", "sparse"


def listed_sparse_layers(config: HFConfig, num_dense: int) -> list[bool]:
    """Read which layers have experts; without ``mlp_layer_types``, all but the first
    ``num_dense``."""
    found, count = config.get("mlp_layer_types"), num_layers(config)
    if found is None:
        return [i >= num_dense for i in range(count)]
    if not isinstance(found, list) or len(found) < count:
        raise config.refusal("mlp_layer_types", found, f"a list of {count}, one for each layer")
    for kind in found:
        if kind not in (DENSE, SPARSE):
            raise config.refusal("mlp_layer_types", kind, f"{DENSE}, {SPARSE}")
    return [kind == SPARSE for kind in found[:count]]
