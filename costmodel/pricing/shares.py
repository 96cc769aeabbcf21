"""The variables of the program, as numbers or as linear forms."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Generic

from costmodel.plan.policy import TIERS, Policy
from costmodel.pricing.linear_form import LinearForm, Quantity, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """Properties of one share that the formulas do not show.

    Parameters
    ----------
    group
        Shares of one group add up to the whole, because they place the same bytes.
    is_scaled
        Whether the variable is the share times ``per_block``.
    needs_product
        Whether formulas use the product of the share and ``per_block``.
    needs_gpu
        Whether the share is zero on a machine without a GPU.
    """

    group: str = ""
    is_scaled: bool = False
    needs_product: bool = False
    needs_gpu: bool = False


PLAIN_VARIABLES = {
    "cache_gpu": Variable(group="cache", needs_gpu=True),
    "cache_cpu": Variable(group="cache", needs_product=True),
    "cache_disk": Variable(group="cache", needs_product=True),
    "attended": Variable(needs_gpu=True, needs_product=True),
    "experts_in_place": Variable(needs_gpu=True, needs_product=True),
    "activations_gpu": Variable(group="activations", needs_gpu=True),
    "activations_cpu": Variable(group="activations", needs_product=True),
    "activations_disk": Variable(group="activations", needs_product=True),
}
PRODUCTS = tuple(name for name, variable in PLAIN_VARIABLES.items() if variable.needs_product)


def product_name(name: str) -> str:
    """Return the name of the product of a share and ``per_block``."""
    return f"{name}_per_block"


def weight_name(component: str, tier: str) -> str:
    """Return the name of the share of a class of components on a tier."""
    return f"weights_{component}_{tier}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierShares(Generic[Quantity]):
    """The shares of one class of components on each tier."""

    gpu: Quantity
    cpu: Quantity
    disk: Quantity

    @property
    def off_gpu(self) -> Quantity:
        """The share off the GPU."""
        return self.cpu + self.disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares(Generic[Quantity]):
    """The variables, per sequence of the block.

    Division by the block size makes the program linear (Charnes and Cooper 1962). ``per_block`` is
    ``1 / block_size``. The shares of ``weights``, by class of components, are multiplied by it; all
    others are plain fractions.

    - ``attended``: the fraction of the whole cache that is off the GPU and that the CPU attends to.
    - ``experts_in_place``: the fraction of all experts that the CPU multiplies in place in decode.
    - ``whole``: the constant one, so that no formula has a constant term.
    - ``*_per_block``: the product of a fraction and ``per_block``. Some costs need it: staging
      buffers hold the cache of one batch, not of the block. The product is exact where the block
      size is fixed, and a McCormick variable where it is open.
    """

    whole: Quantity
    per_block: Quantity
    cache_gpu: Quantity
    cache_cpu: Quantity
    cache_disk: Quantity
    attended: Quantity
    experts_in_place: Quantity
    activations_gpu: Quantity
    activations_cpu: Quantity
    activations_disk: Quantity
    cache_cpu_per_block: Quantity
    cache_disk_per_block: Quantity
    attended_per_block: Quantity
    experts_in_place_per_block: Quantity
    activations_cpu_per_block: Quantity
    activations_disk_per_block: Quantity
    weights: Mapping[str, TierShares[Quantity]]

    @classmethod
    def of(cls, values: Mapping[str, Quantity], components: tuple[str, ...]) -> Shares[Quantity]:
        """Make shares of the values of all variables, by ``share_names``."""
        return cls(
            **{name: values[name] for name in PLAIN_NAMES},
            weights={
                component: TierShares(
                    **{tier: values[weight_name(component, tier)] for tier in TIERS}
                )
                for component in components
            },
        )

    def values(self) -> dict[str, Quantity]:
        """Return the values of all variables, by ``share_names``."""
        return {name: getattr(self, name) for name in PLAIN_NAMES} | {
            weight_name(component, tier): getattr(shares, tier)
            for component, shares in self.weights.items()
            for tier in TIERS
        }

    def of_one_batch(self, gpu_batch_size: int) -> Shares[Quantity]:
        """Return the shares times the fraction of one batch in the block.

        Formulas then give the costs of one batch, per sequence of the block. The shares of weights
        and of the cache on the GPU are not scaled, because no such formula uses them.
        """
        scaled = {name: getattr(self, product_name(name)) * gpu_batch_size for name in PRODUCTS}
        return replace(self, whole=self.per_block * gpu_batch_size, **scaled)

    def value_of(self, form: LinearForm) -> Quantity:
        """Return the value of a linear form at these shares."""
        values = self.values()
        parts = [values[name] * factor for name, factor in form.terms.items()]
        return total(parts or [self.whole * 0.0])


PLAIN_NAMES = tuple(f.name for f in fields(Shares) if f.name != "weights")


@functools.cache
def share_names(components: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of all variables; those of the weights come last."""
    return PLAIN_NAMES + tuple(weight_name(c, tier) for c in components for tier in TIERS)


@functools.cache
def variables_of(components: tuple[str, ...]) -> Mapping[str, Variable]:
    """Return the properties of each variable that the program chooses."""
    return PLAIN_VARIABLES | {
        weight_name(c, tier): Variable(
            group=f"weights_{c}", is_scaled=True, needs_gpu=tier == "gpu"
        )
        for c in components
        for tier in TIERS
    }


@functools.cache
def unit_shares(components: tuple[str, ...]) -> Shares[LinearForm]:
    """Return the variables as forms: a formula evaluated on them gives its coefficients."""
    forms = {name: LinearForm({name: 1.0}) for name in share_names(components)}
    return Shares.of(forms, components)


def shares_of(policy: Policy) -> Shares[float]:
    """Return a policy's fractions as the values of the program's variables."""
    per_block = 1 / policy.block_size
    plain = {
        f"{kind}_{tier}": getattr(placement, tier)
        for kind, placement in (("cache", policy.cache), ("activations", policy.activations))
        for tier in TIERS
    }
    plain["attended"] = policy.cpu_attention * (policy.cache.cpu + policy.cache.disk)
    experts = policy.weights.get("experts")
    plain["experts_in_place"] = policy.cpu_experts * experts.cpu if experts else 0.0
    return Shares(
        whole=1.0,
        per_block=per_block,
        **plain,
        **{product_name(name): plain[name] * per_block for name in PRODUCTS},
        weights={
            component: TierShares(**{tier: getattr(placement, tier) * per_block for tier in TIERS})
            for component, placement in policy.weights.items()
        },
    )
