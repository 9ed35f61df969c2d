"""`jaxsplit chat`: conversations, their token ids, reasoning, and the program around them."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl.testing import flagsaver
from helpers import command_module, quick_environment
from tiny import CHATML, fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.cli import program
from jaxsplit.conversation import Conversation
from jaxsplit.engine.stream import Stream
from jaxsplit.errors import JaxsplitError
from jaxsplit.text import ChatTemplate, Tokenizer
from jaxsplit.text.reasoning import MARKS, ReasoningParser

pytestmark = pytest.mark.usefixtures("quick_module")

ROOT = Path(jaxsplit.__file__).parents[1]
INSTRUCT = (  # no token of its own between the turns
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ ' ' + message.content | trim + ' ' + eos_token }}{% else %}"
    "{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\n' }}{% endfor %}"
    "{{ 'assistant: ' }}"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("chat") / "tiny.gguf")


@pytest.fixture(scope="module")
def lm(tiny):
    return jaxsplit.load(tiny, devices=1)


# Reasoning


@pytest.mark.parametrize("marks", [m for m in MARKS if m[1]])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reasoning_is_split_from_the_answer(marks, size):
    text = f"\n{marks[0]}\nBecause < of [this.\n{marks[1]}\n\nAnswer <think> with a mark."
    parser = ReasoningParser()
    pieces = [p for at in range(0, len(text), size) for p in parser.push(text[at : at + size])]
    pieces += parser.flush()
    assert "".join(piece for _, piece in pieces) == text
    shown = "".join(piece for is_reasoning, piece in pieces if is_reasoning)
    assert shown == text[: text.index("\n\nAnswer")]
    assert parser.reasoning == "Because < of [this."
    assert parser.content == "Answer <think> with a mark."


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "Answer.", "", "Answer."),
        ("", "\n Answer", "", "\n Answer"),
        ("", "<thin", "", "<thin"),
        ("", "What <think>is</think>", "", "What <think>is</think>"),
        ("user\nHi\nassistant\n<think>\n", "so\n</think>\n\nHi", "so", "Hi"),
        ("assistant\n<think>\n\n</think>\n\n", "Hi", "", "Hi"),
        ("", "<think>unfinished </th", "unfinished </th", ""),
        ("", "<|channel|>final<|message|>Hi", "", "Hi"),
    ],
)
def test_reasoning_starts_in_the_prompt_or_not_at_all(prompt, text, reasoning, content):
    parser = ReasoningParser(prompt)
    pieces = [piece for character in text for piece in parser.push(character)] + parser.flush()
    assert "".join(piece for _, piece in pieces) == text
    assert (parser.reasoning, parser.content) == (reasoning, content)


# Ids of prompts


def spm_metadata():
    """As of Llama 2: `<unk> <s> </s>`, bytes and some pieces; texts start with a space."""
    pieces = "▁h el ▁he lo ▁hel ▁hello in st [ ] / ▁[ I N S T ▁ a e h l o u s r t n :"
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces.split()]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank) for rank in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def bpe_metadata():
    from tiny import MERGES, SPECIAL, byte_alphabet

    tokens = [*byte_alphabet(), *(m.replace(" ", "") for m in MERGES), *SPECIAL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3] * 3,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.eos_token_id": tokens.index("<|endoftext|>"),
    }


def model(metadata, template):
    """What a conversation needs of an `LM`."""
    metadata = metadata | {"tokenizer.chat_template": template}
    chat = ChatTemplate.from_metadata(metadata)
    return SimpleNamespace(tokenizer=Tokenizer.from_metadata(metadata), chat_text=chat.render)


def take_turn(conversation, question, generated):
    """A message and its answer; returns the prompt."""
    conversation.messages.append({"role": "user", "content": question})
    prompt = conversation.prompt()
    conversation.add_answer(prompt, generated)
    return prompt


@pytest.mark.parametrize("metadata", [bpe_metadata(), spm_metadata()], ids=["bpe", "spm"])
@pytest.mark.parametrize("template", [CHATML, INSTRUCT, PLAIN], ids=["chatml", "instruct", "plain"])
def test_prompts_have_the_text_of_the_template(metadata, template):
    """Whatever was generated: any ids, with or without an end."""
    rng = fresh_rng()
    lm = model(metadata, template)
    tokenizer = lm.tokenizer
    for _ in range(20):
        conversation = Conversation(lm)
        for _ in range(4):
            generated = rng.integers(3, 128, rng.integers(1, 9)).tolist()
            if rng.random() < 0.7:
                generated.append(tokenizer.eos_id)
            take_turn(conversation, "hello" * int(rng.integers(1, 3)), generated)
        prompt = conversation.prompt()
        assert prompt.text == lm.chat_text(conversation.messages)
        whole = tokenizer.encode(prompt.text, parse_special=True)
        shown = [tokenizer.decode(ids, show_special="all") for ids in (prompt.ids, whole)]
        assert shown[0] == shown[1]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", None])
def test_a_prompt_begins_with_the_ids_of_the_turn_before(end):
    """Also where encoding the text would give others: one byte at a time, `he` is two ids."""
    lm = model(bpe_metadata(), CHATML)
    tokenizer = lm.tokenizer
    conversation = Conversation(lm)
    answer = [tokenizer.encode(letter)[0] for letter in "the hello"]
    assert tokenizer.encode("the hello") != answer
    generated = answer + (tokenizer.encode(end, parse_special=True) if end else [])
    first = take_turn(conversation, "hello", generated)
    conversation.messages.append({"role": "user", "content": "hello"})
    second = conversation.prompt()
    kept = first.ids + (generated if end == "<|im_end|>" else answer)
    assert second.ids[: len(kept)] == kept
    assert tokenizer.decode(second.ids, show_special="all") == lm.chat_text(conversation.messages)
    # Another answer to the same message starts from the same ids.
    conversation.add_answer(second, answer)
    conversation.drop_answer()
    assert conversation.prompt() == second


def test_a_template_that_leaves_reasoning_out_is_followed():
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    lm = model(bpe_metadata(), template)
    tokenizer = lm.tokenizer
    conversation = Conversation(lm)
    end = tokenizer.encode("<|im_end|>", parse_special=True)
    take_turn(conversation, "hello", tokenizer.encode("<think>\nwhy\n</think>\n\nthe") + end)
    assert conversation.messages[-1] == {
        "role": "assistant",
        "content": "the",
        "reasoning_content": "why",
    }
    prompt = take_turn(conversation, "hello", end)
    assert "why" not in prompt.text
    assert prompt.ids == tokenizer.encode(prompt.text, parse_special=True)


# Files


def test_a_saved_conversation_is_loaded_again(tmp_path):
    lm = model(bpe_metadata(), CHATML)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Wie heißt du?\n\x00"},
        {"role": "assistant", "content": "水", "reasoning_content": "hm"},
    ]
    Conversation(lm, messages).save(str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"messages": messages}
    again = Conversation(lm)
    again.load(str(tmp_path / "a.json"))
    assert again.messages == messages
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]
    (tmp_path / "b.json").write_text(json.dumps(parts))
    again.load(str(tmp_path / "b.json"))
    assert again.messages == [{"role": "user", "content": "ab"}]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.json", "b.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file: .*a\.json"),
        (b"[", r"a\.json is not a JSON file: Expecting value"),
        (b"\xff\xfe\x00", r"a\.json is not a JSON file: .*"),
        (b"[" * 100_000, r"a\.json is not a JSON file: .*"),
        (b'{"message": []}', r'a\.json has no messages: \{"messages": \[\.\.\.\]\} is expected'),
        (b'["hi"]', r"a\.json: message 1 is str, an object is expected"),
        (b'[{"role": "tool", "content": ""}]', r"message 1 has role 'tool'; supported are system,"),
        (b'[{"role": "user"}]', r"message 1 has content None, text is expected"),
        (
            b'[{"role": "user", "content": [{"type": "image_url"}]}]',
            r"message 1 has content of type 'image_url', not text",
        ),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    conversation = Conversation(model(bpe_metadata(), CHATML), [{"role": "user", "content": "a"}])
    with pytest.raises(JaxsplitError, match=message):
        conversation.load(str(path))
    assert len(conversation.messages) == 1
    with pytest.raises(JaxsplitError, match="cannot be written: "):
        conversation.save(str(tmp_path / "missing" / "a.json"))


# The program, without a terminal


@pytest.fixture(scope="module")
def command():
    with command_module("chat") as module:
        yield module


@pytest.fixture
def chat(command, tiny, lm, capsys, monkeypatch):
    """`chat(lines, *flags)`: exit status, and lines of standard output and standard error."""
    monkeypatch.setattr(jaxsplit, "load", lambda *_, **__: lm)

    def call(text, *arguments):
        common = [f"--model={tiny}", "--devices=1", "--compilation_cache=none", "--temperature=0"]
        monkeypatch.setattr(sys, "argv", ["chat", *common, *map(str, arguments)])
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
            program.run(command.main)
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


def answer(lm, messages, n_predict):
    return "".join(lm.stream(lm.chat_prompt(messages), n_predict, temperature=0.0))


def test_each_line_is_answered(chat, lm):
    messages = []
    for question in ("Tell", "me"):
        messages.append({"role": "user", "content": question})
        content = answer(lm, messages, 5)
        messages.append({"role": "assistant", "content": content})
    code, out, err = chat("Tell\n\nme", "--n_predict=5", "--quiet")
    assert (code, err) == (0, "")
    assert out == "".join(message["content"] + "\n" for message in messages[1::2])


def test_a_backslash_goes_on_to_the_next_line_and_escapes_are_for_flags(chat, lm):
    messages = [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "c\nd\\n\ufffd"},
    ]
    code, out, _ = chat(b"c\\\nd\\n\xff\n", r"--system=a\nb", "--n_predict=5")
    assert (code, out) == (0, answer(lm, messages, 5) + "\n")


def test_commands(chat, lm, tmp_path):
    path = tmp_path / "a b.json"
    lines = [
        *(
            "one",
            f"/save {path}",
            "/clear",
            "/regen",
            "/stats",
            "/system",
            "/system\\",
            "Be brief.",
        ),
        *("/system", "two", "/stats", f"/load {path}", "/regen", "/load", "/nothing", "/help"),
        *(" /one", "/quit", "three"),
    ]
    code, out, err = chat("\n".join(lines), "--n_predict=3", "--quiet")
    one, two = ({"role": "user", "content": text} for text in ("one", "two"))
    system = {"role": "system", "content": "Be brief."}
    texts = [answer(lm, m, 3) for m in ([one], [system, two], [one])]
    saved = json.loads(path.read_text())["messages"]
    assert saved == [one, {"role": "assistant", "content": texts[0]}]
    texts.append(answer(lm, [*saved, {"role": "user", "content": " /one"}], 3))
    assert (code, out) == (0, "".join(text + "\n" for text in texts))
    assert re.fullmatch(
        r"saved 2 messages\njaxsplit: there is no message to answer yet\n\[n_predict\].*\n"
        r"there is no system message\nBe brief\.\n"
        r"\[n_predict\]  context \d+ of 256 tokens \| first token .* tokens/s.*\n"
        r"loaded 2 messages\njaxsplit: a file is needed: /load FILE.json\n"
        r"jaxsplit: /nothing is not a command; commands are /clear, .*\n(  /\w+ .*\n){8}",
        err,
    )


def test_another_answer_has_another_seed_and_a_chat_can_be_repeated(chat):
    flags = ["--n_predict=12", "--temperature=1.5", "--seed=7", "--quiet", "--stats"]
    code, out, err = chat("one\n/regen\n", *flags)
    first, second = out.split("\n\n") if "\n\n" in out else out.rstrip("\n").split("\n", 1)
    assert code == 0 and first != second
    assert len(re.findall(r"^\[n_predict\]  context", err, re.MULTILINE)) == 2
    assert chat("one\n/regen\n", *flags)[1] == out


def test_faults_are_one_line_and_the_conversation_goes_on(chat, lm, monkeypatch):
    long = "x" * 300
    code, out, err = chat(f"{long}\none\n", "--n_predict=3", "--quiet")
    assert (code, out) == (0, answer(lm, [{"role": "user", "content": "one"}], 3) + "\n")
    assert re.fullmatch(
        r"jaxsplit: the conversation has 3\d\d tokens, the context 256; /clear .*--ctx_size=.*\n",
        err,
    )
    render = lm.chat_text

    def picky(messages, **variables):
        if "bad" in messages[-1]["content"]:
            raise JaxsplitError("the file's chat template fails on these messages: bad")
        return render(messages, **variables)

    monkeypatch.setattr(lm, "chat_text", picky)
    code, again, err = chat("bad\none\n", "--n_predict=3", "--quiet")
    assert (code, again) == (0, out)
    assert err == "jaxsplit: the file's chat template fails on these messages: bad\n"


def test_a_full_context_ends_the_answer_with_a_note(chat):
    code, out, err = chat("one\ntwo\n", "--quiet")
    assert code == 0 and len(out) > 100
    first, second = err.splitlines()
    assert first == "[context full: /clear starts a new conversation]"
    assert "the conversation has " in second


def test_a_model_without_a_template_is_refused(chat, lm, monkeypatch):
    metadata = {k: v for k, v in lm.file.metadata.items() if k != "tokenizer.chat_template"}
    monkeypatch.setattr(lm, "file", dataclasses.replace(lm.file, metadata=metadata))
    code, out, err = chat("one\n")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"jaxsplit: the file has no chat template .*\n", err)


HEED_INTERRUPTS = (  # which are ignored in what a shell runs with `&`
    "import os, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def test_an_interrupt_that_python_drops_stops_the_answer(chat, monkeypatch):
    """As of an exception in a callback of the garbage collector."""
    take = Stream.__next__

    def interrupted(stream):
        piece = take(stream)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return piece

    monkeypatch.setattr(Stream, "__next__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = chat("Tell\n/stats\n", "--n_predict=20", "--stream_interval=1", "--quiet")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 0 and out.strip()
    assert re.search(r"\[interrupted\] .* generated 1 tokens", err)


def test_an_interrupt_stops_the_answer_and_the_next_line_is_taken(tmp_path):
    path = write_tiny_model(tmp_path / "long.gguf", context=32768)
    arguments = [f"--model={path}", "--devices=1", "--stream_interval=1", "--ctx_size=32768"]
    process = subprocess.Popen(
        [sys.executable, "-c", HEED_INTERRUPTS, "-m", "jaxsplit", "chat", *arguments, "--quiet"],
        env=quick_environment() | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdin.write(b"one\n/stats\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert re.match(rb"\[interrupted\]  context \d+ of 32768", process.stderr.readline())
    time.sleep(1)
    process.send_signal(signal.SIGINT)  # while it waits for input, it ends
    assert process.wait(30) == 130
    assert not process.stderr.read()
    process.communicate()


# On a terminal


ON_A_TERMINAL = (
    "import fcntl, os, signal, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"  # ignored in what a shell runs with `&`
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


PROMPT = "\x1b\\[0m>"


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments, path=ROOT):
        path = os.pathsep.join([str(path), str(ROOT), os.environ.get("PYTHONPATH", "")])
        chosen = {"PYTHONPATH": path, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, "-m", "jaxsplit", *map(str, arguments)],
            env=quick_environment() | chosen,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.output = ""

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def write(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, pattern, seconds=120):
        """Reads to a pattern; returns what came before it, and forgets both."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.output)):
            assert time.monotonic() < end, f"{pattern!r} is not in {self.output!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the program has ended
                    self.output += "\0"
        before, self.output = self.output[: found.start()], self.output[found.end() :]
        return before

    def status(self):
        self.wait_for("\0")
        return self.process.wait(60)


def test_without_the_line_editor_a_line_says_what_to_install(tmp_path):
    (tmp_path / "prompt_toolkit.py").write_text("raise ImportError")
    terminal = Terminal("chat", path=tmp_path)
    try:
        terminal.wait_for("jaxsplit: chat on a terminal needs prompt_toolkit; install it with: pip")
        assert terminal.status() == 2
    finally:
        terminal.close()


def test_on_a_terminal_an_interrupt_stops_the_answer(tmp_path):
    pytest.importorskip("prompt_toolkit")
    template = CHATML.replace("assistant\n", "assistant\n<think>")  # the answer is reasoning
    path = write_tiny_model(
        tmp_path / "long.gguf", context=32768, metadata={"tokenizer.chat_template": template}
    )
    history = tmp_path / "state" / "history"
    terminal = Terminal(
        *("chat", f"--model={path}", "--devices=1", "--stream_interval=1", "--ctx_size=32768"),
        *("--temperature=0", f"--history={history}"),
    )
    try:
        terminal.wait_for(PROMPT)
        terminal.write("\x03")  # at the prompt it ends nothing
        terminal.wait_for("Ctrl-D or /quit ends the chat")
        terminal.wait_for(PROMPT)
        terminal.write("Tell\x1b\rme\r")  # Alt-Enter: another line
        terminal.wait_for(r"(\x1b\[2m[^\x1b]+\x1b\[0m){8}")  # reasoning is dim
        time.sleep(0.5)
        terminal.write("\x03")
        terminal.wait_for(PROMPT)
        terminal.write("/stats\r")
        terminal.wait_for(r"\[interrupted\]  context \d+ of 32768")
        terminal.wait_for(PROMPT)
        terminal.write("\x04")
        assert terminal.status() == 0
    finally:
        terminal.close()
    kept = history.read_text()
    assert "+Tell\n+me\n" in kept and "+/stats\n" in kept
    assert history.stat().st_mode & 0o777 == 0o600
