"""Which four cards to buy for a model: `python examples/plan_four_cards.py FILE.gguf`.

Prints the fastest split that fits for each kind of card. No device is needed.
"""

import sys

from jaxsplit.architectures import model_config
from jaxsplit.llm import open_model
from jaxsplit.plan import best_plans, device_kind
from jaxsplit.weights import parameter_sources

CARDS = ["RTX 3090", "RTX 4090", "A100", "H200"]


def main() -> None:
    file = open_model(sys.argv[1])
    config = model_config(file)
    sources = parameter_sources(file, config)
    for card in CARDS:
        best = best_plans(sources, config, [device_kind(card)] * 4, context=4096)[0]
        bytes_ = sum(best.fullest.values()) / 1e9
        fits = f"{best.decode_rate:7.1f} tokens/s" if best.fits else "does not fit"
        print(f"4 x {card:10} {best.name:24} {bytes_:6.1f} GB on a card  {fits}")


if __name__ == "__main__":
    main()
