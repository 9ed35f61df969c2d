"""The server over HTTP, beside the same requests without it.

  python benchmarks/server.py --random=llama-8b:Q4_K_M
  JAX_NUM_CPU_DEVICES=2 python benchmarks/server.py --random=llama-tiny:Q4_K_M --clients=1,4

Clients each send one request after the other, of 128 random tokens, and read a stream of 128 more;
they begin at random times. They are processes of their own, on the loopback interface. The same
clients, as threads, then ask the engine directly.
"""

import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags

import jaxsplit
from jaxsplit.bench import record
from jaxsplit.bench.random_model import model_and_type, model_file
from jaxsplit.cli import options
from jaxsplit.cli.program import run
from jaxsplit.config import LoadConfig, SamplingConfig

_MODEL = flags.DEFINE_string("model", None, "GGUF file or checkpoint")
_RANDOM = flags.DEFINE_string("random", None, "random weights instead, such as llama-8b:Q4_K_M")
_CLIENTS = flags.DEFINE_list("clients", "1,32,128", "how many clients at a time, one or several")
_EACH = flags.DEFINE_integer("each", 6, "requests of each client", 2)
_PROMPT = flags.DEFINE_integer("prompt", 128, "tokens of a prompt", 1)
_COUNT = flags.DEFINE_integer("count", 128, "tokens of an answer", 2)
_LOAD = options.define(LoadConfig, skip=["ctx_size", "slots"])
_JSON_DIR = options.define_json_dir()


class Answer(NamedTuple):
    """Times of an answer, seconds of `time.time`.

    Attributes:
      asked, first, last: when it was asked for, and its first and last piece came.
      gap: longest time between two pieces.
    """

    asked: float
    first: float
    last: float
    gap: float

    @classmethod
    def of(cls, asked: float, pieces: Sequence[float]) -> "Answer":
        gaps = np.diff(pieces)
        return cls(asked, pieces[0], pieces[-1], float(gaps.max(initial=0)))


class Result(NamedTuple):
    """Of some clients: tokens/s while all were busy, median milliseconds to the first token, and
    the longest gap of 99 of 100 answers, in milliseconds."""

    rate: float
    first: float
    gap: float

    @classmethod
    def of(cls, answers: Sequence[Answer], clients: int, count: int) -> "Result":
        ends = sorted(answer.last for answer in answers)
        begin, end = ends[clients - 1], ends[-clients]
        if clients == 1:  # from the first request to the last, without the time between
            rate = 1 / statistics.median((a.last - a.first) / (count - 1) for a in answers)
        else:
            rate = sum(begin < one <= end for one in ends) * count / (end - begin)
        firsts = [1e3 * (a.first - a.asked) for a in answers]
        gaps = [1e3 * a.gap for a in answers]
        return cls(rate, statistics.median(firsts), float(np.quantile(gaps, 0.99)))


# Over HTTP: in processes of their own


async def _one_http(host: str, port: int, prompt: Sequence[int], count: int) -> Answer:
    """Sends a request and reads its stream."""
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "ignore_eos": True}
    data = json.dumps(body | {"stream": True}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    asked = time.time()
    writer.write(
        b"POST /completion HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\n"
        + f"Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    pieces, last = [], b""
    async for line in reader:
        if line.startswith(b"data: "):
            pieces.append(time.time())
            last = line
    writer.close()
    found = json.loads(last[6:])
    assert found["tokens_predicted"] == count, found
    return Answer.of(asked, pieces)


async def _clients_http(given: dict[str, Any]) -> list[Answer]:
    chance = random.Random(given["seed"])

    async def client() -> list[Answer]:
        await asyncio.sleep(chance.uniform(0, given["spread"]))
        answers = []
        for _ in range(given["each"]):
            prompt = [chance.randrange(given["vocab"]) for _ in range(given["prompt"])]
            answers.append(await _one_http(given["host"], given["port"], prompt, given["count"]))
        return answers

    found = await asyncio.gather(*(client() for _ in range(given["clients"])))
    return [answer for answers in found for answer in answers]


def over_http(url: str, clients: int, spread: float, vocab: int) -> Result:
    """The rate of clients of a server."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    processes, left = [], clients
    for seed in range(min(4, clients)):
        share = -(-left // (min(4, clients) - seed))
        left -= share
        given = {
            "clients": share,
            "seed": seed,
            "spread": spread,
            "vocab": vocab,
            "each": _EACH.value,
            "prompt": _PROMPT.value,
            "count": _COUNT.value,
            "host": host,
            "port": int(port),
        }
        command = [sys.executable, __file__, "--as_client=" + json.dumps(given)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    answers = []
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0
        answers += [Answer(*one) for one in json.loads(out)]
    return Result.of(answers, clients, _COUNT.value)


# Without HTTP


def in_process(lm: jaxsplit.LM, clients: int, spread: float) -> Result:
    """The rate of clients of the engine."""
    chance, answers = random.Random(0), []

    def client(delay: float, prompts: list[list[int]]) -> None:
        time.sleep(delay)
        for prompt in prompts:
            asked, pieces = time.time(), []
            for _ in lm.submit(prompt, _COUNT.value, ignore_eos=True, temperature=0.0):
                pieces.append(time.time())
            answers.append(Answer.of(asked, pieces))

    threads = []
    for _ in range(clients):
        prompts = [
            [chance.randrange(lm.config.vocab) for _ in range(_PROMPT.value)]
            for _ in range(_EACH.value)
        ]
        delay = chance.uniform(0, spread)
        threads.append(threading.Thread(target=client, args=(delay, prompts)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Result.of(answers, clients, _COUNT.value)


@contextlib.contextmanager
def _serving(lm: jaxsplit.LM) -> Iterator[str]:
    """Serves a model while the block runs; yields its URL."""
    from jaxsplit.server.config import ServerConfig
    from jaxsplit.server.run import Server
    from jaxsplit.server.service import Service

    ready = threading.Event()
    service = Service(ServerConfig(port=0, max_queue=4096), SamplingConfig(temperature=0.0))
    set_ready, service.set_ready = service.set_ready, lambda: (set_ready(), ready.set())
    server = Server(service, lambda: (lm, "model"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ready.wait()
    try:
        yield server.url
    finally:
        server.stop()
        thread.join()


def main(_: list[str]) -> None:
    file = model_file(_MODEL.value, _RANDOM.value)
    counts = [int(count) for count in _CLIENTS.value]
    context = _PROMPT.value + _COUNT.value
    values = options.values(_LOAD) | {"ctx_size": context, "slots": max(counts)}
    lm = jaxsplit.load(file, **values)
    print(lm.describe())
    rows = []
    with _serving(lm) as url:
        for clients in counts:
            spread = 0.0
            for _ in range(2):  # programs are compiled, some of them in the background
                start = time.time()
                in_process(lm, clients, spread)
                lm.engine.wait_for_programs()
                spread = (time.time() - start) / _EACH.value
            direct = in_process(lm, clients, spread)
            http = over_http(url, clients, spread, lm.config.vocab)
            print(
                f"{clients} clients: {http.rate:.0f} tokens/s, {http.rate / direct.rate:.1%} of "
                f"{direct.rate:.0f} without HTTP; first token {http.first:.1f} ms, without "
                f"{direct.first:.1f}; longest gap {http.gap:.0f} ms, without {direct.gap:.0f}",
                flush=True,
            )
            for metric, unit, value, limit in (
                ("128 + 128 tokens, over HTTP", "tokens/s", http.rate, direct.rate),
                ("first token, over HTTP", "ms", http.first, direct.first),
            ):
                rows.append(
                    record.make_row(
                        dict(lm.mesh.shape),
                        metric,
                        [value],
                        unit,
                        **model_and_type(file),
                        mode=values["split_mode"],
                        limit=limit,
                        sequences=clients,
                    )
                )
    record.save(rows, _JSON_DIR.value)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--as_client="):
        found = asyncio.run(_clients_http(json.loads(sys.argv[1].partition("=")[2])))
        json.dump(found, sys.stdout)
    else:
        run(main)
