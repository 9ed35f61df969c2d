"""Tensors on their way to the devices."""

import gguf
import jax
import numpy as np
import pytest
from tiny import fresh_rng

from jaxsplit.gguf import GGUFTensor
from jaxsplit.loading import _unpack, _upload
from jaxsplit.models import AttentionConfig, Axis, BlockConfig, MLPConfig, ModelConfig
from jaxsplit.models.axes import EMBED
from jaxsplit.parallel import make_partition
from jaxsplit.quant import TYPES, dequantize, take_rows
from jaxsplit.sources import Source, place

BLOCK = BlockConfig(AttentionConfig(6, 2, 64, 64), MLPConfig(512))
CONFIG = ModelConfig("llama", vocab=100, embed=256, context=64, blocks=(BLOCK,))
EXPERTS, MLP, EMBED_OUT = Axis("experts", 3), Axis("expert_mlp", 512), Axis("embed_out", 256)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 512, 256), (EXPERTS, MLP, EMBED)),
        ((3, 256, 512), (EXPERTS, EMBED_OUT, MLP.columns)),
    ],
)
@pytest.mark.parametrize("mesh", ["tensor", "expert"])
def test_stacks_of_experts_are_split(kind, devices, shape, axes, mesh):
    """Inside each expert, or by experts."""
    entry = TYPES[kind]
    bits = fresh_rng().integers(0, 256, (*shape[:-1], shape[-1] // entry.block, entry.block_bytes))
    blocks = bits.astype(np.uint8)
    partition = make_partition(
        CONFIG, "graph", {mesh: devices}, jax.devices()[:devices], pieces={MLP: entry.block}
    )
    source = Source(GGUFTensor("experts", kind, shape, blocks), shape)
    placement = place(partition.stages[0], source, axes)
    weights = _unpack(source, _upload([source], [placement])[0], placement, None)
    shard = jax.tree.leaves(weights)[0].addressable_shards[-1].data
    assert shard.nbytes * devices >= jax.tree.leaves(weights)[0].nbytes
    with np.errstate(all="ignore"):
        flat = blocks.reshape(*shape[:-1], -1)
        expected = gguf.quants.dequantize(flat, gguf.GGMLQuantizationType[kind]).reshape(shape)
    kept = tuple(map(slice, expected.shape))
    assert np.array_equal(np.asarray(dequantize(weights))[kept], expected, equal_nan=True)
    if mesh == "expert":  # the compiler adds up what devices have, and infinities become NaNs
        return
    chosen = take_rows(weights, np.asarray([2, 0]), np.float32)
    assert np.array_equal(
        np.asarray(chosen)[(slice(2), *kept[1:])], expected[[2, 0]], equal_nan=True
    )
