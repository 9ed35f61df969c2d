"""A conversation: its messages, its file, and prompts that continue earlier token ids."""

import contextlib
import json
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxsplit.errors import JaxsplitError
from jaxsplit.paths import os_errors, user_path
from jaxsplit.text.reasoning import ReasoningParser

if TYPE_CHECKING:
    from jaxsplit.llm import LM
    from jaxsplit.text import Tokenizer

_ROLES = ("system", "user", "assistant")
_MOST_TEXTS, _MOST_IDS = 256, 2**20  # that are kept


class Prompt(NamedTuple):
    """What a model reads.

    Attributes:
      text: as the chat template renders it.
      ids: its tokens.
    """

    text: str
    ids: list[int]


class EncodedTexts:
    """Encodes the prompts of conversations so that they continue what the model has read.

    Encoding a rendered conversation from its start need not give the ids that the model has read
    and generated: a text has several encodings. Where the text of a prompt begins with an earlier
    prompt and its answer, its ids do, too, and only the rest is encoded; a cache of prefixes then
    finds all of the earlier turn. Some templates change earlier turns, as by leaving out reasoning:
    then the text does not begin like that, and is encoded as a whole.

    It keeps those used last. Thread-safe.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._known: dict[str, list[int]] = {}  # read, with what was generated; the last used last

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt's text."""
        with self._lock:
            found = {known: ids for known, ids in self._known.items() if text.startswith(known)}
        for known in sorted(found, key=len, reverse=True):
            ids = self._continued(found[known], text[len(known) :])
            if ids is not None:
                self._keep(known, found[known])
                return ids
        return self._tokenizer.encode(text, parse_special=True)

    def add(self, prompt: Prompt, generated: Sequence[int]) -> None:
        """Remembers a prompt and its answer, with or without the id that ended the text."""
        ends = [list(generated)]
        if generated and generated[-1] in self._tokenizer.end_ids:
            ends.append(ends[0][:-1])  # a template may write another token than the one that ended
        for ids in reversed(ends):
            text = self._tokenizer.decode(ids, show_special="all", continuation=True)
            self._keep(prompt.text + text, prompt.ids + ids)

    def _keep(self, text: str, ids: list[int]) -> None:
        """Notes that a text was used last, and forgets others."""
        with self._lock:
            self._known.pop(text, None)
            self._known[text] = ids
            while len(self._known) > _MOST_TEXTS or sum(map(len, self._known.values())) > _MOST_IDS:
                del self._known[next(iter(self._known))]

    def _continued(self, known: list[int], rest: str) -> list[int] | None:
        """Known ids, and the encoded rest of a text; None where that would change the text."""
        tokenizer = self._tokenizer
        ids = tokenizer.encode(rest, add_special=False, parse_special=True)
        if known and ids:
            # Some tokenizers put a space before a text, unless a special token is on this side.
            ends = (known[-1], ids[0])
            apart = any(not tokenizer.decode([id], continuation=True) for id in ends)
            same = tokenizer.decode(ids, show_special="all", continuation=True) == rest
            if not (apart or same):
                return None
        return known + ids


class Conversation:
    """Messages, and the prompts that they make.

    Attributes:
      messages: `{"role": ..., "content": ...}`, in order; of answers, also `reasoning_content`.
    """

    def __init__(self, lm: "LM", messages: Sequence[dict[str, str]] = ()):
        self.messages = [dict(message) for message in messages]
        self._lm = lm
        self._texts: EncodedTexts | None = None

    @property
    def system(self) -> str | None:
        """The system message; None if there is none."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        rest = self.messages[self.system is not None :]
        self.messages = [{"role": "system", "content": text}, *rest] if text else rest

    def clear(self) -> None:
        """Forgets all but the system message."""
        del self.messages[self.system is not None :]

    def drop_answer(self) -> None:
        """Forgets the answer to the last message of the user.

        Raises:
          JaxsplitError: there is no message of the user.
        """
        roles = [message["role"] for message in self.messages]
        if "user" not in roles:
            raise JaxsplitError("there is no message to answer yet")
        del self.messages[len(roles) - roles[::-1].index("user") :]

    def prompt(self) -> Prompt:
        """The prompt of the assistant's next message.

        Raises:
          JaxsplitError: the file has no chat template, or it refuses the messages.
        """
        text = self._lm.chat_text(self.messages)
        return Prompt(text, self._encoded().encode(text))

    def _encoded(self) -> EncodedTexts:
        if self._texts is None:
            self._texts = EncodedTexts(self._lm.tokenizer)
        return self._texts

    def add_answer(self, prompt: Prompt, generated: Sequence[int]) -> None:
        """Adds the assistant's next message.

        Args:
          prompt: of `prompt()`.
          generated: the answer's ids, with or without the one that ended the text.
        """
        parser = ReasoningParser(prompt.text)
        parser.push(
            self._lm.tokenizer.decode(generated, show_special="template", continuation=True)
        )
        parser.flush()
        reasoning = {"reasoning_content": parser.reasoning} if parser.reasoning else {}
        self.messages.append({"role": "assistant", "content": parser.content} | reasoning)
        self._encoded().add(prompt, generated)

    def save(self, path: str) -> None:
        """Writes the messages as JSON, in the format of OpenAI's chat completions.

        Raises:
          JaxsplitError: the file cannot be written.
        """
        target = user_path(path, "the file")
        content = json.dumps({"messages": self.messages}, indent=1, ensure_ascii=False)
        with os_errors(target, "written"):
            _replace(target, content.encode("utf-8", "replace"))

    def load(self, path: str) -> None:
        """Reads messages in the format of OpenAI's chat completions: a list, or an object with
        `messages`.

        Raises:
          JaxsplitError: the file cannot be read or is of another format; the conversation stays.
        """
        source = user_path(path, "the file")
        with os_errors(source):
            data = source.read_bytes()
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise JaxsplitError(f"{source} is not a JSON file: {reason}") from None
        messages = found.get("messages") if isinstance(found, dict) else found
        if not isinstance(messages, list):
            raise JaxsplitError(f'{source} has no messages: {{"messages": [...]}} is expected')
        self.messages = [
            checked_message(m, f"{source}: message {n}") for n, m in enumerate(messages, 1)
        ]


def checked_message(message: Any, where: str) -> dict[str, str]:
    """A message of a file, its content as one text.

    Args:
      message: in the format of OpenAI's chat completions, its content text or parts of text.
      where: begins the error's message.

    Raises:
      JaxsplitError: it is not a message, or has another role or content than texts.
    """
    if not isinstance(message, dict):
        raise JaxsplitError(f"{where} is {type(message).__name__}, an object is expected")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise JaxsplitError(f"{where} has role {role!r}; supported are {', '.join(_ROLES)}")
    if isinstance(content, list):
        parts = [part if isinstance(part, dict) else {"type": part} for part in content]
        for part in parts:
            if part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise JaxsplitError(f"{where} has content of type {part.get('type')!r}, not text")
        content = "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise JaxsplitError(f"{where} has content {content!r}, text is expected")
    kept = {"role": role, "content": content}
    reasoning = message.get("reasoning_content")
    return kept | ({"reasoning_content": reasoning} if isinstance(reasoning, str) else {})


def _replace(path: Path, data: bytes) -> None:
    """Writes a file at once, so that a failure leaves the earlier one."""
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(data)
        return
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
