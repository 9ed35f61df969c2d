"""The tensors behind a model's parameters, and their bytes on the devices of a mesh."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsplit.architectures import parameter_tensors
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import ModelFile, TensorInfo
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.quant import quant_type, unpack
from jaxsplit.sharding import Partition, Placement, Stage, make_partition
from jaxsplit.sharding.axes import Axis


class _SameKey:
    """Replaces `nnx.Rngs` for abstract evaluation, where a new key for each parameter would take
    most of the time."""

    def __init__(self) -> None:
        self._key = jax.random.key(0)

    def params(self) -> jax.Array:
        return self._key


def abstract_decoder(
    config: ModelConfig, dtype: jnp.dtype = jnp.float32, layers: range | None = None
) -> Decoder:
    """A decoder, or some layers of it, with shapes in place of parameters."""
    return nnx.eval_shape(
        lambda: Decoder(config, layers=layers, dtype=dtype, rngs=cast(nnx.Rngs, _SameKey()))
    )


def parameters(model: Decoder) -> dict[str, nnx.Param]:
    """A model's parameters by path, such as `blocks.0.mlp.up.kernel`; the number is the layer's."""
    return {
        parameter_path(model, path): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def abstract_parameters(config: ModelConfig, layers: range | None = None) -> dict[str, nnx.Param]:
    """The parameters of a decoder, or of some layers of it: shapes and axes only."""
    return _abstract_parameters(config, range(config.layers) if layers is None else layers)


@functools.cache
def _abstract_parameters(config: ModelConfig, layers: range) -> dict[str, nnx.Param]:
    return parameters(abstract_decoder(config, layers=layers))


def parameter_path(model: Decoder, path: Sequence[Any]) -> str:
    """The path of a parameter of a decoder, or of some layers of a model, in the whole model."""
    if path[0] == "blocks":
        layer = model.config.first_use(path[1] + model.layers.start)
        path = (path[0], layer, *path[2:])
    return ".".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a parameter: a tensor, or some of its rows.

    Attributes:
      tensor: the tensor.
      shape: of the parameter.
      rows: the tensor's row, with all dimensions but the last flattened, for each row of the
        parameter: int `shape[:-1]`, or `shape` of a vector; None: all rows in order.
      is_bias: whether the parameter is a bias.
    """

    tensor: TensorInfo
    shape: tuple[int, ...]
    rows: np.ndarray | None = None
    is_bias: bool = False

    @property
    def type(self) -> str:
        """GGML type of the blocks that devices receive."""
        return "F32" if self.is_dequantized else self.tensor.type

    @property
    def is_matrix(self) -> bool:
        """Whether its last dimension is in blocks; otherwise it is a vector of elements."""
        return len(self.shape) > 1

    @property
    def is_dequantized(self) -> bool:
        """Whether the host dequantizes it to float32: a vector of a quantized type, which may be
        split inside blocks."""
        return not self.is_matrix and self.tensor.block_size > 1

    def dtype(self, weights: jnp.dtype | None) -> jnp.dtype | None:
        """Dtype to which devices dequantize it, given that of matrices; None keeps it quantized."""
        return weights if self.is_matrix and not self.is_bias else jnp.dtype(jnp.float32)

    @property
    def block_size(self) -> int:
        """Weights in a block."""
        return self.tensor.block_size if self.is_matrix else 1

    @property
    def block_bytes(self) -> int:
        """Bytes of a block that devices receive."""
        return 4 if self.is_dequantized else self.tensor.blocks_shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.nbytes * math.prod(self.shape) // math.prod(self.tensor.shape)

    def tensor_rows(self, index: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor's row for some rows of the parameter, -1 where an index is -1.

        Args:
          index: indices along each dimension of the parameter's rows.
        """
        grid = np.ix_(*index)
        padding = functools.reduce(np.logical_or, [i < 0 for i in grid])
        if self.rows is None:
            sizes = self.shape[:-1] if self.is_matrix else self.shape
            rows = np.ravel_multi_index([np.maximum(i, 0) for i in grid], sizes)
        else:
            rows = self.rows[grid]
        return np.where(padding, -1, rows)


Sources = Mapping[str, Source]
"""The source of each parameter of a whole model."""


def parameter_sources(file: ModelFile, config: ModelConfig) -> Sources:
    """The source of each parameter.

    Raises:
      JaxsplitError: tensors are missing, of an unsupported type, or of an unexpected shape.
    """
    shapes = {path: param.shape for path, param in abstract_parameters(config).items()}
    sources = {
        path: Source(file.tensors[name], shapes[path], rows, path.endswith("bias"))
        for path, (name, rows) in parameter_tensors(file, config, shapes).items()
    }
    for source in sources.values():
        try:
            quant_type(source.tensor.type)
            if source.is_matrix and source.tensor.type == "I32":
                raise JaxsplitError("I32 is a type of tables, not of matrices")
        except JaxsplitError as error:
            raise JaxsplitError(f"{file.path}: tensor {source.tensor.name!r}: {error}") from None
    return sources


def layer_costs(sources: Sources, config: ModelConfig) -> list[int]:
    """Bytes of each layer in the file; the first includes the embedding, the last the head."""
    costs = [0] * config.layers
    for path, source in sources.items():
        name, _, rest = path.partition(".")
        if name == "blocks":
            costs[int(rest.partition(".")[0])] += source.nbytes
        else:
            costs[-1 if name in ("norm", "head") else 0] += source.nbytes
    costs = [costs[config.first_use(layer)] for layer in range(config.layers)]
    if config.tied:
        costs[-1] += sources["embedding.table"].nbytes
    return costs


def parameter_placement(stage: Stage, source: Source, axes: Sequence[Axis]) -> Placement:
    """Placement of the blocks of a parameter with these logical axes."""
    return stage.placement(source.shape, axes, source.block_size)


def stage_bytes(
    sources: Sources, config: ModelConfig, stage: Stage, weights: jnp.dtype | None = None
) -> tuple[int, int]:
    """Bytes of a stage's parameters.

    Args:
      sources: of the model's parameters.
      config: the model.
      stage: the layers and the mesh.
      weights: matrices are dequantized to this dtype; None: as in the file.

    Returns:
      the bytes on each device, and how many of them are padding and replicas: more than an equal
      share of the sharded parameters.
    """
    held, extra = 0, 0.0
    for path, param in abstract_parameters(config, stage.layers).items():
        source = sources[path]
        size = parameter_bytes(stage, source, param.axes, weights)
        held += size
        shards = math.prod(stage.shards(axis) for axis in param.axes if axis.name in stage.table)
        if shards > 1:
            rows = source.shape[:-1] if source.is_matrix else source.shape
            columns = source.shape[-1] // source.block_size if source.is_matrix else 1
            whole = (*rows, columns, source.block_bytes)
            dtype = source.dtype(weights)
            extra += size - _unpacked_bytes(source.type, whole, None, dtype) / shards
    return held, round(extra)


def parameter_bytes(
    stage: Stage, source: Source, axes: Sequence[Axis], weights: jnp.dtype | None = None
) -> int:
    """Bytes of a parameter on each device of a stage.

    Args:
      stage: the mesh.
      source: of the parameter.
      axes: its logical axes.
      weights: matrices are dequantized to this dtype; None: as in the file.
    """
    placement = parameter_placement(stage, source, axes)
    local = placement.sharding.shard_shape((*placement.shape, source.block_bytes))
    dtype, padded = source.dtype(weights), placement.has_padded_columns
    return _unpacked_bytes(source.type, local, placement.sub_block, dtype, padded)


@functools.cache
def _unpacked_bytes(
    ggml_type: str,
    shape: tuple[int, ...],
    sub_block: int | None,
    dtype: jnp.dtype | None,
    padded: bool = False,
) -> int:
    """Bytes of unpacked blocks `[..., rows, blocks, block_bytes]`."""
    weight = jax.eval_shape(
        lambda raw, index: unpack(
            ggml_type, raw, sub_block=sub_block, sub_block_index=index, dtype=dtype, padded=padded
        ),
        jax.ShapeDtypeStruct(shape, jnp.uint8),
        jax.ShapeDtypeStruct(shape[-2:-1], jnp.int32),
    )
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))


def split_model(
    sources: Sources,
    config: ModelConfig,
    mode: str,
    shape: Mapping[str, int],
    devices: Sequence[jax.Device] | None,
    *,
    shares: Sequence[float] | None = None,
    weights: jnp.dtype | None = None,
    cache_bytes_per_dim: int = 0,
    reduce_dtype: jnp.dtype | None = None,
) -> Partition:
    """Lays a model out on devices so that the fullest of them reads the fewest bytes.

    Splitting the hidden units at block boundaries is cheapest where blocks divide well. Where they
    do not, sub-blocks need less padding, but each needs its own scales.

    Args:
      sources: the tensors of its parameters.
      config: the model.
      mode, shape, devices, shares, reduce_dtype: as in `make_partition`.
      weights: as in `stage_bytes`.
      cache_bytes_per_dim: bytes of the keys in the whole context, for each dimension of a head.

    Raises:
      JaxsplitError: the shares do not fit the mesh.
    """
    count = sum(math.prod(source.shape) for source in sources.values())
    nbytes = sum(source.nbytes for source in sources.values())
    width = nbytes / count if weights is None else weights.itemsize
    params = abstract_parameters(config)
    blocks: dict[Axis, int] = {}
    for path, param in params.items():
        if (axis := param.axes[-1]).name in ("mlp_in", "expert_mlp_in"):
            axis = dataclasses.replace(axis, name=axis.name.removesuffix("_in"))
            blocks[axis] = max(blocks.get(axis, 1), sources[path].block_size)
    largest = max(blocks.values(), default=1)
    cuts = [2**i for i in range(4) if largest // 2**i >= min(largest, 32)]
    partitions = [
        make_partition(
            config,
            mode,
            shape,
            devices,
            shares=shares,
            layer_costs=layer_costs(sources, config),
            block_multiple={
                axis: max(block // cut, min(block, 32)) for axis, block in blocks.items()
            },
            kv_cost=1 + cache_bytes_per_dim / (width * config.embed),
            reduce_dtype=reduce_dtype,
        )
        for cut in cuts
    ]
    whole = all(stage.shards(axis) == 1 for axis in blocks for stage in partitions[0].stages)
    if whole or len(cuts) == 1:
        return partitions[0]

    def cost(partition: Partition) -> float:
        sizes = [stage_bytes(sources, config, stage, weights)[0] for stage in partition.stages]
        return sum(sizes)

    best = min(partitions, key=cost)
    # Larger sub-blocks make matmuls faster: smaller ones must save at least 1 %.
    return next(p for p in partitions if cost(p) <= 1.01 * cost(best))


def describe_split(
    sources: Sources, config: ModelConfig, partition: Partition, weights: jnp.dtype | None = None
) -> str:
    """The mesh, the stages, padded or replicated axes and their cost, in one line.

    Arguments are those of `stage_bytes`.
    """
    mesh, stages = partition.mesh, partition.stages
    kind = f" of {mesh.devices.flat[0].device_kind}" if isinstance(mesh, Mesh) else ""
    lines = [f"mesh {','.join(f'{axis}:{size}' for axis, size in mesh.shape.items())}{kind}"]
    if len(stages) > 1:
        runs = [
            f"{stage.layers.start}-{stage.layers.stop - 1} on device "
            f"{'+'.join(map(str, sorted(stage.ranks.flat)))}"
            for stage in stages
        ]
        lines.append(f"layers {', '.join(runs)}")
    used = {rank for stage in stages for rank in stage.ranks.flat}
    if idle := sorted(set(range(mesh.size)) - used):
        lines.append(f"without layers: device {', '.join(map(str, idle))}")
    padded = {
        f"{axis.name} {layout.original // layout.unit} to {len(layout.units)}": None
        for stage in stages
        for param in abstract_parameters(config, stage.layers).values()
        for axis in param.axes
        if axis.units and not axis.name.endswith("_in")
        for layout in filter(None, [stage.layout(axis)])
        if layout.size > layout.original
    }
    if padded:
        sizes = [
            (stage.mesh.size, *stage_bytes(sources, config, stage, weights)) for stage in stages
        ]
        extra = sum(devices * more for devices, _, more in sizes)
        share = extra / sum(devices * held for devices, held, _ in sizes)
        lines.append(f"padded or copied: {', '.join(padded)}, {extra / 1e6:.1f} MB ({share:.1%})")
    return " | ".join(lines)
