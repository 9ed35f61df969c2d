"""Decoders with mixtures of experts."""

from jaxsplit.gguf.architectures.entry import Architecture

ARCHITECTURES: dict[str, Architecture] = {}
