"""From a model file to a `Decoder` whose parameters lie on a mesh.

Every device is handed its own slice of the raw blocks, which it unpacks itself; the host never
holds more than the slices of the tensors that are on their way.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsplit.checkpoint import StoredTensor, restore
from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf import GGUFTensor, ModelFile, TensorInfo, tensor_names
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.parallel import Partition, Placement
from jaxsplit.quant import Weight, quant_type, unpack

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""


def abstract_decoder(config: ModelConfig, dtype: jnp.dtype) -> Decoder:
    """A decoder with shapes in place of parameters."""
    return nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))


def parameters(model: Decoder) -> dict[str, nnx.Param]:
    """A model's parameters by path, such as `blocks.0.mlp.up.kernel`."""
    return {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def _sources(file: ModelFile, model: Decoder) -> dict[str, TensorInfo]:
    """The tensor of each parameter."""
    shapes = {path: param.shape for path, param in parameters(model).items()}
    return {path: file.tensors[name] for path, name in tensor_names(file, shapes).items()}


def block_unit(file: ModelFile, model: Decoder, axis: str) -> int:
    """The elements along a logical axis that lie together in blocks: the largest block's size."""
    sources = _sources(file, model)
    return max(
        sources[path].block_size
        for path, param in parameters(model).items()
        if len(param.axes) > 1 and param.axes[-1] == axis
    )


def load_decoder(
    file: ModelFile,
    config: ModelConfig,
    partition: Partition,
    *,
    weights: jnp.dtype | None = None,
    dtype: jnp.dtype = jnp.float32,
    progress: Progress | None = None,
) -> Decoder:
    """Loads a model onto a mesh.

    Args:
      file: the model.
      config: its config.
      partition: where its parameters go.
      weights: dequantize matrices to this dtype; None keeps them as they are in the file.
      dtype: of the activations.
      progress: told about the bytes loaded.

    Raises:
      JaxsplitError: tensors are missing, of an unsupported type, or of an unexpected shape.
    """
    model = abstract_decoder(config, dtype)
    params = parameters(model)
    sources = _sources(file, model)
    for source in sources.values():
        try:
            quant_type(source.type)
        except JaxsplitError as error:
            raise JaxsplitError(f"{file.path}: tensor {source.name!r}: {error}") from None
    total = sum(source.nbytes for source in sources.values())
    done, loaded = 0, {}
    for batch in _batches(sources):
        placements = {p: partition.place(sources[p], params[p].axes) for p in batch}
        raw = _upload([sources[p] for p in batch], list(placements.values()))
        for path, blocks in zip(batch, raw, strict=True):
            loaded[path] = _unpack(sources[path], blocks, placements[path], weights)
        jax.block_until_ready([loaded[path] for path in batch])
        for path in batch:
            if isinstance(sources[path], GGUFTensor):
                sources[path].release()
            done += sources[path].nbytes
        if progress:
            progress(done, total)
    state = [
        (path, variable.replace(loaded[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    ]
    nnx.update(model, nnx.from_flat_state(state))
    return model


def _batches(sources: dict[str, TensorInfo]) -> list[list[str]]:
    """Parameters that are loaded together: those of one folder of a checkpoint, else each alone."""

    def key(path: str) -> str:
        source = sources[path]
        return str(source.folder) if isinstance(source, StoredTensor) else path

    return [list(group) for _, group in itertools.groupby(sorted(sources, key=key), key)]


def _upload(sources: Sequence[TensorInfo], placements: Sequence[Placement]) -> list[jax.Array]:
    """Raw blocks, uint8 `[..., rows, blocks, block_bytes]`, each slice where it belongs."""
    if isinstance(sources[0], StoredTensor):
        return restore(sources, placements)
    return [_upload_mapped(s, p) for s, p in zip(sources, placements, strict=True)]


def _upload_mapped(source: GGUFTensor, place: Placement) -> jax.Array:
    blocks = source.blocks if len(source.shape) > 1 else source.blocks[:, None]

    def slices(index: tuple[slice, ...]) -> np.ndarray:
        return _take(blocks, place.rows[index[-3]], place.columns[index[-2]])

    shape = (*blocks.shape[:-3], len(place.rows), len(place.columns), blocks.shape[-1])
    return jax.make_array_from_callback(shape, place.sharding, slices)


def _take(blocks: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Rows and columns of `[..., rows, columns, block_bytes]`, zeros where an index is -1.

    No copy is made where the indices are ranges.
    """
    for axis, index in ((-3, rows), (-2, columns)):
        after = (slice(None),) * (-1 - axis)
        start = max(int(index[0]), 0)
        if np.array_equal(index, np.arange(start, start + len(index))):
            blocks = blocks[(..., slice(start, start + len(index)), *after)]
        else:
            blocks = np.take(blocks, np.maximum(index, 0), axis=axis)
            blocks[(..., index < 0, *after)] = 0
    return np.ascontiguousarray(blocks)


def _unpack(
    source: TensorInfo, raw: jax.Array, place: Placement, weights: jnp.dtype | None
) -> Weight:
    """Blocks to weights, on the devices that hold them. Vectors become float32."""
    matrix = len(source.shape) > 1
    spec = place.sharding.spec
    part = jax.make_array_from_callback(
        place.part.shape,
        NamedSharding(place.sharding.mesh, PartitionSpec(spec[-2])),
        lambda index: place.part[index],
    )
    dtype = weights if matrix else jnp.float32
    unpacker = _unpacker(source.type, place.granule, dtype, place.sharding.mesh, spec, matrix)
    return unpacker(raw, part)


@functools.cache
def _unpacker(
    kind: str,
    granule: int,
    dtype: jnp.dtype | None,
    mesh: Mesh,
    spec: PartitionSpec,
    matrix: bool,
) -> Callable[[jax.Array, jax.Array], Weight]:
    """The program that unpacks blocks where they lie; compiled once for each shape."""

    def unpack_blocks(raw: jax.Array, part: jax.Array) -> Weight:
        weight = unpack(kind, raw, granule=granule, part=part, dtype=dtype)
        return weight if matrix else weight[:, 0]

    out = PartitionSpec(*spec[:-1]) if matrix else PartitionSpec(spec[0])
    specs = (spec, PartitionSpec(spec[-2]))
    return jax.jit(jax.shard_map(unpack_blocks, mesh=mesh, in_specs=specs, out_specs=out))
