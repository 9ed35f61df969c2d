"""Scores each line of a file: `python examples/score_texts.py FILE.gguf TEXTS.txt`.

Prints the mean log-probability of a line's tokens, given those before them, and the line.
"""

import sys

import jax
import jax.numpy as jnp

import jaxsplit


def score(lm: jaxsplit.LM, text: str) -> float:
    """The mean log-probability of a text's tokens after the first."""
    tokens = jnp.asarray(lm.tokenizer.encode(text, add_special=True))
    if len(tokens) < 2:
        return float("nan")
    log_probs = jax.nn.log_softmax(lm.logits(tokens.tolist())[:-1])
    return float(jnp.take_along_axis(log_probs, tokens[1:, None], axis=1).mean())


def main() -> None:
    model, texts = sys.argv[1:]
    lm = jaxsplit.load(model, ctx_size=1024)
    with open(texts, encoding="utf-8") as lines:
        for line in lines:
            if text := line.rstrip("\n"):
                print(f"{score(lm, text):8.3f}  {text}")


if __name__ == "__main__":
    main()
