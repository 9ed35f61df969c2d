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

from jaxsplit.cache.layers import Cache, init_cache
from jaxsplit.comm import two_shot
from jaxsplit.comm.p2p import Ring
from jaxsplit.comm.peers import PeerGroup
from jaxsplit.comm.symmetric_memory import allocate_peer_buffers
from jaxsplit.context import DEFAULT_POLICY, MatmulPolicy, forward_context
from jaxsplit.engine import steps
from jaxsplit.engine.chunked_prefill import CHUNKS
from jaxsplit.engine.sampling import SamplerSpec
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.sharding import Stage
from jaxsplit.sharding.axes import SLOTS, Axis

_IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"
"""Commands captured into CUDA graphs: XLA's default and WHILE, so that loops need no host."""

_REPLICATED = PartitionSpec()


def compiler_options(platform: str | None, *, decode: bool) -> dict[str, Any] | None:
    """XLA options of the programs that run layers."""
    if platform == "cpu" and decode:
        # YNN reductions break the fused loop over quantized weights apart.
        return {"xla_cpu_experimental_ynn_fusion_type": ""}
    if platform in ("gpu", "cuda") and decode:
        # Capture a program that is a single loop, too.
        return {"xla_gpu_enable_command_buffer": _IN_GRAPHS, "xla_gpu_graph_min_graph_size": 1}
    return None


def _trimmed(spec: PartitionSpec) -> PartitionSpec:
    """A spec without trailing None, as programs return it: another form would recompile them."""
    axes = list(spec)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _all_reduce_capacity(config: ModelConfig, context: int) -> int:
    """Largest all-reduce, in elements, that the peer-to-peer kernels must support."""
    return min(context, max(CHUNKS)) * config.embed


def peer_buffer_bytes(config: ModelConfig, context: int, devices: int) -> int:
    """Bytes of each device's buffer for peer-to-peer all-reduces among `devices` devices."""
    return two_shot.buffer_bytes(devices, _all_reduce_capacity(config, context))


def stage_cache(
    config: ModelConfig, stage: Stage, slots: int, context: int, dtype: jnp.dtype
) -> Cache:
    """The empty cache of a stage's layers, in global shapes."""
    layers = config.cache(context, dtype, stage.layers)
    return init_cache(layers, slots, lambda array: stage.padded(array.shape, array.axes))


def cache_specs(config: ModelConfig, stage: Stage, context: int, dtype: jnp.dtype) -> Any:
    """Partition specs of a stage's cache."""
    layers = config.cache(context, dtype, stage.layers)
    return jax.tree.map(lambda array: _trimmed(stage.spec(array.all_axes)), layers)


@dataclasses.dataclass
class _Program:
    """A jitted function whose arguments always have the same shapes.

    Attributes:
      function: takes the peers' buffer pointers, then the arguments.
      buffer_pointers: as `allocate_peer_buffers` returns them; None without peer-to-peer kernels.
      executable: the function compiled ahead of time; None: compiled by its first call.
    """

    function: Any
    buffer_pointers: jax.Array | None
    executable: Callable | None = None

    def __call__(self, *arguments: Any) -> Any:
        return (self.executable or self.function)(self.buffer_pointers, *arguments)

    def trace(self, *arguments: Any) -> jax.stages.Traced:
        return self.function.trace(self.buffer_pointers, *arguments)

    def compile(self, *arguments: Any) -> None:
        """Compiles ahead of time, for arrays or `ShapeDtypeStruct`s with shardings."""
        self.executable = self.trace(*arguments).lower().compile()


def compile_together(programs: Sequence[Callable], arguments: Callable[[int], tuple]) -> None:
    """Compiles the programs of several stages in parallel, except remote and compiled ones.

    Args:
      programs: of the stages.
      arguments: from a stage's index to its arguments.
    """
    pending = [
        (i, program)
        for i, program in enumerate(programs)
        if isinstance(program, _Program) and program.executable is None
    ]
    if pending:
        with ThreadPoolExecutor(len(pending)) as threads:
            list(threads.map(lambda one: one[1].compile(*arguments(one[0])), pending))


class StageRunner:
    """The compiled programs of one pipeline stage.

    Programs are compiled by their first call. In a process without a device of the stage they do
    nothing and return None.

    Args:
      model: the stage's decoder, its parameters on the stage's mesh.
      stage: layers, mesh and sharding rules.
      context: length of each slot's cache, in tokens.
      cache_dtype: dtype of keys and values.
      policy: how matrices are multiplied.
      vocab: tokens of the vocabulary; larger ids are never sampled; None: all rows of the head.
      peer_access: use peer-to-peer kernels for all-reduces where the devices support them.
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
        # Programs take flat arrays; the module is merged while tracing.
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
        self._slot_spec = _trimmed(stage.spec((SLOTS,)))
        self._cache_spec = cache_specs(model.config, stage, context, cache_dtype)
        self._programs: dict[Any, _Program] = {}
        self._reduce_axes = tuple(a for a in ("expert", "tensor") if stage.mesh.shape[a] > 1)
        self._buffer_pointers = self._allocate_peer_buffers() if peer_access else None

    @property
    def collective_backend(self) -> str | None:
        """Backend of the decode steps' all-reduces, `NCCL` or `peer access`; None without kernels,
        without all-reduces, or without a device of this process."""
        if not (self.policy.kernels and self._reduce_axes and self.stage.is_local):
            return None
        return "NCCL" if self._buffer_pointers is None else "peer access"

    def _allocate_peer_buffers(self) -> jax.Array | None:
        mesh = self.stage.mesh
        if not (self.policy.kernels and self._reduce_axes and isinstance(mesh, Mesh)):
            return None
        if self.policy.interpret:
            count = math.prod(mesh.shape[axis] for axis in self._reduce_axes)
            return jnp.zeros((*mesh.devices.shape, 1 + 2 * count), jnp.uint32)

        size = functools.partial(peer_buffer_bytes, self.config, self.context)
        return allocate_peer_buffers(mesh, self._reduce_axes, size, self)

    def _peers(self, buffer_pointers: jax.Array | None) -> PeerGroup | None:
        """The peers of a device, by its own row of pointers."""
        if buffer_pointers is None:
            return None
        capacity = _all_reduce_capacity(self.config, self.context)
        return PeerGroup(buffer_pointers.reshape(-1), self._reduce_axes, capacity)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.stage.mesh, spec)

    def empty_cache(self, slots: int) -> Cache | None:
        """Allocates the cache of `slots` slots, filled with zeros."""
        if not self.stage.is_local:
            return None
        sizes = (self.stage, slots, self.context, self.cache_dtype)
        make = functools.partial(stage_cache, self.config, *sizes)
        return jax.jit(make, out_shardings=jax.tree.map(self.sharding, self._cache_spec))()

    def empty_state(self, slots: int, window: int) -> steps.DecodeState | None:
        """Allocates the decode state of inactive slots."""
        if not self.stage.is_local:
            return None

        def make() -> steps.DecodeState:
            zeros = jnp.zeros(slots, jnp.int32)
            recent = jnp.full((slots, window), -1, jnp.int32)
            return steps.DecodeState(zeros, zeros, jnp.zeros(slots, bool), recent)

        return jax.jit(make, out_shardings=self.sharding(self._slot_spec))()

    def put(self, tree: Any, *, by_slot: bool = False) -> Any:
        """Puts NumPy arrays on the stage's devices, replicated or sharded by slot.

        Unlike `jax.device_put`, it involves only processes with a device of the stage.
        """
        if not self.stage.is_local:
            return tree
        sharding = self.sharding(self._slot_spec if by_slot else _REPLICATED)
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
        """A function of per-device arrays as a jitted program on the mesh, cached by key."""
        if not self.stage.is_local:
            return lambda *_: jax.tree.map(
                lambda _: None, out_specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
            )
        if key not in self._programs:
            mesh = self.stage.mesh

            @functools.wraps(body)
            def local(buffer_pointers: jax.Array | None, *arguments: Any) -> Any:
                peers = self._peers(buffer_pointers)
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
            self._programs[key] = _Program(jitted, self._buffer_pointers)
        return self._programs[key]

    def _model(self, params: Sequence[jax.Array]) -> Decoder:
        return nnx.merge(self._graph, jax.tree.unflatten(self._tree, params))

    def _step_spec(self, sampler: SamplerSpec) -> steps.StepSpec:
        return steps.StepSpec(sampler, self.vocab, self.context)

    def prefill(self, length: int, *, all_logits: bool) -> Callable:
        """Reads a chunk of a prompt: `(params, cache, inputs, chunk)` to the cache and the output.

        The last stage's output is logits, of all positions or of the last one read: float32
        `[data, length, vocab]` or `[data, vocab]`.
        """

        def prefill(params, cache, inputs, chunk):
            model = self._model(params)
            cache, x = steps.prefill(model, cache, inputs, chunk)
            if not self.last:
                return cache, x
            if all_logits:
                return cache, model.logits(x)
            index = jnp.maximum(chunk.count - 1, 0)[:, None, None]
            return cache, model.logits(jnp.take_along_axis(x, index, axis=1)[:, 0])

        vocab = self.stage.spec((SLOTS, Axis("vocab")))
        if not self.last:
            out = self._slot_spec
        else:
            out = PartitionSpec(vocab[0], None, vocab[1]) if all_logits else vocab
        return self._program(
            ("prefill", length, all_logits),
            prefill,
            [self._param_specs, self._cache_spec, self._slot_spec, self._slot_spec],
            (self._cache_spec, out),
            donate=[1],
            decode=length == 1,
        )

    def prefill_arguments(self, length: int, cache: Cache | None) -> tuple:
        """Arguments for which `prefill` can be compiled ahead of time."""
        zeros = np.zeros(self.stage.mesh.shape["data"], np.int32)
        inputs = np.zeros((len(zeros), length), np.int32)
        if not self.first:
            like = self.input_shape(*inputs.shape)
            sharding = self.sharding(self._slot_spec)
            inputs = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
        return self.params, cache, inputs, steps.PrefillChunk(zeros, zeros, zeros)

    def sample_first(self, sampler: SamplerSpec) -> Callable:
        """Samples the first token after a prompt: `(logits, state, prompt, inputs)` to the state
        and its `steps.step_inputs`."""
        spec, by_slot = self._step_spec(sampler), self._slot_spec

        def sample_first(logits, state, prompt, inputs):
            state = steps.sample_first(logits, state, prompt, inputs, spec)
            return state, steps.step_inputs(state)

        logits = self.stage.spec((SLOTS, Axis("vocab")))
        specs = [logits, by_slot, by_slot, steps.SamplerInputs(_REPLICATED, by_slot)]
        return self._program(("sample_first", sampler), sample_first, specs, (by_slot, by_slot))

    def decode_layers(self) -> Callable:
        """A decode step of a stage that is not the last: `(params, cache, x, inputs)` to the cache
        and `x`."""

        def decode_layers(params, cache, x, inputs):
            return steps.decode_layers(self._model(params), cache, x, inputs)

        specs = [self._param_specs, self._cache_spec, self._slot_spec, self._slot_spec]
        out = (self._cache_spec, self._slot_spec)
        return self._program("decode_layers", decode_layers, specs, out, donate=[1], decode=True)

    def decode_and_sample(self, sampler: SamplerSpec) -> Callable:
        """A decode step of the last stage: `(params, cache, x, state, inputs)` to the cache, the
        state and its `steps.step_inputs`."""
        spec, by_slot = self._step_spec(sampler), self._slot_spec

        def decode_and_sample(params, cache, x, state, inputs):
            model = self._model(params)
            cache, state = steps.decode_and_sample(model, cache, x, state, inputs, spec=spec)
            return cache, state, steps.step_inputs(state)

        inputs = steps.SamplerInputs(_REPLICATED, by_slot)
        specs = [self._param_specs, self._cache_spec, by_slot, by_slot, inputs]
        out, key = (self._cache_spec, by_slot, by_slot), ("decode_and_sample", sampler)
        return self._program(key, decode_and_sample, specs, out, donate=[1], decode=True)

    def decode_loop(
        self, sampler: SamplerSpec, length: int, slots: int, micro_batches: int, *, in_ring: bool
    ) -> Callable:
        """Several decode steps, `steps.decode_loop`: `(params, carry, buffer_pointers, inputs)` to
        the carry.

        The carry is donated: caches, states and output tokens of the micro-batches, as in
        `steps.LoopState`, and the ring's epoch.

        Args:
          sampler: static half of the sampler.
          length: of the output tokens.
          slots: slots of a micro-batch on each device.
          micro_batches: how many there are.
          in_ring: stages transfer through a `Ring`; else its epoch and `buffer_pointers` are None.
        """
        spec, incoming = self._step_spec(sampler), self.incoming_shapes(slots)

        def decode_loop(params, carry, buffer_pointers, inputs):
            *arrays, epoch = carry
            ring = None
            if buffer_pointers is not None:
                ring = Ring(buffer_pointers.reshape(-1), epoch, self.policy.interpret)
            state = steps.LoopState(jnp.zeros((), jnp.int32), *arrays, ring)
            state = steps.decode_loop(self._model(params), state, inputs, spec, incoming)
            epoch = None if state.ring is None else state.ring.epoch
            return state.caches, state.states, state.output_tokens, epoch

        caches = [self._cache_spec] * micro_batches
        by_slot = [self._slot_spec] * micro_batches if self.last else []
        epoch = devices = None
        if in_ring:
            epoch, devices = _REPLICATED, PartitionSpec(*self.stage.mesh.axis_names)
        carry = (caches, by_slot, by_slot, epoch)
        inputs = steps.LoopInputs(_REPLICATED, _REPLICATED, by_slot)
        specs = [self._param_specs, carry, devices, inputs]
        key = ("decode_loop", sampler, length, slots, micro_batches, in_ring)
        return self._program(key, decode_loop, specs, carry, donate=[1], decode=True)

    def step_inputs(self) -> Callable:
        """A state to its `steps.step_inputs`."""
        return self._program("step_inputs", steps.step_inputs, [self._slot_spec], self._slot_spec)

    def incoming_shapes(self, slots: int) -> list[jax.ShapeDtypeStruct]:
        """What the previous stage sends in a decode step, for `slots` slots on each device: its
        output, unless this is the first stage, and the step inputs."""
        inputs = jax.ShapeDtypeStruct((slots, 2), jnp.int32)
        return [inputs] if self.first else [self.input_shape(slots, 1), inputs]

    def input_shape(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the previous stage's output, `[*shape, width]`."""
        width = self.config.stream_width(self.stage.layers.start)
        return jax.ShapeDtypeStruct((*shape, width), np.dtype(self.dtype))
