"""FlashAttention in CUDA C++, on tensor cores: as `triton_flash`."""

import dataclasses
import importlib.resources
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.cache.layers import AttentionCache
from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.limits import shared_kib
from jaxsplit.cuda.source import Arguments, constants, cpp_type
from jaxsplit.ops.activations import cuda_rows
from jaxsplit.ops.activations.layout import BLOCK, XLA_ONLY, Activations, Readers, wrap_layouts
from jaxsplit.ops.activations.swizzled import SwizzledLayout
from jaxsplit.ops.attention.kernels import supports_attend
from jaxsplit.ops.attention.spec import AttentionConfig
from jaxsplit.ops.tilings import tunable

MIN_CAPABILITY = 7.5
"""With tensor cores that a warp uses by itself."""

FASTER = (9.0,)
"""Compute capabilities where it was measured to read prompts faster than `triton_flash`."""

_BFLOAT16 = 8.0
"""With tensor cores for bfloat16, and copies to shared memory that need no registers."""

_SPLIT_KEYS = 512  # a split has at least as many
_MAX_SPLITS = 64
_COMBINE_THREADS = 128
_BUSY_WARPS = 1024  # keep a large GPU busy
_ROOMY = 100 * 1024  # bytes of shared memory
_RESERVED = 1024  # bytes of it, of each block
_FOLDER = importlib.resources.files("jaxsplit") / "ops" / "attention"


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
      warps: of a block.
      row_tiles: of 16 queries each, of a warp.
      keys: that a block reads at a time.
      splits: of the keys.
    """

    warps: int
    row_tiles: int
    keys: int
    splits: int

    @property
    def rows(self) -> int:
        """Queries of a block: a row is one head at one time."""
        return 16 * self.warps * self.row_tiles

    def shared_bytes(self, head_dim: int, value_dim: int) -> int:
        """Of a block: `Shared` of cuda_flash.cu."""
        of_query, of_value = (2 * (-(-width // 16) * 16 + 8) for width in (head_dim, value_dim))
        kept = self.row_tiles == 1 and head_dim <= 128
        rows = (0 if kept else self.rows) + self.keys
        return rows * of_query + self.keys * of_value + 12 * self.keys + of_query

    @staticmethod
    def of(
        rows: int,
        keys: int,
        widths: tuple[int, int],
        heads: int,
        capability: float,
        *,
        converted: bool = False,
    ) -> "Tiling":
        """For all queries of a key head.

        Args:
          rows: their number.
          keys: most keys that there may be.
          widths: of a query and of a value.
          heads: key heads of all sequences together. If tiles and heads are few, blocks split the
            keys, too.
          capability: compute capability of the GPU.
          converted: keys and values are, in registers.
        """
        narrow, memory = max(widths) <= 128, 1024 * shared_kib(capability)
        # With twice the rows, a warp reads half as much from shared memory for each product.
        row_tiles = 2 if rows > 64 and narrow and memory > _ROOMY else 1
        warps = -(-rows // 16) if rows <= 64 else 4 if row_tiles == 2 or not narrow else 8
        tiling = Tiling(warps, row_tiles, 32 if row_tiles == 2 and converted else 64, 1)
        tiling = tiling._fitted(widths, memory)
        blocks = heads * -(-rows // tiling.rows)
        splits = min(_BUSY_WARPS // (warps * blocks), -(-keys // _SPLIT_KEYS), _MAX_SPLITS)
        return dataclasses.replace(tiling, splits=max(1, splits))

    def _fitted(self, widths: tuple[int, int], memory: int) -> "Tiling":
        """With fewer keys at a time where a multiprocessor with some bytes of shared memory would
        have fewer than eight warps; if it cannot have them, with as many warps as it can."""
        blocks, fewer = max(1, 8 // self.warps), [self]
        while fewer[-1].keys > 16:
            fewer.append(dataclasses.replace(self, keys=fewer[-1].keys // 2))
        while blocks > 1 and blocks * (fewer[-1].shared_bytes(*widths) + _RESERVED) > memory:
            blocks //= 2
        fit = (t for t in fewer if blocks * (t.shared_bytes(*widths) + _RESERVED) <= memory)
        return next(fit, fewer[-1])


def supports(
    queries: Array | jax.ShapeDtypeStruct, memory: AttentionCache, config: AttentionConfig
) -> bool:
    """Whether `flash_attention` supports queries `[batch, time, …]` and a memory."""
    if not supports_attend(queries, memory, config):
        return False
    widths = memory.keys.shape[-1], memory.own_values.shape[-1]
    least = _BFLOAT16 if queries.dtype == jnp.bfloat16 else MIN_CAPABILITY
    return all(width % 8 == 0 for width in widths) and current_context().policy.cuda >= least


def _candidates(
    queries: Array, kv: AttentionCache, positions: Array, **options: Any
) -> list[Tiling]:
    """For prompts: the keys of a few queries come from memory, whatever the tiling."""
    _, time, _, group, head_dim = queries.shape
    if time * group <= 64:
        return []
    widths = head_dim, kv.own_values.shape[-1]
    memory = 1024 * (shared_kib(current_context().policy.cuda) - 1)
    shapes = itertools.product((4, 8), (1, 2), (32, 64, 128))
    tilings = [Tiling(warps, tiles, keys, 1) for warps, tiles, keys in shapes]
    return [t for t in tilings if t.shared_bytes(*widths) <= memory]


def _filled(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The last queries of full pages."""
    queries, kv, positions = args
    pages, key_positions = (options.get(name) for name in ("pages", "key_positions"))
    length = kv.length * (1 if pages is None else pages.shape[1])
    time = positions.shape[1]
    positions = jnp.broadcast_to(length - time + jnp.arange(time), positions.shape)
    if pages is not None:
        options |= {"pages": jnp.arange(pages.size).reshape(pages.shape) % len(kv.keys)}
    if key_positions is not None:
        options |= {"key_positions": jnp.broadcast_to(jnp.arange(length), key_positions.shape)}
    return (queries, kv, positions.astype(jnp.int32)), options


@tunable(_candidates, _filled)
def flash_attention(
    queries: Array,
    kv: AttentionCache,
    positions: Array,
    *,
    config: AttentionConfig,
    key_positions: Array | None = None,
    sinks: Array | None = None,
    pages: Array | None = None,
    readers: Readers = XLA_ONLY,
    tiling: Tiling | None = None,
) -> Activations:
    """As `jaxsplit.ops.attention.api.attend`, for what is supported.

    Args:
      readers: of the result, which is in their layout if one of the kernels stores it.
      tiling: of the work; None: a tuned one, or `Tiling.of` it.
    """
    capability = current_context().policy.cuda
    value_dim = kv.own_values.shape[-1]
    if readers.xla or not cuda_rows.supports(readers) or value_dim % BLOCK:
        readers = XLA_ONLY
    options = {"key_positions": key_positions, "sinks": sinks, "pages": pages, "tiling": tiling}
    options |= {"config": config, "readers": readers}
    launch = launch_of(queries, kv, positions, capability, **options)
    results = cuda_call(launch, capability=capability)
    if launch.grid[2] > 1:
        launch = combine_launch_of(results, sinks, queries.dtype, readers)
        results = cuda_call(launch, capability=capability)
    elif not _stores(readers):
        readers = XLA_ONLY
    if readers == XLA_ONLY:
        return Activations(results[0])
    shape = (*positions.shape, math.prod(queries.shape[2:4]) * value_dim)
    stored = wrap_layouts(readers.layouts, results, positions.size, shape[-1])
    return Activations(jax.ShapeDtypeStruct(shape, queries.dtype), readers.layouts, stored)


def _stores(readers: Readers) -> bool:
    """Whether the kernel itself stores the layout of some readers."""
    return [type(layout) for layout in readers.layouts] == [SwizzledLayout]


def launch_of(
    queries: Array,
    kv: AttentionCache,
    positions: Array,
    capability: float,
    *,
    config: AttentionConfig,
    key_positions: Array | None = None,
    sinks: Array | None = None,
    pages: Array | None = None,
    readers: Readers = XLA_ONLY,
    tiling: Tiling | None = None,
) -> Launch:
    """The launch for a GPU of some compute capability, other arguments as of `flash_attention`. Of
    splits of the keys, the results are for `combine_launch_of`; their number is the grid's in z."""
    batch, time, heads, group, head_dim = queries.shape
    value_dim, page = kv.own_values.shape[-1], kv.length
    count = 1 if pages is None else pages.shape[1]
    widths, rows = (head_dim, value_dim), time * group
    asynchronous = capability >= _BFLOAT16 and queries.dtype == kv.keys.dtype
    of_gpu = {"capability": capability, "converted": not asynchronous}
    tiling = tiling or Tiling.of(rows, page * count, widths, heads * batch, **of_gpu)
    tiles, splits = -(-rows // tiling.rows), tiling.splits
    scale = head_dim**-0.5 if config.scale is None else config.scale
    numbers = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "GROUP": group,
        "TIME": time,
        "HEADS": heads,
        "PAGE": page,
        "PAGES": count,
        "WINDOW": config.window or 0,
        "POSITIONS": 0 if key_positions is None else 1 + (len(key_positions) > 1),
        "SINKS": int(sinks is not None),
        "SPLITS": splits,
        "WARPS": tiling.warps,
        "ROW_TILES": tiling.row_tiles,
        "KEYS": tiling.keys,
        "SWIZZLED": int(splits == 1 and _stores(readers)),
        "SCALE": float(scale),
        "SOFTCAP": float(config.softcap or 0),
    }
    types = f"typedef {cpp_type(queries.dtype)} X;\ntypedef {cpp_type(kv.keys.dtype)} Stored;\n"
    given, state = Arguments(), (splits, batch, time, heads, group)
    memory = given.operands(
        kv.keys, kv.own_values, kv.key_scale, kv.value_scale, pages, key_positions
    )
    body, out = f"  Memory memory = {memory};\n", "0"
    if splits > 1:
        sums = given.results(
            jax.ShapeDtypeStruct((*state, value_dim), jnp.float32),
            *[jax.ShapeDtypeStruct(state, jnp.float32)] * 2,
        )
        body += f"  Splits splits = {sums};\n"
    else:
        columns = heads * group * value_dim
        shapes = [jax.ShapeDtypeStruct((batch, time, columns), queries.dtype)]
        if _stores(readers):
            shapes = readers.layouts[0].shapes(batch * time, columns)
        out = given.result(*shapes)
        body += "  Splits splits = {0, 0, 0};\n"
    where = f"{given.operand(queries)}, {given.operand(positions)}"
    sinks_of = given.operand(None if sinks is None else sinks.astype(jnp.float32))
    body += f"  attend({where}, memory, {sinks_of}, splits, (X*){out});\n"
    return given.launch(
        "flash_attention",
        "#define ASYNC\n" if asynchronous else "",
        types,
        constants(numbers),
        cuda_rows.FOLDER / "cuda_swizzled.cuh",
        _FOLDER / "cuda_softmax.cuh",
        _FOLDER / "cuda_flash.cu",
        body=body,
        grid=(heads * batch, tiles, splits),
        threads=32 * tiling.warps,
        shared_bytes=tiling.shared_bytes(*widths),
    )


def combine_launch_of(
    splits: Sequence[Array], sinks: Array | None, dtype: jnp.dtype, readers: Readers = XLA_ONLY
) -> Launch:
    """The launch that combines splits of the keys.

    Args:
      splits: weighted values, float32 `[splits, batch, time, kv_heads, group, value_dim]`; the
        largest scores and the sums of weights, `[splits, batch, time, kv_heads, group]` each.
      sinks: float32 `[kv_heads * group]`, or None.
      dtype: of the rows `[batch, time, kv_heads * group * value_dim]`.
      readers: who reads them in a layout; `XLA_ONLY`: as an array.
    """
    count, batch, time, kv_heads, group, value_dim = splits[0].shape
    rows, heads = batch * time, kv_heads * group
    numbers = {
        "SPLITS": count,
        "ROWS": rows,
        "HEADS": heads,
        "VALUE_DIM": value_dim,
        "SINKS": int(sinks is not None),
        "THREADS": _COMBINE_THREADS,
    }
    given = Arguments()
    body = f"  Splits splits = {given.operands(*splits)};\n"
    sinks_of = given.operand(None if sinks is None else sinks.astype(jnp.float32))
    if readers == XLA_ONLY:
        shape = jax.ShapeDtypeStruct((batch, time, heads * value_dim), dtype)
        body += f"  Plain out = {{{given.result(shape)}}};\n"
    else:
        body += cuda_rows.declare_out(readers, given, rows, heads * value_dim)
    body += f"  combine(splits, {sinks_of}, out);\n"
    quads = rows * heads * value_dim // 4
    return given.launch(
        "combine_splits",
        *cuda_rows.FILES,
        f"typedef {cpp_type(dtype)} X;\n",
        constants(numbers),
        _FOLDER / "cuda_softmax.cuh",
        _FOLDER / "cuda_combine.cu",
        body=body,
        grid=(-(-quads // _COMBINE_THREADS), 1, 1),
        threads=_COMBINE_THREADS,
    )
