"""Memory, cost and predicted speed of a model on a mesh, before either is there.

  jaxsplit plan --model=FILE.gguf --devices=4 --device_kind="RTX 3090"
  jaxsplit plan --random=llama-70b:Q4_K_M --mesh=stage:2,tensor:2

Only the file's header is read; --random needs no file. Without --mesh, all
split modes are compared, the best first. Exit status: 0, or 2 with one line
that says what to fix.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxsplit.cli import options
from jaxsplit.cli.program import local_model
from jaxsplit.config import DEFAULT_CONTEXT, LoadConfig
from jaxsplit.errors import JaxsplitError

if TYPE_CHECKING:
    from rich.table import Table

    from jaxsplit.plan import DeviceKind, Plan

GROUPS = {
    "model": "Model and devices",
    "prompt_tokens": "Prediction",
    "memory": "Devices that are not known by name",
    "json": "Output",
    **options.GROUPS,
}

_MODEL = flags.DEFINE_string("model", None, options.MODEL_HELP)
_RANDOM = flags.DEFINE_string(
    "random", None, "a well-known shape instead, as SHAPE:TYPE, such as llama-8b:Q4_K_M"
)
_KIND = flags.DEFINE_multi_string(
    "device_kind", ["H200"], "kind of the devices; repeat it to give each its own"
)
_LOAD = options.define(
    LoadConfig,
    skip=["activations", "collectives", "kernels", "lora", "main_device"],
    split_mode=None,
    dtype="bfloat16",
)
_PROMPT = flags.DEFINE_integer(
    "prompt_tokens", None, "length of the prompt (default: 512, or the context)", lower_bound=1
)
_MEMORY = flags.DEFINE_float("memory", None, "GB of a device, instead of its kind's")
_BANDWIDTH = flags.DEFINE_float("bandwidth", None, "GB/s of its memory")
_TFLOPS = flags.DEFINE_float("tflops", None, "TFLOP/s of its matrix products")
_LINK = flags.DEFINE_float("link", None, "GB/s between devices, in each direction")
_JSON = flags.DEFINE_bool("json", False, "print JSON")

_MAX_DEVICES, _MAX_SLOTS = 512, 65536


def _kinds(count: int) -> "list[DeviceKind]":
    """The kind of each device."""
    from jaxsplit.plan import DeviceKind, device_kind

    sheet = {
        "memory": (_MEMORY.value, 1e9),
        "bandwidth": (_BANDWIDTH.value, 1e9),
        "flops": (_TFLOPS.value, 1e12),
        "link": (_LINK.value, 1e9),
    }
    changes: dict[str, Any] = {
        name: value * unit for name, (value, unit) in sheet.items() if value is not None
    }
    if not all(0 < value < math.inf for value in changes.values()):
        raise JaxsplitError("--memory, --bandwidth, --tflops and --link must be above 0 and finite")
    kinds = [
        DeviceKind(name, **changes)
        if len(changes) == 4
        else dataclasses.replace(device_kind(name), **changes)
        for name in _KIND.value
    ]
    if len(kinds) not in (1, count):
        raise JaxsplitError(
            f"--device_kind is given {len(kinds)} times for {count} devices; give it once, or once "
            "for each"
        )
    return kinds * (count // len(kinds))


def _plans() -> "tuple[list[Plan], int]":
    """Plans, the best first, and the length of the prompt."""
    if _MODEL.value is None and _RANDOM.value is None:
        raise JaxsplitError(
            "no model is given; use --model=FILE.gguf, or --random=SHAPE:TYPE for a well-known one"
        )
    import jax.numpy as jnp

    from jaxsplit.architectures import model_config
    from jaxsplit.bench.random_model import model_file
    from jaxsplit.llm import named_dtype
    from jaxsplit.plan import best_plans, make_plan
    from jaxsplit.sharding import parse_mesh, parse_shares, split_mode
    from jaxsplit.weights import parameter_sources

    path = None if _MODEL.value is None else local_model(_MODEL.value)
    file = model_file(path, _RANDOM.value)
    model = model_config(file)
    sources = parameter_sources(file, model)
    chosen = options.values(_LOAD)
    mode = chosen.pop("split_mode")
    c: LoadConfig = LoadConfig.of(chosen)
    shape = None if c.mesh is None else parse_mesh(c.mesh)
    count = math.prod(shape.values()) if shape else len(_KIND.value)
    if c.devices is not None:
        count = c.devices
    if count < 1:
        raise JaxsplitError(f"devices={count} must be at least 1")
    if count > _MAX_DEVICES:
        raise JaxsplitError(f"{count:,} devices are too many; plan at most {_MAX_DEVICES:,}")
    if (c.slots or 1) > _MAX_SLOTS:
        raise JaxsplitError(f"slots={c.slots} are too many; plan at most {_MAX_SLOTS:,}")
    if shape and math.prod(shape.values()) != count:
        raise JaxsplitError(
            f"mesh={c.mesh} has {math.prod(shape.values())} devices, devices={count}"
        )
    context = DEFAULT_CONTEXT if c.ctx_size is None else c.ctx_size
    context = min(context or model.context, model.context)
    weights, dtype, reduce_dtype, cache_dtype = map(
        named_dtype, (c.weights, c.dtype, c.all_reduce_dtype, c.cache_dtype)
    )
    how = {
        "weights": weights,
        "dtype": dtype or jnp.dtype(jnp.bfloat16),
        "float8": c.prefill_dtype == "float8",
        "reduce_dtype": reduce_dtype,
        "cache_dtype": cache_dtype,
        "context": context,
        "slots": c.slots or 1,
    }
    prompt = min(512, context) if _PROMPT.value is None else _PROMPT.value
    if prompt > context:
        raise JaxsplitError(
            f"prompt_tokens={prompt} is longer than the context of {context} tokens; set "
            f"ctx_size={model.context} at most"
        )
    kinds = _kinds(count)
    unable = [kind.name for kind in kinds if not kind.float8]
    if how["float8"] and unable:
        raise JaxsplitError(f"prefill_dtype=float8 does not suit {unable[0]}, which has no float8")
    if mode is None and shape is None and c.tensor_split is None:
        return best_plans(sources, model, kinds, **how), prompt
    mode = mode or "graph"
    axis = split_mode(mode).axis
    if shape is None:
        shape = {axis: count} if axis else {"tensor": 1}
    if axis is None and math.prod(shape.values()) > 1:
        raise JaxsplitError(f"mesh={c.mesh} does not fit split_mode={mode}, one device")
    shares = None if c.tensor_split is None else parse_shares(c.tensor_split)
    kinds = kinds[: math.prod(shape.values())]
    return [make_plan(sources, model, mode, shape, kinds, shares=shares, **how)], prompt


def main(_: list[str]) -> None:
    """Prints plans."""
    plans, prompt = _plans()
    if _JSON.value:
        print(json.dumps([plan.summary(prompt) for plan in plans], indent=1))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_comparison(plans, prompt))
    console.print(_details(plans[0]))
    console.print(f"By default, the cache would have room for {plans[0].cache_tokens:,} tokens.")
    if not plans[0].fits:
        console.print(
            "Nothing fits. More devices may, a shorter --ctx_size, --cache_dtype=int8, or a file "
            "with fewer bits."
        )


def _table(title: str, *columns: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _comparison(plans: "list[Plan]", prompt: int) -> "Table":
    """A line for each plan: the fullest device, a decode step, predicted speed."""
    name = Path(_MODEL.value or _RANDOM.value or "").name
    table = _table(
        f"{name}: the fullest device; collectives of a decode step; predictions",
        *("split", "fits", "weights", "cache", "scratch", "padding"),
        *("reduce", "gather", "transfer", "bytes", "decode/s", "prefill/s"),
    )
    for plan in plans:
        full, collectives = plan.fullest, plan.collectives
        table.add_row(
            plan.name,
            "yes" if plan.fits else "no",
            *(_bytes(full[key]) for key in ("weights", "cache", "scratch", "padding")),
            *(str(collectives[kind]) for kind in ("all-reduce", "all-gather")),
            str(plan.transfers[0]),
            _bytes(plan.collective_bytes + plan.transfers[0] * plan.transfers[1]),
            f"{plan.decode_rate:.1f}",
            f"{plan.prefill_rate(prompt):.0f}",
        )
    return table


def _details(plan: "Plan") -> "Table":
    """A line for each device."""
    table = _table(
        f"{plan.name}, by device; the limit is that of its memory's bandwidth",
        *("device", "kind", "layers", "weights", "cache", "scratch", "memory"),
        *("read/step", "GFLOP/step", "limit/s"),
    )
    for rank, kind in enumerate(plan.kinds):
        held = plan.on_device(rank)
        mine = [s for s in plan.stages if rank in s.stage.ranks]
        read = sum(s.read for s in mine)
        used = held["weights"] + held["cache"] + held["scratch"]
        table.add_row(
            str(rank),
            kind.name,
            ", ".join(f"{s.stage.layers.start}-{s.stage.layers.stop - 1}" for s in mine) or "none",
            *(_bytes(held[key]) for key in ("weights", "cache", "scratch")),
            f"{used / kind.memory:.0%}",
            _bytes(read),
            f"{sum(s.decode.flops for s in mine) / 1e9:.2f}",
            f"{kind.bandwidth / read:.0f}" if read else "",
        )
    return table


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.3g} {unit}"
