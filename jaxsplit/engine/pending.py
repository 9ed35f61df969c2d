"""Results that devices still compute."""

import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxsplit.engine.sampling import MAX_TOP_LOGPROBS, SamplerSpec
from jaxsplit.engine.steps import Outputs

if TYPE_CHECKING:
    from jaxsplit.engine.engine import Engine


@functools.cache
def _outputs_like(vocab: int, rows: int, steps: int, *, logprobs: bool) -> Outputs:
    """Shapes and dtypes of outputs."""
    alternatives = min(MAX_TOP_LOGPROBS, vocab) if logprobs else 0
    return jax.eval_shape(functools.partial(Outputs.empty, rows, steps, alternatives))


class PendingTokens:
    """Tokens of a decode loop.

    Args:
      engine: that computes them.
      rows: of a micro-batch, on all data replicas.
      sampler: its spec.
      batches: for each micro-batch, its outputs one after the other, on the last stage.
      width: steps of each of these outputs.
      limit: steps that were asked for.
    """

    def __init__(
        self,
        engine: "Engine",
        rows: int,
        sampler: SamplerSpec,
        batches: list[list[Outputs]],
        width: int,
        limit: int,
    ):
        self._engine, self._batches, self._limit = engine, batches, limit
        self._like = _outputs_like(engine.vocab, rows, width, logprobs=sampler.logprobs)

    def read(self) -> Outputs:
        """Waits for them: `[data, rows, limit]`, micro-batches one after the other."""
        data, parts = self._engine.partition.data, []
        for outputs in self._batches:
            none = jax.tree.map(
                lambda x: np.zeros((x.shape[0], 0, *x.shape[2:]), x.dtype), self._like
            )
            columns = [none, *(self._engine.fetch(one, self._like) for one in outputs)]
            joined = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *columns)
            parts.append(
                jax.tree.map(lambda x: x.reshape(data, x.shape[0] // data, *x.shape[1:]), joined)
            )
        found = jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:, :, : self._limit], *parts)
        return jax.tree.map(self._filled, found)

    def _filled(self, x: np.ndarray) -> np.ndarray:
        """With the steps after the last active row, which were not run."""
        missing = self._limit - x.shape[2]
        pads = [(0, missing if axis == 2 else 0) for axis in range(x.ndim)]
        return np.pad(x, pads, constant_values=-1) if missing else x


class PendingPrompts:
    """What follows parts of prompts.

    Args:
      engine: that computes it.
      shape: data replicas, rows on each, and tokens of a row.
      sampler: spec of the first tokens.
      outputs: first tokens after the prompts that end; None: none ends.
      details: log-probabilities of the prompts' tokens; None: not wanted.
      values: logits or hidden states of all tokens; None: not wanted.
    """

    def __init__(
        self,
        engine: "Engine",
        shape: tuple[int, int, int],
        sampler: SamplerSpec,
        outputs: Outputs | None,
        details: Outputs | None,
        values: jax.Array | None,
        *,
        ends: bool,
        wanted: str,
    ):
        self._engine, self._shape, self._sampler = engine, shape, sampler
        self._outputs, self._details, self._values = outputs, details, values
        self._ends, self._wanted = ends, wanted

    def read(self) -> Outputs | None:
        """Waits for the first tokens: `[data, rows, 1]`; None: no prompt ends."""
        data, rows, _ = self._shape
        if not self._ends:
            return None
        logprobs = self._sampler.logprobs
        like = _outputs_like(self._engine.vocab, data * rows, 1, logprobs=logprobs)
        return self._by_replica(self._engine.fetch(self._outputs, like))

    def details(self) -> Outputs | None:
        """Waits for the log-probabilities of the prompts: `[data, rows, length]`; None: not
        wanted."""
        data, rows, length = self._shape
        if self._wanted != "logprobs":
            return None
        like = _outputs_like(self._engine.vocab, data * rows, length, logprobs=True)
        return self._by_replica(self._engine.fetch(self._details, like))

    def values(self) -> np.ndarray | None:
        """Waits for what is wanted of all tokens: logits, float32 `[data, rows, length, vocab]`, or
        hidden states, `[data, rows, length, embed]`; None: neither."""
        data, rows, length = self._shape
        config = self._engine.config
        sizes = {"logits": (self._engine.runners[-1].padded_vocab, config.vocab)}
        sizes["hidden"] = (config.embed, config.embed)
        if self._wanted not in sizes:
            return None
        padded, size = sizes[self._wanted]
        like = jax.ShapeDtypeStruct((data * rows, length, padded), np.float32)
        return self._by_replica(self._engine.fetch(self._values, like))[..., :size]

    def _by_replica(self, tree: Any) -> Any:
        data = self._shape[0]
        return jax.tree.map(lambda x: x.reshape(data, x.shape[0] // data, *x.shape[1:]), tree)
