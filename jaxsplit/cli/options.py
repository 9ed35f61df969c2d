"""Flags that are fields of a config: see `jaxsplit.config`."""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from absl import flags

from jaxsplit.cli.program import note
from jaxsplit.config import RENAMED, Config

flags.disclaim_key_flags()  # they belong to the module that has them defined

_DEFINE = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
}
GROUPS = {
    "split_mode": "Split over devices",
    "weights": "Precision",
    "lora": "Adapters",
    "kernels": "Execution",
    "ctx_size": "Context",
    "temperature": "Sampling",
}
"""Headings of `--help`, by the first flag of each group: see `jaxsplit.cli.help`."""

MODEL_HELP = (
    "GGUF file (any one of a model in several), checkpoint directory, or owner/repo[:type] of the "
    "Hugging Face Hub"
)
"""Of the flag `--model`."""

_TYPES = {
    "devices": int,
    "tensor_split": str,
    "lora": str,
    "logit_bias": str,
    "prompt_cache_dir": str,
}
"""Of the flags of fields that take other values too in Python."""


def define(
    config: type[Config],
    names: Collection[str] | None = None,
    *,
    skip: Collection[str] = (),
    **defaults: Any,
) -> dict[str, flags.FlagHolder]:
    """Defines a flag for each field of a config.

    Args:
      config: the class.
      names: of the fields; None: all.
      skip: fields that have no flag.
      **defaults: of flags whose default is another here.
    """
    holders = {}
    for field in dataclasses.fields(config):
        if field.name in skip or (names is not None and field.name not in names):
            continue
        default = defaults.get(field.name, field.default)
        choices = field.metadata["choices"]
        help = field.metadata["help"] + (f" ({' | '.join(choices)})" if choices else "")
        holders[field.name] = _DEFINE[_type(field)](field.name, default, help)
    for old, (new, values) in RENAMED.items():
        if new in holders:
            define_old(old, new, values)
    return holders


def define_old(old: str, new: str, values: Mapping[Any, Any] | None = None) -> None:
    """Defines the old name of a flag, which sets the new one and says so.

    Args:
      old, new: the names.
      values: what the values are now, where these are others.
    """

    def renamed(value: Any) -> bool:
        if value is not None:
            note(f"jaxsplit: --{old} is now --{new}; the old name goes with the next version")
            flags.FLAGS[new].value = (values or {}).get(value, value)
        return True

    kind = bool if values and True in values else _flag_type(flags.FLAGS[new])
    _DEFINE[kind](old, None, f"the old name of --{new}")
    flags.register_validator(old, renamed)


def define_model() -> flags.FlagHolder:
    """Defines `--model`, of programs that run one."""
    return flags.DEFINE_string("model", None, MODEL_HELP + " (default: demo model)")


def define_json_dir() -> flags.FlagHolder:
    """Defines `--json_dir`, of programs that measure: see `jaxsplit.bench.record`."""
    return flags.DEFINE_string(
        "json_dir",
        None,
        "also write a record of this run to this folder, such as benchmarks/results",
    )


def _flag_type(flag: flags.Flag) -> type:
    return {"bool": bool, "int": int, "float": float}.get(flag.flag_type(), str)


def _type(field: dataclasses.Field) -> type:
    """The type of a field's flag: of `int | None`, it is `int`."""
    if field.name in _TYPES:
        return _TYPES[field.name]
    found: Any = field.type
    if isinstance(found, types.UnionType):
        [found] = [t for t in typing.get_args(found) if t is not types.NoneType]
    return found


def values(holders: Mapping[str, flags.FlagHolder]) -> dict[str, Any]:
    """The flags' values by the names of their fields."""
    return {name: holder.value for name, holder in holders.items()}


def define_compilation_cache() -> flags.FlagHolder:
    """Defines `--compilation_cache`, for `use_compilation_cache`."""
    return flags.DEFINE_string(
        "compilation_cache",
        "auto",
        "folder of compiled programs; auto: the user's cache; none: off",
    )


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs, unless the environment already says where.

    Args:
      folder: of the programs; `auto`: the user's cache; `none`: they are not kept.
    """
    if folder == "none" or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax
    import platformdirs

    folder = os.path.expanduser(folder)
    if folder == "auto":
        folder = platformdirs.user_cache_dir("jaxsplit", appauthor=False)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def unescaped(text: str) -> str:
    """A flag's text with its escapes `\\n`, `\\t` and `\\\\` replaced."""
    meant = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda escape: meant[escape[1]], text)
