"""Loads a model file into `Decoder`s whose parameters are sharded over the stages of a mesh.

Each device receives its own slice of the raw blocks and unpacks it; host memory holds only slices
of tensors in transfer.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxsplit.formats import GGUFTensor, take_blocks
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.ops.matmul.api import has_int8_kernel
from jaxsplit.quant import QTensor, Weight, float32_blocks, to_u32, unpack
from jaxsplit.sharding import Partition, Placement, Stage
from jaxsplit.weights.checkpoint import StoredTensor, restore
from jaxsplit.weights.sources import (
    Source,
    Sources,
    abstract_decoder,
    parameter_placement,
    parameters,
)

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def load_decoders(
    sources: Sources,
    config: ModelConfig,
    partition: Partition,
    *,
    weights: jnp.dtype | None = None,
    dtype: jnp.dtype = jnp.float32,
    as_u32: bool = False,
    progress: Progress | None = None,
) -> list[Decoder]:
    """Loads a model onto a mesh.

    Args:
      sources: the tensors of its parameters.
      config: its config.
      partition: the mesh and its stages.
      weights: dequantize matrices to this dtype; None keeps them quantized.
      dtype: dtype of the activations.
      as_u32: store code planes as uint32, as the kernels load them.
      progress: called with the bytes loaded.

    Returns:
      the decoder of each stage; shapes in place of parameters where this process has no device of
      the stage.
    """
    models = [abstract_decoder(config, dtype, stage.layers) for stage in partition.stages]
    local = [
        (model, stage)
        for model, stage in zip(models, partition.stages, strict=True)
        if stage.is_local
    ]
    total = sum(sources[path].nbytes for model, _ in local for path in parameters(model))
    done = 0
    for model, stage in local:
        loaded = {}
        for arrays, nbytes in _load(sources, model, stage, weights, as_u32):
            loaded |= arrays
            done += nbytes
            if progress:
                progress(done, total)
        for path, param in parameters(model).items():
            param.set_value(loaded[path])
    return models


def _load(
    sources: Sources, model: Decoder, stage: Stage, weights: jnp.dtype | None, as_u32: bool
) -> Iterator[tuple[dict[str, Weight], int]]:
    """A stage's parameters in batches, with each batch's bytes in the file."""
    params = parameters(model)
    for batch in _batches({path: sources[path] for path in params}):
        placements = {p: parameter_placement(stage, sources[p], params[p].axes) for p in batch}
        raw = _upload([sources[p] for p in batch], list(placements.values()))
        loaded = {
            path: _unpack(sources[path], blocks, placements[path], weights, as_u32)
            for path, blocks in zip(batch, raw, strict=True)
        }
        jax.block_until_ready(loaded)
        for path in batch:
            if isinstance(tensor := sources[path].tensor, GGUFTensor):
                tensor.release()
        yield loaded, sum(sources[path].nbytes for path in batch)


def _batches(sources: Sources) -> list[list[str]]:
    """Batches of parameters to load together: a checkpoint folder, or a single tensor of a file."""

    def key(path: str) -> str:
        tensor = sources[path].tensor
        return str(tensor.folder) if isinstance(tensor, StoredTensor) else path

    return [list(group) for _, group in itertools.groupby(sorted(sources, key=key), key)]


def _upload(sources: Sequence[Source], placements: Sequence[Placement]) -> list[jax.Array]:
    """Uploads raw blocks, sharded: uint8 `[..., rows, blocks, block_bytes]` each."""
    if isinstance(sources[0].tensor, StoredTensor):
        return restore(sources, placements)
    return [_upload_mapped(s, p) for s, p in zip(sources, placements, strict=True)]


def _upload_mapped(source: Source, placement: Placement) -> jax.Array:
    """Uploads slices of a memory-mapped tensor."""
    tensor = cast(GGUFTensor, source.tensor)
    take = tensor.take
    if not source.is_matrix:
        elements = tensor.blocks
        if source.is_dequantized:
            elements = np.asarray(float32_blocks(tensor.type, elements))
        take = functools.partial(take_blocks, elements.reshape(-1, 1, elements.shape[-1]))

    def slices(index: Any) -> np.ndarray:
        rows = source.tensor_rows([r[i] for r, i in zip(placement.rows, index[:-2], strict=True)])
        return np.ascontiguousarray(take(rows, placement.columns[index[-2]]))

    shape = (*placement.shape, source.block_bytes)
    return jax.make_array_from_callback(shape, placement.sharding, slices)


def _unpack(
    source: Source,
    raw: jax.Array,
    placement: Placement,
    weights: jnp.dtype | None,
    as_u32: bool = False,
) -> Weight:
    """Unpacks blocks on their devices. Vectors and biases become float32."""
    spec = placement.sharding.spec
    index = jax.make_array_from_callback(
        placement.sub_block_index.shape,
        NamedSharding(placement.sharding.mesh, PartitionSpec(spec[-2])),
        lambda at: placement.sub_block_index[at],
    )
    unpacker = _unpacker(
        source.type,
        placement.sharding,
        sub_block=placement.sub_block,
        padded=placement.has_padded_columns,
        dtype=source.dtype(weights),
        matrix=source.is_matrix,
        as_u32=as_u32,
    )
    return unpacker(raw, index)


@functools.cache
def _unpacker(
    ggml_type: str,
    sharding: NamedSharding,
    *,
    sub_block: int,
    padded: bool,
    dtype: jnp.dtype | None,
    matrix: bool,
    as_u32: bool,
) -> Callable[[jax.Array, jax.Array], Weight]:
    """The program that unpacks sharded blocks; compiled once for each shape."""

    def unpack_blocks(raw: jax.Array, index: jax.Array) -> Weight:
        options = {"sub_block": sub_block, "sub_block_index": index, "padded": padded}
        weight = unpack(ggml_type, raw, dtype=dtype, **options)
        if isinstance(weight, QTensor):
            return to_u32(weight) if as_u32 and has_int8_kernel(weight) else weight
        return weight if matrix else weight[:, 0]

    mesh, spec = sharding.mesh, sharding.spec
    out = PartitionSpec(*spec[:-1]) if matrix else PartitionSpec(spec[0])
    specs = (spec, PartitionSpec(spec[-2]))
    return jax.jit(jax.shard_map(unpack_blocks, mesh=mesh, in_specs=specs, out_specs=out))
