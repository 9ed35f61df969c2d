"""Type-checked access to the tokenizer's keys of a GGUF file."""

import reprlib
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from jaxsplit.errors import JaxsplitError

_NAMES = {str: "a string", bool: "a bool", int: "an integer", float: "a number"}
_DAMAGED = "the file is damaged, convert the model again"


def get(metadata: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    """The value of a key, or the default if the file does not have the key.

    Args:
        metadata: GGUF keys to plain Python values. Strings contain bytes that are not UTF-8 as
            surrogate escapes.
        kind: `str`, `bool` (0 and 1 are accepted), `int`, `float` (integers are accepted), or a
            list of one of these, such as `list[str]`.

    Raises:
        JaxsplitError: the value has the wrong type, or is NaN.
    """
    value = metadata.get(key)
    if value is None:
        return default
    if kind in _NAMES:
        if not _are([value], kind):
            raise _wrong(key, value, _NAMES[kind])
        return value
    (kind,) = typing.get_args(kind)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _wrong(key, value, f"a list of {_NAMES[kind].split()[1]}s")
    if not _are(value, kind):
        at = next(i for i, item in enumerate(value) if not _are([item], kind))
        raise _wrong(f"{key}[{at}]", value[at], _NAMES[kind])
    return value


def require(metadata: Mapping[str, Any], key: str, kind: Any) -> Any:
    """As `get`, for a key that every tokenizer needs."""
    value = get(metadata, key, kind)
    if value is None:
        raise JaxsplitError(f"{key} is missing from the file: only token ids can be used with it")
    return value


def check_length(key: str, values: Sequence[Any], tokens: int) -> None:
    """Checks that a list has a value for each token of the vocabulary."""
    if len(values) != tokens:
        raise JaxsplitError(
            f"{key} has {len(values)} values, but the vocabulary has {tokens} tokens: {_DAMAGED}"
        )


def get_token_id(
    metadata: Mapping[str, Any], name: str, tokens: int, default: int | None = None
) -> int | None:
    """The id of a special token, from `tokenizer.ggml.NAME_token_id`.

    An id outside the vocabulary, such as -1 or 4294967295, means that there is no such token.

    Raises:
        JaxsplitError: the value is not an integer.
    """
    id = get(metadata, f"tokenizer.ggml.{name}_token_id", int, default)
    return id if id is not None and 0 <= id < tokens else None


def token_bytes(text: str) -> bytes:
    """The bytes of a string of the file, which need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def _are(values: Sequence[Any], kind: type) -> bool:
    """Whether all values have a type. Checks each distinct type once, as vocabularies are long."""
    types = set(map(type, values))
    if kind is bool:
        return all(issubclass(t, Integral) for t in types) and {*values} <= {0, 1}
    base = {str: str, int: Integral, float: Real}[kind]
    if any(issubclass(t, bool) or not issubclass(t, base) for t in types):
        return False
    if kind is float:
        return all(value == value for value in values)  # NaN differs from itself.
    return kind is int or _is_text("".join(values))


def _is_text(text: str) -> bool:
    """Whether all surrogates are escaped bytes; no file can contain others."""
    try:
        token_bytes(text)
    except UnicodeEncodeError:
        return False
    return True


def _wrong(key: str, value: Any, expected: str) -> JaxsplitError:
    return JaxsplitError(f"{key} is {reprlib.repr(value)}, but must be {expected}: {_DAMAGED}")
