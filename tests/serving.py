"""A server in this process, for tests."""

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx

from jaxsplit.config import SamplingConfig
from jaxsplit.llm import LM
from jaxsplit.server.config import ServerConfig
from jaxsplit.server.run import Server
from jaxsplit.server.service import Service


@contextlib.contextmanager
def serving(lm: LM, *, sampling: SamplingConfig | None = None, **options) -> Iterator[Server]:
    """Serves a model on a free port of the loopback interface while the block runs."""
    sampling = SamplingConfig(seed=1) if sampling is None else sampling
    service = Service(ServerConfig(port=0, **options), sampling)
    server = Server(service, lambda: (lm, "tiny.gguf"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until_ready(server)
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def wait_until_ready(server: Server, seconds: float = 120) -> None:
    """Waits for `/health` to say so."""
    verify = server.url.startswith("http://")
    end = time.monotonic() + seconds
    while httpx.get(f"{server.url}/health", verify=verify, timeout=30).status_code != 200:
        assert time.monotonic() < end, "the server is not ready"
        time.sleep(0.05)
