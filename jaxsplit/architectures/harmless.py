"""Keys that have no effect, and the refusal of other keys that nothing reads."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from jaxsplit.architectures.header import Header
from jaxsplit.errors import JaxsplitError
from jaxsplit.models.config import ModelConfig
from jaxsplit.ops.attention.spec import AttentionConfig

HARMLESS: Mapping[str, str] = {
    "classifier.*": "of models that classify",
    "deepstack_mapping": "which layers read images",
    "embedding_length_out": "of models that make embeddings",
    "image_token_index": "of images",
    "mm.*": "of images",
    "expert_shared_count": "the tensors of shared experts tell their width",
    "expert_shared_feed_forward_length": "the tensors of shared experts tell their width",
    "n_deepstack_layers": "how many layers read images",
    "pooling_type": "of models that make embeddings",
    "rope.scaling.finetuned": "how the model was trained",
    "rope.scaling.yarn_attn_factor": "llama.cpp computes it from rope.scaling.factor",
    "rope.scaling.yarn_ext_factor": "llama.cpp takes it to be 1",
    "rope.mrope_section": "of images: rope.dimension_sections by another name",
    "ssm.v_head_reordered": "how the converter found the rows; files have one order only",
    "tensor_data_layout": "how the converter found the rows; files have one order only",
    "vocab_size": "the embedding tells the size of the vocabulary",
}
"""Keys of all architectures without effect, and why; patterns as in `fnmatch`, without prefix."""

NO_WINDOW = {"attention.sliding_window": "llama.cpp computes this architecture without a window"}

ONE_BASE = {"rope.freq_base_swa": "llama.cpp takes rope.freq_base in all layers"}


def _normalizes(config: ModelConfig) -> bool:
    moes = (getattr(block.mlp, "moe", block.mlp) for block in config.blocks)
    return any(getattr(moe, "normalize", False) for moe in moes)


def _chunk(config: ModelConfig) -> int | None:
    attention = (b.mixer for b in config.blocks if isinstance(b.mixer, AttentionConfig))
    return next((mixer.window for mixer in attention if mixer.chunked), None)


REPEATED: Mapping[str, Callable[[ModelConfig], Any]] = {
    "attention.chunk_size": _chunk,
    "attention.head_dim": lambda config: config.attention and config.attention.head_dim,
    "max_position_embeddings": lambda config: config.context,
    "norm_top_k_prob": _normalizes,
    "use_qk_norm": lambda config: any(
        getattr(block.mixer, "query_norm", None) for block in config.blocks
    ),
}
"""Keys of other converters that repeat what the file says elsewhere, and what they have to be."""


def check_keys(header: Header, config: ModelConfig, harmless: Mapping[str, str]) -> None:
    """Refuses keys below the architecture's prefix that nothing has read.

    Args:
      header: all of which has been read.
      config: what was made of it.
      harmless: keys that have no effect on this architecture.

    Raises:
      JaxsplitError: there are others; the message names them.
    """
    for name, find in REPEATED.items():
        repeats = header.given(name) and name not in header.known
        if repeats and header(name) != (found := find(config)):
            raise header.wrong(name, header(name), f"{found}, as the rest of the file says")
    prefix = f"{header.file.architecture}."
    names = {key.removeprefix(prefix) for key in header.file.metadata if key.startswith(prefix)}
    patterns = [*HARMLESS, *harmless]
    unknown = sorted(
        name
        for name in names - header.known
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    )
    if unknown:
        rest = f" (and {len(unknown) - 5} more)" if len(unknown) > 5 else ""
        raise JaxsplitError(
            f"{header.file.path}: {', '.join(prefix + name for name in unknown[:5])}{rest} may "
            "change what the model computes, which is not supported"
        )
