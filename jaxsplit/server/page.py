"""`/`: a page to chat in a browser."""

import functools
import importlib.resources

from jaxsplit.server.service import Service


async def index(service: Service) -> bytes:
    """A page to chat in a browser."""
    return _html()


@functools.cache
def _html() -> bytes:
    return importlib.resources.files("jaxsplit.server").joinpath("static/index.html").read_bytes()
