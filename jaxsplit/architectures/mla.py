"""Decoders with latent attention."""

import dataclasses
import math
from functools import partial
from typing import Any, cast

from jaxsplit.architectures.entry import (
    Architecture,
    bounded_mlp,
    connected,
    decoder,
    hyper_connections,
    unscaled,
)
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import Rows, block_names
from jaxsplit.models.block_config import StreamsBlockConfig
from jaxsplit.models.config import LayerConfig, ModelConfig
from jaxsplit.models.mixer_config import (
    CompressedAttentionConfig,
    IndexerConfig,
    LatentAttentionConfig,
    PoolConfig,
)
from jaxsplit.ops.norm.spec import NormConfig


def latent_attention(
    header: Header, *, interleaved: bool = True, layer: int | None = None, **choices: Any
) -> LatentAttentionConfig:
    """Latent attention. Old files have keys' and values' projections of a head in one tensor, and
    give the widths of whole heads where newer ones give those of the latent vector. ik_llama.cpp's
    old files have both: the projections of all heads, one below the other, also in two tensors."""
    fused = not header.has("blk.*.attn_k_b.weight")
    keys = header.file.tensors.get("blk.0.attn_k_b.weight")
    flat = keys is not None and len(keys.shape) == 2
    end = "" if fused or flat else "_mla"
    rope_dim = header.size("rope.dimension_count", least=0)
    width = header.size(f"attention.key_length{end}", least=rope_dim + 1)
    rope = header.rope(rope_dim or 2, interleaved=interleaved, dim=rope_dim or 2)
    stretch = 0.0 if rope.scaling == "none" else math.log(max(1.0, rope.factor))
    multiplier = header.number("rope.scaling.yarn_log_multiplier", 0.0)
    magnitude = header.number("rope.scaling.attn_factor", 1.0)
    if rope.scaling == "yarn" and multiplier:
        # YaRN's magnitude is in the scale of the scores instead.
        magnitude /= 1 + 0.1 * stretch
    scale = magnitude * (1 + 0.1 * stretch) * (1 + multiplier * stretch)
    return LatentAttentionConfig(
        heads=header.size("attention.head_count", layer=layer),
        head_dim=width - rope_dim,
        value_dim=header.size(f"attention.value_length{end}"),
        kv_lora_rank=header.size("attention.kv_lora_rank"),
        q_lora_rank=header.size("attention.q_lora_rank", 0, least=0),
        rope=dataclasses.replace(rope, attention_factor=magnitude) if rope_dim else None,
        scale=scale**2 / math.sqrt(width),
        norm=header.norm(),
        k_up_transposed=fused,
        attn_temperature=header.temperature("attention.temperature_length"),
        **choices,
    )


def unrotated(mixer: LatentAttentionConfig) -> LatentAttentionConfig:
    """The same without positions."""
    return dataclasses.replace(mixer, rope=None, unrotated_dim=mixer.shared_dim)


def indexer_config(
    header: Header, *, interleaved: bool, epsilon: float, **choices: Any
) -> IndexerConfig:
    """The indexer of a file's sparse attention."""
    dim = header.size("attention.indexer.key_length")
    rope = latent_attention(header, layer=0).rope
    return IndexerConfig(
        heads=header.size("attention.indexer.head_count"),
        head_dim=dim,
        top_k=header.size("attention.indexer.top_k"),
        rope=rope and dataclasses.replace(rope, interleaved=interleaved),
        norm=NormConfig("layer", epsilon, bias=True),
        **choices,
    )


def _glm_dsa(header: Header) -> ModelConfig:
    indexer = indexer_config(header, interleaved=True, epsilon=0.0)
    selects = indexed_layers(header)
    if not header.given("attention.indexer.types") and header.context_length >= 2**20:
        selects = [layer < 2 or layer % 4 == 2 for layer in range(header.layers)]

    def block(layer: int) -> dict[str, Any]:
        own: dict[str, Any] = {"indexer": indexer} if selects[layer] else {}
        return {"mixer": latent_attention(header, sparse=True, **own)}

    return decoder(header, block=block, experts={"routing": None})


def _deepseek32(header: Header) -> ModelConfig:
    indexer = indexer_config(header, interleaved=False, epsilon=0.0)
    mixer = latent_attention(header, sparse=True, indexer=indexer)
    return decoder(header, block={"mixer": mixer}, experts={"routing": None})


def _dots3(header: Header) -> ModelConfig:
    """Layers with a window have sizes of their own and no indexer."""
    window, local = header.window(), header.windowed()
    header.disregard("attention.indexer.types")  # the layers without a window
    indexer = indexer_config(header, interleaved=False, epsilon=1e-6)
    base = header.number("rope.freq_base_swa", 10000.0, above=1)
    rope_dim = header.size("rope.dimension_count")
    width = header.size("attention.key_length_mla_swa", least=rope_dim + 1)
    sizes = {
        "head_dim": width - rope_dim,
        "value_dim": header.size("attention.value_length_mla_swa"),
        "kv_lora_rank": header.size("attention.kv_lora_rank_swa"),
        "scale": width**-0.5,
        "window": window,
    }

    def block(layer: int) -> dict[str, Any]:
        mixer = latent_attention(
            header, layer=layer, gate=header.gate(layer), shared_key_norm=header.norm()
        )
        if not local[layer]:
            return {"mixer": dataclasses.replace(mixer, indexer=indexer, sparse=True)}
        assert mixer.rope is not None
        rope = dataclasses.replace(mixer.rope, base=base)
        return {"mixer": dataclasses.replace(mixer, rope=rope, **sizes)}

    return decoder(header, block=block, experts={"routing": None})


def _deepseek2(header: Header) -> ModelConfig:
    # The first files of GLM-4.7-Flash do not say how its experts are weighed.
    flash = header.layers in (47, 48) and header.vocab == 154880
    experts = {"routing": "sigmoid" if flash else "softmax"}
    return decoder(header, block={"mixer": latent_attention(header)}, experts=experts)


def _hy4(header: Header) -> ModelConfig:
    """Streams are not mixed; only routed experts have a bound."""
    connection, head = hyper_connections(header)
    magnitude = header.number("hyper_connection.magnitude", 2.0)
    connection = dataclasses.replace(connection, magnitude=magnitude, offset=connection.epsilon)
    epsilon = header.norm().epsilon
    indexer = indexer_config(header, interleaved=True, epsilon=epsilon, rope_last=True)
    selects = indexed_layers(header)

    def block(layer: int) -> dict[str, Any]:
        own: dict[str, Any] = {"indexer": indexer} if selects[layer] else {}
        gate = header.gate(layer)
        mixer = latent_attention(header, sparse=True, sinks=True, gate=gate, **own)
        found: dict[str, Any] = {"mixer": mixer, **connected(connection)}
        if not header.has(f"blk.{layer}.ffn_gate_inp.weight"):
            return found
        bounded = header.bounded("exp", layer)
        return found | {
            "mlp": header.experts(layer, bounded, shared_activation="silu", routing=None)
        }

    return decoder(header, block=block, block_type=StreamsBlockConfig, head_residual=head)


def indexed_layers(header: Header) -> list[bool]:
    """Which layers have an indexer."""
    selects = header.flags("attention.indexer.types", True)
    if not selects[0]:
        raise header.wrong("attention.indexer.types", selects, "an indexer in the first layer")
    return selects


def _deepseek4(header: Header) -> ModelConfig:
    """Layers see a window, and blocks of all earlier tokens: of 4, of which an indexer selects, or
    of 128."""
    connection, head = hyper_connections(header)
    norm, window = header.norm(), header.window()
    heads, groups = header.size("attention.head_count"), header.size("attention.output_group_count")
    if heads % groups:
        raise header.wrong("attention.output_group_count", groups, f"equal parts of {heads} heads")
    dim, hashed = header.size("attention.key_length"), header.count("hash_layer_count", 0)
    rope = header.rope(dim, interleaved=True)
    base = header.number("attention.compress_rope_freq_base", rope.base, above=1)
    magnitude = 1 / (1 + 0.1 * math.log(max(1.0, rope.factor))) if rope.scaling == "yarn" else 1.0
    far = dataclasses.replace(rope, base=base, attention_factor=magnitude)
    near = unscaled(rope, attention_factor=1.0)
    index_dim = header.size("attention.indexer.key_length")
    indexer = IndexerConfig(
        heads=header.size("attention.indexer.head_count"),
        head_dim=index_dim,
        top_k=header.size("attention.indexer.top_k"),
        rope=far,
        norm=norm,
        pool=PoolConfig(4, index_dim, overlap=True),
    )
    common: dict[str, Any] = {
        "heads": heads,
        "head_dim": dim,
        "q_lora_rank": header.size("attention.q_lora_rank"),
        "groups": groups,
        "out_rank": header.size("attention.output_lora_rank"),
        "window": window,
        "norm": norm,
    }

    def mixer(layer: int) -> CompressedAttentionConfig:
        ratio = header.count("attention.compress_ratios", layer=layer)
        if ratio not in (0, 4, 128):
            raise header.wrong("attention.compress_ratios", ratio, "0, 4 or 128")
        if not ratio:
            return CompressedAttentionConfig(**common, rope=near)
        pool = PoolConfig(ratio, dim, overlap=ratio == 4)
        own: dict[str, Any] = {"indexer": indexer} if ratio == 4 else {}
        return CompressedAttentionConfig(**common, rope=far, pool=pool, **own)

    def block(layer: int) -> dict[str, Any]:
        found = bounded_mlp(header, layer, one_bound=True)
        if layer < hashed:
            mlp = dataclasses.replace(found["mlp"], by_token=True, vocab=header.vocab)
            found["mlp"] = dataclasses.replace(mlp, selection_bias=False)
        return found | {"mixer": mixer(layer), **connected(connection)}

    return decoder(header, block=block, block_type=StreamsBlockConfig, head_residual=head)


def _minicpm3(header: Header) -> ModelConfig:
    """Its scales are not in the file."""
    mixer, scale = latent_attention(header, interleaved=False), 1.4 / math.sqrt(header.layers)
    return decoder(
        header,
        block={"mixer": mixer, "mixer_scale": scale, "mlp_scale": scale},
        embedding_scale=12.0,
        logit_scale=256 / header.embed,
    )


def _plm(header: Header) -> ModelConfig:
    return decoder(header, activation="relu2", block={"mixer": latent_attention(header)})


def _layout(block: LayerConfig) -> tuple[int, list[int]]:
    """Keys and values alternate by head."""
    mixer = cast(LatentAttentionConfig, block.mixer)
    return mixer.heads, [mixer.head_dim, mixer.value_dim]


LATENT_NAMES = block_names(
    mixer__query_down__kernel="attn_q_a.weight",
    mixer__query_norm__scale="attn_q_a_norm.weight",
    mixer__query__kernel=["attn_q_b.weight", "attn_q.weight"],
    mixer__latent__kernel="attn_kv_a_mqa.weight",
    mixer__latent_norm__scale="attn_kv_a_norm.weight",
    mixer__key_up=["attn_k_b.weight", Rows("attn_kv_b.weight", part=0, layout=_layout)],
    mixer__shared_key_norm__scale="attn_k_norm.weight",
    mixer__indexer__query__kernel="indexer.attn_q_b.weight",
    mixer__indexer__key__kernel="indexer.attn_k.weight",
    mixer__indexer__key_norm__scale="indexer.k_norm.weight",
    mixer__indexer__key_norm__bias="indexer.k_norm.bias",
    mixer__indexer__pool__gate__kernel="indexer_compressor_gate.weight",
    mixer__indexer__pool__place="indexer_compressor_ape.weight",
    mixer__indexer__weight__kernel="indexer.proj.weight",
    mixer__value_up=["attn_v_b.weight", Rows("attn_kv_b.weight", part=1, layout=_layout)],
)

LATENT_HARMLESS = dict.fromkeys(
    (
        "attention.head_count_kv",
        *(
            f"attention.{part}_length{end}"
            for part in ("key", "value")
            for end in ("", "_mla", "_swa")
        ),
    ),
    "of the cache, or of files with another form of the same weights",
)

_COMPRESSED = block_names(
    mixer__query_down__kernel="attn_q_a.weight",
    mixer__query_norm__scale="attn_q_a_norm.weight",
    mixer__query__kernel="attn_q_b.weight",
    mixer__key__kernel="attn_kv.weight",
    mixer__key_norm__scale="attn_kv_a_norm.weight",
    mixer__entries__rows__kernel="attn_compressor_kv.weight",
    mixer__entries__pool__gate__kernel="attn_compressor_gate.weight",
    mixer__entries__pool__place="attn_compressor_ape.weight",
    mixer__entries__norm__scale="attn_compressor_norm.weight",
    mixer__indexer__query__kernel="indexer.attn_q_b.weight",
    mixer__indexer__weight__kernel="indexer.proj.weight",
    mixer__indexer__keys__rows__kernel="indexer_compressor_kv.weight",
    mixer__indexer__keys__pool__gate__kernel="indexer_compressor_gate.weight",
    mixer__indexer__keys__pool__place="indexer_compressor_ape.weight",
    mixer__indexer__keys__norm__scale="indexer_compressor_norm.weight",
    mixer__out_down="attn_output_a.weight",
    mixer__out__kernel="attn_output_b.weight",
)

_latent = partial(
    Architecture,
    names=LATENT_NAMES,
    harmless=LATENT_HARMLESS,
)

ARCHITECTURES = {
    "deepseek2": _latent(_deepseek2, unused=r"blk\.\d+\.attn_kv_b\.weight"),
    "deepseek32": _latent(_deepseek32),
    "deepseek4": Architecture(_deepseek4, _COMPRESSED, harmless=LATENT_HARMLESS),
    "dots3note": _latent(_dots3),
    "hy_v4": _latent(_hy4),
    "glm-dsa": _latent(_glm_dsa),
    "minicpm3": _latent(_minicpm3),
    "mistral4": _latent(_deepseek2),
    "plm": _latent(_plm),
}
