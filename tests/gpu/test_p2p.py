"""Kernels that write to the memory of other GPUs: many rounds of fresh data, all of it checked.

The rounds of a test are one program, in which each device arrives at every exchange at a time of
its own. What was left of an earlier round, half written, or not yet there is not what is expected
of this one.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu import internals
from gpu.internals import AXIS
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

ROUNDS = 12 if internals.INTERPRET else 4000
LAUNCHES = 3 if internals.INTERPRET else 300
LONGEST_DELAY = 50 if internals.INTERPRET else 40_000  # turns of 2 ns or so
LARGEST = 2**20
"""Elements of the largest two-shot all-reduce."""

COUNTS = [2, 3] if internals.INTERPRET else [2, 3, 4, 8]


class Owner:
    """Of memory that is freed with it."""


@pytest.fixture(params=COUNTS, ids=lambda count: f"{count} devices")
def mesh(request) -> Mesh:
    if len(jax.devices()) < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    return Mesh(np.asarray(jax.devices()[: request.param]), AXIS)


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def table(mesh, owner) -> Array:
    """Of the peers' memory."""
    table = internals.make_peers(mesh, owner, LARGEST)
    if table is None:
        pytest.skip("these GPUs cannot write to one another's memory")
    return table


def values(seed: Array, index: Array, device: Array | int, shape, dtype=jnp.float32) -> Array:
    """What a device contributes to a round, known to all: from -0.5 to 0.5.

    Made without rounding, so that each program that computes them finds the same bits; bfloat16
    values have so few that their sums are exact too.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), device)
    mantissa = jax.random.bits(key, shape) >> 9
    if dtype == jnp.bfloat16:
        mantissa &= 0x7F0000
    return (lax.bitcast_convert_type(mantissa | 0x3F800000, jnp.float32) - 1.5).astype(dtype)


def late(seed: Array, index: Array, device: Array, devices: int) -> Array:
    """The seed, on one device or none much later than on the others."""
    key = jax.random.fold_in(jax.random.key(seed + 1), index)
    chosen, turns = jax.random.randint(key, 2, 0, jnp.array([devices + 1, LONGEST_DELAY]))
    return internals.delayed(seed, jnp.where(chosen == device, turns, 0))


def bits(x: Array) -> Array:
    """As unsigned numbers of 32 bits."""
    kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return lax.bitcast_convert_type(x, kind).astype(jnp.uint32)


def checksum(x: Array) -> Array:
    """Depends on each bit and its place: uint32."""
    flat = bits(x).reshape(-1)
    return jnp.sum(flat * (2 * jnp.arange(flat.size, dtype=jnp.uint32) + 1))


def sum_in_order(parts: list[Array]) -> Array:
    """In float32, in the order of the devices."""
    total, *others = (part.astype(jnp.float32) for part in parts)
    for other in others:
        total += other
    return total


def equal(found: Array, expected: Array) -> Array:
    """In all bits."""
    return bits(found) == bits(expected)


# An exchange takes the seed, the seed after a delay, the round, the device, and the peers; it
# returns pairs of results and whether each of their elements is right.
Exchange = Callable[..., list[tuple[Array, Array]]]


def all_reduce(*shape: int) -> Exchange:
    def exchange(seed, arrived, index, me, peers):
        y = internals.one_shot_all_reduce(values(arrived, index, me, shape), peers)
        parts = [values(seed, index, device, shape) for device in range(peers.size)]
        return [(y, equal(y, sum_in_order(parts)))]

    return exchange


def all_gather(*shape: int) -> Exchange:
    def exchange(seed, arrived, index, me, peers):
        y = internals.one_shot_all_gather(values(arrived, index, me, shape), peers)
        parts = [values(seed, index, device, shape) for device in range(peers.size)]
        return [(y, equal(y, jnp.stack(parts)))]

    return exchange


def two_shot(*shape: int) -> Exchange:
    def exchange(seed, arrived, index, me, peers):
        y = internals.two_shot_all_reduce(values(arrived, index, me, shape, jnp.bfloat16), peers)
        parts = [values(seed, index, device, shape, jnp.bfloat16) for device in range(peers.size)]
        return [(y, equal(y, sum_in_order(parts).astype(y.dtype)))]

    return exchange


def matmul(kind: str, rows: int, *, fused: bool) -> Exchange:
    columns, dtype = 512, jnp.bfloat16
    rng = np.random.default_rng(0)
    if kind == "BF16":
        w = jnp.asarray(rng.normal(size=(1024, columns)), dtype)
    else:
        w = internals.quantized(rng, kind, 1024, columns)

    def exchange(seed, arrived, index, me, peers):
        x = values(arrived, index, me, (rows, columns), dtype)
        y = internals.matmul_all_reduce(x, w, peers, fused=fused)
        parts = [values(seed, index, d, (rows, columns), dtype) for d in range(peers.size)]
        total = sum_in_order([internals.matmul_here(part, w, peers) for part in parts])
        return [(y, equal(y, total))]

    return exchange


def several(*exchanges: Exchange) -> Exchange:
    """One after another, each of which leaves its mark in the memory that they share."""

    def exchange(seed, arrived, index, me, peers):
        return [
            pair
            for i, one in enumerate(exchanges)
            for pair in one(seed + i, arrived + i, index, me, peers)
        ]

    return exchange


EXCHANGES = {
    "one element": all_reduce(1),
    "one-shot": all_reduce(2, 4096),
    "one-shot, largest": all_reduce(2**16),
    "gather": all_gather(3, 200),
    "matmul Q8_0, receive": matmul("Q8_0", 1, fused=False),
    "matmul Q4_K, fused receive": matmul("Q4_K", 2, fused=True),
    "matmul BF16, receive": matmul("BF16", 1, fused=False),
    "two-shot": two_shot(3, 20_000),
    "two-shot, largest": two_shot(LARGEST),
    "all in turn": several(
        matmul("Q8_0", 1, fused=True),
        all_reduce(4096),
        two_shot(40, 4096),
        all_gather(200),
        matmul("Q4_K", 1, fused=False),
        two_shot(5, 4096),
    ),
}


def on_devices(local: Callable, mesh: Mesh, **options) -> Callable:
    """`local`, of each device's part of the arguments, as a compiled program."""
    spec = PartitionSpec(AXIS)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(sharded, **options)


@pytest.mark.parametrize(
    ("name", "in_graph"), [*((name, True) for name in EXCHANGES), ("all in turn", False)]
)
def test_every_round_is_right_and_equal_on_all_devices(mesh, table, rng, name, in_graph):
    exchange = EXCHANGES[name]

    def local(table, seed):
        me = lax.axis_index(AXIS)

        def one_round(index, carry):
            wrong, sums = carry
            arrived = late(seed[0], index, me, mesh.size)
            peers = internals.peers(table, LARGEST)
            found = exchange(seed[0], arrived, index, me, peers)
            wrong = wrong.at[0, index].set(sum(jnp.sum(~right) for _, right in found))
            return wrong, sums.at[0, index].set(sum(checksum(y) for y, _ in found))

        nothing = jnp.zeros((1, ROUNDS), jnp.int32), jnp.zeros((1, ROUNDS), jnp.uint32)
        return lax.fori_loop(0, ROUNDS, one_round, nothing)

    options = {"compiler_options": internals.loop_options()} if in_graph else {}
    seed = np.full(mesh.size, rng.integers(2**30), np.int32)
    wrong, sums = map(np.asarray, on_devices(local, mesh, **options)(table, seed))
    bad = np.argwhere(wrong)
    assert not len(bad), f"{len(bad)} of {wrong.size} wrong, first (device, round) {bad[0]}"
    assert (sums == sums[0]).all()
    assert len(np.unique(sums[0])) > 0.9 * ROUNDS  # data are fresh


@pytest.mark.parametrize("name", ["one-shot", "gather", "two-shot"])
def test_results_are_written_over_what_was_there(mesh, table, rng, name):
    """Each launch of a program is given the memory for its results, which holds no number."""
    exchange = EXCHANGES[name]

    def local(poison, table, seed, index):
        me = lax.axis_index(AXIS)
        arrived = late(seed[0], index[0], me, mesh.size)
        peers = internals.peers(table, LARGEST)
        [(y, right)] = exchange(seed[0], arrived, index[0], me, peers)
        return y[None], jnp.sum(~right)[None]

    seed = np.full(mesh.size, rng.integers(2**30), np.int32)
    like = jax.eval_shape(on_devices(local, mesh), None, table, seed, seed)[0]
    run = on_devices(local, mesh, donate_argnums=0, keep_unused=True)
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(AXIS))
    poison = jax.jit(lambda: jnp.full(like.shape, jnp.nan, like.dtype), out_shardings=sharding)
    for index in range(LAUNCHES):
        y, wrong = run(poison(), table, seed, np.full(mesh.size, index, np.int32))
        assert not np.asarray(wrong).any(), index
        y = np.asarray(y)
        assert (y.view(np.uint8) == y[:1].view(np.uint8)).all(), index


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("words", [3, 9000])
def test_messages_go_around_the_ring(owner, rng, count, words):
    """From the first device through all others, which add one, on two channels at once."""
    if len(jax.devices()) < count:
        pytest.skip(f"needs {count} GPUs")
    devices, channels = jax.devices()[:count], 2
    tables = internals.ring_tables(devices, channels, words, owner)
    if tables is None:
        pytest.skip("these GPUs cannot write to one another's memory")

    def message(seed: Array, index: Array, channel: int) -> Array:
        return bits(values(seed, index, channel, (words,)))

    def stage(table: Array, seed: Array, *, place: int) -> Array:
        def one_round(index, carry):
            wrong, ring = carry
            arrived = late(seed, index, place, count)
            if place == 0:
                for channel in range(channels):
                    ring = ring.send(message(arrived, index, channel), channel)
            errors = 0
            for channel in range(channels):
                received, ring = ring.receive(words, channel)
                right = message(seed, index, channel) + ((place or count) - 1)
                errors += jnp.sum(received != right)
                if place:
                    received += (arrived - seed).astype(jnp.uint32)
                    ring = ring.send(received + 1, channel)
            return wrong.at[index].set(errors), ring.next_round()

        return lax.fori_loop(
            0, ROUNDS, one_round, (jnp.zeros(ROUNDS, jnp.int32), internals.ring(table))
        )[0]

    seed = np.int32(rng.integers(2**30))
    arguments = [
        (jax.device_put(table), jax.device_put(seed, device))
        for table, device in zip(tables, devices, strict=True)
    ]
    programs = [
        jax.jit(
            lambda *a, place=place: stage(*a, place=place),
            compiler_options=internals.loop_options(),
        )
        .lower(*args)
        .compile()
        for place, args in enumerate(arguments)
    ]
    # A program whose loop the host runs returns when it has ended, which others wait for.
    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(lambda run, args: np.asarray(run(*args)), programs, arguments))
    for place, wrong in enumerate(found):
        assert not wrong.any(), (place, np.flatnonzero(wrong)[0])
