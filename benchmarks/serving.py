"""Many sequences at once, through the scheduler, each figure beside what bounds it.

  python benchmarks/serving.py --random=llama-8b:Q4_K_M
  JAX_NUM_CPU_DEVICES=2 python benchmarks/serving.py --random=llama-tiny:Q4_K_M --scale=16

- `single`: tokens/s of one sequence, beside a decode loop without a scheduler.
- `arrivals`: output tokens/s of a constant number of requests of 128 + 128 tokens that begin at
  random times, beside reading and decoding them all together.
- `packed`: milliseconds until 16 prompts of 128 tokens have their first tokens.
- `shared`: milliseconds to the first token of a prompt that shares 4096 tokens with an earlier one.
- `schema`: tokens/s of 8 sequences under a JSON schema, beside the same without one.
- `budget`: how long a prompt of 16384 tokens delays the tokens of 8 sequences, beside the budget.
"""

import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

import jaxsplit
from jaxsplit.bench import record
from jaxsplit.bench.random_model import model_and_type, model_file
from jaxsplit.cli import options
from jaxsplit.cli.program import run
from jaxsplit.config import LoadConfig
from jaxsplit.engine import ClosedBatch

_MODEL = flags.DEFINE_string("model", None, "GGUF file or checkpoint")
_RANDOM = flags.DEFINE_string("random", None, "random weights instead, such as llama-8b:Q4_K_M")
_REQUESTS = flags.DEFINE_integer("requests", 128, "requests of `arrivals`", 1)
_SEQUENCES = flags.DEFINE_integer("sequences", 32, "at a time, of `arrivals`", 1)
_SCALE = flags.DEFINE_integer("scale", 1, "divide all lengths by this, to try it on a CPU", 1)
_REPEAT = flags.DEFINE_integer("repetitions", 3, "how often to measure", 1, short_name="r")
_TESTS = flags.DEFINE_list("tests", "single,packed,shared,arrivals,schema,budget", "which to run")
_LOAD = options.define(LoadConfig, skip=["ctx_size", "slots"])
_JSON_DIR = options.define_json_dir()


# A list that never ends.
_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
    "minItems": 10**6,
}


class Serving:
    """A loaded model and its measurements."""

    def __init__(self, lm: jaxsplit.LM):
        self.lm = lm
        self._rng = np.random.default_rng(0)

    def prompt(self, length: int) -> list[int]:
        """Random ids."""
        return self._rng.integers(0, self.lm.config.vocab, length).tolist()

    def submit(self, prompt: list[int], count: int) -> Any:
        return self.lm.submit(prompt, count, ignore_eos=True, temperature=0.0)

    def single(self, count: int) -> tuple[float, float]:
        """Tokens/s of one sequence, and of a loop without a scheduler."""
        request = self.submit(self.prompt(1), count).result().request
        times = request.timings
        batch, greedy = ClosedBatch(self.lm.engine, 1), jaxsplit.SamplingConfig(temperature=0.0)

        def loop() -> float:
            batch.start(self.prompt(1), greedy)
            batch.read(batch.tokens())
            start = time.perf_counter()
            batch.loop(count, count)
            return count / (time.perf_counter() - start)

        return (count - 1) / (times.last_token - times.first_token), self.lm.run(loop)

    def packed(self, prompts: int, length: int) -> float:
        """Milliseconds until all prompts have their first token."""
        given = [self.prompt(length) for _ in range(prompts)]
        start = time.perf_counter()
        found = [self.submit(prompt, 1) for prompt in given]
        return 1e3 * (max(x.result().request.timings.first_token for x in found) - start)

    def shared(self, length: int, more: int) -> float:
        """Milliseconds to the first token of a prompt whose beginning is known."""
        prefix = self.prompt(length)
        self.submit(prefix + self.prompt(more), 2).result()
        request = self.submit(prefix + self.prompt(more), 1).result().request
        assert request.cached_tokens >= length, request.cached_tokens
        return 1e3 * (request.timings.first_token - request.timings.submitted)

    def together(self, sequences: int, length: int, count: int) -> float:
        """Output tokens/s of a closed batch: all begin together, and end together."""
        found = [self.submit(self.prompt(length), count) for _ in range(sequences)]
        done = [x.result().request.timings for x in found]
        seconds = max(t.last_token for t in done) - min(t.submitted for t in done)
        return sequences * count / seconds

    def arrivals(self, requests: int, sequences: int, length: int, count: int) -> float:
        """Output tokens/s of clients that each send a request after the other."""
        prompts = iter([self.prompt(length) for _ in range(requests)])
        lock, ends = threading.Lock(), []
        chance = random.Random(0)
        spread = sequences * count / self.together(sequences, length, count)
        start = time.perf_counter()

        def client(delay: float) -> None:
            time.sleep(delay)
            while True:
                with lock:
                    prompt = next(prompts, None)
                if prompt is None:
                    return
                ends.append(self.submit(prompt, count).result().request.timings.last_token)

        delays = [chance.uniform(0, spread) for _ in range(sequences)]
        threads = [threading.Thread(target=client, args=(delay,)) for delay in delays]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # While as many as there are clients are being served.
        first, last = start + spread, sorted(ends)[-sequences]
        return sum(first <= end <= last for end in ends) * count / (last - first)

    def schema(self, sequences: int, length: int, count: int) -> tuple[float, float]:
        """Tokens/s of sequences whose texts satisfy a JSON schema, and without one."""

        def rate(grammar: jaxsplit.Grammar | None) -> float:
            found = [
                self.lm.submit(self.prompt(length), count, ignore_eos=True, grammar=grammar)
                for _ in range(sequences)
            ]
            done = [x.result().request for x in found]
            assert all(len(request.tokens) == count for request in done)
            seconds = max(x.timings.last_token for x in done) - max(
                x.timings.first_token for x in done
            )
            return sequences * (count - 1) / seconds

        return rate(jaxsplit.Grammar("json_schema", json.dumps(_SCHEMA))), rate(None)

    def budget(self, sequences: int, length: int, count: int) -> float:
        """Longest time between two pieces of text of other sequences while a long prompt is read, a
        chunk and a block, in milliseconds."""
        gaps: list[tuple[float, float]] = []
        lock = threading.Lock()

        def client() -> None:
            before = None
            for _ in self.submit(self.prompt(16), count):
                now = time.perf_counter()
                if before is not None:
                    with lock:
                        gaps.append((now, now - before))
                before = now

        threads = [threading.Thread(target=client) for _ in range(sequences)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        start = time.perf_counter()
        request = self.submit(self.prompt(length), 1).result().request
        end = request.timings.first_token
        for thread in threads:
            thread.join()
        during = [gap for at, gap in gaps if start < at < end + 0.05]
        usual = [gap for at, gap in gaps if at < start]
        print(f"  the prompt took {end - start:.2f} s")
        print(f"  usual: {statistics.median(usual[len(usual) // 2 :]):.4f} s")
        return 1e3 * max(during, default=0.0)


def main(_: list[str]) -> None:
    n = _SCALE.value
    file = model_file(_MODEL.value, _RANDOM.value)
    values_of = options.values(_LOAD) | {"ctx_size": 20480 // n, "slots": _SEQUENCES.value}
    lm = jaxsplit.load(file, **values_of)
    print(lm.describe(), f"| cache of {lm.engine.size.pages * lm.engine.size.page:,} tokens")
    serving, rows = Serving(lm), []

    def measure(
        name: str, unit: str, function: Callable[[], Any], limit: float | None = None, **fields: Any
    ) -> list:
        for _ in range(2):  # programs are compiled, some of them in the background
            function()
            lm.engine.wait_for_programs()
        found = [function() for _ in range(_REPEAT.value)]
        values = [x[0] if isinstance(x, tuple) else x for x in found]
        limits = [x[1] for x in found if isinstance(x, tuple)]
        bound = statistics.median(limits) if limits else limit
        print(
            f"{name}: {statistics.median(values):.4g} {unit} ({min(values):.4g} to "
            f"{max(values):.4g}); bound {bound and f'{bound:.4g}'}",
            flush=True,
        )
        rows.append(
            record.make_row(
                dict(lm.mesh.shape),
                name,
                values,
                unit,
                **model_and_type(file),
                mode=values_of["split_mode"],
                limit=bound,
                **fields,
            )
        )
        return values

    many, wanted = _SEQUENCES.value, _TESTS.value
    if "single" in wanted:
        measure("decode, scheduled", "tokens/s", lambda: serving.single(256 // n))
    if "packed" in wanted:
        measure(
            "first tokens of 16 prompts of 128",
            "ms",
            lambda: serving.packed(16, 128 // n),
            sequences=16,
        )
    if "shared" in wanted:
        measure(
            "first token after 4096 shared ones", "ms", lambda: serving.shared(4096 // n, 32 // n)
        )
    if "arrivals" in wanted:
        shape = 128 // n, 128 // n
        together = measure(
            "128 + 128 tokens, together",
            "tokens/s",
            lambda: serving.together(many, *shape),
            sequences=many,
        )
        measure(
            "128 + 128 tokens, at random times",
            "tokens/s",
            lambda: serving.arrivals(_REQUESTS.value, many, *shape),
            limit=statistics.median(together),
            sequences=many,
        )
    if "schema" in wanted:
        measure(
            "under a JSON schema",
            "tokens/s",
            lambda: serving.schema(8, 128 // n, 512 // n),
            sequences=8,
        )
    if "budget" in wanted:
        measure(
            "longest wait for a prompt of 16384",
            "ms",
            lambda: serving.budget(8, 16384 // n, 1500 // n),
            sequences=8,
        )
    print(lm.statistics)
    record.save(rows, _JSON_DIR.value)


if __name__ == "__main__":
    run(main)
