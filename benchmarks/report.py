"""docs/results.md and its plots, from the records in benchmarks/results.

  python benchmarks/report.py

For each model, split and device the newest record counts.
"""

import datetime
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plots
from absl import flags

from jaxsplit.bench import record
from jaxsplit.bench.measure import markdown
from jaxsplit.cli.program import run

_DOCS = Path(__file__).parent.parent / "docs"

RESULTS = Path(__file__).with_name("results")

_RESULTS_DIR = flags.DEFINE_string("results_dir", str(RESULTS), "folder of the records")
_REPORT = flags.DEFINE_string("report", str(_DOCS / "results.md"), "the report to write")
_PLOT_DIR = flags.DEFINE_string("plot_dir", str(_DOCS), "folder for the plots")

_OURS = "jaxsplit"
_HEAD = """# Results

Made on {today} by `python benchmarks/report.py` from `benchmarks/results`, which has the \
commands. Each row is the newest measurement of a model, split and device.

- **rate**: median of the repetitions, or the best where the median is not recorded; tokens/s of \
all sequences together. `llama-8b` and the like are random weights of these shapes: speed depends \
on shapes and types, not on values. `decode` generates after a prompt of one token.
- **limit**: what the devices allow, measured in the same run, or, for rows without a commit or a \
plan, at times on other devices of the same kind. Decode reads the weights and the filled part of \
the cache once per step, at the bandwidth of a copy. Prefill runs matmuls at the rate of one large \
matrix product. Both ignore communication. The limit of a load is the upload alone.
- **plan**: what `jaxsplit plan` predicts ([plan.md](plan.md)).
- **prefill_dtype=float8** is less exact: [by how much](design/kernels.md#float8).
- –: not recorded.

"""
_PLOTS = """![Decode and prefill of llama-70b Q4_K_M over one to eight H200s](scaling_70b.png)

![16 sequences of llama-8b Q4_K_M on meshes of eight H200s](mesh_shapes_8b.png)

"""
_COLUMNS = {
    "device": "device",
    "count": "devices",
    "mode": "mode",
    "mesh": "mesh",
    "metric": "metric",
    "rate": "rate",
    "unit": "unit",
    "limit": "limit",
    "percent": "% of limit",
    "plan": "plan",
    "commit": "commit",
    "date": "date",
    "age": "age, days",
}
_OTHER_COLUMNS = {
    "name": "model",
    "metric": "metric",
    "count": "devices",
    "device": "device",
    "engine": "engine",
    "mode": "mode",
    "rate": "rate",
    "unit": "unit",
}


def newest(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each measurement, with the fields of its run, sorted for tables."""
    found: dict[tuple, dict[str, Any]] = {}
    names = ("engine", "device", "model", "type", "mode", "mesh", "metric", "sequences")
    for run_ in sorted(runs, key=lambda run_: run_["date"] or ""):
        for row in run_["rows"]:
            joined = {**run_, **row, "count": record.mesh_size(row["mesh"])}
            del joined["rows"]
            key = (*(joined[name] for name in names), *sorted(row["options"].items()))
            found[key] = joined
    return sorted(found.values(), key=_order)


def _order(row: Mapping[str, Any]) -> tuple:
    options = sorted(map(str, row["options"].items()))
    head = (_name(row), row["device"], row["count"], row["mode"] or "", row["mesh"])
    return (*head, row["sequences"], _numbers_apart(row["metric"]), options)


def _numbers_apart(text: str) -> list[str | int]:
    """The key of an order in which `prefill 512` comes before `prefill 2048`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _name(row: Mapping[str, Any]) -> str:
    return " ".join(filter(None, (row["model"], row["type"])))


def report(runs: Iterable[Mapping[str, Any]], today: datetime.date, *, with_plots: bool) -> str:
    """The text of docs/results.md.

    Args:
      runs: records, as of `record.load`.
      today: ages count from here.
      with_plots: link the plots.
    """
    rows = newest(runs)
    text = _HEAD.format(today=today.isoformat()) + (_PLOTS if with_plots else "")
    ours = [row for row in rows if row["engine"] == _OURS]
    for name in dict.fromkeys(_name(row) for row in ours if row["model"]):
        cells = [_cells(row, today) for row in ours if _name(row) == name]
        text += f"## {name}\n{markdown(cells, _COLUMNS)}\n"
    for kind in dict.fromkeys(row["device"] for row in ours if not row["model"]):
        text += _by_mesh([row for row in ours if not row["model"] and row["device"] == kind])
    others = [_cells(row, today) for row in rows if row["engine"] != _OURS]
    if others:
        text += f"## Other engines on the same GPUs\n{markdown(others, _OTHER_COLUMNS)}\n"
    return text.rstrip() + "\n"


def _cells(row: Mapping[str, Any], today: datetime.date) -> dict[str, Any]:
    """Cells of a table."""
    date, share = (row["date"] or "")[:10], record.share_of_limit(row)
    metric = [row["metric"], *(f"{name}={value}" for name, value in sorted(row["options"].items()))]
    if row["sequences"] > 1:
        metric.insert(1, f"{row['sequences']} sequences")
    age = (today - datetime.date.fromisoformat(date)).days if date else None
    cells = {
        **row,
        "name": _name(row),
        "metric": ", ".join(metric),
        "rate": _number(record.value(row)),
        "limit": _number(row["limit"]),
        "plan": _number(row["plan"]),
        "percent": None if share is None else f"{share:.0%}".rstrip("%"),
        "date": date,
        "age": age,
    }
    return {key: "–" if cell in (None, "") else cell for key, cell in cells.items()}


def _number(value: float | None) -> str | None:
    """Four digits, and all of those before the point."""
    if value is None:
        return None
    digits = max(0, 3 - len(str(int(value))) + (value >= 1))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _by_mesh(rows: Sequence[Mapping[str, Any]]) -> str:
    """Measurements without a model on one kind of device: a column for each mesh."""
    meshes = list(dict.fromkeys(row["mesh"] for row in rows))
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["metric"], dict.fromkeys(meshes, "–"))
        line |= {"metric": row["metric"], row["mesh"]: _number(record.value(row))}
    units = ", ".join(dict.fromkeys(row["unit"] for row in rows))
    dates = ", ".join(sorted({(row["date"] or "–")[:10] for row in rows}))
    columns = {"metric": units} | {mesh: f"`{mesh}`" for mesh in meshes}
    table = markdown(list(lines.values()), columns)
    return f"## Communication, {rows[0]['device']}, {dates}\n{table}\n"


def plot(runs: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """The two plots: split modes over device counts, and meshes of eight devices."""
    rows = [row for row in newest(runs) if row["engine"] == _OURS and not row["options"]]
    rows = [row for row in rows if row["device"] == "NVIDIA H200"]
    big = [row for row in rows if _name(row) == "llama-70b Q4_K_M" and row["sequences"] == 1]
    big = [row for row in big if "," not in row["mesh"]]
    plots.scaling(
        _joined(big, {"decode": "decode", "prefill": "prefill 2048"}),
        ("graph", "layer", "row"),
        "llama-70b Q4_K_M on NVIDIA H200",
        folder / "scaling_70b.png",
    )
    small = [row for row in rows if _name(row) == "llama-8b Q4_K_M" and row["sequences"] == 16]
    plots.meshes(
        _joined(
            [row for row in small if row["count"] == 8],
            {"decode": "decode after 512", "prefill": "prefill 512"},
        ),
        {"decode": "decode after 512, tokens/s", "prefill": "prefill 512, tokens/s"},
        "16 sequences of llama-8b Q4_K_M on 8 x NVIDIA H200",
        folder / "mesh_shapes_8b.png",
    )


def _joined(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each split, with its rates and plans under the keys of `metrics`."""
    splits: dict[tuple, dict[str, Any]] = {}
    empty = {key + end: None for key in metrics for end in ("", "_plan")}
    for row in rows:
        for key, metric in metrics.items():
            if row["metric"] == metric:
                split = {
                    "split": f"{row['mode']} {row['mesh']}",
                    "devices": row["count"],
                    "mode": row["mode"],
                }
                found = splits.setdefault((row["mode"], row["mesh"]), empty | split)
                found |= {key: record.value(row), f"{key}_plan": row["plan"]}
    return list(splits.values())


def main(_: list[str]) -> None:
    """Writes the report and the plots."""
    runs = record.load(Path(_RESULTS_DIR.value))
    today = datetime.datetime.now(datetime.UTC).date()
    plot(runs, Path(_PLOT_DIR.value))
    Path(_REPORT.value).write_text(report(runs, today, with_plots=True), "utf-8")


if __name__ == "__main__":
    run(main)
