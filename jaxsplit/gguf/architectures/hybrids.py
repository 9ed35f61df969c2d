"""Decoders with recurrent layers beside attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf.architectures.entry import Architecture, decoder, head_norms, scaled
from jaxsplit.gguf.header import Header
from jaxsplit.gguf.names import NAMES, Names, Rows, block_names
from jaxsplit.models.config import BlockConfig, ModelConfig
from jaxsplit.models.mixer_config import (
    AttentionConfig,
    DeltaNetConfig,
    Mamba2Config,
    ShortConvConfig,
)


def _sizes(header: Header) -> dict[str, int]:
    """Fields of `LinearAttentionConfig`."""
    heads = header.number("ssm.time_step_rank", least=1)
    key_heads = header.number("ssm.group_count", least=1)
    inner = header.number("ssm.inner_size", least=1)
    if heads % key_heads or inner % heads:
        raise JaxsplitError(
            f"{header.file.path}: a state of {inner} values in {heads} heads and {key_heads} "
            f"groups cannot be divided evenly ({header.file.architecture}.ssm.inner_size, "
            "time_step_rank and group_count)"
        )
    return {
        "value_heads": heads,
        "key_heads": key_heads,
        "value_dim": inner // heads,
        "key_dim": header.number("ssm.state_size", least=1),
        "width": header.number("ssm.conv_kernel", least=2),
    }


def _recurrent(
    header: Header, mixer: Any, tensor: str = "ssm_conv1d.weight"
) -> Callable[[int], dict[str, Any]]:
    """Fields of `BlockConfig`: of layers with this tensor, the mixer."""
    return lambda layer: {"mixer": mixer} if header.has(f"blk.{layer}.{tensor}") else {}


def _delta_net(header: Header, *, tiled: bool = False, **choices: Any) -> ModelConfig:
    norm = header.norm()
    mixer = DeltaNetConfig(**_sizes(header), norm=norm, tiled=tiled, epsilon=norm.epsilon)
    attention = head_norms(header, gate=True)
    return decoder(header, attention=attention, block=_recurrent(header, mixer), **choices)


def _granite(header: Header) -> ModelConfig:
    norm = header.norm() if header.has("blk.*.ssm_norm.weight") else None
    conv_bias = header.has("blk.*.ssm_conv1d.bias")
    mixer = Mamba2Config(**_sizes(header), norm=norm, conv_bias=conv_bias)
    choices = scaled(header)
    common = choices.pop("block")

    def block(layer: int) -> dict[str, Any]:
        return common | _recurrent(header, mixer)(layer)

    return decoder(header, block=block, experts={"normalize": True}, **choices)


def _lfm2(header: Header, **choices: Any) -> ModelConfig:
    mixer = ShortConvConfig(header.embed, header.number("shortconv.l_cache", least=2))
    block = _recurrent(header, mixer, "shortconv.conv.weight")
    return decoder(header, attention=head_norms(header), block=block, **choices)


def _part(tensor: str, index: int, layout: Callable[[Any], tuple[int, list[int]]]) -> Rows:
    """Rows of a tensor that consists of groups of several parts.

    Args:
      tensor: its name.
      index: which part of each group.
      layout: of the mixer's config: how many groups, and the rows of each part of one.
    """

    def order(block: BlockConfig) -> np.ndarray:
        groups, sizes = layout(block.mixer)
        rows = np.arange(groups * sum(sizes)).reshape(groups, -1)
        return rows[:, sum(sizes[:index]) : sum(sizes[: index + 1])]

    return Rows(tensor, order=order)


def _query_and_gate(mixer: AttentionConfig) -> tuple[int, list[int]]:
    return mixer.heads, [mixer.head_dim, mixer.value_dim]


def _strength_and_step(mixer: DeltaNetConfig) -> tuple[int, list[int]]:
    return mixer.key_heads, [mixer.value_heads // mixer.key_heads] * 2


def _all_projections(mixer: DeltaNetConfig) -> tuple[int, list[int]]:
    """Older files have queries, keys, values and gates in one tensor."""
    values = mixer.value_heads // mixer.key_heads * mixer.value_dim
    return mixer.key_heads, [mixer.key_dim, mixer.key_dim, values, values]


def _names(**names: str | Rows | list[str | Rows]) -> Names:
    """Names as `block_names` takes them, after those of other mixers."""
    return {
        path: [*NAMES.get(path, ()), *choices] for path, choices in block_names(**names).items()
    }


def _in_turn(tensor: str, *paths: str) -> dict[str, Rows]:
    """Names of parameters of the mixer whose rows follow one another in a tensor."""
    paths = tuple(f"mixer.{path}" for path in paths)
    return {path.replace(".", "__"): Rows(tensor, paths[:i]) for i, path in enumerate(paths)}


_OF_STATES = {
    "mixer__step_bias": "ssm_dt.bias",
    "mixer__decay": "ssm_a",
    "mixer__norm__scale": "ssm_norm.weight",
    "mixer__out__kernel": "ssm_out.weight",
}

_DELTA_NET = _names(
    **_OF_STATES,
    **_in_turn("ssm_conv1d.weight", "query.conv.kernel", "key.conv.kernel", "value.conv.kernel"),
    mixer__query__kernel=[
        _part("attn_q.weight", 0, _query_and_gate),
        _part("ssm_in.weight", 0, _all_projections),
    ],
    mixer__key__kernel=_part("ssm_in.weight", 1, _all_projections),
    mixer__value__kernel=_part("ssm_in.weight", 2, _all_projections),
    mixer__gate__kernel=[
        _part("attn_q.weight", 1, _query_and_gate),
        "attn_gate.weight",
        _part("ssm_in.weight", 3, _all_projections),
    ],
    mixer__strength__kernel=["ssm_beta.weight", _part("ssm_ba.weight", 0, _strength_and_step)],
    mixer__step__kernel=["ssm_alpha.weight", _part("ssm_ba.weight", 1, _strength_and_step)],
)

_MAMBA2 = _names(
    **_OF_STATES,
    **_in_turn(
        "ssm_in.weight", "gate.kernel", "value.kernel", "key.kernel", "query.kernel", "step.kernel"
    ),
    **_in_turn("ssm_conv1d.weight", "value.conv.kernel", "key.conv.kernel", "query.conv.kernel"),
    **_in_turn("ssm_conv1d.bias", "value.conv.bias", "key.conv.bias", "query.conv.bias"),
    mixer__skip="ssm_d",
)

_SHORT_CONV = _names(
    **_in_turn("shortconv.in_proj.weight", "in_gate.kernel", "out_gate.kernel", "value.kernel"),
    mixer__conv__kernel="shortconv.conv.weight",
    mixer__out__kernel="shortconv.out_proj.weight",
)

_NORMALIZED = {"experts": {"normalize": True}}

ARCHITECTURES = {
    "granitehybrid": Architecture(_granite, _MAMBA2),
    "lfm2": Architecture(_lfm2, _SHORT_CONV),
    "lfm2moe": Architecture(partial(_lfm2, **_NORMALIZED), _SHORT_CONV),
    "qwen35": Architecture(partial(_delta_net, tiled=True), _DELTA_NET),
    "qwen35moe": Architecture(partial(_delta_net, tiled=True, **_NORMALIZED), _DELTA_NET),
    "qwen3next": Architecture(partial(_delta_net, **_NORMALIZED), _DELTA_NET),
}
