"""Errors as clients see them: a status and OpenAI's error object."""

import re

import msgspec
from starlette.responses import Response

from jaxsplit.errors import JaxsplitError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ErrorDetails(msgspec.Struct, kw_only=True):
    """OpenAI's error object, with llama.cpp's additions.

    Attributes:
      message: what was found, and what would work.
      type: the kind: by the status, but llama.cpp's of a prompt that is longer than the context.
      param: the field at fault.
      code: of some errors, a name for programs; else the status.
      n_prompt_tokens, n_ctx: of a prompt that is longer than the context.
    """

    message: str
    type: str
    param: str | None = None
    code: str | int | None = None
    n_prompt_tokens: int | msgspec.UnsetType = msgspec.UNSET
    n_ctx: int | msgspec.UnsetType = msgspec.UNSET


class ErrorResponse(msgspec.Struct):
    """The body of each response that is an error."""

    error: ErrorDetails


class ApiError(Exception):
    """A request that is refused or has failed.

    Args:
      status: of HTTP.
      message: what was found, and what would work.
      kind: `ErrorDetails.type`; None: by the status.
      param: the field at fault.
      code: a name for programs.
      headers: of the response.
      **details: more fields of `ErrorDetails`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        **details: int,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        kind = kind or _TYPES.get(status, _TYPES[400 if status < 500 else 500])
        self.body = ErrorResponse(
            ErrorDetails(message=message, type=kind, param=param, code=code or status, **details)
        )

    def response(self) -> Response:
        """What the client gets."""
        data = msgspec.json.encode(self.body)
        return Response(data, self.status, headers=self.headers, media_type="application/json")


def of_exception(error: BaseException) -> ApiError | None:
    """The error that a client sees; None: one that is not its fault, and says too much."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, JaxsplitError):
        return ApiError(400, str(error), param=_argument(str(error)))
    return None


def of_validation(error: msgspec.ValidationError | msgspec.DecodeError) -> ApiError:
    """A body that is not JSON, or not of the documented form."""
    message = str(error)
    if not isinstance(error, msgspec.ValidationError):
        return ApiError(400, f"the body is not valid JSON: {message}")
    found = re.search(r" - at `\$\.?(.*)`$", message)
    field = re.search(r"contains unknown field `(.*?)`|missing required field `(.*?)`", message)
    param = found[1] if found else None
    if field:
        name = field[1] or field[2]
        param = f"{param}.{name}" if param else name
        known = "is missing" if field[2] else "is not a field that this server knows; leave it out"
        message = f"{param} {known}"
    elif found:
        message = f"{param or 'the body'}: {message[: found.start()]}"
    return ApiError(400, message, param=param)


def _argument(message: str) -> str | None:
    found = re.match(r"([a-z_]+)=", message)
    return found[1] if found else None
