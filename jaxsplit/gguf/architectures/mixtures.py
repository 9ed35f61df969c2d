"""Decoders with mixtures of experts."""

from functools import partial
from typing import Any

from jaxsplit.gguf.architectures.entry import Architecture, decoder, head_norms, scaled
from jaxsplit.gguf.header import Header
from jaxsplit.models.config import ModelConfig
from jaxsplit.models.mixer_config import NormConfig

_NORMALIZED = {"normalize": True}


def _gpt_oss(header: Header) -> ModelConfig:
    window = header.number("attention.sliding_window", least=1)
    return decoder(
        header,
        activation="clamped_swiglu",
        attention=lambda layer: {"sinks": True} | ({} if layer % 2 else {"window": window}),
        experts={"routing": "chosen_softmax"},
    )


def _llama4(header: Header) -> ModelConfig:
    # Models with 128 experts have no norms; the norms that the others have come after RoPE.
    norm = NormConfig("rms", header.norm().epsilon, scale=False)
    norms = {"query_norm": norm, "key_norm": norm, "norm_first": False}
    local = norms if header.number("expert_count", 0) != 128 else {}
    chunk = header.number("attention.sliding_window", 8192)

    def attention(layer: int) -> dict[str, Any]:
        if not chunk:
            return local
        if layer % 4 == 3:
            return {"rope": None, "temperature": (0.1, 8192, 1)}
        return local | {"window": 8192, "chunked": True}

    experts = {"routing": "sigmoid", "normalize": False, "weigh_input": True}
    return decoder(header, interleaved=True, attention=attention, experts=experts)


def _with_head_norms(header: Header, *, norm_first: bool = True, **choices: Any) -> ModelConfig:
    return decoder(header, attention=head_norms(header, norm_first=norm_first), **choices)


def _with_wide_norms(header: Header, **choices: Any) -> ModelConfig:
    return decoder(header, attention=head_norms(header, norm_over="all"), **choices)


def _glm4moe(header: Header) -> ModelConfig:
    norms = header.has("blk.*.attn_q_norm.weight")
    experts = {} if header("expert_gating_func", 0) else {"routing": "sigmoid"}
    return decoder(header, attention=head_norms(header) if norms else {}, experts=experts)


ARCHITECTURES = {
    "bailingmoe2": Architecture(_with_head_norms),
    "deepseek": Architecture(partial(decoder, interleaved=True)),
    "dots1": Architecture(_with_head_norms),
    "ernie4_5-moe": Architecture(partial(decoder, interleaved=True, experts=_NORMALIZED)),
    "glm4moe": Architecture(_glm4moe),
    "gpt-oss": Architecture(_gpt_oss),
    "granitemoe": Architecture(lambda h: decoder(h, **scaled(h), experts=_NORMALIZED)),
    "hunyuan-moe": Architecture(partial(_with_head_norms, norm_first=False, experts=_NORMALIZED)),
    "llama4": Architecture(_llama4),
    "minimax-m2": Architecture(partial(_with_wide_norms, experts=_NORMALIZED)),
    "olmoe": Architecture(_with_wide_norms),
    "phimoe": Architecture(partial(decoder, experts=_NORMALIZED)),
    "qwen2moe": Architecture(decoder),
    "qwen3moe": Architecture(partial(_with_head_norms, experts=_NORMALIZED)),
}
