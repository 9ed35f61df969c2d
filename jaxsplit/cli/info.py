"""Show what is in a GGUF file or a checkpoint directory, or what this machine has.

  jaxsplit info FILE.gguf --tensors
  jaxsplit info --system

A bug report needs what --system prints: versions, devices, links between GPUs,
and which kernels would run.
"""

import io
import json
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxsplit.cli.program import local_model
from jaxsplit.errors import JaxsplitError

if TYPE_CHECKING:
    from jaxsplit.formats import ModelFile, TensorInfo

_JSON = flags.DEFINE_bool("json", False, "machine-readable output")
_SYSTEM = flags.DEFINE_bool("system", False, "versions and devices of this machine, no file")
_TENSORS = flags.DEFINE_bool("tensors", False, "list every tensor")


def types(tensors: Iterable["TensorInfo"]) -> dict[str, dict[str, int]]:
    """Tensors, weights and bytes of each type, most bytes first."""
    table: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = table.setdefault(tensor.type, {"tensors": 0, "weights": 0, "bytes": 0})
        row["tensors"] += 1
        row["weights"] += math.prod(tensor.shape)
        row["bytes"] += tensor.nbytes
    return dict(sorted(table.items(), key=lambda entry: -entry[1]["bytes"]))


def describe(file: "ModelFile") -> dict[str, Any]:
    """Everything that is shown, as JSON values."""
    from jaxsplit.architectures import model_config

    try:
        config = model_config(file).summary()
    except JaxsplitError as error:
        config = {"not supported": str(error)}
    metadata = {
        key: f"[{len(value)} values]" if isinstance(value, list) and len(value) > 8 else value
        for key, value in file.metadata.items()
    }
    template = metadata.pop("tokenizer.chat_template", None)
    return {
        "path": str(file.path),
        "architecture": file.metadata.get("general.architecture"),
        "config": config,
        "types": types(file.tensors.values()),
        "tokenizer": {
            key.removeprefix("tokenizer.ggml."): metadata.pop(key)
            for key in list(metadata)
            if key.startswith("tokenizer.")
        },
        "chat_template": template,
        "metadata": metadata,
        "tensors": {
            tensor.name: {"type": tensor.type, "shape": tensor.shape, "bytes": tensor.nbytes}
            for tensor in file.tensors.values()
        },
    }


def _print(shown: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxsplit.quant import TYPES

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{shown['path']}: {shown['architecture']}", markup=False)
    for part in ("config", "metadata", "tokenizer"):
        console.print(f"\n{part}", style="bold")
        for key, value in shown[part].items():
            console.print(f"  {key} = {value!r}"[:200], markup=False)
    if shown["chat_template"]:
        console.print("\nchat template", style="bold")
        console.print(shown["chat_template"], markup=False)
    table = Table("type", "tensors", "weights", "bytes", "bits per weight", "supported")
    for kind, row in shown["types"].items():
        table.add_row(
            kind,
            str(row["tensors"]),
            f"{row['weights']:,}",
            f"{row['bytes']:,}",
            f"{row['bytes'] * 8 / row['weights']:.2f}",
            "yes" if kind in TYPES else "no",
        )
    console.print()
    console.print(table)
    if _TENSORS.value:
        table = Table("tensor", "type", "shape")
        for name, tensor in shown["tensors"].items():
            table.add_row(name, tensor["type"], str(tensor["shape"]))
        console.print(table)


def main(argv: list[str]) -> None:
    """Shows the file, or the machine."""
    if bool(argv) == _SYSTEM.value:
        raise JaxsplitError("give a GGUF file, as in jaxsplit info FILE.gguf, or --system")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of text that is not UTF-8
    if _SYSTEM.value:
        from jaxsplit.cli.system import describe_system, system_text

        shown = describe_system()
        print(json.dumps(shown, indent=1) if _JSON.value else system_text(shown))
        return
    from jaxsplit.llm import open_model

    shown = describe(open_model(local_model(argv[0], "the file")))
    if _JSON.value:
        print(json.dumps(shown, indent=1))
    else:
        _print(shown)
