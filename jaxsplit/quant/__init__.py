"""Quantized weights: one table of GGML types, one form on the device, one product."""

from jaxsplit.quant.forms import Form, QTensor, Weight, dequantize, take_rows, with_words
from jaxsplit.quant.products import PLAIN, Arithmetic, active_arithmetic, matmul, use_arithmetic
from jaxsplit.quant.types import TYPES, QuantType, quant_type, unpack

__all__ = [
    "PLAIN",
    "TYPES",
    "Arithmetic",
    "Form",
    "QTensor",
    "QuantType",
    "Weight",
    "active_arithmetic",
    "dequantize",
    "matmul",
    "quant_type",
    "take_rows",
    "unpack",
    "use_arithmetic",
    "with_words",
]
