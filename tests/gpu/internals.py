"""What the GPU tests use beside the public API: the only file here that knows internal names."""

import dataclasses
import functools
import os
from collections.abc import Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from blocks import usual_blocks
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh

import jaxsplit
from jaxsplit.bench.random_model import QUANTIZED
from jaxsplit.cache.layers import AttentionCache, Batch
from jaxsplit.comm import one_shot, p2p, two_shot
from jaxsplit.comm.p2p import Ring
from jaxsplit.comm.peers import PeerGroup
from jaxsplit.comm.symmetric_memory import allocate_peer_buffers, allocate_ring_buffers
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.engine import SamplingConfig, compiler_options, runner, steps
from jaxsplit.engine.runner import StageRunner
from jaxsplit.engine.sampling import SamplerSpec
from jaxsplit.formats import IK_TYPES, STORED_TYPES, ModelFile
from jaxsplit.ops.activations.int8 import Int8Layout
from jaxsplit.ops.activations.layout import Readers
from jaxsplit.ops.attention import (
    cuda_flash,
    cuda_rope_cache_update,
    triton_decode,
    triton_flash,
    triton_rope_cache_update,
)
from jaxsplit.ops.attention.rope import RopeConfig
from jaxsplit.ops.attention.spec import AttentionConfig, AttentionParams
from jaxsplit.ops.matmul import api, cuda_dequantize, cuda_gemv_16bit, float8
from jaxsplit.ops.moe import triton_router
from jaxsplit.ops.moe.spec import MLPConfig, MoEConfig
from jaxsplit.ops.norm.api import add_norm
from jaxsplit.ops.norm.spec import NormConfig, NormParams
from jaxsplit.quant import TYPES, QTensor, dequantize, to_u32, unpack
from jaxsplit.sharding import Placement
from jaxsplit.sharding.axes import Axis, AxisRules
from jaxsplit.weights import loader
from jaxsplit.weights.sources import Source

INTERPRET = "JAXSPLIT_GPU_LANE_ON_CPU" in os.environ
AXIS = "tensor"


def policy(**changes: bool) -> MatmulPolicy:
    """With kernels, for the first device; `changes`: fields of it."""
    kernels = "interpret" if INTERPRET else "auto"
    found = MatmulPolicy.for_device(jax.devices()[0], kernels)
    return dataclasses.replace(found, **changes)


def _kernels(peers: PeerGroup | None = None, rules: AxisRules = AxisRules(), **changes: bool):  # noqa: B008
    """A context in which kernels run; `changes`: of the policy."""
    return forward_context(policy=policy(**changes), peers=peers, rules=rules)


def kernels_run(device: jax.Device) -> bool:
    """Whether this package's kernels run on a device."""
    return MatmulPolicy.for_device(device).kernels


def loop_options() -> dict | None:
    """Compiler options with which decode steps run as one CUDA graph."""
    return compiler_options(jax.devices()[0].platform, decode=True)


# Weights.


def raw_blocks(rng: np.random.Generator, name: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks of a GGML type: uint8 `[rows, blocks, bytes]`."""
    return usual_blocks(rng, name, rows, columns // TYPES[name].block)


def from_blocks(name: str, raw: np.ndarray) -> QTensor:
    """The matrix of such blocks, as models hold it."""
    return to_u32(unpack(name, raw))


def quantized(rng: np.random.Generator, name: str, rows: int, columns: int) -> QTensor:
    """A random matrix of a GGML type, as models hold it: `[rows, columns]`."""
    return from_blocks(name, raw_blocks(rng, name, rows, columns))


# Peers.


def make_peers(mesh: Mesh, owner: object, largest: int = 0) -> Array | None:
    """What the devices of a mesh of one axis need to exchange data: `[devices, words]`; None: they
    cannot. `largest`: elements of the largest two-shot all-reduce."""
    if INTERPRET:
        return jnp.zeros((mesh.size, 1 + 2 * mesh.size), jnp.uint32)
    size = functools.partial(two_shot.buffer_bytes, max_elements=largest)
    return allocate_peer_buffers(mesh, [AXIS], size, owner)


def peers(table: Array, largest: int = 0) -> PeerGroup:
    """Inside `shard_map`: the peers of a device, given its part of the table."""
    return PeerGroup(table.reshape(-1), (AXIS,), largest)


def one_shot_all_reduce(x: Array, peers: PeerGroup) -> Array:
    """The sum over the devices in their order, in float32."""
    with _kernels():
        return one_shot.all_reduce(x, peers)


def one_shot_all_gather(x: Array, peers: PeerGroup) -> Array:
    """`[devices, *x.shape]`."""
    with _kernels():
        return one_shot.all_gather(x, peers)


def two_shot_all_reduce(x: Array, peers: PeerGroup) -> Array:
    """The sum over the devices, of bfloat16 or float16."""
    assert two_shot.supports(x.size, x.dtype, peers)
    with _kernels():
        return two_shot.all_reduce(x, peers)


def matmul_here(x: Array, w: QTensor | Array, peers: PeerGroup) -> Array:
    """`x @ w.T` as `matmul_all_reduce` computes it on each device: float32 `[rows, out]`."""
    with _kernels(int8_activations=True, peers=peers):
        return api.matmul(x, w)


def matmul_all_reduce(x: Array, w: QTensor | Array, peers: PeerGroup, *, fused: bool) -> Array:
    """`x @ w.T`, sent to the peers by the kernel that computes it, and the sum over the devices:
    float32 `[rows, out]`. `fused`: a kernel that also stores activations receives it."""
    axis = Axis("mlp_in", 2)
    group = {"peers": peers, "rules": AxisRules({axis.name: (AXIS,)})}
    with _kernels(int8_activations=True, **group):
        y = api.unreduced_matmul(x, w, reduce_over=(axis,))
        assert y.epochs is not None
        if not fused:
            return y.all_reduce(jnp.float32)
    with _kernels(pdl=False, **group):  # XLA, which reads the sum here, must not begin early
        zeros = jnp.zeros(y.parts.shape[1:], jnp.float32)
        return add_norm(y, zeros, None, Readers((Int8Layout(),)))[1]


# Stages.


def ring_tables(devices: Sequence[jax.Device], channels: int, words: int, owner: object):
    """What each device needs to send to the next one; None: they cannot."""
    meshes = [Mesh(np.asarray([device]), (AXIS,)) for device in devices]
    if INTERPRET:
        return [*jnp.asarray(p2p.host_buffer_pointers(len(meshes), (1,)))]
    return allocate_ring_buffers(meshes, p2p.buffer_bytes(channels, words), owner)


def ring(table: Array) -> Ring:
    """A device's place in the ring, with methods `send`, `receive` and `next_round`."""
    return Ring(table.reshape(-1), jnp.ones(1, jnp.int32), INTERPRET)


# Time.


def delayed(value: Array, turns: Array) -> Array:
    """An int32 as it is, after a kernel has run for so many turns of some nanoseconds each."""
    return pl.pallas_call(
        _delay,
        out_shape=jax.ShapeDtypeStruct((1,), jnp.int32),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=INTERPRET,
        name="delay",
    )(value.reshape(1), turns.reshape(1))[0]


def _delay(value: jax.Ref, turns: jax.Ref, out: jax.Ref) -> None:
    # Never negative, which the compiler does not know.
    busy = lax.fori_loop(0, turns[0], lambda _, x: x * 0.9999 + 0.25, jnp.float32(1.0))
    out[0] = value[0] + (busy < 0).astype(jnp.int32)


# Operations, each as a function of arrays.


def quant_types() -> list[str]:
    """The types with blocks of several weights, without those that become others at load."""

    def found(name: str) -> bool:
        return STORED_TYPES[name].rows == 1 and name in QUANTIZED if name in IK_TYPES else True

    return [name for name, kind in TYPES.items() if kind.block > 1 and found(name)]


def dequantized(w: QTensor) -> np.ndarray:
    """The weights, float32."""
    return np.asarray(dequantize(w, jnp.float32))


def rounds_activations(w: QTensor | Array) -> bool:
    """Whether one or two rows of activations are rounded to 8 bits for a matrix."""
    return api.has_int8_kernel(w)


def products(x: Array, weights: Sequence, *, int8: bool, float8: bool = False) -> list[Array]:
    """`x @ w.T` with each matrix, by whatever kernel suits: float32 `[rows, out]`."""
    # With peers, single rows are multiplied with plain matrices by a kernel too.
    some = PeerGroup(jnp.zeros(5, jnp.uint32), (AXIS,))
    with _kernels(some, int8_activations=int8, float8=float8):
        return api.matmuls(x, weights)


def _only_cuda(**changes: bool):
    """A context in which kernels in CUDA C++ alone run; `changes`: of the policy."""
    found = MatmulPolicy.for_device(jax.devices()[0], "cuda")
    return forward_context(policy=dataclasses.replace(found, **changes))


def products_in_cuda(
    x: Array, weights: Sequence, *, int8: bool, float8: bool = False
) -> list[Array]:
    """As `products`, by kernels in CUDA C++."""
    with _only_cuda(int8_activations=int8, float8=float8):
        return api.matmuls(x, weights)


def gemv_16bit(x: Array, weights: Sequence[Array]) -> list[Array]:
    """`x @ w.T` with plain matrices, by the kernel in CUDA C++: float32 `[rows, out]`."""
    with _only_cuda():
        return cuda_gemv_16bit.gemv_16bit(x, weights)


def dequantized_in_cuda(weights: Sequence[QTensor], dtype: str) -> Array:
    """Matrices one below the other, by the kernel in CUDA C++."""
    with _only_cuda():
        return cuda_dequantize.dequantize(weights, jnp.dtype(dtype))


def expert_products(x: Array, stacks: Sequence[QTensor], experts: Array) -> list[Array]:
    """Rows with matrices of the experts chosen for each: float32 `[pairs, out]`."""
    with _kernels(int8_activations=True):
        return api.expert_matmuls(x, stacks, experts)


@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention layer.

    Attributes:
      heads, kv_heads, width: query heads, key and value heads, and their width.
      rope_dim, interleaved: how many dimensions of a head turn, and in which pairs.
      window, softcap: as in models; None: none.
      norms: RMS norms of queries and keys, with scales.
      sinks: there are some.
    """

    heads: int
    kv_heads: int
    width: int
    rope_dim: int
    interleaved: bool = False
    window: int | None = None
    softcap: float | None = None
    norms: bool = False
    sinks: bool = False

    @property
    def config(self) -> AttentionConfig:
        norm = NormConfig() if self.norms else None
        return AttentionConfig(
            self.heads,
            self.kv_heads,
            self.width,
            self.width,
            rope=RopeConfig(self.rope_dim, interleaved=self.interleaved),
            window=self.window,
            softcap=self.softcap,
            query_norm=norm,
            key_norm=norm,
            sinks=self.sinks,
        )

    def params(self, scales: Sequence, sinks: object) -> AttentionParams:
        """Scales `[width]` of the norms of queries and of keys, or None each, and sinks."""
        axis = Axis("head_dim", self.width)
        norms = (
            s if s is None else NormParams(s, None, NormConfig(), self.width, axis) for s in scales
        )
        return AttentionParams(*norms, sinks=sinks)


NORM_EPSILON = NormConfig().epsilon


def cache_of(keys: Array, values: Array, dtype: str) -> AttentionCache:
    """`[slots, length, kv_heads, width]` as a cache keeps them."""
    return AttentionCache.of(keys, values, jnp.dtype(dtype))


def cache_contents(cache: AttentionCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values in float64, `[slots, kv_heads, length, width]`."""

    def exact(x: Array, scale: Array | None) -> np.ndarray:
        x = np.float64(np.asarray(x.astype(jnp.float32)))
        return x if scale is None else x * np.float64(scale)[..., None]

    return exact(cache.keys, cache.key_scale), exact(cache.values, cache.value_scale)


def decode_attention(
    layer: Attention, query, key, value, positions, slots, cache, scales, sinks
) -> tuple[Array, AttentionCache]:
    """One token of each sequence, in one kernel: its heads are normalized and turned, put into the
    cache, and read it.

    Args:
      query, key, value: `[terms, batch, 1, heads * width]`, to be added up.
      positions, slots: int32 `[batch, 1]` and `[batch]`.
      cache: of earlier tokens.
      scales: of the norms of queries and keys, or None each.
      sinks: float32 `[heads]` or None.

    Returns:
      `[batch, 1, heads * width]` bfloat16, and the cache.
    """
    batch = Batch(positions, slots)
    assert triton_decode.supports(layer.config, batch, cache, query[0])
    with _kernels(pdl=False):  # XLA reads the results here
        y, cache = triton_decode.decode_attention(
            *(query, key, value, batch, cache),
            config=layer.config,
            params=layer.params(scales, sinks),
            dtype=jnp.bfloat16,
        )
    return y.array, cache


UPDATES = {"Triton": triton_rope_cache_update, "CUDA C++": cuda_rope_cache_update}
ATTENTION = {"Triton": triton_flash, "CUDA C++": cuda_flash}


def _kernels_in(backend: str):
    # Without early launches, as XLA reads the results.
    return _only_cuda() if backend == "CUDA C++" else _kernels(pdl=False)


def rope_cache_update(
    backend: str, layer: Attention, query, key, value, positions, slots, cache, scales
) -> tuple[Array, AttentionCache]:
    """Heads `[batch, time, heads * width]`, normalized and turned: the queries `[batch, time,
    heads, width]`, and the cache with the keys and values."""
    batch = Batch(positions, slots)
    with _kernels_in(backend):
        assert UPDATES[backend].supports(layer.config, batch, cache, query.dtype)
        return UPDATES[backend].rope_cache_update(
            *(query, key, value, batch, cache),
            config=layer.config,
            params=layer.params(scales, None),
        )


def flash_attention(
    backend: str, layer: Attention, queries, cache, positions, key_positions, sinks, slots
) -> Array:
    """Queries `[batch, time, kv_heads, group, width]`, already turned, and the cache that they
    read: `[batch, time, heads * width]` bfloat16."""
    options = {
        "key_positions": key_positions,
        "sinks": sinks,
        "pages": None if slots is None else slots[:, None],
    }
    with _kernels_in(backend):
        assert ATTENTION[backend].supports(queries, cache, layer.config)
        y = ATTENTION[backend].flash_attention(
            queries, cache, positions, config=layer.config, **options
        )
    return y.array


def route(logits: Array, used: int, routing: str, bias: Array | None) -> tuple[Array, Array]:
    """The experts chosen for each token and their weights, `[tokens, used]`."""
    config = MoEConfig(logits.shape[-1], used, MLPConfig(32), routing=routing)
    assert triton_router.supports(config, len(logits))
    with _kernels():
        return triton_router.topk_experts(logits, config, bias)


def multiplies_float8() -> bool:
    """Whether the first device multiplies 8-bit floating-point numbers."""
    return float8.supported_by(jax.devices()[0])


# Programs for GPUs that need not be there.


def trace_for(
    devices: Sequence[jax.Device],
    capability: float,
    file: ModelFile,
    *,
    prefill: int | None = None,
    sequences: int = 1,
    nccl: bool = False,
    cuda: bool = False,
) -> jax.stages.Traced:
    """A program of a model in `graph` mode, as it would be for some GPUs.

    Args:
      devices: of a topology.
      capability: their compute capability.
      file: the model, whose tensors are not read.
      prefill: tokens of a prompt's chunk; None: a decode step.
      sequences: of a decode step.
      nccl: GPUs cannot write to one another's memory.
      cuda: with kernels in CUDA C++ only.
    """
    kernels = MatmulPolicy(kernels=True, cuda=capability, pdl=capability >= 9)
    if cuda:
        kernels = MatmulPolicy(cuda=capability)

    def tables(mesh: Mesh, axes: Sequence[str], size: object, owner: object) -> Array:
        count = int(np.prod([mesh.shape[axis] for axis in axes]))
        return jnp.zeros((*mesh.devices.shape, 1 + 2 * count), jnp.uint32)

    def shapes(sources: Sequence[Source], placements: Sequence[Placement]) -> list:
        """Of the blocks that a batch uploads."""
        return [
            jax.ShapeDtypeStruct((*placement.shape, source.block_bytes), np.uint8)
            for source, placement in zip(sources, placements, strict=True)
        ]

    def unpacked(source: Source, raw: jax.ShapeDtypeStruct, *options: object) -> object:
        return jax.eval_shape(lambda raw: original(source, raw, *options), raw)

    original = loader._unpack
    with (
        mock.patch.object(MatmulPolicy, "for_device", lambda *_: kernels),
        mock.patch.object(runner, "allocate_peer_buffers", tables),
        mock.patch.object(loader, "_upload", shapes),
        mock.patch.object(loader, "_unpack", unpacked),
    ):
        lm = jaxsplit.load(
            file,
            devices=len(devices),
            dtype="bfloat16",
            ctx_size=4096,
            slots=sequences,
            collectives="nccl" if nccl else "auto",
        )
    [there] = lm.engine.runners
    mesh = there.stage.mesh
    mesh = Mesh(np.reshape(devices, mesh.devices.shape), mesh.axis_names)
    stage = dataclasses.replace(there.stage, mesh=mesh)
    sizes = there.size, there.cache_dtype, there.policy
    here = StageRunner(lm.model, stage, *sizes, vocab=there.vocab, peer_access=False)
    here._buffer_pointers = _shapes(there._buffer_pointers)
    params, [cache] = _shapes(here.params), _shapes(lm.engine._caches)
    count = jax.ShapeDtypeStruct((sequences,), np.int32)
    pages = jax.ShapeDtypeStruct((sequences, there.size.pages_per_sequence), np.int32)
    rows = steps.Rows(count, count, pages)
    if prefill:
        tokens = jax.ShapeDtypeStruct((1, prefill), np.int32)
        chunk = steps.PrefillChunk(count, count, rows)
        return here.prefill(1, prefill).trace(params, cache, tokens, chunk, None)
    sampler = SamplerSpec.of(SamplingConfig(temperature=0.0), there.size.context)
    state, slot_params = _shapes(lm.engine._state), _shapes(lm.engine._params)
    return here.decode_and_sample(sampler).trace(params, cache, None, state, rows, slot_params)


def _shapes(tree: object) -> object:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
