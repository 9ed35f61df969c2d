"""Writes docs/architectures.md: the architectures that run, what they are made of, and how that is
checked. Run it after adding one: `python docs/architectures.py`."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxsplit.architectures import ARCHITECTURES, model_config
from jaxsplit.formats import ModelFile, TensorInfo
from jaxsplit.models import (
    AttentionConfig,
    BlockSparseConfig,
    ChannelMixConfig,
    CompressedAttentionConfig,
    DeltaNetConfig,
    DenseMoEConfig,
    GroveMoEConfig,
    HybridConfig,
    KDAConfig,
    LatentAttentionConfig,
    LightningConfig,
    LinearConfig,
    Mamba2Config,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RWKV6Config,
    RWKV7Config,
    ShortConvConfig,
)
from jaxsplit.models.block_config import (
    AltUpBlockConfig,
    NormalizedStreamBlockConfig,
    ParallelBlockConfig,
    RoutedEarlyBlockConfig,
    StreamsBlockConfig,
    SwitchedBlockConfig,
)
from jaxsplit.models.config import LayerConfig
from jaxsplit.models.residual_config import (
    AttentionResidualConfig,
    CarriedConfig,
    HyperConnectionConfig,
    LowRankConnectionConfig,
)

RECIPES = Path(__file__).parent.parent / "tests" / "data" / "arch"
TABLE = Path(__file__).with_suffix(".md")
MIXERS = {
    AttentionConfig: "attention",
    LatentAttentionConfig: "latent attention",
    DeltaNetConfig: "gated delta-net",
    Mamba2Config: "Mamba-2",
    ShortConvConfig: "short convolution",
    KDAConfig: "Kimi delta attention",
    CompressedAttentionConfig: "compressed attention",
    LightningConfig: "lightning attention",
    LinearConfig: "projection in place of a mixer",
    MambaConfig: "Mamba",
    RWKV6Config: "RWKV-6",
    RWKV7Config: "RWKV-7",
}

HEAD = """# Architectures

Every architecture runs in every split mode, on any number of devices, with every quantization type.
Others are refused by name. This table is made by `docs/architectures.py` from the configs of the
models that the tests check.

**How they are checked:** each variant is a tiny model with logits of llama.cpp in float32
(`tests/data/arch`). The whole prompt at once and one token at a time agree with them (NMSE at most
1e-6); `graph`, `row` and `layer` on 2, 3 and 4 devices agree with one device (at most 1e-9). `make
test` takes some of the combinations, `pytest -m full` takes all.

| GGUF architecture | mixer | MLP | norms, residual, head | variants checked |
|---|---|---|---|---|
"""


SHAPES = {
    AltUpBlockConfig: "alternating updates",
    NormalizedStreamBlockConfig: "post-norm residual",
    ParallelBlockConfig: "parallel residual",
    RoutedEarlyBlockConfig: "router before the mixer",
    SwitchedBlockConfig: "adapters that tokens switch on",
}
RESIDUALS = {
    AttentionResidualConfig: "attention residuals",
    HyperConnectionConfig: "hyper-connections",
    LowRankConnectionConfig: "low-rank hyper-connections",
}


def mixer(c: Any) -> Iterator[str]:
    """Words for a mixer."""
    if isinstance(c, HybridConfig | BlockSparseConfig):
        yield from mixer(c.attention)
        if isinstance(c, BlockSparseConfig):
            yield "indexer of blocks"
        else:
            yield f"{MIXERS[type(c.recurrent)]} beside it"
        return
    if c is None:
        return
    yield MIXERS[type(c)]
    if getattr(c, "window", None):
        yield "chunks" if getattr(c, "chunked", False) else "sliding window"
    if isinstance(c, LatentAttentionConfig | AttentionConfig | CompressedAttentionConfig):
        rope = c.rope
        if rope is None:
            yield "ALiBi" if getattr(c, "alibi", None) else "no RoPE"
        else:
            yield f"RoPE by {'neighbours' if rope.interleaved else 'halves'}"
            if rope.dim < c.head_dim and isinstance(c, AttentionConfig):
                yield "partial RoPE"
            if rope.factor != 1 and rope.scaling != "none":
                yield rope.scaling
            if rope.freq_factors:
                yield "frequency factors"
    if isinstance(c, CompressedAttentionConfig):
        yield "sinks"
        if c.pool:
            yield f"blocks of {c.pool.block}"
        if c.indexer:
            yield "indexer"
    if isinstance(c, LatentAttentionConfig):
        if c.indexer:
            yield "indexer" if c.indexer.pool is None else "indexer of blocks"
        if c.gate:
            yield "output gate"
        if c.sinks:
            yield "sinks"
    if isinstance(c, AttentionConfig):
        words = {
            "softcap": "soft-cap",
            "clip_qkv": "clamped q, k, v",
            "sinks": "sinks",
            "gate": "output gate",
            "out_norm": "output norm",
            "attn_temperature": "temperature by position",
            "value_norm": "v norm",
            "value_is_key": "K = V",
            "kv_source": "shared K, V",
            "qkv_bias": "biases",
        }
        yield from (word for field, word in words.items() if getattr(c, field))
        if c.query_norm:
            width = {"head": "q, k norm", "each": "q, k norm of each head", "all": "wide q, k norm"}
            yield width[c.norm_over] + ("" if c.norm_first else " after RoPE")


def activation(function: Any) -> str:
    """The name of an activation."""
    return function if isinstance(function, str) else type(function).__name__


def mlp(c: Any) -> Iterator[str]:
    """Words for an MLP."""
    if isinstance(c, MLPConfig):
        yield f"{'gated' if c.gated else 'plain'} {activation(c.activation)}"
        if c.sparsity:
            yield "sparse gates"
    elif isinstance(c, MoEConfig):
        yield f"experts ({activation(c.expert.activation)})"
        if c.latent:
            yield "latent"
        yield c.routing.replace("_", " ")
        if c.by_token:
            yield "by token id"
        if c.groups > 1:
            yield "groups"
        if c.selection_bias:
            yield "selection bias"
        if c.shared:
            yield "shared expert" + (" with gate" if c.shared_gate else "")
    elif isinstance(c, DenseMoEConfig):
        yield from (*mlp(c.dense), *mlp(c.moe))
    elif isinstance(c, GroveMoEConfig):
        yield from mlp(c.moe)
        yield "experts of groups"
    elif isinstance(c, ChannelMixConfig):
        yield "channel mix" + (" with gate" if c.gated else "")


def residual(b: LayerConfig, c: ModelConfig) -> Iterator[str]:
    """Words for norms, and for what happens outside the layers."""
    if isinstance(b, StreamsBlockConfig):
        if b.ngrams:
            yield "n-grams"
        yield RESIDUALS[type(b.mixer_residual)]
    post_norm = getattr(b, "mixer_post_norm", None)
    norm = b.mixer_norm or post_norm
    if norm is None:
        return
    kind = {"rms": "RMSNorm", "layer": "LayerNorm"}[norm.kind]
    if post_norm:
        kind += " around mixer and MLP" if b.mixer_norm else " after mixer and MLP"
    yield kind if norm.scale else f"{kind} without parameters"
    if type(b) in SHAPES:
        yield SHAPES[type(b)]
    if c.per_layer_embeddings:
        yield "per-layer embeddings"
    words = {
        "learned_positions": "learned positions",
        "embedding_norm": "embedding norm",
        "logit_softcap": "logit soft-cap",
        "tied": "tied head",
    }
    yield from (word for field, word in words.items() if getattr(c, field))
    if len({c.source(i) for i in range(c.layers)}) < c.layers:
        yield "layers used several times"
    if CarriedConfig(scaled=True) in getattr(b, "after", ()):
        yield "embedding in each layer"
    if (c.embedding_scale, c.logit_scale, getattr(b, "mixer_scale", 1)) != (1, 1, 1):
        yield "scales"


def config_of(recipe: dict[str, Any]) -> ModelConfig:
    """The config of the model that a recipe describes, used with 256 tokens as in the tests."""
    metadata = {key: value for key, _, value in recipe["metadata"]}
    metadata["general.architecture"] = recipe["arch"]
    tensors = {
        t["name"]: TensorInfo(t["name"], "F32", tuple(t["shape"][::-1])) for t in recipe["tensors"]
    }
    return model_config(ModelFile(Path(recipe["name"]), metadata, tensors), 256)


def table() -> str:
    """The text of the file."""
    rows: dict[str, list[Any]] = {}
    for path in sorted(RECIPES.glob("*.json")):
        recipe = json.loads(path.read_text())
        rows.setdefault(recipe["arch"], []).append((recipe["name"], config_of(recipe)))

    def cell(words: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(words))

    lines = []
    for name in sorted(ARCHITECTURES):
        variants = rows.get(name, [])
        blocks = [(block, config) for _, config in variants for block in config.blocks]
        cells = [
            f"`{name}`",
            cell(word for block, _ in blocks for word in mixer(block.mixer)),
            cell(
                word
                for block, _ in blocks
                for c in (block.mlp, getattr(block, "stream_mlp", None))
                for word in mlp(c)
            ),
            cell(word for block, config in blocks for word in residual(block, config)),
            cell(variant for variant, _ in variants),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    TABLE.write_text(table())
