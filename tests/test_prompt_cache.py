"""Prefixes in the host's memory and on disk: what comes back is what was computed, on any mesh."""

import dataclasses
import functools
import gc
import itertools
import logging
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from adapter_files import random_factors, shapes_of, write_adapter
from helpers import FEW_LAYERS, SHAPES, quick_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny_model

import jaxsplit
from jaxsplit import llm
from jaxsplit.cache import disk
from jaxsplit.cache.disk import PrefixDirectory
from jaxsplit.cache.host import HostCache, HostCopy, Kept
from jaxsplit.config import LoadConfig
from jaxsplit.engine import (
    Engine,
    Request,
    RequestSpec,
    SamplingConfig,
    Scheduler,
    scheduler,
)
from jaxsplit.engine.identity import model_hash, prefix_root
from jaxsplit.engine.prefix_store import PrefixStore
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import open_gguf

CONTEXT, PAGE, VOCAB = 64, 8, 160
MODEL = b"m" * 32
ATOL = 1e-5
"""Of log-probabilities on the same mesh: chunks begin elsewhere."""

ROUNDING = 3e-4
"""Of those on another mesh: sums in float32 in another order."""

ROUNDED = 0.02
"""Of those over a cache of fewer bits, where the last bit of a key makes a difference."""

MESHES = {
    "none": {"split_mode": "none"},
    "graph:3": {"split_mode": "graph", "devices": 3},
    "stage:2,tensor:2": {"mesh": "stage:2,tensor:2"},
    "data:2,tensor:2": {"mesh": "data:2,tensor:2"},
}
PROMPT = np.random.default_rng(0).integers(0, VOCAB, 41).tolist()
OTHERS = np.random.default_rng(1).integers(0, VOCAB, (6, 56)).tolist()


def copy_of(size):
    return HostCopy([[[np.zeros(size, np.uint8)]]])


# The host's memory


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 30_000),
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.integers(0, 9000), st.booleans(), st.booleans()),
        max_size=40,
    ),
)
def test_memory_is_bounded_and_keeps_what_was_used_last(capacity, operations):
    cache, expected = HostCache(capacity), {}
    for name, size, state, use in operations:
        key = name.encode()
        if use:
            cache.use([key])
            if key in expected:
                expected[key] = expected.pop(key)
        else:
            part = {"state" if state else "page": copy_of(size)}
            cache.put(key, Kept(**part))
            joined = expected.get(key, {}) | part
            if Kept(**joined).nbytes <= capacity:  # else all stays as it is
                expected.pop(key, None)
                expected[key] = joined
            while sum(Kept(**kept).nbytes for kept in expected.values()) > capacity:
                del expected[next(iter(expected))]
        assert cache.nbytes == sum(Kept(**kept).nbytes for kept in expected.values()) <= capacity
        assert [k for k, _ in cache.items()] == [*expected][::-1]
        for k, kept in expected.items():
            assert cache.get(k) == Kept(**kept)


def test_of_a_prefix_the_first_pages_are_forgotten_last():
    cache = HostCache(10 * Kept(copy_of(100)).nbytes)
    for key in range(10):
        cache.put(bytes([key]), Kept(copy_of(100)))
    cache.use([bytes([key]) for key in (2, 5, 0)])
    cache.put(b"new", Kept(copy_of(800)))
    assert [k[0] for k, _ in cache.items()][:4] == [ord("n"), 2, 5, 0]
    cache.put(b"other", Kept(copy_of(7000)))
    assert [k for k, _ in cache.items()] == [b"other", b"new", b"\2"]


# Directories


ARRAYS = {"0.keys": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "1.keys": np.ones(5, "i1")}
SHAPES_OF_ARRAYS = {name: (x.shape, x.dtype) for name, x in ARRAYS.items()}


@pytest.fixture
def directory(tmp_path):
    return PrefixDirectory(tmp_path, MODEL, 2**20)


def key_of(number):
    return bytes([number]) * 32


def only_file(path):
    [found] = [p for p in path.rglob("*") if p.is_file()]
    return found


def test_arrays_come_back(directory, tmp_path):
    assert key_of(1) not in directory
    directory.write(key_of(1), ARRAYS)
    directory.write(key_of(2), {"0.keys": ARRAYS["0.keys"][0]}, state=True)
    assert key_of(1) in directory
    assert directory.has_state(key_of(2))
    assert key_of(2) not in directory
    for one in (directory, PrefixDirectory(tmp_path, MODEL, 2**20)):
        found = one.read(key_of(1), SHAPES_OF_ARRAYS)
        assert found.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    assert key_of(1) not in PrefixDirectory(tmp_path, b"other" * 8, 2**20)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def changed(content, name):
    if name == "empty":
        return b""
    if name == "truncated":
        return content[: len(content) // 2]
    if name == "one bit":
        at = content.index(ARRAYS["0.keys"].tobytes()) + 17
        return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
    return b"\x89PNG" + os.urandom(1000)


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit", "foreign"])
def test_damaged_files_are_ignored_and_removed(directory, tmp_path, damage, caplog):
    directory.write(key_of(1), ARRAYS)
    path = only_file(tmp_path)
    path.write_bytes(changed(path.read_bytes(), damage))
    with pytest.raises(LookupError):
        directory.read(key_of(1), SHAPES_OF_ARRAYS)
    [record] = caplog.records
    assert "damaged" in record.getMessage()
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()
    assert key_of(1) not in directory
    assert not path.exists()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_change_of_a_file_is_found(tmp_path_factory, data):
    """Of what it says, that is: zip has fields without meaning here, such as times."""
    path = tmp_path_factory.mktemp("changed")
    directory = PrefixDirectory(path, MODEL, 2**20)
    directory.write(key_of(1), ARRAYS)
    file = only_file(path)
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        found = directory.read(key_of(1), SHAPES_OF_ARRAYS)
    except LookupError:
        return
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_files_of_other_keys_and_shapes_are_ignored(directory, tmp_path, caplog):
    directory.write(key_of(1), ARRAYS)
    path = only_file(tmp_path)
    path.rename(path.with_name(key_of(2).hex() + ".page"))
    with pytest.raises(LookupError):
        directory.read(key_of(2), SHAPES_OF_ARRAYS)
    for name, shape in {"0.keys": (2, 3, 5), "2.keys": (1,)}.items():
        directory.write(key_of(1), ARRAYS)
        wanted = SHAPES_OF_ARRAYS | {name: (shape, np.dtype(np.float32))}
        with pytest.raises(LookupError):
            directory.read(key_of(1), wanted)
    assert len(caplog.records) == 3


def test_a_file_that_another_process_removed_is_no_damage(directory, tmp_path, caplog):
    directory.write(key_of(1), ARRAYS)
    only_file(tmp_path).unlink()
    with pytest.raises(LookupError):
        directory.read(key_of(1), SHAPES_OF_ARRAYS)
    assert not caplog.records


def files_of(path):
    return {p.name for p in path.rglob("*") if p.is_file()}


def test_a_directory_is_bounded_and_keeps_what_was_used_last(tmp_path):
    directory = PrefixDirectory(tmp_path, MODEL, 100_000)
    other = PrefixDirectory(tmp_path, b"other" * 8, 100_000)
    array, now = {"x": np.zeros(9000, np.uint8)}, time.time()
    for number in range(8):
        directory.write(key_of(number), array, used=now - 100 + number)
    directory.use([key_of(3), key_of(1)])
    for number in range(10, 14):
        other.write(key_of(number), array)
    for one in (directory, other):
        one.trim()
    total = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    assert total <= directory.capacity
    kept = {int(name[:2], 16) for name in files_of(tmp_path)}
    assert {1, 3, 7, 10, 11, 12, 13} <= kept
    assert not kept & {0, 2}
    assert directory.nbytes == other.nbytes == total
    assert [key_of(number) in directory for number in (0, 1, 3)] == [False, True, True]
    # Of a prefix, the first page is the last to go.
    pages = [tmp_path / MODEL.hex()[:32] / f"{key_of(number).hex()}.page" for number in (3, 1)]
    first, second = (page.stat().st_mtime for page in pages)
    assert first > second


def test_writing_keeps_the_bound(tmp_path):
    directory = PrefixDirectory(tmp_path, MODEL, 100_000)
    for number in range(100):
        directory.write(key_of(number), {"x": np.zeros(9000, np.uint8)})
        total = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
        assert total <= directory.capacity + 2 * 9500


def test_what_a_killed_process_left_is_removed_later(directory, tmp_path):
    directory.write(key_of(1), ARRAYS)
    folder = only_file(tmp_path).parent
    foreign = tmp_path / "notes.txt"
    for path in (folder / "new.tmp", folder / "old.tmp", foreign):
        path.write_bytes(b"x")
    os.utime(folder / "old.tmp", (0, 0))
    os.utime(foreign, (0, 0))
    PrefixDirectory(tmp_path, MODEL, 1)
    assert files_of(tmp_path) == {"new.tmp", "notes.txt"}


def test_a_full_disk_is_said_once(directory, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.os, "replace", full)
    for number in range(3):
        directory.write(key_of(number), ARRAYS)
        assert key_of(number) not in directory
    [record] = caplog.records
    assert "No space left on device" in record.getMessage()
    assert not files_of(directory.path)


def test_files_of_another_process_are_found(directory, tmp_path):
    PrefixDirectory(tmp_path, MODEL, 2**20).write(key_of(1), ARRAYS)
    directory.trim()
    assert key_of(1) in directory


# Options


@pytest.mark.parametrize("case", ["missing", "file", "read-only", "memory", "negative", "type"])
def test_wrong_options_are_one_line(recipe_gguf, tmp_path, case):
    (tmp_path / "file").touch()
    (tmp_path / "read-only").mkdir(mode=0o500)
    read_only = tmp_path / "read-only" if os.geteuid() else "/proc"  # root writes elsewhere
    options, expected = {
        "missing": ({"prompt_cache_dir": tmp_path / "a"}, "does not exist; make one with: mkdir"),
        "file": ({"prompt_cache_dir": tmp_path / "file"}, "is no directory"),
        "read-only": ({"prompt_cache_dir": read_only}, "cannot be written"),
        "memory": ({"cache_ram": 2**40}, "more than this machine's memory"),
        "negative": ({"cache_ram": -1}, "cache_ram"),
        "type": ({"prompt_cache_dir": 3}, "prompt_cache_dir is 3"),
    }[case]
    with pytest.raises(JaxsplitError, match=expected) as error:
        jaxsplit.load(recipe_gguf("llama"), **options)
    assert "\n" not in str(error.value)


def test_several_processes_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(llm.jax, "process_count", lambda: 2)
    for options in ({"cache_ram": 8}, {"prompt_cache_dir": tmp_path}):
        with pytest.raises(JaxsplitError, match=f"^{next(iter(options))} is not supported with"):
            llm._check_prefix_store(LoadConfig(**options))


# Hashes


def test_a_fine_tuned_model_of_the_same_header_is_another(recipe_gguf, tmp_path):
    original = recipe_gguf("llama")
    tuned, content = tmp_path / "tuned.gguf", bytearray(original.read_bytes())
    file = open_gguf(original)
    tensor = file.tensors["blk.1.ffn_down.weight"]
    at = content.index(tensor.blocks.tobytes())
    content[at + tensor.nbytes // 2] ^= 1
    tuned.write_bytes(content)
    hashes = [model_hash(open_gguf(path), a=1) for path in (original, original, tuned)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert model_hash(file, a=2) != hashes[0]
    assert model_hash(dataclasses.replace(file, metadata={}), a=1) != hashes[0]


def test_adapters_have_prefixes_of_their_own():
    adapters = [b"a" * 32, b"b" * 32]
    roots = [prefix_root(MODEL, adapters, scales) for scales in ((1, 0), (0, 1), (1, 1), (2, 0))]
    base = prefix_root(MODEL, (), ())
    assert len({*roots, base}) == 5
    assert prefix_root(MODEL, adapters, (0.0, 0)) == base
    assert prefix_root(MODEL, adapters[::-1], (0, 1)) == roots[0]
    assert prefix_root(b"n" * 32, (), ()) != base


# Engines


@pytest.fixture(scope="module")
def engine(load, recipe_gguf):
    """`engine(name or recipe, mesh, cache_dtype)`: with a small cache, made once."""

    @functools.lru_cache(maxsize=4)  # each program takes memory maps
    def make(name, mesh, cache_dtype):
        lm = load(
            recipe_gguf((SHAPES | FEW_LAYERS).get(name, name)), ctx_size=CONTEXT, **MESHES[mesh]
        )
        return Engine(
            lm.models,
            lm.engine.partition,
            context=CONTEXT,
            cache_dtype=np.dtype(cache_dtype),
            slots=2,
            cache_tokens=9 * PAGE,
            checkpoints=2,
            page=PAGE,
            vocab=VOCAB,
            chunks=(8, 32),
            policy=lm.engine.runners[0].policy,
        )

    return make


class Player:
    """Runs requests on an engine, whose sequences are dropped first."""

    def __init__(self, engine, **options):
        engine.reset()
        store = PrefixStore(engine, MODEL, **options) if options else None
        self.scheduler = Scheduler(engine, measures=False, store=store)
        self._numbers = itertools.count()

    def run(self, *prompts, count=8, **options):
        """Tokens cached, tokens and log-probabilities of the last prompt; all begin together."""
        requests = []
        for prompt in prompts:
            sampling = SamplingConfig(temperature=0.0, logprobs=0)
            spec = RequestSpec(prompt, sampling, max_tokens=count, **options)
            requests.append(Request(spec, next(self._numbers), lambda _: None))
            self.scheduler.add(requests[-1])
        for _ in range(2000):
            if self.scheduler.idle:
                break
            self.scheduler.step()
            self.scheduler.check_pages()
        assert self.scheduler.idle
        news = iter(requests[-1].next_now, None)
        logprobs = [x.logprob for one in news for x in one.logprobs]
        assert len(logprobs) == count
        return requests[-1].cached_tokens, requests[-1].tokens, logprobs

    def forget(self):
        """Other prompts take all pages, on each replica."""
        for one, other in zip(OTHERS[::2], OTHERS[1::2], strict=True):
            self.run(one, other)


def check(found, alone, atol=ATOL):
    assert found[1] == alone[1]
    np.testing.assert_allclose(found[2], alone[2], rtol=0, atol=atol)


SPLITS = [
    ("qwen3moe", {"mesh": "expert:2,tensor:2"}),
    ("llama", {"devices": 3, "tensor_split": "3,2,1"}),
    ("14-2", {"devices": 5}),
    ("lfm2", {"mesh": "data:2,stage:2,tensor:2"}),
]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "options"), SPLITS)
def test_any_split_has_the_same_arrays(load, recipe_gguf, name, options):
    """Random arrays go to the devices and come back, on each data replica and nowhere else."""
    path = recipe_gguf(SHAPES.get(name, name))
    made = load(path, cache_dtype="int8", slots=4, **options).engine
    alone = load(path, cache_dtype="int8", split_mode="none").engine
    rng = np.random.default_rng(4)
    for kind in ("page", "state"):
        host, one = (getattr(engine, f"host_{kind}s") for engine in (made, alone))
        assert host.shapes == one.shapes
        if not host.shapes:
            continue
        arrays = {n: (99 * rng.normal(size=s)).astype(t) for n, (s, t) in host.shapes.items()}
        copy = host.copy_of(arrays)
        assert copy.nbytes == host.nbytes
        for replica in range(made.partition.data):
            assert not any(x.any() for x in host.whole(made.save(replica, **{kind: 1})).values())
            made.restore(replica, copy, **{kind: 1})
            found = host.whole(made.save(replica, **{kind: 1}))
            assert found.keys() == arrays.keys()
            for key, array in arrays.items():
                np.testing.assert_array_equal(found[key], array, strict=True)
            assert not any(x.any() for x in host.whole(made.save(replica, **{kind: 0})).values())
    made.reset()


# Plain, windows, recurrent states of three kinds, latent attention, KV heads that do not divide.
PLACES = [
    ("llama", "none", "float32"),
    ("9-3", "graph:3", "float32"),
    ("gemma3", "stage:2,tensor:2", "int8"),
    ("qwen35", "data:2,tensor:2", "float32"),
    ("deepseek2", "graph:3", "float32"),
    *(
        pytest.param(*place, marks=pytest.mark.full)
        for place in (
            *(("llama", mesh, "float32") for mesh in [*MESHES][1:]),
            ("14-2", "graph:3", "int8"),
            ("gemma3", "none", "bfloat16"),
            ("lfm2", "graph:3", "float32"),
            ("granitehybrid", "none", "float32"),
        )
    ),
]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "mesh", "cache_dtype"), PLACES)
def test_what_was_forgotten_comes_back_from_memory(engine, name, mesh, cache_dtype):
    made = engine(name, mesh, cache_dtype)
    atol = ATOL if cache_dtype == "float32" else ROUNDED
    plain = Player(made)
    alone = plain.run(PROMPT)
    plain.forget()
    assert plain.run(PROMPT)[0] == 0  # nobody keeps it
    plain.forget()
    longer = [*PROMPT, *plain.run(OTHERS[0][:20], PROMPT)[1]]
    continued = plain.run(longer)  # over keys of decode steps beside another sequence

    player = Player(made, ram=2**24)
    check(player.run(PROMPT), alone)
    player.forget()
    assert player.scheduler.statistics.ram_bytes
    # Beside another one: on the other data replica, if there is one.
    found = player.run(OTHERS[0][:20], PROMPT)
    assert found[0] == 40
    assert player.scheduler.statistics.restored_tokens >= 40
    check(found, alone, atol)
    # What has come back is shared as if it had been computed.
    found = player.run(longer)
    assert found[0] >= 40
    check(found, continued, atol)
    assert found[1] == Player(made).run(longer)[1]


@pytest.mark.usefixtures("quick_compilation")
def test_memory_that_is_too_small_keeps_what_it_can(engine):
    made = engine("llama", "none", "float32")
    alone, size = Player(made).run(PROMPT), made.host_pages.nbytes
    player = Player(made, ram=4 * size)
    player.run(PROMPT)
    player.forget()
    assert 0 < player.scheduler.statistics.ram_bytes <= 4 * size
    check(player.run(PROMPT), alone)
    player = Player(made, ram=size // 2)
    player.run(PROMPT)
    player.forget()
    assert player.scheduler.statistics.ram_bytes == 0


@pytest.mark.usefixtures("quick_compilation")
def test_preempted_sequences_come_back(engine, monkeypatch):
    monkeypatch.setattr(scheduler, "_RESERVE", PAGE)
    made = engine("llama", "none", "float32")
    one, other = OTHERS[0][:20], OTHERS[1][:20]
    alone = Player(made).run(other, count=40)
    player = Player(made, ram=2**24)
    check(player.run(one, other, count=40), alone)
    assert player.scheduler.counters.preemptions
    assert player.scheduler.statistics.restored_tokens


TRIPS = [
    ("9-3", "graph:3", "data:2,tensor:2", "float32"),
    ("14-2", "none", "graph:3", "int8"),
    ("qwen35", "none", "stage:2,tensor:2", "float32"),
    *(
        pytest.param(*trip, marks=pytest.mark.full)
        for trip in (
            ("llama", "none", "graph:3", "float32"),
            ("gemma3", "data:2,tensor:2", "none", "bfloat16"),
            ("deepseek2", "stage:2,tensor:2", "graph:3", "float32"),
        )
    ),
]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "here", "there", "cache_dtype"), TRIPS)
def test_prefixes_go_to_another_mesh_through_a_directory(
    engine, tmp_path, name, here, there, cache_dtype, caplog
):
    player = Player(engine(name, here, cache_dtype), directory=opened(tmp_path))
    player.run(PROMPT)
    assert not files_of(tmp_path)  # it was used once
    player.scheduler.close()
    assert files_of(tmp_path)
    made = engine(name, there, cache_dtype)
    alone = Player(made).run(PROMPT)
    again = Player(made, directory=opened(tmp_path))
    found = again.run(OTHERS[0][:20], PROMPT)
    assert found[0] == 40
    assert again.scheduler.statistics.loaded_tokens == 40
    atol = ROUNDING if cache_dtype == "float32" else ROUNDED
    check(found, alone, atol)
    assert not caplog.records


def opened(path, model=MODEL, capacity=2**30):
    return PrefixDirectory(path, model, capacity)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(("name", "ram"), [("llama", 0), ("llama", 2**24), ("qwen35", 0)])
def test_a_prefix_is_saved_when_it_is_used_again(engine, tmp_path, name, ram):
    made = engine(name, "none", "float32")
    player = Player(made, directory=opened(tmp_path), ram=ram)
    player.run(PROMPT)
    if ram:
        player.forget()  # it comes back from memory
    player.run([*PROMPT[:40], 7, 8])
    player.scheduler._store._writers.wait()
    pages = [name for name in files_of(tmp_path) if name.endswith(".page")]
    assert len(pages) == 5  # 40 tokens
    assert (len(files_of(tmp_path)) > len(pages)) == (name == "qwen35")
    alone = Player(made).run(PROMPT)
    again = Player(made, directory=opened(tmp_path))
    found = again.run(PROMPT)
    assert found[0] == 40
    check(found, alone)


@pytest.mark.usefixtures("quick_compilation")
def test_damage_costs_time_only(engine, tmp_path, caplog):
    made = engine("llama", "none", "float32")
    player = Player(made, directory=opened(tmp_path))
    player.run(PROMPT)
    player.scheduler.close()
    alone = Player(made).run(PROMPT)
    files = [*(p for p in tmp_path.rglob("*.page"))]
    files.sort(key=lambda p: -p.stat().st_mtime)  # in the prefix's order
    files[2].write_bytes(b"")
    found = Player(made, directory=opened(tmp_path)).run(PROMPT)
    assert found[0] == 16
    check(found, alone)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.usefixtures("quick_compilation")
def test_another_model_finds_nothing(engine, tmp_path):
    made = engine("llama", "none", "float32")
    player = Player(made, directory=opened(tmp_path))
    player.run(PROMPT)
    player.scheduler.close()
    engine = made
    engine.reset()
    store = PrefixStore(engine, b"n" * 32, directory=opened(tmp_path, b"n" * 32))
    other = Player(engine)
    other.scheduler = Scheduler(engine, measures=False, store=store)
    assert other.run(PROMPT)[0] == 0


@pytest.mark.usefixtures("quick_compilation")
def test_a_cancelled_request_and_slow_disks(engine, tmp_path, monkeypatch):
    """A request whose prefix is being read lets others go first."""
    made = engine("llama", "none", "float32")
    player = Player(made, directory=opened(tmp_path))
    player.run(PROMPT)
    player.scheduler.close()
    again, read = Player(made, directory=opened(tmp_path)), PrefixDirectory.read
    order = []

    def slow(*args, **options):
        time.sleep(0.2)
        return read(*args, **options)

    monkeypatch.setattr(PrefixDirectory, "read", slow)
    requests = []
    for i, prompt in enumerate((PROMPT, PROMPT, OTHERS[0])):
        spec = RequestSpec(prompt, SamplingConfig(temperature=0.0), max_tokens=3)
        request = Request(spec, i, lambda _: None)
        request.listen(lambda i=i: order.append(i))
        requests.append(request)
        again.scheduler.add(request)
    again.scheduler.step()
    again.scheduler.cancel(0)
    while not again.scheduler.idle:
        again.scheduler.step()
        again.scheduler.check_pages()
    assert order[0] == 0
    assert order.index(2) < order.index(1)
    assert requests[1].cached_tokens == 40


@pytest.mark.usefixtures("quick_compilation")
def test_a_failure_forgets_what_may_not_have_arrived(engine):
    made = engine("llama", "none", "float32")
    alone = Player(made).run(PROMPT)
    player = Player(made, ram=2**24)
    player.run(PROMPT)
    player.forget()
    player.scheduler._recover([], RuntimeError("the devices failed"))
    assert player.scheduler.statistics.ram_bytes == 0
    check(player.run(PROMPT), alone)


# Models


def test_adapters_find_their_own_prefixes(tmp_path):
    """Whatever the names and the order in which they are loaded."""
    base = write_tiny_model(tmp_path / "base.gguf", embed=32, context=1024)
    shapes = {name: shape for name, shape in shapes_of(base).items() if "attn_k" in name}
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / f"{name}.gguf", random_factors(shapes, seed))
    folder = tmp_path / "prefixes"
    folder.mkdir()
    options = {"devices": 1, "ctx_size": 512, "slots": 2, "cache_tokens": 4096}
    options["prompt_cache_dir"] = folder
    prompt = np.random.default_rng(3).integers(0, VOCAB, 300).tolist()
    known = [{"a": 0.5}, {"a": 0.5, "b": 1.0}, {}]
    found = []
    for names, loaded in (("ab", ["a", "b"]), ("xy", ["b", "a"])):
        paths = [f"{name}={tmp_path / one}.gguf" for name, one in zip(names, loaded, strict=True)]
        name_of = dict(zip(loaded, names, strict=True))
        lm = jaxsplit.load(base, lora=paths, **options)
        for chosen in (*known, {"a": 0.25}, {"b": 0.5}):
            lora = {name_of[one]: scale for one, scale in chosen.items()}
            generation = lm.submit(prompt, 2, lora=lora, temperature=0.0)
            generation.result()
            request = generation.request
            found.append((chosen, request.cached_tokens, request.tokens))
            if chosen == {} and names == "ab":
                break
        thread = lm._thread._thread
        del lm, generation, request
        gc.collect()
        thread.join(60)
        assert not thread.is_alive()
    first, then = found[:3], found[3:]
    assert [cached for _, cached, _ in first] == [0] * 3
    assert [cached for _, cached, _ in then] == [256] * 3 + [0] * 2
    assert [tokens for *_, tokens in first] == [tokens for *_, tokens in then[:3]]
    assert len([*folder.iterdir()]) == 1


@pytest.mark.usefixtures("quick_compilation")
def test_a_model_saves_when_it_ends(recipe_gguf, tmp_path):
    """By `jaxsplit.load`, from one mesh to another, with pages of 256 tokens."""
    recipe = dict(SHAPES["6-1"], name="long")
    recipe["metadata"] = [
        [key, kinds, 2048 if key.endswith("context_length") else value]
        for key, kinds, value in recipe["metadata"]
    ]
    path = recipe_gguf(recipe)
    prompt = np.random.default_rng(2).integers(0, VOCAB, 540).tolist()
    options = {"dtype": "float32", "ctx_size": 1024, "slots": 2, "prompt_cache_dir": tmp_path}
    texts = []
    for mesh, cached in (
        ({"split_mode": "none"}, 0),
        ({"devices": 4, "cache_ram": 8}, 512),
        ({"mesh": "stage:2,tensor:2"}, 512),
        ({"split_mode": "none", "cache_dtype": "int8"}, 0),
    ):
        lm = jaxsplit.load(path, **options, **mesh)
        request = lm.submit(prompt, 8, temperature=0.0)
        request.result()
        texts.append(request.request.tokens)
        assert request.request.cached_tokens == cached
        thread = lm._thread._thread
        del lm, request
        gc.collect()
        thread.join(60)
        assert not thread.is_alive()
    assert texts[0] == texts[1] == texts[2]
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.usefixtures("quick_compilation")
def test_a_server_that_is_told_to_end_saves(tmp_path):
    """SIGTERM; and what one process calls a model, another one calls it, too."""
    path = write_tiny_model(tmp_path / "tiny.gguf", embed=32, context=1024)
    folder = tmp_path / "prefixes"
    folder.mkdir()
    command = [sys.executable, "-m", "jaxsplit", "serve", f"--model={path}", "--port=0"]
    options = {"ctx_size": 512, "slots": 1, "prompt_cache_dir": folder, "cache_ram": 1}
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = quick_environment() | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    root = Path(jaxsplit.__file__).parents[1]
    prompt = np.random.default_rng(5).integers(0, VOCAB, 300).tolist()
    with subprocess.Popen(
        command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            url = ""
            for line in process.stderr:
                url = line.split()[-1] if line.startswith("listening on ") else url
                if line.endswith("ready\n"):
                    break
            body = {"prompt": prompt, "n_predict": 4, "temperature": 0}
            content = httpx.post(f"{url}/completion", json=body, timeout=60).json()["content"]
            metrics = httpx.get(f"{url}/metrics").text
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert re.findall(r"^jaxsplit:(?:restored|loaded)_tokens_total (\S+)", metrics, re.M) == [
        "0.0",
        "0.0",
    ]
    lm = jaxsplit.load(path, devices=2, **options)
    generation = lm.submit(prompt, 4, temperature=0.0)
    assert generation.result().text == content
    assert generation.request.cached_tokens == lm.statistics.loaded_tokens == 256
