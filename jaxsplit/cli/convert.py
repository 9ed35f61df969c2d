"""Convert a GGUF file to a checkpoint directory that any mesh can restore.

  jaxsplit convert --model=FILE.gguf --out=DIR
  jaxsplit convert --model=FILE.gguf --out=DIR --weights=bfloat16

Weights stay quantized, or are dequantized with --weights. The directory, an
Orbax checkpoint, appears only when it is complete; --model of other commands
takes it.
"""

import shutil
import sys

from absl import flags

from jaxsplit.cli import options
from jaxsplit.cli.program import local_model, on_interrupt, progress_bar
from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import user_path

_MODEL = flags.DEFINE_string("model", None, options.MODEL_HELP)
_OUT = flags.DEFINE_string("out", None, "directory to write, which must not exist")
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    "quantized",
    ["quantized", "bfloat16", "float16", "float32"],
    "keep weights as in the file, or dequantize matrices",
)


def main(_: list[str]) -> None:
    """Converts as the flags say."""
    from jaxsplit.architectures import model_config
    from jaxsplit.formats import open_gguf
    from jaxsplit.weights.checkpoint import is_checkpoint, partial_directory, save_checkpoint

    if not _MODEL.value or not _OUT.value:
        raise JaxsplitError("--model=FILE.gguf and --out=DIR are both needed")
    out = user_path(_OUT.value, "--out")
    path = user_path(local_model(_MODEL.value), "--model")
    if is_checkpoint(path):
        raise JaxsplitError(f"{path} is a checkpoint directory already; --model takes a GGUF file")
    file = open_gguf(path)
    weights = None if _WEIGHTS.value == "quantized" else _WEIGHTS.value
    on_interrupt(lambda: shutil.rmtree(partial_directory(out), ignore_errors=True))
    with progress_bar("converting") as progress:
        save_checkpoint(file, model_config(file), out, weights=weights, progress=progress)
    print(f"wrote {out}", file=sys.stderr)
