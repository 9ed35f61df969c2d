"""Models by name, from a small local server that speaks the Hub's protocol."""

import hashlib
import http.server
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import quick_environment
from tiny import write_tiny_model

import jaxsplit
from jaxsplit.errors import JaxsplitError
from jaxsplit.hub import choose_files, find_model

ROOT = Path(jaxsplit.__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = [
    *("README.md", "config.json", "mmproj-F16.gguf", "model.imatrix.gguf", "tiny-Q8_0.gguf"),
    *("tiny-Q4_K_M.gguf", "tiny-UD-Q4_K_XL.gguf", "tiny-Q4_K_S.gguf", "tiny-IQ4_XS.gguf"),
    *("BF16/tiny-BF16-00002-of-00002.gguf", "BF16/tiny-BF16-00001-of-00002.gguf"),
    *("odd/F16/tiny.gguf", "tiny-Q6_K-00001-of-00003.gguf", "tiny-Q6_K-00003-of-00003.gguf"),
    *("a/tiny-Q5_0.gguf", "b/tiny-Q5_0.gguf"),
]
BF16 = [f"BF16/tiny-BF16-0000{n}-of-00002.gguf" for n in (1, 2)]


# Which file


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        (None, ["tiny-Q4_K_M.gguf"]),
        ("q4_k_m", ["tiny-Q4_K_M.gguf"]),
        ("Q4_K_S", ["tiny-Q4_K_S.gguf"]),
        ("Q4_K_XL", ["tiny-UD-Q4_K_XL.gguf"]),
        ("UD-Q4_K_XL", ["tiny-UD-Q4_K_XL.gguf"]),
        ("iq4_xs", ["tiny-IQ4_XS.gguf"]),
        ("Q8_0", ["tiny-Q8_0.gguf"]),
        ("f16", ["odd/F16/tiny.gguf"]),
        ("BF16", BF16),
        (BF16[1], BF16),
        ("b/tiny-Q5_0.gguf", ["b/tiny-Q5_0.gguf"]),
        ("tiny-Q8_0.gguf", ["tiny-Q8_0.gguf"]),
    ],
)
def test_the_type_is_found_in_the_names(wanted, files):
    assert choose_files("a/b", FILES, wanted) == files


def test_without_a_type_the_only_model_is_taken():
    names = ["gpt-oss-20b-MXFP4.gguf", "mmproj-model-F16.gguf", "README.md"]
    assert choose_files("a/b", names, None) == names[:1]
    assert choose_files("a/b", ["model.gguf"], None) == ["model.gguf"]
    # A part of a type's name is none: Q4_K is not Q4_K_M; and what is asked for is not replaced.
    for wanted in ("Q4_K", "F16", "K_M"):
        with pytest.raises(JaxsplitError, match=f"has no model of type {wanted}; choose one of"):
            choose_files("a/b", ["x-Q4_K_M.gguf", "x-BF16.gguf"], wanted)


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["model.safetensors"], None, r"a/b has no GGUF files; .*-GGUF"),
        (["mmproj-F16.gguf"], "F16", r"a/b has no GGUF files"),
        (
            ["x-Q8_0.gguf", "x-Q2_K.gguf", "x.gguf"],
            None,
            r"a/b has no model of type Q4_K_M; choose one of Q2_K, Q8_0, x\.gguf, as in "
            r"model=a/b:Q2_K$",
        ),
        (
            FILES,
            "Q5_0",
            r"a/b has several models of type Q5_0: a/tiny-Q5_0\.gguf, b/tiny-Q5_0\.gguf; give the "
            r"file's name, as in model=a/b:a/tiny-Q5_0.gguf$",
        ),
        (FILES, "Q6_K", r"a/b has 2 of the 3 files of tiny-Q6_K.gguf; choose another"),
    ],
)
def test_what_is_there_is_told(names, wanted, message):
    with pytest.raises(JaxsplitError, match=message):
        choose_files("a/b", names, wanted)


def test_paths_are_no_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").touch()
    (tmp_path / "owner" / "model:Q8_0").touch()
    for path in ("owner/model", "owner/model:Q8_0", "owner/missing.gguf", "model.gguf", "model"):
        assert find_model(path) == Path(path)
    for path in ("./owner/x", "/owner/x", "owner/x/y", "owner", "../owner", "owner/x:", "ow ner/x"):
        assert find_model(path) == Path(path)
    assert find_model("~/x") == Path.home() / "x"
    with pytest.raises(JaxsplitError, match="--model is empty"):
        find_model("", "--model")


def test_without_the_library_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"no such file: owner/model; .*pip install 'jaxsplit\[hub\]'"
    with pytest.raises(JaxsplitError, match=message):
        find_model("owner/model")


# From a server

HEED_INTERRUPTS = (  # which are ignored in what a shell runs with `&`
    "import os, pathlib, signal, sys\n"
    "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
    "pathlib.Path('pid').write_text(str(os.getpid()))\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class Hub(http.server.ThreadingHTTPServer):
    """Serves repositories.

    Attributes:
      repos: their files, by name.
      failures: what the server does instead: of a repository's name, a status and an error code;
        of a file's name, after how many bytes the connection ends.
      on_cut: called before that.
      requests: methods, paths and ranges.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.failures, self.requests = {}, {}, []
        self.on_cut = lambda: None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass  # clients leave


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = self.path.partition("?")[0]
        hub.requests.append((self.command, path, self.headers.get("Range")))
        found = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:/resolve/([^/]+)/(.+))?", path)
        repo, _, name = found.groups() if found else ("", "", None)
        status, code = hub.failures.get(repo if name is None else f"{repo}/", (200, ""))
        if repo not in hub.repos:
            status, code = 401, "RepoNotFound"
        elif name is not None and name not in hub.repos[repo] and status == 200:
            status, code = 404, "EntryNotFound"
        if status != 200:
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "Refused."})
        elif name is None:
            files = [{"rfilename": file} for file in hub.repos[repo]]
            about = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "tags": []}
            self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        else:
            self.send_file(name, hub.repos[repo][name])

    def send_file(self, name, data):
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(start[1]) if start else 0
        if start:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        cut = self.server.failures.pop(name, None) if self.command == "GET" else None
        self.answer(206 if start else 200, data[first:], headers, cut)

    def answer(self, status, data, headers, cut=None):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.server.on_cut()
            self.connection.shutdown(2)
            self.close_connection = True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("hub") / "tiny.gguf").read_bytes()


@pytest.fixture
def hub(tiny):
    pytest.importorskip("huggingface_hub")
    server = Hub()
    server.repos["owner/tiny-GGUF"] = {
        "README.md": b"#",
        "tiny-Q4_K_M.gguf": tiny,
        "tiny-Q8_0-00001-of-00002.gguf": b"GGUF first",
        "tiny-Q8_0-00002-of-00002.gguf": b"GGUF second",
    }
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(hub, tmp_path):
    """`run(names, **environment)`: for each, the path that `find_model` gives, or its message."""
    program = (
        "import sys\n"
        "from jaxsplit.errors import JaxsplitError\n"
        "from jaxsplit.hub import find_model\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(find_model(name))\n"
        "    except JaxsplitError as error:\n        print('refused:', error)\n"
    )

    def call(*names, arguments=("-c", program), **environment):
        chosen = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        }
        inherited = {k: v for k, v in quick_environment().items() if not k.startswith("HF_")}
        return subprocess.run(
            [sys.executable, *arguments, *names],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=inherited | chosen | environment,
            timeout=120,
        )

    return call


def test_a_model_is_fetched_once_and_found_without_network(hub, run, tiny):
    name = "owner/tiny-GGUF"
    done = run(name, f"{name}:q8_0")
    model, split = map(Path, done.stdout.splitlines())
    assert model.read_bytes() == tiny
    assert split.name == "tiny-Q8_0-00001-of-00002.gguf"
    assert split.with_name("tiny-Q8_0-00002-of-00002.gguf").read_bytes() == b"GGUF second"
    fetched = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    assert len(fetched) == 3
    hub.requests.clear()
    assert run(name).stdout == f"{model}\n"
    assert not [r for r in hub.requests if r[0] == "GET" and "resolve" in r[1]]
    # Not reachable, told to stay offline, or out of order: the cache has it.
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    for environment in (unreachable, {"HF_HUB_OFFLINE": "1"}):
        done = run(name, f"{name}:F16", "owner/other", **environment)
        first, second, third = done.stdout.splitlines()
        assert first == str(model)
        assert second.startswith(
            f"refused: {name} has no model of type F16; choose one of Q4_K_M, Q8_0, as in model="
        )
        assert "(of the files in the cache, since no such file: owner/tiny-GGUF; nor can" in second
        assert re.fullmatch(
            r"refused: no such file: owner/other; nor can it be fetched from http://127.0.0.1:\d+ "
            r"\(.+\); check the network, or give a GGUF file",
            third,
        )
    hub.failures[name] = (503, "")
    assert run(name).stdout == f"{model}\n"


def test_half_a_file_is_completed(hub, run):
    """Where the connection ends; the library keeps pieces of 10 MiB."""
    data = os.urandom(1 << 10) * (24 << 10)
    hub.repos["owner/big"] = {"big-Q4_K_M.gguf": data}
    hub.failures["big-Q4_K_M.gguf"] = len(data) // 2
    done = run("owner/big")
    model = Path(done.stdout.strip())
    assert model.read_bytes() == data, done.stderr
    *_, (_, _, span) = [r for r in hub.requests if r[0] == "GET" and "resolve" in r[1]]
    assert re.fullmatch(r"bytes=[1-9]\d*-", span)


def test_what_the_hub_refuses_is_one_line(hub, run):
    hub.repos |= {"owner/gated": {"a-Q4_K_M.gguf": b""}, "owner/broken": {}, "owner/none": {}}
    hub.failures |= {"owner/gated/": (403, "GatedRepo"), "owner/broken": (500, "")}
    done = run("owner/gated", "owner/missing", "owner/broken", "owner/none")
    gated, missing, broken, none = done.stdout.splitlines()
    where = re.escape(hub.url)
    assert re.fullmatch(
        rf"refused: owner/gated is gated: accept its terms on {where}/owner/gated, and log in "
        r"with: hf auth login",
        gated,
    )
    assert re.fullmatch(
        rf"refused: no such file: owner/missing; nor is there such a model on {where}, or it is "
        r"private: then log in with: hf auth login",
        missing,
    )
    assert re.fullmatch(rf"refused: {where} refuses owner/broken with HTTP status 500; .*", broken)
    assert none.startswith("refused: owner/none has no GGUF files")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("home", "limit", "message"), [("pid/home", "", "Not a directory"), ("home", "100", "File too")]
)
def test_a_cache_that_cannot_be_written_is_one_line(hub, run, tmp_path, home, limit, message):
    """A file in place of a directory; a file system that takes no more."""
    (tmp_path / "pid").touch()
    program = (
        "import resource, sys\n"
        f"limit = {limit or 'resource.RLIM_INFINITY'}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "from jaxsplit.cli.main import main\n"
        "sys.argv = ['jaxsplit', 'info', 'owner/tiny-GGUF']\n"
        "main()\n"
    )
    done = run(arguments=("-c", program), HF_HOME=str(tmp_path / home))
    assert done.returncode == 2
    pattern = rf"jaxsplit: owner/tiny-GGUF cannot be written to /.*: {message}.*; free the disk,.*"
    assert re.fullmatch(pattern, done.stderr.splitlines()[-1]), done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_leaves_no_half_file(hub, run, tmp_path):
    """The command line ends at once on Ctrl-C otherwise."""
    hub.repos["owner/big"] = {"big-Q4_K_M.gguf": bytes(24 << 20)}
    hub.failures["big-Q4_K_M.gguf"] = 12 << 20
    halfway, ended = threading.Event(), threading.Event()
    hub.on_cut = lambda: halfway.set() or ended.wait(60)
    arguments = ("-c", HEED_INTERRUPTS, "-m", "jaxsplit", "info")
    with ThreadPoolExecutor() as pool:
        done = pool.submit(run, "owner/big", arguments=arguments)
        assert halfway.wait(60)
        partial = [*(tmp_path / "home").rglob("*.incomplete")]
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGINT)
        assert done.result().returncode == 130
        ended.set()
    assert len(partial) == 1
    assert not [path for path in (tmp_path / "home").rglob("*") if "incomplete" in path.name]


def test_commands_take_names(hub, run):
    done = run("info", "owner/tiny-GGUF", arguments=("-m", "jaxsplit"))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"/.*/tiny-Q4_K_M.gguf: llama", done.stdout.splitlines()[0])
    flags = ("--prompt=hello", "--n_predict=2", "--temperature=0", "--devices=1", "--quiet")
    name = "--model=owner/tiny-GGUF:Q4_K_M"
    done = run("generate", name, *flags, arguments=("-m", "jaxsplit"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hello")
    done = run("plan", "--model=owner/tiny-GGUF:F16", arguments=("-m", "jaxsplit"))
    assert done.returncode == 2
    assert re.fullmatch(
        r"jaxsplit: owner/tiny-GGUF has no model of type F16; choose one of Q4_K_M, Q8_0, as in "
        r"--model=owner/tiny-GGUF:Q4_K_M\n",
        done.stderr,
    )


def test_the_library_is_not_needed_for_files():
    program = "import jaxsplit.llm, sys; assert 'huggingface_hub' not in sys.modules"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    assert importlib.util.find_spec("huggingface_hub") or pytest.skip("not installed")
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
