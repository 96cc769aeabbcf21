"""Operators of a decode step: beside other threads, a GPU waits for the launch of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from costmodel.schedule.tasks import Task
from executor.checkpoint.folder import Checkpoint
from executor.engine.channels import Handler
from executor.run.block import Block
from profiles.kernels import products
from profiles.kernels.call import call_kernel
from tests.executor.tiny_machines import ON_GPU, Case, make_hardware, make_policy
from tests.executor.tiny_models import save_tiny_model

GEN_LEN = 3
NUM_LAYERS = 2
# Positions, in float32, times the frequencies; cosines and sines.
ANGLE_LAUNCHES = 5
ROOM = {"empty", "empty_like", "empty_strided", "new_empty"}


class _Counting(TorchDispatchMode):
    """Counts operators that launch something, and kernels of ours."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.endswith("_") or not (name in ROOM or _is_view(result, args)):
            self.names[name] += 1
        return result

    def counting(self, kernel: Callable[..., None]) -> Callable[..., None]:
        """Count the calls of a kernel."""

        def call(name: str, *arguments: Any) -> None:
            self.names[name] += 1
            kernel(name, *arguments)

        return call


def _is_view(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator's results lie where its first argument does."""
    results = result if isinstance(result, list | tuple) else [result]
    whole = args[0].untyped_storage().data_ptr()
    return all(part.untyped_storage().data_ptr() == whole for part in results)


@pytest.mark.parametrize(
    ("family", "project", "finish"),
    [
        # Norm, product, copy of keys and values, their append, attention; product, sum, norm,
        # product, relu, product, sum.
        ("opt", 5, 7),
        # Rotation, too; product, sum, norm, gate, up, their product, product, sum.
        ("llama", 6, 8),
        # And the norms of queries and keys.
        ("qwen3", 8, 8),
    ],
)
def test_a_layer_that_is_attended_in_both_places_launches_few(
    family: str, project: int, finish: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU multiplies by torch's operators.
    monkeypatch.setattr(products, "is_native", lambda *_: False)
    counted = {"project": _Counting(), "finish": _Counting()}
    original = Block.handlers

    def handlers(block: Block) -> Mapping[str, Handler]:
        found = dict(original(block))
        for kind, mode in counted.items():
            found[kind] = _within(mode, found[kind])
        return found

    monkeypatch.setattr(Block, "handlers", handlers)
    save_tiny_model(tmp_path / "model", family, num_layers=NUM_LAYERS)
    source = Checkpoint.open(tmp_path / "model")
    policy = make_policy(source.spec, prompt_len=4, gen_len=GEN_LEN)
    policy = replace(policy, activations=ON_GPU, cpu_attention=0.5)
    case = Case(source=source, prompts=[[1, 2, 3, 4]] * 4, folder=tmp_path / "offload")
    case.generate(policy, make_hardware(gpu=True))
    tasks = (GEN_LEN - 1) * NUM_LAYERS * policy.num_gpu_batches
    assert counted["finish"].names.total() == finish * tasks
    # Rotary angles are made once a pass for each batch, and not once a layer.
    angles = counted["project"].names["cos"]
    assert angles == (0 if family == "opt" else (GEN_LEN - 1) * policy.num_gpu_batches)
    assert counted["project"].names.total() - ANGLE_LAUNCHES * angles == project * tasks


def _within(mode: _Counting, handler: Handler) -> Handler:
    def run(task: Task) -> int:
        with pytest.MonkeyPatch.context() as patch:
            for module in ("attention", "layer"):
                patch.setattr(f"profiles.kernels.{module}.call_kernel", mode.counting(call_kernel))
            with mode:
                return handler(task)

    return run
