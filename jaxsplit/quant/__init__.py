"""Quantized weights: one table of GGML types, one form on the device, one product."""

from jaxsplit.quant.forms import Form, QTensor, Weight, dequantize, matmul, take_rows
from jaxsplit.quant.types import TYPES, QuantType, quant_type, unpack

__all__ = [
    "TYPES",
    "Form",
    "QTensor",
    "QuantType",
    "Weight",
    "dequantize",
    "matmul",
    "quant_type",
    "take_rows",
    "unpack",
]
