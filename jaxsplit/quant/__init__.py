"""Quantized weights: the table of GGML types, and their planes on the device."""

from jaxsplit.quant.qtensor import (
    PlaneLayout,
    QTensor,
    Weight,
    dequantize,
    take_rows,
    to_u8,
    to_u32,
)
from jaxsplit.quant.rows import dequantize_rows
from jaxsplit.quant.types import TYPES, QuantType, float32_blocks, quant_type, unpack

__all__ = [
    "TYPES",
    "PlaneLayout",
    "QTensor",
    "QuantType",
    "Weight",
    "dequantize",
    "dequantize_rows",
    "float32_blocks",
    "quant_type",
    "take_rows",
    "unpack",
    "to_u8",
    "to_u32",
]
