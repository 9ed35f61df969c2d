"""Scaling of decode and prefill: split modes over device counts, beside the plan.

  python benchmarks/scaling.py --out=DIR -- --random=llama-70b:Q4_K_M -p 2048 -n 64
  JAX_NUM_CPU_DEVICES=8 python benchmarks/scaling.py --out=DIR -- --model=FILE.gguf -p 64 -n 8

Flags after `--` go to `jaxsplit bench`, which runs in its own process for each device count,
in parallel while GPUs are free. all_reduce.py runs first. Results are kept in the directory, with a
table and a plot: after --seconds no new process starts, and the same command resumes where it
stopped. Each process writes its own record with --json_dir.
"""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plots
from absl import flags

from jaxsplit.bench.measure import counts_up_to, markdown
from jaxsplit.cli import options
from jaxsplit.cli.program import run
from jaxsplit.errors import JaxsplitError
from jaxsplit.sharding import SPLIT_MODES

_OUT = flags.DEFINE_string("out", None, "directory for the results", required=True)
_COUNTS = flags.DEFINE_list("counts", None, "numbers of devices (default: 1, 2, 4, … all)")
_MODES = flags.DEFINE_list("modes", "graph,layer,row", "split modes on more than one device")
_JSON_DIR = options.define_json_dir()
_SECONDS = flags.DEFINE_float("seconds", 540.0, "time after which no new process starts")

_COLUMNS = {
    "devices": "devices",
    "mode": "split",
    "decode": "decode tok/s",
    "decode_limit": "limit",
    "decode_plan": "plan",
    "decode_layer": "÷ layer",
    "decode_one": "÷ 1 device",
    "prefill": "prefill tok/s",
    "prefill_limit": "limit",
    "prefill_plan": "plan",
    "prefill_layer": "÷ layer",
    "prefill_one": "÷ 1 device",
}


@dataclasses.dataclass
class _Job:
    """The splits of one device count.

    Attributes:
      count: number of devices.
      modes: split modes still to be measured.
      devices: ids of its devices.
      process: the running `jaxsplit bench`.
    """

    count: int
    modes: Sequence[str]
    devices: Sequence[str] = ()
    process: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.count}-{'-'.join(self.modes)}"

    def growing(self, out: Path) -> Path:
        """File of the results so far; tests of the last split may be missing."""
        return out / f"{self.name}.growing"

    def end(self, out: Path) -> None:
        """Keeps the results, except the last split's if the process was stopped."""
        file, stopped = self.growing(out), self.process.returncode != 0
        if file.exists():
            tests = json.loads(file.read_text())
            last = tests[-1]["split"]
            tests = [test for test in tests if not stopped or test["split"] != last]
            (out / f"{self.name}.json").write_text(json.dumps(tests, indent=1))
            file.unlink()

    def start(self, out: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        splits = [f"--split={_split(mode, self.count)}" for mode in self.modes]
        results = [f"--json={self.growing(out)}", *_json_dir()]
        command = [sys.executable, "-m", "jaxsplit", "bench", *arguments, *splits, *results]
        with open(out / f"{self.name}.log", "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment
            )


def _python(script: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(script))]


def _json_dir() -> list[str]:
    return [] if _JSON_DIR.value is None else [f"--json_dir={_JSON_DIR.value}"]


def _split(mode: str, count: int) -> str:
    return mode if count == 1 else f"{mode}@{SPLIT_MODES[mode].axis}:{count}"


def _host(out: Path) -> dict[str, Any]:
    """The devices, and their all-reduce times."""
    file = out / "all_reduce.json"
    if not file.exists():
        counts = [] if _COUNTS.value is None else [f"--counts={','.join(_COUNTS.value)}"]
        command = [*_python("all_reduce.py"), f"--json={file}", *counts, *_json_dir()]
        if subprocess.run(command, check=False).returncode:
            raise JaxsplitError("all_reduce.py failed")
    return json.loads(file.read_text())


def _rows(out: Path) -> list[dict[str, Any]]:
    """Results: a row for each split, with its ratios."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for file in sorted(out.glob("[0-9]*.json")):
        for test in json.loads(file.read_text()):
            mode, _, mesh = test["split"].partition(" ")
            count = math.prod(map(int, re.findall(r":(\d+)", mesh)))
            row = found.setdefault(
                (count, mode), {"model": test["model"], "devices": count, "mode": mode}
            )
            kind = "decode" if test["test"].startswith("tg") else "prefill"
            row[kind] = test["rate"]
            row |= {f"{kind}_{name}": test[name] for name in ("limit", "plan")}
    for (count, _), row in found.items():
        for kind in ("decode", "prefill"):
            for name, other in (("one", (1, "none")), ("layer", (count, "layer"))):
                rates = row.get(kind), found.get(other, {}).get(kind)
                row[f"{kind}_{name}"] = rates[0] / rates[1] if all(rates) else ""
    order = ["none", *_MODES.value]
    empty = dict.fromkeys(_COLUMNS, "")
    rows = [empty | row for row in found.values() if row["mode"] in order]
    return sorted(rows, key=lambda row: (row["devices"], order.index(row["mode"])))


def _write(out: Path, host: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table and the plot."""
    model = rows[0]["model"] if rows else "nothing"
    title = f"{model} on {host['devices']} x {host['kind']}, jax {host['jax']}"
    table = f"{title}\n\n{markdown(rows, _COLUMNS)}"
    (out / "scaling.md").write_text(table)
    (out / "scaling.json").write_text(json.dumps({"title": title, "rows": rows}, indent=1))
    plots.scaling(rows, _MODES.value, title, out / "scaling.png")
    return table


def _measure(
    jobs: Sequence[_Job], host: Mapping[str, Any], out: Path, arguments: list[str]
) -> None:
    """Runs jobs, several at once where each has GPUs of its own, until time is over."""
    begin, on_cpu = time.perf_counter(), host["platform"] == "cpu"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(host["devices"])))
    free, waiting, running = visible.split(","), list(jobs), []
    try:
        while waiting or running:
            for job in list(waiting):
                if time.perf_counter() - begin > _SECONDS.value:
                    print(f"out of time: {', '.join(job.modes)} on {job.count} not measured")
                    waiting.remove(job)
                elif job.count <= len(free) and not (on_cpu and running):
                    job.devices, free = free[: job.count], free[job.count :]
                    gpus = {"CUDA_VISIBLE_DEVICES": ",".join(job.devices)}
                    cpus = {"JAX_NUM_CPU_DEVICES": str(job.count)}
                    job.start(out, arguments, cpus if on_cpu else gpus)
                    waiting.remove(job)
                    running.append(job)
            for job in [job for job in running if job.process.poll() is not None]:
                free = sorted([*free, *job.devices], key=visible.split(",").index)
                running.remove(job)
                job.end(out)
                log = out / f"{job.name}.log"
                ended = f"failed; see {log}" if job.process.returncode else "measured"
                print(f"{', '.join(job.modes)} on {job.count}: {ended}", flush=True)
                _write(out, host, _rows(out))
            time.sleep(0.1)
    finally:
        for job in running:
            job.process.kill()
            job.process.wait()
            job.end(out)


def main(arguments: list[str]) -> None:
    """Runs missing measurements, and writes the results after each device count."""
    out = Path(_OUT.value)
    unknown = set(_MODES.value) - {mode for mode, split in SPLIT_MODES.items() if split.axis}
    if unknown:
        raise JaxsplitError(f"--modes={','.join(_MODES.value)}: {min(unknown)} is no split mode")
    out.mkdir(parents=True, exist_ok=True)
    host = _host(out)
    measured = {(row["devices"], row["mode"]) for row in _rows(out)}
    jobs = []
    for count in counts_up_to(host["devices"], _COUNTS.value):
        modes = _MODES.value if count > 1 else ["none"]
        missing = [mode for mode in modes if (count, mode) not in measured]
        jobs += [_Job(count, missing)] if missing else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # by `timeout`, for one
    _measure(jobs, host, out, arguments)
    print(f"\n{_write(out, host, _rows(out))}")


if __name__ == "__main__":
    run(main, arguments=sys.maxsize)
