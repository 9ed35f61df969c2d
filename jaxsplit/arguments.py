"""Checks of what callers pass."""

import contextlib
import math
import operator
from typing import Any

import numpy as np

from jaxsplit.errors import JaxsplitError


def checked_number(name: str, value: Any, kind: type, low: float, high: float) -> int | float:
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
    if number is None or not math.isfinite(number) or not low <= number <= high:
        what = "a whole number" if kind is int else "a number"
        given = value if isinstance(value, int | float) else repr(value)
        between = f"between {low} and {high}" if high < math.inf else f"of at least {low}"
        if low == -math.inf:
            between = "that is finite"
        raise JaxsplitError(f"--{name}={given} is not {what} {between}")
    return number
