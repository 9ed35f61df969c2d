"""Random blocks of the GGML types, and what the gguf package makes of them."""

import gguf
import numpy as np

from jaxsplit.bench.random_model import random_blocks
from jaxsplit.formats import IK_TYPES, STORED_TYPES
from jaxsplit.quant import TYPES


def ggml_type(name):
    return gguf.GGMLQuantizationType[name]


def reference(name, raw):
    """The gguf package's dequantization: uint8 `[..., blocks, block_bytes]` to float32."""
    if name == "Q1_0":  # which the package does not know: a scale, and a sign for each weight
        scale = np.ascontiguousarray(raw[..., :2]).view(np.float16).astype(np.float32)
        positive = np.unpackbits(raw[..., 2:], axis=-1, bitorder="little")
        return np.where(positive, scale, -scale).reshape(*raw.shape[:-2], -1)
    with np.errstate(all="ignore"):
        flat = gguf.quants.dequantize(raw.reshape(*raw.shape[:-2], -1), ggml_type(name))
    return np.asarray(flat, np.float32)


def any_blocks(rng, name, *shape):
    """Random bytes, among them scales that are infinite or not a number."""
    return rng.integers(0, 256, (*shape, TYPES[name].block_bytes), dtype=np.uint8)


def with_row_scales(rng, name, blocks):
    """Blocks `[..., rows, blocks, block_bytes]` whose rows have scales of their own, if the type
    has scales of rows."""
    stored = STORED_TYPES[name]
    if stored.header:
        size = np.dtype(stored.scale).itemsize
        scales = np.ascontiguousarray(blocks[..., :size]).view(stored.scale)
        factors = rng.uniform(0.5, 2, (*blocks.shape[:-2], 1, 1))
        blocks[..., :size] = (scales * factors).astype(stored.scale).view(np.uint8)
    return blocks


def usual_blocks(rng, name, *shape):
    """Blocks as in a file: of normal weights if the gguf package can quantize to the type, else
    random bytes that give finite weights of ordinary size."""
    kind, count = TYPES[name], int(np.prod(shape))
    if name in IK_TYPES:
        blocks = random_blocks(rng, name, count).reshape(*shape, kind.block_bytes)
        return blocks if STORED_TYPES[name].trailer else with_row_scales(rng, name, blocks)
    try:
        weights = rng.normal(size=(count, kind.block)).astype(np.float32)
        packed = gguf.quants.quantize(weights, ggml_type(name))
        return np.ascontiguousarray(packed).view(np.uint8).reshape(*shape, kind.block_bytes)
    except NotImplementedError:
        found = np.empty((0, kind.block_bytes), np.uint8)
    while len(found) < count:
        blocks = any_blocks(rng, name, 8 * count)
        largest = np.abs(reference(name, blocks[:, None])).max(axis=-1)
        found = np.concatenate([found, blocks[(largest > 0.01) & (largest < 10)]])
    return found[:count].reshape(*shape, kind.block_bytes)
