"""The same model without any offloading: the layer functions in the plainest loop there is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from costmodel.model.attention_spec import AttentionSpec
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import ComponentLayout, LayerLayout, decoder_numbers, model_layers
from costmodel.model.spec import EmbeddingSpec
from costmodel.model.tensor_layout import FLOAT32_TENSORS
from executor.checkpoint.folder import WeightSource
from executor.model import layers, projections
from executor.model.matrices import linear
from executor.model.norms import norm
from executor.model.rotations import position_factors
from profiles.compute_plan import DTYPES
from profiles.kernels.group_twins import pack_rows_twin, unpack_rows_twin
from profiles.packing import Packing

Tensors = Mapping[str, Sequence[torch.Tensor]]


def read_layer(source: WeightSource, index: int, layout: LayerLayout) -> torch.Tensor:
    """Read the components of a layer, one behind another."""
    out = torch.full((layout.num_bytes,), 255, dtype=torch.uint8)
    for component, buffer in _buffers(out, layout):
        source.read_range(index, component, 0, buffer)
    return out


def view_layer(
    buffer: torch.Tensor, layout: LayerLayout, dtype: torch.dtype, cut: float = 0.0
) -> dict[str, tuple[torch.Tensor, ...]]:
    """View a layer's bytes as tensors.

    Each component is cut near a fraction ``cut`` of it. A matrix that the cut falls into has two
    chunks; those of experts have one matrix for each expert.
    """
    weights: dict[str, tuple[torch.Tensor, ...]] = {}
    for component, part in _buffers(buffer, layout):
        cut_bytes = component.cut_near(cut * component.num_bytes)
        units = part.split(component.unit_bytes)
        for tensor in component.tensors:
            wholes = [
                unit[tensor.offset_bytes : tensor.end_bytes]
                .view(DTYPES[tensor.dtype] if tensor.dtype else dtype)
                .view(tensor.shape)
                for unit in units
            ]
            row = (cut_bytes - tensor.offset_bytes) // tensor.row_bytes
            if component.num_units == 1 and len(tensor.shape) == 2 and 0 < row < tensor.num_rows:
                wholes = [wholes[0][:row], wholes[0][row:]]
            weights[tensor.name] = tuple(wholes)
    return weights


def _buffers(
    buffer: torch.Tensor, layout: LayerLayout
) -> Iterator[tuple[ComponentLayout, torch.Tensor]]:
    sizes = [component.num_bytes for component in layout.components]
    return zip(layout.components, buffer.split(sizes), strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What is lost: bits of weights and cache (``None`` keeps the dtype), and values not read."""

    weight_bits: int | None = None
    cache_bits: int | None = None
    group_size: int = 64
    sparsity: float = 1.0

    def of(self, x: torch.Tensor, bits: int | None) -> torch.Tensor:
        """Return what is left of ``x`` [..., elements] after a round trip through groups."""
        if bits is None:
            return x
        packing = Packing(num_elements=x.shape[-1], bits=bits, group_size=self.group_size)
        rows = x.reshape(1, -1, x.shape[-1])
        packed = torch.empty(1, rows.shape[1], packing.row_bytes, dtype=torch.uint8)
        pack_rows_twin(rows, packing, packed)
        out = torch.empty_like(rows)
        unpack_rows_twin(packed, packing, out)
        return out.view(x.shape)


class ReferenceModel:
    """All weights in memory, one batch, no schedule.

    ``cut`` is the fraction of every component at which it is cut into two row chunks; the results
    must not depend on it.
    """

    def __init__(
        self, source: WeightSource, *, cut: float = 0.0, compression: Compression | None = None
    ) -> None:
        self.spec = source.spec
        self.compression = compression or Compression()
        # What ``longrope`` depends on.
        self.num_positions = 0
        self.dtype = DTYPES[source.spec.dtype]
        weights = [
            self._lossy(view_layer(read_layer(source, index, layout), layout, self.dtype, cut))
            for index, layout in enumerate(model_layers(source.spec))
        ]
        numbers = decoder_numbers(source.spec)
        self.embedding, self.head = weights[0], weights[len(numbers) :]
        # A decoder layer with experts is two layers of the schedule.
        self.decoders: list[dict[str, Sequence[torch.Tensor]]] = [
            {} for _ in range(source.spec.num_layers)
        ]
        for number, part in zip(numbers[1:], weights[1:], strict=False):
            self.decoders[number].update(part)
        chunks = [chunk for part in self.head for chunk in part["head.weight"]]
        self.tokens = chunks if source.spec.head.is_tied else self.embedding["tokens.weight"]

    def _lossy(self, weights: dict[str, tuple[torch.Tensor, ...]]) -> Tensors:
        bits = self.compression.weight_bits
        return {
            name: [
                self.compression.of(c, bits) if c.dim() == 2 and name not in FLOAT32_TENSORS else c
                for c in chunks
            ]
            for name, chunks in weights.items()
        }

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Return the logits after every token of one prompt: float32 [tokens, vocabulary]."""
        self.num_positions = len(ids)
        x = self._prefill(torch.tensor([ids]), None)
        return self._head(x[0])

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], gen_len: int, eos: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Continue prompts of any lengths greedily, all in one right-padded batch.

        A sequence ends with the first token of ``eos``, which is part of its output.
        """
        spec, batch = self.spec, len(prompts)
        lengths = torch.tensor([len(p) for p in prompts])
        prompt_len = int(lengths.max())
        padded = torch.tensor([p + [0] * (prompt_len - len(p)) for p in prompts])
        context = prompt_len + gen_len - 1
        self.num_positions = context
        caches = []
        for attention in (spec.layer(i).attention for i in range(spec.num_layers)):
            rows = batch * attention.num_kv_heads
            shape = (context, attention.cached_vectors, rows, attention.head_dim)
            caches.append(torch.zeros(shape, dtype=self.dtype))
        x = self._prefill(padded, caches)
        tokens = self._head(x[torch.arange(batch), lengths - 1]).argmax(-1)
        outputs = [tokens]
        for step in range(gen_len - 1):
            slot = prompt_len + step
            tokens = self._decode(tokens, lengths + step, caches, slot, lengths, prompt_len)
            outputs.append(tokens)
        return [_until(row.tolist(), eos) for row in torch.stack(outputs, dim=1)]

    def _embed(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = gather_rows(ids, self.tokens)
        return embed(rows, positions, self.embedding, self.spec.embedding)

    def _prefill(self, ids: torch.Tensor, caches: list[torch.Tensor] | None) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        x = self._embed(ids, positions)
        for i, weights in enumerate(self.decoders):
            layer = self.spec.layer(i)
            q, cached = self._project(x, weights, positions[0], layer)
            if caches is not None:
                for kind, part in enumerate(cached):
                    kept = self.compression.of(part, self.compression.cache_bits)
                    caches[i][: ids.shape[1], kind] = kept.transpose(0, 1).flatten(1, 2)
            _finish(
                x, projections.attend_prompt(q, cached, weights, layer.attention), weights, layer
            )
        return x

    def _decode(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        caches: list[torch.Tensor],
        slot: int,
        lengths: torch.Tensor,
        prompt_len: int,
    ) -> torch.Tensor:
        x = self._embed(tokens[:, None], positions[:, None])
        slots = torch.arange(slot + 1)
        in_prompt = slots < prompt_len
        is_empty = (slots >= lengths[:, None]) & in_prompt
        # The position of the token in each slot.
        places = torch.where(in_prompt, slots, slots - prompt_len + lengths[:, None])
        for i, (weights, cache) in enumerate(zip(self.decoders, caches, strict=True)):
            layer = self.spec.layer(i)
            attention = layer.attention
            q, cached = self._project(x, weights, positions, layer)
            bits = self.compression.cache_bits
            for kind, part in enumerate(cached):
                cache[slot, kind] = self.compression.of(part.flatten(0, 2), bits)
            context = cache[: slot + 1].unflatten(2, (len(tokens), -1)).permute(1, 2, 3, 0, 4)
            keys, values = _keys_and_values(context, weights, attention)
            queries = q.reshape(len(tokens), keys.shape[1], -1, keys.shape[-1])
            # Grouped-query attention has scaled its queries.
            scale = attention.scale if attention.latent else None
            scores = queries @ keys.transpose(2, 3) * (scale or attention.head_dim**-0.5)
            if attention.soft_cap is not None:
                scores = attention.soft_cap * (scores / attention.soft_cap).tanh()
            if attention.alibi_slopes:
                slopes = torch.tensor(attention.alibi_slopes).view(attention.num_kv_heads, -1, 1)
                distances = (places - positions[:, None])[:, None, None]
                scores += (slopes * distances).to(scores.dtype)
            is_hidden = is_empty
            if attention.window is not None and attention.is_chunked:
                first = positions - positions % attention.window
                is_hidden = is_empty | (places < first[:, None])
            elif attention.window is not None:
                is_hidden = is_empty | (places <= positions[:, None] - attention.window)
            scores.masked_fill_(is_hidden[:, None, None], -torch.inf)
            sinks = projections.sinks_of(weights, attention)
            shares = self._without_small(scores, ~is_hidden, sinks)
            attended = (shares @ values).reshape(len(tokens), 1, attention.output_size)
            _finish(x, attended, weights, layer)
        return self._head(x[:, 0]).argmax(-1)

    def _project(
        self, x: torch.Tensor, weights: Tensors, positions: torch.Tensor, layer: LayerSpec
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        attention, rotation = layer.attention, None
        if attention.rotary is not None or attention.temperature_floor is not None:
            rotation = position_factors(positions, attention, x.dtype, self.num_positions)
        return projections.project_prompt(x, weights, rotation, layer)

    def _without_small(
        self, scores: torch.Tensor, seen: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Return each query's shares, those of small scores shared out among all that are
        ``seen``, [sequences, slots]."""
        shares = scores.softmax(-1)
        if sinks is not None:
            column = sinks.to(scores.dtype).view(*scores.shape[1:3], 1).expand(*scores.shape[:3], 1)
            shares = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
        if self.compression.sparsity == 1:
            return shares
        for found, rows, is_seen in zip(shares, scores, seen, strict=True):
            count = int(is_seen.sum())
            kept = max(1, math.ceil(count * self.compression.sparsity - 1e-9))
            least = rows.sort(dim=-1, descending=True).values[..., kept - 1 : kept]
            whole = found.sum(-1, keepdim=True)
            found.masked_fill_(rows < least, 0)
            found += (whole - found.sum(-1, keepdim=True)) / count * is_seen
        return shares

    def _head(self, x: torch.Tensor) -> torch.Tensor:
        normed = layers.head_input(x, self.head[0], self.spec.final_norm)
        found = []
        for part in self.head:
            logits = linear(normed, part["head.weight"]).float()
            layers.finish_logits(logits, part, self.spec.head)
            found.append(logits)
        return torch.cat(found, -1)


def _keys_and_values(
    context: torch.Tensor, weights: Tensors, attention: AttentionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values [sequences, heads, tokens, elements] of a cache [vectors, sequences,
    key heads, tokens, elements]; those of latent attention are made of its rows, as in prefill."""
    latent = attention.latent
    if latent is None:
        keys, values = context
        return keys, values
    rows = context[0, :, 0]
    made = linear(rows[..., : latent.rank], weights["kv_b.weight"])
    heads = made.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    shared = rows[:, None, :, latent.rank :].expand(-1, attention.num_heads, -1, -1)
    keys, values = heads.split([latent.nope_dim, latent.value_dim], dim=-1)
    return torch.cat([keys, shared], dim=-1), values


def _finish(x: torch.Tensor, attended: torch.Tensor, weights: Tensors, layer: LayerSpec) -> None:
    if layer.is_parallel:
        layers.finish_parallel(x, attended, weights, layer)
        return
    layers.finish_attention(x, attended, weights, layer)
    layers.feed_forward(x, weights, layer)


def _until(ids: list[int], eos: frozenset[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in eos]
    return ids[: ends[0] + 1] if ends else ids


def gather_rows(ids: torch.Tensor, chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Look ``ids`` [...] up in a table [rows, width] in row chunks; returns [..., width]."""
    if len(chunks) == 1:
        return F.embedding(ids, chunks[0])
    out = chunks[0].new_empty(*ids.shape, chunks[0].shape[1])
    first = 0
    for chunk in chunks:
        is_here = (ids >= first) & (ids < first + chunk.shape[0])
        out[is_here] = chunk[ids[is_here] - first]
        first += chunk.shape[0]
    return out


def embed(
    token_rows: torch.Tensor, positions: torch.Tensor, weights: Tensors, spec: EmbeddingSpec
) -> torch.Tensor:
    """Project and scale embedded tokens, add learned positions, normalise: where the model does so.

    ``token_rows`` is [batch, tokens, hidden], ``positions`` int64 [batch, tokens]; ``weights``
    are those of the embed layer.
    """
    if spec.width is not None:
        token_rows = linear(token_rows, weights["input_projection.weight"])
    token_rows = token_rows.clone()
    layers.scale_embedding(token_rows, spec)
    if spec.has_positions:
        rows = gather_rows(positions + spec.position_offset, weights["positions.weight"])
        token_rows = token_rows + rows
    if spec.norm is None:
        return token_rows
    return norm(token_rows, weights, "embedding_norm", spec.norm)
