"""Decoders with mixtures of experts."""

from functools import partial
from typing import Any

from jaxsplit.architectures.entry import Architecture, decoder, head_norms, rotations, scaled
from jaxsplit.architectures.harmless import NO_WINDOW
from jaxsplit.architectures.header import Header
from jaxsplit.models.config import ModelConfig
from jaxsplit.ops.norm.spec import NormConfig

_NORMALIZED = {"normalize": True}
_ROUTED = {"routing": None}
"""The file must say how experts are weighed."""


def _gpt_oss(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed(2)
    rope, local_rope = rotations(header)
    return decoder(
        header,
        activation="clamped_swiglu",
        attention=lambda layer: (
            {"sinks": True}
            | ({"rope": local_rope, "window": window} if local[layer] else {"rope": rope})
        ),
        experts={"routing": "softmax_after_topk"},
    )


def _llama4(header: Header) -> ModelConfig:
    # Models with 128 experts have no norms; the norms that the others have come after RoPE.
    norm = NormConfig("rms", header.norm().epsilon, scale=False)
    norms = {"query_norm": norm, "key_norm": norm, "norm_first": False}
    rope_norms = norms if header.count("expert_count", 0) != 128 else {}
    # Chunks have one size; a file can only say that there are none.
    chunked, local = header.window(8192, least=0) > 0, header.windowed(4)
    rope, local_rope = rotations(header, interleaved=True)

    def attention(layer: int) -> dict[str, Any]:
        if not chunked:
            return rope_norms | {"rope": rope}
        chunk = {"window": 8192, "chunked": True} if local[layer] else {}
        if layer % 4 == 3:
            return chunk | {"rope": None, "attn_temperature": (0.1, 8192, 1)}
        return rope_norms | chunk | {"rope": local_rope if local[layer] else rope}

    experts = {"routing": "sigmoid", "apply_router_weight_on_input": True}
    return decoder(header, interleaved=True, attention=attention, experts=experts)


def _with_head_norms(header: Header, *, norm_first: bool = True, **choices: Any) -> ModelConfig:
    return decoder(header, attention=head_norms(header, norm_first=norm_first), **choices)


def _with_wide_norms(header: Header, **choices: Any) -> ModelConfig:
    return decoder(header, attention=head_norms(header, norm_over="all"), **choices)


def _glm4moe(header: Header) -> ModelConfig:
    norms = header.has("blk.*.attn_q_norm.weight")
    attention = head_norms(header) if norms else {}
    return decoder(header, attention=attention, experts={"routing": "sigmoid"})


ARCHITECTURES = {
    "bailingmoe2": Architecture(partial(_with_head_norms, experts=_ROUTED)),
    "deepseek": Architecture(partial(decoder, interleaved=True)),
    "dots1": Architecture(partial(_with_head_norms, experts=_ROUTED)),
    "ernie4_5-moe": Architecture(partial(decoder, interleaved=True, experts=_NORMALIZED)),
    "glm4moe": Architecture(_glm4moe),
    "gpt-oss": Architecture(_gpt_oss),
    "granitemoe": Architecture(lambda h: decoder(h, **scaled(h), experts=_NORMALIZED)),
    "hunyuan-moe": Architecture(partial(_with_head_norms, norm_first=False, experts=_NORMALIZED)),
    "llama4": Architecture(_llama4),
    "minimax-m2": Architecture(partial(_with_wide_norms, experts=_NORMALIZED | _ROUTED)),
    "olmoe": Architecture(_with_wide_norms),
    "phimoe": Architecture(partial(decoder, experts=_NORMALIZED), harmless=NO_WINDOW),
    "qwen2moe": Architecture(decoder, harmless=NO_WINDOW),
    "qwen3moe": Architecture(partial(_with_head_norms, experts=_NORMALIZED), harmless=NO_WINDOW),
}
