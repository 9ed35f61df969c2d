"""`/`: a page to chat in a browser, and its files."""

import functools
import importlib.resources

from jaxsplit.server.errors import ApiError
from jaxsplit.server.service import Service


async def index(service: Service) -> bytes:
    """A page to chat in a browser."""
    return _file("index.html")


async def style(service: Service, name: str) -> bytes:
    """A style sheet of the page.

    Raises:
      ApiError: it has none of this name.
    """
    return _file(f"{name}.css")


async def script(service: Service, name: str) -> bytes:
    """A script of the page.

    Raises:
      ApiError: it has none of this name.
    """
    return _file(f"{name}.js")


def _file(name: str) -> bytes:
    if name not in (files := _files()):
        raise ApiError(404, f"the page has no file {name!r}")
    return files[name]


@functools.cache
def _files() -> dict[str, bytes]:
    folder = importlib.resources.files("jaxsplit.server").joinpath("static")
    return {file.name: file.read_bytes() for file in folder.iterdir()}
