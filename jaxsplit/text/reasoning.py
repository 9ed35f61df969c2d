"""Reasoning in an answer: the text between the marks with which models enclose it."""

_FINAL = "<|channel|>final<|message|>"
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant" + _FINAL),
    (_FINAL, ""),
)
"""Opening and closing marks, as `show_special="template"` shows them. The last one opens an answer
without reasoning."""


class ReasoningParser:
    """Splits an answer into reasoning and content while it is streamed.

    Reasoning is recognized at the start of an answer only: later, a mark is what the answer is
    about.

    Attributes:
      reasoning: text between the marks so far, without line ends around it.
      content: text after the closing mark so far, without line ends before it; all of the text
        where there is no reasoning.
    """

    def __init__(self, prompt: str = ""):
        """Starts an answer.

        Args:
          prompt: text of the prompt, which may end with an opening mark.
        """
        end = prompt.rstrip()
        self._open, self._close = next((m for m in MARKS if end.endswith(m[0])), (None, ""))
        self._held = ""  # text that may be the start of a mark
        self._decided = self._open is not None
        self._inside = self._decided and self._close != ""
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._read = 0, 0  # of these
        self._started = False, False
        self._line_ends = ""  # after the reasoning that was read

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning).strip("\n")

    @property
    def content(self) -> str:
        text = "".join(self._content)
        return text if self._open is None else text.lstrip("\n")

    def push(self, text: str) -> list[tuple[bool, str]]:
        """Takes the next piece of the answer.

        Returns:
          pieces of text, and whether they are reasoning, to which its marks belong. Text that may
          be the start of a mark is held back.
        """
        self._held += text
        pieces: list[tuple[bool, str]] = []
        if not self._decided:
            start = self._held.lstrip()
            for opening, closing in MARKS:
                if start.startswith(opening):
                    self._open, self._close, self._inside = opening, closing, True
                    self._decided = True
                    pieces.append((True, self._take(len(self._held) - len(start) + len(opening))))
                    break
            else:
                if any(opening.startswith(start) for opening, _ in MARKS):
                    return []
                self._decided = True
        if self._inside:
            at = self._held.find(self._close)
            if at >= 0:
                inner = self._take(at)
                self._reasoning.append(inner)
                pieces.append((True, inner + self._take(len(self._close))))
                self._inside = False
            else:
                kept = max(
                    (n for n in range(len(self._close)) if self._held.endswith(self._close[:n])),
                    default=0,
                )
                inner = self._take(len(self._held) - kept)
                self._reasoning.append(inner)
                pieces.append((True, inner))
        if not self._inside:
            self._content.append(self._held)
            pieces.append((False, self._take(len(self._held))))
        return [piece for piece in pieces if piece[1]]

    def flush(self) -> list[tuple[bool, str]]:
        """Ends the answer; returns what was held back."""
        rest = self._take(len(self._held))
        (self._reasoning if self._inside else self._content).append(rest)
        return [(self._inside, rest)] if rest else []

    def unread(self) -> tuple[str, str]:
        """Returns what reasoning and content have gained since the last call."""
        texts = self._reasoning, self._content
        reasoning, content = ("".join(t[n:]) for t, n in zip(texts, self._read, strict=True))
        self._read = len(self._reasoning), len(self._content)
        reasoning = self._line_ends + reasoning
        if not self._started[0]:
            reasoning = reasoning.lstrip("\n")
        if not self._started[1] and self._open is not None:
            content = content.lstrip("\n")
        kept = reasoning.rstrip("\n")
        self._line_ends = reasoning[len(kept) :]
        self._started = self._started[0] or bool(kept), self._started[1] or bool(content)
        return kept, content

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken
