"""Records of benchmarks and the report that is made from them."""

import copy
import datetime
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import report  # noqa: E402

from jaxsplit.bench import record  # noqa: E402

TODAY = datetime.date(2026, 2, 10)


def run(date, rows, **fields):
    """A run on two devices."""
    defaults = {
        "benchmark": "bench",
        "engine": "jaxsplit",
        "device": "NVIDIA H200",
        "count": 2,
        "driver": None,
        "jax": "0.11.2",
        "commit": "abc1234",
        "command": "python benchmarks/bench.py",
        "date": date,
        "rows": rows,
    }
    return defaults | fields


def row(tensor, metric, rates, **fields):
    fields = {"model": "small", "type": "Q8_0", "mode": "graph"} | fields
    return record.make_row({"data": 1, "tensor": tensor}, metric, rates, "tokens/s", **fields)


RUNS = [
    run("2026-02-01T10:00:00Z", [row(2, "decode", [90.0, 100.0, 120.0], limit=200.0, plan=110.0)]),
    run(
        "2026-01-01",
        [row(2, "decode", [50.0]), row(1, "decode", [40.0]), row(2, "prefill 2048", [12345.6])],
        commit=None,
    ),
    run("2026-01-01", [row(2, "prefill 512", [70.0], options={"prefill_dtype": "float8"})]),
    run(None, [row(2, "decode", [30.0], mode="tensor")], engine="another", jax=None),
    run(
        "2026-01-01",
        [record.make_row({"tensor": n}, "all-reduce of 8192 bytes", [9.0], "µs") for n in (1, 2)],
    ),
]

REPORT = """\
## small Q8_0
| device | devices | mode | mesh | metric | rate | unit | limit | % of limit | plan \
| commit | date | age, days |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
| NVIDIA H200 | 1 | none | tensor:1 | decode | 40 | tokens/s | – | – | – | – | 2026-01-01 | 40 |
| NVIDIA H200 | 2 | graph | tensor:2 | decode | 100 | tokens/s | 200 | 50 | 110 | abc1234 \
| 2026-02-01 | 9 |
| NVIDIA H200 | 2 | graph | tensor:2 | prefill 512, prefill_dtype=float8 | 70 | tokens/s | – | – \
| – | abc1234 | 2026-01-01 | 40 |
| NVIDIA H200 | 2 | graph | tensor:2 | prefill 2048 | 12,346 | tokens/s | – | – | – | – \
| 2026-01-01 | 40 |

## Communication, NVIDIA H200, 2026-01-01
| µs | `tensor:1` | `tensor:2` |
|---|---|---|
| all-reduce of 8192 bytes | 9 | 9 |

## Other engines on the same GPUs
| model | metric | devices | device | engine | mode | rate | unit |
|---|---|---|---|---|---|---|---|
| small Q8_0 | decode | 2 | NVIDIA H200 | another | tensor | 30 | tokens/s |
"""


def test_a_report_has_the_newest_row_of_each_split():
    text = report.report(RUNS, TODAY, with_plots=False)
    assert text[text.index("## ") :] == REPORT


def test_the_checked_in_report_is_made_from_the_checked_in_records():
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    made = re.search(r"Made on (\S+) by", text).group(1)
    runs = record.load(report.RESULTS)
    expected = report.report(runs, datetime.date.fromisoformat(made), with_plots=True)
    assert text == expected, "run python benchmarks/report.py"
    for plot in re.findall(r"\((\w+\.png)\)", text):
        assert (ROOT / "docs" / plot).exists()


def test_checked_in_records_are_written_as_save_writes_them():
    paths = sorted(report.RESULTS.glob("*.json"))
    assert paths
    for path in paths:
        text = path.read_text("utf-8")
        assert record.dumps(json.loads(text)) == text, path


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("run", "count", "2", "count='2' is not"),
        ("run", "date", "yesterday", "isoformat"),
        ("run", "jobs", 1, "unknown fields: jobs"),
        ("row", "median", None, "neither the median nor the best"),
        ("row", "median", True, "median=True is not"),
        ("row", "min", 101.0, "min, median and max"),
        ("row", "mesh", "tensor", "not a list of axis:size"),
        ("row", "mesh", "tensor:4", "more devices than 2"),
        ("row", "sequences", None, "sequences=None is not"),
    ],
)
def test_records_that_do_not_fit_the_schema_are_refused(where, name, value, message):
    wrong = copy.deepcopy(RUNS[0])
    wrong["rows"][0]["max"] = None
    record.check(wrong)
    (wrong if where == "run" else wrong["rows"][0])[name] = value
    with pytest.raises(ValueError, match=message):
        record.check(wrong)


def test_save_writes_a_record_of_this_process(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench.py", "-p", "a b"])
    measured = [row(2, "decode", [1.0, 4.0, 2.0], limit=3.0), row(1, "decode", [1 / 3])]
    record.save(measured[:1], folder)
    record.save(measured, folder)
    (found,) = record.load(folder)
    assert (found["benchmark"], found["device"]) == ("bench", "cpu")
    assert found["command"] == "python benchmarks/bench.py -p 'a b'"
    assert [r["median"] for r in found["rows"]] == [2.0, 0.333333]
    assert [r["mode"] for r in found["rows"]] == ["graph", "none"]
    assert record.share_of_limit(found["rows"][0]) == pytest.approx(2 / 3)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record.save([row(2, "decode", [1.0])], None)
    assert not list(tmp_path.iterdir())


def test_plots_join_the_metrics_of_a_split():
    rows = [r for r in report.newest(RUNS) if r["engine"] == "jaxsplit" and not r["options"]]
    joined = report._joined(rows, {"decode": "decode", "prefill": "prefill 2048"})
    one, two = joined
    assert (one["devices"], one["mode"], one["decode"], one["prefill"]) == (1, "none", 40.0, None)
    assert (two["split"], two["decode_plan"], two["prefill"]) == ("graph tensor:2", 110.0, 12345.6)
