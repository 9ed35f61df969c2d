"""Open a GGUF file, or a set of `-00001-of-000NN.gguf` files, without reading its weights.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats.ggml_types import REFUSED, STORED_TYPES, TYPE_NAMES, StoredType
from jaxsplit.paths import os_errors, user_path

_SHARD = re.compile(r"^(?P<stem>.*-)(?P<number>\d+)(?P<rest>-of-\d+.*)$", re.IGNORECASE)


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
    def stored(self) -> StoredType:
        """How files store the type."""
        return STORED_TYPES[self.type]

    @property
    def block_size(self) -> int:
        """Weights in a block: neighbours in a row."""
        return self.stored.block

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """Of the blocks, each behind its row's header: `[*shape[:-1], blocks, block_bytes]`."""
        kind = self.stored
        return (*self.shape[:-1], self.shape[-1] // kind.block, kind.block_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stored.nbytes(self.shape)


@dataclasses.dataclass(frozen=True)
class GGUFTensor(TensorInfo):
    """A tensor whose bytes are still on disk.

    Attributes:
      parts: as in `StoredType.parts`, memory-mapped.
    """

    parts: tuple[np.ndarray, ...]

    @classmethod
    def of_bytes(
        cls, name: str, type_name: str, shape: tuple[int, ...], data: np.ndarray
    ) -> "GGUFTensor":
        """The tensor with these bytes, as a file has them: uint8 `[nbytes]`."""
        return cls(name, type_name, shape, STORED_TYPES[type_name].parts(data, shape))

    @property
    def blocks(self) -> np.ndarray:
        """All blocks, uint8 of shape `blocks_shape`: a memory map, or a copy if rows have headers
        or are interleaved."""
        rows, columns = (math.prod(self.shape[:-1]), self.shape[-1] // self.block_size)
        return self.take(np.arange(rows), np.arange(columns)).reshape(self.blocks_shape)

    def take(self, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Takes blocks, as views where they are stored in this order.

        Args:
          rows: the tensor's rows, all dimensions but the last flattened, or -1: int `[...]`.
          columns: blocks of each row, or -1: int `[columns]`.

        Returns:
          uint8 `[..., columns, block_bytes]`, zeros where an index is -1.

        Raises:
          JaxsplitError: the scale of a row is infinite or not a number.
        """
        taken = [_take_part(part, rows, columns) for part in self.parts]
        kind = self.stored
        if kind.header:
            scales = np.ascontiguousarray(taken[0][..., : np.dtype(kind.scale).itemsize])
            if not (good := np.isfinite(scales.view(kind.scale))).all():
                at = np.argwhere(~good)[0]
                row = rows[tuple(at[: rows.ndim])]
                raise JaxsplitError(
                    f"tensor {self.name!r} is damaged: the scale of its row {row} is "
                    f"{scales.view(kind.scale)[tuple(at)]}; download the file again"
                )
        return taken[0] if len(taken) == 1 else np.concatenate(taken, axis=-1)

    def release(self) -> None:
        """Let the operating system take back the memory that holds the bytes read so far."""
        base = self.parts[-1]
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


def _take_part(part: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Takes `[..., columns, bytes]` from a part, as in `GGUFTensor.take`."""
    unit = part.shape[1]
    window: list[slice] = []
    for index, size in ((rows, unit), (columns, 1)):
        there = index[index >= 0]
        span = (there.min() // size, there.max() // size + 1) if there.size else (0, 0)
        window.append(slice(*map(int, span)))
    part = part[window[0], :, window[1]]
    units, _, blocks, pieces, width = part.shape
    whole = part.reshape(units * unit, blocks, pieces * width)
    starts = window[0].start * unit, window[1].start
    rows, columns = (
        np.where(index < 0, -1, index - start)
        for index, start in zip((rows, columns), starts, strict=True)
    )
    return take_blocks(whole, rows, columns)


def take_blocks(blocks: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Takes rows `[...]` and columns of `[rows, columns, block_bytes]`: zeros where an index is -1,
    views instead of copies where indices are ranges.

    Returns:
      `[..., columns, block_bytes]`.
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
        elif not blocks.shape[axis]:
            return np.zeros(shape, np.uint8)
        else:
            blocks = np.take(blocks, np.maximum(index, 0), axis=axis)
            blocks[(slice(None),) * axis + (index < 0,)] = 0
    return blocks.reshape(shape)


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
        found = self.key("general.architecture")
        if not isinstance(found, str):
            raise JaxsplitError(f"{self.path}: general.architecture is {found!r}, expected a name")
        return found

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


_DTYPES = {
    gguf.GGUFValueType.UINT8: "<u1",
    gguf.GGUFValueType.INT8: "<i1",
    gguf.GGUFValueType.UINT16: "<u2",
    gguf.GGUFValueType.INT16: "<i2",
    gguf.GGUFValueType.UINT32: "<u4",
    gguf.GGUFValueType.INT32: "<i4",
    gguf.GGUFValueType.UINT64: "<u8",
    gguf.GGUFValueType.INT64: "<i8",
    gguf.GGUFValueType.FLOAT32: "<f4",
    gguf.GGUFValueType.FLOAT64: "<f8",
    gguf.GGUFValueType.BOOL: "?",
}
_U32, _U64 = (np.dtype(_DTYPES[gguf.GGUFValueType[name]]) for name in ("UINT32", "UINT64"))

_VERSIONS = (2, 3)
_MAX_DIMS = 4  # of ggml
_MAX_NAME = 2**16 - 1  # bytes of a key; of tensor names, too
_MAX_VALUE = 2**24  # items of an array, bytes of a string: a hundred times today's vocabularies
_LEAST_KEY = 8 + 4 + 1  # bytes: length of the key, type, value
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes: length of the name, dimensions, type, offset


class _HeaderReader:
    """Reads the header of one file from start to end.

    Counts and lengths are checked against the rest of the file before anything is built of them.
    """

    def __init__(self, path: Path, data: np.memmap):
        self.path = path
        self.data = data
        self.offset = 0

    def damaged(self, reason: str) -> JaxsplitError:
        return JaxsplitError(
            f"{self.path} is truncated or damaged: {reason}; its size is {len(self.data):,} bytes: "
            "compare it with the source and download it again (or, if it is one of several "
            "pieces, put them together)"
        )

    def need(self, count: int, size: int, what: str) -> None:
        """Refuses what the rest of the file has no room for.

        Args:
          count: items.
          size: bytes of each, at least.
          what: they are.
        """
        if count * size > len(self.data) - self.offset:
            raise self.damaged(f"{what} at byte {self.offset:,} would run past its end")

    def numbers(self, dtype: np.dtype, count: int, what: str) -> list:
        """The next numbers, as Python's own."""
        self.need(count, dtype.itemsize, what)
        values = np.frombuffer(self.data, dtype, count, self.offset).tolist()
        self.offset += count * dtype.itemsize
        return values

    def number(self, dtype: np.dtype, what: str) -> Any:
        return self.numbers(dtype, 1, what)[0]

    def strings(self, count: int, what: str, most: int = _MAX_VALUE) -> list[str]:
        """The next strings; bytes that are not UTF-8 become lone surrogates."""
        self.need(count, 8, what)
        buffer, offset, values = self.data.data, self.offset, []
        end, length = len(buffer), struct.Struct("<Q")
        for _ in range(count):
            if offset + 8 > end:
                raise self.damaged(f"{what} would run past its end")
            (size,) = length.unpack_from(buffer, offset)
            offset += 8
            if size > end - offset or size > most:
                raise self.damaged(f"{what} at byte {offset:,} would take {size:,} bytes")
            values.append(str(buffer[offset : offset + size], "utf-8", "surrogateescape"))
            offset += size
        self.offset = offset
        return values

    def name(self, what: str) -> str:
        return self.strings(1, what, _MAX_NAME)[0]

    def values(self, number: int, count: int, key: str) -> list:
        """The next values of a type."""
        what = f"the value of the key {key!r}"
        try:
            kind = gguf.GGUFValueType(number)
        except ValueError:
            raise self.damaged(f"{what} has type {number}, which is no GGUF type") from None
        if kind == gguf.GGUFValueType.ARRAY:
            raise JaxsplitError(
                f"{self.path}: {what} is an array of arrays, which is not supported"
            )
        if count > _MAX_VALUE:
            raise self.damaged(f"{what} is an array of {count:,} items")
        if kind == gguf.GGUFValueType.STRING:
            return self.strings(count, what)
        return self.numbers(np.dtype(_DTYPES[kind]), count, what)

    def metadata(self, count: int) -> dict[str, Any]:
        """The next keys and their values; arrays are lists."""
        self.need(count, _LEAST_KEY, f"{count:,} keys")
        found = {}
        for _ in range(count):
            key = self.name("a key")
            if key in found:
                raise JaxsplitError(f"{self.path}: the key {key!r} is there twice")
            kind = self.number(_U32, f"the type of the key {key!r}")
            if kind == gguf.GGUFValueType.ARRAY:
                kind = self.number(_U32, f"the type of the items of the key {key!r}")
                items = self.number(_U64, f"the count of the items of the key {key!r}")
                found[key] = self.values(kind, items, key)
            else:
                found[key] = self.values(kind, 1, key)[0]
        return found

    def tensor_infos(self, count: int) -> dict[str, tuple[TensorInfo, int]]:
        """The next tensors by name, and where the bytes of each start after the header."""
        self.need(count, _LEAST_TENSOR, f"{count:,} tensors")
        found = {}
        for _ in range(count):
            name = self.name("the name of a tensor")
            what = f"tensor {name!r}"
            if name in found:
                raise JaxsplitError(f"{self.path}: {what} is there twice")
            dims = self.number(_U32, what)
            if dims > _MAX_DIMS:
                raise self.damaged(f"{what} has {dims:,} dimensions, not at most {_MAX_DIMS}")
            shape = tuple(reversed(self.numbers(_U64, dims, what))) or (1,)
            kind, start = self.number(_U32, what), self.number(_U64, what)
            if 0 in shape:
                raise JaxsplitError(f"{self.path}: {what} has shape {shape}: no weights at all")
            found[name] = self.tensor_info(name, kind, shape), start
        return found

    def tensor_info(self, name: str, number: int, shape: tuple[int, ...]) -> TensorInfo:
        if number not in TYPE_NAMES:
            what = REFUSED.get(
                number,
                "which is no GGML type of mainline llama.cpp or ik_llama.cpp (is the file made for "
                "a fork?)",
            )
            raise JaxsplitError(f"{self.path}: tensor {name!r} has type number {number}, {what}")
        info = TensorInfo(name, TYPE_NAMES[number], shape)
        if misfit := info.stored.misfit(shape):
            raise JaxsplitError(f"{self.path}: tensor {name!r} {misfit} of type {info.type}")
        return info

    def tensors(self, count: int, alignment: Any) -> dict[str, "GGUFTensor"]:
        """The next tensors, mapped: each where the header says, none over another."""
        infos = self.tensor_infos(count)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise JaxsplitError(
                f"{self.path}: general.alignment is {alignment!r}, expected a power of two"
            )
        base = -(-self.offset // alignment) * alignment
        previous, free = "the header", base
        for name, (info, start) in sorted(infos.items(), key=lambda entry: entry[1][1]):
            begin, end = base + start, base + start + info.nbytes
            if start % alignment:
                raise self.damaged(
                    f"tensor {name!r} starts at {start:,}, no multiple of {alignment}"
                )
            if begin < free:
                raise self.damaged(f"tensor {name!r} lies over {previous}")
            if end > len(self.data):
                raise self.damaged(f"tensor {name!r} would end at byte {end:,}")
            previous, free = f"tensor {name!r}", end
        return {
            name: GGUFTensor.of_bytes(
                name, info.type, info.shape, self.data[base + start :][: info.nbytes]
            )
            for name, (info, start) in infos.items()
        }

    def read(self) -> "_Shard":
        """The whole header."""
        self.offset = 4
        version = self.number(_U32, "the version")
        if version and not version & 0xFFFF:
            raise JaxsplitError(
                f"{self.path} is big-endian; only little-endian files are supported"
            )
        if version not in _VERSIONS:
            what = "make it again with a newer converter" if version < 2 else "update jaxsplit"
            raise JaxsplitError(
                f"{self.path} has GGUF version {version}; supported are "
                f"{' and '.join(map(str, _VERSIONS))} ({what})"
            )
        tensors, keys = self.numbers(_U64, 2, "the counts of tensors and keys")
        counts = {"GGUF.version": version, "GGUF.tensor_count": tensors, "GGUF.kv_count": keys}
        metadata = counts | self.metadata(keys)
        alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        return _Shard(self.path, metadata, self.tensors(tensors, alignment))


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file of a model, which may be all of it.

    Attributes:
      path: of the file.
      metadata: its keys.
      tensors: its tensors by name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def number(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        if type(value) is not int or value < 0:
            raise JaxsplitError(f"{self.path}: {key} is {value!r}, expected a number of at least 0")
        return value

    @property
    def index(self) -> int:
        """Its place among the files of the model, from 0."""
        return self.number("split.no", 0)

    @property
    def count(self) -> int:
        """Files of the model."""
        return max(self.number("split.count", 1), 1)

    @property
    def is_whole(self) -> bool:
        """Whether it has all tensors and keys of the model."""
        if self.count == 1:
            return True
        expected = self.number("split.tensors.count", len(self.tensors) + 1)
        return self.index == 0 and expected == len(self.tensors)


def open_gguf(path: str | os.PathLike[str]) -> ModelFile:
    """Reads the header of a GGUF file and maps its tensors into memory.

    Args:
      path: a GGUF file. Of a model in several files, any one; the others must lie beside it, with
        names that differ in their number only (`-00001-of-000NN.gguf`).

    Raises:
      JaxsplitError: the file is missing, not a GGUF file, truncated, or has a tensor of an
        unknown type.
    """
    first = _read(user_path(path))
    shards = [first] if first.is_whole else _all_shards(first)
    metadata = {}
    for shard in reversed(shards):  # the first file's values win
        metadata |= shard.metadata
    tensors = {}
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise JaxsplitError(f"{shard.path}: the tensor {name!r} is in two files")
            tensors[name] = tensor
    expected = shards[0].number("split.tensors.count", len(tensors))
    if shards[0].count > 1 and expected != len(tensors):
        raise JaxsplitError(
            f"{shards[0].path}: {len(tensors)} tensors in {len(shards)} files, but the header says "
            f"{expected}; are all files of one model?"
        )
    return ModelFile(shards[0].path, metadata, tensors)


def _all_shards(one: _Shard) -> list[_Shard]:
    """All files of the model that a file belongs to, in the order that their headers say."""
    count = one.count
    match = _SHARD.match(one.path.name)
    if not match:
        raise JaxsplitError(
            f"{one.path} is file {one.index + 1} of the {count} of a model (split.no, split.count "
            f"in its header); name them all as NAME-{one.index + 1:05d}-of-{count:05d}.gguf, or "
            "merge them with llama-gguf-split --merge (cat does not do)"
        )
    shards: dict[int, _Shard] = {}
    for number in range(1, count + 1):
        digits = f"{number:0{len(match['number'])}d}"
        path = one.path.with_name(f"{match['stem']}{digits}{match['rest']}")
        try:
            shard = one if path == one.path else _read(path)
        except JaxsplitError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            raise JaxsplitError(f"{error} (one of the {count} files of this model)") from error
        if shard.count != count or shard.index >= count:
            raise JaxsplitError(
                f"{shard.path} is file {shard.index + 1} of {shard.count} by its header (split.no, "
                f"split.count), {one.path} one of {count}; are all files of one model?"
            )
        if shard.index in shards:
            raise JaxsplitError(
                f"{shard.path} is file {shard.index + 1} of {count} by its header (split.no), and "
                f"so is {shards[shard.index].path}; are all files of one model?"
            )
        shards[shard.index] = shard
    return [shards[index] for index in range(count)]


def _read(path: Path) -> _Shard:
    """The header of one file."""
    with os_errors(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            names = sorted(name for name in os.listdir(path) if name.lower().endswith(".gguf"))
            hint = f"; it holds {', '.join(names[:5])}" if names else ""
            raise JaxsplitError(
                f"{path} is a directory, a .gguf file or a checkpoint directory is needed{hint}"
            )
        if not stat.S_ISREG(mode):
            raise JaxsplitError(f"{path} is no regular file; copy the model to one")
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise JaxsplitError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
        data = np.memmap(path, np.uint8, "r")
    return _HeaderReader(path, data).read()
