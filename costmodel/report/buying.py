"""What to buy: the search repeated on machines that differ in one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from costmodel.optimizer.choices import FULL_BITS, Permitted
from costmodel.optimizer.optimum import Search
from costmodel.optimizer.whatif import Change, what_would_change
from costmodel.plan.policy import Policy
from profiles.errors import ZigzagError
from profiles.hardware import HardwareProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchases:
    """The throughput of the best policy on this machine, and on machines that differ from it.

    ``problem`` says why there is none of it.
    """

    job_tok_per_s: float = 0.0
    changes: Sequence[Change] = ()
    problem: str = ""


def purchases_of_policy(policy: Policy, hardware: HardwareProfile) -> Purchases:
    """Search with a policy's own precision, as its origin is not known."""
    full = policy.model.full_bits
    weight_bits, cache_bits = (
        FULL_BITS if bits == full else bits for bits in (policy.weight_bits, policy.cache_bits)
    )
    try:
        permitted = Permitted(
            weight_bits=(weight_bits,),
            cache_bits=(cache_bits,),
            group_size=policy.group_size,
            sparsity=policy.attention_sparsity,
            requantizes=True,
        )
        search = Search(hardware, policy.model, policy.workload)
        result = search.run(permitted)
        changes = what_would_change(search, result, permitted=permitted)
    except ZigzagError as error:
        # A policy written by hand may fit where no search finds one, with its margin left free.
        return Purchases(problem=str(error))
    return Purchases(job_tok_per_s=result.job_tok_per_s, changes=changes)
