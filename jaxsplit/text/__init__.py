"""Tokenizers and chat templates, built from a GGUF file's own metadata."""

from jaxsplit.text.chat import ChatTemplate
from jaxsplit.text.grammar import Grammar, Grammars
from jaxsplit.text.tokenizer import SHOW_SPECIAL, TextStream, Tokenizer

__all__ = ["SHOW_SPECIAL", "ChatTemplate", "Grammar", "Grammars", "TextStream", "Tokenizer"]
