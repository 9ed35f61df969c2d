"""A model file's header, read the way architectures need it."""

import dataclasses
import fnmatch
import functools
import math
import re
import reprlib
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import ModelFile
from jaxsplit.models.config import MLPConfig, MoEConfig
from jaxsplit.ops.activations.functions import Activation, BoundedSwiGLU
from jaxsplit.ops.attention.rope import RopeConfig
from jaxsplit.ops.attention.spec import AttentionConfig, GateConfig
from jaxsplit.ops.norm.spec import NormConfig

_ROUTINGS = {1: "softmax", 2: "sigmoid", 3: "softmax_after_topk", 4: "sqrt_softplus"}
_SCALINGS = ("none", "linear", "yarn", "longrope")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_POSITIONS = 2**31 - 1
"""The largest position."""


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata under the architecture's prefix, and the parts of a config that they describe.

    Keys: `gguf/constants.py` of the `gguf` package.

    Attributes:
      file: the model file.
      context: tokens that the model will be used with; 0: as many as it was made for.
      norms: kind of the architecture's norms, as in `NormConfig`.
      sections_kept: a fourth section of M-RoPE is kept as it is in texts; else it is refused.
      physical_layers: how many the file has, where `block_count` counts their uses.
      known: keys that have been read or need not be, without the prefix.
    """

    file: ModelFile
    context: int = 0
    norms: str = "rms"
    sections_kept: bool = False
    physical_layers: int | None = None
    known: set[str] = dataclasses.field(default_factory=set)

    def __call__(self, name: str, default: Any = None) -> Any:
        """A value as it is in the file; without a default it must be there."""
        self.known.add(name)
        key = f"{self.file.architecture}.{name}"
        return self.file.key(key) if default is None else self.file.metadata.get(key, default)

    def given(self, name: str) -> bool:
        """Whether the file has a key."""
        return f"{self.file.architecture}.{name}" in self.file.metadata

    def disregard(self, pattern: str) -> None:
        """Keys of this pattern (`fnmatch`) have no effect on this model."""
        prefix = f"{self.file.architecture}."
        names = (key.removeprefix(prefix) for key in self.file.metadata if key.startswith(prefix))
        self.known.update(fnmatch.filter(names, pattern))

    def wrong(self, name: str, value: Any, expected: str) -> JaxsplitError:
        """The error for a value that cannot be."""
        return JaxsplitError(
            f"{self.file.path}: {self.file.architecture}.{name} is {reprlib.repr(value)}, "
            f"expected {expected}"
        )

    def number(
        self,
        name: str,
        default: float | None = None,
        *,
        least: float = 0,
        above: float | None = None,
        layer: int | None = None,
    ) -> float:
        """A finite number.

        Args:
          name: the key, without the prefix.
          default: the value if the key is missing; None: it must be there.
          least: the smallest value.
          above: values must be larger than this instead.
          layer: of which layer, where a file has a list; None: all layers must have the same.
        """
        value = self._value(name, default, layer)
        bound = f"of at least {least}" if above is None else f"above {above}"
        least = least if above is None else math.nextafter(above, math.inf)
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        if not fits or not least <= value < math.inf:
            raise self.wrong(name, value, f"a number {bound}")
        return value

    def count(
        self,
        name: str,
        default: int | None = None,
        *,
        least: int = 0,
        layer: int | None = None,
    ) -> int:
        """A whole number; arguments as in `number`."""
        return self._whole(name, self._value(name, default, layer), least)

    def size(
        self,
        name: str,
        default: int | None = None,
        *,
        least: int = 1,
        layer: int | None = None,
    ) -> int:
        """A number of rows, columns, heads or experts: a whole number that is not larger than the
        tensors of the file. Arguments as in `number`."""
        value = self.count(name, default, least=least, layer=layer)
        if value > self._largest:
            raise self.wrong(
                name, value, f"at most {self._largest}, the weights of the largest tensor"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Whether something is so."""
        if not isinstance(value := self(name, default), bool):
            raise self.wrong(name, value, "true or false")
        return value

    def flags(self, name: str, default: bool) -> list[bool]:
        """Whether something is so, of each layer."""
        values = [self._value(name, default, layer) for layer in range(self.layers)]
        if not all(value in (0, 1) for value in values):
            raise self.wrong(name, self(name, default), "true or false for each layer")
        return [bool(value) for value in values]

    def window(self, default: int | None = None, *, least: int = 1) -> int:
        """How many of the last positions layers with a window see."""
        return min(self.count("attention.sliding_window", default, least=least), _POSITIONS)

    def windowed(self, every: int | None = None) -> list[bool]:
        """Which layers have a window.

        Args:
          every: each layer of this number has none, where the file does not say; None: it must. The
            file may have another such number, or a list.
        """
        name = "attention.sliding_window_pattern"
        pattern = self(name, every)
        if isinstance(pattern, list):
            return self.flags(name, True)
        every = self._whole(name, pattern, 0)
        return [every == 0 or layer % every < every - 1 for layer in range(self.layers)]

    def _value(self, name: str, default: Any, layer: int | None) -> Any:
        """A value of a layer, or of all."""
        value = self(name, default)
        if not isinstance(value, list):
            return value
        if len(value) not in (self.layers, self.blocks):
            raise self.wrong(name, value, f"one value, or one for each of {self.layers} layers")
        if layer is not None:
            return value[layer]
        if any(other != value[0] for other in value):
            raise JaxsplitError(
                f"{self.file.path}: {self.file.architecture}.{name} differs from layer to layer, "
                "which is not supported"
            )
        return value[0]

    def _whole(self, name: str, value: Any, least: int) -> int:
        """A value, checked; floats that are whole numbers are accepted."""
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(name, value, f"a whole number of at least {least}")
        return value

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor; `*` is any layer."""
        if "*" not in tensor:
            return tensor in self.file.tensors
        return any(tensor.replace("*", str(i)) in self.file.tensors for i in range(self.layers))

    @functools.cached_property
    def blocks(self) -> int:
        """Blocks in the file, with those for predicting several tokens."""
        return self._whole("block_count", self("block_count"), 1)

    @functools.cached_property
    def layers(self) -> int:
        """Layers, without those for predicting several tokens."""
        if self.physical_layers is not None:
            return self.physical_layers
        name = "nextn_predict_layers"
        more = self._whole(name, self(name, 0), 0)
        if more >= self.blocks:
            raise self.wrong(name, more, f"less than the {self.blocks} blocks of the model")
        found = {int(m[1]) for m in map(_BLOCK.match, self.file.tensors) if m}
        if self.blocks - more > (most := max(found, default=-1) + 1):
            raise self.wrong(
                "block_count", self.blocks, f"{most + more}: the file has tensors of {most} layers"
            )
        return self.blocks - more

    @functools.cached_property
    def _largest(self) -> int:
        """Weights of the largest tensor."""
        return max((math.prod(tensor.shape) for tensor in self.file.tensors.values()), default=0)

    @property
    def context_length(self) -> int:
        """The longest context that the model was made for."""
        return min(self.count("context_length", least=1), _POSITIONS)

    @property
    def embed(self) -> int:
        """Width of the residual stream."""
        return self.size("embedding_length")

    @property
    def vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self.file.tensor("token_embd.weight").shape[0]

    @property
    def sections(self) -> tuple[int, ...]:
        """Pairs rotated by time, height and width (M-RoPE), which are the same in texts."""
        name = "rope.dimension_sections"
        value = self(name, [])
        fits = isinstance(value, list) and len(value) in (0, 3, 4)
        whole = fits and all(isinstance(n, int) and n >= 0 for n in value)
        if not whole or (any(value[3:]) and not self.sections_kept):
            raise self.wrong(name, value, "three whole numbers, and 0 if there is a fourth")
        return tuple(value)

    def norm(self, *, bias: bool | None = None, scale: bool = True) -> NormConfig:
        """The architecture's norm, with the epsilon that the file gives; biased as the last norm
        is. Some converters write epsilons of both kinds."""
        self.disregard("attention.layer_norm*_epsilon")
        key = {"rms": "layer_norm_rms_epsilon", "layer": "layer_norm_epsilon"}[self.norms]
        bias = self.has("output_norm.bias") if bias is None else bias
        return NormConfig(self.norms, self.number(f"attention.{key}"), scale, bias)

    def head_dim(self, layer: int = 0) -> int:
        """Width of a query or key head."""
        heads = self.size("attention.head_count", layer=layer)
        return self.size("attention.key_length", self.embed // heads)

    def rope(
        self, head_dim: int, *, interleaved: bool = False, end: str = "", dim: int | None = None
    ) -> RopeConfig:
        """The rotary embedding of heads.

        Args:
          head_dim: their width.
          interleaved: neighbours are a pair.
          end: of the key that tells how many of their dimensions are rotated.
          dim: how many they are, whatever the key says.
        """
        scaling = self("rope.scaling.type", "linear")
        if scaling not in _SCALINGS:
            raise JaxsplitError(
                f"{self.file.path}: {self.file.architecture}.rope.scaling.type {scaling!r} is not "
                f"supported; supported are {', '.join(_SCALINGS)}"
            )
        sections = self.sections  # refuses positions that text does not have
        trained = self.context_length
        original = self.count("rope.scaling.original_context_length", trained) or trained
        key = f"rope.dimension_count{end}"
        dim = dim or self.size(key, head_dim, least=2)
        if dim > head_dim or dim % 2:
            expected = f"an even number of at most {head_dim}, the width of a head"
            raise self.wrong(key, dim, expected)
        if any(sections[3:]) and sum(sections) != dim // 2:
            raise self.wrong("rope.dimension_sections", list(sections), f"a sum of {dim // 2}")
        factors = "freqs" if self.has("rope_freqs.weight") else None
        if self.has("rope_factors_long.weight"):
            factors = "long" if (self.context or trained) > original else "short"
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 1.0)) or 1.0
        magnitude = self.number("rope.scaling.attn_factor", 1.0)
        multiplier = self.number("rope.scaling.yarn_log_multiplier", 0.0)
        if scaling != "yarn":  # Ollama writes them for other kinds too
            self.disregard("rope.scaling.beta_*")
            self.disregard("rope.scaling.extrapolation_factor")
        if scaling == "yarn":
            magnitude /= 1 + 0.1 * multiplier * math.log(max(1.0, factor))
        return RopeConfig(
            dim=dim,
            still=sum(sections[3:]),
            base=self.number("rope.freq_base", 10000.0, above=1),
            interleaved=interleaved,
            scaling="linear" if scaling == "longrope" else scaling,
            factor=factor,
            original_context=original,
            attention_factor=magnitude,
            freq_factors=factors,
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0, above=0),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0, above=0),
        )

    def attention(
        self, layer: int, *, interleaved: bool = False, **choices: Any
    ) -> AttentionConfig:
        """The attention of a layer.

        Args:
          layer: which.
          interleaved: as in `rope`.
          **choices: fields of `AttentionConfig` that are known otherwise.
        """
        heads = self.size("attention.head_count", layer=layer)
        kv_heads = self.size("attention.head_count_kv", heads, layer=layer)
        if heads % kv_heads:
            raise JaxsplitError(
                f"{self.file.path}: {heads} heads cannot share {kv_heads} key and value heads "
                f"evenly ({self.file.architecture}.attention.head_count and head_count_kv)"
            )
        head_dim = choices.pop("head_dim", None) or self.head_dim(layer)
        value_dim = choices.pop("value_dim", None) or self.size("attention.value_length", head_dim)
        if "rope" not in choices:
            choices["rope"] = self.rope(head_dim, interleaved=interleaved)
        found: dict[str, Any] = {
            "qkv_bias": self.has("blk.*.attn_q.bias") or self.has("blk.*.attn_qkv.bias"),
            "out_bias": self.has("blk.*.attn_output.bias"),
        }
        return AttentionConfig(heads, kv_heads, head_dim, value_dim, **(found | choices))

    def temperature(self, length: str, default: int | None = None) -> tuple[float, int, int] | None:
        """By what queries grow with their position; as in `AttentionConfig`.

        Args:
          length: the key of how many positions have the same temperature.
          default: how many where the file does not say; None: it must.
        """
        scale = self.number("attention.temperature_scale", 0.0)
        if not scale:
            self.disregard(length)
            return None
        return scale, min(self.count(length, default, least=1), _POSITIONS), 0

    def gate(self, layer: int, activation: str = "sigmoid") -> GateConfig:
        """The gate of a layer's attention: for each head or each element, as the tensor is wide."""
        rows = self.file.tensor(f"blk.{layer}.attn_gate.weight").shape[0]
        heads = self.size("attention.head_count", layer=layer)
        return GateConfig(activation, per_head=rows == heads)

    def bounded(self, kind: str, layer: int, *, after: bool = False) -> Activation:
        """The SwiGLU of experts (`exp`), or of shared experts and MLPs (`shexp`), with its bound;
        0: there is none. `after`: as in `BoundedSwiGLU`."""
        limit = self.number(f"swiglu_clamp_{kind}", 0.0, layer=layer)
        return BoundedSwiGLU(limit, after) if limit else "silu"

    def mlp(
        self, layer: int, activation: Activation = "silu", *, hidden: int | None = None
    ) -> MLPConfig:
        """The MLP of a layer, gated if the file has the tensors for it."""
        hidden = hidden or self.size("feed_forward_length", layer=layer)
        gated = self.has(f"blk.{layer}.ffn_gate.weight")
        if not gated and self.has(up := f"blk.{layer}.ffn_up.weight"):
            gated = self.file.tensors[up].shape[0] == 2 * hidden
        return MLPConfig(hidden, activation, gated, self.has(f"blk.{layer}.ffn_up.bias"))

    def experts(
        self,
        layer: int,
        activation: Activation = "silu",
        *,
        shared_activation: Activation | None = None,
        **choices: Any,
    ) -> MoEConfig:
        """The mixture of experts of a layer.

        Args:
          layer: which.
          activation: of the experts.
          shared_activation: of the shared expert; None: the same.
          **choices: fields of `MoEConfig` that are known otherwise; `routing` and `normalize` where
            the file does not say, a `routing` of None: it must.
        """

        def has(tensor: str) -> bool:
            return self.has(f"blk.{layer}.{tensor}")

        def mlp(hidden: int, name: str, activation: Activation) -> MLPConfig:
            gated = has(f"ffn_gate_{name}.weight") or has(f"ffn_gate_up_{name}.weight")
            if name == "shexp" and not gated:
                rows = self.file.tensor(f"blk.{layer}.ffn_up_{name}.weight").shape[0]
                gated = rows == 2 * hidden
            return MLPConfig(hidden, activation, gated, has(f"ffn_down_{name}.bias"))

        experts, used = self.size("expert_count"), self.size("expert_used_count")
        if used > experts:
            raise self.wrong("expert_used_count", used, f"at most the {experts} experts there are")
        groups = self.size("expert_group_count", 1, least=0) or 1
        used_groups = self.size("expert_group_used_count", groups, least=0)
        if groups == 1:
            used_groups = 1
        elif experts % groups or experts < 2 * groups:
            raise self.wrong("expert_group_count", groups, f"equal parts of {experts} experts")
        elif not used <= used_groups * experts // groups <= experts:
            raise self.wrong(
                "expert_group_used_count", used_groups, f"groups of {used} experts, of {groups}"
            )
        hidden = self.size("feed_forward_length", 0, least=0, layer=layer)
        shared = self.file.tensors.get(f"blk.{layer}.ffn_down_shexp.weight")
        of_shared = activation if shared_activation is None else shared_activation
        found = {
            "routing": self._routing(choices.pop("routing", "softmax")),
            "router_bias": has("ffn_gate_inp.bias"),
            "selection_bias": has("exp_probs_b.bias") or has("exp_probs_b"),
            "groups": groups,
            "used_groups": used_groups,
            "normalize": self.flag("expert_weights_norm", choices.pop("normalize", False)),
            "scale": self.number("expert_weights_scale", 1.0) or 1.0,
            "expert_scale": has("ffn_down_exps.scale"),
            "shared": None if shared is None else mlp(shared.shape[-1], "shexp", of_shared),
            "shared_gate": has("ffn_gate_inp_shexp.weight"),
        }
        expert = mlp(self.size("expert_feed_forward_length", hidden), "exps", activation)
        return MoEConfig(experts, used, expert, **(found | choices))

    def _routing(self, usual: str | None) -> str:
        """How experts are weighed, where the file does not say as is usual."""
        name = "expert_gating_func"
        number = self.count(name, 0)
        routing = _ROUTINGS.get(number) if number else usual
        if routing is None:
            known = ", ".join(f"{number} ({routing})" for number, routing in _ROUTINGS.items())
            raise self.wrong(name, number, f"one of {known}")
        return routing
