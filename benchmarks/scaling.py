"""How decode and prefill scale with the devices: split modes over device counts, beside the plan.

  python benchmarks/scaling.py --random=llama-70b:Q4_K_M -p 2048 -n 64 --out=DIR
  JAX_NUM_CPU_DEVICES=8 python benchmarks/scaling.py --model=FILE.gguf -p 64 -n 8 --out=DIR

Measures first what the devices take to add up arrays of some sizes, then the model, with the flags
of bench.py except --split and --batch. Writes scaling.md, scaling.json and scaling.png to the
directory after each split; once --seconds are over, no other is begun.
"""

import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bench
import jax
import numpy as np
from absl import flags
from measure import all_reduce_seconds, markdown

from jaxsplit.cli import run
from jaxsplit.errors import JaxsplitError
from jaxsplit.parallel import SPLIT_MODES

_OUT = flags.DEFINE_string("out", None, "directory for the results", required=True)
_COUNTS = flags.DEFINE_list("counts", None, "numbers of devices (default: 1, 2, 4, … all)")
_MODES = flags.DEFINE_list("modes", "layer,row,graph", "split modes on more than one device")
_SECONDS = flags.DEFINE_float("seconds", 540.0, "when to begin nothing new")

_SIZES = [2**n for n in (13, 14, 16, 18, 20, 22, 24, 26)]
_COLUMNS = {
    "devices": "devices",
    "mode": "split",
    "decode": "decode tok/s",
    "decode_plan": "plan",
    "decode_layer": "÷ layer",
    "decode_one": "÷ 1 device",
    "prefill": "prefill tok/s",
    "prefill_plan": "plan",
    "prefill_layer": "÷ layer",
    "prefill_one": "÷ 1 device",
}
_SUMS = {
    "devices": "devices",
    "bytes": "bytes",
    "xla": "XLA µs",
    "xla_rate": "GB/s",
    "kernels": "kernels µs",
    "kernels_rate": "GB/s",
}


def _sums(count: int) -> list[dict[str, Any]]:
    """All-reduces on so many devices, by XLA and by kernels of this package. The rates are those at
    which each device sends, were they in a ring: `2 (n - 1) / n` of the bytes."""
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:count]), "tensor")
    rows = []
    for size in _SIZES:
        row: dict[str, Any] = {"devices": count, "bytes": size}
        for way, kernels in (("xla", False), ("kernels", True)):
            took = all_reduce_seconds(mesh, size, kernels=kernels)
            sent = 2 * (count - 1) / count * size
            row[way] = "" if took is None else took * 1e6
            row[f"{way}_rate"] = "" if took is None else sent / took / 1e9
        rows.append(row)
    return rows


def _ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what they are of the one on one device, and of `layer` on as many."""

    def ratio(row: dict[str, Any], kind: str, others: Sequence[dict[str, Any]]) -> float | str:
        return row[kind] / others[0][kind] if others and others[0].get(kind) else ""

    found = []
    for row in rows:
        one = [r for r in rows if r["devices"] == 1]
        layer = [r for r in rows if r["mode"] == "layer" and r["devices"] == row["devices"]]
        row = {"decode": "", "decode_plan": "", "prefill": "", "prefill_plan": ""} | row
        for kind in ("decode", "prefill"):
            measured = row[kind] != ""
            row[f"{kind}_one"] = ratio(row, kind, one) if measured else ""
            row[f"{kind}_layer"] = ratio(row, kind, layer) if measured else ""
        found.append(row)
    return found


def _plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Rates over devices, a line for each mode, the plan's dashed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
        return
    pyplot.switch_backend("Agg")
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4))
    for panel, kind in zip(panels, ("decode", "prefill"), strict=True):
        for mode, color in zip(_MODES.value, ("#9a9a9a", "#d08a2c", "#24609b"), strict=False):
            points = [r for r in rows if r["mode"] in ("none", mode) and kind in r]
            counts = [r["devices"] for r in points]
            panel.plot(counts, [r[kind] for r in points], "o-", color=color, label=mode)
            panel.plot(counts, [r[f"{kind}_plan"] for r in points], "--", color=color, lw=1)
        panel.set(xlabel="devices", ylabel=f"{kind}, tokens/s", ylim=(0, None))
        panel.set_xticks(sorted({r["devices"] for r in rows}))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, title="dashed: plan")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _counts(devices: int) -> list[int]:
    if _COUNTS.value is None:
        return sorted({devices, *(2**n for n in range(devices.bit_length()))})
    counts = [int(value) if value.isdigit() else 0 for value in _COUNTS.value]
    if not counts or not all(1 <= count <= devices for count in counts):
        raise JaxsplitError(f"--counts={','.join(_COUNTS.value)}: there are {devices} devices")
    return counts


def main(_: list[str]) -> None:
    """Measures each count of devices in each mode, and writes after each."""
    begin, out, file = time.perf_counter(), Path(_OUT.value), bench.model_file()
    unknown = set(_MODES.value) - {mode for mode, split in SPLIT_MODES.items() if split.axis}
    if unknown:
        raise JaxsplitError(f"--modes={','.join(_MODES.value)}: {min(unknown)} is no split mode")
    devices = jax.devices()
    counts = _counts(len(devices))
    out.mkdir(parents=True, exist_ok=True)
    name = file.metadata.get("general.name", file.path.name)
    title = f"{name} on {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"
    sums = [row for count in counts if count > 1 and _SECONDS.value > 0 for row in _sums(count)]
    rows: list[dict[str, Any]] = []
    table = title
    for count in counts:
        for mode in _MODES.value if count > 1 else ["none"]:
            if time.perf_counter() - begin > _SECONDS.value:
                print(f"out of time: {mode} on {count} devices was not measured")
                continue
            mesh = f"{SPLIT_MODES[mode].axis}:{count}" if count > 1 else None
            row: dict[str, Any] = {"devices": count, "mode": mode}
            for test in bench.measure(file, mode, mesh):
                kind = "decode" if test["test"].startswith("tg") else "prefill"
                row |= {kind: test["rate"], f"{kind}_plan": test["plan"]}
            rows.append(row)
            gc.collect()
            table = f"{title}\n\n{markdown(_ratios(rows), _COLUMNS)}\n{markdown(sums, _SUMS)}"
            (out / "scaling.md").write_text(table)
            (out / "scaling.json").write_text(json.dumps({"rows": rows, "sums": sums}, indent=1))
            _plot(rows, title, out / "scaling.png")
    print(f"\n{table}")


if __name__ == "__main__":
    run(main)
