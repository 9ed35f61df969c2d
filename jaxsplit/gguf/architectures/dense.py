"""Decoders of attention and one MLP in each layer."""

import math
from functools import partial
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf.architectures.entry import (
    Architecture,
    decoder,
    head_norms,
    only_post_norms,
    post_norms,
    scaled,
    unscaled,
)
from jaxsplit.gguf.header import Header
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
        logit_scale=header.number("logit_scale"),
    )


def _cohere2(header: Header) -> ModelConfig:
    window = header.number("attention.sliding_window", least=1)
    everywhere = {"rope": None}
    return decoder(
        header,
        interleaved=True,
        attention=lambda layer: everywhere if layer % 4 == 3 else {"window": window},
        block={"parallel": True, "mlp_norm": None},
        logit_scale=header.number("logit_scale"),
    )


def _exaone4(header: Header) -> ModelConfig:
    window = header.number("attention.sliding_window", 4096, least=1)

    def attention(layer: int) -> dict[str, Any]:
        norms = head_norms(header)
        if header.layers < 64:
            return norms
        return norms | ({"rope": None} if layer % 4 == 3 else {"window": window})

    return decoder(header, attention=attention, block=only_post_norms(header))


def _falcon(header: Header) -> ModelConfig:
    block = {"parallel": True}
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
        context=min(header.number("context_length", least=1), positions),
    )


def _gptneox(header: Header) -> ModelConfig:
    parallel = bool(header("use_parallel_residual", True))
    return decoder(header, activation="gelu_tanh", block={"parallel": parallel})


def _minicpm(header: Header) -> ModelConfig:
    defaults = {
        "embedding_scale": 12.0,
        "residual_scale": 1.4 / math.sqrt(header.layers),
        "logit_scale": 256 / header.embed,
    }
    return decoder(header, **scaled(header, **defaults))


def _mistral3(header: Header) -> ModelConfig:
    attention = {}
    if temperature := header.number("attention.temperature_scale", 0.0):
        original = header.number("rope.scaling.original_context_length", least=1)
        attention["temperature"] = (temperature, original, 0)
    return decoder(header, interleaved=True, attention=attention)


def _mpt(header: Header) -> ModelConfig:
    attention = {
        "rope": None,
        "alibi": header.number("attention.max_alibi_bias", 0.0) or None,
        "clamp": header.number("attention.clamp_kqv", 0.0) or None,
    }
    return decoder(header, activation="gelu_tanh", attention=attention)


def _olmo(header: Header) -> ModelConfig:
    norm = header.norm(scale=False, bias=False)
    return decoder(
        header,
        interleaved=True,
        attention={"clamp": header.number("attention.clamp_kqv", 0.0) or None},
        block={"mixer_norm": norm, "mlp_norm": norm},
        norm=norm,
    )


def _olmo2(header: Header) -> ModelConfig:
    norms = head_norms(header, norm_over="all")
    window = header.number("attention.sliding_window", 0)
    pattern = header("attention.sliding_window_pattern", [layer % 4 < 3 for layer in range(4)])

    def attention(layer: int) -> dict[str, Any]:
        if not window or not pattern[layer % len(pattern)]:
            return norms
        heads = header.number("attention.head_count", least=1)
        rope = header.rope(header.number("attention.key_length", header.embed // heads))
        return norms | {"window": window, "rope": unscaled(rope)}

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


_interleaved = partial(decoder, interleaved=True)
_gelu = partial(decoder, activation="gelu_tanh")
_squared_relu = partial(decoder, activation="relu2")

ARCHITECTURES = {
    # With experts: Mixtral.
    "llama": Architecture(partial(_interleaved, experts={"normalize": True})),
    "arcee": Architecture(partial(_squared_relu, interleaved=True)),
    "baichuan": Architecture(_baichuan),
    "bloom": Architecture(_bloom),
    "chatglm": Architecture(_interleaved),
    "cohere2": Architecture(_cohere2),
    "command-r": Architecture(_command_r),
    "ernie4_5": Architecture(_interleaved),
    "exaone": Architecture(decoder),
    "exaone4": Architecture(_exaone4),
    "falcon": Architecture(
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
    "glm4": Architecture(lambda h: _interleaved(h, block=post_norms(h))),
    "gpt2": Architecture(_learned_positions),
    "gptneox": Architecture(_gptneox),
    "granite": Architecture(lambda h: decoder(h, **scaled(h))),
    "hunyuan-dense": Architecture(lambda h: decoder(h, attention=head_norms(h, norm_first=False))),
    "internlm2": Architecture(_interleaved),
    "minicpm": Architecture(_minicpm),
    "mistral3": Architecture(_mistral3),
    "mpt": Architecture(_mpt),
    "nemotron": Architecture(_squared_relu),
    "olmo": Architecture(_olmo),
    "olmo2": Architecture(_olmo2),
    "phi2": Architecture(partial(_gelu, block={"parallel": True, "mlp_norm": None})),
    "phi3": Architecture(decoder),
    "qwen2": Architecture(decoder),
    "qwen2vl": Architecture(decoder),
    "qwen3": Architecture(lambda h: decoder(h, attention=head_norms(h))),
    "qwen3vl": Architecture(lambda h: decoder(h, attention=head_norms(h))),
    "seed_oss": Architecture(decoder),
    "smollm3": Architecture(_smollm3),
    "stablelm": Architecture(_stablelm),
    "starcoder": Architecture(_learned_positions),
    "starcoder2": Architecture(_gelu),
}
