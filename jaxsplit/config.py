"""What people may choose: one declaration for each option.

A field of these classes is an argument of the library and a flag of the command lines
(`jaxsplit.cli.options`): its type, default, help and validation are here and nowhere else. JAX is
not imported.
"""

import dataclasses
import math
import secrets
import warnings
from collections.abc import Collection, Hashable, Mapping
from typing import Any

from jaxsplit.arguments import checked_choice, checked_number
from jaxsplit.errors import JaxsplitError

FLOATS = ("bfloat16", "float16", "float32")
DEFAULT_CONTEXT = 4096
MAX_LOGIT_BIAS = 300
"""Tokens of a request whose logits may have a bias, as in OpenAI's API."""

MAX_PENALTY = 1e6
"""Of temperatures and penalties: float32 has to hold what they make of logits."""

RENAMED: Mapping[str, tuple[str, Mapping[Any, Any]]] = {
    "prompt_dtype": ("prefill_dtype", {}),
    "reduce_dtype": ("all_reduce_dtype", {}),
    "peer_access": ("collectives", {True: "auto", False: "nccl"}),
}
"""Options by names that the next version will not accept: what they are called now, and what their
values are where these are others."""


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] = (),
    low: float | None = None,
    high: float = math.inf,
) -> Any:
    """A field of a config.

    Args:
      default: its value if none is given.
      help: what it does, in a line or two.
      choices: the values of a string.
      low, high: the least and the largest value of a number; None: it is no number.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """A frozen dataclass whose fields are made by `option`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if value is None and field.default is None:
                continue
            if limits["choices"]:
                checked_choice(field.name, value, limits["choices"])
            if limits["low"] is not None:
                kind = float if field.type is float else int
                value = checked_number(field.name, value, kind, limits["low"], limits["high"])
                object.__setattr__(self, field.name, value)

    @classmethod
    def of(cls, options: Mapping[str, Any], config: Any = None) -> Any:
        """A config with some options changed.

        Raises:
          JaxsplitError: an option is unknown, or a value is out of range or of another type.
        """
        options = dict(options)
        for old in RENAMED.keys() & options.keys():
            new, values = RENAMED[old]
            warnings.warn(f"{old} is now {new}", FutureWarning, stacklevel=3)
            value = options.pop(old)
            options[new] = values.get(value, value) if isinstance(value, Hashable) else value
        if config is not None and not isinstance(config, cls):
            raise JaxsplitError(f"a {cls.__name__} is needed, not {type(config).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise JaxsplitError(
                f"unknown option {', '.join(unknown)}; the options are {', '.join(known)}"
            )
        return dataclasses.replace(cls() if config is None else config, **options)


@dataclasses.dataclass(frozen=True)
class LoadConfig(Config):
    """How a model is loaded: the options of `jaxsplit.load`."""

    split_mode: str = option(
        "graph",
        "graph: every device works on a part of every layer; layer: on some of the layers; row: on "
        "some rows of every matrix; none: one device; auto: whichever should decode fastest and "
        "fits",
    )
    devices: Any = option(
        None, "use only the first N devices; in Python, also a list of JAX devices"
    )
    mesh: str | None = option(
        None, "shape of the mesh, such as tensor:4 or stage:2,tensor:2 (default: all devices)"
    )
    tensor_split: Any = option(
        None,
        "shares of the stages, or of the devices of one stage, such as 3,1 (default: by free "
        "memory of the stages, equal within a stage)",
    )
    main_device: int = option(0, "the device of split_mode=none", low=0)

    weights: str = option(
        "quantized",
        "keep matrices as in the file, or dequantize them to this dtype",
        choices=("quantized", *FLOATS),
    )
    dtype: str = option(
        "auto",
        "of activations; auto: float32 on CPUs, float16 on GPUs without bfloat16 units, else "
        "bfloat16",
        choices=("auto", *FLOATS),
    )
    activations: str = option(
        "auto",
        "of one or two rows (with CUDA C++ of up to 64), in products with quantized matrices: int8 "
        "rounds them to 8 bits with a scale for each 32, as llama.cpp does; float does not; auto "
        "rounds where kernels do it",
        choices=("auto", "float", "int8"),
    )
    prefill_dtype: str = option(
        "auto",
        "of prompts, in products with quantized matrices: auto (as dtype) or float8 (faster from "
        "compute capability 8.9 on, less exact)",
        choices=("auto", "float8"),
    )
    all_reduce_dtype: str = option(
        "auto",
        "of partial sums between devices; auto: float32, but bfloat16 in prompts of that dtype",
        choices=("auto", *FLOATS),
    )
    cache_dtype: str = option(
        "auto",
        "of keys and values; int8 has a scale for each head and position; auto: as dtype",
        choices=("auto", "int8", *FLOATS),
    )

    lora: Any = option(
        None,
        "LoRA adapters in GGUF files, such as A.gguf or poet=A.gguf:0.5,B.gguf: each with a name "
        "by which requests choose it (default: the file's) and a scale (default: 1)",
    )

    kernels: str = option(
        "auto",
        "what computes: triton: Pallas-Triton kernels, on GPUs of compute capability 8.0 on; cuda: "
        "CUDA C++ for one and two rows, on GPUs of compute capability 6.1 on, for up to 64 from "
        "7.5 on, and for up to 256 from 8.0 on (512 on Hopper); xla: XLA alone; auto: the first of "
        "these that runs, and cuda beside triton for what that lacks, or does slower; interpret: "
        "triton on CPUs, to test it",
        choices=("auto", "triton", "cuda", "xla", "interpret"),
    )
    collectives: str = option(
        "auto",
        "how GPUs of one process all-reduce and stages transfer activations: p2p: kernels write to "
        "one another's memory; nccl: through NCCL and the host; auto: p2p where GPUs can",
        choices=("auto", "p2p", "nccl"),
    )
    ctx_size: int | None = option(
        None,
        "tokens of context, at most as many as the model was trained for; 0: all of these "
        f"(default: at most {DEFAULT_CONTEXT})",
        low=0,
    )
    slots: int | None = option(
        None,
        "sequences that are decoded together, at most (default: 4 on CPUs, else 32, or as many as "
        "memory allows)",
        low=1,
    )
    cache_tokens: int | None = option(
        None,
        "tokens whose keys and values are kept, of all sequences together, on each replica of the "
        "data axis (default: what the devices' memory has room for; on CPUs, two contexts)",
        low=1,
    )
    cache_ram: int = option(
        0,
        "MiB of host memory for prefixes that the devices forget, which are restored instead of "
        "being read again; 0: none",
        low=0,
    )
    prompt_cache_dir: Any = option(
        None, "directory where prefixes are kept, for later runs too, on any mesh (default: none)"
    )
    prompt_cache_size: int = option(
        16,
        "GiB of files in prompt_cache_dir at most; the least recently used are removed",
        low=1,
    )
    itl_budget: float = option(
        0.1,
        "seconds that reading a prompt may delay the tokens of other requests",
        low=0,
    )


@dataclasses.dataclass(frozen=True)
class SamplingConfig(Config):
    """How tokens are chosen.

    Attributes:
      top_p: Holtzman et al. 2019, arXiv:1904.09751.
      min_p: Nguyen et al. 2024, arXiv:2407.01082.
      repeat_penalty: Keskar et al. 2019, arXiv:1909.05858.
      seed: the lower 32 bits count. -1 or None: a random seed, drawn here.

    Raises:
      JaxsplitError: a value is out of range or of another type.
    """

    temperature: float = option(
        0.8, "divides the logits; 0: always the likeliest token", low=0, high=MAX_PENALTY
    )
    top_k: int = option(40, "keep the k likeliest tokens; 0: all", low=0)
    top_p: float = option(
        0.95, "keep the likeliest tokens that reach this probability; 1: all", low=0, high=1
    )
    min_p: float = option(
        0.05, "keep tokens at least this fraction as likely as the likeliest; 0: all", low=0, high=1
    )
    repeat_penalty: float = option(
        1.0,
        "divides positive logits, multiplies negative ones, of recent tokens; 1: off",
        low=1 / MAX_PENALTY,
        high=MAX_PENALTY,
    )
    frequency_penalty: float = option(
        0.0,
        "subtracted from a logit for each recent occurrence",
        low=-MAX_PENALTY,
        high=MAX_PENALTY,
    )
    presence_penalty: float = option(
        0.0,
        "subtracted from the logit of a token that occurred recently",
        low=-MAX_PENALTY,
        high=MAX_PENALTY,
    )
    repeat_last_n: int = option(64, "how many of the last tokens are recent; -1: all", low=-1)
    logit_bias: Any = option(
        None, "numbers added to the logits of tokens, such as 15:-1.5,42:3; -inf: never"
    )
    logprobs: int | None = option(
        None,
        "return the log-probability of each token and of its N likeliest alternatives",
        low=0,
        high=20,
    )
    seed: int | None = option(
        0, "the same seed gives the same text, on any mesh; -1: random", low=-math.inf
    )

    def __post_init__(self) -> None:
        if self.seed is None or (type(self.seed) is int and self.seed == -1):
            object.__setattr__(self, "seed", secrets.randbits(32))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        super().__post_init__()


def _bias(given: Any) -> tuple[tuple[int, float], ...] | None:
    """Biases by token id, in order, from a mapping, pairs, or text such as `15:-1.5,42:3`.

    Raises:
      JaxsplitError: it is none of these.
    """
    if given is None:
        return None
    try:
        if isinstance(given, str):
            pairs = [pair.rsplit(":", 1) for pair in given.split(",") if pair]
        else:
            pairs = given.items() if isinstance(given, Mapping) else given
        bias = {int(token): float(value) for token, value in pairs}
    except (TypeError, ValueError, OverflowError):
        raise JaxsplitError(
            f"logit_bias={given!r} must be numbers by token id, such as 15:-1.5,42:3"
        ) from None
    if len(bias) > MAX_LOGIT_BIAS or any(math.isnan(x) or x == math.inf for x in bias.values()):
        raise JaxsplitError(
            f"logit_bias has {len(bias)} tokens; at most {MAX_LOGIT_BIAS} can have one, each a "
            "number or -inf"
        )
    return tuple(sorted(bias.items())) or None
