"""The server's life: it listens, loads, compiles, answers, drains, ends."""

import logging
import signal
import socket
import ssl
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import jax
import uvicorn

from jaxsplit.errors import JaxsplitError
from jaxsplit.llm import LM
from jaxsplit.paths import user_path
from jaxsplit.server.app import make_app
from jaxsplit.server.config import ServerConfig
from jaxsplit.server.service import Service

_LOG = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005
"""For which a thread may run Python code while another waits; by default, 5 ms."""

_REQUEST_SECONDS = 60
"""In which the first request of a connection has to begin."""


class Server(uvicorn.Server):
    """Serves a model until the process is told to end, or `stop` is called.

    SIGTERM and SIGINT have it finish what runs and refuse the rest; a second one ends it at once.

    Args:
      service: its settings.
      load: loads the model; returns it and its file's path.

    Attributes:
      url: where it listens.

    Raises:
      JaxsplitError: it cannot listen there.
    """

    def __init__(self, service: Service, load: Callable[[], tuple[LM, str]]):
        self._service, self._load, self._app = service, load, make_app(service)
        self._failure: BaseException | None = None
        self._opened: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()
        config, tls = service.config, _tls(service.config)
        super().__init__(
            uvicorn.Config(
                self._app,
                host=config.host,
                port=config.port,
                log_level="critical",
                access_log=False,
                lifespan="off",
                server_header=False,
                limit_concurrency=config.max_connections,
                timeout_graceful_shutdown=1,
                **tls,
            )
        )
        try:
            self.config.load()
        except (OSError, ssl.SSLError, ValueError) as error:
            raise JaxsplitError(f"ssl_key_file, ssl_cert_file: {error}") from None
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._socket = socket.create_server((config.host, config.port), family=family)
        except OSError as error:
            raise JaxsplitError(
                f"cannot listen on host={config.host}, port={config.port}: {error.strerror}; try "
                "another port"
            ) from None
        name = f"[{config.host}]" if ":" in config.host else config.host
        port = self._socket.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://{name}:{port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves; the model is loaded meanwhile.

        Raises:
          JaxsplitError: it cannot be loaded.
        """
        # The engine's thread, which has little to do but often, waits for the others this long.
        sys.setswitchinterval(_SWITCH_SECONDS)
        threading.Thread(target=self._prepare, daemon=True).start()
        super().run(sockets=sockets or [self._socket])
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ends it at once; on any thread."""
        self._service.state = "draining"
        for running in list(self._service.active):
            running.cancel()
        self.should_exit = True

    def _prepare(self) -> None:
        """Loads and compiles."""
        try:
            lm, path = self._load()
            self._service.set_model(lm, path)
            _compile(lm, self._service)
            self._service.set_ready()
            _LOG.info("%s | ready", lm.describe())
        except BaseException as error:
            self._failure = error
            self.should_exit = True

    def handle_exit(self, sig: int, frame: Any) -> None:
        """On a signal: the first one drains, the second one ends."""
        if self._service.state != "ok" or not self._app.active:
            self.stop()
            return
        self._service.state = "draining"
        name, count = signal.Signals(sig).name, self._app.active
        _LOG.info("%s: finishing %d requests; once more ends them", name, count)

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        self._close_silent()
        if self._service.state == "draining" and not self._app.active:
            self.should_exit = True
        return await super().on_tick(counter)

    def _close_silent(self) -> None:
        """Closes connections on which no request has come in time: uvicorn has no such limit."""
        now = time.monotonic()
        for connection in list(self.server_state.connections):
            since = self._opened.setdefault(connection, now)
            if getattr(connection, "cycle", None) is None and now - since > _REQUEST_SECONDS:
                connection.transport.close()


def _tls(config: ServerConfig) -> dict[str, Any]:
    """Settings of uvicorn."""
    key, certificate = config.ssl_key_file, config.ssl_cert_file
    if key is None and certificate is None:
        return {}
    if key is None or certificate is None:
        raise JaxsplitError("ssl_key_file and ssl_cert_file are needed together")
    return {
        "ssl_keyfile": str(user_path(key, "ssl_key_file")),
        "ssl_certfile": str(user_path(certificate, "ssl_cert_file")),
    }


def _compile(lm: LM, service: Service) -> None:
    """Compiles what the first requests need: for one sequence, and for as many as there are."""
    ids = [0] * min(8, lm.engine.context - 2)
    for count in (1, lm.engine.slots):
        running = [
            lm.submit([*ids, i % lm.config.vocab], 4, ignore_eos=True, sampling=service.sampling)
            for i in range(count)
        ]
        for generation in running:
            generation.result()
    lm.submit(ids, 2, ignore_eos=True, temperature=0.0).result()
    if jax.process_count() == 1:
        lm.run(lm.engine.wait_for_programs)
