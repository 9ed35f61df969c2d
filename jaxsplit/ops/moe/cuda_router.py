"""Top-k routing in a single kernel in CUDA C++: as `triton_router`."""

import importlib.resources

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants
from jaxsplit.ops.activations import cuda_rows
from jaxsplit.ops.activations.layout import RMSStatistics
from jaxsplit.ops.moe.spec import MoEConfig

_MAX_TOKENS = 256
_MAX_EXPERTS = 1024
_ROUTINGS = ("softmax", "sigmoid", "sqrt_softplus", "softmax_after_topk")
_FOLDER = importlib.resources.files("jaxsplit") / "ops" / "moe"


def supports(config: MoEConfig, tokens: int) -> bool:
    """Whether the kernel supports a mixture and a number of tokens."""
    small = config.experts <= _MAX_EXPERTS and config.top_k <= 32 and tokens <= _MAX_TOKENS
    return config.groups == 1 and small and config.routing in _ROUTINGS


def topk_experts(
    logits: Array,
    config: MoEConfig,
    bias: Array | None = None,
    scale: Array | None = None,
    *,
    rms: RMSStatistics | None = None,
    logit_bias: Array | None = None,
) -> tuple[Array, Array]:
    """As `jaxsplit.ops.moe.api.topk_experts`, for experts in a single group."""
    shape = (*logits.shape[:-1], config.top_k)
    logits, options = logits.reshape(-1, config.experts), {"rms": rms, "logit_bias": logit_bias}
    launch = launch_of(logits, config, bias, scale, **options)
    ids, weights = cuda_call(launch, capability=current_context().policy.cuda)
    return ids.reshape(shape), weights.reshape(shape)


def launch_of(
    logits: Array,
    config: MoEConfig,
    bias: Array | None,
    scale: Array | None,
    *,
    rms: RMSStatistics | None,
    logit_bias: Array | None = None,
) -> Launch:
    """The launch, for `[tokens, experts]`."""
    given, chosen = Arguments(), (len(logits), config.top_k)
    squares = None if rms is None else rms.squares
    results = [jax.ShapeDtypeStruct(chosen, dtype) for dtype in (jnp.int32, jnp.float32)]
    body = f"  Router router = {given.operands(logits, bias, scale, squares, logit_bias)};\n"
    body += f"  select_experts(router, {', '.join(map(given.result, results))});\n"
    sizes = {
        "EXPERTS": config.experts,
        "TOP_K": config.top_k,
        "ROUTING": _ROUTINGS.index(config.routing),
        "NORMALIZE": int(config.normalize),
        "SCALE": float(config.scale),
        **cuda_rows.normalization(rms),
    }
    return given.launch(
        "topk_experts",
        constants(sizes),
        _FOLDER / "cuda_router.cu",
        body=body,
        grid=(len(logits), 1, 1),
        threads=32,
    )
