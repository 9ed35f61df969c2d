"""The Gemma family."""

import dataclasses
import math
from typing import Any

from jaxsplit.architectures.entry import (
    Architecture,
    decoder,
    head_norms,
    post_norms,
    rotations,
    unscaled,
)
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import NAMES, block_names, side_by_side
from jaxsplit.models.block_config import AltUpBlockConfig
from jaxsplit.models.config import DenseMoEConfig, ModelConfig
from jaxsplit.models.residual_config import (
    AltUpConfig,
    OutputScaleConfig,
    PerLayerEmbeddingConfig,
)


def _gemma_scale(header: Header, large: int) -> float | None:
    """The largest models scale scores by the width of a head as if all filled the stream."""
    if header.layers != large:
        return None
    return (header.embed / header.size("attention.head_count", layer=0)) ** -0.5


def _gemma(header: Header, **choices: Any) -> ModelConfig:
    return decoder(
        header, activation="gelu_tanh", embedding_scale=math.sqrt(header.embed), **choices
    )


def _gemma2(header: Header) -> ModelConfig:
    window, local = header.window(4096), header.windowed(2)
    rope, local_rope = rotations(header)
    common = {
        "softcap": header.number("attn_logit_softcapping", 50.0, above=0),
        "scale": _gemma_scale(header, 46),
    }
    return _gemma(
        header,
        attention=lambda layer: (
            common | ({"rope": local_rope, "window": window} if local[layer] else {"rope": rope})
        ),
        block=post_norms(header),
        logit_softcap=header.number("final_logit_softcapping", 30.0, above=0),
    )


def _gemma3(header: Header) -> ModelConfig:
    window, local = header.window(0, least=0), header.windowed(6)
    common = head_norms(header, scale=_gemma_scale(header, 62))
    rope = header.rope(header.head_dim())
    base = header.number("rope.local.freq_base", 10000.0, above=1)  # as Ollama calls it
    local_rope = unscaled(rope, base=header.number("rope.freq_base_swa", base, above=1))

    def attention(layer: int) -> dict[str, Any]:
        if not window or not local[layer]:
            return common | {"rope": rope}
        return common | {"rope": local_rope, "window": window}

    return _gemma(
        header,
        attention=attention,
        block=post_norms(header),
        logit_softcap=header.number("final_logit_softcapping", 0.0) or None,
    )


def _gemma4(header: Header) -> ModelConfig:
    window, pattern = header.window(), header.windowed()
    # The last layers use the keys and values of the last layer of their kind that has any.
    shared_from = header.layers - header.count("attention.shared_kv_layers", 0)
    lenders = {kind: i for i, kind in enumerate(pattern[: max(0, shared_from)])}
    if not lenders.keys() >= set(pattern[shared_from:]):
        shared = header.layers - shared_from
        raise header.wrong("attention.shared_kv_layers", shared, "earlier layers of the same kinds")
    norm = header.norm()
    base = header.number("rope.freq_base_swa", 10000.0, above=1)
    ends = {False: "", True: "_swa"}
    head_dims, value_dims = (
        {kind: header.size(f"attention.{name}_length{end}") for kind, end in ends.items()}
        for name in ("key", "value")
    )
    ropes = {kind: header.rope(head_dims[kind], end=end) for kind, end in ends.items()}
    ropes[True] = unscaled(ropes[True], base=base)

    width = header.size("embedding_length_per_layer_input", 0, least=0)
    own = PerLayerEmbeddingConfig(width, norm) if width else None

    def attention(layer: int) -> dict[str, Any]:
        local = pattern[layer]
        name = "local" if local else "global"
        is_lender = shared_from < header.layers and lenders[local] == layer
        return {
            "head_dim": head_dims[local],
            "value_dim": value_dims[local],
            "rope": ropes[local],
            "scale": 1.0,
            "window": window if local else None,
            "query_norm": norm,
            "key_norm": norm,
            "value_norm": dataclasses.replace(norm, scale=False),
            "value_is_key": not header.has(f"blk.{layer}.attn_v.weight"),
            "kv_donor": name if is_lender else None,
            "kv_source": name if layer >= shared_from else None,
        }

    def block(layer: int) -> dict[str, Any]:
        scaled = header.has(f"blk.{layer}.layer_output_scale.weight")
        after = (own, OutputScaleConfig() if scaled else None)
        choices = post_norms(header) | {"after": tuple(filter(None, after))}
        if header.has(f"blk.{layer}.ffn_gate_inp.weight"):
            moe = header.experts(layer, "gelu_tanh", normalize=True)
            dense = header.mlp(layer, "gelu_tanh")
            choices["mlp"] = DenseMoEConfig(dense, moe, norm, header.embed**-0.5)
            choices["mlp_norm"] = None
        return choices

    return _gemma(
        header,
        attention=attention,
        block=block,
        per_layer_embeddings=own,
        logit_softcap=header.number("final_logit_softcapping", 30.0) or None,
    )


def _gemma3n(header: Header) -> ModelConfig:
    """Four streams, 10 layers with sparse gates and 20 with keys of their own, whatever the file
    says: llama.cpp does not read these keys."""
    window, pattern = header.window(), header.windowed()
    norm = header.norm()
    rope, local_rope = rotations(header)
    lenders = {kind: i for i, kind in enumerate(pattern[:20])}
    if not lenders.keys() >= set(pattern[20:]):
        raise header.wrong(
            "attention.sliding_window_pattern", pattern, "both kinds of layers first"
        )
    altup = AltUpConfig(4, header.file.tensor("blk.0.laurel_l.weight").shape[0], norm)
    own = PerLayerEmbeddingConfig(header.size("embedding_length_per_layer_input"), norm)

    def attention(layer: int) -> dict[str, Any]:
        local = pattern[layer]
        name, lends = "local" if local else "global", header.layers > 20
        return {
            "rope": local_rope if local else rope,
            "window": window if local else None,
            "scale": 1.0,
            "query_norm": norm,
            "key_norm": norm,
            "value_norm": dataclasses.replace(norm, scale=False),
            "kv_donor": name if lends and lenders[local] == layer else None,
            "kv_source": name if layer >= 20 else None,
        }

    def block(layer: int) -> dict[str, Any]:
        mlp = header.mlp(layer, "gelu_tanh")
        sparsity = _NINETY_FIVE_PERCENT if layer < 10 else None
        return post_norms(header) | {
            "mlp": dataclasses.replace(mlp, sparsity=sparsity),
            "altup": altup,
            "per_layer_embedding": own,
        }

    return _gemma(
        header,
        attention=attention,
        block=block,
        block_type=AltUpBlockConfig,
        altup=altup,
        head_residual=altup,
        per_layer_embeddings=own,
        logit_softcap=30.0,
    )


_NINETY_FIVE_PERCENT = 1.6448533535003662
"""Of values in a normal distribution are at most this many standard deviations above the mean."""

_SIDE_BY_SIDE = side_by_side(NAMES) | block_names(
    mlp__dense_norm__scale="ffn_norm.weight",
    mlp__dense_post_norm__scale="post_ffw_norm_1.weight",
    mlp__moe_norm__scale="pre_ffw_norm_2.weight",
    mlp__moe_post_norm__scale="post_ffw_norm_2.weight",
    mlp__router_norm__scale="ffn_gate_inp.scale",
)

ARCHITECTURES = {
    "gemma": Architecture(_gemma),
    "gemma2": Architecture(_gemma2),
    "gemma3": Architecture(_gemma3),
    "gemma3n": Architecture(
        _gemma3n,
        unused=r"blk\.\d+\.attn_(k|v|k_norm)\.weight",
        harmless=dict.fromkeys(
            (
                *("altup.*", "activation_sparsity_scale", "attention.shared_kv_layers"),
                "final_logit_softcapping",
            ),
            "llama.cpp has one value for all files",
        ),
    ),
    "gemma4": Architecture(
        _gemma4,
        _SIDE_BY_SIDE,
        # Layers that use the keys and values of others may have tensors for them nevertheless.
        unused=r"blk\.\d+\.attn_(k|v|k_norm)\.weight",
    ),
}
