"""The order in which a run stores the experts of each layer: the most used on the fastest tier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from costmodel.plan.cuts import ExpertOrder
from costmodel.plan.policy import Policy
from costmodel.pricing.price import policy_peaks
from costmodel.pricing.problem import problem_of
from executor.expert_counts import mixtures_of
from profiles.hardware import HardwareProfile

FloatArray = NDArray[np.float64]


def order_of(shares: Sequence[FloatArray]) -> ExpertOrder:
    """Return the order of the experts in each layer; of equals, the lower number comes first."""
    return [tuple(np.argsort(-share, kind="stable").tolist()) for share in shares]


def shares_to_order(
    policy: Policy, hardware: HardwareProfile, shares: Sequence[FloatArray] | None
) -> list[FloatArray]:
    """Return the shares of tokens by which a run orders its experts; none where it does not.

    Only loads on demand gain by an order, and the disk must have room. Experts in place are
    adjacent by number. Without earlier runs (``None``), all experts are alike: only a cache of
    experts, which changes their order later, then needs one.
    """
    has_cache = not hardware.has_gpu and policy.lanes is None
    if not policy.loads_on_demand or policy.cpu_experts or not (has_cache or shares):
        return []
    needed = policy_peaks(policy, hardware)["disk"] + bytes_of_order(policy, hardware)
    if needed > hardware.disk.free_bytes:
        return []
    if shares is not None:
        return list(shares)
    counts = [(e.num_experts, e.experts_per_token) for e in mixtures_of(policy.model)]
    return [np.full(count, chosen / count) for count, chosen in counts]


def bytes_of_order(policy: Policy, hardware: HardwareProfile) -> int:
    """Return the bytes that an order of experts takes on disk beyond the policy's own.

    The weight file has experts by number, so that it has all those of a layer with any on disk.
    """
    problem = problem_of(policy, hardware)
    is_priced = problem.walks_experts or problem.orders_experts
    is_priced = is_priced or not policy.weights["experts"].disk
    return 0 if is_priced else problem.sizes.component_bytes["experts"]
