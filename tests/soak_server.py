"""Keeps a server busy with streams, clients that hang up, and requests that are wrong.

  python tests/soak_server.py --minutes=5 --streams=64
  python tests/soak_server.py --minutes=5 --streams=64 --model=FILE.gguf

Every text that arrives is compared with the one that the engine gives alone (float32, without
kernels). At the end, no request, slot or page is left, and memory has not grown.
"""

import asyncio
import contextlib
import gc
import json
import logging
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import httpx
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parent))

from serving import serving  # noqa: E402
from tiny import write_tiny_model  # noqa: E402

import jaxsplit  # noqa: E402

_MINUTES = flags.DEFINE_float("minutes", 1.0, "how long")
_STREAMS = flags.DEFINE_integer("streams", 64, "clients at a time")
_MODEL = flags.DEFINE_string("model", None, "GGUF file (default: a tiny random model)")
_TOKENS = flags.DEFINE_integer("tokens", 64, "of an answer at most")
_SEED = flags.DEFINE_integer("seed", 0, "of the order of things")

_BAD = [
    b"{",
    b'{"prompt": 5}',
    b'{"prompt": [-1]}',
    b'{"prompt": "x", "temperature": -1}',
    b'{"prompt": "x", "nothing": 1}',
    b'{"prompt": "' + b"x" * 100_000 + b'"}',
    b'{"prompt": "x", "grammar": "root ::= ("}',
]


class Soak:
    """The clients."""

    def __init__(self, url: str, expected: list[tuple[dict, str]]):
        self._url, self._expected = url, expected
        self._random = random.Random(_SEED.value)
        self.counts = dict.fromkeys(("right", "hung up", "refused", "full", "wrong"), 0)

    async def client(self, end: float) -> None:
        """One client, until the end."""
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as http:
            while time.monotonic() < end:
                chance = self._random.random()
                if chance < 0.1:
                    await self._ask_wrongly(http)
                else:
                    await self._stream(http, hang_up=chance < 0.35)

    async def _ask_wrongly(self, http: httpx.AsyncClient) -> None:
        body = self._random.choice(_BAD)
        headers = {"Content-Type": "application/json"}
        response = await http.post("/completion", content=body, headers=headers)
        assert response.status_code == 400, response.text
        self.counts["refused"] += 1

    async def _stream(self, http: httpx.AsyncClient, *, hang_up: bool) -> None:
        body, expected = self._random.choice(self._expected)
        text, after = "", self._random.randrange(4)
        async with http.stream("POST", "/completion", json=body | {"stream": True}) as response:
            if response.status_code == 429:
                self.counts["full"] += 1
                await asyncio.sleep(0.1)
                return
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if hang_up and not after:
                    self.counts["hung up"] += 1
                    return
                after -= 1
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    assert "error" not in event, event
                    text += event["content"]
        self.counts["right" if text == expected else "wrong"] += 1


def _expected(lm: jaxsplit.LM) -> list[tuple[dict, str]]:
    """Requests, and their texts alone."""
    chance, found = random.Random(_SEED.value), []
    beginning = [chance.randrange(256) for _ in range(40)]
    for i in range(24):
        prompt = [chance.randrange(256) for _ in range(chance.randrange(1, 100))]
        if i % 3 == 0:
            prompt = beginning + prompt
        count = chance.randrange(1, _TOKENS.value)
        options = {"temperature": chance.choice([0.0, 1.0]), "seed": i, "ignore_eos": True}
        text = lm.generate(prompt, count, **options)
        found.append(({"prompt": prompt, "n_predict": count, **options}, text))
    return found


def _memory() -> float:
    """Resident MiB of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


async def _run(soak: Soak, minutes: float) -> None:
    end = time.monotonic() + 60 * minutes
    await asyncio.gather(*(soak.client(end) for _ in range(_STREAMS.value)))


def main(_: list[str]) -> None:
    with contextlib.ExitStack() as stack:
        model = _MODEL.value
        if model is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            model = write_tiny_model(Path(folder) / "tiny.gguf", context=512)
        options = {"dtype": "float32", "kernels": "xla", "slots": 8, "ctx_size": 512}
        for name in ("httpx", "jaxsplit.server"):
            logging.getLogger(name).setLevel(logging.WARNING)
        lm = jaxsplit.load(model, **options, cache_tokens=2048)
        expected = _expected(lm)
        server = stack.enter_context(serving(lm))
        soak = Soak(server.url, expected)
        asyncio.run(_run(soak, _MINUTES.value / 2))  # compiles what is missing
        before = _memory()
        asyncio.run(_run(soak, _MINUTES.value))
        end = time.monotonic() + 30
        while lm.statistics.running + lm.statistics.waiting and time.monotonic() < end:
            time.sleep(0.1)
        print(soak.counts, lm.statistics, f"memory {before:.0f} -> {_memory():.0f} MiB")
        assert not soak.counts["wrong"]
        assert not lm.statistics.running + lm.statistics.waiting
        lm.run(lambda: None)
        lm._thread.run(lambda scheduler: scheduler.check_pages())
        assert _memory() < before * 1.1 + 20
        left = httpx.get(f"{server.url}/slots").json()
        assert not any(slot["is_processing"] for slot in left), left


if __name__ == "__main__":
    app.run(main)
