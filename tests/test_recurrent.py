"""Mixers with a state: the recurrences, what a cache remembers, and their parts on devices."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import nmse, quick_jit
from tiny import fresh_rng

from jaxsplit.cache.layers import Batch, init_cache
from jaxsplit.engine.runner import CacheSize, StageRunner
from jaxsplit.engine.steps import PrefillChunk, Rows
from jaxsplit.models import (
    AttentionConfig,
    BlockConfig,
    ChannelMixConfig,
    Decoder,
    DeltaNetConfig,
    GateConfig,
    KDAConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    RWKV6Config,
    RWKV7Config,
    ShortConvConfig,
)
from jaxsplit.models.dplr import dplr_attention
from jaxsplit.models.modules import MODULES
from jaxsplit.ops.activations.layout import Activations
from jaxsplit.plan.cost import trace_decode
from jaxsplit.sharding import grouped_heads, make_partition
from jaxsplit.weights import abstract_decoder, parameters

EMBED = 24
NORM = NormConfig("rms", 1e-3)
SIZES = {"value_dim": 6, "key_dim": 5, "kernel_size": 4, "norm": NORM}
MIXERS = {
    "delta net": DeltaNetConfig(value_heads=6, key_heads=2, epsilon=1e-3, **SIZES),
    "mamba 2": Mamba2Config(value_heads=6, key_heads=1, conv_bias=True, **SIZES),
    "mamba 2, groups": Mamba2Config(value_heads=6, key_heads=2, **SIZES),
    "short convolution": ShortConvConfig(EMBED, kernel_size=3),
}
RECURRENCES = [*MIXERS]
"""Those that `expected` computes in float64."""
MIXERS |= {
    "kimi delta attention": KDAConfig(4, 6, 4, NORM, 1e-3, decay_rank=3),
    "kimi delta attention, bounded": KDAConfig(4, 6, 3, NORM, 1e-3, gate_rank=3, lower_bound=-5.0),
    "lightning attention": LightningConfig(4, 6, 0.7, NORM),
    "mamba": MambaConfig(10, 5, 3, 4, 10, norm=NORM, conv_bias=True),
    "mamba, heads": MambaConfig(12, 5, 3, 4, 4, scalar_decay=True),
    "rwkv 6": RWKV6Config(4, 4, 6, 3, 5),
    "rwkv 6, shared keys": RWKV6Config(4, 2, 6, 3, 5, bonus=False, bias=True),
    "rwkv 7": RWKV7Config(4, 6, 3, 4, 2, gate_rank=5, norm=True, first=True),
    "channel mix": ChannelMixConfig(EMBED, 40, gated=True),
}
TILED = DeltaNetConfig(value_heads=6, key_heads=3, tiled=True, **SIZES)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def rng():
    return fresh_rng()


def randomize(module, rng):
    """Gives parameters that begin as constants other values; states forget slowly or fast."""
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        value = param.get_value()
        if path[-1] == "A":
            param.set_value(jnp.asarray(-rng.uniform(0.01, 2, value.shape), jnp.float32))
        elif value.ndim == 1:
            param.set_value(value + jnp.asarray(rng.normal(size=value.shape), jnp.float32) / 3)
    return module


def make(name, rng):
    config = MIXERS[name]
    module = MODULES[type(config)](config, EMBED, rngs=nnx.Rngs(int(rng.integers(2**31))))
    return randomize(module, rng), config


@functools.partial(quick_jit, static_argnums=0)
def _run(graph, state, x, positions, cache, slots):
    y, cache = nnx.merge(graph, state)(Activations(x), Batch(positions, slots), cache)
    return y.local_sum, cache


def run(module, x, positions=None, cache=None, slots=None):
    if positions is None:
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    slots = None if slots is None else np.asarray(slots)
    y, cache = _run(*nnx.split(module), x, np.asarray(positions), cache, slots)
    return np.asarray(y), cache


def empty(config, slots):
    """A cache in which something has been left."""
    arrays = init_cache([config.cache(0, jnp.float32)], slots)[0]
    return jax.tree.map(lambda a: a + 7, arrays)


# The recurrences, token by token


def silu(x):
    return x / (1 + np.exp(-x))


def convolve(x, kernel, bias=None):
    """`[time, channels]` and `[channels, width]`: each output sees the last inputs."""
    y, width = np.zeros_like(x), kernel.shape[1]
    for t in range(len(x)):
        for i in range(width):
            if t - i >= 0:
                y[t] += kernel[:, width - 1 - i] * x[t - i]
    return y if bias is None else y + bias


def expected(module, config, x):
    """What a mixer makes of one sequence `[time, embed]`, in float64."""
    found = nnx.to_flat_state(nnx.state(module, nnx.Param))
    p = {".".join(map(str, path)): np.float64(param.get_value()) for path, param in found}

    def project(name):
        return x @ p[f"{name}.kernel"].T

    if isinstance(config, ShortConvConfig):
        y = convolve(project("in_gate") * project("value"), p["conv.kernel"])
        return (project("out_gate") * y) @ p["out.kernel"].T
    c, mixed = config, []
    for name in ("query", "key", "value"):
        y = convolve(project(name), p[f"{name}.conv.kernel"], p.get(f"{name}.conv.bias"))
        mixed.append(silu(y))
    group, delta = c.value_heads // c.key_heads, isinstance(c, DeltaNetConfig)
    steps = np.log1p(np.exp(project("dt") + p["dt_bias"]))
    gate = silu(project("gate"))
    rows = []
    states = np.zeros((c.value_heads, c.value_dim, c.key_dim))
    for t in range(len(x)):
        queries, keys, values = (y[t] for y in mixed)
        heads = []
        for h in range(c.value_heads):
            k = h // group
            q, k = (y.reshape(c.key_heads, c.key_dim)[k] for y in (queries, keys))
            v = values.reshape(c.value_heads, c.value_dim)[h]
            state = states[h] * np.exp(steps[t, h] * p["A"][h])
            if delta:
                q, k = (y / np.sqrt(y @ y + c.epsilon) for y in (q, k))
                strength = 1 / (1 + np.exp(-project("beta")[t, h]))
                state = state + strength * np.outer(v - state @ k, k)
                y = state @ (q / np.sqrt(c.key_dim))
            else:
                state = state + steps[t, h] * np.outer(v, k)
                y = state @ q + p["D"][h] * v
            states[h] = state
            heads.append(y)
        z = gate[t].reshape(c.value_heads, c.value_dim)
        y = np.stack(heads)
        if delta:
            y = y / np.sqrt((y**2).mean(axis=1, keepdims=True) + c.norm.epsilon)
            y = y * p["norm.scale"] * z
        else:
            y = (y * z).reshape(c.key_heads, -1)
            if c.norm:
                y = y / np.sqrt((y**2).mean(axis=1, keepdims=True) + c.norm.epsilon)
                y = y * p["norm.scale"].reshape(y.shape)
        rows.append(y.reshape(-1))
    return np.stack(rows) @ p["out.kernel"].T


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_mixer_computes_its_recurrence(rng, name):
    module, config = make(name, rng)
    x = rng.normal(size=(2, 70, EMBED)).astype(np.float32)
    y, cache = run(module, x)
    assert cache is None
    for row, one in zip(y, x, strict=True):
        assert nmse(row, expected(module, config, one)) < 1e-10


def test_keys_that_repeat_are_written_as_often():
    """Where all keys are alike and nothing is forgotten, chunks need care in float32."""
    x = np.ones((1, 130, EMBED), np.float32)
    module, config = make("delta net", np.random.default_rng(0))
    module.A.set_value(jnp.zeros_like(module.A.get_value()))
    module.dt_bias.set_value(jnp.full_like(module.dt_bias.get_value(), 9.0))
    y, _ = run(module, x)
    assert nmse(y[0], expected(module, config, x[0])) < 1e-9


@pytest.mark.parametrize("removes", [False, True])
@pytest.mark.parametrize("bonus", [False, True])
def test_states_that_decay_by_dimension(rng, removes, bonus):
    """Against float64, token by token; some decays are so fast that float32 has no number for
    them."""
    shape = 2, 50, 3, 5
    q, k, b, c = (rng.normal(size=shape) / 2 for _ in range(4))
    v, u = rng.normal(size=(2, 50, 3, 4)), rng.normal(size=(3, 5))
    g = -3 * rng.exponential(size=shape)
    g[0, 3] = -200
    state, rows = rng.normal(size=(2, 3, 5, 4)), []
    start = state
    for t in range(50):
        write = np.einsum("bhd,bhe->bhde", k[:, t], v[:, t])
        removed = np.einsum("bhd,bhf,bhfe->bhde", b[:, t], c[:, t], state) if removes else 0
        read = state + u[..., None] * write if bonus else 0
        state = np.exp(g[:, t])[..., None] * state + removed + write
        rows.append(np.einsum("bhd,bhde->bhe", q[:, t], read if bonus else state))
    arrays = (np.float32(x) for x in (q, k, v, g, start, b, c, u))
    q, k, v, g, start, b, c, u = arrays
    options = {"removal": (b, c) if removes else None, "bonus": u if bonus else None}
    y, last = dplr_attention(q, k, v, log_decay=g, state=start, **options)
    assert nmse(y, np.stack(rows, axis=1)) < 1e-11
    assert nmse(last, state) < 1e-11


# What is remembered


@pytest.mark.parametrize("name", MIXERS)
def test_chunks_and_single_tokens_compute_what_the_whole_does(rng, name):
    module, config = make(name, rng)
    x = rng.normal(size=(1, 90, EMBED)).astype(np.float32)
    whole, _ = run(module, x)
    steps = np.arange(96)
    for lengths in ([90], [70, 20], [1, 2, 87]):
        cache, start = empty(config, 3), 0
        for length in lengths:
            read = x[:, np.minimum(start + steps, 89)]
            positions = np.where(steps < length, start + steps, -1)
            y, cache = run(module, read, positions[None], cache, [1])
            assert nmse(y[0, :length], whole[0, start : start + length]) < 1e-10, lengths
            start += length
        untouched = jax.tree.map(lambda a: bool((a[::2] == 7).all()), cache)
        assert all(jax.tree.leaves(untouched))
    cache = empty(config, 1)
    for t in range(12):
        y, cache = run(module, x[:, t : t + 1], [[t]], cache)
        assert nmse(y[0, 0], whole[0, t]) < 1e-10


@pytest.mark.parametrize("name", MIXERS)
def test_slots_begin_wait_and_begin_again(rng, name):
    """Three slots: one reads on, one has nothing to do, one begins another text."""
    module, config = make(name, rng)
    x = rng.normal(size=(3, 6, EMBED)).astype(np.float32)
    whole, _ = run(module, x)
    again, _ = run(module, x[:, ::-1])
    _, cache = run(module, x, [[0, 1, 2, 3, 4, -1]] * 3, empty(config, 3))
    y, later = run(module, x[:, 5:], [[5], [-1], [0]], cache)
    assert nmse(y[0], whole[0, 5:]) < 1e-10
    assert nmse(y[2], again[2, :1]) < 1e-10
    for before, after in zip(jax.tree.leaves(cache), jax.tree.leaves(later), strict=True):
        assert np.array_equal(before[1], after[1])
    y, _ = run(module, x[:, 5:], [[-1], [5], [-1]], later)
    assert nmse(y[1], whole[1, 5:]) < 1e-10


# On devices


def hybrid(*mixers):
    """A model of these mixers and one attention with a gate."""
    rope = RopeConfig(8)
    attention = AttentionConfig(6, 2, 8, 8, rope, query_norm=NORM, key_norm=NORM, gate=GateConfig())
    blocks = tuple(BlockConfig(mixer, MLPConfig(40)) for mixer in (*mixers, attention))
    return ModelConfig("hybrid", 33, EMBED, 256, blocks)


def place(value, axes, stage):
    """A parameter as the devices of a stage hold it together."""
    for dim, axis in enumerate(axes):
        layout = stage.layout(axis, value.shape[dim])
        if layout is not None:
            index = layout.elements()
            value = np.take(value, np.maximum(index, 0), axis=dim)
            value[(slice(None),) * dim + (index < 0,)] = 0
    return jax.device_put(value, jax.NamedSharding(stage.mesh, stage.spec(axes)))


def logits(config, values, mode, devices, tokens):
    """Logits of a prompt, then of single tokens."""
    mesh = {"tensor": devices}
    (stage,) = make_partition(config, mode, mesh, jax.devices()[:devices]).stages
    model = abstract_decoder(config)
    for path, param in parameters(model).items():
        param.set_value(place(values[path], param.axes, stage))
    runner = StageRunner(model, stage, CacheSize.of_slots(64, 1), jnp.float32)
    cache, found, start = runner.empty_cache(), [], 0
    zero = np.zeros(1, np.int32)
    rows = Rows(zero, zero, zero[None])
    for length in (9, *[1] * (len(tokens) - 9)):
        inputs = np.asarray([tokens[start : start + length]], np.int32)
        chunk = PrefillChunk(*(np.asarray([n], np.int32) for n in (start, length)), rows)
        program = runner.prefill(1, length, "logits")
        cache, y = program(runner.params, cache, inputs, chunk, None)
        found.append(np.asarray(y)[0, :, : config.vocab])
        start += length
    return np.concatenate(found)


@pytest.fixture(scope="module")
def whole():
    """A model's config and parameters, tokens, and their logits on one device."""
    rng = fresh_rng()
    config = hybrid(*(MIXERS[name] for name in RECURRENCES))
    model = randomize(Decoder(config, rngs=nnx.Rngs(int(rng.integers(2**31)))), rng)
    values = {path: np.array(param.get_value()) for path, param in parameters(model).items()}
    tokens = rng.integers(0, config.vocab, 12)
    return config, values, tokens, logits(config, values, "none", 1, tokens)


@pytest.mark.parametrize(("mode", "devices"), [("graph", 2), ("graph", 3)])
def test_devices_share_the_heads(whole, mode, devices):
    config, values, tokens, expected = whole
    assert nmse(logits(config, values, mode, devices, tokens), expected) < 1e-9


def test_heads_are_tiled_in_the_file_only(rng):
    """Value head h of 6 with key head h % 3: on a device they are h // 2."""
    tiled, grouped = hybrid(TILED), hybrid(dataclasses.replace(TILED, tiled=False))
    model = randomize(Decoder(grouped, rngs=nnx.Rngs(int(rng.integers(2**31)))), rng)
    order = np.arange(6).reshape(3, 2).T.reshape(-1)  # the group's order, as the file has it
    values, in_file = {}, {}
    for path, param in parameters(model).items():
        values[path] = in_file[path] = np.array(param.get_value())
        for dim, axis in enumerate(param.axes):
            if path.startswith("blocks.0.mixer") and axis.name.startswith("heads"):
                units = np.split(values[path], 6, axis=dim)
                in_file[path] = np.concatenate([units[h] for h in order], axis=dim)
    tokens = rng.integers(0, 33, 12)
    expected = logits(grouped, values, "none", 1, tokens)
    for mode, devices in (("none", 1), ("graph", 3), ("row", 2)):
        assert nmse(logits(tiled, in_file, mode, devices, tokens), expected) < 1e-10


def test_tiled_heads_lie_beside_what_they_share():
    """In K-quants, two heads of 128 that share a block of 256 go to different places."""
    for heads, kv_heads, devices in [(32, 16, 1), (32, 16, 4), (48, 16, 3), (6, 3, 2), (6, 2, 4)]:
        query, kv = grouped_heads(heads, kv_heads, 128, devices, tiled=True)
        assert sorted(query.units[query.units >= 0]) == list(range(heads))
        served = np.repeat(kv.units, len(query.units) // len(kv.units))
        used = query.units >= 0
        assert np.array_equal(query.units[used] % kv_heads, served[used])
        sub_block, block, index = query.sub_blocks(256)
        assert sub_block == 128
        assert np.array_equal(block[used] * 2 + index[used], query.units[used])


def test_collectives_of_a_decode_step():
    """Two for each layer, and one for a norm over heads on several devices."""
    config = hybrid(*(MIXERS[name] for name in RECURRENCES))
    (stage,) = make_partition(config, "graph", {"tensor": 3}, None).stages
    work = trace_decode(config, stage, jnp.float32, 64, 1)
    assert work.collectives == Counter({"all-reduce": 2 * config.layers + 2 + 1, "all-gather": 1})
