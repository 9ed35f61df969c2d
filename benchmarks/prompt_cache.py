"""Milliseconds to the first token of a prompt whose prefix is on the devices, in the host's memory,
on disk, or nowhere.

  python benchmarks/prompt_cache.py --random=llama-8b:Q4_K_M
  python benchmarks/prompt_cache.py --random=llama-tiny:Q4_K_M --tokens=512

- `computed`: the prompt is read.
- `devices`: all of it but the last page is in the cache.
- `memory`: other prompts have taken its pages; it is restored by `--cache_ram`.
- `disk`: another process might have saved it; it is restored by `--prompt_cache_dir`.
- `gap`: the longest wait between tokens of another sequence while prompts take one another's pages,
  with `--cache_ram` and without.
"""

import gc
import statistics
import tempfile
import threading
import time
from typing import Any

import numpy as np
from absl import flags

import jaxsplit
from jaxsplit.bench.random_model import model_file
from jaxsplit.cli import options
from jaxsplit.cli.program import run
from jaxsplit.config import LoadConfig

_MODEL = flags.DEFINE_string("model", None, "GGUF file or checkpoint")
_RANDOM = flags.DEFINE_string("random", None, "random weights instead, such as llama-8b:Q4_K_M")
_TOKENS = flags.DEFINE_integer("tokens", 4096, "of a prompt", 257)
_REPEAT = flags.DEFINE_integer("repetitions", 3, "how often to measure", 1, short_name="r")
_LOAD = options.define(
    LoadConfig, skip=["ctx_size", "slots", "cache_tokens", "prompt_cache_dir"], cache_ram=8192
)


class Prompts:
    """A loaded model and random prompts, of which its cache holds two."""

    def __init__(self, file: Any, **changed: Any):
        length = _TOKENS.value
        room = {"ctx_size": length + 512, "slots": 4, "cache_tokens": 5 * length // 2}
        self.lm = jaxsplit.load(file, **options.values(_LOAD) | room | changed)
        rng = np.random.default_rng(0)
        self.prompts = rng.integers(0, self.lm.config.vocab, (4 + _REPEAT.value, length)).tolist()
        for prompt in self.prompts[-2:]:
            self.read(prompt)  # compiles

    def read(self, prompt: list[int]) -> tuple[float, int, list[int]]:
        """Milliseconds to the first token, tokens cached, and tokens generated."""
        request = self.lm.submit(prompt, 8, temperature=0.0, ignore_eos=True).result().request
        times = request.timings
        return 1e3 * (times.first_token - times.submitted), request.cached_tokens, request.tokens

    def forget(self) -> None:
        """Takes all pages for others."""
        for prompt in self.prompts[-3:]:
            self.read(prompt)

    def gap(self) -> float:
        """Milliseconds that another sequence waits for tokens at most."""
        thread = threading.Thread(target=lambda: [self.forget() for _ in range(2)])
        stream = self.lm.submit(self.prompts[0][:64], 400, temperature=0.0, ignore_eos=True)
        gaps, last = [], 0.0
        thread.start()
        for _ in stream:
            gaps.append(time.perf_counter() - last)
            last = time.perf_counter()
        thread.join()
        return 1e3 * max(gaps[2:])

    def close(self) -> None:
        """Waits until prefixes are saved."""
        thread = self.lm._thread._thread
        del self.lm
        gc.collect()
        thread.join()


def report(name: str, measured: list[tuple[float, int, list[int]]], expected: Any) -> None:
    """Prints a row."""
    same = all(tokens == expected for *_, tokens in measured)
    milliseconds = statistics.median(value for value, *_ in measured)
    cached = sorted({count for _, count, _ in measured})
    print(f"| {name} | {milliseconds:.1f} | {cached} | {same} |", flush=True)


def main(_: list[str]) -> None:
    """Measures, in this order: what is compiled and cached depends on it."""
    file = model_file(_MODEL.value, _RANDOM.value)
    print("| prefix | ms | tokens cached | same text |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        on = Prompts(file)
        first, count = on.prompts[0], _REPEAT.value
        computed = [on.read(first)]
        expected = computed[0][2]
        report("computed", computed, expected)
        report("devices", [on.read(first) for _ in range(count)], expected)
        restored = []
        for _ in range(count + 1):
            on.forget()
            restored.append(on.read(first))
        report("memory", restored[1:], expected)
        print(f"| gap, cache_ram | {on.gap():.1f} | | |", flush=True)
        on.close()
        off = Prompts(file, cache_ram=0, prompt_cache_dir=folder)
        print(f"| gap | {off.gap():.1f} | | |", flush=True)
        saved = off.prompts[1]
        expected = [off.read(saved) for _ in range(2)][0][2]
        off.close()
        loaded = []
        for _ in range(count):
            again = Prompts(file, cache_ram=0, prompt_cache_dir=folder)
            again.read(again.prompts[2])
            loaded.append(again.read(saved))
            again.close()
        report("disk", loaded, expected)


if __name__ == "__main__":
    run(main)
