"""How prompts are cut into the chunks that are read at a time."""

from collections.abc import Sequence

CHUNKS = (32, 128, 512, 2048)
"""Lengths for which prefill is compiled."""

_FIXED = 500
"""Tokens that take as long as what a chunk takes whatever its length: weights are read and
dequantized, kernels launched. On H100s between 270 (70B) and 950 (8B); benchmarks/RESULTS.md."""


def chunk_lengths(
    prompt: int, chunks: Sequence[int] = CHUNKS, stages: int = 1, in_turn: int = 1
) -> list[int]:
    """The lengths of the chunks of a prompt, which stages read one after the other: more and
    shorter ones keep all stages at work, and each costs something.

    Args:
      prompt: tokens; the last chunk may be longer than what is left of them.
      chunks: lengths that there are.
      stages: through which the chunks pass.
      in_turn: prompts like this one that they read in turn, which keep them at work too.
    """

    def cut(most: int) -> list[int]:
        fitting, left, lengths = sorted(c for c in chunks if c <= most), prompt, []
        while left > 0:
            length = next((c for c in fitting if c >= left), fitting[-1])
            if length > 2 * left:  # rather several shorter ones than mostly padding
                length = max((c for c in fitting if c <= left), default=length)
            lengths.append(length)
            left -= length
        return lengths

    def time(lengths: list[int]) -> int:
        each = [length + _FIXED for length in lengths]
        return in_turn * sum(each) + (stages - 1) * max(each, default=0)

    return min((cut(most) for most in sorted(chunks, reverse=True)), key=time)
