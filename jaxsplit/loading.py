"""From a GGUF file to a `Decoder` whose parameters lie on a mesh.

Every device is handed its own slice of the raw blocks, which it unpacks itself; the host never
holds more than the slices of the tensor that is on its way.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf import GGUFFile, GGUFTensor, tensor_names
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.parallel import Partition
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


def block_unit(file: GGUFFile, model: Decoder, axis: str) -> int:
    """The elements along a logical axis that lie together in blocks: the largest block's size."""
    names = tensor_names(file, {path: p.shape for path, p in parameters(model).items()})
    return max(
        file.tensors[names[path]].block_size
        for path, p in parameters(model).items()
        if p.axes[-1] == axis and len(p.axes) > 1
    )


def load_decoder(
    file: GGUFFile,
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
    names = tensor_names(file, {path: p.shape for path, p in params.items()})
    for name in names.values():
        try:
            quant_type(file.tensors[name].type)
        except JaxsplitError as error:
            raise JaxsplitError(f"{file.path}: tensor {name!r}: {error}") from None
    total = sum(file.tensors[name].nbytes for name in names.values())
    done, loaded = 0, {}
    for path, variable in params.items():
        tensor = file.tensors[names[path]]
        loaded[path] = jax.block_until_ready(load_tensor(tensor, variable.axes, partition, weights))
        tensor.release()
        done += tensor.nbytes
        if progress:
            progress(done, total)
    state = nnx.state(model, nnx.Param)
    flat = [
        (path, variable.replace(loaded[".".join(map(str, path))]))
        for path, variable in nnx.to_flat_state(state)
    ]
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def load_tensor(
    tensor: GGUFTensor,
    axes: Sequence[str | None],
    partition: Partition,
    weights: jnp.dtype | None = None,
) -> Weight:
    """One tensor, unpacked on the devices that hold its slices.

    Args:
      tensor: a vector `[out]` or a matrix `[out, in]`.
      axes: its logical axes.
      partition: where they lie.
      weights: as in `load_decoder`; vectors become float32.
    """
    matrix = len(tensor.shape) == 2
    blocks = tensor.blocks if matrix else tensor.blocks[:, None]
    axes = axes if matrix else (axes[0], None)
    rows = _rows(partition, axes[0], tensor.shape[0])
    granule, columns, part = _granules(partition, axes[1], tensor)

    def slices(index: tuple[slice, ...]) -> np.ndarray:
        return _take(blocks, rows[index[0]], columns[index[1]])

    shape = (len(rows), len(columns), blocks.shape[-1])
    raw = jax.make_array_from_callback(shape, partition.sharding((*axes, None)), slices)
    place = jax.make_array_from_callback(
        part.shape, partition.sharding(axes[1:]), lambda index: part[index]
    )
    dtype = weights if matrix else jnp.float32
    unpacker = _unpacker(tensor.type, granule, dtype, partition.mesh, partition.spec(axes), matrix)
    return unpacker(raw, place)


@functools.cache
def _unpacker(
    name: str,
    granule: int,
    dtype: jnp.dtype | None,
    mesh: jax.sharding.Mesh,
    spec: PartitionSpec,
    matrix: bool,
) -> Callable[[jax.Array, jax.Array], Weight]:
    """The program that unpacks blocks where they lie; compiled once for each shape."""

    def unpack_blocks(raw: jax.Array, part: jax.Array) -> Weight:
        weight = unpack(name, raw, granule=granule, part=part, dtype=dtype)
        return weight if matrix else weight[:, 0]

    specs = (PartitionSpec(*spec, None), PartitionSpec(spec[1]))
    out = spec if matrix else PartitionSpec(spec[0])
    return jax.jit(jax.shard_map(unpack_blocks, mesh=mesh, in_specs=specs, out_specs=out))


def _rows(partition: Partition, axis: str | None, size: int) -> np.ndarray:
    """The original row at each padded one, or -1: int `[rows]`."""
    layout = partition.layouts.get(axis)
    return np.arange(size) if layout is None else layout.elements()


def _granules(
    partition: Partition, axis: str | None, tensor: GGUFTensor
) -> tuple[int, np.ndarray, np.ndarray]:
    """`AxisLayout.granules` of a tensor's last axis."""
    layout = partition.layouts.get(axis)
    if layout is not None and len(tensor.shape) == 2:
        granule, blocks, part = layout.granules(tensor.block_size)
        return granule, blocks, part.astype(np.int32)
    count = tensor.blocks.shape[-2] if len(tensor.shape) == 2 else 1
    return tensor.block_size, np.arange(count), np.zeros(count, np.int32)


def _take(blocks: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`blocks[rows][:, columns]`, zeros where an index is -1; a view where they are ranges."""
    for axis, index in enumerate((rows, columns)):
        start = max(int(index[0]), 0)
        if np.array_equal(index, np.arange(start, start + len(index))):
            cut = slice(start, start + len(index))
            blocks = blocks[cut] if axis == 0 else blocks[:, cut]
        else:
            blocks = np.take(blocks, np.maximum(index, 0), axis=axis)
            blocks[(index < 0) if axis == 0 else (slice(None), index < 0)] = 0
    return np.ascontiguousarray(blocks)
