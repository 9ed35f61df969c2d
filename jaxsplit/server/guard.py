"""What stands before all endpoints: who may ask, from where, how much; the access log."""

import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import os_errors, user_path
from jaxsplit.server.config import ServerConfig
from jaxsplit.server.errors import ApiError
from jaxsplit.server.service import Service

_LOG = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/health", "/v1/health")
"""Paths that need no key."""

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Own files only, no inline scripts, and no HTML from text: what a model writes cannot run."""


class Guard:
    """Middleware. Without `allowed_hosts`, a server on the loopback interface answers to its names
    only: else a page of another origin could reach it by a name of its own that leads here.

    Args:
      app: what it guards.
      service: the server's state.

    Raises:
      JaxsplitError: a key is empty, or the file of keys cannot be read.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service, config = app, service, service.config
        self._keys = [hashlib.sha256(key.encode()).digest() for key in _keys(config)]
        hosts = _listed(config.allowed_hosts)
        if not hosts and config.host in _LOOPBACK:
            hosts = list(_LOOPBACK)
        self._hosts = None if not hosts or "*" in hosts else {host.lower() for host in hosts}
        self._origins = _listed(config.cors_origins)
        if not self._keys and config.host not in _LOOPBACK:
            _LOG.warning(
                "anybody who reaches %s may use this server; api_key_file= protects it", config.host
            )
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        self.active += 1

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(headers)]
            await send(message)

        try:
            response = self._refusal(scope, headers)
            if response is not None:
                await response(scope, receive, send_noted)
            else:
                await self._app(scope, self._limited(receive), send_noted)
        finally:
            self.active -= 1
            seconds = time.perf_counter() - started
            client = (scope.get("client") or ["-"])[0]
            path = scope["path"].encode("unicode_escape").decode()  # one line, whatever it is
            line = f"{client} {scope['method']} {path} {status or 'gone'} {seconds:.3f} s"
            if scope["path"] not in (*_OPEN, "/metrics"):
                _LOG.info(line)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The response to a request that is not let in; None: it is."""
        host = _without_port(headers.get("host", ""))
        if self._hosts is not None and host not in self._hosts:
            return ApiError(
                403,
                f"this server does not answer to the name {host!r}; --allowed_hosts says to which "
                "it does",
            ).response()
        if scope["method"] == "OPTIONS" and self._origin(headers):
            return Response(status_code=204)
        if self._keys and scope["path"] not in _OPEN and not self._knows(headers):
            message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            response = ApiError(401, message, code="invalid_api_key").response()
            # Chromium takes no more than one challenge from a header.
            for challenge in ("Bearer", 'Basic realm="the API key as password"'):
                response.headers.append("WWW-Authenticate", challenge)
            return response
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._most_bytes:
            return self._too_large().response()
        return None

    # Keys

    def _knows(self, headers: Headers) -> bool:
        """Whether a request has a key: as bearer token, in `X-Api-Key`, or as password, as which
        browsers send it."""
        given = [headers.get("x-api-key", "")]
        kind, _, rest = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            given.append(rest.strip())
        elif kind.lower() == "basic":
            with contextlib.suppress(binascii.Error, UnicodeDecodeError):
                given.append(base64.b64decode(rest).decode().partition(":")[2])
        digests = [hashlib.sha256(key.encode("utf-8", "replace")).digest() for key in given]
        # Digests, so that the time says nothing.
        return any(hmac.compare_digest(a, b) for a in digests for b in self._keys)

    # Limits

    @property
    def _most_bytes(self) -> int:
        return self._service.config.max_body << 20

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body is larger than {self._service.config.max_body} MiB (--max_body)"
        )

    def _limited(self, receive: Receive) -> Receive:
        """Counts the bytes of a body."""
        left = self._most_bytes

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise self._too_large()
            return message

        return counted

    # Headers

    def _origin(self, headers: Headers) -> str | None:
        """The origin of a request, if its pages may use the server."""
        origin = headers.get("origin")
        return origin if origin in self._origins or (origin and "*" in self._origins) else None

    def _headers(self, headers: Headers) -> Iterable[tuple[bytes, bytes]]:
        """Headers of each response."""
        yield b"x-content-type-options", b"nosniff"
        yield b"content-security-policy", _PAGE_POLICY.encode()
        if (origin := self._origin(headers)) is not None:
            yield b"access-control-allow-origin", origin.encode("latin-1")
            yield b"access-control-allow-headers", b"authorization, content-type, x-api-key"
            yield b"access-control-allow-methods", b"GET, POST, OPTIONS"
            yield b"vary", b"origin"


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _without_port(host: str) -> str:
    """The name in a `Host` header, in lower case; of IPv6 addresses without brackets."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name.strip("[]").lower()


def _keys(config: ServerConfig) -> list[str]:
    keys = _listed(config.api_key)
    if config.api_key is not None and not keys:
        raise JaxsplitError(f"api_key={config.api_key!r} is empty; give a key, or leave it out")
    if config.api_key_file is not None:
        file = user_path(config.api_key_file, "api_key_file")
        with os_errors(file):
            lines = file.read_text("utf-8", "replace").split("\n")
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise JaxsplitError(f"api_key_file={config.api_key_file} has no key in it")
    return keys
