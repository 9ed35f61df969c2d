"""Decoders with mixtures of experts."""

import dataclasses
import math
from functools import partial
from typing import Any

from jaxsplit.architectures.entry import (
    Architecture,
    bounded_mlp,
    decoder,
    head_norms,
    post_norms,
    rotations,
    scaled,
    unscaled,
)
from jaxsplit.architectures.harmless import NO_WINDOW
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import NAMES, Rows, beside, block_names, side_by_side
from jaxsplit.models.block_config import (
    ParallelBlockConfig,
    RoutedEarlyBlockConfig,
    TwoMLPsBlockConfig,
)
from jaxsplit.models.config import DenseMoEConfig, GroveMoEConfig, MLPConfig, ModelConfig
from jaxsplit.models.mixer_config import BlockIndexerConfig, BlockSparseConfig
from jaxsplit.ops.norm.spec import NormConfig

_NORMALIZED = {"normalize": True}
_ROUTED = {"routing": None}
"""The file must say how experts are weighed."""


def _afmoe(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed(4)

    def attention(layer: int) -> dict[str, Any]:
        found = head_norms(header, gate=header.gate(layer))
        if local[layer]:
            found["window"] = window
        return found if (layer + 1) % 4 else found | {"rope": None}

    return decoder(
        header,
        attention=attention,
        block=post_norms(header),
        experts=_ROUTED,
        embedding_scale=math.sqrt(header.embed),
    )


def _arctic(header: Header) -> ModelConfig:
    def block(layer: int) -> dict[str, Any]:
        dense = header.mlp(layer, hidden=header.embed)
        return {"mlp": dense, "stream_mlp": header.experts(layer, normalize=True)}

    return decoder(header, interleaved=True, block=block, block_type=TwoMLPsBlockConfig)


def _cohere2(header: Header) -> ModelConfig:
    """Full layers have no positions, except for the dense ones in front."""
    window, local = header.window(), header.windowed(4)
    dense = header.count("leading_dense_block_count", 0)
    kind = "layer" if header.given("attention.layer_norm_epsilon") else "rms"
    header = dataclasses.replace(header, norms=kind)

    def attention(layer: int) -> dict[str, Any]:
        if local[layer]:
            return {"window": window}
        return {} if layer < dense else {"rope": None}

    def block(layer: int) -> dict[str, Any]:
        shared = header.has(f"blk.{layer}.ffn_up_shexp.weight")
        halved = {"mlp_scale": 0.5} if shared else {}  # the mean of routed and shared experts
        return {"mlp_norm": None} | halved

    return decoder(
        header,
        interleaved=True,
        attention=attention,
        block=block,
        block_type=ParallelBlockConfig,
        experts=_ROUTED,
        logit_scale=header.number("logit_scale", 0.0) or 1.0,
    )


def _exaone(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed(4)
    norms = head_norms(header)
    return decoder(
        header,
        attention=lambda layer: norms | ({"window": window} if local[layer] else {"rope": None}),
        experts=_ROUTED,
    )


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


def _granite_swa(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed()
    rotated = header.flags("attention.rope_pattern", True)
    choices = scaled(header)
    common = choices.pop("attention") | {"sinks": True}

    def attention(layer: int) -> dict[str, Any]:
        found = common | ({"window": window} if local[layer] else {})
        return found if rotated[layer] else found | {"rope": None}

    return decoder(header, attention=attention, experts=_NORMALIZED, **choices)


def _grok(header: Header) -> ModelConfig:
    """The second version has an MLP beside the experts."""
    scale = header.number("attention.output_scale", 128**-0.5)

    def block(layer: int) -> dict[str, Any]:
        moe = header.experts(layer, "gelu_tanh", normalize=True)
        if not header.has(f"blk.{layer}.ffn_up.weight"):
            return post_norms(header) | {"mlp": moe}
        both = DenseMoEConfig(header.mlp(layer, "gelu_tanh"), moe)
        return post_norms(header) | {"mlp": both, "mlp_scale": math.sqrt(0.5)}

    return decoder(
        header,
        attention={
            "scale": scale,
            "softcap": header.number("attn_logit_softcapping", 30.0, above=0),
        },
        block=block,
        embedding_scale=header.number("embedding_scale", 78.38367176906169),
        logit_scale=header.number("logit_scale", 3**-0.5),
        logit_softcap=header.number("final_logit_softcapping", 0.0) or None,
    )


def _grove(header: Header) -> ModelConfig:
    per_group = header.count("experts_per_group", least=1)
    scale = header.number("expert_group_scale", 1.0)
    hidden = header.size("expert_chunk_feed_forward_length")

    def block(layer: int) -> dict[str, Any]:
        moe = header.experts(layer, normalize=True)
        if moe.experts % per_group:
            expected = f"equal parts of {moe.experts} experts"
            raise header.wrong("experts_per_group", per_group, expected)
        return {"mlp": GroveMoEConfig(moe, MLPConfig(hidden), per_group, scale)}

    return decoder(header, attention=head_norms(header), block=block)


def _laguna(header: Header) -> ModelConfig:
    """Windows have RoPE of their own, without YaRN."""
    window = header.window(0, least=0)
    local = [bool(window and layer % 4) for layer in range(header.layers)]
    if header.given("attention.sliding_window_pattern"):
        local = header.windowed()
    rope = header.rope(header.head_dim())
    base = header.number("rope.freq_base_swa", rope.base, above=1)
    swa = header.rope(header.head_dim(), end="_swa" if window else "")
    swa = unscaled(swa, base=base, attention_factor=1.0)

    def attention(layer: int) -> dict[str, Any]:
        found = head_norms(header, gate=header.gate(layer, "softplus"))
        return found | ({"rope": swa, "window": window} if local[layer] else {"rope": rope})

    return decoder(header, attention=attention, experts=_ROUTED)


def _maple(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed()
    _, rope = rotations(header)
    norms = head_norms(header)

    def attention(layer: int) -> dict[str, Any]:
        return norms | ({"rope": rope, "window": window} if local[layer] else {"rope": None})

    def block(layer: int) -> dict[str, Any]:
        return {"mlp": header.experts(layer, header.bounded("exp", layer), normalize=True)}

    return decoder(header, attention=attention, block=block)


def _mellum(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed(4)
    rope, swa = rotations(header)
    swa = unscaled(swa, attention_factor=1.0)
    norms = head_norms(header)
    return decoder(
        header,
        attention=lambda layer: (
            norms | ({"rope": swa, "window": window} if local[layer] else {"rope": rope})
        ),
        experts=_NORMALIZED,
    )


def _mimo2(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed()
    rope, swa = rotations(header)
    scale = header.number("attention.value_scale", 0.0) or 1.0

    def attention(layer: int) -> dict[str, Any]:
        found = {"rope": swa, "window": window} if local[layer] else {"rope": rope}
        return found | {"sinks": header.has(f"blk.{layer}.attn_sinks.weight")}

    experts = {"routing": "sigmoid", "normalize": True}
    return decoder(header, attention=attention, block={"mixer_scale": scale}, experts=experts)


def _minimax_m3(header: Header) -> ModelConfig:
    """Layers with experts attend to blocks of keys."""
    norms = head_norms(header)
    dim = header.size("attention.indexer.key_length")
    indexer = BlockIndexerConfig(
        head_dim=dim,
        block=header.count("attention.indexer.block_size", least=1),
        top_k=header.count("attention.indexer.top_k", least=1),
        local=header.count("attention.indexer.local_blocks", 1),
        rope=header.rope(dim),
        norm=header.norm(bias=False),
    )
    heads = header.size("attention.indexer.head_count")

    def block(layer: int) -> dict[str, Any]:
        attention = header.attention(layer, **norms)
        if not header.has(f"blk.{layer}.indexer.q_proj.weight"):
            return {"mixer": attention}
        if heads != attention.kv_heads:
            expected = f"{attention.kv_heads}, one for each key head"
            raise header.wrong("attention.indexer.head_count", heads, expected)
        return {"mixer": BlockSparseConfig(attention, indexer)}

    return decoder(header, activation="clamped_swiglu", block=block, experts=_ROUTED)


def _smallthinker(header: Header) -> ModelConfig:
    """With a window, which has one size, each fourth layer has neither window nor positions."""
    windows = header.window(0, least=0) > 0

    def attention(layer: int) -> dict[str, Any]:
        if not windows:
            return {}
        return {"window": 4096} if layer % 4 else {"rope": None}

    return decoder(
        header,
        activation="relu",
        attention=attention,
        block_type=RoutedEarlyBlockConfig,
        experts=_NORMALIZED,
    )


def _step(header: Header) -> ModelConfig:
    """Full layers rotate half as many dimensions, with other frequencies."""
    window, local = header.window(), header.windowed()
    rope = header.rope(header.head_dim())
    base = header.number("rope.freq_base_swa", rope.base, above=1)
    swa = unscaled(rope, base=base)
    rope = dataclasses.replace(rope, dim=rope.dim // 2)

    def attention(layer: int) -> dict[str, Any]:
        found = head_norms(header, gate=header.gate(layer))
        return found | ({"rope": swa, "window": window} if local[layer] else {"rope": rope})

    return decoder(header, attention=attention, block=partial(bounded_mlp, header, after=True))


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
    "afmoe": Architecture(_afmoe),
    "arctic": Architecture(
        _arctic,
        {
            path.replace(".mlp.", ".stream_mlp."): names
            for path, names in NAMES.items()
            if ".mlp." in path
        }
        | block_names(stream_norm__scale="ffn_norm_exps.weight"),
    ),
    "bailingmoe": Architecture(partial(decoder, interleaved=True)),
    "bailingmoe2": Architecture(partial(_with_head_norms, experts=_ROUTED)),
    "cohere2moe": Architecture(_cohere2),
    "dbrx": Architecture(
        lambda h: decoder(
            h,
            attention={"clip_qkv": h.number("attention.clamp_kqv", 0.0) or None},
            experts=_NORMALIZED,
        ),
        block_names(mlp_norm__scale="attn_output_norm.weight"),
        norms="layer",
    ),
    "deepseek": Architecture(partial(decoder, interleaved=True)),
    "deepseek2-ocr": Architecture(decoder),
    "dots1": Architecture(partial(_with_head_norms, experts=_ROUTED)),
    "ernie4_5-moe": Architecture(partial(decoder, interleaved=True, experts=_NORMALIZED)),
    "exaone-moe": Architecture(_exaone),
    "glm4moe": Architecture(_glm4moe),
    "gpt-oss": Architecture(_gpt_oss),
    "granite_swa": Architecture(_granite_swa),
    "grok": Architecture(
        _grok,
        {
            **side_by_side(NAMES),
            **block_names(
                mixer_post_norm__scale="attn_output_norm.weight",
                mlp_post_norm__scale=["layer_output_norm.weight", "post_ffw_norm.weight"],
            ),
        },
        harmless={"router_logit_softcapping": "llama.cpp does not read it"},
    ),
    "grovemoe": Architecture(
        _grove,
        {
            **{
                path.replace(".mlp.", ".mlp.moe.", 1): names
                for path, names in NAMES.items()
                if ".mlp." in path
            },
            **block_names(
                mlp__chunks__gate__kernel="ffn_gate_chexps.weight",
                mlp__chunks__up__kernel="ffn_up_chexps.weight",
                mlp__chunks__down__kernel="ffn_down_chexps.weight",
            ),
        },
    ),
    "granitemoe": Architecture(lambda h: decoder(h, **scaled(h), experts=_NORMALIZED)),
    "hunyuan-moe": Architecture(partial(_with_head_norms, norm_first=False, experts=_NORMALIZED)),
    "hy_v3": Architecture(partial(_with_head_norms, experts=_ROUTED)),
    "laguna": Architecture(_laguna),
    "llama4": Architecture(_llama4),
    "maple": Architecture(_maple),
    "mellum": Architecture(_mellum),
    "mimo2": Architecture(
        _mimo2, harmless={"expert_gating_func": "llama.cpp takes it to be the sigmoid"}
    ),
    "minimax-m3": Architecture(
        _minimax_m3,
        {
            **beside(NAMES, "attention"),
            **block_names(
                mixer__indexer__query__kernel="indexer.q_proj.weight",
                mixer__indexer__key__kernel="indexer.k_proj.weight",
                mixer__indexer__query_norm__scale="indexer.q_norm.weight",
                mixer__indexer__key_norm__scale="indexer.k_norm.weight",
            ),
        },
    ),
    "minimax-m2": Architecture(partial(_with_wide_norms, experts=_NORMALIZED | _ROUTED)),
    "olmoe": Architecture(_with_wide_norms),
    "phimoe": Architecture(partial(decoder, experts=_NORMALIZED), harmless=NO_WINDOW),
    "qwen2moe": Architecture(decoder, harmless=NO_WINDOW),
    "qwen3moe": Architecture(partial(_with_head_norms, experts=_NORMALIZED), harmless=NO_WINDOW),
    "qwen3vlmoe": Architecture(partial(_with_head_norms, experts=_NORMALIZED), harmless=NO_WINDOW),
    "smallthinker": Architecture(_smallthinker),
    "step35": Architecture(
        _step,
        {"freq_factors.freqs": [Rows("rope_freqs.weight")]},
        unused=r"rope_freqs\.weight",  # of which full layers use the first half
        harmless={"moe_every_n_layers": "the tensors of experts tell it"},
    ),
}
