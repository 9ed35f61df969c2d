"""Prefixes that the devices forgot come back from pinned memory and from disk as they were."""

import gc

import jax
import numpy as np
import pytest
from gpu import internals
from helpers import make_recipe, write_recipe

import jaxsplit

CONTEXT = 512


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama whose KV heads no two GPUs divide."""
    recipe = make_recipe("prefixes", heads=9, kv_heads=3, head_dim=64, embed=128, layers=1)
    recipe["metadata"] = [
        [key, kinds, CONTEXT if key.endswith("context_length") else value]
        for key, kinds, value in recipe["metadata"]
    ]
    path = tmp_path_factory.mktemp("prefixes") / "model.gguf"
    write_recipe(recipe, path, {"weight": "Q8_0"})
    return path


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_prefixes_come_back(model, tmp_path, cache_dtype):
    """As many tokens as the cache had, the same log-probabilities as while they were there."""
    prompts = np.random.default_rng(0).integers(0, 160, (4, 300)).tolist()
    devices = 2 if internals.INTERPRET else len(jax.devices())
    options = {"ctx_size": CONTEXT, "slots": 2, "cache_tokens": 2 * CONTEXT}
    options |= {"devices": devices, "cache_dtype": cache_dtype, "dtype": "bfloat16"}
    options |= {"kernels": "interpret"} if internals.INTERPRET else {}

    def run(lm, prompt):
        generation = lm.submit(prompt, 8, temperature=0.0, logprobs=0)
        events = [*generation]
        logprobs = [x.logprob for event in events for x in event.logprobs]
        return generation.request.cached_tokens, generation.request.tokens, logprobs

    results, cached = [], []
    for name, value in (("cache_ram", 64), *[("prompt_cache_dir", tmp_path)] * 2):
        lm = jaxsplit.load(model, **options, **{name: value})
        cached.append(run(lm, prompts[0])[0])
        question = prompts[0][:257]  # full pages, as the host has them
        run(lm, question)
        # Until then, programs of longer chunks serve, which round otherwise.
        lm.engine.wait_for_programs()
        results.append(run(lm, question))
        if name == "cache_ram":
            for prompt in prompts[1:]:
                run(lm, prompt)
            results.append(run(lm, question))
            assert lm.statistics.restored_tokens == 256
        thread = lm._thread._thread
        del lm
        gc.collect()
        thread.join(60)
        assert not thread.is_alive()
    assert cached == [0, 0, 256]
    names = "there", "from memory", "there, another load", "from disk"
    for name, (count, tokens, logprobs) in zip(names, results, strict=True):
        assert count == 256
        assert tokens == results[0][1]
        np.testing.assert_allclose(logprobs, results[0][2], rtol=0, atol=1e-6, err_msg=name)


def test_the_memory_is_there_from_the_start(model):
    if internals.INTERPRET:
        pytest.skip("CPUs pin nothing")
    with pytest.raises(jaxsplit.JaxsplitError, match="cannot be pinned|machine.s memory"):
        jaxsplit.load(model, devices=1, ctx_size=256, cache_ram=80 * 1024)
