"""The KV cache of one decoder layer, in rows and bytes. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from costmodel.model.layer_spec import LayerSpec
from costmodel.model.tensor_layout import packed_bytes
from profiles.aligned_io import PAGE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """The KV cache of one layer.

    A row belongs to one key head of one sequence. For each token it has ``vectors`` of ``width``
    elements: a key and a value, or one that is both (latent attention).

    Parameters
    ----------
    rows_per_sequence
        Key heads.
    row_bytes
        Bytes of a row for one token, at rest.
    full_row_bytes
        The same in the dtype that attention computes in.
    window
        Most tokens of a sequence that are kept, the last ones; ``None`` keeps all.
    """

    rows_per_sequence: int
    width: int
    row_bytes: int
    full_row_bytes: int
    window: int | None = None
    vectors: int = 2

    def num_slots(self, num_tokens: int) -> int:
        """Return the slots that ``num_tokens`` tokens of a sequence take."""
        return num_tokens if self.window is None else min(num_tokens, self.window)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence, at rest."""
        return self.rows_per_sequence * self.row_bytes

    @property
    def full_token_bytes(self) -> int:
        """The same in the dtype that attention computes in."""
        return self.rows_per_sequence * self.full_row_bytes

    @property
    def rows_per_page(self) -> int:
        """Rows of one token that fit in a page of the disk, at least one."""
        return max(1, PAGE_BYTES // self.row_bytes)


def cache_of(layer: LayerSpec, bits: int, group_size: int, dtype_bytes: int) -> CacheSpec:
    """Return the cache of a layer that is stored with ``bits`` an element."""
    attention = layer.attention
    return CacheSpec(
        rows_per_sequence=attention.num_kv_heads,
        width=attention.head_dim,
        row_bytes=attention.cached_vectors * packed_bytes(attention.head_dim, bits, group_size),
        full_row_bytes=attention.cached_vectors * attention.head_dim * dtype_bytes,
        window=attention.window,
        vectors=attention.cached_vectors,
    )
