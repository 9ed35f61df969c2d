"""Records of measurements: one JSON file for each run of a benchmark, with `--json_dir`.

`benchmarks/report.py` makes docs/results.md from the files in benchmarks/results. Nothing here
needs JAX or a device before a run is saved.
"""

import datetime
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jaxsplit

RUN = {
    "benchmark": str,
    "engine": str,
    "device": str,
    "count": int,
    "driver": str | None,
    "jax": str | None,
    "commit": str | None,
    "command": str | None,
    "date": str | None,
    "rows": list,
}
"""Fields of a run, all of them required:

benchmark: the sub-command, or the script without its suffix. engine: the program that was measured.
device: kind of device, as JAX names it. count: devices that the run could see. driver, jax:
versions. commit: of this repository, if the package is in it. command: the command line. date: UTC,
`YYYY-MM-DD` or `YYYY-MM-DDTHH:MM:SSZ`. None: not known.
"""

ROW = {
    "model": str | None,
    "type": str | None,
    "mode": str | None,
    "mesh": str,
    "metric": str,
    "sequences": int,
    "options": dict,
    "median": float | int | None,
    "min": float | int | None,
    "max": float | int | None,
    "unit": str,
    "limit": float | int | None,
    "plan": float | int | None,
}
"""Fields of a row, all of them required:

model: its shape or name; type: of its quantized weights. mode: split mode. mesh: axes and sizes,
such as `stage:2,tensor:4`; a single device is `tensor:1`. metric: what was measured, such as
`decode` or `prefill 2048`. sequences: decoded together. options: non-default ones.
median, min, max: over the repetitions. unit: of these, of the limit and of the plan. limit: what
devices of this kind allow, as a rule measured in the same run. plan: what `jaxsplit.plan` predicts.
"""

_TIMES = {"s", "ms", "µs"}


def mesh_size(mesh: str) -> int:
    """Devices of a mesh such as `stage:2,tensor:4`."""
    return math.prod(int(axis.split(":")[1]) for axis in mesh.split(","))


def value(row: Mapping[str, Any]) -> float:
    """The number that stands for a row: the median, or else the best repetition."""
    if row["median"] is not None:
        return row["median"]
    return row["min"] if row["unit"] in _TIMES else row["max"]


def share_of_limit(row: Mapping[str, Any]) -> float | None:
    """How much of the limit a row reaches, at most about 1; None without a limit."""
    if row["limit"] is None:
        return None
    share = value(row) / row["limit"]
    return 1 / share if row["unit"] in _TIMES else share


def check(run: Mapping[str, Any]) -> None:
    """Checks a run against the schema.

    Raises:
      ValueError: a field is missing, unknown, or of another type, or its value is impossible.
    """
    _check_fields("run", run, RUN)
    if run["date"] is not None:
        datetime.datetime.fromisoformat(run["date"])
    for number, row in enumerate(run["rows"]):
        where = f"row {number}"
        _check_fields(where, row, ROW)
        if not re.fullmatch(r"[a-z]+:\d+(,[a-z]+:\d+)*", row["mesh"]):
            raise ValueError(f"{where}: mesh={row['mesh']!r} is not a list of axis:size")
        if mesh_size(row["mesh"]) > run["count"]:
            raise ValueError(f"{where}: {row['mesh']} has more devices than {run['count']}")
        rates = [row[name] for name in ("min", "median", "max") if row[name] is not None]
        if not rates or rates != sorted(rates) or rates[0] < 0:
            raise ValueError(f"{where}: min, median and max are {rates}")
        if value(row) is None:
            raise ValueError(f"{where}: neither the median nor the best repetition is given")


def _check_fields(where: str, found: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    if found.keys() != fields.keys():
        wrong = sorted(found.keys() ^ fields.keys())
        raise ValueError(f"{where}: missing or unknown fields: {', '.join(wrong)}")
    for name, kind in fields.items():
        if not isinstance(found[name], kind) or isinstance(found[name], bool):
            raise ValueError(f"{where}: {name}={found[name]!r} is not {kind}")


def make_row(
    mesh: Mapping[str, int], metric: str, rates: Sequence[float], unit: str, **fields: Any
) -> dict[str, Any]:
    """A row of a record.

    Args:
      mesh: axis names and sizes.
      metric: what was measured.
      rates: one number for each repetition.
      unit: of `rates`.
      **fields: other fields of `ROW`. On one device, any split mode is `none`.
    """
    sizes = {axis: size for axis, size in mesh.items() if size > 1} or {"tensor": 1}
    row: dict[str, Any] = dict.fromkeys(ROW) | {
        "sequences": 1,
        "options": {},
        "mesh": ",".join(f"{axis}:{size}" for axis, size in sizes.items()),
        "metric": metric,
        "median": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "unit": unit,
        **fields,
    }
    if row["mode"] and mesh_size(row["mesh"]) == 1:
        row["mode"] = "none"
    return row


def save(rows: Sequence[Mapping[str, Any]], folder: str | Path | None) -> None:
    """Writes the record of this process to a folder, if one is given; a later call replaces it."""
    if folder is None:
        return
    import jax

    devices, [program, *arguments] = jax.devices(), sys.argv
    command = program.split() if program.startswith("jaxsplit ") else ["python", program]
    run = {
        "benchmark": Path(command[1]).stem,
        "engine": "jaxsplit",
        "device": devices[0].device_kind,
        "count": len(devices),
        "driver": _driver(),
        "jax": jax.__version__,
        "commit": _commit(),
        "command": shlex.join([*command, *arguments]),
        "date": _START.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "rows": list(rows),
    }
    check(run)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"\W+", "-", run["device"].lower()).strip("-")
    stem = f"{_START:%Y%m%dT%H%M%S}-{run['benchmark']}-{device}-x{run['count']}"
    (folder / f"{stem}.json").write_text(dumps(run), "utf-8")


_START = datetime.datetime.now(datetime.UTC)


def load(folder: Path) -> list[dict[str, Any]]:
    """All runs of a folder, checked, in the order of their file names."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text("utf-8"))
        try:
            check(run)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        runs.append(run)
    return runs


def dumps(run: Mapping[str, Any]) -> str:
    """A run as JSON, a line for each row."""
    head = {name: run[name] for name in RUN if name != "rows"}
    rows = [{name: _rounded(row[name]) for name in ROW} for row in run["rows"]]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
    return text + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def _rounded(found: Any) -> Any:
    return float(f"{found:.6g}") if isinstance(found, float) else found


def _driver() -> str | None:
    """Version of the NVIDIA kernel driver."""
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.exists() else None


def _commit() -> str | None:
    """The commit of this repository, `-dirty` with local changes; None for an installed package,
    which may lie in another repository."""
    root = Path(jaxsplit.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
