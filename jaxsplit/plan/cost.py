"""Cost of a stage's programs, counted in their jaxprs, which are traced for a mesh that need not
exist."""

# Shapes stand in for arrays, and the values of a jaxpr have shapes.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn

from jaxsplit.engine import SamplingConfig
from jaxsplit.engine.runner import CacheSize, StageRunner, decode_state, stage_cache
from jaxsplit.engine.sampling import SamplerParams, SamplerSpec
from jaxsplit.engine.steps import PrefillChunk, Rows, SlotParams
from jaxsplit.models import BlockConfig, ModelConfig, MoEConfig
from jaxsplit.ops.moe.tiles import tile_rows
from jaxsplit.sharding import Stage
from jaxsplit.sharding.axes import Axis
from jaxsplit.weights import abstract_decoder, parameters

_COLLECTIVES = {"psum": "all-reduce", "psum_invariant": "all-reduce", "all_gather": "all-gather"}


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """Cost of a program on one device.

    Attributes:
      flops: of matmuls, two for each multiply-add.
      collectives: number of each kind: `all-reduce`, `all-gather`.
      collective_bytes: bytes of each kind's results on every device.
    """

    flops: int = 0
    collectives: Counter = dataclasses.field(default_factory=Counter)
    collective_bytes: Counter = dataclasses.field(default_factory=Counter)

    def plus(self, other: "ProgramCost", times: int = 1) -> "ProgramCost":
        """This cost plus `times` the other; `times` may be negative."""

        def add(a: Counter, b: Counter) -> Counter:
            return Counter({kind: n for kind in {*a, *b} if (n := a[kind] + times * b[kind])})

        return ProgramCost(
            self.flops + times * other.flops,
            add(self.collectives, other.collectives),
            add(self.collective_bytes, other.collective_bytes),
        )


def trace_decode(
    config: ModelConfig, stage: Stage, dtype: jnp.dtype, context: int, slots: int
) -> ProgramCost:
    """Cost of a decode step of `slots` sequences."""
    return _trace(config, stage, dtype, context, slots=slots)


def trace_prefill(
    config: ModelConfig, stage: Stage, dtype: jnp.dtype, context: int, length: int
) -> ProgramCost:
    """Cost of reading a chunk of a prompt of `length` tokens on each data replica."""
    return _trace(config, stage, dtype, context, slots=stage.mesh.shape["data"], length=length)


def _trace(
    config: ModelConfig,
    stage: Stage,
    dtype: jnp.dtype,
    context: int,
    *,
    slots: int,
    length: int | None = None,
) -> ProgramCost:
    """Traces one or two layers of each config and extrapolates to all of the stage."""

    def cost_of(indices: Sequence[int]) -> ProgramCost:
        """Cost of some of the stage's layers, in a model with its first and last layers."""
        layers = stage.layers
        blocks = [config.blocks[i] for i in indices]
        before = config.blocks[:1] if layers.start > 0 else ()
        after = config.blocks[-1:] if layers.stop < config.layers else ()
        some = dataclasses.replace(config, blocks=(*before, *blocks, *after))
        run = range(len(before), len(before) + len(blocks))
        some_stage = dataclasses.replace(stage, layers=run)
        return _trace_layers(some, some_stage, dtype, context, slots=slots, length=length)

    layers_of: dict[BlockConfig, list[int]] = {}
    for i in stage.layers:
        layers_of.setdefault(config.blocks[i], []).append(i)
    if len(stage.layers) <= len(layers_of) + 1 or any(config.colocated_layers):
        return cost_of(stage.layers)
    once = [layers[0] for layers in layers_of.values()]
    cost = base = cost_of(once)
    for layers in layers_of.values():
        if len(layers) > 1:
            twice = cost_of([*once, layers[1]])
            cost = cost.plus(twice.plus(base, -1), len(layers) - 1)
    return cost


def _trace_layers(
    config: ModelConfig,
    stage: Stage,
    dtype: jnp.dtype,
    context: int,
    *,
    slots: int,
    length: int | None,
) -> ProgramCost:
    """Traces a decode step, or with a `length` the prefill of a chunk."""
    model = abstract_decoder(config, dtype, stage.layers)
    for param in parameters(model).values():
        shape = stage.padded(param.shape, param.axes)
        param.set_value(jax.ShapeDtypeStruct(shape, dtype))
    data = stage.mesh.shape["data"]
    size = CacheSize.of_slots(context, slots // data)
    runner = StageRunner(model, stage, size, dtype)
    cache = jax.eval_shape(lambda: stage_cache(config, stage, size, dtype))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.dtype(np.int32))

    def rows(count: int) -> Rows:
        return Rows(ints((count,)), ints((count,)), ints((count, size.pages_per_sequence)))

    if length is not None:
        x = ints((data, length)) if runner.first else runner.input_shape(data, length)
        program = runner.prefill(1, length)
        chunk = PrefillChunk(ints((data,)), ints((data,)), rows(data))
        arguments = (runner.params, cache, x, chunk, None)
    elif runner.last:
        sampling = SamplingConfig(temperature=0.0)
        state = jax.eval_shape(lambda: decode_state(slots, context))
        x = None if runner.first else runner.input_shape(slots, 1)
        params = SlotParams(
            SamplerParams.of([sampling] * slots), np.zeros((slots, 1), np.int32), ints((slots,))
        )
        program = runner.decode_and_sample(SamplerSpec.of(sampling, context))
        arguments = (runner.params, cache, x, state, rows(slots), params)
    else:
        x = None if runner.first else runner.input_shape(slots, 1)
        program = runner.decode_layers()
        arguments = (runner.params, cache, x, ints((slots, 2)), rows(slots))
    cost = ProgramCost()
    for equation, times in _equations(jax.make_jaxpr(program)(*arguments).jaxpr):
        cost = cost.plus(_equation_cost(equation), times)
    tokens = slots // data if length is None else length
    return cost.plus(_expert_cost(config, stage, tokens, step=length is None))


def _equations(jaxpr: Jaxpr, times: int = 1) -> Iterator[tuple[JaxprEqn, int]]:
    """All equations with their trip counts, inner jaxprs included.

    Of a `cond`, the last branch counts, which is the most general one; `while` loops are skipped,
    as their trip count is unknown.
    """
    for equation in jaxpr.eqns:
        yield equation, times
        inner = list(equation.params.get("branches", equation.params.values()))
        if equation.primitive.name == "while":
            continue
        for value in inner[-1:] if "branches" in equation.params else inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from _equations(value, times * equation.params.get("length", 1))


def _expert_cost(config: ModelConfig, stage: Stage, tokens: int, *, step: bool) -> ProgramCost:
    """Cost of the experts' `while` loops, if the router spreads tokens evenly."""
    flops = 0.0
    for layer in stage.layers:
        mlp = config.blocks[layer].mlp
        moe = getattr(mlp, "moe", mlp)
        if not isinstance(moe, MoEConfig):
            continue
        experts = Axis("experts", moe.experts)
        pairs = tokens * moe.top_k
        if tile_rows(pairs, moe.experts, decode=step) == 1 and stage.shards(experts) == 1:
            continue  # a loop with a known trip count
        layout = stage.layout(Axis("expert_mlp", moe.expert.intermediate_size))
        assert layout is not None  # the axis has units
        hidden = layout.size // layout.devices
        matrices, width = 3 if moe.expert.gated else 2, moe.latent or config.embed
        flops += 2 * pairs / stage.shards(experts) * matrices * width * hidden
    return ProgramCost(round(flops))


def _equation_cost(equation: JaxprEqn) -> ProgramCost:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        depth = math.prod(left[axis] for axis in contracted)
        return ProgramCost(2 * depth * math.prod(equation.outvars[0].aval.shape))
    if name in _COLLECTIVES:
        avals = [variable.aval for variable in equation.outvars]
        size = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals)
        kind = _COLLECTIVES[name]
        return ProgramCost(0, Counter({kind: len(avals)}), Counter({kind: size}))
    return ProgramCost()
