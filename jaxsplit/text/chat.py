"""Chat templates: from messages to the text format of a model's training."""

import datetime
import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxsplit.errors import JaxsplitError
from jaxsplit.text.metadata import get, get_token_id
from jaxsplit.text.models import TOKENIZER_MODELS

_MARKUP_NAME = re.compile(
    r'think|thought|reason|channel|tool|call|args|arg_|action|python_tag|function|"', re.IGNORECASE
)


class ChatTemplate:
    """A model's own Jinja template. Build one with `ChatTemplate.from_metadata`.

    Templates come with the model file and are untrusted: they run in Jinja's sandbox, without
    access to Python's internals, and cannot modify their arguments.

    Attributes:
        source: the template's source.
        bos_token, eos_token: texts of these tokens, empty if the model has none.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = ""):
        """Compiles a template.

        Raises:
            JaxsplitError: the template is not valid Jinja.
        """
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # Jinja compiles to Python, whose compiler has limits, too.
            raise _failure("is not valid", error) from error

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "ChatTemplate":
        """Reads `tokenizer.chat_template` of a GGUF file.

        Raises:
            JaxsplitError: the file has no chat template, or an invalid one, or a key's value has
                the wrong type.
        """
        source = get(metadata, "tokenizer.chat_template", str)
        if not source:
            raise JaxsplitError(
                "the file has no chat template (tokenizer.chat_template is missing): "
                "use a plain prompt instead of messages"
            )
        tokens = get(metadata, "tokenizer.ggml.tokens", list[str], ())
        model = TOKENIZER_MODELS.get(get(metadata, "tokenizer.ggml.model", str))

        def text(name: str) -> str:
            id = get_token_id(metadata, name, len(tokens), getattr(model, name, None))
            return "" if id is None else tokens[id]

        return cls(source, text("bos"), text("eos"))

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Renders messages as text.

        Encode the text with `parse_special=True`.

        Args:
            messages: `{"role": "system" | "user" | "assistant", "content": ...}`, in order.
            add_generation_prompt: end with the start of the assistant's next message.
            **variables: more variables of the template, such as `enable_thinking=False`.

        Raises:
            JaxsplitError: the messages are not a list of mappings, or the template rejects them.
        """
        is_list = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
        if not is_list or not all(isinstance(message, Mapping) for message in messages):
            raise JaxsplitError(
                f"messages is {reprlib.repr(messages)}, but must be a list such as "
                '[{"role": "user", "content": "Hello"}]'
            )
        values = {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "tools": None,
            "documents": None,
        }
        try:
            return self._template.render(values | variables)
        except Exception as error:  # Templates can raise any error of Python's operators.
            raise _failure("fails on these messages", error) from error

    def find_markup(self, tokens: Iterable[str]) -> set[str]:
        """Finds the control tokens that mark thoughts and tool calls in an answer, by name.

        All count if the template contains any of them: some templates contain only `</think>`, or
        the list of tools but not the call. The template is not run.

        Args:
            tokens: texts of control tokens.
        """
        named = {token for token in tokens if _MARKUP_NAME.search(token)}
        return named if any(token in self.source for token in named) else set()


def _failure(what: str, error: Exception) -> JaxsplitError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return JaxsplitError(f"the file's chat template {what}: {reason}; use a plain prompt instead")


def _environment() -> Any:
    """A Jinja environment like that of Hugging Face's transformers."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; a no-op here."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
