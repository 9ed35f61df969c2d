"""Groups of pairs of a token and an expert in a single kernel in CUDA C++: as `groups`."""

import importlib.resources

import jax
import jax.numpy as jnp
from jax import Array

from jaxsplit.context import current_context
from jaxsplit.cuda.call import Launch, cuda_call
from jaxsplit.cuda.source import Arguments, constants

_MAX_THREADS = 1024
_PAIRS_OF_THREAD = 4
_MAX_EXPERTS = 1024
_FOLDER = importlib.resources.files("jaxsplit") / "ops" / "moe"


def supports(held: int) -> bool:
    """Whether the kernel supports a number of experts of a device."""
    return current_context().policy.cuda > 0 and held <= _MAX_EXPERTS


def group_pairs(topk_ids: Array, held: Array, count: int, rows: int, most: int) -> list[Array]:
    """The fields of `PairGroups`, in the order of `launch_of`; arguments as there."""
    launch = launch_of(topk_ids, held, count, rows, most)
    return cuda_call(launch, capability=current_context().policy.cuda)


def launch_of(topk_ids: Array, held: Array, count: int, rows: int, most: int) -> Launch:
    """The launch.

    Args:
      topk_ids: experts of each token, int32 `[tokens, top_k]`.
      held: of each expert, its index among those of this device, or their count, int32 `[experts]`.
      count: of experts that this device holds.
      rows: pairs of a group.
      most: groups that there may be.
    """
    given, pairs = Arguments(), topk_ids.size
    shapes = [*[(most,)] * 3, *[(most, rows)] * 2, (1,), (pairs,), (pairs,)]
    results = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    threads = 32
    while threads < _MAX_THREADS and threads * _PAIRS_OF_THREAD < pairs:
        threads *= 2
    body = f"  Pairs pairs = {given.operands(topk_ids, held)};\n"
    body += f"  Groups groups = {given.results(*results)};\n  sort_pairs(pairs, groups);\n"
    sizes = {
        "PAIRS": pairs,
        "TOP_K": topk_ids.shape[1],
        "HELD": count,
        "ROWS": rows,
        "THREADS": threads,
    }
    return given.launch(
        "group_pairs",
        constants(sizes),
        _FOLDER / "cuda_groups.cu",
        body=body,
        grid=(count + 1, 1, 1),
        threads=threads,
    )
