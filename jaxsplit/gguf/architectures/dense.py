"""Decoders of attention and one MLP in each layer."""

from functools import partial

from jaxsplit.gguf.architectures.entry import Architecture, decoder

ARCHITECTURES = {
    "llama": Architecture(partial(decoder, interleaved=True)),
}
