"""Open a GGUF file, or a set of `-00001-of-000NN.gguf` files, without reading its weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxsplit.errors import JaxsplitError

_SHARD = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a model file says of a tensor.

    Attributes:
      name: the tensor's GGUF name.
      type: the GGML type's name, such as `Q4_K`.
      shape: NumPy order, slowest axis first: `[out, in]` for a matrix.
    """

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def block_size(self) -> int:
        """Weights in a block: neighbours in a row."""
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]][0]

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Of the raw bytes: `[*shape[:-1], blocks, block_bytes]`."""
        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.type]]
        return (*self.shape[:-1], self.shape[-1] // size, nbytes)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.blocks_shape)


@dataclasses.dataclass(frozen=True)
class GGUFTensor(TensorInfo):
    """A tensor whose bytes are still on disk.

    Attributes:
      blocks: uint8 memory map of shape `blocks_shape`.
    """

    blocks: np.ndarray

    def release(self) -> None:
        """Let the operating system take back the memory that holds the bytes read so far."""
        base = self.blocks
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """The header of a model: metadata and tensors, over all its files.

    Attributes:
      path: the (first) file.
      metadata: GGUF keys to plain Python values; arrays are lists.
      tensors: tensors by GGUF name.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.key("general.architecture")

    def key(self, name: str) -> Any:
        """A metadata value that the file must have."""
        if name not in self.metadata:
            raise JaxsplitError(f"{self.path}: the metadata key {name!r} is missing")
        return self.metadata[name]

    def tensor(self, name: str) -> TensorInfo:
        """A tensor that the file must have."""
        if name not in self.tensors:
            raise JaxsplitError(f"{self.path}: the tensor {name!r} is missing")
        return self.tensors[name]


class _Reader(gguf.GGUFReader):
    """The package's reader, with arrays decoded in one pass.

    The package makes two NumPy views for each string, which takes 4 s for a vocabulary of
    49,152 tokens; decoding takes 0.05 s.
    """

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type != gguf.GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        order = "<" if self.endianess == gguf.GGUFEndian.LITTLE else ">"
        buffer = self.data.data
        item_type, count = struct.unpack_from(f"{order}IQ", buffer, orig_offs)
        item_type = gguf.GGUFValueType(item_type)
        start = offset = orig_offs + 12
        if item_type == gguf.GGUFValueType.STRING:
            values, length = [], struct.Struct(f"{order}Q")
            for _ in range(count):
                (size,) = length.unpack_from(buffer, offset)
                offset += 8 + size
                if offset > len(buffer):
                    raise ValueError("a string runs past the end of the file")
                values.append(str(buffer[offset - size : offset], "utf-8", "surrogateescape"))
        elif item_type in self.gguf_scalar_to_np:
            array = self._get(start, self.gguf_scalar_to_np[item_type], count)
            if len(array) < count:
                raise ValueError("an array runs past the end of the file")
            values, offset = array.tolist(), start + array.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return offset - orig_offs, [values], [0], [gguf.GGUFValueType.ARRAY, item_type]


def open_gguf(path: str | Path) -> ModelFile:
    """Reads the header of a GGUF file and maps its tensors into memory.

    Args:
      path: a `.gguf` file. Of a model in several files, any one (`-00001-of-000NN.gguf`); the
        others must lie beside it.

    Raises:
      JaxsplitError: the file is missing, not a GGUF file, truncated, or has a tensor of a type
        that the `gguf` package does not know.
    """
    paths = _shard_paths(Path(path))
    opened = [_read(p) for p in paths]
    metadata = {}
    for _, values in reversed(opened):  # the first file's values win
        metadata |= values
    tensors = {}
    for shard, (reader, _) in zip(paths, opened, strict=True):
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise JaxsplitError(f"{shard}: the tensor {tensor.name!r} is in two files")
            tensors[tensor.name] = _tensor(shard, reader, tensor)
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise JaxsplitError(
            f"{paths[0]}: {len(tensors)} tensors in {len(paths)} files, but the header says "
            f"{expected}; are all files of one model?"
        )
    return ModelFile(paths[0], metadata, tensors)


def _shard_paths(path: Path) -> list[Path]:
    """All files of the model that `path` belongs to, in order."""
    if path.is_dir():
        found = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {', '.join(found[:5])}" if found else ""
        raise JaxsplitError(f"{path} is a directory, a .gguf file is needed{hint}")
    match = _SHARD.match(path.name)
    paths = [path]
    if match:
        count = int(match["count"])
        paths = [
            path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf")
            for i in range(1, count + 1)
        ]
    for p in paths:
        if not p.exists():
            of = f" (one of the {len(paths)} files of this model)" if len(paths) > 1 else ""
            raise JaxsplitError(f"no such file: {p}{of}")
    return paths


def _read(path: Path) -> tuple[_Reader, dict[str, Any]]:
    """The reader of one file, and its metadata."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise JaxsplitError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
        reader = _Reader(path)
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise JaxsplitError(f"{path} is big-endian; only little-endian files are supported")
        return reader, {name: _value(field) for name, field in reader.fields.items()}
    except OSError as error:
        raise JaxsplitError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError, struct.error) as error:
        if match := re.match(r"(\d+) is not a valid GGMLQuantizationType", str(error)):
            raise JaxsplitError(
                f"{path}: a tensor has type number {match[1]}, which is no GGML type of mainline "
                f"llama.cpp (is the file made for a fork?)"
            ) from error
        raise JaxsplitError(
            f"{path} is truncated or damaged ({error}); its size is {path.stat().st_size:,} "
            "bytes: compare it with the source and download it again"
        ) from error


def _value(field: gguf.ReaderField) -> Any:
    last = field.parts[-1]
    return last if isinstance(last, list) else field.contents()


def _tensor(path: Path, reader: _Reader, tensor: gguf.ReaderTensor) -> GGUFTensor:
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    if shape[-1] % block_size:
        raise JaxsplitError(
            f"{path}: tensor {tensor.name!r} has rows of {shape[-1]} weights, not a multiple of "
            f"the {block_size} in a block of type {tensor.tensor_type.name}"
        )
    data = reader.data[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
    blocks = data.reshape(*shape[:-1], shape[-1] // block_size, block_bytes)
    return GGUFTensor(tensor.name, tensor.tensor_type.name, shape, blocks)
