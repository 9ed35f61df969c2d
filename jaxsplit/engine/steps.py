"""The pure functions that each device runs: prefill chunks, decode steps, sample tokens.

A device holds `slots` sequences. A program takes some of them, its rows: their slots, and where
they are in the cache. Rows that exist only to fill a program up have a slot past the last one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxsplit.cache.layers import Cache
from jaxsplit.comm.p2p import Ring
from jaxsplit.context import forward_context
from jaxsplit.engine.sampling import (
    NOT_FINITE,
    SamplerParams,
    SamplerSpec,
    log_probabilities,
    sample,
)
from jaxsplit.models import Decoder


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Static values of a step: each spec compiles its own program.

    Attributes:
      sampler: the static half of the sampler.
      vocab: rows of the head that are tokens; the others are padding.
    """

    sampler: SamplerSpec
    vocab: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The sequences that a program works on, int32 unless noted.

    Attributes:
      slots: `[rows]`: where their decode state is.
      states: `[rows]`: where their rings and recurrent states are in the cache.
      pages: `[rows, pages]`: the pages of the cache that each has, in order.
      lora_scales: float32 `[rows, adapters]`: of each adapter; None: there are none.
    """

    slots: Array
    states: Array
    pages: Array
    lora_scales: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Which tokens of its prompts a prefill reads, int32 `[rows]` each.

    Attributes:
      start: position of the first token.
      count: tokens to read; the rest of the row is padding.
      rows: the sequences.
    """

    start: Array
    count: Array
    rows: Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotParams:
    """What the host has set for each slot.

    Attributes:
      sampler: how its tokens are chosen.
      stop_ids: int32 `[slots, stop_ids]`: tokens that stop it, padded with -1.
      end: int32 `[slots]`: position of its last token.
    """

    sampler: SamplerParams
    stop_ids: Array
    end: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of decoding besides the cache.

    Attributes:
      token: int32 `[slots]`: the last token, not in the cache yet; `NOT_FINITE` if the logits were
        not finite.
      position: int32 `[slots]`: position of that token.
      active: bool `[slots]`: whether the slot is still decoding.
      history: int32 `[slots, context + 1]`: tokens by position, for penalties; later ones are
        those of an earlier sequence.
    """

    token: Array
    position: Array
    active: Array
    history: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Tokens that were sampled, and their log-probabilities as of `log_probabilities`.

    Attributes:
      tokens: int32 `[rows, steps]`, -1 where there is none.
      logprobs, top_ids, top_logprobs: `[rows, steps]`, then `[rows, steps, alternatives]` twice;
        None: not wanted.
    """

    tokens: Array
    logprobs: Array | None = None
    top_ids: Array | None = None
    top_logprobs: Array | None = None

    @staticmethod
    def empty(rows: int, steps: int, alternatives: int = 0) -> "Outputs":
        """Without any token, in NumPy."""
        tokens: Any = np.full((rows, steps), -1, np.int32)
        if not alternatives:
            return Outputs(tokens)
        logprobs: Any = np.zeros((rows, steps), np.float32)
        top: Any = np.zeros((rows, steps, alternatives), np.float32)
        return Outputs(tokens, logprobs, top.astype(np.int32), top)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """The carry of `decode_loop` on one device of a stage.

    Attributes:
      step: int32: steps done.
      cache: the stage's cache.
      state: decode state of all slots; None unless this is the last stage.
      outputs: of each micro-batch; empty unless this is the last stage.
      ring: link to the neighboring stages; None with a single stage.
    """

    step: Array
    cache: Cache
    state: DecodeState | None
    outputs: Sequence[Outputs]
    ring: Ring | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopInputs:
    """Arrays that `decode_loop` reads and never changes.

    Attributes:
      limit: int32: steps to run, at most those that `LoopState.outputs` have room for.
      rows: of each micro-batch.
      params: of all slots; None unless this is the last stage.
    """

    limit: Array
    rows: Sequence[Rows]
    params: SlotParams | None


def prefill(
    model: Decoder, cache: Cache, inputs: Array, chunk: PrefillChunk
) -> tuple[Cache, Array]:
    """Reads a chunk of each of some prompts.

    Args:
      model: decoder of this stage.
      cache: its cache.
      inputs: tokens, int32 `[rows, length]`, or the previous stage's `[rows, length, embed]`.
      chunk: which of them to read, and where their sequences are.

    Returns:
      the cache and the last layer's output, `[rows, length, embed]`.
    """
    steps = jnp.arange(inputs.shape[1])
    positions = jnp.where(steps < chunk.count[:, None], chunk.start[:, None] + steps, -1)
    rows = chunk.rows
    return _cache_first(model.hidden(inputs, positions, cache, rows.states, rows.pages))


def _cache_first(found: tuple[Array, Cache | None]) -> tuple[Cache, Array]:
    """The cache and the output of a model that has been given a cache."""
    x, cache = found
    assert cache is not None
    return cache, x


def sample_first(
    logits: Array,
    state: DecodeState,
    chunk: PrefillChunk,
    params: SlotParams,
    spec: StepSpec,
    mask: Array | None = None,
) -> tuple[DecodeState, Outputs]:
    """Samples the first token after some prompts.

    Args:
      logits: float32 `[rows, vocab / devices]` of the prompts' last tokens.
      state: state of all slots.
      chunk: the prompts' last chunks; rows whose prompts go on have a slot past the last one.
      params: of all slots.
      spec: static values.
      mask: of the rows, as `sample` takes it.

    Returns:
      the state with the slots set, and their tokens.
    """
    rows, position = chunk.rows, chunk.start + chunk.count
    state, token, outputs = _sample(logits, position, state, rows, params, spec, mask)
    active = _continues(token, position, rows, params)
    return _set(state, rows, token, position, active), outputs


def _sample(
    logits: Array,
    position: Array,
    state: DecodeState,
    rows: Rows,
    params: SlotParams,
    spec: StepSpec,
    mask: Array | None,
) -> tuple[DecodeState, Array, Outputs]:
    """Samples tokens at positions, int32 `[rows]`, and adds them to the history."""
    sampler, slots = spec.sampler, rows.slots
    recent = jnp.zeros((len(slots), 0), jnp.int32)
    if sampler.window:
        at = position[:, None] + jnp.arange(-sampler.window, 0)
        recent = state.history.at[slots[:, None], at].get(mode="fill", fill_value=-1)
        recent = jnp.where(at >= 0, recent, -1)
    own = jax.tree.map(lambda x: x[slots], params.sampler)
    token = sample(logits, position, recent, own, sampler, mask, vocab=spec.vocab)
    if sampler.window:
        history = state.history.at[slots, position].set(token, mode="drop")
        state = dataclasses.replace(state, history=history)
    details = ()
    if sampler.logprobs:
        details = [x[:, None] for x in log_probabilities(logits, token, vocab=spec.vocab)]
    return state, token, Outputs(token[:, None], *details)


def _continues(token: Array, position: Array, rows: Rows, params: SlotParams) -> Array:
    """Whether decoding goes on after a token: bool `[rows]`."""
    stops = (token[:, None] == params.stop_ids[rows.slots]).any(axis=1)
    return (token != NOT_FINITE) & ~stops & (position < params.end[rows.slots])


def _set(
    state: DecodeState, rows: Rows, token: Array, position: Array, active: Array
) -> DecodeState:
    """The state with what some slots have now."""

    def put(old: Array, new: Array) -> Array:
        return old.at[rows.slots].set(new, mode="drop")

    return dataclasses.replace(
        state,
        token=put(state.token, token),
        position=put(state.position, position),
        active=put(state.active, active),
    )


def step_inputs(state: DecodeState, rows: Rows) -> Array:
    """Inputs of the next step: int32 `[rows, 2]`, each slot's last token and its position, -1 where
    the slot has stopped."""
    slots = rows.slots
    active = state.active[slots] & (slots < state.active.shape[0])
    return jnp.stack([state.token[slots], jnp.where(active, state.position[slots], -1)], axis=1)


def assign(
    state: DecodeState, params: SlotParams, slots: Array, history: Array, new: SlotParams
) -> tuple[DecodeState, SlotParams]:
    """Begins sequences in slots, which stay inactive until their prompts have been read.

    Args:
      state, params: of all slots.
      slots: int32 `[rows]`; those past the last one are ignored.
      history: int32 `[rows, context + 1]`: the prompts, padded with -1.
      new: the slots' parameters, `[rows, ...]`.
    """

    def put(old: Array, new: Array) -> Array:
        return old.at[slots].set(new, mode="drop")

    state = dataclasses.replace(
        state,
        active=put(state.active, jnp.zeros(len(slots), bool)),
        history=put(state.history, history),
    )
    return state, jax.tree.map(put, params, new)


def copied(cache: Cache, pages: Array, states: Array, *, paged: Any) -> Cache:
    """The cache with pages and states copied.

    Args:
      cache: of this stage.
      pages, states: int32 `[copies, 2]`: from and to; those out of range are not copied.
      paged: as the cache, bool: whether an array is in pages.
    """

    def of(x: Array, paged: bool) -> Array:
        source, target = (pages if paged else states).T
        return x.at[target].set(x[source], mode="drop")

    return jax.tree.map(of, cache, paged)


def overwritten(old: Any, new: Any) -> Any:
    """What is new. What is old is read, since `jax.jit` drops unread arguments, donated ones
    too."""
    return jax.tree.map(lambda x, y: jnp.where(x == x, y, y), old, new)


def decode_layers(
    model: Decoder, cache: Cache, x: Array | None, inputs: Array, rows: Rows
) -> tuple[Cache, Array]:
    """A decode step of a stage that is not the last.

    Args:
      model: decoder of this stage.
      cache: its cache.
      x: `[rows, 1, embed]`, the previous stage's output; None in the first stage.
      inputs: int32 `[rows, 2]` from `step_inputs`.
      rows: the sequences.

    Returns:
      the cache and the output `[rows, 1, embed]`.
    """
    x = inputs[:, :1] if x is None else x
    with forward_context(lora_scales=rows.lora_scales):
        return _cache_first(model.hidden(x, inputs[:, 1:], cache, rows.states, rows.pages))


def sample_next(
    logits: Array,
    state: DecodeState,
    rows: Rows,
    params: SlotParams,
    spec: StepSpec,
    mask: Array | None = None,
) -> tuple[DecodeState, Outputs]:
    """Samples the next token of each row.

    Args:
      logits: float32 `[rows, vocab / devices]` of the rows' last tokens.
      state: state of all slots.
      rows: the sequences.
      params: of all slots.
      spec: static values.
      mask: of the rows, as `sample` takes it.

    Returns:
      the state with the new tokens, and the tokens.
    """
    before = step_inputs(state, rows)
    was_active = before[:, 1] >= 0
    position = state.position[rows.slots] + was_active
    # The history of a slot that has stopped stays as it is.
    at = jnp.where(was_active, position, state.history.shape[1])
    state, token, outputs = _sample(logits, at, state, rows, params, spec, mask)
    active = was_active & _continues(token, position, rows, params)
    token = jnp.where(was_active, token, before[:, 0])
    shown = jnp.where(was_active, token, -1)[:, None]
    return (
        _set(state, rows, token, position, active),
        dataclasses.replace(outputs, tokens=shown),
    )


def decode_logits(
    model: Decoder, cache: Cache, x: Array | None, state: DecodeState, rows: Rows
) -> tuple[Cache, Array]:
    """A decode step of the last stage without sampling: the cache, and the logits that
    `sample_next` takes.

    Arguments are those of `decode_layers`.
    """
    tokens = step_inputs(state, rows)
    x = tokens[:, :1] if x is None else x
    with forward_context(lora_scales=rows.lora_scales):
        found = model(x, tokens[:, 1:], cache, rows.states, rows.pages)
    cache, logits = _cache_first(found)
    return cache, logits[:, 0]


def decode_and_sample(
    model: Decoder,
    cache: Cache,
    x: Array | None,
    state: DecodeState,
    rows: Rows,
    params: SlotParams,
    *,
    spec: StepSpec,
) -> tuple[Cache, DecodeState, Outputs]:
    """A decode step of the last stage: its layers, then the next token of each row.

    Arguments are those of `decode_layers` and `sample_next`.
    """
    cache, logits = decode_logits(model, cache, x, state, rows)
    return cache, *sample_next(logits, state, rows, params, spec)


def decode_loop(
    model: Decoder,
    state: LoopState,
    inputs: LoopInputs,
    spec: StepSpec,
    incoming: Sequence[jax.ShapeDtypeStruct],
) -> LoopState:
    """Several decode steps of a stage without returning to the host.

    Args:
      model: decoder of this stage.
      state: initial carry; the contents of `outputs` are overwritten.
      inputs: limit, rows and what the sampler needs. A single stage stops early once none of this
        data replica's rows is active.
      spec: static values.
      incoming: arrays that the previous stage sends: its output, unless this is the first stage,
        and the `step_inputs`.

    Returns:
      the final carry.
    """
    # Filled with -1 by reading the old tokens: `jax.jit` drops unread arguments, donated ones too.
    outputs = [
        dataclasses.replace(x, tokens=jnp.where(x.tokens < -1, -1, jnp.minimum(x.tokens, -1)))
        for x in state.outputs
    ]
    ring = state.ring
    if ring is not None and state.state is not None:
        for channel, rows in enumerate(inputs.rows):
            words = _to_words([step_inputs(state.state, rows)])
            ring = ring.send(words, channel, wanted=inputs.limit > 0)

    def unfinished(state: LoopState) -> Array:
        if state.ring is not None:
            return state.step < inputs.limit
        assert state.state is not None  # a single stage is the last one
        # No collective crosses the `data` axis in a step, so each replica may stop on its own.
        active = step_inputs(state.state, inputs.rows[0])[:, 1] >= 0
        return (state.step < inputs.limit) & active.any()

    def advance(state: LoopState) -> LoopState:
        for i in range(len(inputs.rows)):
            state = advance_micro_batch(state, i)
        step, ring = state.step + 1, state.ring and state.ring.next_round()
        return dataclasses.replace(state, step=step, ring=ring)

    def advance_micro_batch(state: LoopState, i: int) -> LoopState:
        ring, x, tokens, rows = state.ring, None, None, inputs.rows[i]
        if ring is not None:
            words, ring = ring.receive(word_count(incoming), i)
            *before, tokens = _from_words(words, incoming)
            x = before[0] if before else None
        if model.last:
            state = _decode_last(model, x, state, i, inputs, spec=spec)
            assert state.state is not None
            outgoing = [step_inputs(state.state, rows)]
            # The tokens that the first stage receives belong to the next step.
            ahead, wanted = 1, state.step + 1 < inputs.limit
        else:
            assert tokens is not None  # several stages are in a ring
            cache, x = decode_layers(model, state.cache, x, tokens, rows)
            state = dataclasses.replace(state, cache=cache)
            outgoing, ahead, wanted = [x, tokens], 0, True
        if ring is not None:
            ring = ring.send(_to_words(outgoing), i, ahead=ahead, wanted=wanted)
        return dataclasses.replace(state, ring=ring)

    state = dataclasses.replace(state, outputs=outputs, ring=ring)
    return lax.while_loop(unfinished, advance, state)


def _decode_last(
    model: Decoder,
    x: Array | None,
    state: LoopState,
    i: int,
    inputs: LoopInputs,
    *,
    spec: StepSpec,
) -> LoopState:
    """The last stage's step of micro-batch `i`."""
    assert state.state is not None
    assert inputs.params is not None
    cache, new, sampled = decode_and_sample(
        model, state.cache, x, state.state, inputs.rows[i], inputs.params, spec=spec
    )

    def put(all_steps: Array, one: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(all_steps, one, state.step, 1)

    outputs = jax.tree.map(put, state.outputs[i], sampled)
    return dataclasses.replace(
        state, cache=cache, state=new, outputs=_replaced(state.outputs, i, outputs)
    )


def _replaced(items: Sequence, i: int, item: object) -> list:
    """A list with one item replaced."""
    return [*items[:i], item, *items[i + 1 :]]


def word_count(arrays: Sequence[Array | jax.ShapeDtypeStruct]) -> int:
    """Number of 4-byte words that arrays take, each padded to whole words."""
    return sum(math.ceil(a.size * a.dtype.itemsize / 4) for a in arrays)


def _to_words(arrays: Sequence[Array]) -> Array:
    """Packs arrays of 2-byte or 4-byte elements into uint32 `[words]`."""
    words = []
    for array in arrays:
        flat = array.reshape(-1)
        if flat.dtype.itemsize == 2:
            flat = jnp.pad(flat, (0, flat.size % 2)).reshape(-1, 2)
        words.append(lax.bitcast_convert_type(flat, jnp.uint32))
    return jnp.concatenate(words)


def _from_words(words: Array, like: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """The inverse of `_to_words`."""
    arrays = []
    for one in like:
        count = word_count([one])
        flat = lax.bitcast_convert_type(words[:count], one.dtype).reshape(-1)
        arrays.append(flat[: one.size].reshape(one.shape))
        words = words[count:]
    return arrays
