"""Several sequences at once: slots over the `data` axis, and micro-batches over the stages."""

import dataclasses

import numpy as np
import pytest
from helpers import GREEDY, continuation, last_tokens, make_recipe
from tiny import fresh_rng

from jaxsplit.engine import SamplingConfig

SLOTS = 4
COUNT = 8
MODEL = make_recipe("slots", heads=9, kv_heads=3, layers=3)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def prompts():
    """Of different lengths, one of them longer than a chunk."""
    rng = fresh_rng()
    return [rng.integers(0, 160, length).tolist() for length in (5, 40, 1, 19)]


@pytest.fixture(scope="module")
def one(load, recipe_gguf):
    return load(recipe_gguf(MODEL), split_mode="none")


MESHES = ["stage:2", "stage:3", "data:2", "data:2,stage:2", "data:2,tensor:2"]
# Interpreted kernels transfer only between stages of one device.
BY_KERNELS = ["stage:2", "stage:3"]


@pytest.fixture(
    scope="module",
    params=[*((mesh, False) for mesh in MESHES), *((mesh, True) for mesh in BY_KERNELS)],
    ids=str,
)
def lm(request, load, recipe_gguf):
    mesh, kernels = request.param
    found = load(recipe_gguf(MODEL), mesh=mesh, slots=SLOTS, kernels=kernels)
    assert found.engine.loops == kernels
    assert ("stages transfer" in found.describe()) == kernels
    return found


def test_the_host_transfers_without_peer_access(load, recipe_gguf, one, prompts):
    options = {"mesh": "stage:2", "slots": SLOTS, "kernels": True}
    through_kernels = load(recipe_gguf(MODEL), **options)
    assert through_kernels.describe().endswith("| stages transfer through peer access")
    lm = load(recipe_gguf(MODEL), collectives="nccl", **options)
    assert lm.describe().endswith("| stages transfer through the host")
    assert not lm.engine.loops
    lm.closed_batch.start_all(dict(enumerate(prompts)), GREEDY)
    assert texts(lm.closed_batch) == [
        continuation(one.closed_batch, p, GREEDY, COUNT) for p in prompts
    ]


def texts(engine, count=COUNT):
    """The texts of all slots that have been started."""
    first = np.asarray(last_tokens(engine))[:, None]
    return np.concatenate([first, engine.loop(count, count)], axis=1).tolist()


def test_prompts_that_start_together_have_their_own_texts(lm, one, prompts):
    alone = [continuation(one.closed_batch, prompt, GREEDY, COUNT) for prompt in prompts]
    lm.closed_batch.start_all(dict(enumerate(prompts)), GREEDY)
    assert texts(lm.closed_batch) == alone
    # In other slots, where other texts have been.
    lm.closed_batch.start_all({(slot + 1) % SLOTS: prompts[slot] for slot in range(SLOTS)}, GREEDY)
    assert texts(lm.closed_batch) == alone[-1:] + alone[:-1]


def test_prompts_that_start_one_after_the_other_have_their_own_texts(lm, one, prompts):
    alone = [continuation(one.closed_batch, prompt, GREEDY, COUNT) for prompt in prompts]
    for slot in (2, 0, 3, 1):
        lm.closed_batch.start(prompts[slot], GREEDY, slot=slot)
    assert texts(lm.closed_batch) == alone


def test_a_slot_is_started_while_others_go_on(lm, one, prompts):
    alone = [continuation(one.closed_batch, prompt, GREEDY, 2 * COUNT) for prompt in prompts]
    lm.closed_batch.start_all(dict(enumerate(prompts)), GREEDY)
    before = texts(lm.closed_batch)
    lm.closed_batch.start(prompts[0], GREEDY, slot=2)
    after = texts(lm.closed_batch)
    for slot in (0, 1, 3):
        assert before[slot] + after[slot][1:] == alone[slot]
    assert after[2] == alone[0][: COUNT + 1]


def test_each_slot_has_its_own_way_of_sampling(lm, one, prompts):
    base = SamplingConfig(top_k=20, repeat_penalty=1.2, repeat_last_n=16)
    configs = [
        dataclasses.replace(base, seed=int(seed), temperature=0.5 + slot / 2)
        for slot, seed in enumerate(fresh_rng().integers(0, 2**32, SLOTS))
    ]
    alone = [
        continuation(one.closed_batch, prompt, config, COUNT)
        for prompt, config in zip(prompts, configs, strict=True)
    ]
    lm.closed_batch.start_all(dict(enumerate(prompts)), configs)
    assert texts(lm.closed_batch) == alone


def test_slots_that_sample_in_other_ways_run_together(lm, one, prompts):
    configs = [
        SamplingConfig(top_k=20, temperature=2.0),
        SamplingConfig(top_k=0, temperature=1.5, seed=3),
        GREEDY,
        SamplingConfig(repeat_penalty=1.3, repeat_last_n=5, seed=8),
    ]
    alone = [
        continuation(one.closed_batch, prompt, config, COUNT)
        for prompt, config in zip(prompts, configs, strict=True)
    ]
    lm.closed_batch.reset()
    for slot in (2, 0, 3, 1):
        lm.closed_batch.start(prompts[slot], configs[slot], slot=slot)
    assert texts(lm.closed_batch) == alone


@pytest.mark.parametrize("mesh", ["stage:2", "data:2", "data:2,stage:2", "data:2,tensor:2"])
def test_slots_that_have_nothing_to_do_stay_empty(load, recipe_gguf, one, prompts, mesh):
    """Three slots, where the mesh has room for four, and one of them started."""
    lm = load(recipe_gguf(MODEL), mesh=mesh, slots=3)
    lm.closed_batch.start(prompts[1], GREEDY, slot=1)
    found = lm.closed_batch.loop(COUNT, COUNT)
    assert found.shape == (3, COUNT)
    assert found[1].tolist() == continuation(one.closed_batch, prompts[1], GREEDY, COUNT)[1:]
    assert (found[[0, 2]] == -1).all()


def test_slots_end_on_their_own(load, recipe_gguf, one, prompts):
    """Each at the end of its context, the others go on."""
    for mesh in ("stage:2", "data:2", "data:2,tensor:2"):
        lm = load(recipe_gguf(MODEL), mesh=mesh, slots=SLOTS, ctx_size=44)
        lm.engine.loops |= len(lm.models) == 1  # on the devices, as on GPUs
        lm.closed_batch.start_all(dict(enumerate(prompts)), GREEDY)
        found = lm.closed_batch.loop(COUNT, COUNT)
        for slot, prompt in enumerate(prompts):
            room = min(COUNT, 44 - len(prompt))
            text = continuation(one.closed_batch, prompt, GREEDY, COUNT)[1 : room + 1]
            assert found[slot].tolist() == text + [-1] * (COUNT - room)
