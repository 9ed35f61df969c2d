"""Element-wise functions of JAX as CUDA C++."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")

_PRIMITIVES: dict[str, str] = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "fabsf({0})",
    "exp": "expf({0})",
    "log": "logf({0})",
    "expm1": "expm1f({0})",
    "log1p": "log1pf({0})",
    "tanh": "tanhf({0})",
    "erf": "erff({0})",
    "erfc": "erfcf({0})",
    "logistic": "1 / (1 + expf(-{0}))",
    "sqrt": "sqrtf({0})",
    "square": "{0} * {0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "select_n": "{0} ? {2} : {1}",
    "copy": "{0}",
    "stop_gradient": "{0}",
}
"""C++ of primitives, given their operands."""


def expression(function: Callable[..., Any], names: Sequence[str]) -> list[str] | None:
    """Statements that compute a function, of which the last returns its value.

    Args:
      function: of float32 scalars, to one.
      names: C++ variables that hold its arguments.

    Returns:
      None: it needs more than the table has.
    """
    like = [jax.ShapeDtypeStruct((), jnp.float32)] * len(names)
    traced = jax.make_jaxpr(function)(*like)
    lines: list[str] = []
    try:
        [value] = _statements(traced.jaxpr, traced.consts, names, lines)
    except KeyError:
        return None
    return [*lines, f"return {value};"]


def _statements(
    jaxpr: Any, constants: Sequence[Any], arguments: Sequence[str], lines: list[str]
) -> list[str]:
    """Adds the statements of a traced function; the names of its results."""
    known = dict(zip(jaxpr.invars, arguments, strict=True))
    known |= {v: _number(c) for v, c in zip(jaxpr.constvars, constants, strict=True)}

    def name(atom: Any) -> str:
        return _number(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in jaxpr.eqns:
        primitive, inputs = equation.primitive.name, [name(x) for x in equation.invars]
        if primitive in _CALLS:
            inner = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
            results = _statements(inner.jaxpr, inner.consts, inputs, lines)
            known |= dict(zip(equation.outvars, results, strict=True))
            continue
        if primitive == "integer_pow":
            text = " * ".join(inputs * equation.params["y"]) if equation.params["y"] > 0 else None
        elif primitive == "convert_element_type":
            text = inputs[0] if equation.outvars[0].aval.dtype in (jnp.float32, bool) else None
        else:
            text = _PRIMITIVES[primitive].format(*inputs)
        if text is None:
            raise KeyError(primitive)
        [result] = equation.outvars
        kind = "bool" if result.aval.dtype == bool else "float"
        known[result] = f"t{len(lines)}"
        lines.append(f"{kind} t{len(lines)} = {text};")
    return [name(x) for x in jaxpr.outvars]


def _number(value: Any) -> str:
    number = float(value)
    if not math.isfinite(number):
        raise KeyError(str(number))
    return f"({number!r}f)"
