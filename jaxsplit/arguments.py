"""Checks of what callers pass."""

import contextlib
import math
import operator
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxsplit.errors import JaxsplitError


def checked_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """An argument's value, if it is one of those supported.

    Raises:
      JaxsplitError: it is not; the message lists them.
    """
    if not isinstance(value, str) or value not in choices:
        raise JaxsplitError(f"{name}={value} is not supported; supported are {', '.join(choices)}")
    return value


def checked_bool(name: str, value: Any) -> bool:
    """An argument's value, if it is a truth value.

    Raises:
      JaxsplitError: it is of another type, such as the text "false".
    """
    if not isinstance(value, bool | np.bool_):
        raise JaxsplitError(f"{name}={value!r} must be true or false")
    return bool(value)


def checked_number(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    """An argument's value as an `int` or `float` between two bounds.

    Args:
      name: of the argument.
      value: what was given; NumPy's numbers will do, texts and truth values will not.
      kind: `int` or `float`.
      low, high: the least and the largest value that will do.

    Raises:
      JaxsplitError: it is of another type, not finite or out of bounds.
    """
    number = None
    if not isinstance(value, str | bytes | bool | np.bool_ | None):
        convert = operator.index if kind is int else float
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            number = convert(value)
    if number is None or not low <= number <= high or abs(number) == math.inf:
        what = "a whole number" if kind is int else "a number"
        given = value if isinstance(value, int | float) else repr(value)
        if high < math.inf:
            what += f" between {low} and {high}"
        elif low > -math.inf:
            what += f" of at least {low}"
        raise JaxsplitError(f"{name}={given} is not {what}")
    return number
