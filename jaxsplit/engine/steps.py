"""The pure functions that a device runs: prefill a chunk, choose a token, decode one or several."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.engine.sampling import SamplingPlan, SamplingValues, sample
from jaxsplit.models import Cache, Decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What decoding carries from token to token, beside the cache.

    Attributes:
      token: int32 `[slots]`: the last token, not in the cache yet.
      position: int32 `[slots]`: where it belongs.
      active: bool `[slots]`: slots that go on.
      recent: int32 `[slots, window]`: the last tokens, the newest last, -1 where there are none.
    """

    token: Array
    position: Array
    active: Array
    recent: Array


def prefill(
    model: Decoder, cache: Cache, tokens: Array, start: Array, count: Array, slot: Array
) -> tuple[Cache, Array]:
    """Reads a chunk of a prompt into a slot of the cache.

    Args:
      model: the decoder, of this device.
      cache: its keys and values.
      tokens: int32 `[length]`, of which the first `count` are read.
      start: int32: the first token's position.
      count: int32.
      slot: int32.

    Returns:
      the cache and the last layer's output, `[length, embed]`.
    """
    steps = jnp.arange(tokens.shape[0])
    positions = jnp.where(steps < count, start + steps, -1)
    x, cache = model.hidden(tokens[None], positions[None], cache, slot[None])
    return cache, x[0]


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
      logits: float32 `[vocab / devices]` of the prompt's last token.
      state: the slots' state.
      recent: int32 `[window]`: the prompt's last tokens.
      position: int32: the prompt's length.
      slot: int32: which slot.
      ends, values, plan, vocab: as in `decode_step`.
    """
    one = jax.tree.map(lambda value: value[slot][None], values)
    token = sample(logits[None], position[None], recent[None], one, plan, vocab)[0]
    return DecodeState(
        token=state.token.at[slot].set(token),
        position=state.position.at[slot].set(position),
        active=state.active.at[slot].set(~jnp.isin(token, ends) & (position < context)),
        recent=state.recent.at[slot].set(jnp.append(recent, token)[1:]),
    )


def decode_step(
    model: Decoder,
    cache: Cache,
    state: DecodeState,
    ends: Array,
    values: SamplingValues,
    plan: SamplingPlan,
    vocab: int,
    context: int,
) -> tuple[Cache, DecodeState]:
    """Writes each slot's token to the cache and chooses the next.

    Args:
      model: the decoder, of this device.
      cache: its keys and values.
      state: the slots' tokens and positions.
      ends: int32 `[ends]`: tokens that end a text.
      values, plan: how to choose.
      vocab: how many rows of the head are tokens.
      context: the cache's length; a slot whose next token has no place in it stops.

    Returns:
      the cache, and the state with the new tokens.
    """
    positions = jnp.where(state.active, state.position, -1)
    x, cache = model.hidden(state.token[:, None], positions[:, None], cache)
    logits = model.logits(x[:, 0])
    token = sample(logits, state.position + 1, state.recent, values, plan, vocab)
    token = jnp.where(state.active, token, state.token)
    position = state.position + state.active
    return cache, DecodeState(
        token=token,
        position=position,
        active=state.active & ~jnp.isin(token, ends) & (position < context),
        recent=jnp.where(
            state.active[:, None],
            jnp.concatenate([state.recent, token[:, None]], axis=1)[:, 1:],
            state.recent,
        ),
    )


def decode_loop(
    model: Decoder,
    cache: Cache,
    state: DecodeState,
    limit: Array,
    ends: Array,
    values: SamplingValues,
    plan: SamplingPlan,
    vocab: int,
    context: int,
    length: int,
) -> tuple[Cache, DecodeState, Array]:
    """Several decode steps without returning to the host.

    Args:
      limit: int32: how many steps, at most `length`; the loop ends sooner when no slot is active.
      length: the static length of the result.
      model, cache, state, ends, values, plan, vocab, context: as in `decode_step`.

    Returns:
      the cache, the state, and the new tokens, int32 `[slots, length]`, -1 where there are none.
    """
    texts = jnp.full((state.token.shape[0], length), -1, jnp.int32)

    def unfinished(carry: tuple) -> Array:
        step, _, state, _ = carry
        return (step < limit) & state.active.any()

    def advance(carry: tuple) -> tuple:
        step, cache, state, texts = carry
        was_active = state.active
        cache, state = decode_step(model, cache, state, ends, values, plan, vocab, context)
        column = jnp.where(was_active, state.token, -1)
        return step + 1, cache, state, lax.dynamic_update_index_in_dim(texts, column, step, 1)

    step = jnp.zeros((), jnp.int32)
    _, cache, state, texts = lax.while_loop(unfinished, advance, (step, cache, state, texts))
    return cache, state, texts
