"""How GGUF files store each GGML type: numbers, sizes of blocks, headers of rows, interleaved rows.

Mainline's types are those of the `gguf` package; ik_llama.cpp's own are listed here
(https://github.com/ikawrakow/ik_llama.cpp, `ggml/src/ggml-common.h`).
"""

import dataclasses
import math
from collections.abc import Sequence

import gguf
import numpy as np


@dataclasses.dataclass(frozen=True)
class StoredType:
    """How a file stores the weights of a type.

    A row is a header and blocks. Where several consecutive rows are interleaved they form a unit:
    their headers, then for each run of the block's bytes one piece of every row in turn.

    Attributes:
      number: of the type in the file.
      block: weights in a block: neighbors in a row.
      size: bytes of a block, without the header.
      header: bytes in front of each row.
      scale: dtype of the scale with which the header starts; "": there is no header.
      rows: rows of a unit.
      runs: bytes of each piece, and the number of a row's pieces in a block; (): one of `size`.
      trailer: bytes behind the whole tensor, which begin with its scale in place of headers.
    """

    number: int
    block: int
    size: int
    header: int = 0
    scale: str = ""
    rows: int = 1
    runs: tuple[tuple[int, int], ...] = ()
    trailer: int = 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block behind its row's header, as devices receive it."""
        return self.header + self.size

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor in the file."""
        header = 0 if self.trailer else self.header
        row_bytes = header + shape[-1] // self.block * self.size
        return math.prod(shape[:-1]) * row_bytes + self.trailer

    def misfit(self, shape: Sequence[int]) -> str:
        """Why the type cannot store a tensor; "": it can."""
        if shape[-1] % self.block:
            return f"has rows of {shape[-1]} weights, not a multiple of the {self.block} in a block"
        rows = shape[-2] if len(shape) > 1 else 1
        if rows % self.rows:
            return f"has {rows} rows, not a multiple of the {self.rows} that are interleaved"
        return ""

    def parts(self, data: np.ndarray, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Views of a tensor's bytes that make up each block, one after another.

        Args:
          data: uint8 `[nbytes]`.
          shape: of the tensor, which fits.

        Returns:
          uint8 `[units, rows of a unit, blocks, pieces, bytes]` each, the header first.
        """
        rows, blocks = math.prod(shape[:-1]), shape[-1] // self.block
        data, trailer = data[: len(data) - self.trailer], data[len(data) - self.trailer :]
        if self.trailer:
            header, body = trailer[: self.header], data.reshape(rows, 1, -1)
            header = header.reshape(1, 1, -1)
        else:
            units = data.reshape(rows // self.rows, -1)
            header, body = units[:, : self.rows * self.header], units[:, self.rows * self.header :]
            header = header.reshape(len(units), self.rows, self.header)
        body = body.reshape(rows // self.rows, blocks, self.rows * self.size)
        parts, start = [], 0
        if self.header:
            whole = (rows // self.rows, self.rows, blocks, 1, self.header)
            parts.append(np.broadcast_to(header[:, :, None, None], whole))
        for width, count in self.runs or ((self.size, 1),):
            stop = start + self.rows * count * width
            run = body[:, :, start:stop].reshape(*body.shape[:2], count, self.rows, width)
            parts.append(np.moveaxis(run, 3, 1))
            start = stop
        return tuple(parts)

    def file_bytes(self, blocks: np.ndarray) -> np.ndarray:
        """The bytes of a tensor in a file, uint8 `[nbytes]`: the inverse of `parts`.

        Args:
          blocks: uint8 `[..., blocks, block_bytes]`, the header of a row the same in all.
        """
        units = blocks.reshape(-1, self.rows, *blocks.shape[-2:])
        header, body, start = units[:, :, 0, : self.header], [], self.header
        for width, count in self.runs or ((self.size, 1),):
            run = units[..., start : start + width * count]
            run = run.reshape(*units.shape[:3], count, width)
            body.append(np.moveaxis(run, 1, 3).reshape(len(units), units.shape[2], -1))
            start += width * count
        body = np.concatenate(body, axis=-1).reshape(len(units), -1)
        if self.trailer:
            padding = np.zeros(self.trailer - self.header, np.uint8)
            return np.concatenate([body.reshape(-1), header[0, 0], padding])
        return np.concatenate([header.reshape(len(units), -1), body], axis=1).reshape(-1)


_HALF, _FLOAT = {"header": 2, "scale": "<f2"}, {"header": 4, "scale": "<f4"}

# Pieces of interleaved rows that several types have.
_D, _D_M = ((2, 1),), ((2, 1), (2, 1))  # float16 scales of a block; and minima
_4, _1, _2 = ((4, 32),), ((4, 8),), ((4, 16),)  # codes of 4, 1, 2 bits of 256 weights

IK_TYPES: dict[str, StoredType] = {
    "I2_S": StoredType(36, 128, 32, 4, "<f4", trailer=32),
    "Q6_0": StoredType(133, 32, 26),
    "IQ1_BN": StoredType(134, 64, 13, **_HALF),
    "IQ2_BN": StoredType(135, 64, 16, **_FLOAT),
    "IQ2_K": StoredType(137, 256, 76),
    "IQ3_K": StoredType(138, 256, 110),
    "IQ4_K": StoredType(139, 256, 144),
    "IQ5_K": StoredType(140, 256, 176),
    "IQ6_K": StoredType(141, 256, 212),
    "IQ4_KS": StoredType(144, 256, 136, **_FLOAT),
    "IQ2_KS": StoredType(145, 256, 70, **_HALF),
    "IQ4_KSS": StoredType(146, 256, 128, **_FLOAT),
    "Q8_KV": StoredType(151, 32, 32, 8, "<f4"),
    "IQ5_KS": StoredType(152, 256, 168, **_FLOAT),
    "IQ2_KT": StoredType(153, 256, 68, **_FLOAT),
    "IQ3_KT": StoredType(154, 256, 100, **_FLOAT),
    "IQ4_KT": StoredType(155, 256, 128, **_FLOAT),
    "IQ3_KS": StoredType(156, 256, 102, **_HALF),
    "IQ2_KL": StoredType(157, 256, 86, **_HALF),
    "IQ1_KT": StoredType(158, 256, 56, **_FLOAT),
    "Q4_0_R8": StoredType(202, 32, 18, rows=8, runs=(*_D, (4, 4))),
    "Q5_0_R4": StoredType(206, 32, 22, rows=4, runs=(*_D, (4, 1), (4, 4))),
    "Q8_0_R8": StoredType(208, 32, 34, rows=8, runs=(*_D, (4, 8))),
    "Q2_K_R4": StoredType(210, 256, 84, rows=4, runs=(*_D_M, (1, 16), *_2)),
    "Q3_K_R4": StoredType(211, 256, 110, rows=4, runs=(*_D, (1, 12), *_1, *_2)),
    "Q4_K_R4": StoredType(212, 256, 144, rows=4, runs=(*_D_M, (1, 12), *_4)),
    "Q5_K_R4": StoredType(213, 256, 176, rows=4, runs=(*_D_M, (1, 12), *_1, *_4)),
    "Q6_K_R4": StoredType(214, 256, 210, rows=4, runs=(*_D, (1, 16), *_2, *_4)),
    "IQ2_XXS_R4": StoredType(216, 256, 66, rows=4, runs=(*_D, (4, 8), (4, 8))),
    "IQ2_XS_R4": StoredType(217, 256, 74, rows=4, runs=(*_D, (8, 8), (1, 8))),
    "IQ3_XXS_R4": StoredType(218, 256, 98, rows=4, runs=(*_D, (4, 8), (8, 8))),
    "IQ1_S_R4": StoredType(219, 32, 6, rows=4, runs=((1, 4), (2, 1)), **_HALF),
    "IQ4_NL_R4": StoredType(220, 32, 18, rows=4, runs=(*_D, (4, 4))),
    "IQ3_S_R4": StoredType(221, 256, 110, rows=4, runs=(*_D, (1, 72), (4, 8), (1, 4))),
    "IQ2_S_R4": StoredType(222, 256, 82, rows=4, runs=(*_D, (4, 8), (1, 8), (4, 8), (1, 8))),
    "IQ4_XS_R8": StoredType(223, 256, 136, rows=8, runs=(*_D, (1, 6), *_4)),
    "IQ1_M_R4": StoredType(229, 32, 7, rows=4, runs=((1, 7),), **_HALF),
    "BF16_R16": StoredType(230, 2, 4, rows=16, runs=((4, 1),)),
    "Q6_0_R4": StoredType(233, 32, 26, rows=4, runs=(*_D, (4, 2), (4, 4))),
    "IQ2_BN_R4": StoredType(335, 64, 16, rows=4, runs=((4, 4),), **_FLOAT),
    "IQ2_K_R4": StoredType(337, 256, 76, rows=4, runs=(*_D, (1, 10), *_2)),
    "IQ3_K_R4": StoredType(338, 256, 110, rows=4, runs=(*_D, (1, 12), *_2, *_1)),
    "IQ4_K_R4": StoredType(339, 256, 144, rows=4, runs=(*_D, (1, 14), *_4)),
    "IQ5_K_R4": StoredType(340, 256, 176, rows=4, runs=(*_D, (1, 14), *_4, *_1)),
    "IQ4_KS_R4": StoredType(344, 256, 136, rows=4, runs=((1, 8), *_4), **_FLOAT),
    "IQ5_KS_R4": StoredType(352, 256, 168, rows=4, runs=((1, 8), *_4, *_1), **_FLOAT),
    "MXFP4_R8": StoredType(353, 32, 17, rows=8, runs=((1, 1), (4, 4))),
    "Q8_K_R16": StoredType(397, 256, 258, rows=16, runs=(*_D, (4, 64))),
    "Q8_KV_R8": StoredType(398, 32, 32, rows=8, runs=((4, 8),), **_FLOAT),
    "Q8_K_R8": StoredType(399, 256, 258, rows=8, runs=(*_D, (4, 64))),
}

# Newer than some versions of the package.
_NEW_TYPES = {
    "NVFP4": StoredType(40, 64, 36),
    "Q1_0": StoredType(41, 128, 18),
}

STORED_TYPES: dict[str, StoredType] = (IK_TYPES | _NEW_TYPES) | {
    kind.name: StoredType(kind.value, *gguf.GGML_QUANT_SIZES[kind])
    for kind in gguf.GGMLQuantizationType
}

TYPE_NAMES: dict[int, str] = {kind.number: name for name, kind in STORED_TYPES.items()}

_REPACKED = "an interleaved Q4_0 that llama.cpp removed; quantize to Q4_0"
_ACTIVATIONS = "in which ik_llama.cpp keeps activations, never weights"
_TERNARY = "which ik_llama.cpp removed; quantize to IQ1_BN or IQ2_BN"

REFUSED: dict[int, str] = {
    **{number: f"{name}, {_REPACKED}" for number, name in ((31, "Q4_0_4_4"), (32, "Q4_0_4_8"))},
    33: f"Q4_0_8_8, {_REPACKED}",
    37: "IQ4_NL_4_8, an interleaved IQ4_NL that llama.cpp removed; quantize to IQ4_NL",
    38: "IQ4_NL_8_8, an interleaved IQ4_NL that llama.cpp removed; quantize to IQ4_NL",
    97: f"Q8_0_X4, {_ACTIVATIONS}",
    98: f"Q8_1_X4, {_ACTIVATIONS}",
    99: f"Q8_2_X4, {_ACTIVATIONS}",
    136: f"Q8_K64, {_ACTIVATIONS}",
    142: f"IQ2_TN, {_TERNARY}",
    143: f"IQ1_TN, {_TERNARY}",
    147: f"Q8_K16, {_ACTIVATIONS}",
    148: f"Q8_K32, {_ACTIVATIONS}",
    149: f"Q8_KR8, {_ACTIVATIONS}",
    150: f"Q8_K128, {_ACTIVATIONS}",
    **dict.fromkeys(
        (159, 160, 161, 345, 346),
        "a type of a fork of ik_llama.cpp, which has no specification",
    ),
}
"""What is known of other numbers, and why they are not supported."""
