"""Tensors on their way to the devices."""

import gguf
import jax
import numpy as np
import pytest
from helpers import nmse, recipe, recipe_values
from tiny import fresh_rng

import jaxsplit
from jaxsplit.formats import IK_TYPES, GGUFTensor
from jaxsplit.models import AttentionConfig, BlockConfig, MLPConfig, ModelConfig
from jaxsplit.quant import TYPES, dequantize, take_rows
from jaxsplit.sharding import make_partition
from jaxsplit.sharding.axes import EMBED, Axis
from jaxsplit.weights import Source, parameter_placement
from jaxsplit.weights.loader import _unpack, _upload

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
        CONFIG,
        "graph",
        {mesh: devices},
        jax.devices()[:devices],
        block_multiple={MLP: entry.block},
    )
    source = Source(GGUFTensor.of_bytes("experts", kind, shape, blocks.reshape(-1)), shape)
    placement = parameter_placement(partition.stages[0], source, axes)
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


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in IK_TYPES])
@pytest.mark.parametrize("axis", [EMBED, Axis("mlp", 512)])
def test_vectors_of_any_type_become_float32(kind, axis):
    """On two devices, whole or split, in order or not, against the `gguf` package."""
    entry, shape = TYPES[kind], (512,)
    rng = fresh_rng()
    blocks = rng.integers(0, 256, (512 // entry.block, entry.block_bytes)).astype(np.uint8)
    try:
        with np.errstate(all="ignore"):
            flat = blocks.reshape(-1)
            expected = gguf.quants.dequantize(flat, gguf.GGMLQuantizationType[kind]).reshape(-1)
    except (NotImplementedError, KeyError):
        pytest.skip(f"the gguf package does not dequantize {kind}")
    partition = make_partition(
        CONFIG, "graph", {"tensor": 2}, jax.devices()[:2], block_multiple={MLP: 1}
    )
    for rows in (None, rng.permutation(512)):
        source = Source(GGUFTensor.of_bytes("norm", kind, shape, blocks.reshape(-1)), shape, rows)
        placement = parameter_placement(partition.stages[0], source, (axis,))
        values = _unpack(source, _upload([source], [placement])[0], placement, None)
        assert values.dtype == np.float32
        order = slice(None) if rows is None else rows
        actual = np.asarray(values)[:512]
        # CPUs flush subnormal scales of MXFP4 to zero, as in tests/test_quant.py.
        flushed = (actual == 0) & (np.abs(expected[order]) < 2.0**-123)
        assert np.array_equal(actual, np.where(flushed, 0, expected[order]), equal_nan=True)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", ["gpt-oss", "stablelm-12b", "llama-bias", "granitehybrid"])
def test_all_tensors_may_be_quantized(tmp_path, name):
    """Norms, biases, those of experts, too: the same logits as of their values in float32."""
    made, q8_0 = recipe(name), gguf.GGMLQuantizationType.Q8_0
    logits = []
    for dequantized in (False, True):
        writer = gguf.GGUFWriter(tmp_path / f"{dequantized}.gguf", made["arch"])
        for key, kinds, value in made["metadata"]:
            kinds = [gguf.GGUFValueType[kind] for kind in kinds]
            writer.add_key_value(key, value, kinds[0], sub_type=kinds[-1])
        for spec in made["tensors"]:
            values, kind = recipe_values(made["seed"], spec), None
            if values.shape[-1] % 32 == 0:
                values, kind = gguf.quants.quantize(values, q8_0), q8_0
            if dequantized and kind:
                values, kind = gguf.quants.dequantize(values, kind), None
            writer.add_tensor(spec["name"], values, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        lm = jaxsplit.load(tmp_path / f"{dequantized}.gguf", dtype="float32", ctx_size=64)
        logits.append(lm.logits(made["tokens"][:12]))
    assert nmse(*logits) <= 1e-10
