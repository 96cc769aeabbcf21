"""Kernels on a GPU, in Triton. Imported only where they are called."""

from profiles.kernels.gpu.attention import attends_packed, decode_attention
from profiles.kernels.gpu.encoded import unpack_encoded
from profiles.kernels.gpu.encoded_products import grouped_encoded, multiply_encoded
from profiles.kernels.gpu.groups import pack_rows, unpack_rows
from profiles.kernels.gpu.layer import rms_norm, rotate
from profiles.kernels.gpu.products import grouped_linear, multiply_rows

__all__ = [
    "attends_packed",
    "decode_attention",
    "grouped_encoded",
    "grouped_linear",
    "multiply_encoded",
    "multiply_rows",
    "pack_rows",
    "rms_norm",
    "rotate",
    "unpack_encoded",
    "unpack_rows",
]
