"""The pure functions that each device runs: prefill a chunk, decode a step, sample a token."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.cache.layers import Cache
from jaxsplit.comm.p2p import Ring
from jaxsplit.engine.sampling import NOT_FINITE, SamplerParams, SamplerSpec, sample
from jaxsplit.models import Decoder


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Static values of a step: each spec compiles its own program.

    Attributes:
      sampler: the static half of the sampler.
      vocab: rows of the head that are tokens; the others are padding.
      context: length of the cache in tokens. A slot stops when its next token would not fit.
    """

    sampler: SamplerSpec
    vocab: int
    context: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Which tokens of a prompt a prefill call reads, and into which slot, int32 `[1]` each.

    Attributes:
      start: position of the first token.
      count: tokens to read; the rest of the input is padding.
      slot: slot of the cache.
    """

    start: Array
    count: Array
    slot: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptEnd:
    """A prompt that has been read, as the sampler of its first token needs it.

    Attributes:
      recent: int32 `[1, window]`: the prompt's last tokens.
      position: int32 `[1]`: the prompt's length.
      slot: int32 `[1]`: slot of the prompt; negative: none, the state stays as it is.
    """

    recent: Array
    position: Array
    slot: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerInputs:
    """Arrays that the sampler reads and never changes.

    Attributes:
      stop_ids: int32 `[stop_ids]`: tokens that stop a slot.
      params: temperature, thresholds, penalties and seed of each slot.
    """

    stop_ids: Array
    params: SamplerParams


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of decoding besides the cache.

    Attributes:
      token: int32 `[slots]`: the last token, not in the cache yet; `NOT_FINITE` if the logits were
        not finite.
      position: int32 `[slots]`: position of that token.
      active: bool `[slots]`: whether the slot is still decoding.
      recent: int32 `[slots, window]`: the last tokens, the newest last, padded with -1.
    """

    token: Array
    position: Array
    active: Array
    recent: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopState:
    """The carry of `decode_loop` on one device of a stage.

    Attributes:
      step: int32: steps done.
      caches: the stage's cache for each micro-batch.
      states: decode state of each micro-batch; empty unless this is the last stage.
      output_tokens: int32 `[slots, length]` of each micro-batch, -1 where there is no token,
        `NOT_FINITE` where the logits were not finite; empty unless this is the last stage.
      ring: link to the neighboring stages; None with a single stage.
    """

    step: Array
    caches: Sequence[Cache]
    states: Sequence[DecodeState]
    output_tokens: Sequence[Array]
    ring: Ring | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopInputs:
    """Arrays that `decode_loop` reads and never changes.

    Attributes:
      limit: int32: steps to run, at most the length of `LoopState.output_tokens`.
      stop_ids: int32 `[stop_ids]`: tokens that stop a slot; None unless this is the last stage.
      params: sampler parameters of each micro-batch; empty unless this is the last stage.
    """

    limit: Array
    stop_ids: Array | None
    params: Sequence[SamplerParams]


def prefill(
    model: Decoder, cache: Cache, inputs: Array, chunk: PrefillChunk
) -> tuple[Cache, Array]:
    """Reads a chunk of a prompt into a slot of the cache.

    Args:
      model: decoder of this stage.
      cache: its cache.
      inputs: tokens, int32 `[1, length]`, or the previous stage's output `[1, length, embed]`.
      chunk: which of them to read, and the slot.

    Returns:
      the cache and the last layer's output, `[1, length, embed]`.
    """
    steps = jnp.arange(inputs.shape[1])
    positions = jnp.where(steps < chunk.count[:, None], chunk.start[:, None] + steps, -1)
    x, cache = model.hidden(inputs, positions, cache, chunk.slot)
    return cache, x


def sample_first(
    logits: Array, state: DecodeState, prompt: PromptEnd, inputs: SamplerInputs, spec: StepSpec
) -> DecodeState:
    """Samples the first token after a prompt.

    Args:
      logits: float32 `[1, vocab / devices]` of the prompt's last token.
      state: state of all slots.
      prompt: the prompt's end and its slot.
      inputs: arrays of the sampler.
      spec: static values.

    Returns:
      the state with the prompt's slot set.
    """
    slot, position = prompt.slot, prompt.position
    params = jax.tree.map(lambda value: value[slot], inputs.params)
    token = sample(logits, position, prompt.recent, params, spec.sampler, vocab=spec.vocab)
    active = _continues(token, position, inputs.stop_ids, spec)
    first = DecodeState(token, position, active, _append(prompt.recent, token))
    index = jnp.where(slot < 0, state.token.shape[0], slot)
    return jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), state, first)


def _continues(token: Array, position: Array, stop_ids: Array, spec: StepSpec) -> Array:
    """Whether decoding goes on after a token: bool `[slots]`."""
    return (token != NOT_FINITE) & ~jnp.isin(token, stop_ids) & (position < spec.context)


def _append(recent: Array, token: Array) -> Array:
    return jnp.concatenate([recent, token[:, None]], axis=1)[:, 1:]


def step_inputs(state: DecodeState) -> Array:
    """Inputs of the next step: int32 `[slots, 2]`, each slot's last token and its position, -1
    where the slot has stopped."""
    return jnp.stack([state.token, jnp.where(state.active, state.position, -1)], axis=1)


def decode_layers(
    model: Decoder, cache: Cache, x: Array | None, inputs: Array
) -> tuple[Cache, Array]:
    """A decode step of a stage that is not the last.

    Args:
      model: decoder of this stage.
      cache: its cache.
      x: `[slots, 1, embed]`, the previous stage's output; None in the first stage.
      inputs: int32 `[slots, 2]` from `step_inputs`.

    Returns:
      the cache and the output `[slots, 1, embed]`.
    """
    x, cache = model.hidden(inputs[:, :1] if x is None else x, inputs[:, 1:], cache)
    return cache, x


def sample_next(
    logits: Array, state: DecodeState, inputs: SamplerInputs, spec: StepSpec
) -> DecodeState:
    """Samples the next token of each slot.

    Args:
      logits: float32 `[slots, vocab / devices]` of the slots' last tokens.
      state: state of the slots.
      inputs: arrays of the sampler.
      spec: static values.

    Returns:
      the state with the new tokens.
    """
    position = state.position + 1
    token = sample(logits, position, state.recent, inputs.params, spec.sampler, vocab=spec.vocab)
    token = jnp.where(state.active, token, state.token)
    position = state.position + state.active
    continues = _continues(token, position, inputs.stop_ids, spec)
    return DecodeState(
        token=token,
        position=position,
        active=state.active & continues,
        recent=jnp.where(state.active[:, None], _append(state.recent, token), state.recent),
    )


def decode_and_sample(
    model: Decoder,
    cache: Cache,
    x: Array | None,
    state: DecodeState,
    inputs: SamplerInputs,
    *,
    spec: StepSpec,
) -> tuple[Cache, DecodeState]:
    """A decode step of the last stage: its layers, then the next token of each slot.

    Arguments are those of `decode_layers` and `sample_next`.
    """
    tokens = step_inputs(state)
    logits, cache = model(tokens[:, :1] if x is None else x, tokens[:, 1:], cache)
    return cache, sample_next(logits[:, 0], state, inputs, spec)


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
      state: initial carry; the contents of `output_tokens` are overwritten.
      inputs: limit and sampler arrays. A single stage stops early once none of this data replica's
        slots is active.
      spec: static values.
      incoming: arrays that the previous stage sends: its output, unless this is the first stage,
        and the `step_inputs`.

    Returns:
      the final carry.
    """
    # Filled with -1 by reading the old tokens: `jax.jit` drops unread arguments, donated ones too.
    output_tokens = [jnp.where(x < -1, -1, jnp.minimum(x, -1)) for x in state.output_tokens]
    ring = state.ring
    if ring is not None:
        for channel, one in enumerate(state.states):
            ring = ring.send(_to_words([step_inputs(one)]), channel, wanted=inputs.limit > 0)

    def unfinished(state: LoopState) -> Array:
        if state.ring is not None:
            return state.step < inputs.limit
        # No collective crosses the `data` axis in a step, so each replica may stop on its own.
        return (state.step < inputs.limit) & state.states[0].active.any()

    def advance(state: LoopState) -> LoopState:
        for i in range(len(state.caches)):
            state = advance_micro_batch(state, i)
        step, ring = state.step + 1, state.ring and state.ring.next_round()
        return dataclasses.replace(state, step=step, ring=ring)

    def advance_micro_batch(state: LoopState, i: int) -> LoopState:
        ring, x, tokens = state.ring, None, None
        if ring is not None:
            words, ring = ring.receive(word_count(incoming), i)
            *before, tokens = _from_words(words, incoming)
            x = before[0] if before else None
        if model.last:
            sampler = SamplerInputs(inputs.stop_ids, inputs.params[i])
            state, outgoing = _decode_last(model, x, state, i, sampler, spec=spec)
            # The tokens that the first stage receives belong to the next step.
            ahead, wanted = 1, state.step + 1 < inputs.limit
        else:
            cache, x = decode_layers(model, state.caches[i], x, tokens)
            state = dataclasses.replace(state, caches=_replaced(state.caches, i, cache))
            outgoing, ahead, wanted = [x, tokens], 0, True
        if ring is not None:
            ring = ring.send(_to_words(outgoing), i, ahead=ahead, wanted=wanted)
        return dataclasses.replace(state, ring=ring)

    state = dataclasses.replace(state, output_tokens=output_tokens, ring=ring)
    return lax.while_loop(unfinished, advance, state)


def _decode_last(
    model: Decoder,
    x: Array | None,
    state: LoopState,
    i: int,
    inputs: SamplerInputs,
    *,
    spec: StepSpec,
) -> tuple[LoopState, list[Array]]:
    """The last stage's step of micro-batch `i`: the new carry, and the arrays to send."""
    old = state.states[i]
    cache, new = decode_and_sample(model, state.caches[i], x, old, inputs, spec=spec)
    column = jnp.where(old.active, new.token, -1)
    tokens = lax.dynamic_update_index_in_dim(state.output_tokens[i], column, state.step, 1)
    state = dataclasses.replace(
        state,
        caches=_replaced(state.caches, i, cache),
        states=_replaced(state.states, i, new),
        output_tokens=_replaced(state.output_tokens, i, tokens),
    )
    return state, [step_inputs(new)]


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
