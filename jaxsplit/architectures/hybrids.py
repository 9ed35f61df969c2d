"""Decoders with recurrent layers beside attention."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from jaxsplit.architectures.entry import Architecture, decoder, head_norms, scaled
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import NAMES, Names, Rows, beside, block_names
from jaxsplit.errors import JaxsplitError
from jaxsplit.models.config import BlockConfig, ModelConfig
from jaxsplit.models.mixer_config import (
    DeltaNetConfig,
    HybridConfig,
    Mamba2Config,
    ShortConvConfig,
)
from jaxsplit.ops.attention.spec import AttentionConfig, GateConfig


def _sizes(header: Header) -> dict[str, Any]:
    """Fields of `LinearAttentionConfig`."""
    heads = header.size("ssm.time_step_rank")
    key_heads = header.size("ssm.group_count")
    inner = header.size("ssm.inner_size")
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
        "key_dim": header.size("ssm.state_size"),
        "kernel_size": header.size("ssm.conv_kernel", least=2),
    }


def _recurrent(
    header: Header, mixer: Any, tensor: str = "ssm_conv1d.weight"
) -> Callable[[int], dict[str, Any]]:
    """Fields of `BlockConfig`: of layers with this tensor, the mixer."""
    return lambda layer: {"mixer": mixer} if header.has(f"blk.{layer}.{tensor}") else {}


def _delta_net(header: Header, *, tiled: bool = False, **choices: Any) -> ModelConfig:
    norm = header.norm()
    mixer = DeltaNetConfig(**_sizes(header), norm=norm, tiled=tiled, epsilon=norm.epsilon)
    attention = head_norms(header, gate=GateConfig())
    return decoder(header, attention=attention, block=_recurrent(header, mixer), **choices)


def _mamba2_config(header: Header) -> Mamba2Config:
    norm = header.norm() if header.has("blk.*.ssm_norm.weight") else None
    conv_bias = header.has("blk.*.ssm_conv1d.bias")
    return Mamba2Config(**_sizes(header), norm=norm, conv_bias=conv_bias)


def _mamba2(header: Header) -> ModelConfig:
    header.disregard("feed_forward_length")
    return decoder(header, block={"mixer": _mamba2_config(header), "mlp": None})


def _falcon_h1(header: Header) -> ModelConfig:
    recurrent = _mamba2_config(header)

    def block(layer: int) -> dict[str, Any]:
        return {"mixer": HybridConfig(header.attention(layer), recurrent)}

    return decoder(header, block=block)


def _nemotron_h(header: Header) -> ModelConfig:
    """Each layer is Mamba-2, attention without positions, or an MLP."""
    recurrent = _mamba2_config(header)

    def block(layer: int) -> dict[str, Any]:
        if header.has(f"blk.{layer}.ffn_gate_inp.weight"):
            latent = header.size("moe_latent_size", 0, least=0)
            experts = {"routing": "sigmoid", "latent": latent}
            return {"mixer": None, "mlp": header.experts(layer, "relu2", **experts)}
        if header.count("feed_forward_length", layer=layer):
            return {"mixer": None, "mlp": header.mlp(layer, "relu2")}
        if header.count("attention.head_count_kv", layer=layer):
            return {"mixer": header.attention(layer, rope=None), "mlp": None}
        return {"mixer": recurrent, "mlp": None}

    return decoder(header, block=block)


def _granite(header: Header) -> ModelConfig:
    mixer = _mamba2_config(header)
    choices = scaled(header)
    common = choices.pop("block")

    def block(layer: int) -> dict[str, Any]:
        return common | _recurrent(header, mixer)(layer)

    return decoder(header, block=block, experts={"normalize": True}, **choices)


def _lfm2(header: Header, **choices: Any) -> ModelConfig:
    mixer = ShortConvConfig(header.embed, header.size("shortconv.l_cache", least=2))
    block = _recurrent(header, mixer, "shortconv.conv.weight")
    attention = head_norms(header, window=header.window(0, least=0) or None)
    return decoder(header, attention=attention, block=block, **choices)


def _query_and_gate(block: BlockConfig) -> tuple[int, list[int]]:
    mixer = cast(AttentionConfig, block.mixer)
    return mixer.heads, [mixer.head_dim, mixer.value_dim]


def _beta_and_dt(block: BlockConfig) -> tuple[int, list[int]]:
    mixer = cast(DeltaNetConfig, block.mixer)
    return mixer.key_heads, [mixer.value_heads // mixer.key_heads] * 2


def _all_projections(block: BlockConfig) -> tuple[int, list[int]]:
    """Older files have queries, keys, values and gates in one tensor."""
    mixer = cast(DeltaNetConfig, block.mixer)
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
    "mixer__dt_bias": "ssm_dt.bias",
    "mixer__A": "ssm_a",
    "mixer__norm__scale": "ssm_norm.weight",
    "mixer__out__kernel": "ssm_out.weight",
}

_DELTA_NET = _names(
    **_OF_STATES,
    **_in_turn("ssm_conv1d.weight", "query.conv.kernel", "key.conv.kernel", "value.conv.kernel"),
    mixer__query__kernel=[
        Rows("attn_q.weight", part=0, layout=_query_and_gate),
        Rows("ssm_in.weight", part=0, layout=_all_projections),
    ],
    mixer__key__kernel=Rows("ssm_in.weight", part=1, layout=_all_projections),
    mixer__value__kernel=Rows("ssm_in.weight", part=2, layout=_all_projections),
    mixer__gate__kernel=[
        Rows("attn_q.weight", part=1, layout=_query_and_gate),
        Rows("ssm_in.weight", part=3, layout=_all_projections),
    ],
    mixer__beta__kernel=[
        "ssm_beta.weight",
        Rows("ssm_ba.weight", part=0, layout=_beta_and_dt),
    ],
    mixer__dt__kernel=[
        "ssm_alpha.weight",
        Rows("ssm_ba.weight", part=1, layout=_beta_and_dt),
    ],
)

_MAMBA2 = _names(
    **_OF_STATES,
    **_in_turn(
        "ssm_in.weight", "gate.kernel", "value.kernel", "key.kernel", "query.kernel", "dt.kernel"
    ),
    **_in_turn("ssm_conv1d.weight", "value.conv.kernel", "key.conv.kernel", "query.conv.kernel"),
    **_in_turn("ssm_conv1d.bias", "value.conv.bias", "key.conv.bias", "query.conv.bias"),
    mixer__D="ssm_d",
)


_SHORT_CONV = _names(
    **_in_turn("shortconv.in_proj.weight", "in_gate.kernel", "out_gate.kernel", "value.kernel"),
    mixer__conv__kernel="shortconv.conv.weight",
    mixer__out__kernel="shortconv.out_proj.weight",
)

_NORMALIZED = {"experts": {"normalize": True}}
_BY_TENSORS: dict[str, str] = dict.fromkeys(
    ("full_attention_interval", "attention.recurrent_layers"),
    "tensors tell which layers are recurrent",
)

ARCHITECTURES = {
    "falcon-h1": Architecture(
        _falcon_h1,
        {
            **beside(NAMES, "attention"),
            **beside(_MAMBA2, "recurrent"),
            **block_names(mlp_norm__scale=["ffn_norm", "ffn_norm.weight"]),
        },
    ),
    "granitehybrid": Architecture(_granite, _MAMBA2),
    "lfm2": Architecture(_lfm2, _SHORT_CONV),
    "lfm2moe": Architecture(
        partial(_lfm2, experts={"normalize": True, "routing": None}), _SHORT_CONV
    ),
    "mamba2": Architecture(_mamba2, _MAMBA2),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"),
        Architecture(
            _nemotron_h,
            {**_MAMBA2, **block_names(mlp_norm__scale="attn_norm.weight")},
            harmless=_BY_TENSORS,
        ),
    ),
    "qwen35": Architecture(partial(_delta_net, tiled=True), _DELTA_NET, harmless=_BY_TENSORS),
    "qwen35moe": Architecture(
        partial(_delta_net, tiled=True, **_NORMALIZED), _DELTA_NET, harmless=_BY_TENSORS
    ),
    "qwen3next": Architecture(partial(_delta_net, **_NORMALIZED), _DELTA_NET, harmless=_BY_TENSORS),
}
