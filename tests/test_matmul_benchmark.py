"""The benchmark of matmuls, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def benchmark(*flags):
    return subprocess.run(
        [sys.executable, "benchmarks/matmul.py", "--shape=llama-tiny", "--cold_mib=1", *flags],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_each_product_has_a_time_a_share_and_an_error(tmp_path):
    out = tmp_path / "found.json"
    done = benchmark(
        *("--kernels=xla", "--types=Q3_K,Q5_1", "--matrices=qkv,down", "--rows=1,3"), f"--out={out}"
    )
    assert not done.returncode, done.stderr
    found = json.loads(out.read_text())
    made = [(row["type"], row["matrix"], row["rows"]) for row in found["rows"]]
    assert made == [(t, m, n) for t in ("Q3_K", "Q5_1") for m in ("qkv", "down") for n in (1, 3)]
    for row in found["rows"]:
        assert row["micros"] > 0 and row["share"] > 0, row
        # XLA rounds several rows' weights to bfloat16, and results.
        assert 1e-8 < row["nmse"] <= 1e-4, row
        assert f"| {row['type']} | {row['matrix']} | {row['rows']} |" in done.stdout
    assert found["bandwidth"] > 0 and found["flops"] > 0


def test_what_it_cannot_measure_is_refused_by_name():
    done = benchmark("--types=F16")
    assert (done.returncode, "--types=F16 is none of" in done.stderr) == (2, True), done.stderr
