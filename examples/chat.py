"""A chat in the terminal: `python examples/chat.py FILE.gguf`; without a file, the demo model."""

import sys

import jaxsplit
from jaxsplit.llm import demo_model


def main() -> None:
    path = sys.argv[1] if len(sys.argv) > 1 else demo_model()
    lm = jaxsplit.load(path, ctx_size=2048)
    messages = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        messages.append({"role": "user", "content": text})
        answer = ""
        for piece in lm.stream(lm.chat_prompt(messages), n_predict=256):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
