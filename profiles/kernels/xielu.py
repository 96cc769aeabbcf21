"""The activation xIELU (Huang and Schlag 2025), on the CPU and on a GPU."""

from __future__ import annotations

import ctypes

import torch

from profiles.kernels.call import call_kernel, is_native, pointer

# The slope at zero, and the largest argument of the exponential; those of ``cpu.cpp``.
SLOPE = 0.5
LARGEST_EXPONENT = -1e-6
# Elements that plain torch computes at once, so that its temporaries are a few MiB.
ELEMENTS_AT_ONCE = 2**18


def xielu(x: torch.Tensor, above: torch.Tensor, below: torch.Tensor) -> None:
    """Replace ``x`` [rows, ffn], dense, by a parabola above zero, an exponential below.

    On a CPU a row has the same bits alone and among others. ``above`` is the factor of the square
    and ``below`` that of the exponential, [1] each in the dtype of ``x``.
    """
    assert x.is_contiguous()
    if not is_native(x):
        _xielu_twin(x, above, below)
        return
    call_kernel(
        "xielu",
        x.dtype,
        pointer(x),
        ctypes.c_long(x.shape[0]),
        ctypes.c_long(x.shape[1]),
        ctypes.c_float(above.item()),
        ctypes.c_float(below.item()),
    )


def _xielu_twin(x: torch.Tensor, above: torch.Tensor, below: torch.Tensor) -> None:
    for part in x.view(-1).split(ELEMENTS_AT_ONCE):
        low = part.clamp(max=LARGEST_EXPONENT).expm1_().sub_(part).mul_(below)
        line = part * SLOPE
        torch.where(part > 0, (part * above).mul_(part).add_(line), low.add_(line), out=part)
