"""Examples run, on CPU devices."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import quick_environment

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str | Path, **options: object) -> str:
    """What an example prints."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=400, **options
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


def test_a_chat_answers_and_remembers(smollm2_path):
    said = run(sys.executable, EXAMPLES / "chat.py", smollm2_path, input="Say hi.\n")
    assert said.startswith("> ")
    assert len(said) > 5


def test_texts_are_scored(smollm2_path, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("The capital of France is Paris.\nParis France of is the capital.\n", "utf-8")
    first, second = run(
        sys.executable, EXAMPLES / "score_texts.py", smollm2_path, texts
    ).splitlines()
    assert float(first.split()[0]) > float(second.split()[0])


def test_four_cards_are_planned(smollm2_path):
    lines = run(sys.executable, EXAMPLES / "plan_four_cards.py", smollm2_path).splitlines()
    assert len(lines) == 4
    assert all("tokens/s" in line for line in lines)


def test_a_decoder_of_ones_own_learns():
    losses = run(sys.executable, EXAMPLES / "own_decoder.py", env=quick_environment()).splitlines()
    assert float(losses[-1].split()[-1]) < 0.5 * float(losses[0].split()[-1])


def test_the_notebook_runs(monkeypatch):
    """It has no outputs in the repository; its last cell compares logits."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "mesh_shapes.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in cells if cell.outputs or cell.execution_count]
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    images = [
        output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert len(images) == 2
    (compared,) = cells[-1].outputs
    assert compared.text.count("largest difference") == 3


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_two_hosts_write_one_text(smollm2_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHON": sys.executable, "PORT": str(port)}
    environment.pop("JAX_NUM_CPU_DEVICES")
    assert run("bash", EXAMPLES / "two_hosts.sh", env=environment).strip()
