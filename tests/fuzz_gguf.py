"""Mutated GGUF files: each loads, or is refused in one line, soon and in little memory.

  python tests/fuzz_gguf.py --count=10000 --seed=1

Tiny files of ten architectures are damaged in their bytes, keys, tensors and weights. Each is
opened, its config and the sources of its parameters are made, its tokenizer and chat template
tried, and it is planned on two devices; a share of the files that pass is loaded, for a few logits.
`--only=INDEX` repeats one file. Exit status: 0, or 1 if there are faults.
"""

import argparse
import collections
import copy
import dataclasses
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np

SECONDS = 10
LOAD_SECONDS = 60  # more: programs are compiled
MEMORY = 2 * 10**9

KINDS = gguf.GGUFValueType
PACKED = {
    KINDS.UINT8: "B",
    KINDS.INT8: "b",
    KINDS.UINT16: "H",
    KINDS.INT16: "h",
    KINDS.UINT32: "I",
    KINDS.INT32: "i",
    KINDS.FLOAT32: "f",
    KINDS.UINT64: "Q",
    KINDS.INT64: "q",
    KINDS.FLOAT64: "d",
    KINDS.BOOL: "?",
}
RECIPES = (
    *("llama", "gemma4", "qwen35moe", "deepseek2", "gpt-oss", "phi3-longrope", "granitehybrid"),
    *("bloom", "llama4", "tiny", "ik"),
)
NUMBERS = (0, 1, 2, 3, 7, 31, 64, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63)
SIGNED = (*NUMBERS, -1, -(2**31), -(2**63))
FLOATS = (0.0, -1.0, 1.0, 1e-45, 1e-6, 0.5, 1e4, 3e38, float("inf"), float("-inf"), float("nan"))
NUMBERS_OF_TYPES = [*map(int, gguf.GGMLQuantizationType), 36, 133, *range(137, 159), 219, 339, 399]
STRINGS = (
    *(b"", b"llama", b"gpt2", b"mamba", b"\n\r\x1b", b"\xff\xfe", b"a" * 10000, b"linear", b"yarn"),
    *(b"{{ messages", b"{{ 1 / 0 }}", b"{% for x in range(10**9) %}{% endfor %}", b"\0"),
)


@dataclasses.dataclass
class File:
    """The parts of a GGUF file.

    Attributes:
      keys: key, type, type of the items or None, value; strings are bytes.
      tensors: name, dimensions (fastest first), type, offset.
      data: bytes of the tensors.
    """

    keys: list[list[Any]]
    tensors: list[list[Any]]
    data: bytearray
    version: int = 3
    counts: tuple[int, int] | None = None

    def pack(self) -> bytes:
        """The file's bytes."""
        counts = self.counts or (len(self.tensors), len(self.keys))
        parts = [b"GGUF", struct.pack("<IQQ", self.version, *counts)]
        for key, kind, item, value in self.keys:
            parts += [_string(key), struct.pack("<I", kind)]
            if kind == KINDS.ARRAY:
                parts += [struct.pack("<IQ", item, len(value))]
                parts += [_packed(item, v) for v in value]
            else:
                parts += [_packed(kind, value)]
        for name, dims, kind, offset in self.tensors:
            parts += [_string(name), struct.pack(f"<I{len(dims)}Q", len(dims), *dims)]
            parts += [struct.pack("<IQ", kind, offset)]
        head = b"".join(parts)
        return head + bytes(-len(head) % 32) + self.data


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _packed(kind: int, value: Any) -> bytes:
    if kind == KINDS.STRING:
        return _string(value if isinstance(value, bytes) else str(value).encode())
    code = PACKED.get(kind, "I")
    if isinstance(value, bytes):
        value = len(value)
    if code in "fd":
        try:
            return struct.pack(f"<{code}", value)
        except OverflowError:
            return struct.pack(f"<{code}", float("inf"))
    if code == "?":
        return struct.pack("<?", bool(value))
    size = 8 * struct.calcsize(code)
    value = int(value) if np.isfinite(value) else 0
    return (value % 2**size).to_bytes(size // 8, "little")


def read(path: Path) -> File:
    """The parts of a file that is whole."""
    reader = gguf.GGUFReader(path)
    keys = []
    for name, field in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value = field.contents()
        item = field.types[-1] if field.types[0] == KINDS.ARRAY else None
        if (item or field.types[0]) == KINDS.STRING:
            value = [v.encode() for v in value] if item else value.encode()
        keys.append([name.encode(), field.types[0], item, value])
    tensors = [
        [t.name.encode(), t.shape.tolist(), int(t.tensor_type), t.data_offset - reader.data_offset]
        for t in reader.tensors
    ]
    return File(keys, tensors, bytearray(reader.data[reader.data_offset :].tobytes()))


class Mutator:
    """Damages a file; remembers how."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.done: list[str] = []

    def pick(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def __call__(self, file: File) -> bytes:
        file = copy.deepcopy(file)
        ways = [self.key] * 6 + [self.tensor] * 4 + [self.count, self.weights]
        for _ in range(int(self.rng.integers(1, 3))):
            self.pick(ways)(file)
        content = bytearray(file.pack())
        header = max(len(content) - len(file.data), 1)
        if not self.done or self.rng.random() < 0.15:
            self.pick([self.bits, self.bits, self.number, self.cut])(content, header)
        return bytes(content)

    def key(self, file: File) -> None:
        if not file.keys:
            return
        index = int(self.rng.integers(len(file.keys)))
        entry = file.keys[index]
        key, kind, item, value = entry
        way = self.pick(["value"] * 6 + ["remove", "twice", "rename", "type", "array", "retype"])
        if way == "remove":
            del file.keys[index]
        elif way == "twice":
            file.keys.insert(int(self.rng.integers(len(file.keys))), list(entry))
        elif way == "rename":
            entry[0] = self.pick([key[:-1], key + b"x", key.upper(), b"", self.pick(file.keys)[0]])
        elif way == "type":  # the bytes of one type under the name of another
            entry[1] = self.pick([*KINDS, 13, 77, 2**31])
            if entry[1] == KINDS.ARRAY and not isinstance(value, list):
                entry[2:] = [kind, [value]]
            elif entry[1] != KINDS.ARRAY and isinstance(value, list):
                entry[3] = value[0] if value else 0
        elif way == "array":
            if isinstance(value, list):
                entry[1:] = [item, None, value[0] if value else 0]
            else:
                entry[1:] = [KINDS.ARRAY, kind, [value] * self.pick([0, 1, 2, 3, 1000])]
        elif way == "retype":
            new = self.pick([*PACKED, KINDS.STRING])
            if isinstance(value, list):
                entry[2:] = [new, [self.value(new) for _ in value[:2000]]]
            else:
                entry[1:] = [new, None, self.value(new)]
        elif isinstance(value, list):
            length = self.pick([0, 1, len(value) // 2, max(len(value) - 1, 0), len(value) + 1])
            value = (value * 2)[:length]
            if value and self.rng.random() < 0.5:
                value[int(self.rng.integers(len(value)))] = self.value(item)
            entry[3] = value
        else:
            near = []
            if isinstance(value, int | float):
                near = [value + 1, value - 1, value * 2, value // 2, -value]
            entry[3] = self.pick([self.value(kind), self.value(kind), *near])
        self.done.append(f"key {key!r} {way}: {str(file.keys[index:][:1])[:120]}")

    def value(self, kind: int) -> Any:
        if kind == KINDS.STRING:
            return self.pick(STRINGS)
        return self.pick(FLOATS if kind in (KINDS.FLOAT32, KINDS.FLOAT64) else SIGNED)

    def tensor(self, file: File) -> None:
        if not file.tensors:
            return
        index = int(self.rng.integers(len(file.tensors)))
        entry = file.tensors[index]
        name, dims = entry[:2]
        way = self.pick(["remove", "twice", "rename", "swap", "dims", "count", "type", "offset"])
        if way == "remove":
            del file.tensors[index]
        elif way == "twice":
            copied = list(entry)
            copied[0] = self.pick([name, b"blk.9." + name, self.pick(file.tensors)[0]])
            file.tensors.append(copied)
        elif way == "rename":
            other = name.replace(b"blk.0", b"blk.1")
            entry[0] = self.pick([name[:-1], other, b"", name + b"\n", b"v." + name])
        elif way == "swap":
            other = self.pick(file.tensors)
            entry[1], other[1] = other[1], entry[1]
        elif way == "dims" and dims:
            place = int(self.rng.integers(len(dims)))
            size = dims[place]
            entry[1] = list(dims)
            entry[1][place] = self.pick([size + 1, size - 1, size // 2, size * 2, *NUMBERS])
        elif way == "count":
            entry[1] = self.pick([[], dims[:1], dims[::-1], [*dims, 1], [1, *dims], dims * 3])
        elif way == "type":
            entry[2] = self.pick([*range(8), *NUMBERS_OF_TYPES, 99, 142, 2**31])
        else:
            entry[3] = self.pick([0, 32, 1, entry[3] + 32, entry[3] + 1, *NUMBERS])
        self.done.append(f"tensor {name!r} {way}: {str(file.tensors[index:][:1])[:120]}")

    def count(self, file: File) -> None:
        counts = [len(file.tensors), len(file.keys)]
        place = int(self.rng.integers(2))
        counts[place] = self.pick([counts[place] + 1, counts[place] - 1, *NUMBERS]) % 2**64
        file.counts = tuple(counts)
        file.version = self.pick([3, 3, 2, 1, 4, 0, 2**31])
        self.done.append(f"version {file.version}, counts {counts}")

    def weights(self, file: File) -> None:
        values = np.frombuffer(file.data, np.float32)
        count = int(self.rng.integers(1, 50))
        values[self.rng.integers(len(values), size=count)] = self.pick(FLOATS)
        self.done.append(f"{count} weights")

    def bits(self, content: bytearray, header: int) -> None:
        places = self.rng.integers(4, header, int(self.rng.integers(1, 4)))
        for place in places.tolist():
            content[place] ^= 1 << int(self.rng.integers(8))
        self.done.append(f"bits at {places.tolist()}")

    def number(self, content: bytearray, header: int) -> None:
        place, size = int(self.rng.integers(4, header)), self.pick([4, 8])
        number = self.pick(NUMBERS) % 2 ** (8 * size)
        content[place : place + size] = number.to_bytes(size, "little")
        self.done.append(f"{number} at {place}")

    def cut(self, content: bytearray, header: int) -> None:
        place = int(self.rng.integers(0, self.pick([header, len(content)])))
        del content[place:]
        self.done.append(f"cut at {place}")


def bases(folder: Path) -> dict[str, File]:
    """The files that are damaged, of an architecture each."""
    from helpers import recipe, write_recipe
    from tiny import write_tiny_model

    found = {}
    for name in RECIPES:
        path = folder / f"{name}.gguf"
        if name == "ik":
            found[name] = in_types_of_ik(found["tiny"])
            continue
        write_tiny_model(path) if name == "tiny" else write_recipe(recipe(name), path)
        found[name] = read(path)
        path.unlink()
    return found


def in_types_of_ik(file: File) -> File:
    """A model whose matrices have ik_llama.cpp's types with headers and interleaved rows.

    Rows of 64 and 96 weights allow few of them; scales of rows are random bytes, too.
    """
    from jaxsplit.formats import STORED_TYPES

    file, rng = copy.deepcopy(file), np.random.default_rng(0)
    kinds = ("Q8_KV", "Q6_0", "IQ1_S_R4", "IQ1_M_R4", "Q5_0_R4", "Q8_KV_R8", "Q6_0_R4")
    data = bytearray()
    for i, entry in enumerate(file.tensors):
        name, dims, kind, offset = entry
        stored = STORED_TYPES[kinds[i % len(kinds)]]
        shape = dims[::-1]
        if len(dims) == 2 and not stored.misfit(shape):
            kind, content = stored.number, rng.integers(0, 60, stored.nbytes(shape), np.uint8)
        else:
            content = file.data[offset:][: 4 * int(np.prod(dims))]
        entry[2:] = [kind, len(data)]
        data += bytes(content)
        data += bytes(-len(data) % 32)
    return File(file.keys, file.tensors, data, file.version)


def mutate(files: dict[str, File], seed: int, index: int) -> tuple[str, bytes, list[str], float]:
    """One file: the base's name, its bytes, what was done, and a number in [0, 1) that decides how
    far it goes."""
    rng = np.random.default_rng([seed, index])
    name, mutator = RECIPES[index % len(RECIPES)], Mutator(rng)
    content = mutator(files[name])
    return name, content, mutator.done, float(rng.random())


class TooLong(BaseException):
    """Raised by the alarm; no `except Exception` hides it."""


def _alarm(*_: Any) -> None:
    raise TooLong("time is up")


def use(path: Path, depth: float, load: float) -> str:
    """Opens a file and uses it; returns how far it came."""
    import jax
    import jax.numpy as jnp

    import jaxsplit
    from jaxsplit.architectures import model_config
    from jaxsplit.errors import JaxsplitError
    from jaxsplit.formats import open_gguf
    from jaxsplit.plan import device_kind, make_plan
    from jaxsplit.text import ChatTemplate, Tokenizer
    from jaxsplit.weights import parameter_sources

    file = open_gguf(path)
    config = model_config(file, 64)
    sources = parameter_sources(file, config)
    for text in (Tokenizer, ChatTemplate):
        try:
            made = text.from_metadata(file.metadata)
            if text is Tokenizer:
                made.decode(made.encode("Hello, wörld 42"))
            else:
                made.render([{"role": "user", "content": "Hello"}])
        except JaxsplitError as error:
            assert "\n" not in str(error)
    if depth < max(load, 0.1):
        options = {"dtype": jnp.dtype(jnp.float32), "context": 64}
        make_plan(sources, config, "graph", {"tensor": 2}, [device_kind("CPU")] * 2, **options)
    if depth >= load:
        return "accepted"
    signal.setitimer(signal.ITIMER_REAL, LOAD_SECONDS)
    lm = jaxsplit.load(path, devices=1, dtype="float32", ctx_size=64)
    lm.logits([1, 2, 3])
    del lm
    jax.clear_caches()
    return "loaded"


def judge(path: Path, depth: float, load: float) -> tuple[str, str]:
    """The outcome of a file: `loaded`, `accepted`, `refused` or `FAULT`, and a line on it."""
    from jaxsplit.errors import JaxsplitError

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            outcome, line = use(path, depth, load), ""
        except JaxsplitError as error:
            outcome, line = "refused", str(error)
        except (Exception, TooLong) as error:
            outcome, line = "FAULT", f"{type(error).__name__} at {_place(error)}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    if outcome == "refused" and ("\n" in line or len(line) > 20_000):
        return "FAULT", f"not one line: {line!r}"
    if warned and outcome != "FAULT":
        first = warned[0]
        where = f"{Path(first.filename).name}:{first.lineno}"
        return "FAULT", f"{first.category.__name__} at {where}: {first.message}"
    return outcome, line


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "jaxsplit" in frame.filename] or list(frames)
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno} {ours[-1].name}"


def work(connection: Any, seed: int, load: float) -> None:
    """What the worker process does: judges files by their index, in little memory."""
    signal.signal(signal.SIGALRM, _alarm)
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        files = bases(Path(folder))
        path = Path(folder) / "mutated.gguf"
        path.write_bytes(files["llama"].pack())
        use(path, 0.0, 1.0)  # imports, and starts what runs in the background
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        connection.send(None)
        while (index := connection.recv()) is not None:
            _, content, _, depth = mutate(files, seed, index)
            path.write_bytes(content)
            connection.send(judge(path, depth, load))


class Worker:
    """A process that judges files, and is started again when one of them ends it."""

    def __init__(self, seed: int, load: float):
        self.arguments = seed, load
        self.process = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, *self.arguments), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join()
            self.process = None

    def judge(self, index: int) -> tuple[str, str]:
        if self.process is None:
            self.start()
        self.connection.send(index)
        try:
            if self.connection.poll(2 * (SECONDS + LOAD_SECONDS)):
                return self.connection.recv()
            reason = "hangs"
        except EOFError:
            self.process.join()
            reason = f"the process ended with status {self.process.exitcode}"
        self.stop()
        return "FAULT", reason


def run(count: int, seed: int, load: float = 0.1, only: int | None = None) -> collections.Counter:
    """Judges files; prints faults, each kind once, and returns how many there are of each outcome.

    Args:
      count: files.
      seed: of the mutations.
      load: share of the files that are loaded, if they are accepted.
      only: judge this one alone.
    """
    counts, kinds = collections.Counter(), collections.Counter()
    worker, started = Worker(seed, load), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        files = bases(Path(folder))
    try:
        for index in range(count) if only is None else [only]:
            outcome, line = worker.judge(index)
            counts[outcome] += 1
            kind = line.partition(": ")[0]
            if outcome == "FAULT":
                kinds[kind] += 1
            if only is not None or (outcome == "FAULT" and kinds[kind] == 1):
                name, _, done, _ = mutate(files, seed, index)
                print(f"{outcome} --seed={seed} --only={index} ({name}): {line[:300]}")
                print(f"    {'; '.join(done)}", flush=True)
            if index % 1000 == 999:
                worker.stop()  # compiled programs take memory
                rate = (index + 1) / (time.perf_counter() - started)
                print(f"{index + 1} files, {rate:.0f}/s: {dict(counts)}", flush=True)
    finally:
        worker.stop()
    for kind, times in kinds.most_common():
        print(f"{times:6d} x {kind}")
    print(dict(counts))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=float, default=0.1)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    counts = run(options.count, options.seed, options.load, options.only)
    sys.exit(1 if counts["FAULT"] else 0)


if __name__ == "__main__":
    main()
