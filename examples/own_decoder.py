"""A decoder of one's own from the Flax modules, and a few steps of training on a toy task."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxsplit.models import (
    AttentionConfig,
    BlockConfig,
    Decoder,
    MLPConfig,
    ModelConfig,
    RopeConfig,
)

EMBED, VOCAB, LENGTH = 64, 32, 24


def make_decoder() -> Decoder:
    """Two layers: the first sees everything, the second a window of 8 tokens."""
    whole = AttentionConfig(heads=4, kv_heads=2, head_dim=16, value_dim=16, rope=RopeConfig(dim=16))
    local = AttentionConfig(
        heads=4, kv_heads=2, head_dim=16, value_dim=16, rope=RopeConfig(dim=16), window=8
    )
    blocks = tuple(BlockConfig(mixer, MLPConfig(4 * EMBED)) for mixer in (whole, local))
    config = ModelConfig("mine", vocab=VOCAB, embed=EMBED, context=LENGTH, blocks=blocks)
    return Decoder(config, rngs=nnx.Rngs(0))


def loss_of(model: Decoder, tokens: jax.Array) -> jax.Array:
    logits, _ = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


@nnx.jit
def train_step(model: Decoder, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    model = make_decoder()
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    key = jax.random.key(0)
    for step in range(60):
        start = jax.random.randint(jax.random.fold_in(key, step), (16, 1), 0, VOCAB)
        tokens = (start + 3 * jnp.arange(LENGTH)) % VOCAB  # the next token is three further
        loss = train_step(model, optimizer, tokens)
        if step % 20 == 0 or step == 59:
            print(f"step {step:3}  loss {loss:.3f}")


if __name__ == "__main__":
    main()
