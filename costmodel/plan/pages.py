"""Pages of the KV cache of lanes: how many a sequence takes, and how many there are. No torch.

A page holds ``PAGE`` tokens of one sequence in one layer. A page number means the same place in
every layer whose cache has the same ring, so that a sequence has one page table for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from costmodel.model.cache import CacheSpec
from costmodel.model.spec import ModelSpec

# Tokens of a page: whole tiles of the attention kernels, and little waste at a sequence's end.
PAGE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSizes:
    """The pages of a pool, for each different ring of a model (see ``rings_of``).

    Parameters
    ----------
    pages
        Pages of the pool.
    most_pages
        Most pages of one sequence; ``None`` where a sequence takes more with every page of tokens.
    """

    pages: tuple[int, ...]
    most_pages: tuple[int | None, ...]

    @classmethod
    def of(cls, model: ModelSpec, *, pool_tokens: int, most_lanes: int) -> PoolSizes:
        """Return the pages for ``pool_tokens`` tokens of at most ``most_lanes`` sequences."""
        most = tuple(None if ring is None else ring // PAGE for ring in rings_of(model))
        pages = pages_of(pool_tokens)
        return cls(
            pages=tuple(pages if m is None else min(pages, m * most_lanes) for m in most),
            most_pages=most,
        )

    def needed(self, num_tokens: int) -> tuple[int, ...]:
        """Return the pages that a sequence of ``num_tokens`` cached tokens takes."""
        pages = pages_of(num_tokens)
        return tuple(pages if most is None else min(pages, most) for most in self.most_pages)


def pages_of(num_tokens: int) -> int:
    """Return the pages that ``num_tokens`` tokens fill, the last one perhaps in part."""
    return -(-num_tokens // PAGE)


def ring_tokens(window: int | None) -> int | None:
    """Return the slots of the ring that a layer with a window keeps of a sequence: whole pages.

    ``None`` is a layer that keeps all tokens.
    """
    return None if window is None else pages_of(window) * PAGE


def rings_of(model: ModelSpec) -> tuple[int | None, ...]:
    """Return the different rings of a model's layers, in the order of ``layer_kinds``."""
    rings = (ring_tokens(kind.attention.window) for kind in model.layer_kinds)
    return tuple(dict.fromkeys(rings))


def layer_bytes(model: ModelSpec, pool: PoolSizes, caches: Iterable[CacheSpec]) -> list[int]:
    """Return the bytes of all pages of a layer with each of the ``caches``."""
    rings = rings_of(model)
    return [
        pool.pages[rings.index(ring_tokens(cache.window))] * PAGE * cache.token_bytes
        for cache in caches
    ]
