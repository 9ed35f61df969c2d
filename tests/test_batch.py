"""`jaxsplit generate --prompts`: results, their file, and lines that are wrong."""

import inspect
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from absl.testing import flagsaver
from helpers import command_module, quick_environment
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.cli import batch, program
from jaxsplit.cli.batch import OPTIONS, Batch
from jaxsplit.errors import JaxsplitError

pytestmark = pytest.mark.usefixtures("quick_compilation")

GREEDY = {"temperature": 0.0, "n_predict": 6}
PROMPTS = ("hello", "Tell the", "the l", "hello the", "all")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("batch") / "tiny.gguf", kind="Q8_0")


@pytest.fixture(scope="module")
def lm(path):
    return jaxsplit.load(path, devices=1, slots=4)


@pytest.fixture
def run(lm, tmp_path):
    """`run(lines, **options)`: what is in the file of results, by id, and the totals."""

    def call(lines, out="out.jsonl", **options):
        source = tmp_path / "prompts.jsonl"
        source.write_bytes(b"".join(as_line(line) for line in lines))
        chat = {name: options.pop(name) for name in ("chat", "system") if name in options}
        job = Batch(str(source), str(tmp_path / out), GREEDY | options, **chat)
        totals = job.run(lm)
        return results(tmp_path / out), totals

    return call


def as_line(line):
    return line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"


def results(path):
    found = [json.loads(line) for line in path.read_bytes().splitlines()]
    by_id = {entry["id"]: entry for entry in found}
    assert len(by_id) == len(found)
    return by_id


def alone(lm, prompt, **options):
    return lm.generate(prompt, **(GREEDY | options))


def test_results_are_those_of_each_request_alone(lm, run):
    requests = [
        {"id": f"{prompt}-{i}", "prompt": prompt, "n_predict": 3 + i, "seed": i, "temperature": t}
        for i, prompt in enumerate(PROMPTS)
        for t in (0.0, 1.0)
        for prompt in [f"{prompt} {t}"]
    ]
    random.Random(0).shuffle(requests)
    found, totals = run(requests)
    for request in requests:
        options = {name: request[name] for name in ("n_predict", "seed", "temperature")}
        entry = found[request["id"]]
        assert entry == {
            "id": request["id"],
            "text": lm.generate(request["prompt"], **options),
            "finish_reason": "length",
            "prompt_tokens": len(lm.tokenizer.encode(request["prompt"])),
            "completion_tokens": request["n_predict"],
        }
    assert (totals.finished, totals.failed, totals.skipped) == (len(requests), 0, 0)
    assert totals.completion_tokens == sum(r["n_predict"] for r in requests)
    assert totals.prompt_tokens == sum(e["prompt_tokens"] for e in found.values())


def test_lines_without_id_have_their_number(lm, run):
    lines = [{"prompt": "hello"}, b"\n", b"  \r\n", {"id": None, "prompt": "all"}]
    found, _ = run([b"\xef\xbb\xbf" + as_line(lines[0]), *lines[1:]])
    assert {id: entry["text"] for id, entry in found.items()} == {
        1: alone(lm, "hello"),
        4: alone(lm, "all"),
    }


def test_the_last_line_needs_no_end(lm, run):
    found, _ = run([b'{"prompt": "hello"}'])
    assert found[1]["text"] == alone(lm, "hello")


def test_prompts_may_be_token_ids_or_messages(lm, run):
    messages = [{"role": "user", "content": "hello"}]
    brief = {"role": "system", "content": "the"}
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    lines = [
        {"prompt": [70, 71, 72]},
        {"messages": messages},
        {"messages": [brief, *messages]},
        {"messages": parts},
        {"prompt": "hello"},
    ]
    texts = [
        alone(lm, [70, 71, 72]),
        alone(lm, lm.chat_prompt(messages)),
        alone(lm, lm.chat_prompt([brief, *messages])),
        alone(lm, lm.chat_prompt(messages)),
        alone(lm, "hello"),
    ]
    found, _ = run(lines)
    assert [found[i]["text"] for i in range(1, 6)] == texts
    # --chat is for prompts that are text, --system for messages without a system message.
    found, _ = run(lines, "chat.jsonl", chat=True, system="the")
    with_system = texts[2]
    assert [found[i]["text"] for i in range(1, 6)] == [texts[0], *[with_system] * 4]


def test_options_of_a_line_replace_those_of_the_flags(lm, run):
    text = alone(lm, "hello", n_predict=30)
    stop = text[8:10]
    lines = [
        {"prompt": "hello", "stop": stop, "n_predict": 30},
        {"prompt": "hello", "stop": [text[4:6], stop]},
        {"prompt": "hello"},
        {"prompt": "hello", "logit_bias": {"70": 100}, "n_predict": 2},
        {"prompt": "hello", "stop_ids": [lm.tokenizer.encode(text[0])[0]]},
        {"prompt": "hello", "timeout": 0},
    ]
    found, _ = run(lines, n_predict=20)
    assert found[1]["text"] == text[: text.index(stop)]
    assert found[1]["finish_reason"] == "stop"
    assert found[1]["completion_tokens"] < 30
    assert found[2]["text"] == text[: text.index(text[4:6])]
    assert found[3]["text"] == alone(lm, "hello", n_predict=20)
    assert found[4]["text"] == lm.tokenizer.decode([70, 70])
    assert (found[5]["text"], found[5]["finish_reason"]) == ("", "stop")
    assert found[6]["finish_reason"] == "deadline"


def test_lines_may_have_all_options_of_submit():
    taken = set(inspect.signature(jaxsplit.LM._prepared).parameters)
    assert taken - {"self", "prompt", "sampling", "options", "block"} <= {*OPTIONS}
    fields = jaxsplit.SamplingConfig.__dataclass_fields__
    assert {*OPTIONS} <= taken | {*fields}
    assert {*fields} <= {*OPTIONS}


def test_the_documentation_has_all_options():
    page = (Path(__file__).parent.parent / "docs" / "batches.md").read_text("utf-8")
    keys = {key for row in re.findall(r"^\| (`.+?) \|", page, re.M) for key in row.split("`")[1::2]}
    assert keys == {"id", "prompt", "messages", *OPTIONS}
    examples = [
        json.loads(line) for line in re.findall(r'^{"(?!id": "france", "text).*', page, re.M)
    ]
    assert len(examples) == 3
    assert all(example.keys() <= keys for example in examples)


def test_each_line_draws_a_seed_of_its_own(run):
    lines = [{"prompt": "hello"}] * 4
    found, _ = run(lines, seed=-1, temperature=1.0, n_predict=16)
    assert len({entry["text"] for entry in found.values()}) > 1
    found, _ = run(lines, "same.jsonl", seed=3, temperature=1.0, n_predict=16)
    assert len({entry["text"] for entry in found.values()}) == 1


def test_log_probabilities_are_written_if_asked_for(lm, run):
    found, _ = run([{"prompt": "hello the", "logprobs": 2, "prompt_logprobs": True}])
    request = lm.submit("hello the", logprobs=2, prompt_logprobs=True, **GREEDY)
    events = list(request)
    expected = [one for event in events for one in event.logprobs]
    assert len(expected) == GREEDY["n_predict"]
    for written, one in zip(found[1]["logprobs"], expected, strict=True):
        assert written["token"] == one.token
        assert written["logprob"] == pytest.approx(one.logprob, abs=1e-5)
        assert [token for token, _ in written["top"]] == [token for token, _ in one.top]
    prompt = found[1]["prompt_logprobs"]
    assert [one["token"] for one in prompt] == lm.tokenizer.encode("hello the")[1:]


RAISES = "{{ raise_exception('no ' + messages[0]['content']) }}"

WRONG = [
    (b"hello\n", "the line is not JSON: column 1: Expecting value"),
    (b'{"prompt": "hel\n', "the line is not JSON: column 16: Invalid control character"),
    (b"[" * 100_000 + b"\n", "the line is not JSON"),
    (b"1" * 5000 + b"\n", "the line is not JSON"),
    (b'{"prompt": "h\xff"}\n', "the line is not UTF-8: byte 13 is 0xff"),
    (b'["hello"]\n', 'the line is JSON, but no object such as {"id": 1, "prompt"'),
    (b"null\n", "the line is JSON, but no object"),
    ({}, "neither prompt nor messages; give one"),
    ({"text": "hello"}, "unknown option text; a line may have id, prompt, messages, n_predict"),
    ({"prompt": "a", "messages": []}, "both prompt and messages"),
    ({"prompt": "a", "block": 1}, "unknown option block"),
    ({"prompt": "a", "sampling": {}}, "unknown option sampling"),
    ({"prompt": "a", "self": 1, "slots": 2}, "unknown option self, slots"),
    ({"id": [1], "prompt": "a"}, r"id is \[1\]; text or a whole number"),
    ({"id": True, "prompt": "a"}, "id is true; text or a whole number"),
    ({"id": 1.5, "prompt": "a"}, "id is 1.5; text or a whole number"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": None}, "a prompt is text or a list of token ids .*, not NoneType"),
    ({"prompt": 5}, "a prompt is text or a list of token ids .*, not int 5"),
    ({"prompt": {"a": 1}}, "a prompt is text or a list of token ids .*, not dict"),
    ({"prompt": ["a"]}, "a prompt is text or a list of token ids"),
    ({"prompt": [1.5]}, "a prompt is text or a list of token ids"),
    ({"prompt": [-1]}, "token ids must lie between 0 and 262"),
    ({"prompt": [10**30]}, "token ids must lie between 0 and 262"),
    ({"prompt": "ab " * 200}, "the prompt has 6.. tokens, the context 256"),
    ({"messages": []}, "messages must be a list such as"),
    ({"messages": "hello"}, "messages must be a list such as"),
    ({"messages": ["hello"]}, "message 1 is str, an object is expected"),
    ({"messages": [{"content": "a"}]}, "message 1 has role None"),
    ({"messages": [{"role": "user"}]}, "message 1 has content None, text is expected"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "message 1 has content of type 'image', not text",
    ),
    ({"prompt": "a", "n_predict": "5"}, "n_predict='5' is not a whole number"),
    ({"prompt": "a", "n_predict": None}, "n_predict=None is not a whole number"),
    ({"prompt": "a", "n_predict": -2}, "n_predict=-2 is not"),
    ({"prompt": "a", "temperature": "warm"}, "temperature='warm' is not a number"),
    (b'{"prompt": "a", "temperature": NaN}\n', "temperature=nan is not a number"),
    (b'{"prompt": "a", "timeout": Infinity}\n', "timeout=inf is not a number"),
    ({"prompt": "a", "top_k": 1.5}, "top_k=1.5 is not a whole number"),
    ({"prompt": "a", "seed": "x"}, "seed='x' is not a whole number"),
    ({"prompt": "a", "logprobs": 99}, "logprobs=99 is not"),
    ({"prompt": "a", "stop": ""}, "stop='' must be a string, or several, none of them empty"),
    ({"prompt": "a", "stop": [1]}, "stop=.* must be a string"),
    ({"prompt": "a", "stop": {"b": 1}}, "stop=.* must be a string"),
    (b'{"prompt": "a", "logit_bias": [[1e999, 1]]}\n', "infinity|logit_bias"),
    ({"prompt": "a", "stop_ids": 5}, "stop_ids is a list of token ids"),
    ({"prompt": "a", "stop_ids": [500]}, "token ids must lie between"),
    ({"prompt": "a", "ignore_eos": "false"}, "ignore_eos='false' must be true or false"),
    ({"prompt": "a", "parse_special": 1}, "parse_special=1 must be true or false"),
    ({"prompt": "a", "show_special": "some"}, "show_special=some is not supported"),
    ({"prompt": "a", "logit_bias": [1]}, r"logit_bias=\[1\] must be numbers by token id"),
]


def test_a_wrong_line_is_an_error_and_the_rest_goes_on(lm, run):
    lines = [line for wrong, _ in WRONG for line in (wrong, {"prompt": "hello"})]
    found, totals = run(lines)
    text = alone(lm, "hello")
    for number, (_, message) in enumerate(WRONG):
        entry = found[2 * number + 1]
        assert entry.keys() == {"id", "line", "error"}
        assert entry["line"] == entry["id"]
        assert re.search(message, entry["error"]), entry
        assert found[2 * number + 2]["text"] == text
    assert (totals.finished, totals.failed) == (len(WRONG), len(WRONG))


def test_a_template_that_raises_is_an_error_of_its_line(tmp_path):
    path = write_tiny_model(
        tmp_path / "raises.gguf", metadata={"tokenizer.chat_template": RAISES}, layers=1
    )
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    line = {"messages": [{"role": "user", "content": "hello"}]}
    prompts.write_bytes(as_line(line) + as_line({"prompt": "a", "n_predict": 1}))
    Batch(str(prompts), str(out), {}).run(jaxsplit.load(path, devices=1))
    found = results(out)
    assert "chat template fails on these messages: no hello" in found[1]["error"]
    assert found[2]["completion_tokens"] == 1


def test_two_lines_with_one_id_are_told(lm, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = [{"id": 3, "prompt": "a"}, {"id": "3", "prompt": "b"}, {"prompt": "c"}]
    prompts.write_bytes(b"".join(map(as_line, lines)))
    for skipped in (0, 2):
        totals = Batch(str(prompts), str(out), GREEDY).run(lm)
        assert (totals.skipped, totals.failed) == (skipped, 1)
        found = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert {entry["id"]: entry["text"] for entry in found if "text" in entry} == {
            3: alone(lm, "a"),
            "3": alone(lm, "b"),
        }
        errors = [entry for entry in found if "error" in entry]
        assert errors == [{"id": 3, "line": 3, "error": "id 3 is that of an earlier line, too"}]


def test_a_line_may_be_too_long(monkeypatch, lm, run):
    monkeypatch.setattr(batch, "_MAX_LINE", 64)
    lines = [
        {"prompt": "a" * 200},
        {"prompt": "hello"},
        {"prompt": "b" * 51},
        {"prompt": "all"},
        {"prompt": "c" * (64 * 3 - 14)},
        {"prompt": "hello"},
    ]
    assert len(as_line(lines[4])) == 64 * 3 + 1
    found, _ = run(lines)
    for number in (1, 3, 5):
        assert found[number]["error"] == "the line has more than 64 bytes"
    assert found[2]["text"] == found[6]["text"] == alone(lm, "hello")
    assert found[4]["text"] == alone(lm, "all")


def test_all_text_survives(run):
    ids = ["ü", "\ud800", "\u2028", 'a "b"\n', "日本"]
    lines = [{"id": id, "prompt": id} for id in ids]
    found, _ = run(lines)
    assert set(found) == {*ids}
    again, totals = run(lines)
    assert again == found
    assert totals.skipped == len(ids)


@pytest.mark.parametrize("left", [0, 1, 20, -1])
def test_a_run_that_was_stopped_is_continued(run, tmp_path, left):
    """After two results and some bytes of a third."""
    requests = [{"id": f"r{i}", "prompt": prompt} for i, prompt in enumerate(PROMPTS)]
    whole, _ = run(requests, "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(lines[:2]) + lines[2][:left])
    found, totals = run(requests)
    assert found == whole
    assert (totals.skipped, totals.finished) == (2, 3)
    assert out.read_bytes().startswith(b"".join(lines[:2]))
    before = out.read_bytes()
    _, totals = run(requests)
    assert (totals.skipped, totals.finished, totals.failed) == (5, 0, 0)
    assert out.read_bytes() == before


def test_errors_are_tried_again(lm, run, tmp_path):
    out = tmp_path / "out.jsonl"
    run([{"prompt": "hello"}, b"hello\n", {"id": "x", "prompt": "a", "top_k": -1}])
    out.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    lines = [{"prompt": "hello"}, b"hello\n", {"id": "x", "prompt": "a", "top_k": 1}]
    found, totals = run(lines, "link.jsonl")
    assert (totals.skipped, totals.finished, totals.failed) == (1, 1, 1)
    assert found.keys() == {1, 2, "x"}
    assert "error" in found[2]
    assert found["x"]["text"] == alone(lm, "a")
    assert link.is_symlink()
    assert out.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "link.jsonl",
        "out.jsonl",
        "prompts.jsonl",
    ]


@pytest.mark.parametrize(
    "line", [b"my notes\n", b'{"id": 1}\n', b'{"text": "a"}\n', b"\n", b'{"id": 1, "prompt": 1}\n']
)
def test_another_file_is_not_written_over(run, tmp_path, line):
    out = tmp_path / "out.jsonl"
    content = b'{"id": 9, "error": "a"}\n' + line + b"half"
    out.write_bytes(content)
    with pytest.raises(JaxsplitError, match=r"out.jsonl: line 2 is no result: .*another file"):
        run([{"prompt": "a"}])
    assert out.read_bytes() == content


def test_files_that_cannot_be_used_are_refused(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(as_line({"prompt": "a"}))
    link = tmp_path / "link.jsonl"
    link.symlink_to(prompts)
    for source, out, message in [
        (tmp_path / "missing", "-", "no such file: .*missing"),
        (tmp_path, "-", "cannot be read: Is a directory"),
        (prompts, tmp_path, "cannot be written: Is a directory"),
        (prompts, tmp_path / "no" / "out", "cannot be written: No such file"),
        (prompts, prompts, "are the same file"),
        (prompts, link, "are the same file"),
        (prompts, "a\0b", "has a character"),
    ]:
        with pytest.raises(JaxsplitError, match=message):
            Batch(str(source), str(out), {})
    with pytest.raises(JaxsplitError, match="n_predict=-2"):
        Batch(str(prompts), "-", {"n_predict": -2})
    assert prompts.read_bytes() == as_line({"prompt": "a"})


def test_utf16_is_refused(run):
    with pytest.raises(JaxsplitError, match="is in UTF-16; UTF-8"):
        run(['{"prompt": "a"}\n'.encode("utf-16")])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_told_in_a_line(run):
    with pytest.raises(JaxsplitError, match="/dev/full cannot be written: No space left"):
        run([{"prompt": "a"}], "/dev/full")


def test_few_requests_are_submitted_at_a_time(monkeypatch, lm, run):
    """So that a file of a million lines takes no more memory than a short one."""
    monkeypatch.setattr(batch, "_AHEAD", 10)
    most, submit = [0], type(lm).submit

    def spy(self, *arguments, **options):
        now = self.statistics
        most.append(now.waiting + now.running)
        return submit(self, *arguments, **options)

    monkeypatch.setattr(type(lm), "submit", spy)
    found, _ = run([{"prompt": "hello", "n_predict": 1}] * 60)
    assert len(found) == 60
    assert lm.engine.slots <= max(most) <= 10


def test_results_come_before_the_input_ends(lm, tmp_path, monkeypatch):
    reading, writing = os.pipe()
    answers = queue.Queue()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reading))
    monkeypatch.setattr(batch.Results, "write", lambda self, entry: answers.put(entry))
    job = Batch("-", str(tmp_path / "out.jsonl"), GREEDY)
    assert job.lines is None
    thread = threading.Thread(target=job.run, args=(lm,))
    thread.start()
    for prompt in PROMPTS[:2]:
        os.write(writing, as_line({"id": prompt, "prompt": prompt}))
        assert answers.get(timeout=60)["text"] == alone(lm, prompt)
    os.close(writing)
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_lines_are_counted(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    for content, count in ((b"", 0), (b"a\n", 1), (b"a\n\nb", 3), (b"a" * 3_000_000 + b"\n", 1)):
        prompts.write_bytes(content)
        assert Batch(str(prompts), "-", {}).lines == count


# The command


@pytest.fixture
def generate(path, lm, capfd, monkeypatch):
    """`generate(*flags)`: exit status, standard output and standard error."""
    monkeypatch.setattr(jaxsplit, "load", lambda *_, **__: lm)
    with command_module("generate") as command:

        def call(*arguments):
            capfd.readouterr()
            common = [f"--model={path}", "--compilation_cache=none", "--temperature=0"]
            monkeypatch.setattr(sys, "argv", ["generate", *common, *map(str, arguments)])
            with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
                program.run(command.main)
            return (stopped.value.code or 0, *capfd.readouterr())

        yield call


def test_the_command_reads_and_writes_standard_streams(lm, generate, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_bytes(as_line({"prompt": "hello"}) + as_line({"prompt": "all", "n_predict": 2}))
    for arguments in ([], ["--out=-"]):
        with source.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            code, out, err = generate("--prompts=-", "--n_predict=4", *arguments)
        assert code == 0, err
        found = {entry["id"]: entry["text"] for entry in map(json.loads, out.splitlines())}
        expected = {1: alone(lm, "hello", n_predict=4), 2: alone(lm, "all", n_predict=2)}
        assert found == expected
        summary = (
            r"2 requests, 0 errors \| [\d.]+ s, compiling [\d.]+ s \| prompts \d+ tokens, \d+ of "
            r"them cached \| generated 6 tokens, [\d.]+ tokens/s \| load [\d.]+ s\n"
        )
        assert re.search(summary, err), err


def test_the_command_continues_and_tells_errors(generate, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(as_line({"prompt": "hello"}) + b"hello\n")
    flags = [f"--prompts={source}", f"--out={out}", "--n_predict=2"]
    code, printed, err = generate(*flags, "--quiet")
    assert (code, printed) == (1, "")
    assert err == "jaxsplit: lines of --prompts that failed: 1; their results say why\n"
    first = results(out)
    code, _, err = generate(*flags)
    assert code == 1
    assert "1 requests and 1 done before, 1 errors" in err
    assert results(out) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts=a", "--prompt=b"], "--prompts and --prompt are both given; leave one out"),
        (["--prompts=a", "--prompt_file=b"], "--prompts and --prompt_file are both given"),
        (["--prompt=a", "--out=b"], "--out needs --prompts"),
        (["--prompts=missing.jsonl"], "no such file: missing.jsonl"),
        (["--prompts=/dev/null", "--n_predict=-3"], "--n_predict=-3 is not a whole number"),
        (["--prompts=/dev/null", "--system=a"], "--system needs --chat"),
    ],
)
def test_wrong_flags_are_refused(generate, arguments, message):
    code, out, err = generate(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"jaxsplit: {message}")
    assert len(err.splitlines()) == 1


def test_an_interrupt_leaves_whole_results(path, lm, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests = [
        {"id": i, "prompt": PROMPTS[i % 5], "n_predict": 1 if i < 3 else 200, "ignore_eos": True}
        for i in range(400)
    ]
    source.write_bytes(b"".join(map(as_line, requests)))
    flags = [f"--model={path}", f"--prompts={source}", f"--out={out}", "--temperature=0"]
    flags += ["--ctx_size=256", "--devices=1", "--compilation_cache=none"]
    heed = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from jaxsplit.cli.main import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", heed, "generate", *flags]
    environment = quick_environment() | {"PYTHONPATH": str(Path(jaxsplit.__file__).parents[1])}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 1):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert b"Traceback" not in error
    done = batch.Results(str(out)).done  # cuts off half a line
    assert 1 < len(done) < len(requests)
    found = results(out)
    assert found.keys() == done
    for id, entry in found.items():
        own = {name: requests[id][name] for name in ("n_predict", "ignore_eos")}
        assert entry["text"] == alone(lm, requests[id]["prompt"], **own)
