"""What an entry of an architecture is made of."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxsplit.gguf.header import Header
from jaxsplit.gguf.names import Names
from jaxsplit.models.config import BlockConfig, ModelConfig


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One GGUF architecture.

    Attributes:
      config: builds the model's config from the file's header.
      names: where its parameters come from otherwise than in `NAMES`.
      unused: pattern of tensors that the model does not need.
    """

    config: Callable[[Header], ModelConfig]
    names: Names = dataclasses.field(default_factory=dict)
    unused: str = r"blk\.\d+\.attn_rot_embd|rope_factors_(long|short)\.weight"


Choices = Mapping[str, Any]
_NONE: Choices = MappingProxyType({})


def decoder(
    header: Header,
    *,
    interleaved: bool = False,
    activation: str = "silu",
    attention: Choices | Callable[[int], Choices] = _NONE,
    block: Choices | Callable[[int], Choices] = _NONE,
    **choices: Any,
) -> ModelConfig:
    """A decoder as most architectures have it.

    Args:
      header: of the model file.
      interleaved: neighbouring dimensions of a head turn together.
      activation: of the MLP.
      attention, block: fields of `AttentionConfig` and `BlockConfig`, of all layers or of each.
      **choices: fields of `ModelConfig`.
    """

    def of(layer: int) -> BlockConfig:
        in_block = dict(block(layer) if callable(block) else block)
        if "mixer" not in in_block:
            in_attention = attention(layer) if callable(attention) else attention
            in_block["mixer"] = header.attention(layer, interleaved=interleaved, **in_attention)
        if "mlp" not in in_block:
            in_block["mlp"] = header.mlp(layer, activation)
        return BlockConfig(**{"mixer_norm": norm, "mlp_norm": norm} | in_block)

    norm = header.norm()
    found = {
        "architecture": header.file.architecture,
        "vocab": header.file.tensor("token_embd.weight").shape[0],
        "embed": header.embed,
        "context": header.number("context_length", least=1),
        "blocks": tuple(map(of, range(header.layers))),
        "norm": norm,
        "tied": not header.has("output.weight"),
        "head_bias": header.has("output.bias"),
    }
    return ModelConfig(**(found | choices))
