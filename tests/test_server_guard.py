"""`jaxsplit serve`: keys, names, limits, signals, and its OpenAPI document."""

import base64
import logging
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from logging.handlers import QueueHandler
from pathlib import Path

import httpx
import pytest
from helpers import quick_environment
from serving import serving, wait_until_ready
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.config import SamplingConfig
from jaxsplit.errors import JaxsplitError
from jaxsplit.server.config import ServerConfig
from jaxsplit.server.run import Server
from jaxsplit.server.service import Service

ROOT = Path(jaxsplit.__file__).parents[1]
CALL = {"prompt": "Hello", "n_predict": 2}


pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("guard") / "tiny.gguf")


@pytest.fixture(scope="module")
def lm(path):
    return jaxsplit.load(path, devices=1, dtype="float32", slots=2, cache_tokens=1024)


@pytest.fixture(scope="module")
def locked(lm, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first-key\n\nsecond-key\n")
    options = {"api_key": "third", "cors_origins": "https://page.example", "max_body": 1}
    with serving(lm, api_key_file=str(keys), **options) as server:
        yield server.url


OPEN = ["/health", "/v1/health"]
CLOSED = ["/", "/v1/models", "/props", "/metrics", "/slots", "/openapi.json", "/v1/nothing"]


@pytest.mark.parametrize("where", CLOSED)
def test_a_key_protects_everything_but_health(locked, where):
    assert httpx.get(locked + where).status_code == 401
    wrong = httpx.get(locked + where, headers={"Authorization": "Bearer first"})
    assert wrong.status_code == 401
    assert "API key" in wrong.json()["error"]["message"]
    assert httpx.get(locked + where, auth=("", "second-key")).status_code in (200, 404)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer third"},
        {"X-Api-Key": "second-key"},
        {"Authorization": basic("anyone:third")},
    ],
)
def test_a_key_may_come_in_several_headers(locked, headers):
    found = httpx.post(f"{locked}/completion", json=CALL, headers=headers)
    assert found.status_code == 200, found.text


@pytest.mark.parametrize("value", ["", "Bearer", "Basic =", "Basic /////w==", "Bearer \xff"])
def test_headers_that_are_no_keys(locked, value):
    headers = {"Authorization": value.encode("latin-1")}
    assert httpx.get(f"{locked}/props", headers=headers).status_code == 401


@pytest.mark.parametrize("where", OPEN)
def test_health_needs_no_key(locked, where):
    assert httpx.get(locked + where).status_code == 200


def test_large_bodies_are_refused(locked):
    key = {"X-Api-Key": "third"}
    large = {"prompt": "x" * (1 << 20)}
    assert httpx.post(f"{locked}/completion", json=large, headers=key).status_code == 413
    chunks = (b"x" * 4096 for _ in range(300))  # no length is announced
    headers = key | {"Content-Type": "application/json"}
    found = httpx.post(f"{locked}/completion", content=chunks, headers=headers)
    assert found.status_code == 413


def test_pages_of_other_origins(locked):
    page = {"Origin": "https://page.example", "X-Api-Key": "third"}
    assert (
        httpx.get(f"{locked}/props", headers=page).headers["access-control-allow-origin"]
        == page["Origin"]
    )
    asked = httpx.options(f"{locked}/completion", headers={"Origin": page["Origin"]})
    assert asked.status_code == 204
    assert "authorization" in asked.headers["access-control-allow-headers"]
    other = page | {"Origin": "https://other.example"}
    assert "access-control-allow-origin" not in httpx.get(f"{locked}/props", headers=other).headers


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403)],
)
def test_the_loopback_interface_answers_to_its_names_only(locked, host, status):
    found = httpx.get(f"{locked}/props", headers={"Host": host, "X-Api-Key": "third"})
    assert found.status_code == status


def test_slow_headers_and_silent_clients_hold_up_nobody(locked):
    host, port = locked.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    for one in silent[10:]:
        one.sendall(b"POST /completion HTTP/1.1\r\nContent-Length: 100\r\n")
    assert httpx.post(f"{locked}/completion", json=CALL, headers={"X-Api-Key": "third"}).is_success
    for one in silent:
        one.close()


def test_silent_connections_are_closed(locked, monkeypatch):
    monkeypatch.setattr("jaxsplit.server.run._REQUEST_SECONDS", 0.2)
    host, port = locked.removeprefix("http://").split(":")
    for begin in (b"", b"GET /health HTTP/1.1\r\nHost: local"):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(begin)
            assert connection.recv(1) == b""


def test_a_path_cannot_write_lines_of_the_log(locked, caplog):
    records = queue.SimpleQueue()  # a line may be written only after its response was read
    handler = QueueHandler(records)
    log = logging.getLogger("jaxsplit.server")
    log.addHandler(handler)
    try:
        with caplog.at_level("INFO", log.name):
            httpx.get(f"{locked}/x%0aFORGED%20LINE")
            while "FORGED LINE" not in (line := records.get(timeout=10).getMessage()):
                pass
    finally:
        log.removeHandler(handler)
    assert "/x\\nFORGED LINE" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key_file": "/nonexistent"}, "/nonexistent"),
        ({"api_key": ""}, "is empty"),
        ({"api_key": " ,"}, "is empty"),
        ({"ssl_key_file": "key.pem"}, "needed together"),
        ({"ssl_key_file": "/nonexistent", "ssl_cert_file": "/nonexistent"}, "ssl_key_file"),
        ({"chat_template_kwargs": "[]"}, "not a JSON object"),
        ({"chat_template_file": "/nonexistent"}, "/nonexistent"),
        ({"host": "203.0.113.1"}, "cannot listen on host=203.0.113.1, port=0"),
        ({"port": 70000}, "port"),
    ],
)
def test_settings_that_do_not_suit(options, message):
    with pytest.raises(JaxsplitError, match=re.escape(message)):
        settings = ServerConfig(**{"port": 0} | options)
        Server(Service(settings, SamplingConfig()), lambda: (None, ""))


def test_a_port_in_use(locked):
    port = int(locked.rpartition(":")[2])
    with pytest.raises(JaxsplitError, match=f"port={port}"):
        Server(Service(ServerConfig(port=port), SamplingConfig()), lambda: (None, ""))


def test_before_the_model_is_loaded(lm):
    go = threading.Event()

    def load():
        go.wait(60)
        return lm, "tiny.gguf"

    server = Server(Service(ServerConfig(port=0), SamplingConfig()), load)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        with httpx.Client(base_url=server.url) as http:
            health = http.get("/health")
            assert (health.status_code, health.json()) == (503, {"status": "loading"})
            early = http.post("/completion", json=CALL)
            assert early.status_code == 503
            assert "being loaded" in early.json()["error"]["message"]
            go.set()
            wait_until_ready(server)
            assert http.post("/completion", json=CALL).status_code == 200
    finally:
        go.set()
        server.stop()
        thread.join(30)


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise JaxsplitError("no such model")

    server = Server(Service(ServerConfig(port=0), SamplingConfig()), load)
    with pytest.raises(JaxsplitError, match="no such model"):
        server.run()


def start(path, *flags: str) -> subprocess.Popen:
    """`jaxsplit serve` as a process of its own."""
    environment = quick_environment() | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxsplit.serve", f"--model={path}", "--port=0", "--slots=2"]
    return subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )


def ready(process: subprocess.Popen) -> str:
    """Waits until it answers; returns its URL."""
    url, seen = "", []
    for line in process.stderr:
        seen.append(line)
        if line.startswith("listening on "):
            url = line.split()[-1]
        if line.endswith("ready\n"):
            return url
    raise AssertionError("".join(seen))


@pytest.fixture
def process(path):
    """A process that serves, and its URL."""
    with start(path) as process:
        try:
            yield process, ready(process)
        finally:
            process.kill()


def test_sigterm_finishes_what_runs(process):
    process, url = process
    long = {"prompt": "Hello", "n_predict": 240, "ignore_eos": True, "n_probs": 1}
    results = []
    thread = threading.Thread(
        target=lambda: results.append(httpx.post(f"{url}/completion", json=long, timeout=60))
    )
    with httpx.Client(base_url=url, timeout=60) as http:
        http.get("/health")
        thread.start()
        while not any(slot["is_processing"] for slot in http.get("/slots").json()):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        while (health := http.get("/health")).status_code == 200:
            time.sleep(0.01)
        assert health.json() == {"status": "draining"}
        assert http.post("/completion", json=CALL).status_code == 503
    thread.join(60)
    assert results[0].json()["tokens_predicted"] == 240
    assert process.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(process, number):
    process, _ = process
    process.send_signal(number)
    assert process.wait(20) == 0
    assert "Traceback" not in process.stderr.read()


def test_two_processes_serve_as_one(path, lm):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    one, other = start(path, *flags, "--process_id=0"), start(path, *flags, "--process_id=1")
    with one, other:
        try:
            url = ready(one)
            body = {"prompt": "Hello", "n_predict": 6, "temperature": 0}
            found = httpx.post(f"{url}/completion", json=body, timeout=60).json()
            assert found["content"] == lm.generate("Hello", 6, temperature=0.0)
            one.send_signal(signal.SIGTERM)
            assert one.wait(30) == 0
            assert other.wait(30) == 0
        finally:
            one.kill()
            other.kill()
