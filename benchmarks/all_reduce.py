"""Time of all-reduces through XLA and through kernels of this package.

  python benchmarks/all_reduce.py --json=FILE
  JAX_NUM_CPU_DEVICES=4 python benchmarks/all_reduce.py --counts=2,4

A program of consecutive all-reduces, compiled and launched like decode steps. Rates are bus
bandwidth: each device sends `2 (n - 1) / n` of the bytes.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from jaxsplit.bench import record
from jaxsplit.bench.measure import all_reduce_times, counts_up_to, markdown
from jaxsplit.cli import options
from jaxsplit.cli.program import run

_COUNTS = flags.DEFINE_list("counts", None, "numbers of devices (default: 1, 2, 4, … all)")
_JSON = flags.DEFINE_string("json", None, "write the rows to this file too")
_JSON_DIR = options.define_json_dir()

_SIZES = [2**n for n in (13, 14, 16, 18, 20, 22, 24, 26)]
_COLUMNS = {
    "devices": "devices",
    "bytes": "bytes",
    "xla": "XLA µs",
    "xla_rate": "GB/s",
    "kernels": "kernels µs",
    "kernels_rate": "GB/s",
}


def _rows(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each size on `count` devices, and rows of the record."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:count]), "tensor")
    rows, records = [], []
    for size in _SIZES:
        row: dict[str, Any] = {"devices": count, "bytes": size}
        for way, kernels in (("xla", False), ("kernels", True)):
            times = all_reduce_times(mesh, size, kernels=kernels)
            took = min(times) if times else None
            if times:
                metric = f"all-reduce of {size} bytes, {'kernels' if kernels else 'XLA'}"
                micro = [time * 1e6 for time in times]
                records.append(record.make_row(mesh.shape, metric, micro, "µs"))
            sent = 2 * (count - 1) / count * size
            row[way] = "" if took is None else took * 1e6
            row[f"{way}_rate"] = "" if took is None else sent / took / 1e9
        rows.append(row)
    return rows, records


def main(_: list[str]) -> None:
    """Measures each count of devices."""
    devices = jax.devices()
    found = {
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "jax": jax.__version__,
        "rows": [],
    }
    print(f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}", flush=True)
    records: list[dict[str, Any]] = []
    for count in counts_up_to(len(devices), _COUNTS.value):
        if count > 1:
            rows, measured = _rows(count)
            found["rows"] += rows
            records += measured
            record.save(records, _JSON_DIR.value)
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(found, indent=1))
    print(f"\n{markdown(found['rows'], _COLUMNS)}")


if __name__ == "__main__":
    run(main)
