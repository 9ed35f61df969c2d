"""Decoders with recurrent layers beside attention."""

from jaxsplit.gguf.architectures.entry import Architecture

ARCHITECTURES: dict[str, Architecture] = {}
