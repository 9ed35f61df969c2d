"""From a model file to `Decoder`s whose parameters lie on the stages of a mesh.

Every device is handed its own slice of the raw blocks, which it unpacks itself; the host never
holds more than the slices of the tensors that are on their way.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsplit.formats import GGUFTensor
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.ops.matmul import triton_gemv_int8
from jaxsplit.quant import QTensor, Weight, float32_blocks, unpack, with_words
from jaxsplit.sharding import Partition, Placement, Stage
from jaxsplit.weights.checkpoint import StoredTensor, restore
from jaxsplit.weights.sources import Source, Sources, abstract_decoder, parameters, place

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def load_decoders(
    sources: Sources,
    config: ModelConfig,
    partition: Partition,
    *,
    weights: jnp.dtype | None = None,
    dtype: jnp.dtype = jnp.float32,
    words: bool = False,
    progress: Progress | None = None,
) -> list[Decoder]:
    """Loads a model onto a mesh.

    Args:
      sources: the tensors of its parameters.
      config: its config.
      partition: where its parameters go.
      weights: dequantize matrices to this dtype; None keeps them as they are in the file.
      dtype: of the activations.
      words: quantized matrices are as `jaxsplit.ops.matmul.triton_gemv_int8` read them.
      progress: told about the bytes loaded.

    Returns:
      the decoder of each stage, with shapes in place of the parameters of stages on which this
      process has no device.
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
        for arrays, nbytes in _load(sources, model, stage, weights, words):
            loaded |= arrays
            done += nbytes
            if progress:
                progress(done, total)
        for path, param in parameters(model).items():
            param.set_value(loaded[path])
    return models


def _load(
    sources: Sources, model: Decoder, stage: Stage, weights: jnp.dtype | None, words: bool
) -> Iterator[tuple[dict[str, Weight], int]]:
    """A stage's parameters, some at a time, and how many bytes of the file they were."""
    params = parameters(model)
    for batch in _batches({path: sources[path] for path in params}):
        placements = {p: place(stage, sources[p], params[p].axes) for p in batch}
        raw = _upload([sources[p] for p in batch], list(placements.values()))
        loaded = {
            path: _unpack(sources[path], blocks, placements[path], weights, words)
            for path, blocks in zip(batch, raw, strict=True)
        }
        jax.block_until_ready(loaded)
        for path in batch:
            if isinstance(tensor := sources[path].tensor, GGUFTensor):
                tensor.release()
        yield loaded, sum(sources[path].nbytes for path in batch)


def _batches(sources: Sources) -> list[list[str]]:
    """Parameters that are loaded together: those of one folder of a checkpoint, else each alone."""

    def key(path: str) -> str:
        tensor = sources[path].tensor
        return str(tensor.folder) if isinstance(tensor, StoredTensor) else path

    return [list(group) for _, group in itertools.groupby(sorted(sources, key=key), key)]


def _upload(sources: Sequence[Source], placements: Sequence[Placement]) -> list[jax.Array]:
    """Raw blocks, uint8 `[..., rows, blocks, block_bytes]`, each slice where it belongs."""
    if isinstance(sources[0].tensor, StoredTensor):
        return restore(sources, placements)
    return [_upload_mapped(s, p) for s, p in zip(sources, placements, strict=True)]


def _upload_mapped(source: Source, place: Placement) -> jax.Array:
    blocks = source.tensor.blocks
    if source.is_dequantized:
        blocks = np.asarray(float32_blocks(source.tensor.type, blocks))
    columns = blocks.shape[-2] if source.is_matrix else 1
    blocks = blocks.reshape(-1, columns, blocks.shape[-1])

    def slices(index: tuple[slice, ...]) -> np.ndarray:
        rows = source.tensor_rows([r[i] for r, i in zip(place.rows, index[:-2], strict=True)])
        return _take(blocks, rows, place.columns[index[-2]])

    return jax.make_array_from_callback((*place.shape, blocks.shape[-1]), place.sharding, slices)


def _take(blocks: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Rows `[...]` and columns of `[rows, columns, block_bytes]`, zeros where an index is -1:
    `[..., columns, block_bytes]`.

    No copy is made where the indices are ranges.
    """
    shape = (*rows.shape, len(columns), blocks.shape[-1])
    for axis, index in enumerate((rows.reshape(-1), columns)):
        start = max(int(index[0]), 0)
        if np.array_equal(index, np.arange(start, start + len(index))):
            blocks = (
                blocks[start : start + len(index)]
                if axis == 0
                else (blocks[:, start : start + len(index)])
            )
        else:
            blocks = np.take(blocks, np.maximum(index, 0), axis=axis)
            blocks[(slice(None),) * axis + (index < 0,)] = 0
    return np.ascontiguousarray(blocks).reshape(shape)


def _unpack(
    source: Source,
    raw: jax.Array,
    place: Placement,
    weights: jnp.dtype | None,
    words: bool = False,
) -> Weight:
    """Blocks to weights, on the devices that hold them. Vectors and biases become float32."""
    matrix = source.is_matrix
    spec = place.sharding.spec
    part = jax.make_array_from_callback(
        place.part.shape,
        NamedSharding(place.sharding.mesh, PartitionSpec(spec[-2])),
        lambda index: place.part[index],
    )
    dtype = source.dtype(weights)
    mesh = place.sharding.mesh
    unpacker = _unpacker(source.type, place.granule, dtype, mesh, spec, matrix, words)
    return unpacker(raw, part)


@functools.cache
def _unpacker(
    kind: str,
    granule: int,
    dtype: jnp.dtype | None,
    mesh: Mesh,
    spec: PartitionSpec,
    matrix: bool,
    words: bool,
) -> Callable[[jax.Array, jax.Array], Weight]:
    """The program that unpacks blocks where they lie; compiled once for each shape."""

    def unpack_blocks(raw: jax.Array, part: jax.Array) -> Weight:
        weight = unpack(kind, raw, granule=granule, part=part, dtype=dtype)
        if words and isinstance(weight, QTensor) and triton_gemv_int8.supports(weight):
            return with_words(weight)
        return weight if matrix else weight[:, 0]

    out = PartitionSpec(*spec[:-1]) if matrix else PartitionSpec(spec[0])
    specs = (spec, PartitionSpec(spec[-2]))
    return jax.jit(jax.shard_map(unpack_blocks, mesh=mesh, in_specs=specs, out_specs=out))
