"""Attention, rotary embeddings and the cache, by kernels, against float64 NumPy.

Tolerances are NMSE of each sequence; queries, keys and results are bfloat16, whose rounding is
about 3e-6 of normal numbers each time, and that of 8-bit keys 1e-5.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import internals
from gpu.internals import Attention
from helpers import nmse

ATTENDED = 2e-5
WRITTEN = {"bfloat16": 1e-5, "int8": 1e-4}
DECODED = {"bfloat16": 5e-5, "int8": 3e-4}
"""Attention to keys that are rounded after they were computed."""

LENGTH = 700 if internals.INTERPRET else 5000
"""Keys that a cache keeps, enough for several splits."""

LAYERS = {
    "plain": Attention(6, 2, 64, rope_dim=64),
    "wide, multi-query": Attention(8, 1, 128, rope_dim=128),
    "interleaved, soft-cap": Attention(6, 2, 32, rope_dim=16, interleaved=True, softcap=3.0),
    "window": Attention(6, 2, 64, rope_dim=8, window=130),
    "norms, sinks": Attention(8, 2, 64, rope_dim=64, norms=True, sinks=True),
}
CACHES = ["bfloat16", "int8"]
BACKENDS = [
    "Triton",
    pytest.param(
        "CUDA C++", marks=pytest.mark.skipif(internals.INTERPRET, reason="compiles for a GPU")
    ),
]


def attend(layer: Attention, queries, keys, values, positions, key_positions, sinks) -> np.ndarray:
    """Softmax attention in float64.

    Args:
      queries: `[batch, time, heads, width]`.
      keys, values: `[batch, kv_heads, keys, width]`.
      positions: `[batch, time]`.
      key_positions: `[batch, keys]`, negative where there is no key.
      sinks: `[heads]` or None.

    Returns:
      `[batch, time, heads * width]`.
    """
    group = layer.heads // layer.kv_heads
    keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
    scores = np.einsum("bthd,bhsd->bhts", queries, keys) * layer.width**-0.5
    if layer.softcap is not None:
        scores = layer.softcap * np.tanh(scores / layer.softcap)
    distance = positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & (key_positions[:, None] >= 0)
    if layer.window is not None:
        seen &= distance < layer.window
    weights = np.exp(scores) * seen[:, None]
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks)[:, None, None]
    weights /= np.maximum(total, 1e-300)  # padding sees no key
    y = np.einsum("bhts,bhsd->bthd", weights, values)
    return y.reshape(*y.shape[:2], -1)


def turned(layer: Attention, x: np.ndarray, positions: np.ndarray, scale=None) -> np.ndarray:
    """Heads `[batch, time, heads * width]`, normalized where there is a scale, and turned by their
    positions: `[batch, time, heads, width]`."""
    x = x.reshape(*x.shape[:2], -1, layer.width)
    if scale is not None:
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + internals.NORM_EPSILON) * scale
    half = layer.rope_dim // 2
    angles = positions[:, :, None, None] * 10000.0 ** (-np.arange(half) / half)
    i = np.arange(half)
    first, second = (2 * i, 2 * i + 1) if layer.interleaved else (i, i + half)
    a, b, y = x[..., first], x[..., second], x.copy()
    y[..., first] = a * np.cos(angles) - b * np.sin(angles)
    y[..., second] = a * np.sin(angles) + b * np.cos(angles)
    return y


def written(cache: np.ndarray, new: np.ndarray, positions, slots) -> np.ndarray:
    """A cache `[slots, kv_heads, length, width]` with tokens `[batch, time, kv_heads, width]` that
    exist, each at its position."""
    cache = cache.copy()
    for row, slot in enumerate(slots):
        for time, position in enumerate(positions[row]):
            if position >= 0:
                cache[slot, :, position % cache.shape[2]] = new[row, time]
    return cache


class Inputs:
    """Random inputs of a layer.

    Attributes:
      query, key, value: bfloat16 `[terms, batch, time, heads * width]`.
      cache: of five slots.
      slots: of the sequences.
      scales, sinks: float32, or None.
    """

    def __init__(self, rng, layer: Attention, batch: int, time: int, kept: str, terms: int = 1):
        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.normal(size=shape), jnp.bfloat16)

        length = layer.window or LENGTH
        self.query, self.key, self.value = (
            normal(terms, batch, time, heads * layer.width)
            for heads in (layer.heads, layer.kv_heads, layer.kv_heads)
        )
        self.cache = internals.cache_of(
            *(normal(5, length, layer.kv_heads, layer.width) for _ in range(2)), kept
        )
        self.slots = np.int32(rng.permutation(5)[:batch])
        scale = np.float32(rng.uniform(0.5, 2, (2, layer.width)))
        self.scales = tuple(scale) if layer.norms else (None, None)
        self.sinks = np.float32(rng.normal(size=layer.heads)) if layer.sinks else None

    def exact(self, layer: Attention, positions: np.ndarray) -> tuple[np.ndarray, ...]:
        """In float64: queries and keys, turned, values, and both caches with them written."""
        query, key, value = (
            np.float64(x.astype(jnp.float32)).sum(axis=0)
            for x in (self.query, self.key, self.value)
        )
        queries = turned(layer, query, positions, self.scales[0])
        keys = turned(layer, key, positions, self.scales[1])
        values = value.reshape(*value.shape[:2], -1, layer.width)
        caches = [
            written(old, new, positions, self.slots)
            for old, new in zip(internals.cache_contents(self.cache), (keys, values), strict=True)
        ]
        return queries, *caches


def positions_of_places(last: np.ndarray, length: int) -> np.ndarray:
    """The position whose key is at each place of a cache, given the last: `[batch, length]`."""
    return last[:, None] - (last[:, None] - np.arange(length)) % length


@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_reads_those_before_it_and_itself(rng, bounded, name, kept):
    """The first of a text, some with few and many before them, and padding."""
    layer = LAYERS[name]
    inputs = Inputs(rng, layer, batch=4, time=1, kept=kept, terms=2)
    length = layer.window or LENGTH
    last = 3 * length if layer.window else length - 1
    positions = np.array([[0], [5], [last], [-1]], np.int32)
    run = jax.jit(internals.decode_attention, static_argnums=0)
    y, cache = run(
        layer,
        *(inputs.query, inputs.key, inputs.value, positions, inputs.slots, inputs.cache),
        inputs.scales,
        inputs.sinks,
    )
    queries, keys, values = inputs.exact(layer, positions)
    places = positions_of_places(positions[:, 0], length)
    mine = (x[inputs.slots] for x in (keys, values))
    expected = attend(layer, queries, *mine, positions, places, inputs.sinks)
    y = np.float64(y.astype(jnp.float32))
    error = max(nmse(y[row], expected[row]) for row in range(3))
    ok = [bounded(f"{name}, {kept}", "decode", error, DECODED[kept])]
    for mode, found, exact in zip(
        ("keys", "values"), internals.cache_contents(cache), (keys, values), strict=True
    ):
        # All but the new places are as they were.
        changed = np.zeros(found.shape[:3], bool)
        changed[inputs.slots[:3], :, positions[:3, 0] % length] = True
        assert (found[~changed] == exact[~changed]).all()
        error = nmse(found[changed], exact[changed])
        ok.append(bounded(f"{name}, {kept}", mode, error, WRITTEN[kept]))
    assert all(ok)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("time", [1, 15, 70])
@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if not layer.window])
def test_heads_are_turned_and_put_into_the_cache(rng, bounded, name, time, kept, backend):
    layer = LAYERS[name]
    inputs = Inputs(rng, layer, batch=2, time=time, kept=kept)
    positions = np.int32([[0], [300]] + np.arange(time))
    positions[1, max(1, time - 4) :] = -1  # padding
    run = jax.jit(internals.rope_cache_update, static_argnums=(0, 1))
    queries, cache = run(
        *(backend, layer),
        *(inputs.query[0], inputs.key[0], inputs.value[0]),
        *(positions, inputs.slots, inputs.cache, inputs.scales),
    )
    expected, *caches = inputs.exact(layer, positions)
    exists = positions >= 0
    error = nmse(np.float64(queries.astype(jnp.float32))[exists], expected[exists])
    case = f"{name}, {kept}, {time}" + (f", {backend}" if backend != "Triton" else "")
    ok = [bounded(case, "queries", error, WRITTEN["bfloat16"])]
    for mode, found, exact, old in zip(
        ("keys", "values"),
        internals.cache_contents(cache),
        caches,
        internals.cache_contents(inputs.cache),
        strict=True,
    ):
        new = (exact != old).any(axis=-1)
        assert new.sum() == exists.sum() * layer.kv_heads
        assert (found[~new] == exact[~new]).all()
        error = nmse(found[new], exact[new])
        ok.append(bounded(case, mode, error, WRITTEN[kept]))
    assert all(ok)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("time", [1, 15, 70, 300])
@pytest.mark.parametrize("name", [*LAYERS, "odd widths", "widest", "places in any order"])
def test_queries_read_a_cache(rng, bounded, name, time, kept, backend):
    layer = LAYERS.get(name, LAYERS["window"])
    if name == "odd widths":
        layer = dataclasses.replace(layer, width=24, window=None)
    if name == "widest":
        layer = Attention(4, 2, 256, rope_dim=8)
    inputs = Inputs(rng, dataclasses.replace(layer, window=None), 2, time, kept)
    positions = np.int32([[40], [340]] + np.arange(time))
    places = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    if name == "places in any order":
        places = np.int32([rng.permutation(LENGTH) for _ in range(2)])
        places[rng.random(places.shape) < 0.2] = -1
    queries = inputs.query[0].reshape(2, time, layer.kv_heads, -1, layer.width)
    run = jax.jit(internals.flash_attention, static_argnums=(0, 1))
    y = run(
        *(backend, layer),
        *(queries, inputs.cache, positions),
        places if name == "places in any order" else None,
        inputs.sinks,
        inputs.slots,
    )
    keys, values = (x[inputs.slots] for x in internals.cache_contents(inputs.cache))
    queries = np.float64(queries.astype(jnp.float32)).reshape(2, time, layer.heads, layer.width)
    expected = attend(layer, queries, keys, values, positions, places, inputs.sinks)
    y = np.float64(y.astype(jnp.float32))
    error = max(nmse(y[row], expected[row]) for row in range(2))
    case = f"{name}, {kept}" + (f", {backend}" if backend != "Triton" else "")
    assert bounded(case, f"{time} queries", error, ATTENDED)
