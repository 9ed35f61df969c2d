"""Linear attention whose state forgets each key dimension at its own rate, in chunks."""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_CHUNK = 16  # tokens that are computed in parallel: pairs of them have a decay for each dimension
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def dplr_attention(
    queries: Array,
    keys: Array,
    values: Array,
    *,
    log_decay: Array,
    state: Array | None,
    removal: tuple[Array, Array] | None = None,
    bonus: Array | None = None,
) -> tuple[Array, Array]:
    """Linear attention with a state that decays by key dimension.

    For each token, with state S, query q, key k, value v and decay a:

        S = diag(a) S + k v^T                 RWKV-6 (Peng et al. 2024, arXiv:2404.05892)
        S = diag(a) S + b (c^T S) + k v^T     with removal (b, c): diagonal plus low rank, as in
                                              KDA (Kimi Team 2025, arXiv:2510.26692) and RWKV-7
                                              (Peng et al. 2025, arXiv:2503.14456)
        y = S^T q, or of the state before the token plus (q . (bonus k)) v

    `c^T S` is of the state before the token. All tokens of a chunk are computed in parallel; their
    `c^T S` solve a lower triangular system. Decays appear only from earlier to later tokens, so
    that no exponential is above 1.

    Args:
      queries, keys: float32 `[batch, time, heads, key_dim]`.
      values: float32 `[batch, time, heads, value_dim]`.
      log_decay: float32 `[batch, time, heads, key_dim]`, at most 0.
      state: float32 `[batch, heads, key_dim, value_dim]`; None: zeros.
      removal: b and c, shaped as keys; None: nothing is removed.
      bonus: float32 `[heads, key_dim]`; None: queries read the state after their token.

    Returns:
      float32 `[batch, time, heads, value_dim]`, and the state after the last token.
    """
    batch, time, heads, _ = keys.shape
    size = min(time, _CHUNK)

    def chunked(x: Array) -> Array:
        """`[batch, time, heads, width]` to `[chunks, batch, heads, size, width]`."""
        x = jnp.pad(x, [(0, 0), (0, -time % size), (0, 0), (0, 0)])
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), (1, 3), (0, 2))

    if state is None:
        state = jnp.zeros((batch, heads, keys.shape[-1], values.shape[-1]))
    q, k, v, g = (chunked(x) for x in (queries, keys, values, log_decay))
    total = jnp.cumsum(g, axis=-2)
    until_end = jnp.exp(total[..., -1:, :] - total)
    causal = np.tri(size, dtype=bool)
    before = np.tri(size, k=-1, dtype=bool)

    def products(x: Array, y: Array, since: Array, mask: np.ndarray) -> Array:
        """`sum over d of x_i y_j exp(since_i - total_j)` for pairs in a mask."""
        decay = since[..., :, None, :] - total[..., None, :, :]
        decay = jnp.exp(jnp.where(mask[..., None], decay, -jnp.inf))
        return (x[..., :, None, :] * y[..., None, :, :] * decay).sum(axis=-1)

    since, mask = (total, causal) if bonus is None else (total - g, before)
    scores = products(q, k, since, mask)
    if bonus is not None:
        own = (q * k * bonus[:, None]).sum(axis=-1)
        scores = scores + own[..., None] * jnp.eye(size)
    removals = None
    if removal is not None:
        b, c = (k if x is keys else chunked(x) for x in removal)
        overlaps = products(c, b, total - g, before)
        inverse = jnp.broadcast_to(jnp.eye(size), overlaps.shape)
        if size > 1:
            inverse = lax.linalg.triangular_solve(
                -overlaps, inverse, left_side=True, lower=True, unit_diagonal=True
            )
        known = overlaps if b is k else products(c, k, total - g, before)
        removals = _Removals(
            inverse,
            _einsum("nbhij,nbhjk->nbhik", inverse, known),
            c * jnp.exp(total - g),
            scores if b is k else products(q, b, since, mask),
            b * until_end,
        )
    chunks = _Chunk(
        q * jnp.exp(since), k * until_end, v, scores, jnp.exp(total[..., -1, :]), removals
    )
    state, y = lax.scan(_chunk_step, state, chunks)
    y = jnp.moveaxis(y, (0, 2), (1, 3)).reshape(batch, -1, heads, values.shape[-1])
    return y[:, :time], state


class _Removals(NamedTuple):
    """What a chunk's tokens remove from the state, stacked over chunks.

    Attributes:
      inverse: of the triangular system, `[..., size, size]`.
      known: inverse times the products of c and keys, `[..., size, size]`.
      readers: c, decayed since the start of the chunk, `[..., size, key_dim]`.
      scores: products of queries and b, `[..., size, size]`.
      writers: b, decayed to the end of the chunk, `[..., size, key_dim]`.
    """

    inverse: Array
    known: Array
    readers: Array
    scores: Array
    writers: Array


class _Chunk(NamedTuple):
    """The operands of a chunk, `[batch, heads, ...]`, stacked over chunks for `lax.scan`.

    Attributes:
      queries: decayed since the start of the chunk, `[..., size, key_dim]`.
      keys: decayed to its end, `[..., size, key_dim]`.
      values: `[..., size, value_dim]`.
      scores: `[..., size, size]`.
      decay: of the whole chunk, `[..., key_dim]`.
      removals: what is removed from the state; None: nothing.
    """

    queries: Array
    keys: Array
    values: Array
    scores: Array
    decay: Array
    removals: _Removals | None


def _chunk_step(state: Array, chunk: _Chunk) -> tuple[Array, Array]:
    """Reads from the state and from the chunk, and updates the state."""
    y = _einsum("bhid,bhde->bhie", chunk.queries, state)
    y = y + _einsum("bhij,bhje->bhie", chunk.scores, chunk.values)
    new = chunk.decay[..., None] * state + _einsum("bhid,bhie->bhde", chunk.keys, chunk.values)
    if (r := chunk.removals) is not None:
        read = _einsum("bhid,bhde->bhie", r.readers, state)
        removed = _einsum("bhij,bhje->bhie", r.inverse, read)
        removed = removed + _einsum("bhij,bhje->bhie", r.known, chunk.values)
        y = y + _einsum("bhij,bhje->bhie", r.scores, removed)
        new = new + _einsum("bhid,bhie->bhde", r.writers, removed)
    return new, y
