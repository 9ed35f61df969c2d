"""Writes a model of a well-known shape with random weights, on which any engine can be measured.

python benchmarks/random_gguf.py llama-8b:Q4_K_M out.gguf
"""

import sys

from jaxsplit.bench.random_model import SHAPES, model_and_type, model_file, random_model, write
from jaxsplit.errors import JaxsplitError

__all__ = ["SHAPES", "model_and_type", "model_file", "random_model", "write"]

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} SHAPE:TYPE OUT.gguf")
    try:
        write(*sys.argv[1:])
    except JaxsplitError as error:
        sys.exit(str(error))
