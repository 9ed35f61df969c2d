"""Quantized weights: one table of GGML types, one form on the device, one product."""

from jaxsplit.quant import exchange, float8, ring, two_shot
from jaxsplit.quant.exchange import Peers
from jaxsplit.quant.forms import (
    Form,
    QTensor,
    Weight,
    dequantize,
    take_rows,
    with_bytes,
    with_words,
)
from jaxsplit.quant.late import BLOCK, Late, Pending, Plain, Reader, Sum, as_late, block_elements
from jaxsplit.quant.launch import Launch
from jaxsplit.quant.products import (
    PLAIN,
    Arithmetic,
    Product,
    Rows,
    active_arithmetic,
    computed,
    expert_products,
    grouped_products,
    has_kernel,
    has_tiles,
    matmul,
    matmuls,
    pends,
    reader_for,
    rounds,
    terms,
    use_arithmetic,
)
from jaxsplit.quant.ring import Ring
from jaxsplit.quant.rounding import Rounded, Rounding
from jaxsplit.quant.tiles import Groups
from jaxsplit.quant.types import TYPES, QuantType, quant_type, unpack

__all__ = [
    "BLOCK",
    "PLAIN",
    "Peers",
    "Product",
    "TYPES",
    "Arithmetic",
    "Form",
    "Groups",
    "Late",
    "Launch",
    "Pending",
    "Plain",
    "Reader",
    "Ring",
    "QTensor",
    "QuantType",
    "Rounded",
    "Rounding",
    "Rows",
    "Sum",
    "Weight",
    "active_arithmetic",
    "as_late",
    "block_elements",
    "dequantize",
    "exchange",
    "expert_products",
    "float8",
    "grouped_products",
    "has_kernel",
    "has_tiles",
    "matmul",
    "matmuls",
    "pends",
    "quant_type",
    "reader_for",
    "ring",
    "rounds",
    "take_rows",
    "terms",
    "two_shot",
    "unpack",
    "use_arithmetic",
    "computed",
    "with_bytes",
    "with_words",
]
