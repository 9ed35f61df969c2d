"""Tensors on their way to the devices."""

import gguf
import jax
import numpy as np
import pytest
from tiny import fresh_rng

from jaxsplit.gguf import GGUFTensor
from jaxsplit.loading import _unpack, _upload
from jaxsplit.models import ModelConfig, RopeConfig
from jaxsplit.parallel import make_partition
from jaxsplit.quant import TYPES, dequantize, take_rows

CONFIG = ModelConfig("llama", 100, 256, 1, 6, 2, 64, 512, 64, 1e-5, RopeConfig(64))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("axes", [(None, "mlp", "embed"), (None, "embed_out", "mlp_in")])
def test_stacks_of_experts_are_split_inside_each_expert(kind, devices, axes):
    experts, sizes = 3, {"mlp": CONFIG.mlp, "embed": CONFIG.embed}
    shape = (experts, *(sizes[axis.partition("_")[0]] for axis in axes[1:]))
    entry = TYPES[kind]
    bits = fresh_rng().integers(0, 256, (*shape[:-1], shape[-1] // entry.block, entry.block_bytes))
    blocks = bits.astype(np.uint8)
    partition = make_partition(
        CONFIG, "graph", {"tensor": devices}, jax.devices()[:devices], mlp_unit=entry.block
    ).stages[0]
    tensor = GGUFTensor("experts", kind, shape, blocks)
    place = partition.place(tensor, axes)
    weights = _unpack(tensor, _upload([tensor], [place])[0], place, None)
    shard = jax.tree.leaves(weights)[0].addressable_shards[-1].data
    assert shard.nbytes * devices >= jax.tree.leaves(weights)[0].nbytes
    with np.errstate(all="ignore"):
        flat = blocks.reshape(*shape[:-1], -1)
        expected = gguf.quants.dequantize(flat, gguf.GGMLQuantizationType[kind]).reshape(shape)
    rows, columns = expected.shape[1:]
    assert np.array_equal(
        np.asarray(dequantize(weights))[:, :rows, :columns], expected, equal_nan=True
    )
    chosen = take_rows(weights, np.asarray([2, 0]), np.float32)
    assert np.array_equal(np.asarray(chosen)[:, :rows, :columns], expected[[2, 0]], equal_nan=True)
