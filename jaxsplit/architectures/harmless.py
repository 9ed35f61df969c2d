"""Keys that have no effect, and the refusal of other keys that nothing reads."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from jaxsplit.architectures.header import Header
from jaxsplit.errors import JaxsplitError

HARMLESS: Mapping[str, str] = {
    "classifier.*": "of models that classify",
    "deepstack_mapping": "which layers read images",
    "embedding_length_out": "of models that make embeddings",
    "expert_shared_count": "the tensors of shared experts tell their width",
    "expert_shared_feed_forward_length": "the tensors of shared experts tell their width",
    "n_deepstack_layers": "how many layers read images",
    "pooling_type": "of models that make embeddings",
    "rope.scaling.finetuned": "how the model was trained",
    "rope.scaling.yarn_attn_factor": "llama.cpp computes it from rope.scaling.factor",
    "rope.scaling.yarn_ext_factor": "llama.cpp takes it to be 1",
    "tensor_data_layout": "how the converter found the rows; files have one order only",
    "vocab_size": "the embedding tells the size of the vocabulary",
}
"""Keys of all architectures without effect, and why; patterns as in `fnmatch`, without prefix."""

NO_WINDOW = {"attention.sliding_window": "llama.cpp computes this architecture without a window"}

ONE_BASE = {"rope.freq_base_swa": "llama.cpp takes rope.freq_base in all layers"}


def check_keys(header: Header, harmless: Mapping[str, str]) -> None:
    """Refuses keys below the architecture's prefix that nothing has read.

    Args:
      header: all of which has been read.
      harmless: keys that have no effect on this architecture.

    Raises:
      JaxsplitError: there are others; the message names them.
    """
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
