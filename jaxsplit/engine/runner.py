"""The compiled programs of one stage."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsplit.cache.layers import Cache, in_pages, init_cache
from jaxsplit.comm import two_shot
from jaxsplit.comm.p2p import Ring
from jaxsplit.comm.peers import PeerGroup
from jaxsplit.comm.symmetric_memory import allocate_peer_buffers
from jaxsplit.context import DEFAULT_POLICY, MatmulPolicy, forward_context
from jaxsplit.engine import steps
from jaxsplit.engine.chunked_prefill import CHUNKS
from jaxsplit.engine.sampling import SamplerSpec, log_probabilities, shard_columns
from jaxsplit.models import Decoder, ModelConfig
from jaxsplit.sharding import Stage
from jaxsplit.sharding.axes import SLOTS, Axis

_IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE"
"""Commands captured into CUDA graphs: XLA's default and WHILE, so that loops need no host."""

_REPLICATED = PartitionSpec()

PAGE = 256
"""Tokens of a page."""


def compiler_options(platform: str | None, *, decode: bool) -> dict[str, Any] | None:
    """XLA options of the programs that run layers."""
    if platform == "cpu" and decode:
        # YNN reductions break the fused loop over quantized weights apart.
        return {
            "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
            "xla_disable_hlo_passes": "tree_reduction_rewriter",
        }
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


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """How large the cache of one data replica is.

    Attributes:
      context: most tokens of a sequence.
      page: tokens of a page.
      pages: how many there are.
      states: sequences, and checkpoints of sequences, whose rings and recurrent states are kept.
    """

    context: int
    page: int
    pages: int
    states: int

    @classmethod
    def of_slots(cls, context: int, slots: int, page: int = PAGE) -> "CacheSize":
        """Enough for some slots, each with a whole context."""
        page = min(page, context)
        return cls(context, page, -(-context // page) * slots, slots)

    @property
    def pages_per_sequence(self) -> int:
        """Pages of a sequence as long as the context."""
        return -(-self.context // self.page)


def _layers(config: ModelConfig, stage: Stage, size: CacheSize, dtype: jnp.dtype) -> list[Any]:
    return in_pages(config.cache(size.context, dtype, stage.layers), size.page)


def stage_cache(config: ModelConfig, stage: Stage, size: CacheSize, dtype: jnp.dtype) -> Cache:
    """The empty cache of a stage's layers, in global shapes."""
    data = stage.mesh.shape["data"]
    return init_cache(
        _layers(config, stage, size, dtype),
        size.states * data,
        lambda array: stage.padded(array.shape, array.axes),
        pages=size.pages * data,
    )


def cache_specs(config: ModelConfig, stage: Stage, size: CacheSize, dtype: jnp.dtype) -> Any:
    """Partition specs of a stage's cache."""
    layers = _layers(config, stage, size, dtype)
    return jax.tree.map(lambda array: _trimmed(stage.spec(array.all_axes)), layers)


def bytes_per_device(config: ModelConfig, stage: Stage, size: CacheSize, dtype: jnp.dtype) -> int:
    """Bytes of a stage's cache on each of its devices."""
    cache = jax.eval_shape(lambda: stage_cache(config, stage, size, dtype))
    sizes = jax.tree.map(
        lambda x, spec: (
            math.prod(NamedSharding(stage.mesh, spec).shard_shape(x.shape)) * x.dtype.itemsize
        ),
        cache,
        cache_specs(config, stage, size, dtype),
    )
    return sum(jax.tree.leaves(sizes))


MAX_ELEMENTS = 2**31
"""Kernels count the elements of an array of a layer's cache in 32 bits."""


def fitting_pages(
    config: ModelConfig,
    stages: Sequence[Stage],
    free: Sequence[float],
    size: CacheSize,
    dtype: jnp.dtype,
) -> int:
    """How many pages fit on the devices, on each data replica.

    Args:
      config: the model.
      stages: of its layers.
      free: bytes that each device of a stage has left, for each stage.
      size: of the cache; its pages do not count.
      dtype: of keys and values.
    """
    most = []
    for stage, left in zip(stages, free, strict=True):
        none, one = (dataclasses.replace(size, pages=count) for count in (0, 1))
        states = bytes_per_device(config, stage, none, dtype)
        page = bytes_per_device(config, stage, one, dtype) - states
        arrays = jax.eval_shape(lambda stage=stage, one=one: stage_cache(config, stage, one, dtype))
        largest = max((x.size for x in jax.tree.leaves(arrays)), default=1)
        most.append(min((left - states) // page if page else MAX_ELEMENTS, MAX_ELEMENTS // largest))
    return max(0, int(min(most)))


@dataclasses.dataclass
class _Program:
    """A jitted function whose arguments always have the same shapes.

    Attributes:
      function: takes the peers' buffer pointers, then the arguments.
      buffer_pointers: as `allocate_peer_buffers` returns them; None without peer-to-peer kernels.
      executable: the function compiled ahead of time; None: compiled by its first call.
      called: whether it has been called.
      compiled_at: when a call had compiled it, by `time.perf_counter`; 0: none has.
    """

    function: Any
    buffer_pointers: jax.Array | None
    executable: Callable | None = None
    called: bool = False
    compiled_at: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether a call need not compile it."""
        return self.called or self.executable is not None

    def __call__(self, *arguments: Any) -> Any:
        function, ready = (
            self.function if self.called else self.executable or self.function,
            self.ready,
        )
        result = function(self.buffer_pointers, *arguments)
        self.called |= function is self.function  # what has run once stays as it is
        if not ready:
            self.compiled_at = time.perf_counter()
        return result

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


def decode_state(slots: int, context: int) -> steps.DecodeState:
    """The state of inactive slots, in global shapes."""
    zeros = jnp.zeros(slots, jnp.int32)
    history = jnp.full((slots, context + 1), -1, jnp.int32)
    return steps.DecodeState(zeros, zeros, jnp.zeros(slots, bool), history)


class StageRunner:
    """The compiled programs of one pipeline stage.

    Programs are compiled by their first call. In a process without a device of the stage they do
    nothing and return None.

    Args:
      model: the stage's decoder, its parameters on the stage's mesh.
      stage: layers, mesh and sharding rules.
      size: of the cache.
      cache_dtype: dtype of keys and values.
      policy: how matrices are multiplied.
      vocab: tokens of the vocabulary; larger ids are never sampled; None: all rows of the head.
      peer_access: use peer-to-peer kernels for all-reduces where the devices support them.
      adapters: how many the model has.
    """

    def __init__(
        self,
        model: Decoder,
        stage: Stage,
        size: CacheSize,
        cache_dtype: jnp.dtype,
        policy: MatmulPolicy = DEFAULT_POLICY,
        *,
        vocab: int | None = None,
        peer_access: bool = True,
        adapters: int = 0,
    ):
        self.stage = stage
        self.adapters = adapters
        self.policy = policy
        self.size = size
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
        self._paged = jax.tree.map(
            lambda array: array.paged, _layers(model.config, stage, size, cache_dtype)
        )
        self._cache_spec = cache_specs(model.config, stage, size, cache_dtype)
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

        size = functools.partial(peer_buffer_bytes, self.config, self.size.context)
        return allocate_peer_buffers(mesh, self._reduce_axes, size, self)

    def _peers(self, buffer_pointers: jax.Array | None) -> PeerGroup | None:
        """The peers of a device, by its own row of pointers."""
        if buffer_pointers is None:
            return None
        capacity = _all_reduce_capacity(self.config, self.size.context)
        return PeerGroup(buffer_pointers.reshape(-1), self._reduce_axes, capacity)

    @property
    def compiled_at(self) -> float:
        """When a call last had to compile its program, by `time.perf_counter`."""
        return max((p.compiled_at for p in self._programs.values()), default=0.0)

    @property
    def logits_spec(self) -> PartitionSpec:
        """Of logits `[rows, vocab]`."""
        return self.stage.spec((SLOTS, Axis("vocab")))

    @property
    def stateful(self) -> bool:
        """Whether layers have rings or recurrent states."""
        return not all(jax.tree.leaves(self._paged))

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.stage.mesh, spec)

    def empty_cache(self) -> Cache | None:
        """Allocates the cache, filled with zeros."""
        if not self.stage.is_local:
            return None
        make = functools.partial(stage_cache, self.config, self.stage, self.size, self.cache_dtype)
        return jax.jit(make, out_shardings=jax.tree.map(self.sharding, self._cache_spec))()

    def empty_state(self, slots: int) -> steps.DecodeState | None:
        """Allocates the decode state of inactive slots."""
        if not self.stage.is_local:
            return None
        make = functools.partial(decode_state, slots, self.size.context)
        return jax.jit(make, out_shardings=self.sharding(self._slot_spec))()

    def put(self, tree: Any, spec: PartitionSpec = _REPLICATED, *, by_slot: bool = False) -> Any:
        """Puts NumPy arrays on the stage's devices, sharded by a spec or by slot.

        Unlike `jax.device_put`, it involves only processes with a device of the stage.
        """
        if not self.stage.is_local:
            return tree
        sharding = self.sharding(self._slot_spec if by_slot else spec)
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
        return steps.StepSpec(sampler, self.vocab)

    def prefill(self, rows: int, length: int, wanted: str = "last") -> Callable:
        """Reads a chunk of some prompts: `(params, cache, inputs, chunk, targets)` to the cache and
        the output. `targets` are None but for log-probabilities.

        Args:
          rows: prompts on each device.
          length: tokens of a chunk.
          wanted: what the last stage returns: `last`: the logits after the last token that was
            read, float32 `[rows, vocab]`; `logits`: after all tokens, `[rows, length, vocab]`;
            `hidden`: what the head reads, float32 `[rows, length, embed]`;
            `logprobs`: as `last`, and `log_probabilities` of the targets, int32 `[rows, length]`,
            as `Outputs`.
        """

        def prefill(params, cache, inputs, chunk, targets):
            with forward_context(lora_scales=chunk.rows.lora_scales):
                return outputs(self._model(params), cache, inputs, chunk, targets)

        def outputs(model, cache, inputs, chunk, targets):
            cache, x = steps.prefill(model, cache, inputs, chunk)
            if not self.last:
                return cache, x
            if wanted == "last":
                index = jnp.maximum(chunk.count - 1, 0)[:, None, None]
                return cache, model.logits(jnp.take_along_axis(x, index, axis=1)[:, 0])
            if wanted == "hidden":
                return cache, model.normalized(x).astype(jnp.float32)
            logits = model.logits(x)
            if wanted == "logits":
                return cache, logits
            index = jnp.maximum(chunk.count - 1, 0)[:, None, None]
            last = jnp.take_along_axis(logits, index, axis=1)[:, 0]
            details = log_probabilities(logits, targets, vocab=self.vocab)
            return cache, (last, steps.Outputs(targets, *details))

        vocab = self.stage.spec((SLOTS, Axis("vocab")))
        out = {
            "last": vocab,
            "logits": PartitionSpec(vocab[0], None, vocab[1]),
            "hidden": self._slot_spec,
            "logprobs": (vocab, self._slot_spec),
        }[wanted]
        return self._program(
            ("prefill", rows, length, wanted),
            prefill,
            [self._param_specs, self._cache_spec, *[self._slot_spec] * 3],
            (self._cache_spec, out if self.last else self._slot_spec),
            donate=[1],
            decode=length == 1,
        )

    def prefill_arguments(
        self, rows: int, length: int, cache: Cache | None, wanted: str = "last"
    ) -> tuple:
        """Arguments for which `prefill` can be compiled ahead of time."""
        count = rows * self.stage.mesh.shape["data"]
        zeros: Any = np.zeros(count, np.int32)
        pages: Any = np.zeros((count, self.size.pages_per_sequence), np.int32)
        inputs = np.zeros((count, length), np.int32)
        if not self.first:
            like = self.input_shape(*inputs.shape)
            sharding = self.sharding(self._slot_spec)
            inputs = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
        scales: Any = np.zeros((count, self.adapters), np.float32) if self.adapters else None
        chunk = steps.PrefillChunk(zeros, zeros, steps.Rows(zeros, zeros, pages, scales))
        targets = np.zeros((count, length), np.int32) if wanted == "logprobs" else None
        return self.params, cache, inputs, chunk, targets

    def sample_first(self, sampler: SamplerSpec, rows: int) -> Callable:
        """Samples the first token after some prompts, `rows` on each device,
        `steps.sample_first`: `(logits, state, chunk, slot_params, mask)` to the state and the
        outputs. The state is donated. The mask is None unless the sampler has one."""
        spec, by_slot = self._step_spec(sampler), self._slot_spec

        def sample_first(logits, state, chunk, slot_params, mask):
            return steps.sample_first(logits, state, chunk, slot_params, spec, mask)

        specs = [self.logits_spec, by_slot, by_slot, by_slot, self.logits_spec]
        key, out = ("sample_first", sampler, rows), (by_slot, by_slot)
        return self._program(key, sample_first, specs, out, donate=[1])

    def decode_layers(self) -> Callable:
        """A decode step of a stage that is not the last: `(params, cache, x, inputs, rows)` to the
        cache and `x`."""

        def decode_layers(params, cache, x, inputs, rows):
            return steps.decode_layers(self._model(params), cache, x, inputs, rows)

        specs = [self._param_specs, self._cache_spec, *[self._slot_spec] * 3]
        out = (self._cache_spec, self._slot_spec)
        return self._program("decode_layers", decode_layers, specs, out, donate=[1], decode=True)

    def decode_and_sample(self, sampler: SamplerSpec) -> Callable:
        """A decode step of the last stage: `(params, cache, x, state, rows, slot_params)` to the
        cache, the state, the outputs and the next `steps.step_inputs`."""
        spec, by_slot = self._step_spec(sampler), self._slot_spec

        def decode_and_sample(params, cache, x, state, rows, slot_params):
            model = self._model(params)
            cache, state, outputs = steps.decode_and_sample(
                model, cache, x, state, rows, slot_params, spec=spec
            )
            return cache, state, outputs, steps.step_inputs(state, rows)

        specs = [self._param_specs, self._cache_spec, *[by_slot] * 4]
        out, key = (self._cache_spec, *[by_slot] * 3), ("decode_and_sample", sampler)
        return self._program(key, decode_and_sample, specs, out, donate=[1, 3], decode=True)

    def decode_logits(self, rows: int) -> Callable:
        """A decode step of the last stage up to its logits, for `rows` rows on each device:
        `(params, cache, old, x, state, rows)` to the cache and the logits, in the buffers of old
        ones."""

        def decode_logits(params, cache, old, x, state, rows):
            cache, logits = steps.decode_logits(self._model(params), cache, x, state, rows)
            return cache, steps.overwritten(old, logits)

        out = (self._cache_spec, self.logits_spec)
        specs, key = [self._param_specs, *out, *[self._slot_spec] * 3], ("decode_logits", rows)
        return self._program(key, decode_logits, specs, out, donate=[1, 2], decode=True)

    def sample_next(self, sampler: SamplerSpec, rows: int) -> Callable:
        """Samples the next tokens of `rows` rows on each device, `steps.sample_next`: `(logits,
        state, rows, slot_params, mask)` to the state and the outputs. The state is donated."""
        spec, by_slot = self._step_spec(sampler), self._slot_spec

        def sample_next(logits, state, rows, slot_params, mask):
            return steps.sample_next(logits, state, rows, slot_params, spec, mask)

        specs = [self.logits_spec, by_slot, by_slot, by_slot, self.logits_spec]
        key, out = ("sample_next", sampler, rows), (by_slot, by_slot)
        return self._program(key, sample_next, specs, out, donate=[1])

    def empty_logits(self, rows: int) -> Any:
        """Buffers for the logits of rows on all devices."""
        if not self.stage.is_local:
            return None
        like = self.logits_shape(rows)
        return self.put(np.zeros(like.shape, like.dtype), self.logits_spec)

    def split_masks(self, masks: np.ndarray, first: int, count: int) -> np.ndarray | None:
        """Masks as programs take them: each device gets the words of its shard of the vocabulary.

        Args:
          masks: uint32 `[data, rows, words]`.
          first, count: rows to take of each data replica; rows past the last one permit nothing.
        """
        if not self.stage.is_local:
            return None
        data, rows, words = masks.shape
        part = np.zeros((data, count, words + 1), np.uint32)
        part[:, : rows - first, :words] = masks[:, first : first + count]
        return part.reshape(data * count, -1)[:, shard_columns(words, *self._vocab_shards)]

    @functools.cached_property
    def _vocab_shards(self) -> tuple[int, int]:
        """How many there are, and rows of each."""
        logits = self.logits_shape(self.stage.mesh.size)
        _, rows = logits.sharding.shard_shape(logits.shape)
        return logits.shape[1] // rows, rows

    def logits_shape(self, rows: int) -> jax.ShapeDtypeStruct:
        """Of rows on all devices: float32 `[rows, padded vocab]`."""
        sharding = self.sharding(self.logits_spec)
        return jax.ShapeDtypeStruct((rows, self.padded_vocab), np.float32, sharding=sharding)

    @property
    def padded_vocab(self) -> int:
        """Rows of the head on all devices together."""
        layout = self.stage.layout(Axis("vocab", self.config.vocab))
        assert layout is not None
        return layout.size

    def decode_loop(
        self, sampler: SamplerSpec, length: int, rows: int, micro_batches: int, *, in_ring: bool
    ) -> Callable:
        """Several decode steps of a stage, `steps.decode_loop`: `(params, carry, buffer_pointers,
        inputs)` to the carry.

        The carry is donated: the cache, the state, the outputs of the micro-batches, as in
        `steps.LoopState`, and the ring's epoch.

        Args:
          sampler: static half of the sampler.
          length: steps that the outputs have room for.
          rows: of a micro-batch on each device.
          micro_batches: how many there are.
          in_ring: stages transfer through a `Ring`; else its epoch and `buffer_pointers` are None.
        """
        spec, incoming = self._step_spec(sampler), self.incoming_shapes(rows)

        def decode_loop(params, carry, buffer_pointers, inputs):
            cache, slots, outputs, epoch = carry
            ring = None
            if buffer_pointers is not None:
                ring = Ring(buffer_pointers.reshape(-1), epoch, self.policy.interpret)
            state = steps.LoopState(jnp.zeros((), jnp.int32), cache, slots, outputs, ring)
            state = steps.decode_loop(self._model(params), state, inputs, spec, incoming)
            epoch = None if state.ring is None else state.ring.epoch
            return state.cache, state.state, state.outputs, epoch

        by_slot: Any = self._slot_spec
        limit: Any = _REPLICATED
        epoch = devices = None
        if in_ring:
            epoch, devices = _REPLICATED, PartitionSpec(*self.stage.mesh.axis_names)
        last = by_slot if self.last else None
        carry = (self._cache_spec, last, [by_slot] * micro_batches if self.last else [], epoch)
        inputs = steps.LoopInputs(limit, [by_slot] * micro_batches, last)
        specs = [self._param_specs, carry, devices, inputs]
        key = ("decode_loop", sampler, length, rows, micro_batches, in_ring)
        return self._program(key, decode_loop, specs, carry, donate=[1], decode=True)

    def shapes_of(self, tree: Any) -> Any:
        """Arrays on the stage's devices as what programs can be compiled for."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
        )

    def shapes_by_slot(self, tree: Any) -> Any:
        """As `shapes_of`, of NumPy arrays that will be sharded by slot."""
        sharding = self.sharding(self._slot_spec)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def step_inputs(self) -> Callable:
        """`(state, rows)` to their `steps.step_inputs`."""
        specs = [self._slot_spec, self._slot_spec]
        return self._program("step_inputs", steps.step_inputs, specs, self._slot_spec)

    def overwrite(self, *, by_slot: bool = True) -> Callable:
        """`(old, new)`, arrays by slot or replicated, to what is new, in the buffers of what is
        old: programs whose arguments keep their addresses need no new CUDA graph."""
        spec = self._slot_spec if by_slot else _REPLICATED
        key = "overwrite", by_slot
        return self._program(key, steps.overwritten, [spec, spec], spec, donate=[0])

    def copied(self) -> Callable:
        """Arrays by slot to copies of them."""
        body = functools.partial(jax.tree.map, jnp.copy)
        return self._program("copied", body, [self._slot_spec], self._slot_spec)

    def assign(self) -> Callable:
        """`(state, slot_params, slots, history, new)`, all by slot, to the state and the parameters
        with some slots begun anew: int32 `[rows]`, their history, and parameters `[rows]`."""
        by_slot = self._slot_spec
        return self._program("assign", steps.assign, [by_slot] * 5, (by_slot, by_slot), [0, 1])

    def copy(self) -> Callable:
        """`(cache, pages, states)` to the cache with pages and states copied: int32 `[copies, 2]`
        on each data replica, from and to; those out of range are not."""
        specs, out = [self._cache_spec, self._slot_spec, self._slot_spec], self._cache_spec
        body = functools.partial(steps.copied, paged=self._paged)
        return self._program("copy", body, specs, out, donate=[0])

    @property
    def cache_arrays(self) -> list[Any]:
        """The caches of its layers, of `CacheArray`s."""
        return _layers(self.config, self.stage, self.size, self.cache_dtype)

    def gather(self, groups: Sequence[Sequence[int]], *, paged: bool) -> Callable:
        """`(cache, index)` to a page of each array in pages, or a state of the others, on the host:
        for each group of arrays a vector on each device, `[data, expert, tensor, elements]`.

        Args:
          groups: indices of arrays in the cache, flattened.
          paged: gather a page; else a state. `index` is int32 `[data]`, of each data replica.
        """

        def gather(cache, index):
            arrays = jax.tree.leaves(cache)
            joined = [jnp.concatenate([arrays[i][index[0]].ravel() for i in g]) for g in groups]
            # To pinned memory, so that devices need room for one page only, and for a moment.
            return [jax.device_put(x.reshape(1, 1, 1, -1), jax.memory.Space.Host) for x in joined]

        out = [self.device_spec] * len(groups)
        specs = [self._cache_spec, self._slot_spec]
        return self._program(("gather", paged), gather, specs, out)

    def scatter(self, groups: Sequence[Sequence[int]], *, paged: bool) -> Callable:
        """`(cache, vectors, index)` to the cache with what `gather` has gathered, in the places of
        an index, int32 `[data]` (out of range: nowhere), and to the index, which is there once the
        vectors have been read."""

        def scatter(cache, vectors, index):
            arrays, structure = jax.tree.flatten(cache)
            for group, vector in zip(groups, vectors, strict=True):
                sizes = [math.prod(arrays[i].shape[1:]) for i in group]
                parts = jnp.split(vector.ravel(), np.cumsum(sizes)[:-1])
                for i, part in zip(group, parts, strict=True):
                    new = part.reshape(arrays[i].shape[1:])
                    arrays[i] = arrays[i].at[index[0]].set(new, mode="drop")
            return jax.tree.unflatten(structure, arrays), index + 0

        specs = [self._cache_spec, [self.device_spec] * len(groups), self._slot_spec]
        out = self._cache_spec, self._slot_spec
        return self._program(("scatter", paged), scatter, specs, out, donate=[0])

    @property
    def device_spec(self) -> PartitionSpec:
        """Of arrays with an entry for each device, `[data, expert, tensor, ...]`."""
        return PartitionSpec(*self.stage.mesh.axis_names)

    def incoming_shapes(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        """What the previous stage sends in a decode step, for `rows` rows on each device: its
        output, unless this is the first stage, and the step inputs."""
        inputs = jax.ShapeDtypeStruct((rows, 2), jnp.int32)
        return [inputs] if self.first else [self.input_shape(rows, 1), inputs]

    def input_shape(self, *shape: int) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the previous stage's output, `[*shape, width]`."""
        width = self.config.stream_layout(self.stage.layers.start).width
        return jax.ShapeDtypeStruct((*shape, width), np.dtype(self.dtype))
