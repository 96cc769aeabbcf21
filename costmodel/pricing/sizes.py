"""Bytes and elements of a model's weights, computed once for each precision."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from costmodel.model.cache import CacheSpec, cache_of
from costmodel.model.layer_spec import LayerSpec
from costmodel.model.layout import ComponentLayout, LayerLayout, decoder_numbers, model_layers
from costmodel.model.spec import ModelSpec
from costmodel.model.tensor_layout import TensorLayout
from profiles.encodings import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Equal decoder layers: their description, bytes, cache and number."""

    spec: LayerSpec
    components: tuple[ComponentLayout, ...]
    cache: CacheSpec
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Layouts and bytes of a model whose weights are stored with ``weight_bits`` an element;
    ``None`` stands for the model's own dtype, or its encodings.

    ``has_small_chunks`` is that of ``model_layers``.
    """

    model: ModelSpec
    weight_bits: int | None
    group_size: int
    has_small_chunks: bool = False

    @cached_property
    def layers(self) -> tuple[LayerLayout, ...]:
        """Layouts of all layers, embedding and head included."""
        return model_layers(
            self.model,
            self.weight_bits,
            self.group_size,
            has_small_chunks=self.has_small_chunks,
        )

    @cached_property
    def distinct_layers(self) -> tuple[LayerLayout, ...]:
        """The same without repetition: equal decoder layers share one layout."""
        return tuple({id(layer): layer for layer in self.layers}.values())

    @cached_property
    def component_bytes(self) -> dict[str, int]:
        """Bytes of each class of components, in all layers."""
        sizes = dict.fromkeys(self.model.component_names, 0)
        for layer in self.layers:
            for component in layer.components:
                sizes[component.name] += component.num_bytes
        return sizes

    @cached_property
    def component_elements(self) -> dict[str, int]:
        """Elements of the matrices of each class of components, in all layers."""
        counts = dict.fromkeys(self.model.component_names, 0)
        for layer in self.layers:
            for component in layer.components:
                counts[component.name] += component.num_matrix_elements
        return counts

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.component_bytes.values())

    @cached_property
    def staged_layers(self) -> dict[str, LayerLayout]:
        """The layers that staging buffers must have room for, by the names of their components.

        Of layers with the same components, the largest of each counts: the encodings of one layer
        may have more bits in its attention, those of another in its MLP. The embedding is never
        staged, nor is a layer without weights.
        """
        largest: dict[str, LayerLayout] = {}
        for layer in self.distinct_layers:
            if layer.kind == "embed" or not layer.components:
                continue
            name = " and ".join(sorted(component.name for component in layer.components))
            other = largest.get(name, layer)
            pairs = zip(other.components, layer.components, strict=True)
            parts = tuple(b if a.num_bytes < b.num_bytes else a for a, b in pairs)
            largest[name] = replace(layer, components=parts)
        return largest

    @property
    def staged_components(self) -> list[str]:
        """Classes of components that are staged."""
        return [name for name in self.model.component_names if name != "embedding"]

    @cached_property
    def staged_bytes(self) -> int:
        """Bytes of all staged layers, without experts."""
        return sum(c.num_bytes for c in self._staged_parts if not c.is_experts)

    @cached_property
    def staged_elements(self) -> int:
        """Elements of the matrices of all staged layers, without experts."""
        return sum(c.num_matrix_elements for c in self._staged_parts if not c.is_experts)

    @cached_property
    def encoded_elements(self) -> dict[Kind, int]:
        """Those of them that are encoded, by the kind of their encoding."""
        counts: Counter[Kind] = Counter()
        for component in self._staged_parts:
            for tensor in () if component.is_experts else component.tensors:
                if tensor.encoding is not None:
                    counts[tensor.encoding.kind] += tensor.num_elements
        return dict(counts)

    @property
    def head_matrix(self) -> TensorLayout | None:
        """The matrix of a chunk of the head; ``None`` for a stage without the head."""
        if not self.model.has_head:
            return None
        (head,) = self.staged_layers["head"].components
        return head.tensors[-1]

    @property
    def _staged_parts(self) -> Iterator[ComponentLayout]:
        staged = (layer for layer in self.layers if layer.kind != "embed")
        return (component for layer in staged for component in layer.components)

    @cached_property
    def largest_layer_bytes(self) -> int:
        """Bytes of the largest layer that is staged."""
        return max(layer.num_bytes for layer in self.staged_layers.values())

    @cached_property
    def num_visits(self) -> int:
        """Layers of the schedule before the head, without the embedding."""
        return sum(layer.kind not in ("embed", "head") for layer in self.layers)

    @cached_property
    def num_head_chunks(self) -> int:
        """Chunks that the output head is cut into."""
        return sum(layer.kind == "head" for layer in self.layers)


@functools.lru_cache(maxsize=64)
def sizes_of(
    model: ModelSpec, weight_bits: int | None, group_size: int, *, has_small_chunks: bool = False
) -> ModelSizes:
    """Return the sizes of a model; each precision has one object."""
    return ModelSizes(
        model=model,
        weight_bits=weight_bits,
        group_size=group_size,
        has_small_chunks=has_small_chunks,
    )


@functools.lru_cache(maxsize=64)
def layer_kinds_of(sizes: ModelSizes, cache_bits: int) -> tuple[LayerKind, ...]:
    """Return the kinds of decoder layers, with a cache of ``cache_bits`` an element."""
    model, numbers = sizes.model, decoder_numbers(sizes.model)
    kinds = []
    for kind, (spec, count) in enumerate(model.kinds_and_counts):
        first = model.layer_order.index(kind)
        visited = [layer for layer, n in zip(sizes.layers, numbers, strict=False) if n == first]
        kinds.append(
            LayerKind(
                spec=spec,
                components=tuple(c for layer in visited for c in layer.components),
                cache=cache_of(spec, cache_bits, sizes.group_size, model.dtype_bytes),
                count=count,
            )
        )
    return tuple(kinds)
