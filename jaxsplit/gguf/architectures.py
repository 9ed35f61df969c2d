"""One entry per GGUF architecture: how its metadata become a `ModelConfig`, what it calls tensors.

Keys and tensor names: `gguf/constants.py` of the `gguf` package.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.gguf.reader import ModelFile
from jaxsplit.models.config import ModelConfig, RopeConfig

_LLAMA_NAMES = {
    "embedding.table": "token_embd.weight",
    "rope_factors": "rope_freqs.weight",
    "norm.scale": "output_norm.weight",
    "head.kernel": "output.weight",
    "blocks.{i}.attention_norm.scale": "blk.{i}.attn_norm.weight",
    "blocks.{i}.attention.query.kernel": "blk.{i}.attn_q.weight",
    "blocks.{i}.attention.query.bias": "blk.{i}.attn_q.bias",
    "blocks.{i}.attention.key.kernel": "blk.{i}.attn_k.weight",
    "blocks.{i}.attention.key.bias": "blk.{i}.attn_k.bias",
    "blocks.{i}.attention.value.kernel": "blk.{i}.attn_v.weight",
    "blocks.{i}.attention.value.bias": "blk.{i}.attn_v.bias",
    "blocks.{i}.attention.out.kernel": "blk.{i}.attn_output.weight",
    "blocks.{i}.attention.out.bias": "blk.{i}.attn_output.bias",
    "blocks.{i}.mlp_norm.scale": "blk.{i}.ffn_norm.weight",
    "blocks.{i}.mlp.gate.kernel": "blk.{i}.ffn_gate.weight",
    "blocks.{i}.mlp.gate.bias": "blk.{i}.ffn_gate.bias",
    "blocks.{i}.mlp.up.kernel": "blk.{i}.ffn_up.weight",
    "blocks.{i}.mlp.up.bias": "blk.{i}.ffn_up.bias",
    "blocks.{i}.mlp.down.kernel": "blk.{i}.ffn_down.weight",
    "blocks.{i}.mlp.down.bias": "blk.{i}.ffn_down.bias",
}


class _Keys:
    """Metadata under the architecture's prefix."""

    def __init__(self, file: ModelFile):
        self.file = file

    def __call__(self, name: str, default: Any = None) -> Any:
        """A value; without a default the file must have it."""
        key = f"{self.file.architecture}.{name}"
        return self.file.key(key) if default is None else self.file.metadata.get(key, default)

    def number(self, name: str, default: float | None = None, *, least: float = 0) -> Any:
        """A number; an array is accepted if all layers have the same value."""
        value = self(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise JaxsplitError(
                f"{self.file.path}: {self.file.architecture}.{name} differs from layer to layer, "
                "which is not supported"
            )
        if not isinstance(value, int | float) or not value >= least:
            raise JaxsplitError(
                f"{self.file.path}: {self.file.architecture}.{name} is {value!r}, expected a "
                f"number of at least {least}"
            )
        return value


def _rope(keys: _Keys, head_dim: int, **choices: Any) -> RopeConfig:
    scaling = keys("rope.scaling.type", "linear")
    supported = ("none", "linear", "yarn")
    if scaling not in supported:
        raise JaxsplitError(
            f"{keys.file.path}: RoPE scaling {scaling!r} is not supported; supported are "
            f"{', '.join(supported)}"
        )
    context = keys.number("context_length")
    dim = keys.number("rope.dimension_count", head_dim, least=2)
    if dim > head_dim or dim % 2:
        raise JaxsplitError(
            f"{keys.file.path}: {keys.file.architecture}.rope.dimension_count is {dim}, expected "
            f"an even number of at most {head_dim}, the width of a head"
        )
    return RopeConfig(
        dim=dim,
        base=keys.number("rope.freq_base", 10000.0, least=1),
        scaling=scaling,
        factor=keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0,
        original_context=keys.number("rope.scaling.original_context_length", context),
        attention_factor=keys.number("rope.scaling.attn_factor", 1.0),
        **choices,
    )


def _llama(file: ModelFile) -> ModelConfig:
    keys = _Keys(file)
    if keys("expert_count", 0):
        raise JaxsplitError(
            f"{file.path}: llama with {keys('expert_count')} experts is not supported yet; dense "
            "llama models are"
        )
    heads = keys.number("attention.head_count", least=1)
    kv_heads = keys.number("attention.head_count_kv", heads, least=1)
    if heads % kv_heads:
        raise JaxsplitError(
            f"{file.path}: {heads} heads cannot share {kv_heads} key and value heads evenly "
            f"({file.architecture}.attention.head_count and head_count_kv)"
        )
    embed = keys.number("embedding_length", least=1)
    head_dim = keys.number("attention.key_length", embed // heads, least=1)
    if (value := keys.number("attention.value_length", head_dim)) != head_dim:
        raise JaxsplitError(
            f"{file.path}: keys of width {head_dim} with values of width {value} are not supported"
        )
    return ModelConfig(
        architecture=file.architecture,
        vocab=file.tensor("token_embd.weight").shape[0],
        embed=embed,
        layers=keys.number("block_count", least=1),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=keys.number("feed_forward_length", least=1),
        context=keys.number("context_length", least=1),
        norm_epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(keys, head_dim, interleaved=True),
        rope_factors="rope_freqs.weight" in file.tensors,
        tied="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
    )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One GGUF architecture.

    Attributes:
      config: builds the model's config from the file's header.
      names: parameter path to tensor name, `{i}` being the layer.
      unused: pattern of tensors that the model does not need.
    """

    config: Callable[[ModelFile], ModelConfig]
    names: Mapping[str, str]
    unused: str = r"blk\.\d+\.attn_rot_embd"


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _LLAMA_NAMES),
}


def architecture(file: ModelFile) -> Architecture:
    """The entry of a file's architecture.

    Raises:
      JaxsplitError: it is not supported; the message lists those that are.
    """
    if file.architecture not in ARCHITECTURES:
        raise JaxsplitError(
            f"{file.path}: architecture {file.architecture!r} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[file.architecture]


def model_config(file: ModelFile) -> ModelConfig:
    """The config of the model in a file.

    Raises:
      JaxsplitError: an unknown architecture, or a missing or unsupported value.
    """
    return architecture(file).config(file)


def tensor_names(file: ModelFile, paths: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Which tensor each parameter comes from.

    Args:
      file: the model's header.
      paths: parameter paths, such as `blocks.0.mlp.up.kernel`, to shapes.

    Returns:
      parameter path to tensor name.

    Raises:
      JaxsplitError: tensors are missing, have another shape than the parameter, or would not be
        used; the message names them all.
    """
    arch = architecture(file)
    names = {
        path: arch.names[re.sub(r"\.\d+\.", ".{i}.", path)].format(
            i="".join(re.findall(r"\.(\d+)\.", path))
        )
        for path in paths
    }
    problems = []
    for path, shape in paths.items():
        tensor = file.tensors.get(names[path])
        if tensor is None:
            problems.append(f"{names[path]} is missing")
        elif tensor.shape != shape:
            problems.append(f"{names[path]} has shape {tensor.shape}, expected {shape}")
    unused = set(file.tensors) - set(names.values())
    problems += sorted(
        f"{name} is not used by this architecture"
        for name in unused
        if not re.match(arch.unused, name)
    )
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise JaxsplitError(f"{file.path}: tensors do not fit: {'; '.join(problems[:5])}{more}")
    return names
