"""The input of the first decoder layer, made of the embedding's tables."""

from __future__ import annotations

import torch

from costmodel.model.shapes import embedding_shapes
from costmodel.model.spec import ModelSpec
from executor.model import layers
from executor.model.matrices import LayerWeights, linear
from executor.model.norms import norm
from executor.stores.embedding import EmbeddingTable
from executor.stores.weight_file import WeightFile
from executor.stores.weights import WeightStore


class TokenEmbedding:
    """Looks up tokens and positions, and computes what ``EmbeddingSpec`` says.

    Parameters
    ----------
    weights, file
        The store and, where some weights are on disk, its file.
    """

    def __init__(self, model: ModelSpec, weights: WeightStore, file: WeightFile | None) -> None:
        self._spec = model.embedding
        names = dict.fromkeys(embedding_shapes(model))
        if model.shares_table:
            names["head.weight"] = None
        self._tables = {name: EmbeddingTable(weights, file, name) for name in names}
        self._tokens = self._tables.get("head.weight" if model.shares_table else "tokens.weight")

    def fill(self, out: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor) -> None:
        """Embed tokens.

        Parameters
        ----------
        out
            Filled with the result, [batch, tokens, hidden_size], on the device that computes.
        ids
            int64 [batch, tokens] in CPU memory.
        positions
            int64 [batch, tokens], or [1, tokens] where all sequences have the same.
        """
        spec = self._spec
        assert self._tokens is not None, "a later stage has no embedding"
        out.copy_(self._projected(self._tokens.gather(ids)))
        layers.scale_embedding(out, spec)
        if spec.has_positions:
            out += self._tables["positions.weight"].gather(positions + spec.position_offset)
        if spec.norm is not None:
            weights = self._whole("embedding_norm.")
            out.copy_(norm(out, weights, "embedding_norm", spec.norm))

    def _projected(self, rows: torch.Tensor) -> torch.Tensor:
        weights = self._whole("input_projection.")
        return linear(rows, weights["input_projection.weight"]) if weights else rows

    def _whole(self, prefix: str) -> LayerWeights:
        """Return whole tensors, read again for every pass: they are small."""
        return {
            name: [table.gather(torch.arange(table.num_rows)).squeeze(0)]
            for name, table in self._tables.items()
            if name.startswith(prefix)
        }
