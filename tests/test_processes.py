"""Several processes on this host give the text of one, and none outlives another."""

import socket
import subprocess
import sys
import time

import pytest
from helpers import quick_environment
from tiny import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "tiny.gguf"
    return write_tiny_model(path, layers=3, context=20000)


def on_cpus(devices):
    """The environment of a process with a number of CPU devices."""
    return quick_environment() | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}


def start(model, *flags, devices=2, **process):
    """A process of `jaxsplit.generate`."""
    command = [sys.executable, "-m", "jaxsplit.generate", f"--model={model}", "--temperature=0"]
    command += [*flags, "--compilation_cache=none"]
    environment = on_cpus(devices)
    command += [f"--{flag}={value}" for flag, value in process.items()]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def pair(model, *flags):
    """Two processes, of which the first alone is told the flags and a prompt."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    ids = {"coordinator": coordinator, "num_processes": 2}
    first = start(model, *flags, "--prompt=the hello", **ids, process_id=0)
    return first, start(model, **ids, process_id=1)


COUNT = "--n_predict=12"


@pytest.fixture(scope="module")
def text_of_one(model):
    alone = start(model, COUNT, "--split_mode=none", "--prompt=the hello", devices=1)
    text, _ = alone.communicate(timeout=120)
    assert alone.returncode == 0 and len(text) > len("the hello\n")
    return text


@pytest.mark.parametrize(
    "split",
    [
        "--split_mode=graph",
        pytest.param("--split_mode=layer", marks=pytest.mark.full),
        "--mesh=data:2,stage:2",
    ],
)
def test_two_processes_give_the_text_of_one(model, text_of_one, split):
    first, second = pair(model, COUNT, split)
    text, error = first.communicate(timeout=120)
    other, _ = second.communicate(timeout=120)
    assert first.returncode == second.returncode == 0, error
    assert text == text_of_one
    assert not other


MANY = """
import sys, json, jaxsplit
from jaxsplit.sharding.distributed import start_processes
model, mesh, *process = sys.argv[1:]
if process:
    start_processes(process[0], 2, int(process[1]))
lm = jaxsplit.load(model, mesh=mesh, slots=3, ctx_size=64, dtype="float32")
prompts = ["the hello", "the hello the", "a", "lo", "hello hello"]
texts = lm.generate(prompts, 10, temperature=0.0)
started = [lm.submit(prompt, 40, temperature=0.0) for prompt in prompts]
started[1].cancel()
texts += [one.result().text for one in started if one is not started[1]]
digits = jaxsplit.Grammar("regex", "[0-9]{3,20}")
texts += lm.generate(prompts, 30, temperature=0.0, grammar=digits)
assert all(text.isdigit() for text in texts[-len(prompts) :])
print(json.dumps(texts))
"""


@pytest.mark.parametrize(
    "mesh", ["tensor:2", "data:2", pytest.param("stage:2", marks=pytest.mark.full)]
)
def test_two_processes_run_many_requests(model, mesh):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"

    def begin(devices, *arguments):
        environment = on_cpus(devices)
        command, pipe = [sys.executable, "-c", MANY, str(model), *arguments], subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)

    several = [begin(1, mesh, coordinator, str(index)) for index in range(2)]
    found = [process.communicate(timeout=180) for process in several]
    assert [process.returncode for process in several] == [0, 0], found
    alone, error = begin(2, mesh).communicate(timeout=180)
    assert alone, error
    texts = [text.splitlines()[-1] for text, _ in found]  # Gloo says something, too
    assert texts == [alone.splitlines()[-1]] * 2


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_with_a_message(model, victim):
    processes = pair(model, "--n_predict=1000000", "--ctx_size=0")
    try:
        assert processes[0].stdout.read(20).startswith("the hello")  # under way
        processes[victim].kill()
        killed = time.monotonic()
        _, error = processes[1 - victim].communicate(timeout=60)
        assert time.monotonic() - killed < 60
        assert processes[1 - victim].returncode not in (0, None)
        assert "another process has ended" in error or "another task died" in error
    finally:
        for process in processes:
            process.kill()


def test_a_failing_process_does_not_keep_the_other_waiting(model, tmp_path):
    first, second = pair(model, "--prompt_file=/nowhere")
    try:
        _, error = first.communicate(timeout=60)
        assert first.returncode == 2
        assert "--prompt and --prompt_file are both given" in error
        second.communicate(timeout=60)
        assert second.returncode != 0
    finally:
        second.kill()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"process_id": 1}, "--coordinator and --num_processes must be given too"),
        (
            {"coordinator": "here", "num_processes": 2, "process_id": 0},
            "--coordinator=here is not of the form host:port",
        ),
        (
            {"coordinator": "localhost:1", "num_processes": 2, "process_id": 2},
            "--process_id=2 must lie between 0 and 1",
        ),
    ],
)
def test_incomplete_flags_are_one_line(model, flags, message):
    process = start(model, "--prompt=x", **flags)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
