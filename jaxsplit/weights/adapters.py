"""LoRA adapters in GGUF files: low-rank changes of a model's matrices, applied without merging.

Format: llama.cpp's `convert_lora_to_gguf.py`. For a matrix `NAME` `[out, in]` an adapter has
`NAME.lora_a` `[rank, in]` and `NAME.lora_b` `[out, rank]`, shapes in NumPy's order. It adds
`alpha / rank * lora_b @ lora_a` to the matrix, without the factor where `adapter.lora.alpha` is 0.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import GGUFTensor, ModelFile, TensorInfo, open_gguf
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.models.layers import Linear, LoRA
from jaxsplit.quant import float32_blocks
from jaxsplit.sharding import Partition, Stage
from jaxsplit.sharding.axes import Axis
from jaxsplit.weights.sources import Source, Sources, abstract_decoder, parameter_path

MAX_SCALE = 1e6
"""Of an adapter: float32 has to hold the products."""

_ENTRY = re.compile(r"(?:(?P<name>[^/=]+)=)?(?P<path>.+?)(?::(?P<scale>[-+.\w]+))?", re.DOTALL)
_RANKS = Axis("lora_ranks")
_NO_LORA = "adapters change projections only, such as attn_q, ffn_down or output"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
      name: by which requests choose it.
      path: of its file.
      scale: of requests that do not choose.
      pairs: `lora_a` and `lora_b` by the name of the tensor that they change.
      alpha: numerator of the factor `alpha / rank`; 0: there is no factor.
    """

    name: str
    path: Path
    scale: float
    pairs: Mapping[str, tuple[TensorInfo, TensorInfo]]
    alpha: float

    def factors(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        """What it adds to a matrix from a source: `[rank, in]` and `[out, rank]`, float32, the
        second with the factor; of rank 0 if it adds nothing."""
        if source.tensor.name not in self.pairs:
            out, columns = source.shape
            return np.zeros((0, columns), np.float32), np.zeros((out, 0), np.float32)
        down, up = (_float32(cast(GGUFTensor, t)) for t in self.pairs[source.tensor.name])
        up = up if source.rows is None else up[source.rows]
        return down, up * np.float32(self.alpha / len(down) if self.alpha else 1)


def _float32(tensor: GGUFTensor) -> np.ndarray:
    blocks = np.asarray(float32_blocks(tensor.type, tensor.blocks))
    return blocks.view(np.float32).reshape(tensor.shape)


def parse_adapters(given: Any) -> list[tuple[str, Path, float]]:
    """Names, paths and scales from `PATH`, `NAME=PATH`, `PATH:SCALE` or `NAME=PATH:SCALE`, several
    with commas or in a sequence.

    Raises:
      JaxsplitError: an entry is malformed, or two have the same name.
    """
    if given is None:
        return []
    entries = given.split(",") if isinstance(given, str) else given
    if isinstance(entries, os.PathLike):
        entries = [entries]
    if isinstance(entries, Mapping) or not isinstance(entries, Sequence):
        raise JaxsplitError(
            f"lora={given!r} must be text such as poet=A.gguf:0.5,B.gguf, or a list of such entries"
        )
    found: dict[str, tuple[str, Path, float]] = {}
    for entry in entries:
        text = os.fspath(entry) if isinstance(entry, str | os.PathLike) else ""
        match = _ENTRY.fullmatch(text) if isinstance(text, str) else None
        scale = _scale(match["scale"]) if match else None
        if match is None or scale is None:
            raise JaxsplitError(
                f"lora={entry} is not an adapter such as A.gguf, A.gguf:0.5 or "
                "poet=A.gguf:0.5, with a finite scale"
            )
        path = Path(match["path"])
        name = match["name"] or path.stem
        if name in found:
            raise JaxsplitError(
                f"lora={text} is the second adapter named {name!r}; name it as in other={path}"
            )
        found[name] = name, path, scale
    return list(found.values())


def _scale(text: str | None) -> float | None:
    """A scale, 1 without text; None: it is no number, or out of range."""
    try:
        scale = 1.0 if text is None else float(text)
    except ValueError:
        return None
    return scale if abs(scale) <= MAX_SCALE else None


def open_adapters(
    given: Any, file: ModelFile, sources: Sources, config: ModelConfig
) -> list[Adapter]:
    """Opens adapters and checks that they fit the model.

    Args:
      given: as in `parse_adapters`.
      file: the model's header.
      sources: of its parameters.
      config: its config.

    Raises:
      JaxsplitError: an entry is malformed, a file is missing or damaged, is no adapter or is one of
        another model, or changes a tensor that adapters cannot change.
    """
    entries = parse_adapters(given)
    if not entries:
        return []
    of_linears = {sources[path].tensor.name for path in linears(abstract_decoder(config))}
    return [_open(*entry, file, of_linears) for entry in entries]


def _open(name: str, path: Path, scale: float, file: ModelFile, of_linears: set[str]) -> Adapter:
    adapter = open_gguf(path)
    expected = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": file.architecture,
    }
    for key, value in expected.items():
        if (found := adapter.metadata.get(key)) != value:
            raise JaxsplitError(
                f"{path} is not a LoRA adapter of this model: {key} is {found!r}, expected "
                f"{value!r}"
            )
    if "adapter.alora.invocation_tokens" in adapter.metadata:
        raise JaxsplitError(
            f"{path}: adapter.alora.invocation_tokens is not supported: only adapters that apply "
            "to all tokens are"
        )
    alpha = adapter.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise JaxsplitError(f"{path}: adapter.lora.alpha is {alpha!r}, expected a finite number")
    bases: dict[str, None] = {}
    for tensor in adapter.tensors:
        base, dot, end = tensor.rpartition(".")
        if not dot or end not in ("lora_a", "lora_b"):
            raise JaxsplitError(
                f"{path}: tensor {tensor!r} is not supported: its name must end with .lora_a or "
                ".lora_b"
            )
        bases[base] = None
    if not bases:
        raise JaxsplitError(f"{path} has no tensors")
    pairs = {base: _pair(path, adapter, base, file, of_linears) for base in bases}
    return Adapter(name, path, scale, pairs, float(alpha))


def _pair(
    path: Path, adapter: ModelFile, base: str, file: ModelFile, of_linears: set[str]
) -> tuple[TensorInfo, TensorInfo]:
    """The two tensors that change a tensor of the model."""
    if base not in file.tensors:
        raise JaxsplitError(
            f"{path}: the model has no tensor {base!r}; is it an adapter of another model?"
        )
    if base not in of_linears:
        raise JaxsplitError(f"{path}: an adapter of {base!r} is not supported: {_NO_LORA}")
    down, up = (adapter.tensor(f"{base}.{end}") for end in ("lora_a", "lora_b"))
    out, columns = file.tensors[base].shape
    fits = len(down.shape) == len(up.shape) == 2 and down.shape[0] == up.shape[1]
    if not fits or (down.shape[1], up.shape[0]) != (columns, out):
        raise JaxsplitError(
            f"{path}: {base}.lora_a and .lora_b have shapes {down.shape} and {up.shape}, expected "
            f"(rank, {columns}) and ({out}, rank)"
        )
    for tensor in (down, up):
        if tensor.type not in ("F32", "F16", "BF16", "Q8_0"):
            raise JaxsplitError(
                f"{path}: tensor {tensor.name!r} has type {tensor.type}; supported are F32, F16, "
                "BF16 and Q8_0"
            )
    return down, up


def linears(model: Decoder) -> dict[str, Linear]:
    """A decoder's projections by the paths of their kernels, as in `weights.parameters`."""
    return {
        parameter_path(model, (*path, "kernel")): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear)
    }


def attach_adapters(
    models: Sequence[Decoder], partition: Partition, adapters: Sequence[Adapter], sources: Sources
) -> None:
    """Adds adapters to the projections of decoders, split over the devices as their kernels.

    Args:
      models: the decoder of each stage.
      partition: the stages.
      adapters: of the model.
      sources: of its parameters.
    """
    if not adapters:
        return
    for model, stage in zip(models, partition.stages, strict=True):
        for path, linear in linears(model).items():
            factors = [adapter.factors(sources[path]) for adapter in adapters]
            parts = tuple(
                (i, len(down), adapter.scale)
                for i, (adapter, (down, _)) in enumerate(zip(adapters, factors, strict=True))
                if len(down)
            )
            if not parts:
                continue
            rows, columns = linear.kernel.axes
            downs, ups = zip(*factors, strict=True)
            down = _param(np.concatenate(downs), (_RANKS, columns), stage, model.dtype)
            up = _param(np.concatenate(ups, axis=1), (rows, _RANKS), stage, model.dtype)
            linear.lora = LoRA(down, up, parts)


def _param(values: np.ndarray, axes: tuple[Axis, Axis], stage: Stage, dtype: Any) -> nnx.Param:
    """A matrix `[rows, columns]` as a parameter on the stage's devices."""
    placement = stage.placement(values.shape, axes, 1)
    spec = PartitionSpec(*placement.sharding.spec[:-1])
    sharding = NamedSharding(placement.sharding.mesh, spec)
    if not stage.is_local:
        shape = jax.ShapeDtypeStruct(placement.shape, dtype, sharding=sharding)
        return nnx.Param(shape, axes=axes)

    def shard(index: Any) -> np.ndarray:
        rows, columns = placement.rows[0][index[0]], placement.columns[index[1]]
        taken = values[rows][:, columns]
        return np.where((rows[:, None] < 0) | (columns < 0), 0, taken).astype(dtype)

    return nnx.Param(jax.make_array_from_callback(placement.shape, sharding, shard), axes=axes)
