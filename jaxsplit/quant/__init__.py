"""Quantized weights: one table of GGML types, one form on the device, one product."""

from jaxsplit.quant.forms import (
    Form,
    QTensor,
    Weight,
    dequantize,
    take_rows,
    with_bytes,
    with_words,
)
from jaxsplit.quant.products import (
    PLAIN,
    Arithmetic,
    Rows,
    active_arithmetic,
    expert_products,
    grouped_products,
    has_kernel,
    has_tiles,
    matmul,
    matmuls,
    pends,
    use_arithmetic,
    values,
)
from jaxsplit.quant.rounding import Pending, Sum
from jaxsplit.quant.tiles import Groups
from jaxsplit.quant.types import TYPES, QuantType, quant_type, unpack

__all__ = [
    "Groups",
    "PLAIN",
    "TYPES",
    "Arithmetic",
    "Form",
    "Pending",
    "QTensor",
    "QuantType",
    "Rows",
    "Sum",
    "Weight",
    "active_arithmetic",
    "dequantize",
    "expert_products",
    "grouped_products",
    "has_kernel",
    "has_tiles",
    "matmul",
    "matmuls",
    "pends",
    "quant_type",
    "take_rows",
    "unpack",
    "use_arithmetic",
    "values",
    "with_bytes",
    "with_words",
]
