"""How often the router of each layer has chosen each expert in a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from costmodel.model.layout import decoder_numbers, model_layers
from costmodel.model.spec import ModelSpec
from executor.model.routing import Routing

IntArray = NDArray[np.int64]


class RoutingCounts:
    """Counts choices of experts, by layer of the schedule.

    Routing on a GPU is not counted: that would take launches, and a wait for the result.
    """

    def __init__(self, model: ModelSpec) -> None:
        numbers, kinds = decoder_numbers(model), [layer.kind for layer in model_layers(model)]
        self._counts: dict[int, IntArray] = {}
        for layer, number in enumerate(numbers):
            experts = model.layer(number).experts if kinds[layer] == "experts" else None
            if experts is not None:
                self._counts[layer] = np.zeros(experts.num_experts, np.int64)

    def add(self, layer: int, routing: Routing) -> None:
        """Count the choices of some tokens in a layer of the schedule."""
        if not routing.experts.is_cuda:
            counts = self._counts[layer]
            counts += routing.counts(len(counts)).numpy()

    @property
    def layers(self) -> list[int]:
        """The layers of the schedule that have experts."""
        return list(self._counts)

    def by_layer(self) -> list[IntArray]:
        """Return the choices of each expert, int64 [experts], for each layer that has experts."""
        return list(self._counts.values())
