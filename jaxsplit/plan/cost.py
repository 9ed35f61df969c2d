"""What a stage's programs do, counted in the programs themselves, traced for a mesh that need not
exist."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsplit.engine import SamplingConfig
from jaxsplit.engine.runner import StageRunner, stage_cache
from jaxsplit.engine.sampling import SamplingPlan, SamplingValues
from jaxsplit.engine.steps import DecodeState
from jaxsplit.models import BlockConfig, ModelConfig, MoEConfig
from jaxsplit.ops.moe.tiles import tile_rows
from jaxsplit.sharding import Stage
from jaxsplit.sharding.axes import Axis
from jaxsplit.weights import abstract_decoder, parameters

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
    """Layers that are alike do the same work: one of each kind is traced, not all."""

    def work_of(kinds: Sequence[int]) -> Work:
        """Of a model with these of the stage's layers, the first and the last of the model."""
        layers = stage.layers
        blocks = [config.blocks[i] for i in kinds]
        before = config.blocks[:1] if layers.start > 0 else ()
        after = config.blocks[-1:] if layers.stop < config.layers else ()
        part = dataclasses.replace(stage, layers=range(len(before), len(before) + len(blocks)))
        some = dataclasses.replace(config, blocks=(*before, *blocks, *after))
        return _trace_layers(some, part, dtype, context, slots, length)

    groups: dict[BlockConfig, list[int]] = {}
    for i in stage.layers:
        groups.setdefault(config.blocks[i], []).append(i)
    if len(stage.layers) <= len(groups) + 1 or any(config.together):
        return work_of(stage.layers)
    once = [members[0] for members in groups.values()]
    work = base = work_of(once)
    for members in groups.values():
        if len(members) > 1:
            twice = work_of([*once, members[1]])
            work = work.plus(twice.plus(base, -1), len(members) - 1)
    return work


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
        shape = stage.padded(param.shape, param.axes)
        param.set_value(jax.ShapeDtypeStruct(shape, dtype))
    runner = StageRunner(model, stage, context, dtype)
    cache = jax.eval_shape(lambda: stage_cache(config, stage, slots, context, dtype))
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=np.dtype(np.int32))
    if length is not None:
        data = stage.mesh.shape["data"]
        x = ints((data, length)) if runner.first else runner.input(data, length)
        program = runner.prefill(length, all_logits=False)
        arguments = (runner.params, cache, x, *[ints((data,))] * 3)
    elif runner.last:
        sampling = SamplingConfig(temperature=0.0)
        state = DecodeState(
            ints((slots,)), ints((slots,)), jax.ShapeDtypeStruct((slots,), bool), ints((slots, 1))
        )
        x = None if runner.first else runner.input(slots, 1)
        values = SamplingValues.of([sampling] * slots)
        program = runner.finish(SamplingPlan.of(sampling, context))
        arguments = (runner.params, cache, x, state, np.zeros(1, np.int32), values)
    else:
        x = None if runner.first else runner.input(slots, 1)
        program, arguments = runner.relay(), (runner.params, cache, x, ints((slots, 2)))
    work = Work()
    for equation, times in _equations(jax.make_jaxpr(program)(*arguments).jaxpr):
        work = work.plus(_work_of(equation), times)
    tokens = slots // stage.mesh.shape["data"] if length is None else length
    return work.plus(_work_of_experts(config, stage, tokens, step=length is None))


def _equations(
    jaxpr: jax.extend.core.Jaxpr, times: int = 1
) -> Iterator[tuple[jax.extend.core.JaxprEqn, int]]:
    """All equations and how often they run, those of inner programs too.

    Of a choice between programs the first counts; a loop whose end is not known does not.
    """
    for equation in jaxpr.eqns:
        yield equation, times
        inner = list(equation.params.get("branches", equation.params.values()))
        if equation.primitive.name == "while":
            continue
        for value in inner[:1] if "branches" in equation.params else inner:
            value = getattr(value, "jaxpr", value)
            if hasattr(value, "eqns"):
                yield from _equations(value, times * equation.params.get("length", 1))


def _work_of_experts(config: ModelConfig, stage: Stage, tokens: int, *, step: bool) -> Work:
    """What experts do in loops that run as often as tokens choose them, if they choose evenly."""
    flops = 0.0
    for layer in stage.layers:
        mlp = config.blocks[layer].mlp
        moe = getattr(mlp, "moe", mlp)
        if not isinstance(moe, MoEConfig):
            continue
        experts = Axis("experts", moe.experts)
        pairs = tokens * moe.top_k
        if tile_rows(pairs, moe.experts, step=step) == 1 and stage.shards(experts) == 1:
            continue  # a loop of known length
        layout = stage.layout(Axis("expert_mlp", moe.expert.intermediate_size))
        hidden = layout.size // layout.devices
        matrices = 3 if moe.expert.gated else 2
        flops += 2 * pairs / stage.shards(experts) * matrices * config.embed * hidden
    return Work(round(flops))


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
