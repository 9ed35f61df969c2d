"""Decoders of attention and one MLP in each layer."""

import math
from functools import partial
from typing import Any

from jaxsplit.architectures.entry import (
    Architecture,
    decoder,
    head_norms,
    only_post_norms,
    post_norms,
    scaled,
    unscaled,
)
from jaxsplit.architectures.harmless import NO_WINDOW, ONE_BASE
from jaxsplit.architectures.header import Header
from jaxsplit.errors import JaxsplitError
from jaxsplit.models.config import ModelConfig


def _baichuan(header: Header) -> ModelConfig:
    if header.layers not in (32, 40):
        raise JaxsplitError(
            f"{header.file.path}: baichuan with {header.layers} layers is not supported; with 32 "
            "(7B) and 40 (13B) it is"
        )
    with_rope = header.layers == 32
    return decoder(
        header, interleaved=True, attention={} if with_rope else {"rope": None, "alibi": 8.0}
    )


def _bloom(header: Header) -> ModelConfig:
    return decoder(
        header,
        activation="gelu_tanh",
        attention={"rope": None, "alibi": 8.0},
        embedding_norm=header.norm(),
    )


def _command_r(header: Header) -> ModelConfig:
    large = header.layers >= 64
    return decoder(
        header,
        interleaved=True,
        attention=head_norms(header, norm_over="each") if large else {},
        block={"parallel": True, "mlp_norm": None},
        logit_scale=header.number("logit_scale", 0.0) or 1.0,
    )


def _cohere2(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed(4)
    return decoder(
        header,
        interleaved=True,
        attention=lambda layer: {"window": window} if local[layer] else {"rope": None},
        block={"parallel": True, "mlp_norm": None},
        logit_scale=header.number("logit_scale"),
    )


def _exaone4(header: Header) -> ModelConfig:
    large, norms = header.layers == 64, head_norms(header)
    window, local = header.window(4096, least=int(large)), header.windowed(4)

    def attention(layer: int) -> dict[str, Any]:
        if not large:
            return norms
        return norms | ({"window": window} if local[layer] else {"rope": None})

    return decoder(header, attention=attention, block=only_post_norms(header))


def _falcon(header: Header) -> ModelConfig:
    block: dict[str, Any] = {"parallel": True}
    if not header.has("blk.*.attn_norm_2.weight"):
        block["mlp_norm"] = None
    return decoder(header, activation="gelu_tanh", block=block)


def _learned_positions(header: Header) -> ModelConfig:
    positions = header.file.tensor("position_embd.weight").shape[0]
    return decoder(
        header,
        activation="gelu_tanh",
        attention={"rope": None},
        learned_positions=positions,
        context=min(header.context_length, positions),
    )


def _gptneox(header: Header) -> ModelConfig:
    parallel = header.flag("use_parallel_residual", True)
    return decoder(header, activation="gelu_tanh", block={"parallel": parallel})


def _minicpm(header: Header) -> ModelConfig:
    defaults = {
        "embedding_scale": 12.0,
        "residual_scale": 1.4 / math.sqrt(header.layers),
        "logit_scale": 256 / header.embed,
    }
    return decoder(header, **scaled(header, **defaults))


def _mistral3(header: Header) -> ModelConfig:
    length = "rope.scaling.original_context_length"
    temperature = header.temperature(length, header.context_length)
    return decoder(header, interleaved=True, attention={"attn_temperature": temperature})


def _mpt(header: Header) -> ModelConfig:
    attention = {
        "rope": None,
        "alibi": header.number("attention.max_alibi_bias", 0.0) or None,
        "clip_qkv": header.number("attention.clamp_kqv", 0.0) or None,
    }
    return decoder(header, activation="gelu_tanh", attention=attention)


def _olmo(header: Header) -> ModelConfig:
    norm = header.norm(scale=False, bias=False)
    return decoder(
        header,
        interleaved=True,
        attention={"clip_qkv": header.number("attention.clamp_kqv", 0.0) or None},
        block={"mixer_norm": norm, "mlp_norm": norm},
        norm=norm,
    )


def _olmo2(header: Header) -> ModelConfig:
    norms = head_norms(header, norm_over="all")
    window, local = header.window(0, least=0), header.windowed(4)
    rope = header.rope(header.head_dim())

    def attention(layer: int) -> dict[str, Any]:
        if not window or not local[layer]:
            return norms
        return norms | {"window": window, "rope": unscaled(rope, attention_factor=1.0)}

    return decoder(header, attention=attention, block=only_post_norms(header))


def _smollm3(header: Header) -> ModelConfig:
    return decoder(
        header, interleaved=True, attention=lambda layer: {"rope": None} if layer % 4 == 3 else {}
    )


def _stablelm(header: Header) -> ModelConfig:
    norms = header.has("blk.*.attn_q_norm.weight")
    parallel = not header.has("blk.*.ffn_norm.weight")
    return decoder(
        header,
        attention=head_norms(header, norm_over="each") if norms else {},
        block={"parallel": True, "mlp_norm": None} if parallel else {},
    )


def _glm4(header: Header) -> ModelConfig:
    # Models that read images too rotate by halves.
    interleaved = not header.sections or 0 in header.sections[:2]
    return decoder(header, interleaved=interleaved, block=post_norms(header))


_interleaved = partial(decoder, interleaved=True)
_gelu = partial(decoder, activation="gelu_tanh")
_squared_relu = partial(decoder, activation="relu2")

_layer_norm = partial(Architecture, norms="layer")
_windowless = partial(Architecture, harmless=NO_WINDOW)

ARCHITECTURES = {
    # With experts: Mixtral.
    "llama": _windowless(partial(_interleaved, experts={"normalize": True})),
    "arcee": Architecture(partial(_squared_relu, interleaved=True)),
    "baichuan": Architecture(_baichuan),
    "bloom": _layer_norm(_bloom),
    "chatglm": Architecture(_interleaved),
    "cohere2": _layer_norm(_cohere2, harmless=ONE_BASE),
    "command-r": _layer_norm(_command_r),
    "ernie4_5": Architecture(_interleaved),
    "exaone": Architecture(decoder),
    "exaone4": Architecture(_exaone4, harmless=ONE_BASE),
    "falcon": _layer_norm(
        _falcon,
        {
            f"blocks.{{i}}.{norm}.{end}": [f"blk.{{i}}.{name}.{tensor}" for name in names]
            for norm, names in (
                ("mixer_norm", ("attn_norm_2", "attn_norm")),
                ("mlp_norm", ("attn_norm",)),
            )
            for end, tensor in (("scale", "weight"), ("bias", "bias"))
        },
    ),
    "glm4": Architecture(_glm4),
    "gpt2": _layer_norm(_learned_positions),
    "gptneox": _layer_norm(_gptneox),
    "granite": Architecture(lambda h: decoder(h, **scaled(h))),
    "hunyuan-dense": Architecture(lambda h: decoder(h, attention=head_norms(h, norm_first=False))),
    "internlm2": Architecture(_interleaved),
    "minicpm": Architecture(_minicpm),
    "mistral3": Architecture(_mistral3),
    "mpt": _layer_norm(_mpt),
    "nemotron": _layer_norm(_squared_relu),
    "olmo": _layer_norm(_olmo),
    "olmo2": Architecture(_olmo2, harmless=ONE_BASE),
    "phi2": _layer_norm(partial(_gelu, block={"parallel": True, "mlp_norm": None})),
    "phi3": _windowless(decoder),
    "qwen2": _windowless(decoder),
    "qwen2vl": _windowless(decoder),
    "qwen3": _windowless(lambda h: decoder(h, attention=head_norms(h))),
    "qwen3vl": _windowless(lambda h: decoder(h, attention=head_norms(h))),
    "seed_oss": Architecture(decoder),
    "smollm3": Architecture(_smollm3),
    "stablelm": _layer_norm(
        _stablelm, harmless={"use_parallel_residual": "the tensors of norms tell it"}
    ),
    "starcoder": _layer_norm(_learned_positions),
    "starcoder2": _layer_norm(_gelu, harmless=NO_WINDOW),
}
