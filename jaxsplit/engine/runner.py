"""The compiled programs of one stage."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsplit.cache.contiguous import Cache, init_cache
from jaxsplit.comm import two_shot
from jaxsplit.comm.one_shot import Peers
from jaxsplit.comm.p2p import Ring
from jaxsplit.comm.symmetric_memory import make_mailboxes
from jaxsplit.context import DEFAULT_POLICY, MatmulPolicy, forward_context
from jaxsplit.engine import steps
from jaxsplit.engine.chunked_prefill import CHUNKS
from jaxsplit.engine.sampling import SamplingPlan
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.sharding import Stage
from jaxsplit.sharding.axes import SLOTS, Axis

_IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"
"""What becomes part of a CUDA graph: XLA's own choice, and loops, which then need no host."""

_REPLICATED = PartitionSpec()


def compiler_options(platform: str | None, *, decode: bool) -> dict[str, Any] | None:
    """Options of the programs that run the layers, for a platform."""
    if platform == "cpu" and decode:
        # XLA:CPU's library for reductions takes them out of the fused loop over quantized weights.
        return {"xla_cpu_experimental_ynn_fusion_type": ""}
    if platform in ("gpu", "cuda") and decode:
        # A loop that is all there is becomes a graph too.
        return {"xla_gpu_enable_command_buffer": _IN_GRAPHS, "xla_gpu_graph_min_graph_size": 1}
    return None


def _shortest(spec: PartitionSpec) -> PartitionSpec:
    """A spec as programs return it: another spelling would compile them a second time."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _exchanged(config: ModelConfig, context: int) -> int:
    """Numbers of which devices exchange sums in kernels."""
    return min(context, max(CHUNKS)) * config.embed


def mailbox_bytes(config: ModelConfig, context: int, devices: int) -> int:
    """Of each of so many devices whose kernels exchange numbers."""
    return two_shot.mailbox_bytes(devices, _exchanged(config, context))


def stage_cache(
    config: ModelConfig, stage: Stage, slots: int, context: int, dtype: jnp.dtype
) -> Cache:
    """The empty cache of a stage's layers, of all its devices together."""
    layers = config.cache(context, dtype, stage.layers)
    return init_cache(layers, slots, lambda array: stage.padded(array.shape, array.axes))


def cache_specs(config: ModelConfig, stage: Stage, context: int, dtype: jnp.dtype) -> Any:
    """How a stage's cache lies on its devices."""
    layers = config.cache(context, dtype, stage.layers)
    return jax.tree.map(lambda array: _shortest(stage.spec(array.all_axes)), layers)


@dataclasses.dataclass
class _Program:
    """A function of the devices' mailboxes and of arguments, which always have the same shapes.

    Attributes:
      function: compiled when it is first called.
      mailboxes: of the devices, or None.
      executable: it, if it was compiled before that.
    """

    function: Any
    mailboxes: jax.Array | None
    executable: Callable | None = None

    def __call__(self, *arguments: Any) -> Any:
        return (self.executable or self.function)(self.mailboxes, *arguments)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        return self.function.trace(self.mailboxes, *arguments)

    def compile(self, *arguments: Any) -> None:
        """Compiles it for such arguments, or ones that have their shapes and shardings."""
        self.executable = self.trace(*arguments).lower().compile()


def compile_together(programs: Sequence[Callable], arguments: Callable[[int], tuple]) -> None:
    """Compiles the programs of several stages at the same time, those of this process that are not
    yet, for the arguments of each stage."""
    left = [
        (i, program)
        for i, program in enumerate(programs)
        if isinstance(program, _Program) and program.executable is None
    ]
    if left:
        with ThreadPoolExecutor(len(left)) as threads:
            list(threads.map(lambda one: one[1].compile(*arguments(one[0])), left))


class StageRunner:
    """A run of layers on its devices, as functions from arrays to arrays.

    Programs are compiled when they are first called. Where this process has no device in the stage
    they do nothing and return None.

    Args:
      model: the decoder, its parameters on the stage's mesh.
      stage: the devices and how the layers lie on them.
      context: tokens that a slot can hold.
      cache_dtype: of keys and values.
      policy: of products with quantized matrices.
      vocab: only token ids below this may be chosen; None: all of the model's.
      peer_access: where devices run kernels, these exchange numbers, if the devices can.
    """

    def __init__(
        self,
        model: Decoder,
        stage: Stage,
        context: int,
        cache_dtype: jnp.dtype,
        policy: MatmulPolicy = DEFAULT_POLICY,
        *,
        vocab: int | None = None,
        peer_access: bool = True,
    ):
        self.stage = stage
        self.policy = policy
        self.context = context
        self.cache_dtype = cache_dtype
        self.config = model.config
        self.vocab = self.config.vocab if vocab is None else vocab
        self.first, self.last, self.dtype = model.first, model.last, model.dtype
        # The hot loop carries flat arrays; the module is put together while tracing.
        self._graph, state = nnx.split(model)
        params, self._tree = jax.tree.flatten(state)
        self.params = tuple(params)
        specs = jax.tree.map(
            lambda p: jax.tree.map(lambda _: stage.spec(p.axes), p.get_value()),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        self._param_specs = tuple(
            jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        )
        self._slots = _shortest(stage.spec((SLOTS,)))
        self._cache_spec = cache_specs(model.config, stage, context, cache_dtype)
        self._programs: dict[Any, _Program] = {}
        self._meeting = tuple(a for a in ("expert", "tensor") if stage.mesh.shape[a] > 1)
        self._mailboxes = self._make_mailboxes() if peer_access else None

    @property
    def meets_through(self) -> str | None:
        """Through what the devices of the stage, ones of this process that run kernels, exchange
        numbers in decode steps; None: they do not."""
        if not (self.policy.kernels and self._meeting and self.stage.is_local):
            return None
        return "NCCL" if self._mailboxes is None else "peer access"

    def _make_mailboxes(self) -> jax.Array | None:
        """For what devices exchange in kernels, if they run kernels."""
        mesh = self.stage.mesh
        if not (self.policy.kernels and self._meeting and isinstance(mesh, Mesh)):
            return None
        if self.policy.interpret:
            count = math.prod(mesh.shape[axis] for axis in self._meeting)
            return jnp.zeros((*mesh.devices.shape, 1 + 2 * count), jnp.uint32)

        size = functools.partial(mailbox_bytes, self.config, self.context)
        return make_mailboxes(mesh, self._meeting, size, self)

    def _peers(self, table: jax.Array | None) -> Peers | None:
        """The devices whose mailboxes are in a device's table."""
        if table is None:
            return None
        return Peers(table.reshape(-1), self._meeting, _exchanged(self.config, self.context))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.stage.mesh, spec)

    def empty_cache(self, slots: int) -> Cache | None:
        """The memory of so many slots."""
        if not self.stage.is_local:
            return None
        sizes = (self.stage, slots, self.context, self.cache_dtype)
        make = functools.partial(stage_cache, self.config, *sizes)
        return jax.jit(make, out_shardings=jax.tree.map(self.sharding, self._cache_spec))()

    def empty_state(self, slots: int, window: int) -> steps.DecodeState | None:
        """Of slots that have nothing to do."""
        if not self.stage.is_local:
            return None

        def make() -> steps.DecodeState:
            zeros = jnp.zeros(slots, jnp.int32)
            recent = jnp.full((slots, window), -1, jnp.int32)
            return steps.DecodeState(zeros, zeros, jnp.zeros(slots, bool), recent)

        return jax.jit(make, out_shardings=self.sharding(self._slots))()

    def place(self, tree: Any, *, by_slot: bool = False) -> Any:
        """NumPy arrays on the devices of the stage, the same on all or split by slots; processes
        without a device in it take no part, as they would have to in `jax.device_put`."""
        if not self.stage.is_local:
            return tree
        sharding = self.sharding(self._slots if by_slot else _REPLICATED)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, sharding, lambda at: x[at]), tree
        )

    def _program(
        self,
        key: Any,
        body: Callable,
        in_specs: Sequence,
        out_specs: Any,
        donate: Sequence[int] = (),
        *,
        decode: bool = False,
    ) -> Callable:
        """A function of the device's arrays as a compiled program on the mesh, made once."""
        if not self.stage.is_local:
            return lambda *_: jax.tree.map(
                lambda _: None, out_specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
            )
        if key not in self._programs:
            mesh = self.stage.mesh

            @functools.wraps(body)
            def local(table: jax.Array | None, *arguments: Any) -> Any:
                peers = self._peers(table)
                with forward_context(rules=self.stage.rules, policy=self.policy, peers=peers):
                    return body(*arguments)

            sharded = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(PartitionSpec(*mesh.axis_names), *in_specs),
                out_specs=out_specs,
                check_vma=False,
            )
            platform = mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else None
            jitted = jax.jit(
                sharded,
                donate_argnums=tuple(1 + i for i in donate),
                compiler_options=compiler_options(platform, decode=decode),
            )
            self._programs[key] = _Program(jitted, self._mailboxes)
        return self._programs[key]

    def _model(self, params: Sequence[jax.Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, params))

    def prefill(self, length: int, *, all_logits: bool) -> Callable:
        """`(params, cache, inputs, start, count, slot)` to the cache and the output.

        The output of the last stage is logits, of all positions or of the last that is read:
        float32 `[data, length, vocab]` or `[data, vocab]`.
        """

        def prefill(params, cache, inputs, start, count, slot):
            model = self._model(params)
            cache, x = steps.prefill(model, cache, inputs, start, count, slot)
            if not self.last:
                return cache, x
            if all_logits:
                return cache, model.logits(x)
            index = jnp.maximum(count - 1, 0)[:, None, None]
            return cache, model.logits(jnp.take_along_axis(x, index, axis=1)[:, 0])

        vocab = self.stage.spec((SLOTS, Axis("vocab")))
        if not self.last:
            out = self._slots
        else:
            out = PartitionSpec(vocab[0], None, vocab[1]) if all_logits else vocab
        return self._program(
            ("prefill", length, all_logits),
            prefill,
            [self._param_specs, self._cache_spec, *[self._slots] * 4],
            (self._cache_spec, out),
            donate=[1],
            decode=length == 1,
        )

    def prefill_arguments(self, length: int, cache: Cache | None) -> tuple:
        """Such as `prefill` takes, to compile it for them."""
        places = np.zeros(self.stage.mesh.shape["data"], np.int32)
        inputs = np.zeros((len(places), length), np.int32)
        if not self.first:
            like = self.input(*inputs.shape)
            sharding = self.sharding(self._slots)
            inputs = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
        return self.params, cache, inputs, *[places] * 3

    def begin(self, plan: SamplingPlan) -> Callable:
        """`(logits, state, recent, position, slot, ends, values)` to the state and its feed."""

        def begin(*arguments):
            state = steps.begin(*arguments, plan, self.vocab, self.context)
            return state, steps.feed(state)

        specs = [
            self.stage.spec((SLOTS, Axis("vocab"))),
            *[self._slots] * 4,
            _REPLICATED,
            self._slots,
        ]
        return self._program(("begin", plan), begin, specs, (self._slots, self._slots))

    def relay(self) -> Callable:
        """A step of a stage that is not the last: `(params, cache, x, feed)` to cache and `x`."""

        def relay(params, cache, x, fed):
            return steps.decode_layers(self._model(params), cache, x, fed)

        specs = [self._param_specs, self._cache_spec, self._slots, self._slots]
        out = (self._cache_spec, self._slots)
        return self._program("relay", relay, specs, out, donate=[1], decode=True)

    def finish(self, plan: SamplingPlan) -> Callable:
        """A step of the last stage: `(params, cache, x, state, ends, values)` to the cache, the
        state and its feed."""

        def finish(params, cache, x, state, ends, values):
            model, sizes = self._model(params), (self.vocab, self.context)
            cache, state = steps.decode_step(model, cache, x, state, ends, values, plan, *sizes)
            return cache, state, steps.feed(state)

        slots = self._slots
        specs = [self._param_specs, self._cache_spec, slots, slots, _REPLICATED, slots]
        out = (self._cache_spec, slots, slots)
        return self._program(("finish", plan), finish, specs, out, donate=[1], decode=True)

    def loop(
        self, plan: SamplingPlan, length: int, slots: int, groups: int, *, in_ring: bool
    ) -> _Program:
        """Several steps, `steps.decode_loop`: `(params, caches, states, texts, count, table, limit,
        ends, values)` to the caches, the states, the tokens and the count.

        Args:
          plan: how tokens are chosen.
          length: of texts.
          slots: of a group, on one device.
          groups: of slots.
          in_ring: stages hand over through a ring; else `count` and `table` are None.
        """
        incoming = self.incoming(slots)

        def loop(params, caches, states, texts, count, table, limit, ends, values):
            ring = None
            if table is not None:
                ring = Ring(table.reshape(-1), count, self.policy.interpret)
            *results, ring = steps.decode_loop(
                self._model(params),
                caches,
                states,
                texts,
                ring,
                limit,
                ends,
                values,
                incoming,
                plan,
                self.vocab,
                self.context,
            )
            return *results, ring and ring.count

        caches, by_slot = [self._cache_spec] * groups, [self._slots] * groups if self.last else []
        count = places = None
        if in_ring:
            count, places = _REPLICATED, PartitionSpec(*self.stage.mesh.axis_names)
        out = (caches, by_slot, by_slot, count)
        specs = [self._param_specs, *out, places, *[_REPLICATED] * 2, by_slot]
        key = ("loop", plan, length)
        return self._program(key, loop, specs, out, donate=[1, 2, 3, 4], decode=True)

    def feed(self) -> Callable:
        """A state to its `steps.feed`."""
        return self._program("feed", steps.feed, [self._slots], self._slots)

    def incoming(self, slots: int) -> list[jax.ShapeDtypeStruct]:
        """What the stage before hands over in a step of so many slots on one device: to the first
        stage the feed alone, else `x` before it."""
        fed = jax.ShapeDtypeStruct((slots, 2), jnp.int32)
        return [fed] if self.first else [self.input(slots, 1), fed]

    def input(self, *shape: int) -> jax.ShapeDtypeStruct:
        """The shape and dtype of what the stage before hands over, `[*shape, width]`."""
        width = self.config.stream_width(self.stage.layers.start)
        return jax.ShapeDtypeStruct((*shape, width), np.dtype(self.dtype))
