"""The kernels of one layer, as fast as the device allows.

CPUs have native kernels, which are built at first use (``build``). GPUs have Triton kernels
(``gpu``) where launches or packed rows are the cost. Twins in plain torch do all else, and
everything where a compiler or Triton is missing. The kernels are in ``profiles``, because a profile
must have the rates of the code that runs.
"""

from profiles.kernels.attention import decode_attention, without_cudnn_attention
from profiles.kernels.build import end_idle_threads, load_library
from profiles.kernels.call import is_native
from profiles.kernels.encoded import grouped_encoded, multiply_encoded, unpack_encoded
from profiles.kernels.encoded_matrix import EncodedMatrix
from profiles.kernels.groups import pack_rows, unpack_rows
from profiles.kernels.layer import activate, clamped_swiglu, rms_norm, rotate, swiglu
from profiles.kernels.paged_attention import carry_width, paged_attention, prefix_attention
from profiles.kernels.products import (
    grouped_linear,
    groups_packed,
    has_packed_products,
    linear,
    multiplies_codes,
    multiply_rows,
    rounds_inputs,
)
from profiles.kernels.prompt_attention import KeyRun, prompt_attention
from profiles.kernels.routed_rows import add_routed_rows, weigh_rows
from profiles.kernels.row_tiles import fixed_rows
from profiles.kernels.xielu import xielu

__all__ = [
    "EncodedMatrix",
    "KeyRun",
    "activate",
    "add_routed_rows",
    "carry_width",
    "clamped_swiglu",
    "decode_attention",
    "end_idle_threads",
    "fixed_rows",
    "grouped_encoded",
    "grouped_linear",
    "groups_packed",
    "has_packed_products",
    "is_native",
    "linear",
    "load_library",
    "multiplies_codes",
    "multiply_encoded",
    "multiply_rows",
    "pack_rows",
    "paged_attention",
    "prefix_attention",
    "prompt_attention",
    "rms_norm",
    "rotate",
    "rounds_inputs",
    "swiglu",
    "unpack_encoded",
    "unpack_rows",
    "weigh_rows",
    "without_cudnn_attention",
    "xielu",
]
