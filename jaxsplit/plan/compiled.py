"""Collectives of a compiled program, and their bytes."""

import math
import re
from collections import Counter

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (.+?) ({_KINDS})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def collectives(text: str) -> tuple[Counter, Counter]:
    """Counts the collectives in the text of an optimized XLA program.

    Args:
      text: from `compiled.as_text()`.

    Returns:
      the number of each kind, and the bytes of their results on every device.
    """
    count, size = Counter(), Counter()
    for shape, kind, started in _COLLECTIVE.findall(text):
        arrays = [
            math.prod(map(int, filter(None, dims.split(",")))) * (int(bits) // 8 if bits else 1)
            for _, bits, dims in _ARRAY.findall(shape)
        ]
        if started and kind in ("all-gather", "collective-permute"):  # operands and results
            arrays = arrays[len(arrays) // 2 :]
        count[kind] += len(arrays)
        size[kind] += sum(arrays)
    return count, size
