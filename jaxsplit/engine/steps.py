"""The pure functions that a device runs: prefill a chunk, decode a step, choose a token."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxsplit.engine.sampling import SamplingPlan, SamplingValues, sample
from jaxsplit.models import Cache, Decoder
from jaxsplit.models.axes import SLOTS, any_over


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
    active = ~jnp.isin(token, ends) & (position < context)
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
    return DecodeState(
        token=token,
        position=position,
        active=state.active & ~jnp.isin(token, ends) & (position < context),
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
    cache, x = decode_layers(model, cache, x, feed(state))
    return cache, choose(model.logits(x[:, 0]), state, ends, values, plan, vocab, context)


def decode_loop(
    model: Decoder,
    cache: Cache,
    state: DecodeState,
    texts: Array,
    limit: Array,
    ends: Array,
    values: SamplingValues,
    plan: SamplingPlan,
    vocab: int,
    context: int,
) -> tuple[Cache, DecodeState, Array]:
    """Several steps of a model in one stage, without returning to the host.

    Args:
      texts: int32 `[slots, length]`, at least -1, to be overwritten.
      limit: int32: how many steps, at most `length`; the loop ends sooner when no slot is active.
      model, cache, state, ends, values, plan, vocab, context: as in `decode_step`.

    Returns:
      the cache, the state, and the new tokens, int32 `[slots, length]`, -1 where there are none.
    """
    texts = jnp.minimum(texts, -1)  # which reads it: an argument that nothing reads has no place

    def unfinished(carry: tuple) -> Array:
        step, _, state, _ = carry
        return (step < limit) & any_over(state.active.any(), SLOTS)

    def advance(carry: tuple) -> tuple:
        step, cache, state, texts = carry
        was_active = state.active
        cache, state = decode_step(model, cache, None, state, ends, values, plan, vocab, context)
        column = jnp.where(was_active, state.token, -1)
        return step + 1, cache, state, lax.dynamic_update_index_in_dim(texts, column, step, 1)

    step = jnp.zeros((), jnp.int32)
    _, cache, state, texts = lax.while_loop(unfinished, advance, (step, cache, state, texts))
    return cache, state, texts
