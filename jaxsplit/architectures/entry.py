"""What an entry of an architecture is made of."""

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import Names
from jaxsplit.models.config import BlockConfig, LayerConfig, ModelConfig
from jaxsplit.models.residual_config import HyperConnectionConfig, HyperHeadConfig, ResidualConfig
from jaxsplit.ops.activations.functions import Activation
from jaxsplit.ops.attention.rope import RopeConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One GGUF architecture.

    Attributes:
      config: builds the model's config from the file's header.
      names: where its parameters come from otherwise than in `NAMES`.
      unused: pattern of tensors that the model does not need.
      norms: kind of its norms, as in `NormConfig`.
      harmless: keys, beside those of `HARMLESS`, that are not read because they have no effect on
        this architecture, and why; patterns as in `fnmatch`, without the prefix.
    """

    config: Callable[[Header], ModelConfig]
    names: Names = dataclasses.field(default_factory=dict)
    unused: str = r"blk\.\d+\.attn_rot_embd|rope_factors_(long|short)\.weight"
    norms: str = "rms"
    harmless: Mapping[str, str] = dataclasses.field(default_factory=dict)


Choices = Mapping[str, Any]
_NONE: Choices = MappingProxyType({})


def decoder(
    header: Header,
    *,
    interleaved: bool = False,
    activation: Activation = "silu",
    attention: Choices | Callable[[int], Choices] = _NONE,
    block: Choices | Callable[[int], Choices] = _NONE,
    block_type: type[LayerConfig] = BlockConfig,
    experts: Choices = _NONE,
    **choices: Any,
) -> ModelConfig:
    """A decoder as most architectures have it.

    Args:
      header: of the model file.
      interleaved: neighbouring dimensions of a head are a pair.
      activation: of MLPs and experts.
      attention, block: fields of `AttentionConfig` and `block_type`, of all layers or of each.
      block_type: the shape of layers.
      experts: fields of `MoEConfig`, of layers that have experts.
      **choices: fields of `ModelConfig`.
    """

    def of(layer: int) -> LayerConfig:
        in_block = dict(block(layer) if callable(block) else block)
        if "mixer" not in in_block:
            in_attention = attention(layer) if callable(attention) else attention
            in_block["mixer"] = header.attention(layer, interleaved=interleaved, **in_attention)
        if "mlp" not in in_block and header.has(f"blk.{layer}.ffn_gate_inp.weight"):
            in_block["mlp"] = header.experts(layer, activation, **experts)
        elif "mlp" not in in_block:
            in_block["mlp"] = header.mlp(layer, activation)
        fields: dict[str, Any] = {"mixer_norm": norm, "mlp_norm": norm} | in_block
        return block_type(**fields)

    if not header.flag("attention.causal", True):
        raise header.wrong("attention.causal", False, "true: other models do not generate text")
    _check_experts(header)
    norm = header.norm()
    blocks = tuple(map(of, range(header.layers)))
    mixers = [block.mixer for block in blocks]
    if not any(getattr(mixer, "rope", None) for mixer in mixers):
        header.disregard("rope.*")
    if not any(hasattr(mixer, "heads") for mixer in mixers):
        for name in ("head_count*", "key_length*", "value_length*"):
            header.disregard(f"attention.{name}")
    found = {
        "architecture": header.file.architecture,
        "vocab": header.vocab,
        "embed": header.embed,
        "context": header.context_length,
        "blocks": blocks,
        "norm": norm,
        "tied": not header.has("output.weight"),
        "head_bias": header.has("output.bias"),
    }
    return ModelConfig(**(found | choices))


def _check_experts(header: Header) -> None:
    """Refuses files whose keys say of other layers than their tensors that they have experts."""
    values = {
        "leading_dense_block_count": header.count("leading_dense_block_count", 0),
        "interleave_moe_layer_step": header.count("interleave_moe_layer_step", 1),
    }
    dense, step = values.values()
    layers = [i for i in range(header.layers) if header.has(f"blk.{i}.ffn_gate_inp.weight")]
    if not layers:
        if (experts := header.count("expert_count", 0)) > 1:
            raise header.wrong("expert_count", experts, "0: no layer has experts")
        header.disregard("expert_*")
        return
    for name, value in values.items():
        if header.given(name) and layers != [
            i for i in range(dense, header.layers) if step and (i + 1) % step == 0
        ]:
            layers = reprlib.repr(layers)
            raise header.wrong(name, value, f"experts where their tensors are: in layers {layers}")


def uses(config: ModelConfig, layers: range) -> tuple[LayerConfig, ...]:
    """A run of layers of a file that is used more than once."""
    return tuple(dataclasses.replace(config.blocks[i], source=i) for i in layers)


def hyper_connections(header: Header) -> tuple[HyperConnectionConfig, HyperHeadConfig]:
    """Manifold-constrained hyper-connections, and what the head reads."""
    streams = header.size("hyper_connection.count")
    epsilon = header.number("hyper_connection.epsilon", 1e-6)
    iterations = header.count("hyper_connection.sinkhorn_iterations", 0)
    norm_epsilon = header.norm().epsilon
    mean = not header.has("output_hc_fn.weight")
    head = HyperHeadConfig(streams, epsilon, norm_epsilon, mean)
    return HyperConnectionConfig(streams, epsilon, norm_epsilon, iterations), head


def connected(connection: ResidualConfig) -> dict[str, Any]:
    """Fields of `StreamsBlockConfig` where mixer and MLP are connected to the streams alike."""
    return {"mixer_residual": connection, "mlp_residual": connection}


def bounded_mlp(
    header: Header, layer: int, *, after: bool = False, one_bound: bool = False
) -> dict[str, Any]:
    """Fields of `BlockConfig`: MLP, experts and shared expert with their bounds; `one_bound`: that
    of experts for all, where the file does not give another."""
    routed, other = (header.bounded(kind, layer, after=after) for kind in ("exp", "shexp"))
    if one_bound and not header.given("swiglu_clamp_shexp"):
        other = routed
    if not header.has(f"blk.{layer}.ffn_gate_inp.weight"):
        return {"mlp": header.mlp(layer, other)}
    return {"mlp": header.experts(layer, routed, shared_activation=other, routing=None)}


def head_norms(header: Header, **choices: Any) -> dict[str, Any]:
    """Fields of `AttentionConfig` where queries and keys are normalized, and others."""
    norm = header.norm(bias=False)
    return {"query_norm": norm, "key_norm": norm, **choices}


def post_norms(header: Header) -> dict[str, Any]:
    """Fields of `BlockConfig` where what is written to the stream is normalized."""
    return {"mixer_post_norm": header.norm(), "mlp_post_norm": header.norm()}


def only_post_norms(header: Header) -> dict[str, Any]:
    """And where what is read from it is not."""
    return {"mixer_norm": None, "mlp_norm": None, **post_norms(header)}


def rotations(header: Header, *, interleaved: bool = False) -> tuple[RopeConfig, RopeConfig]:
    """RoPE of layers without and with a window, which may have a base of their own."""
    rope = header.rope(header.head_dim(), interleaved=interleaved)
    base = header.number("rope.freq_base_swa", rope.base, above=1)
    return rope, dataclasses.replace(rope, base=base)


def unscaled(rope: RopeConfig, **choices: Any) -> RopeConfig:
    """RoPE of layers that look at their neighbourhood only."""
    return dataclasses.replace(rope, scaling="none", freq_factors=None, **choices)


def scaled(header: Header, **defaults: float) -> dict[str, Any]:
    """Choices of `decoder` for architectures that scale what passes through: Granite, MiniCPM.

    Args:
      header: of the model file.
      **defaults: of `embedding_scale`, `residual_scale` and `logit_scale`, else 1; these are keys.
    """
    keys = ("embedding_scale", "residual_scale", "logit_scale")
    embedding, residual, logit = (header.number(k, defaults.get(k, 1.0)) or 1.0 for k in keys)
    attention: dict[str, Any] = {"scale": header.number("attention.scale", 0.0) or None}
    if not header.flag("rope.scaling.finetuned", True):
        attention["rope"] = None
    return {
        "interleaved": True,
        "attention": attention,
        "block": {"mixer_scale": residual, "mlp_scale": residual},
        "embedding_scale": embedding,
        "logit_scale": 1 / logit,
    }
