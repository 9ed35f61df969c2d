"""The old name of `jaxsplit.llm`, which goes with the next version."""

from jaxsplit.llm import LM, demo_model, load, open_model

__all__ = ["LM", "demo_model", "load", "open_model"]
