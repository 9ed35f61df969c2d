"""The pure functions that a device runs: prefill a chunk, decode a step, choose a token."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.cache.contiguous import Cache
from jaxsplit.comm.p2p import Ring
from jaxsplit.engine.sampling import NOT_FINITE, SamplingPlan, SamplingValues, sample
from jaxsplit.models import Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What decoding carries from token to token, beside the cache.

    Attributes:
      token: int32 `[slots]`: the last token, not in the cache yet; `NOT_FINITE`: none could be
        chosen.
      position: int32 `[slots]`: where it belongs.
      active: bool `[slots]`: slots that go on.
      recent: int32 `[slots, window]`: the last tokens, the newest last, -1 where there are none.
    """

    token: Array
    position: Array
    active: Array
    recent: Array


def prefill(
    model: Decoder, cache: Cache, inputs: Array, start: Array, count: Array, slot: Array
) -> tuple[Cache, Array]:
    """Reads a chunk of a prompt into a slot of the cache.

    Args:
      model: the decoder, of this stage and device.
      cache: its keys and values.
      inputs: tokens, int32 `[1, length]`, of which the first `count` are read, or the output of the
        stage before.
      start: int32 `[1]`: the first token's position.
      count: int32 `[1]`.
      slot: int32 `[1]`.

    Returns:
      the cache and the last layer's output, `[1, length, embed]`.
    """
    steps = jnp.arange(inputs.shape[1])
    positions = jnp.where(steps < count[:, None], start[:, None] + steps, -1)
    x, cache = model.hidden(inputs, positions, cache, slot)
    return cache, x


def begin(
    logits: Array,
    state: DecodeState,
    recent: Array,
    position: Array,
    slot: Array,
    ends: Array,
    values: SamplingValues,
    plan: SamplingPlan,
    vocab: int,
    context: int,
) -> DecodeState:
    """Chooses the first token after a prompt.

    Args:
      logits: float32 `[1, vocab / devices]` of the prompt's last token.
      state: the slots' state.
      recent: int32 `[1, window]`: the prompt's last tokens.
      position: int32 `[1]`: the prompt's length.
      slot: int32 `[1]`: which slot; negative: none, nothing changes.
      ends, values, plan, vocab: as in `choose`.
    """
    one = jax.tree.map(lambda value: value[slot], values)
    token = sample(logits, position, recent, one, plan, vocab)
    active = (token != NOT_FINITE) & ~jnp.isin(token, ends) & (position < context)
    chosen = DecodeState(token, position, active, _append(recent, token))
    index = jnp.where(slot < 0, state.token.shape[0], slot)
    return jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), state, chosen)


def _append(recent: Array, token: Array) -> Array:
    return jnp.concatenate([recent, token[:, None]], axis=1)[:, 1:]


def feed(state: DecodeState) -> Array:
    """What the stages need to know of the slots: int32 `[slots, 2]`, each slot's last token and the
    position where it belongs, -1 where the slot has stopped."""
    return jnp.stack([state.token, jnp.where(state.active, state.position, -1)], axis=1)


def decode_layers(model: Decoder, cache: Cache, x: Array | None, fed: Array) -> tuple[Cache, Array]:
    """Writes each slot's token to the cache of a stage.

    Args:
      model: the decoder, of this stage and device.
      cache: its keys and values.
      x: `[slots, 1, embed]`, the output of the stage before; None in the first.
      fed: from `feed`.

    Returns:
      the cache and the output `[slots, 1, embed]`.
    """
    x, cache = model.hidden(fed[:, :1] if x is None else x, fed[:, 1:], cache)
    return cache, x


def choose(
    logits: Array,
    state: DecodeState,
    ends: Array,
    values: SamplingValues,
    plan: SamplingPlan,
    vocab: int,
    context: int,
) -> DecodeState:
    """Chooses the next token of each slot.

    Args:
      logits: float32 `[slots, vocab / devices]` after the slots' last tokens.
      state: the slots' tokens and positions.
      ends: int32 `[ends]`: tokens that end a text.
      values, plan: how to choose.
      vocab: how many rows of the head are tokens.
      context: the cache's length; a slot whose next token has no place in it stops.

    Returns:
      the state with the new tokens.
    """
    token = sample(logits, state.position + 1, state.recent, values, plan, vocab)
    token = jnp.where(state.active, token, state.token)
    position = state.position + state.active
    goes_on = (token != NOT_FINITE) & ~jnp.isin(token, ends) & (position < context)
    return DecodeState(
        token=token,
        position=position,
        active=state.active & goes_on,
        recent=jnp.where(state.active[:, None], _append(state.recent, token), state.recent),
    )


def decode_step(
    model: Decoder,
    cache: Cache,
    x: Array | None,
    state: DecodeState,
    ends: Array,
    values: SamplingValues,
    plan: SamplingPlan,
    vocab: int,
    context: int,
) -> tuple[Cache, DecodeState]:
    """The last stage of a step: its layers, then the next token of each slot.

    Arguments are those of `decode_layers` and `choose`.
    """
    fed = feed(state)
    logits, cache = model(fed[:, :1] if x is None else x, fed[:, 1:], cache)
    return cache, choose(logits[:, 0], state, ends, values, plan, vocab, context)


def decode_loop(
    model: Decoder,
    caches: Sequence[Cache],
    states: Sequence[DecodeState],
    texts: Sequence[Array],
    ring: Ring | None,
    limit: Array,
    ends: Array,
    values: Sequence[SamplingValues],
    incoming: Sequence[jax.ShapeDtypeStruct],
    plan: SamplingPlan,
    vocab: int,
    context: int,
) -> tuple[Sequence[Cache], Sequence[DecodeState], Sequence[Array], Ring | None]:
    """Several steps of a stage, without returning to the host.

    Args:
      caches: of the stage, one for each group of slots.
      states: of the groups, if the stage is the last; else none, as of `texts` and `values`.
      texts: int32 `[slots, length]` each, to be overwritten.
      ring: what the stages hand to one another goes through it; None: there is only this stage,
        and one group.
      limit: int32: how many steps, at most `length`; one stage alone ends sooner when none of a
        place's slots is active.
      incoming: what the stage before hands over: `x`, unless the stage is the first, and `fed`.
      model, ends, values, plan, vocab, context: as in `decode_step`.

    Returns:
      the caches, the states, the new tokens, int32 `[slots, length]` each, -1 where there are none
      and `NOT_FINITE` where none could be chosen, and the ring.
    """
    # All -1, but from what was there: an argument that nothing reads has no place.
    texts = [jnp.where(text < -1, -1, jnp.minimum(text, -1)) for text in texts]
    if ring is not None:
        for group, state in enumerate(states):
            ring = ring.send(_as_words([feed(state)]), group, wanted=limit > 0)

    def unfinished(carry: tuple) -> Array:
        step, _, states, *_ = carry
        # Places of the `data` axis meet nowhere in a step, and each of them ends on its own.
        return step < limit if ring is not None else (step < limit) & states[0].active.any()

    def advance(carry: tuple) -> tuple:
        step, caches, states, texts, ring = carry
        caches, states, texts = list(caches), list(states), list(texts)
        for group in range(len(caches)):
            x = fed = None
            if ring is not None:
                words, ring = ring.receive(word_count(incoming), group)
                *before, fed = _of_words(words, incoming)
                x = before[0] if before else None
            if model.last:
                was_active = states[group].active
                caches[group], states[group] = decode_step(
                    model,
                    caches[group],
                    x,
                    states[group],
                    ends,
                    values[group],
                    plan,
                    vocab,
                    context,
                )
                column = jnp.where(was_active, states[group].token, -1)
                texts[group] = lax.dynamic_update_index_in_dim(texts[group], column, step, 1)
                outgoing, ahead, wanted = [feed(states[group])], 1, step + 1 < limit
            else:
                caches[group], x = decode_layers(model, caches[group], x, fed)
                outgoing, ahead, wanted = [x, fed], 0, True
            if ring is not None:
                ring = ring.send(_as_words(outgoing), group, ahead=ahead, wanted=wanted)
        return step + 1, caches, states, texts, ring and ring.next_round()

    carry = jnp.zeros((), jnp.int32), list(caches), list(states), texts, ring
    return lax.while_loop(unfinished, advance, carry)[1:]


def word_count(arrays: Sequence[Array | jax.ShapeDtypeStruct]) -> int:
    """Words that arrays fill, each whole ones."""
    return sum(math.ceil(a.size * a.dtype.itemsize / 4) for a in arrays)


def _as_words(arrays: Sequence[Array]) -> Array:
    """Arrays of elements of 2 or 4 bytes as uint32 `[words]`."""
    words = []
    for array in arrays:
        flat = array.reshape(-1)
        if flat.dtype.itemsize == 2:
            flat = jnp.pad(flat, (0, flat.size % 2)).reshape(-1, 2)
        words.append(lax.bitcast_convert_type(flat, jnp.uint32))
    return jnp.concatenate(words)


def _of_words(words: Array, like: Sequence[jax.ShapeDtypeStruct]) -> list[Array]:
    """The arrays that `_as_words` has made words of."""
    arrays = []
    for one in like:
        count = word_count([one])
        flat = lax.bitcast_convert_type(words[:count], one.dtype).reshape(-1)
        arrays.append(flat[: one.size].reshape(one.shape))
        words = words[count:]
    return arrays
