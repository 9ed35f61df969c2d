"""What a stage's programs do, counted in the programs themselves, traced for a mesh that need not
exist."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsplit.engine import SamplingConfig
from jaxsplit.engine.runner import StageRunner, stage_cache
from jaxsplit.engine.sampling import SamplingValues
from jaxsplit.engine.steps import DecodeState
from jaxsplit.models import ModelConfig
from jaxsplit.parallel import Stage
from jaxsplit.sources import abstract_decoder, abstract_parameters, parameters

_COLLECTIVES = {"psum": "all-reduce", "psum_invariant": "all-reduce", "all_gather": "all-gather"}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a program.

    Attributes:
      flops: of matrix products, two for each multiplication.
      collectives: how many of each kind: `all-reduce`, `all-gather`.
      collective_bytes: bytes of what each kind gives to every device.
    """

    flops: int = 0
    collectives: Counter = dataclasses.field(default_factory=Counter)
    collective_bytes: Counter = dataclasses.field(default_factory=Counter)

    def plus(self, other: "Work", times: int = 1) -> "Work":
        """This and so many times the other; the times may be negative."""

        def add(a: Counter, b: Counter) -> Counter:
            return Counter({kind: n for kind in {*a, *b} if (n := a[kind] + times * b[kind])})

        return Work(
            self.flops + times * other.flops,
            add(self.collectives, other.collectives),
            add(self.collective_bytes, other.collective_bytes),
        )


def trace_decode(
    config: ModelConfig, stage: Stage, dtype: jnp.dtype, context: int, slots: int
) -> Work:
    """The work of a decode step; `slots` is how many are in the stage at a time."""
    return _trace(config, stage, dtype, context, slots, None)


def trace_prefill(
    config: ModelConfig, stage: Stage, dtype: jnp.dtype, context: int, length: int
) -> Work:
    """The work of reading a chunk of a prompt."""
    return _trace(config, stage, dtype, context, stage.mesh.shape["data"], length)


def _trace(
    config: ModelConfig,
    stage: Stage,
    dtype: jnp.dtype,
    context: int,
    slots: int,
    length: int | None,
) -> Work:
    """Layers that are alike do the same work: two of them are traced, not all."""
    layers = stage.layers
    if len(layers) <= 2 or not _alike(config):
        return _trace_layers(config, stage, dtype, context, slots, length)
    before, after = layers.start > 0, layers.stop < config.layers
    one, two = (
        _trace_layers(
            dataclasses.replace(config, layers=before + count + after),
            dataclasses.replace(stage, layers=range(int(before), before + count)),
            dtype,
            context,
            slots,
            length,
        )
        for count in (1, 2)
    )
    return one.plus(two.plus(one, -1), len(layers) - 1)


@functools.cache
def _alike(config: ModelConfig) -> bool:
    """Whether all layers have the same parameters."""
    layers: dict[str, set] = {}
    for path, param in abstract_parameters(config).items():
        name, _, rest = path.partition(".")
        if name == "blocks":
            number, _, leaf = rest.partition(".")
            layers.setdefault(number, set()).add((leaf, param.shape))
    return all(layer == layers["0"] for layer in layers.values())


def _trace_layers(
    config: ModelConfig,
    stage: Stage,
    dtype: jnp.dtype,
    context: int,
    slots: int,
    length: int | None,
) -> Work:
    model = abstract_decoder(config, dtype, stage.layers)
    for param in parameters(model).values():
        shape = [
            stage.layouts[axis].size if axis in stage.layouts else size
            for axis, size in zip(param.axes, param.shape, strict=True)
        ]
        param.set_value(jax.ShapeDtypeStruct(tuple(shape), dtype))
    runner = StageRunner(model, stage, context)
    cache = jax.eval_shape(lambda: stage_cache(config, stage, slots, context, dtype))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.dtype(np.int32))
    if length is not None:
        data = stage.mesh.shape["data"]
        x = ints((data, length)) if runner.first else runner.output(data, length)
        program = runner.prefill(length, all_logits=False)
        arguments = (runner.params, cache, x, *[ints((data,))] * 3)
    elif runner.last:
        sampling = SamplingConfig(temperature=0.0)
        state = DecodeState(
            ints((slots,)), ints((slots,)), jax.ShapeDtypeStruct((slots,), bool), ints((slots, 1))
        )
        x = None if runner.first else runner.output(slots, 1)
        values = SamplingValues.of([sampling] * slots)
        program = runner.finish(sampling.plan)
        arguments = (runner.params, cache, x, state, np.zeros(1, np.int32), values)
    else:
        x = None if runner.first else runner.output(slots, 1)
        program, arguments = runner.relay(), (runner.params, cache, x, ints((slots, 2)))
    work = Work()
    for equation in _equations(jax.make_jaxpr(program)(*arguments).jaxpr):
        work = work.plus(_work_of(equation))
    return work


def _equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All equations, those of inner programs too; of a choice between programs, of the first."""
    for equation in jaxpr.eqns:
        yield equation
        inner = equation.params.get("branches", list(equation.params.values()))
        for value in inner[:1] if "branches" in equation.params else inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from _equations(value)


def _work_of(equation: jax.extend.core.JaxprEqn) -> Work:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return Work(2 * depth * math.prod(equation.outvars[0].aval.shape))
    if name in _COLLECTIVES:
        avals = [variable.aval for variable in equation.outvars]
        size = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
        kind = _COLLECTIVES[name]
        return Work(0, Counter({kind: len(avals)}), Counter({kind: size}))
    return Work()
