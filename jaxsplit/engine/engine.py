"""Compiled programs around a decoder on a mesh, and the buffers that they hand to one another."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxsplit.engine import steps
from jaxsplit.engine.sampling import SamplingConfig, SamplingPlan, SamplingValues
from jaxsplit.models import Cache, Decoder, LayerCache, axis_rules, init_cache
from jaxsplit.parallel import Partition

_REPLICATED = PartitionSpec()

# XLA:CPU's library for reductions takes them out of the fused loop over quantized weights.
DECODE_OPTIONS = {"cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}}


class Engine:
    """Runs a decoder on a mesh: a batch of slots, each holding one sequence.

    Args:
      model: the decoder, its parameters on the mesh.
      partition: the mesh and how the model lies on it.
      context: tokens that a slot can hold.
      cache_dtype: of keys and values.
      slots: sequences that are decoded together.
      ends: tokens that end a text.
      chunks: lengths for which prefill is compiled; longer prompts are read piece by piece.
    """

    def __init__(
        self,
        model: Decoder,
        partition: Partition,
        *,
        context: int,
        cache_dtype: jnp.dtype,
        slots: int = 1,
        ends: Sequence[int] = (),
        chunks: Sequence[int] = (32, 128, 512),
    ):
        self.partition = partition
        self.config = model.config
        self.context = context
        self.slots = slots
        self.chunks = sorted(chunks)
        self.ends = np.asarray(sorted(ends) or [-1], np.int32)
        # The hot loop carries flat arrays; the module is put together while tracing.
        self.graph, state = nnx.split(model)
        self.params, self._tree = jax.tree.flatten(state)
        specs = jax.tree.map(
            lambda p: jax.tree.map(lambda _: partition.spec(p.axes), p.get_value()),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        self.params = tuple(self.params)
        self._param_specs = tuple(
            jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        )
        self._cache_spec = partition.spec(LayerCache.axes)
        kv_heads = len(partition.layouts["kv_heads"].slots)
        self.cache: Cache = jax.jit(
            functools.partial(
                init_cache,
                self.config.layers,
                slots,
                kv_heads,
                context,
                self.config.head_dim,
                cache_dtype,
            ),
            out_shardings=NamedSharding(partition.mesh, self._cache_spec),
        )()
        self.state: steps.DecodeState | None = None
        self._programs: dict[Any, Callable] = {}

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values on the fullest device."""
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(self.cache))

    # Programs

    def _program(
        self,
        key: Any,
        body: Callable,
        in_specs: Sequence,
        out_specs: Any,
        donate: Sequence[int],
        *,
        decode: bool = False,
    ) -> Callable:
        """A function of the device's arrays as a compiled program on the mesh, made once."""
        if key not in self._programs:
            mesh = self.partition.mesh

            @functools.wraps(body)
            def local(*arguments: Any) -> Any:
                with axis_rules(self.partition.rules):
                    return body(*arguments)

            sharded = jax.shard_map(
                local, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False
            )
            platform = mesh.devices.flat[0].platform
            self._programs[key] = jax.jit(
                sharded,
                donate_argnums=tuple(donate),
                compiler_options=DECODE_OPTIONS.get(platform) if decode else None,
            )
        return self._programs[key]

    def _model(self, params: Sequence[jax.Array]) -> Decoder:
        return nnx.merge(self.graph, jax.tree.unflatten(self._tree, params))

    def _prefill(self, length: int, *, all_logits: bool) -> Callable:
        def prefill(params, cache, tokens, start, count, slot):
            model = self._model(params)
            cache, x = steps.prefill(model, cache, tokens, start, count, slot)
            if all_logits:
                return cache, model.logits(x)
            last = jax.lax.dynamic_index_in_dim(x, count - 1, keepdims=False)
            return cache, model.logits(last)

        vocab = self.partition.spec(("vocab",))
        logits = PartitionSpec(None, *vocab) if all_logits else vocab
        return self._program(
            ("prefill", length, all_logits),
            prefill,
            [self._param_specs, self._cache_spec, *[_REPLICATED] * 4],
            (self._cache_spec, logits),
            donate=[1],
            decode=length == 1,
        )

    def _begin(self, plan: SamplingPlan) -> Callable:
        def begin(logits, state, recent, position, slot, ends, values):
            return steps.begin(
                logits,
                state,
                recent,
                position,
                slot,
                ends,
                values,
                plan,
                self.config.vocab,
                self.context,
            )

        specs = [self.partition.spec(("vocab",)), *[_REPLICATED] * 6]
        return self._program(("begin", plan), begin, specs, _REPLICATED, donate=[])

    def decode_program(self, plan: SamplingPlan) -> Callable:
        """The compiled decode step: `(params, cache, state, ends, values)` to `(cache, state)`."""

        def decode(params, cache, state, ends, values):
            return steps.decode_step(
                self._model(params),
                cache,
                state,
                ends,
                values,
                plan,
                self.config.vocab,
                self.context,
            )

        specs = [self._param_specs, self._cache_spec, *[_REPLICATED] * 3]
        out = (self._cache_spec, _REPLICATED)
        return self._program(("decode", plan), decode, specs, out, donate=[1], decode=True)

    def _loop(self, plan: SamplingPlan, length: int) -> Callable:
        def loop(params, cache, state, limit, ends, values):
            return steps.decode_loop(
                self._model(params),
                cache,
                state,
                limit,
                ends,
                values,
                plan,
                self.config.vocab,
                self.context,
                length,
            )

        specs = [self._param_specs, self._cache_spec, *[_REPLICATED] * 4]
        out = (self._cache_spec, _REPLICATED, _REPLICATED)
        return self._program(("loop", plan, length), loop, specs, out, donate=[1], decode=True)

    # Use

    def _read(
        self, tokens: Sequence[int], slot: int, *, all_logits: bool, chunks: Sequence[int]
    ) -> Iterator[tuple[jax.Array, int]]:
        """Reads tokens into an empty slot, chunk by chunk: yields logits and the chunk's count."""
        start = 0
        while start < len(tokens):
            left = len(tokens) - start
            length = next((c for c in chunks if c >= left), chunks[-1])
            count = min(left, length)
            chunk = np.zeros(length, np.int32)
            chunk[:count] = tokens[start : start + count]
            self.cache, logits = self._prefill(length, all_logits=all_logits)(
                self.params, self.cache, chunk, np.int32(start), np.int32(count), np.int32(slot)
            )
            yield logits, count
            start += count

    def logits(self, tokens: Sequence[int], *, one_by_one: bool = False) -> np.ndarray:
        """Logits after each token: float32 `[time, vocab]`. Overwrites slot 0.

        Args:
          tokens: at most `context`.
          one_by_one: a token at a time, through the cache, as in decoding.
        """
        chunks = [1] if one_by_one else self.chunks
        parts = [
            np.asarray(logits)[:count, : self.config.vocab]
            for logits, count in self._read(tokens, 0, all_logits=True, chunks=chunks)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.config.vocab), np.float32)

    def start(
        self, tokens: Sequence[int], sampling: Sequence[SamplingConfig] | SamplingConfig, slot=0
    ) -> None:
        """Reads a prompt into a slot and chooses the token that follows it.

        Args:
          tokens: 1 to `context` of them.
          sampling: how tokens are chosen, of all slots or of each; the slots' plans must agree.
          slot: which one; what it held is forgotten.
        """
        configs = [sampling] * self.slots if isinstance(sampling, SamplingConfig) else sampling
        self.plan = configs[slot].plan
        self.values = SamplingValues.of(list(configs))
        # XLA:GPU fails on empty arrays when it compiles for several devices.
        window = max(1, self.plan.window)
        if self.state is None or self.state.recent.shape[1] != window:
            self.state = self._empty_state(window)
        *_, (logits, _) = self._read(tokens, slot, all_logits=False, chunks=self.chunks)
        last = tokens[-window:]
        recent = np.full(window, -1, np.int32)
        recent[window - len(last) :] = last
        self.state = self._begin(self.plan)(
            logits,
            self.state,
            recent,
            np.int32(len(tokens)),
            np.int32(slot),
            self.ends,
            self.values,
        )

    def _empty_state(self, window: int) -> steps.DecodeState:
        state = steps.DecodeState(
            token=np.zeros(self.slots, np.int32),
            position=np.zeros(self.slots, np.int32),
            active=np.zeros(self.slots, bool),
            recent=np.full((self.slots, window), -1, np.int32),
        )
        return jax.device_put(state, NamedSharding(self.partition.mesh, _REPLICATED))

    def step(self) -> None:
        """Decodes one token in each active slot; does not wait for it."""
        self.cache, self.state = self.decode_program(self.plan)(
            self.params, self.cache, self.state, self.ends, self.values
        )

    def loop(self, limit: int, length: int = 32) -> np.ndarray:
        """Decodes up to `limit` tokens in each active slot without returning to the host.

        Returns:
          int32 `[slots, limit]`, -1 where a slot had stopped.
        """
        self.cache, self.state, tokens = self._loop(self.plan, length)(
            self.params,
            self.cache,
            self.state,
            np.int32(min(limit, length)),
            self.ends,
            self.values,
        )
        return np.asarray(tokens)[:, : min(limit, length)]
