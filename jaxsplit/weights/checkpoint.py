"""Checkpoint directories: a model's raw blocks as Orbax arrays, its header as JSON.

    DIR/model.json         metadata (with tokenizer and chat template), each tensor's type, and the
                           size of each file
    DIR/config.json        the model's config, for people
    DIR/tensors/FOLDER/    an Orbax checkpoint of the tensors of one layer, or of the rest

Tensors are stored whole and unpadded, so that a checkpoint can be restored onto any mesh.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import STORED_TYPES, GGUFTensor, ModelFile, TensorInfo
from jaxsplit.models import ModelConfig
from jaxsplit.paths import os_errors, user_path
from jaxsplit.quant import float32_blocks, unpack
from jaxsplit.sharding import Placement
from jaxsplit.weights.sources import Source

_FORMAT = 2
_CHUNK_BYTES = 2**24  # smallest read for a slice


@dataclasses.dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor of a checkpoint.

    Attributes:
      folder: its Orbax checkpoint.
    """

    folder: Path


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a checkpoint directory, complete or not.

    Raises:
      JaxsplitError: the operating system reports an error.
    """
    path = user_path(path)
    with os_errors(path):
        try:
            names = os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return "model.json" in names or "tensors" in names


def open_checkpoint(path: str | os.PathLike[str]) -> ModelFile:
    """Reads the header of a checkpoint directory.

    Raises:
      JaxsplitError: it is incomplete, damaged or of another version.
    """
    path = user_path(path)
    with os_errors(path):
        try:
            content = (path / "model.json").read_bytes()
        except FileNotFoundError:
            raise JaxsplitError(
                f"{path} is incomplete: model.json is missing; convert again"
            ) from None
    try:
        header = json.loads(content)
        found = header["format"]
        if found == _FORMAT:
            tensors = {name: _tensor(path, name, *row) for name, row in header["tensors"].items()}
            metadata = dict(header["metadata"])
            sizes = dict(header.get("files", {}))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise JaxsplitError(f"{path / 'model.json'} is damaged ({error}); convert again") from error
    if found != _FORMAT:
        raise JaxsplitError(
            f"{path} has checkpoint format {found}, this version reads {_FORMAT}; convert again"
        )
    for name in sorted({t.folder.name for t in tensors.values()} | sizes.keys()):
        with os_errors(path):
            try:
                size = (path / "tensors" / name).stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                raise JaxsplitError(
                    f"{path} is incomplete: tensors/{name} is missing; convert again"
                ) from None
        if size != sizes.get(name, size):
            raise JaxsplitError(
                f"{path} is damaged: tensors/{name} has {size:,} bytes, expected "
                f"{sizes[name]:,}; convert again"
            )
    return ModelFile(path, metadata, tensors)


def _tensor(
    path: Path, name: str, ggml_type: str, shape: Sequence[int], folder: str
) -> StoredTensor:
    """Parses a row of the header's tensor table.

    Raises:
      ValueError: malformed.
    """
    tensor = StoredTensor(name, ggml_type, tuple(shape), path / "tensors" / folder)
    known = ggml_type in STORED_TYPES and tensor.folder.name == folder
    sized = tensor.shape and all(type(n) is int and n > 0 for n in tensor.shape)
    if not known or not sized or tensor.stored.misfit(tensor.shape):
        raise ValueError(f"tensor {name!r} is {[ggml_type, shape, folder]}")
    return tensor


def _checkpointer():
    import orbax.checkpoint as ocp  # takes a second to import; GGUF files do not need it

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def save_checkpoint(
    file: ModelFile,
    config: ModelConfig,
    path: Path,
    *,
    weights: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a GGUF file as a checkpoint directory, which appears once it is complete.

    Args:
      file: the model, from `open_gguf`.
      config: its config.
      path: the directory, which must not exist; missing parents are created.
      weights: dequantize matrices to `bfloat16`, `float16` or `float32`; None keeps them.
      progress: called with the bytes of the file done, and the bytes in all.

    Raises:
      JaxsplitError: the directory exists or cannot be written.
    """
    path = user_path(path)
    with os_errors(path, "written"):
        if os.path.lexists(path):
            raise JaxsplitError(f"{path} exists already; remove it or choose another directory")
    partial = partial_directory(path)
    folders: dict[str, list[GGUFTensor]] = {}
    for tensor in file.tensors.values():
        folders.setdefault(_folder(tensor.name), []).append(cast(GGUFTensor, tensor))
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    done, table = 0, {}
    try:
        with os_errors(path, "written"):
            (partial / "tensors").mkdir(parents=True)
            need = sum(_least_bytes(tensor, weights) for tensor in file.tensors.values())
            if (free := shutil.disk_usage(partial).free) < need:
                raise JaxsplitError(
                    f"{path} needs at least {need:,} bytes, {free:,} are free; make room or choose "
                    "another disk"
                )
            for folder, tensors in folders.items():
                tree = {}
                for tensor in tensors:
                    ggml_type, tree[tensor.name] = _stored(tensor, weights)
                    table[tensor.name] = ggml_type, tensor.shape, folder
                _save(tree, partial / "tensors" / folder)
                for tensor in tensors:
                    tensor.release()
                    done += tensor.nbytes
                if progress:
                    progress(done, total)
            header = {
                "format": _FORMAT,
                "metadata": file.metadata,
                "tensors": table,
                "files": _sizes(partial / "tensors"),
            }
            (partial / "config.json").write_text(json.dumps(config.summary(), indent=1))
            (partial / "model.json").write_text(json.dumps(header), "utf-8")
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_directory(path: Path) -> Path:
    """Directory of a checkpoint that this process has not completed."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


def _save(tree: dict[str, np.ndarray], folder: Path) -> None:
    """Writes tensors as an Orbax checkpoint.

    Raises:
      OSError: the disk is full, or another error of the operating system.
    """
    import orbax.checkpoint as ocp

    chunks = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
    arguments = ocp.args.PyTreeSave(tree, save_args=dict.fromkeys(tree, chunks))
    try:
        with _quiet_orbax():
            _checkpointer().save(folder.resolve(), args=arguments)
    except (OSError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # Orbax and TensorStore have no class for it
        raise OSError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    """The operating system's message, or else the error's first line; short."""
    lines = str(error).splitlines() or [type(error).__name__]
    link: BaseException | None = error
    while link:
        if match := re.search(r"os_error_code='(\d+)'", str(link)):  # TensorStore's
            return os.strerror(int(match[1]))
        link = link.__cause__ or link.__context__
    return lines[0][:200]


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax, which logs the traceback of each error that it raises."""
    logger = logging.getLogger("absl")

    def drop(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _folder(name: str) -> str:
    """Folder of a tensor: one for each layer, and one for the rest."""
    match = re.match(r"blk\.\d+", name)
    return match[0] if match else "model"


def _least_bytes(tensor: TensorInfo, weights: str | None) -> int:
    """Lower bound of a tensor's bytes: Orbax compresses, but quantized weights hardly shrink."""
    itemsize = jnp.dtype(weights or "float32").itemsize
    return min(tensor.nbytes, math.prod(tensor.shape) * itemsize)


_dequantize = jax.jit(unpack, static_argnums=0, static_argnames="dtype")


def _stored(tensor: GGUFTensor, weights: str | None) -> tuple[str, np.ndarray]:
    """Type and raw blocks of a tensor as stored."""
    if weights is None or len(tensor.shape) < 2:
        return tensor.type, tensor.blocks
    ggml_type = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[weights]
    dtype = jnp.dtype(weights)
    dequantized = _dequantize(tensor.type, tensor.blocks, dtype=dtype)
    return ggml_type, np.asarray(dequantized).view(np.uint8).reshape(*tensor.shape, dtype.itemsize)


def restore(sources: Sequence[Source], placements: Sequence[Placement]) -> list[jax.Array]:
    """Restores the raw blocks of parameters whose tensors are in one folder, sharded.

    Args:
      sources: of the parameters.
      placements: of the parameters.

    Returns:
      uint8 `[..., rows, blocks, block_bytes]` each, padded as the placements say.

    Raises:
      JaxsplitError: the checkpoint is damaged.
    """
    import orbax.checkpoint as ocp

    direct = [_is_direct(s, p) for s, p in zip(sources, placements, strict=True)]
    items, arguments = {}, {}
    for source, placement, is_direct in zip(sources, placements, direct, strict=True):
        tensor = source.tensor
        shape, spec = tensor.blocks_shape, list(placement.sharding.spec)
        if not is_direct:
            spec = [None] * len(shape)
        elif source.is_matrix:
            # Orbax pads with zeros at the end; each device reads only its own slice.
            shape = (*placement.shape, shape[-1])
        else:
            shape, spec = (*placement.shape[:-1], shape[-1]), [*spec[:-2], None]
        sharding = NamedSharding(placement.sharding.mesh, PartitionSpec(*spec))
        items[tensor.name] = jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding)
        arguments[tensor.name] = ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=shape, strict=False
        )
    tensors = [cast(StoredTensor, source.tensor) for source in sources]
    arrays = _restore(tensors[0].folder, tensors, items, arguments)
    restored = []
    for source, placement, is_direct in zip(sources, placements, direct, strict=True):
        array = arrays[source.tensor.name]
        if source.is_dequantized:
            array = float32_blocks(source.tensor.type, array)
        if not is_direct:
            array = _arrange(array, source, placement)
        restored.append(array.reshape(*placement.shape, array.shape[-1]))
    return restored


def _restore(
    folder: Path, tensors: Sequence[StoredTensor], items: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, jax.Array]:
    """Restores tensors after checking that the folder holds them in the expected shapes."""
    import orbax.checkpoint as ocp

    target = folder.resolve()
    try:
        with _quiet_orbax():
            metadata = _checkpointer().metadata(target).item_metadata
        if metadata is None:
            raise ValueError("its arrays cannot be listed")
        stored = metadata.tree
        for tensor in tensors:
            if tensor.name not in stored:
                raise ValueError(f"tensor {tensor.name!r} is missing")
            if (shape := tuple(stored[tensor.name].shape)) != tensor.blocks_shape:
                raise ValueError(
                    f"tensor {tensor.name!r} has shape {shape}, expected {tensor.blocks_shape}"
                )
        args = ocp.args.PyTreeRestore(item=items, restore_args=arguments, partial_restore=True)
        with _quiet_orbax():
            return _checkpointer().restore(target, args=args)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # as in `_save`
        raise JaxsplitError(f"{folder} is damaged ({_reason(error)}); convert again") from error


def _is_direct(source: Source, placement: Placement) -> bool:
    """Whether a parameter is a stored tensor, only padded at the ends."""
    return (
        source.rows is None
        and not source.is_dequantized
        and source.shape == source.tensor.shape
        and all(_in_order(index) for index in (*placement.rows, placement.columns))
    )


def _in_order(index: np.ndarray) -> bool:
    """Whether an index is 0, 1, 2, … followed by padding."""
    count = int((index >= 0).sum())
    return np.array_equal(index[:count], np.arange(count)) and bool((index[count:] < 0).all())


def _arrange(raw: jax.Array, source: Source, placement: Placement) -> jax.Array:
    """Slices and pads replicated blocks as the placement says."""
    rows = source.tensor_rows(placement.rows).astype(np.int32)
    arranger = _arranger(placement.sharding.mesh, placement.sharding.spec, source.is_matrix)
    return arranger(raw, rows, placement.columns)


@functools.cache
def _arranger(mesh: Mesh, spec: PartitionSpec, matrix: bool) -> Callable[..., jax.Array]:
    """The program of `_arrange`; compiled once for each shape."""

    def local(raw: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        raw = raw.reshape(-1, raw.shape[-2] if matrix else 1, raw.shape[-1])
        kept = (rows >= 0)[..., None, None] & (columns >= 0)[:, None]
        return jnp.where(kept, raw[rows][..., columns, :], 0).astype(jnp.uint8)

    specs = (PartitionSpec(), PartitionSpec(*spec[:-2]), PartitionSpec(spec[-2]))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec))
