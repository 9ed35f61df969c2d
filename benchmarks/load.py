"""Load time of a file, beside the limits of its storage and the bus.

  python benchmarks/load.py --model=FILE.gguf [--devices=N] [--weights=quantized]

Prints the time to read the file (which leaves it in the page cache), the rate of a copy from host
memory to a device, and the time and host memory of a load.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import jaxsplit
from jaxsplit.bench import record
from jaxsplit.bench.random_model import model_and_type
from jaxsplit.cli import options
from jaxsplit.cli.program import run

_MODEL = flags.DEFINE_string("model", None, "GGUF file", required=True)
_DEVICES = flags.DEFINE_integer("devices", None, "use only the first N devices")
_WEIGHTS = flags.DEFINE_string("weights", "quantized", "as in jaxsplit generate")
_JSON_DIR = options.define_json_dir()
_REPEAT = flags.DEFINE_integer("repeat", 2, "how often to load; programs are compiled in the first")


def _host_memory() -> float:
    """Memory of this process without mapped files, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = ("RssAnon", "RssShmem")
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields)) / 1e3


def _read_seconds(path: Path) -> float:
    buffer = bytearray(2**26)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def _upload_rate() -> float:
    """Bytes per second from pageable host memory to one device."""
    host = np.random.default_rng(0).integers(0, 255, 2**28, dtype=np.uint8)
    jax.block_until_ready(jax.device_put(host))
    start = time.perf_counter()
    jax.block_until_ready(jax.device_put(host))
    return host.nbytes / (time.perf_counter() - start)


def _records(
    lm: jaxsplit.LM, model: Mapping[str, Any], loads: Sequence[tuple[float, float]], limit: float
) -> list[dict[str, Any]]:
    """Rows of the record: the first load and later ones, in seconds and MB of host memory."""
    fields = {**model, "mode": "graph"}
    if _WEIGHTS.value != "quantized":
        fields["options"] = {"weights": _WEIGHTS.value}
    rows = []
    for metric, some in (("load, first", loads[:1]), ("load, again", loads[1:])):
        if some:
            times, memory = zip(*some, strict=True)
            make = functools.partial(record.make_row, lm.mesh.shape, **fields)
            rows += [make(metric, times, "s", limit=limit)]
            rows += [make(f"{metric}: host memory", memory, "MB")]
    return rows


def main(_: list[str]) -> None:
    """Measures."""
    path = Path(_MODEL.value)
    size = path.stat().st_size
    device = jax.devices()[0]
    read = _read_seconds(path)
    read = min(read, _read_seconds(path))
    for other in jax.devices():  # the runtime's own memory is not the load's
        jax.block_until_ready(jax.device_put(np.ones(8), other))
    rate = _upload_rate()
    print(f"{path.name}: {size / 1e9:.2f} GB; {len(jax.devices())} x {device.device_kind}")
    print(f"read from the page cache {read:.2f} s; upload at {rate / 1e9:.1f} GB/s")
    file = jaxsplit.llm.open_model(path)
    largest = max(t.nbytes for t in file.tensors.values())
    loads: list[tuple[float, float]] = []
    for i in range(_REPEAT.value):
        base, peak = _host_memory(), [0.0]

        def watch(done: int, total: int, base: float = base, peak: list[float] = peak) -> None:
            peak[0] = max(peak[0], _host_memory() - base)

        start = time.perf_counter()
        lm = jaxsplit.load(
            path,
            devices=_DEVICES.value,
            weights=_WEIGHTS.value,
            ctx_size=256,
            progress=watch,
        )
        seconds = time.perf_counter() - start
        print(
            f"load {i + 1}: {seconds:.2f} s, {size / seconds / 1e9:.2f} GB/s, "
            f"{seconds / (size / rate):.1f} x the upload alone; host memory + {peak[0]:.0f} MB "
            f"(largest tensor {largest / 1e6:.0f} MB), per device {lm.weight_bytes / 1e9:.2f} GB"
        )
        loads.append((seconds, peak[0]))
        record.save(_records(lm, model_and_type(file), loads, size / rate), _JSON_DIR.value)
        del lm


if __name__ == "__main__":
    run(main)
