"""Quantized weights: the table of GGML types, and their form on the device."""

from jaxsplit.quant.qtensor import (
    Form,
    QTensor,
    Weight,
    dequantize,
    take_rows,
    with_bytes,
    with_words,
)
from jaxsplit.quant.types import TYPES, QuantType, float32_blocks, quant_type, unpack

__all__ = [
    "TYPES",
    "Form",
    "QTensor",
    "QuantType",
    "Weight",
    "dequantize",
    "float32_blocks",
    "quant_type",
    "take_rows",
    "unpack",
    "with_bytes",
    "with_words",
]
