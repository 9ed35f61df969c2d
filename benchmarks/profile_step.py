"""Profile of a decode step: the time of each kernel on each GPU.

  python benchmarks/profile_step.py --random=llama-8b:Q4_K_M -b 8
  python benchmarks/profile_step.py --model=FILE.gguf --split=graph@tensor:2 --sequence

The host launches the steps one by one, since the profiler does not see kernels in a loop on the
device. A kernel launched early (programmatic dependent launch) counts with its wait for the
previous one.
"""

import collections
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

import jaxsplit
from jaxsplit.bench.measure import WARM_UP, markdown
from jaxsplit.bench.random_model import model_file
from jaxsplit.cli.program import run
from jaxsplit.errors import JaxsplitError

_MODEL = flags.DEFINE_string("model", None, "GGUF file or checkpoint")
_RANDOM = flags.DEFINE_string("random", None, "random weights instead, such as llama-8b:Q4_K_M")
_SPLIT = flags.DEFINE_string("split", "graph", "MODE or MODE@MESH, such as graph@tensor:2")
_BATCH = flags.DEFINE_integer("batch", 1, "sequences that are decoded together", 1, short_name="b")
_DEPTH = flags.DEFINE_integer("n_depth", 1, "tokens of context before", 1, short_name="d")
_STEPS = flags.DEFINE_integer("steps", 4, "how many to measure", lower_bound=1)
_SEQUENCE = flags.DEFINE_bool("sequence", False, "kernels of the middle of a step, one by one")

_SHOWN = 32  # kernels of a sequence
_COLUMNS = {
    "kernel": "kernel",
    "launches": "a step",
    "each": "µs each",
    "total": "µs a step",
    "share": "share",
}


class _Event(NamedTuple):
    """A kernel or a copy on a GPU; times in ns."""

    start: float
    duration: float
    name: str


def _profiled(lm: jaxsplit.LM) -> dict[str, list[_Event]]:
    """Events of each GPU in some steps, in order."""
    batch, rng = lm.closed_batch, np.random.default_rng(0)
    prompts = {
        slot: rng.integers(0, lm.config.vocab, _DEPTH.value).tolist()
        for slot in range(_BATCH.value)
    }
    batch.start_all(prompts, jaxsplit.SamplingConfig(temperature=0.0))

    def steps(count: int) -> None:
        for _ in range(count):
            batch.step()
        batch.read(batch.tokens())

    steps(WARM_UP + 1)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps(_STEPS.value)
        [file] = Path(folder).glob("**/*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        return {
            plane.name: sorted(
                _Event(event.start_ns, event.duration_ns, event.name)
                for line in plane.lines
                if line.name.startswith("Stream")
                for event in line.events
            )
            for plane in planes
            if "GPU" in plane.name
        }


def _rows(events: list[_Event]) -> Iterator[dict[str, str]]:
    """Kernels by their share of a step."""
    by_name = collections.defaultdict(list)
    for event in events:
        by_name[event.name].append(event.duration / 1e3)
    whole = sum(map(sum, by_name.values()))
    for name, took in sorted(by_name.items(), key=lambda item: -sum(item[1])):
        yield {
            "kernel": name,
            "launches": f"{len(took) / _STEPS.value:.1f}",
            "each": f"{np.mean(took):.1f}",
            "total": f"{sum(took) / _STEPS.value:.0f}",
            "share": f"{sum(took) / whole:.0%}",
        }


def main(_: list[str]) -> None:
    """Profiles a model and prints a table for each GPU."""
    if jax.default_backend() != "gpu":
        raise JaxsplitError(f"there is no GPU to profile, only {jax.default_backend()} devices")
    file = model_file(_MODEL.value, _RANDOM.value)
    mode, _, mesh = _SPLIT.value.partition("@")
    lm = jaxsplit.load(
        file,
        split_mode=mode,
        mesh=mesh or None,
        ctx_size=_DEPTH.value + max(512, WARM_UP + _STEPS.value + 2),
        slots=_BATCH.value,
    )
    print(lm.describe())
    for name, events in _profiled(lm).items():
        print(f"\n{name}\n\n{markdown(list(_rows(events)), _COLUMNS)}")
        if _SEQUENCE.value:
            print("\nµs since the kernel before has ended, its name, and µs that it took")
            middle = len(events) // 2
            for before, event in itertools.pairwise(events[middle - 1 : middle + _SHOWN]):
                gap = event.start - before.start - before.duration
                print(f"{gap / 1e3:6.1f}  {event.name:40} {event.duration / 1e3:6.1f}")


if __name__ == "__main__":
    run(main)
