"""Decoders with recurrent layers beside attention."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from jaxsplit.architectures.entry import (
    Architecture,
    bounded_mlp,
    connected,
    decoder,
    head_norms,
    hyper_connections,
    post_norms,
    scaled,
)
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.mla import (
    LATENT_HARMLESS,
    LATENT_NAMES,
    indexer_config,
    latent_attention,
    unrotated,
)
from jaxsplit.architectures.names import NAMES, Names, Rows, beside, block_names
from jaxsplit.errors import JaxsplitError
from jaxsplit.models.block_config import NormalizedStreamBlockConfig, StreamsBlockConfig
from jaxsplit.models.config import LayerConfig, ModelConfig
from jaxsplit.models.mixer_config import (
    BlockSparseConfig,
    DeltaNetConfig,
    HybridConfig,
    KDAConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    PoolConfig,
    PooledBlockIndexerConfig,
    ShortConvConfig,
)
from jaxsplit.models.residual_config import (
    AttentionResidualConfig,
    LowRankConnectionConfig,
    NGramConfig,
)
from jaxsplit.ops.activations.functions import SiTUGLU
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


def _kda(header: Header, **choices: Any) -> KDAConfig:
    def rank(name: str, layer: int) -> int:
        """Rows of the first of two projections, if there are two."""
        both = header.has(f"blk.{layer}.{name}_b.weight")
        return header.file.tensor(f"blk.{layer}.{name}_a.weight").shape[0] if both else 0

    layer = next(i for i in range(header.layers) if header.has(f"blk.{i}.ssm_a"))
    bound = header.number("kda.gate_lower_bound", 0.0, least=-math.inf)
    if bound > 0:
        raise header.wrong("kda.gate_lower_bound", bound, "a number below 0")
    norm = header.norm()
    found = {
        "heads": header.size("attention.head_count"),
        "head_dim": header.size("kda.head_dim"),
        "kernel_size": header.size("ssm.conv_kernel", least=2),
        "norm": norm,
        "epsilon": norm.epsilon,
        "decay_rank": rank("ssm_f", layer),
        "gate_rank": rank("ssm_g", layer),
        "lower_bound": bound or None,
    }
    return KDAConfig(**(found | choices))


def _kimi_linear(header: Header) -> ModelConfig:
    """The shared part of keys is not rotated."""
    recurrent, latent = _kda(header), unrotated(latent_attention(header))

    def block(layer: int) -> dict[str, Any]:
        return {"mixer": recurrent if header.has(f"blk.{layer}.ssm_a") else latent}

    return decoder(header, block=block, experts={"normalize": True, "routing": None})


def _kimi_k3(header: Header) -> ModelConfig:
    """Layers attend to the outputs of earlier blocks of layers; experts are latent."""
    recurrent = _kda(header)
    beta = header.number("activation.situ_beta", above=0)
    linear = header.number("activation.situ_linear_beta", 0.0, least=-math.inf)
    activation = SiTUGLU(beta, linear if linear > 0 else None)
    every, norm = header.count("attn_res.block_size", least=1), header.norm()
    latent = header.size("expert_latent_length", 0, least=0)
    within = AttentionResidualConfig(norm)

    def block(layer: int) -> dict[str, Any]:
        # Blocks of layers begin before mixers.
        begins = AttentionResidualConfig(norm, begins=layer % every == 0)
        mixer = recurrent
        if not header.has(f"blk.{layer}.ssm_a"):
            mixer = unrotated(latent_attention(header, gate=header.gate(layer)))
        found: dict[str, Any] = {"mixer": mixer, "mixer_residual": begins, "mlp_residual": within}
        if not header.has(f"blk.{layer}.ffn_gate_inp.weight"):
            return found
        normed = header.has(f"blk.{layer}.ffn_routed_norm.weight")
        experts = {"routing": None, "latent": latent, "latent_norm": norm if normed else None}
        return found | {"mlp": header.experts(layer, activation, **experts)}

    return decoder(
        header,
        activation=activation,
        block=block,
        block_type=StreamsBlockConfig,
        head_residual=within,
    )


def _glm5(header: Header) -> ModelConfig:
    """Latent attention without positions, whose indexer selects blocks of keys."""
    connection, head = hyper_connections(header)
    recurrent, dim = _kda(header, epsilon=1e-6), header.size("attention.indexer.key_length")
    if not header.flag("attention.indexer.kpool_select_tail", True):
        raise header.wrong("attention.indexer.kpool_select_tail", False, "true")
    pool = PoolConfig(header.count("attention.indexer.kpool", least=1), dim)
    epsilon = header.number("attention.layer_norm_epsilon", recurrent.norm.epsilon)
    indexer = indexer_config(header, interleaved=True, epsilon=epsilon, pool=pool)
    selects = header.flags("attention.indexer.types", True)

    def block(layer: int) -> dict[str, Any]:
        common = bounded_mlp(header, layer, one_bound=True) | connected(connection)
        if header.has(f"blk.{layer}.ssm_a"):
            return common | {"mixer": recurrent}
        own: dict[str, Any] = {"indexer": indexer} if selects[layer] else {}
        return common | {"mixer": latent_attention(header, sparse=True, **own)}

    return decoder(header, block=block, block_type=StreamsBlockConfig, head_residual=head)


def _qwen4(header: Header) -> ModelConfig:
    """Several streams; some attention layers see selected blocks only; n-grams in some layers."""
    norm = header.norm()
    streams, rank = header.size("hyper_connection.count"), header.size("hyper_connection.low_rank")
    connection = LowRankConnectionConfig(streams, rank, norm)
    sizes = _sizes(header)
    recurrent = DeltaNetConfig(**sizes, norm=norm, tiled=True, epsilon=norm.epsilon, gate="sigmoid")
    dim, width = header.size("attention.indexer.key_length"), header.size("attention.key_length")
    top_k = header.size("attention.indexer.top_k")
    ngrams = _ngrams(header, streams)

    def mixer(layer: int) -> Any:
        if header.has(f"blk.{layer}.ssm_conv1d.weight"):
            return recurrent
        attention = header.attention(layer, **head_norms(header, gate=GateConfig()))
        block = header.count("attention.compress_ratios", 0, layer=layer)
        if not block:
            return attention
        if top_k % block:
            raise header.wrong("attention.indexer.top_k", top_k, f"whole blocks of {block} keys")
        heads = header.size("attention.indexer.head_count")
        indexer = PooledBlockIndexerConfig(
            heads, dim, block, top_k // block, header.rope(width), norm
        )
        return BlockSparseConfig(attention, indexer)

    def block(layer: int) -> dict[str, Any]:
        found = {"mixer": mixer(layer), "mixer_norm": None, "mlp_norm": None}
        return found | connected(connection) | {"ngrams": ngrams.get(layer)}

    return decoder(
        header,
        block=block,
        block_type=StreamsBlockConfig,
        experts={"normalize": True},
        norm=None,
        head_residual=dataclasses.replace(connection, writes=False),
    )


def _ngrams(header: Header, streams: int) -> dict[int, NGramConfig]:
    """Embeddings of n-grams, by layer."""
    layers = header("ple.layers", [])
    if not layers:
        header.disregard("ple.*")
        header.disregard("embedding_length_per_layer_input")
        return {}
    if not isinstance(layers, list) or len(layers) != 1 or layers[0] not in range(header.layers):
        raise header.wrong("ple.layers", layers, "one layer")
    size, heads = (
        header.count(f"ple.{name}", least=1) for name in ("ngram_size", "heads_per_ngram")
    )
    lists = {}
    for name, count, most in (
        ("layer_multipliers", size, 2**64),
        ("head_vocab_sizes", heads * (size - 1), 2**24),
        ("head_offsets", heads * (size - 1), 2**31),
    ):
        values = lists[name] = header(f"ple.{name}")
        whole = isinstance(values, list) and all(isinstance(v, int) for v in values)
        if not whole or len(values) != count or not all(0 <= v < most for v in values):
            expected = f"{count} whole numbers below {most}"
            raise header.wrong(f"ple.{name}", values, expected)
    table = header.file.tensor("per_layer_token_embd.weight").shape
    ends = zip(lists["head_vocab_sizes"], lists["head_offsets"], strict=True)
    if not all(rows and offset + rows <= table[0] for rows, offset in ends):
        raise header.wrong("ple.head_offsets", lists["head_offsets"], f"parts of {table[0]} rows")
    config = NGramConfig(
        streams=streams,
        rows=table[0],
        width=header.size("embedding_length_per_layer_input"),
        size=size,
        heads=heads,
        multipliers=tuple(lists["layer_multipliers"]),
        sizes=tuple(lists["head_vocab_sizes"]),
        offsets=tuple(lists["head_offsets"]),
        kernel_size=header.count("ple.conv_kernel", least=2),
        eos=header.count("ple.eos_token_id"),
        norm=header.norm(),
        embed=header.embed,
    )
    return {layers[0]: config}


def _bailing3(header: Header) -> ModelConfig:
    if not header.flag("kda.safe_gate", True):
        raise header.wrong("kda.safe_gate", False, "true")
    recurrent = _kda(header)

    def block(layer: int) -> dict[str, Any]:
        mlp = bounded_mlp(header, layer, after=True)
        if header.has(f"blk.{layer}.ssm_a"):
            return mlp | {"mixer": recurrent}
        return mlp | {"mixer": latent_attention(header, gate=header.gate(layer))}

    return decoder(header, block=block)


def _minimax_01(header: Header) -> ModelConfig:
    """Lightning attention, and softmax attention in some layers; norms are in the stream."""
    interval, layers = header.count("full_attention_interval", 8, least=1), header.layers
    heads, norm = header.size("attention.head_count"), header.norm()
    common = {"scale": header.number("residual_scale", 1.0)}

    def block(layer: int) -> dict[str, Any]:
        if (layer + 1) % interval == 0:
            return common
        rate = 1 - layer / max(layers - 1, 1) + 1e-5
        return common | {"mixer": LightningConfig(heads, header.head_dim(), rate, norm)}

    experts = {"normalize": True}
    return decoder(header, block=block, block_type=NormalizedStreamBlockConfig, experts=experts)


def _mamba_config(header: Header, **choices: Any) -> MambaConfig:
    channels = header.size("ssm.inner_size")
    found = {
        "channels": channels,
        "state_size": header.size("ssm.state_size"),
        "dt_rank": header.size("ssm.time_step_rank"),
        "kernel_size": header.size("ssm.conv_kernel", least=2),
        "heads": channels,
        "conv_bias": header.has("blk.*.ssm_conv1d.bias"),
    }
    return MambaConfig(**(found | choices))


def _mamba(header: Header) -> ModelConfig:
    header.disregard("feed_forward_length")
    header.disregard("attention.head_count")
    normed = header.flag("ssm.dt_b_c_rms", False)
    norm = header.norm(scale=False, bias=False) if normed else None
    return decoder(header, block={"mixer": _mamba_config(header, norm=norm), "mlp": None})


def _jamba(header: Header) -> ModelConfig:
    recurrent = _mamba_config(header, norm=header.norm())
    return decoder(header, attention={"rope": None}, block=_recurrent(header, recurrent))


def _plamo2(header: Header) -> ModelConfig:
    heads, channels = header.size("ssm.time_step_rank"), header.size("ssm.inner_size")
    if channels % heads:
        raise header.wrong("ssm.inner_size", channels, f"equal parts for {heads} heads")
    header.disregard("ssm.group_count")
    rank = max(64, header.embed // 16)
    choices = {"heads": heads, "scalar_decay": True, "dt_rank": rank, "norm": header.norm()}
    recurrent = _recurrent(header, _mamba_config(header, **choices))
    return decoder(
        header,
        attention=head_norms(header, norm_over="each"),
        block=lambda layer: recurrent(layer) | post_norms(header),
    )


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


def _query_and_gate(block: LayerConfig) -> tuple[int, list[int]]:
    mixer = cast(AttentionConfig, getattr(block.mixer, "attention", block.mixer))
    return mixer.heads, [mixer.head_dim, mixer.value_dim]


def _beta_and_dt(block: LayerConfig) -> tuple[int, list[int]]:
    mixer = cast(DeltaNetConfig, block.mixer)
    return mixer.key_heads, [mixer.value_heads // mixer.key_heads] * 2


def _all_projections(block: LayerConfig) -> tuple[int, list[int]]:
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

_KDA = _names(
    **_OF_STATES,
    mixer__query__conv__kernel="ssm_conv1d_q.weight",
    mixer__key__conv__kernel="ssm_conv1d_k.weight",
    mixer__value__conv__kernel="ssm_conv1d_v.weight",
    mixer__decay__kernel="ssm_f_a.weight",
    mixer__decay__down__kernel="ssm_f_a.weight",
    mixer__decay__up__kernel="ssm_f_b.weight",
    mixer__gate__kernel=["ssm_g.weight", "ssm_g_a.weight"],
    mixer__gate__down__kernel="ssm_g_a.weight",
    mixer__gate__up__kernel="ssm_g_b.weight",
    mixer__beta__kernel="ssm_beta.weight",
)


def _with_latent(names: Names) -> Names:
    """Names beside those of latent attention."""
    paths = names.keys() | LATENT_NAMES.keys()
    return {path: [*LATENT_NAMES.get(path, ()), *names.get(path, ())] for path in sorted(paths)}


def _q_k_v(block: LayerConfig) -> tuple[int, list[int]]:
    mixer = cast(LightningConfig, block.mixer)
    return mixer.heads, [mixer.head_dim] * 3


_LIGHTNING = block_names(
    mixer__query__kernel=["attn_q.weight", Rows("attn_qkv.weight", part=0, layout=_q_k_v)],
    mixer__key__kernel=["attn_k.weight", Rows("attn_qkv.weight", part=1, layout=_q_k_v)],
    mixer__value__kernel=["attn_v.weight", Rows("attn_qkv.weight", part=2, layout=_q_k_v)],
    mixer__out_norm__scale="attn_norm_2.weight",
)

_OF_MAMBA = {
    **_OF_STATES,
    "mixer__D": "ssm_d",
    "mixer__value__conv__kernel": "ssm_conv1d.weight",
    "mixer__value__conv__bias": "ssm_conv1d.bias",
    "mixer__dt__kernel": "ssm_dt.weight",
    "mixer__dt__bias": "ssm_dt.bias",
    "mixer__dt_norm__scale": ["ssm_dt_norm.weight", "ssm_dt_norm"],
    "mixer__B_norm__scale": ["ssm_b_norm.weight", "ssm_b_norm"],
    "mixer__C_norm__scale": ["ssm_c_norm.weight", "ssm_c_norm"],
}

_MAMBA = _names(
    **_OF_MAMBA,
    **_in_turn("ssm_in.weight", "value.kernel", "gate.kernel"),
    **_in_turn("ssm_x.weight", "dt_down.kernel", "B.kernel", "C.kernel"),
)


def _gate_and_value(block: LayerConfig) -> tuple[int, list[int]]:
    mixer = cast(MambaConfig, block.mixer)
    return mixer.heads, [mixer.channels // mixer.heads] * 2


_MAMBA_HEADS = _names(
    **_OF_MAMBA,
    mixer__gate__kernel=Rows("ssm_in.weight", part=0, layout=_gate_and_value),
    mixer__value__kernel=Rows("ssm_in.weight", part=1, layout=_gate_and_value),
    **_in_turn("ssm_x.weight", "B.kernel", "C.kernel", "dt_down.kernel"),
    mixer_post_norm__scale="post_attention_norm",
    mlp_post_norm__scale="post_ffw_norm",
)

ARCHITECTURES = {
    "bailingmoe3": Architecture(_bailing3, _with_latent(_KDA), harmless=LATENT_HARMLESS),
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
    "glm5-next": Architecture(_glm5, _with_latent(_KDA), harmless=LATENT_HARMLESS),
    "jamba": Architecture(_jamba, _MAMBA, harmless=_BY_TENSORS),
    "kimi-k3": Architecture(_kimi_k3, _with_latent(_KDA), harmless=LATENT_HARMLESS),
    "kimi-linear": Architecture(_kimi_linear, _with_latent(_KDA), harmless=LATENT_HARMLESS),
    "mamba": Architecture(_mamba, _MAMBA),
    "minimax-01": Architecture(_minimax_01, _LIGHTNING),
    "plamo2": Architecture(_plamo2, _MAMBA_HEADS),
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
    "qwen4exp": Architecture(
        _qwen4,
        {
            **_DELTA_NET,
            **beside({**NAMES, **_DELTA_NET}, "attention"),
            **block_names(
                mixer__indexer__query__kernel="indexer.q_proj.weight",
                mixer__indexer__key__kernel="indexer.k_proj.weight",
                mixer__indexer__query_norm__scale="indexer.q_norm.weight",
                mixer__indexer__key_norm__scale="indexer.k_norm.weight",
                ngrams__key__kernel="ple_key.weight",
                ngrams__value__kernel="ple_value.weight",
                ngrams__key_norm__scale="ple_norm_key.weight",
                ngrams__query_norm__scale="ple_norm_query.weight",
                ngrams__conv_norm__scale="ple_norm_conv.weight",
                ngrams__kernel="ple_conv1d.weight",
            ),
            "blocks.{i}.ngrams.embedding.table": ["per_layer_token_embd.weight"],
        },
        unused=r"blk\.\d+\.indexer\.",  # of layers that see all keys
        harmless=_BY_TENSORS,
    ),
    "qwen3next": Architecture(partial(_delta_net, **_NORMALIZED), _DELTA_NET, harmless=_BY_TENSORS),
}
