"""A model file's header, read the way architectures need it."""

import dataclasses
import math
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf.reader import ModelFile
from jaxsplit.models.config import MLPConfig, MoEConfig
from jaxsplit.models.mixer_config import AttentionConfig, NormConfig, RopeConfig

_ROUTINGS = {1: "softmax", 2: "sigmoid", 3: "chosen_softmax"}
_SCALINGS = ("none", "linear", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata under the architecture's prefix, and the parts of a config that they describe.

    Keys: `gguf/constants.py` of the `gguf` package.

    Attributes:
      file: the model file.
      context: tokens that the model will be used with; 0: as many as it was made for.
    """

    file: ModelFile
    context: int = 0

    def __call__(self, name: str, default: Any = None, *, layer: int | None = None) -> Any:
        """A value, of one layer where layers have their own; without a default it must be there."""
        key = f"{self.file.architecture}.{name}"
        value = self.file.key(key) if default is None else self.file.metadata.get(key, default)
        return value[layer] if isinstance(value, list) and layer is not None else value

    def number(
        self, name: str, default: float | None = None, *, least: float = 0, layer: int | None = None
    ) -> Any:
        """A number, checked; an array is accepted if all layers have the same value."""
        key = f"{self.file.path}: {self.file.architecture}.{name}"
        try:
            value = self(name, default, layer=layer)
        except IndexError:
            raise JaxsplitError(f"{key} has no value for layer {layer}") from None
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise JaxsplitError(f"{key} differs from layer to layer, which is not supported")
        if not isinstance(value, int | float) or not value >= least:
            raise JaxsplitError(f"{key} is {value!r}, expected a number of at least {least}")
        return value

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor; `*` is any layer."""
        if "*" not in tensor:
            return tensor in self.file.tensors
        return any(tensor.replace("*", str(i)) in self.file.tensors for i in range(self.layers))

    @property
    def layers(self) -> int:
        """Layers, without those for predicting several tokens."""
        return self.number("block_count", least=1) - self.number("nextn_predict_layers", 0)

    @property
    def embed(self) -> int:
        """Width of the residual stream."""
        return self.number("embedding_length", least=1)

    def norm(self, *, bias: bool | None = None, scale: bool = True) -> NormConfig:
        """RMSNorm or LayerNorm by the epsilon that the file gives; biased as the last norm is."""
        bias = self.has("output_norm.bias") if bias is None else bias
        for kind, key in (("rms", "layer_norm_rms_epsilon"), ("layer", "layer_norm_epsilon")):
            if f"{self.file.architecture}.attention.{key}" in self.file.metadata:
                return NormConfig(kind, self.number(f"attention.{key}"), scale, bias)
        return NormConfig("rms", self.number("attention.layer_norm_rms_epsilon"))

    def rope(self, head_dim: int, *, interleaved: bool = False, **choices: Any) -> RopeConfig:
        """How heads turn.

        Args:
          head_dim: their width.
          interleaved: neighbours turn together.
          **choices: fields of `RopeConfig` that are known otherwise.
        """
        scaling = self("rope.scaling.type", "linear")
        if scaling not in _SCALINGS:
            raise JaxsplitError(
                f"{self.file.path}: RoPE scaling {scaling!r} is not supported; supported are "
                f"{', '.join(_SCALINGS)}"
            )
        trained = self.number("context_length")
        original = self.number("rope.scaling.original_context_length", trained)
        dim = choices.pop("dim", None) or self.number("rope.dimension_count", head_dim, least=2)
        if dim > head_dim or dim % 2:
            raise JaxsplitError(
                f"{self.file.path}: {self.file.architecture}.rope.dimension_count is {dim}, "
                f"expected an even number of at most {head_dim}, the width of a head"
            )
        factors = "freqs" if self.has("rope_freqs.weight") else None
        if self.has("rope_factors_long.weight"):
            factors = "long" if (self.context or trained) > original else "short"
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0)) or 1.0
        magnitude = self.number("rope.scaling.attn_factor", 1.0)
        if scaling == "yarn" and (multiplier := self.number("rope.scaling.yarn_log_multiplier", 0)):
            magnitude /= 1 + 0.1 * multiplier * math.log(factor)
        found = RopeConfig(
            dim=dim,
            base=self.number("rope.freq_base", 10000.0, least=1),
            interleaved=interleaved,
            scaling="none" if scaling == "longrope" else scaling,
            factor=factor,
            original_context=original,
            attention_factor=magnitude,
            factors=factors,
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
        )
        return dataclasses.replace(found, **choices)

    def attention(
        self, layer: int, *, interleaved: bool = False, **choices: Any
    ) -> AttentionConfig:
        """The attention of a layer.

        Args:
          layer: which.
          interleaved: as in `rope`.
          **choices: fields of `AttentionConfig` that are known otherwise.
        """
        heads = self.number("attention.head_count", least=1, layer=layer)
        kv_heads = self.number("attention.head_count_kv", heads, least=1, layer=layer)
        if heads % kv_heads:
            raise JaxsplitError(
                f"{self.file.path}: {heads} heads cannot share {kv_heads} key and value heads "
                f"evenly ({self.file.architecture}.attention.head_count and head_count_kv)"
            )
        head_dim = choices.pop("head_dim", None) or self.number(
            "attention.key_length", self.embed // heads, least=1
        )
        value_dim = choices.pop("value_dim", None) or self.number(
            "attention.value_length", head_dim, least=1
        )
        if "rope" not in choices:
            choices["rope"] = self.rope(head_dim, interleaved=interleaved)
        found = {
            "qkv_bias": self.has("blk.*.attn_q.bias") or self.has("blk.*.attn_qkv.bias"),
            "out_bias": self.has("blk.*.attn_output.bias"),
        }
        return AttentionConfig(heads, kv_heads, head_dim, value_dim, **(found | choices))

    def mlp(self, layer: int, activation: str = "silu") -> MLPConfig:
        """The MLP of a layer, gated if the file has the tensors for it."""
        hidden = self.number("feed_forward_length", least=1, layer=layer)
        gated = self.has(f"blk.{layer}.ffn_gate.weight")
        if not gated and self.has(up := f"blk.{layer}.ffn_up.weight"):
            gated = self.file.tensors[up].shape[0] == 2 * hidden
        return MLPConfig(hidden, activation, gated, self.has(f"blk.{layer}.ffn_up.bias"))

    def experts(self, layer: int, activation: str = "silu", **choices: Any) -> MoEConfig:
        """The mixture of experts of a layer.

        Args:
          layer: which.
          activation: of the experts.
          **choices: fields of `MoEConfig` that are known otherwise.
        """

        def has(tensor: str) -> bool:
            return self.has(f"blk.{layer}.{tensor}")

        def mlp(hidden: int, name: str) -> MLPConfig:
            gated = has(f"ffn_gate_{name}.weight") or has(f"ffn_gate_up_{name}.weight")
            return MLPConfig(hidden, activation, gated, has(f"ffn_down_{name}.bias"))

        experts = self.number("expert_count", least=1)
        used = self.number("expert_used_count", least=1)
        groups = self.number("expert_group_count", 1) or 1
        routing = self.number("expert_gating_func", 0) or 1
        if routing not in _ROUTINGS or used > experts or experts % groups:
            raise JaxsplitError(
                f"{self.file.path}: a choice of {used} of {experts} experts in {groups} groups by "
                f"gating function {routing} is not supported ({self.file.architecture}.expert_…)"
            )
        hidden = self.number("feed_forward_length", 0, layer=layer)
        shared = self.file.tensors.get(f"blk.{layer}.ffn_up_shexp.weight")
        found = {
            "routing": _ROUTINGS[routing],
            "router_bias": has("ffn_gate_inp.bias"),
            "selection_bias": has("exp_probs_b.bias"),
            "groups": groups,
            "used_groups": self.number("expert_group_used_count", groups, least=1),
            "normalize": bool(self("expert_weights_norm", False)),
            "scale": self.number("expert_weights_scale", 1.0) or 1.0,
            "expert_scale": has("ffn_down_exps.scale"),
            "shared": None if shared is None else mlp(shared.shape[0], "shexp"),
            "shared_gate": has("ffn_gate_inp_shexp.weight"),
        }
        expert = mlp(self.number("expert_feed_forward_length", hidden, least=1), "exps")
        return MoEConfig(experts, used, expert, **(found | choices))
