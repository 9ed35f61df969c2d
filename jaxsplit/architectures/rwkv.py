"""RWKV, and decoders with its time mixing."""

from collections.abc import Mapping
from typing import Any

from jaxsplit.architectures.entry import Architecture, decoder
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import Names, Rows, block_names
from jaxsplit.models.block_config import TokenShiftBlockConfig
from jaxsplit.models.config import ModelConfig
from jaxsplit.models.mixer_config import ChannelMixConfig, RWKV6Config, RWKV7Config
from jaxsplit.models.residual_config import OutputScaleConfig


def _heads(header: Header) -> tuple[int, int]:
    """How many heads, and their width."""
    width = header.size("wkv.head_size")
    header.disregard("attention.head_count")
    if header.embed % width:
        raise header.wrong("wkv.head_size", width, f"a divisor of {header.embed}")
    return header.embed // width, width


def _rwkv6_config(header: Header) -> RWKV6Config:
    heads, width = _heads(header)
    kv_heads = header.size("attention.head_count_kv", heads)
    if heads % kv_heads:
        raise header.wrong("attention.head_count_kv", kv_heads, f"a divisor of {heads}")
    return RWKV6Config(
        heads,
        kv_heads,
        width,
        mix_rank=header.size("time_mix_extra_dim"),
        decay_rank=header.size("time_decay_extra_dim"),
        bonus=header.has("blk.*.time_mix_first.weight"),
        bias=header.has("blk.*.time_mix_key.bias"),
    )


def _rwkv7_config(header: Header, layer: int) -> RWKV7Config:
    heads, width = _heads(header)
    gated = header.has(f"blk.{layer}.time_mix_g1.weight")
    return RWKV7Config(
        heads,
        width,
        decay_rank=header.size("attention.decay_lora_rank"),
        iclr_rank=header.size("attention.iclr_lora_rank"),
        value_rank=header.size("attention.value_residual_mix_lora_rank"),
        gate_rank=header.size("attention.gate_lora_rank") if gated else 0,
        norm=header.has(f"blk.{layer}.time_mix_ln.weight"),
        first=layer == 0,
    )


def _channel_mix(header: Header) -> ChannelMixConfig:
    gated = header.has("blk.*.channel_mix_receptance.weight")
    return ChannelMixConfig(header.embed, header.size("feed_forward_length"), gated)


def _rwkv6(header: Header) -> ModelConfig:
    every = header.count("rescale_every_n_layers", 0)
    mlp = _channel_mix(header)

    def block(layer: int) -> dict[str, Any]:
        halved = every and (layer + 1) % every == 0
        after = (OutputScaleConfig(0.5),) if halved else ()
        return {"mixer": _rwkv6_config(header), "mlp": mlp, "after": after}

    norm = header.norm()
    return decoder(header, block=block, block_type=TokenShiftBlockConfig, embedding_norm=norm)


def _rwkv6_qwen(header: Header) -> ModelConfig:
    return decoder(header, block={"mixer": _rwkv6_config(header)})


def _rwkv7(header: Header) -> ModelConfig:
    mlp = _channel_mix(header)
    return decoder(
        header,
        block=lambda layer: {"mixer": _rwkv7_config(header, layer), "mlp": mlp},
        block_type=TokenShiftBlockConfig,
        embedding_norm=header.norm(),
        carried=header.embed,
    )


def _rwkv7_qwen(header: Header) -> ModelConfig:
    return decoder(
        header,
        block=lambda layer: {"mixer": _rwkv7_config(header, layer)},
        carried=header.embed,
    )


def _lerps(names: str) -> Mapping[str, list[str | Rows]]:
    """Names of the shares of token shifts, one after the other in one tensor, or in their own."""
    paths = tuple(f"mixer.lerp.{name}" for name in names)
    return {
        path.replace(".", "__"): [
            f"time_mix_lerp_{name}.weight",
            Rows("time_mix_lerp_fused.weight", paths[:i]),
        ]
        for i, (path, name) in enumerate(zip(paths, names, strict=True))
    }


_COMMON: Names = block_names(
    mixer__receptance__kernel="time_mix_receptance.weight",
    mixer__receptance__bias="time_mix_receptance.bias",
    mixer__key__kernel="time_mix_key.weight",
    mixer__key__bias="time_mix_key.bias",
    mixer__value__kernel="time_mix_value.weight",
    mixer__value__bias="time_mix_value.bias",
    mixer__norm__scale="time_mix_ln.weight",
    mixer__norm__bias="time_mix_ln.bias",
    mixer__out__kernel="time_mix_output.weight",
    mlp_norm__scale=["attn_norm_2.weight", "ffn_norm.weight"],
    mlp_norm__bias="attn_norm_2.bias",
    mlp__lerp_key="channel_mix_lerp_k.weight",
    mlp__lerp_receptance="channel_mix_lerp_r.weight",
    mlp__key__kernel="channel_mix_key.weight",
    mlp__value__kernel="channel_mix_value.weight",
    mlp__receptance__kernel="channel_mix_receptance.weight",
)

_RWKV6 = {
    **_COMMON,
    **block_names(
        **_lerps("wkvrg"),
        mixer__lerp_input="time_mix_lerp_x.weight",
        mixer__lerp_down__kernel="time_mix_w1.weight",
        mixer__lerp_up="time_mix_w2.weight",
        mixer__gate__kernel="time_mix_gate.weight",
        mixer__decay__bias="time_mix_decay.weight",
        mixer__decay__down__kernel="time_mix_decay_w1.weight",
        mixer__decay__up__kernel="time_mix_decay_w2.weight",
        mixer__bonus="time_mix_first.weight",
    ),
}

_RWKV7 = {
    **_COMMON,
    **block_names(
        **_lerps("rwkvag"),
        mixer__decay__bias="time_mix_w0.weight",
        mixer__decay__down__kernel="time_mix_w1.weight",
        mixer__decay__up__kernel="time_mix_w2.weight",
        mixer__iclr__bias="time_mix_a0.weight",
        mixer__iclr__down__kernel="time_mix_a1.weight",
        mixer__iclr__up__kernel="time_mix_a2.weight",
        mixer__value_mix__bias="time_mix_v0.weight",
        mixer__value_mix__down__kernel="time_mix_v1.weight",
        mixer__value_mix__up__kernel="time_mix_v2.weight",
        mixer__gate_down__kernel="time_mix_g1.weight",
        mixer__gate_up__kernel="time_mix_g2.weight",
        mixer__removal_scale="time_mix_k_k.weight",
        mixer__iclr_scale="time_mix_k_a.weight",
        mixer__bonus="time_mix_r_k.weight",
    ),
}

_FIRST = r"blk\.0\.time_mix_v[012]\."
"""Tensors of the first layer, which takes no values from itself."""

_ONE_SHIFT = {"token_shift_count": "time mixing has one token shift, as the tensors say"}

ARCHITECTURES = {
    "arwkv7": Architecture(_rwkv7_qwen, _RWKV7, unused=_FIRST, harmless=_ONE_SHIFT),
    "rwkv6": Architecture(_rwkv6, _RWKV6, norms="layer"),
    "rwkv6qwen2": Architecture(_rwkv6_qwen, _RWKV6, harmless=_ONE_SHIFT),
    "rwkv7": Architecture(_rwkv7, _RWKV7, unused=_FIRST, norms="layer"),
}
