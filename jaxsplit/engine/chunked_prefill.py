"""How prompts are cut into chunks."""

from collections.abc import Sequence

CHUNKS = (32, 128, 256, 512, 1024, 2048)
"""Chunk lengths for which prefill is compiled."""

MAX_LOGITS = 512
"""Tokens of a chunk at most of which logits are computed, not of the last one only."""

CHUNK_OVERHEAD = 300
"""Fixed cost of a chunk in equivalent tokens: reading and dequantizing weights, kernel launches.
Between 220 (an 8B on an H200) and 270 (a 70B on H100s); docs/plan.md."""


def chunk_lengths(
    prompt: int, chunks: Sequence[int] = CHUNKS, stages: int = 1, queued: int = 1
) -> list[int]:
    """Chunk lengths of a prompt. In a pipeline, more and shorter chunks keep all stages busy, but
    each has a fixed cost.

    Args:
      prompt: tokens; the last chunk may be longer than the rest of them.
      chunks: compiled chunk lengths.
      stages: number of pipeline stages.
      queued: prompts of this length read one after the other, which fill the pipeline too.
    """

    def cut(longest: int) -> list[int]:
        fitting, left, lengths = sorted(c for c in chunks if c <= longest), prompt, []
        while left > 0:
            length = next((c for c in fitting if c >= left), fitting[-1])
            if length > 2 * left:  # several shorter chunks rather than mostly padding
                length = max((c for c in fitting if c <= left), default=length)
            lengths.append(length)
            left -= length
        return lengths

    def time(lengths: list[int]) -> int:
        each = [length + CHUNK_OVERHEAD for length in lengths]
        return queued * sum(each) + (stages - 1) * max(each, default=0)

    return min((cut(longest) for longest in sorted(chunks, reverse=True)), key=time)
