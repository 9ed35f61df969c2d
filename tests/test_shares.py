"""How much of a model each device holds, and the shares that `tensor_split` asks for."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from helpers import DATA, Q8_0, SHAPES, bytes_by_device, continuation, make_recipe, nmse
from tiny import fresh_rng

import jaxsplit
from jaxsplit.architectures import model_config
from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import open_gguf
from jaxsplit.sharding import parse_shares, share_layers
from jaxsplit.weights import layer_costs, parameter_sources, split_model, stage_bytes

MIXED = DATA / "quant" / "quant-mix-Q4_K_M.gguf"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def tokens():
    return fresh_rng().integers(0, 160, 37).tolist()


def opened(path):
    """What `split_model` and `stage_bytes` need to know of a file."""
    file = open_gguf(path)
    config = model_config(file)
    return parameter_sources(file, config), config


def held(lm):
    """Bytes of parameters on each device."""
    return bytes_by_device([runner.params for runner in lm.engine.runners])


# Runs of layers


def cost_of(runs, costs, shares):
    """What `share_layers` makes least; None for a run without a share that is not empty."""
    total = 0.0
    for run, share in zip(runs, shares, strict=True):
        size = sum(costs[i] for i in run)
        if share == 0 and size > 0:
            return None
        total += size**2 / share if share else 0.0
    return total


def all_runs(layers, count):
    """All ways to cut a row of layers into runs."""
    for cuts in itertools.combinations_with_replacement(range(layers + 1), count - 1):
        yield [range(*pair) for pair in itertools.pairwise((0, *cuts, layers))]


def test_runs_of_layers_are_as_near_to_the_shares_as_can_be():
    rng = fresh_rng()
    for _ in range(150):
        layers, count = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        costs = rng.uniform(0.1, 5, layers).tolist()
        shares = (rng.uniform(0.1, 5, count) * (rng.random(count) < 0.8)).tolist()
        shares[int(rng.integers(count))] = 1.0
        runs = share_layers(costs, shares)
        assert [i for run in runs for i in run] == list(range(layers)), "each layer once, in order"
        assert all(not run for run, share in zip(runs, shares, strict=True) if share == 0)
        sizes = [cost_of(others, costs, shares) for others in all_runs(layers, count)]
        least = min(size for size in sizes if size is not None)
        assert cost_of(runs, costs, shares) == pytest.approx(least, rel=1e-9), (costs, shares)


@pytest.mark.parametrize(
    ("layers", "shares", "sizes"),
    [
        (12, [1, 1, 1], [4, 4, 4]),
        (12, [2, 1], [8, 4]),
        (12, [1, 0, 3], [3, 0, 9]),
        (12, [0, 0, 5], [0, 0, 12]),
        (2, [1, 1, 1, 1], None),
        (7, [1e-6, 1e6], [0, 7]),
    ],
)
def test_equal_layers_are_shared_out(layers, shares, sizes):
    found = [len(run) for run in share_layers([1.0] * layers, shares)]
    assert sum(found) == layers
    if sizes:
        assert found == sizes
    else:
        assert max(found) == 1, "more than one layer where others have none"


def test_a_dear_layer_makes_a_short_run():
    assert share_layers([1, 1, 1, 1, 1, 5], [1, 1]) == [range(0, 5), range(5, 6)]


# Bytes


@pytest.mark.parametrize("weights", [None, "bfloat16"])
@pytest.mark.parametrize("file", ["Q8_0", "mixed"])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("none", {}),
        *((mode, {"devices": 3}) for mode in ("graph", "row", "layer")),
        ("graph", {"devices": 3, "tensor_split": "3,1,2"}),
    ],
    ids=["none", "graph", "row", "layer", "shares"],
)
def test_bytes_of_a_stage_are_those_on_its_devices(recipe_gguf, file, mode, options, weights):
    path = MIXED if file == "mixed" else recipe_gguf(SHAPES["9-3"], Q8_0)
    lm = jaxsplit.load(
        path, split_mode=mode, dtype="float32", weights=weights or "quantized", **options
    )
    sources, config = opened(path)
    stored = None if weights is None else jnp.dtype(weights)
    expected = {}
    for stage in lm.engine.partition.stages:
        size, extra = stage_bytes(sources, config, stage, stored)
        assert 0 <= extra < size
        for device in stage.mesh.devices.flat:
            expected[device] = expected.get(device, 0) + size
    assert held(lm) == expected
    assert lm.weight_bytes == max(expected.values())


def test_what_divides_evenly_needs_no_extra_bytes(recipe_gguf):
    recipe = make_recipe("even", heads=8, kv_heads=8, mlp=256)
    recipe["tensors"][0]["shape"] = recipe["tensors"][2]["shape"] = (128, 164)
    sources, config = opened(recipe_gguf(recipe | {"name": "even-vocab"}))
    for devices, mode in itertools.product((2, 4), ("graph", "row")):
        partition = split_model(sources, config, mode, {"tensor": devices}, None)
        assert stage_bytes(sources, config, partition.stages[0])[1] == 0
    sources, config = opened(recipe_gguf(SHAPES["9-3"]))
    whole, none = stage_bytes(
        sources, config, split_model(sources, config, "none", {"tensor": 1}, None).stages[0]
    )
    assert none == 0
    # Nine heads on two devices: three groups of three become four, and the rows of norms are on
    # every device without counting as copies.
    (stage,) = split_model(sources, config, "graph", {"tensor": 2}, None).stages
    part, extra = stage_bytes(sources, config, stage)
    norms = (2 * config.layers + 1) * config.embed * 4
    assert part - extra == pytest.approx((whole - norms) / 2 + norms, abs=1)
    assert extra > 0


def test_each_device_holds_its_share(load, recipe_gguf):
    recipe = make_recipe("even", heads=8, kv_heads=8, mlp=256)
    one = load(recipe_gguf(recipe), split_mode="none")
    for mode in ("graph", "row"):
        four = load(recipe_gguf(recipe), split_mode=mode, devices=4)
        assert four.cache_bytes == one.cache_bytes / 4
        assert four.weight_bytes < one.weight_bytes / 4 * 1.05  # norms are on every device
        assert len(four.mesh.devices.flat) == 4
        kernel = four.model.blocks[0].mlp.up.kernel.get_value()
        assert kernel.addressable_shards[3].data.shape == (64, 128)


# Shares


def test_runs_follow_the_shares(load, recipe_gguf, tokens):
    path = recipe_gguf(make_recipe("deep", heads=2, kv_heads=1, layers=8))
    sources, config = opened(path)
    costs = layer_costs(sources, config)
    for shares in ([1, 1], [3, 1], [1, 2, 1], [1, 0, 1], [0, 1, 3]):
        partition = split_model(
            sources, config, "layer", {"stage": len(shares)}, None, shares=shares
        )
        runs = [run for run in share_layers(costs, shares) if run]
        assert [stage.layers for stage in partition.stages] == runs
        used = [share for share in shares if share]
        assert len(runs) == len(used)
        for run, share in zip(runs, used, strict=True):
            part = sum(costs[i] for i in run) / sum(costs)
            # Off by less than the layer that is cut in half.
            assert abs(part - share / sum(shares)) < max(costs) / sum(costs)


def test_a_stage_without_a_share_is_left_out(load, recipe_gguf, tokens):
    path = recipe_gguf(make_recipe("left-out", heads=6, kv_heads=1, layers=3))
    one = load(path, split_mode="none")
    lm = load(path, split_mode="layer", devices=3, tensor_split="2,0,1")
    assert [stage.layers for stage in lm.engine.partition.stages] == [range(0, 2), range(2, 3)]
    assert list(held(lm)) == [jax.devices()[0], jax.devices()[2]]
    assert nmse(lm.logits(tokens), one.logits(tokens)) <= 1e-9
    assert continuation(lm.closed_batch, tokens) == continuation(one.closed_batch, tokens)


@pytest.mark.parametrize(
    ("mode", "shares"), [("graph", "3,1"), ("graph", "1,3"), ("row", "3,1"), ("graph", "2,4,0,2")]
)
def test_devices_of_a_stage_hold_their_shares(load, recipe_gguf, tokens, mode, shares):
    """Some layers run on the devices with the largest shares only."""
    path = recipe_gguf(make_recipe("shared", heads=8, kv_heads=8, mlp=256, layers=4))
    one = load(path, split_mode="none")
    wanted = parse_shares(shares)
    lm = load(path, split_mode=mode, devices=len(wanted), tensor_split=shares)
    stages = [set(stage.mesh.devices.flat) for stage in lm.engine.partition.stages]
    assert all(small < large for small, large in itertools.pairwise(stages))
    parts = held(lm)
    for device, share in zip(jax.devices(), wanted, strict=False):
        # A layer of four is not cut, and the head of the last stage goes with it.
        part = parts.get(device, 0) / sum(parts.values())
        assert abs(part - share / sum(wanted)) < 0.06
    assert nmse(lm.logits(tokens), one.logits(tokens)) <= 1e-9
    assert nmse(lm.logits(tokens[:7], one_by_one=True), one.logits(tokens[:7])) <= 1e-9
    assert continuation(lm.closed_batch, tokens) == continuation(one.closed_batch, tokens)


def test_shares_go_to_stages_where_there_are_several(load, recipe_gguf, tokens):
    path = recipe_gguf(make_recipe("left-out", heads=6, kv_heads=1, layers=3))
    lm = load(path, mesh="stage:2,tensor:2", tensor_split="1,2")
    first, second = lm.engine.partition.stages
    assert (first.layers, second.layers) == (range(0, 1), range(1, 3))
    assert [stage.mesh.shape["tensor"] for stage in (first, second)] == [2, 2]
    assert nmse(lm.logits(tokens), load(path, split_mode="none").logits(tokens)) <= 1e-9


def test_equal_shares_are_no_different_from_none(recipe_gguf):
    sources, config = opened(recipe_gguf(SHAPES["9-3"]))
    for mode, shape in (("graph", {"tensor": 3}), ("layer", {"stage": 3})):
        plain = split_model(sources, config, mode, shape, None)
        shared = split_model(sources, config, mode, shape, None, shares=[2, 2, 2])
        assert [(s.layers, s.mesh) for s in plain.stages] == [
            (s.layers, s.mesh) for s in shared.stages
        ]


def test_shares_are_parsed():
    assert parse_shares("3,1") == [3, 1]
    assert parse_shares(" 0.5, 0 ,2e1") == [0.5, 0, 20]


@pytest.mark.parametrize(
    "text", ["", ",", "a,1", "3;1", "1,", "-1,2", "0,0", "nan,1", "inf,1", "1,-inf", "1 2"]
)
def test_text_that_is_no_list_of_shares_is_refused(text):
    with pytest.raises(JaxsplitError, match="tensor_split=.*such as 3,1") as error:
        parse_shares(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devices": 3}, r"tensor_split has 2 shares, but the mesh has tensor:3"),
        ({"mesh": "stage:3,tensor:2"}, r"tensor_split has 2 shares.*stage:3"),
        ({"split_mode": "layer", "devices": 4}, r"tensor_split has 2 shares.*stage:4"),
        ({"split_mode": "none"}, r"tensor_split has 2 shares.*tensor:1;"),
    ],
)
def test_a_wrong_number_of_shares_is_refused(recipe_gguf, options, message):
    with pytest.raises(JaxsplitError, match=message):
        jaxsplit.load(recipe_gguf("llama"), tensor_split="3,1", **options)


@pytest.mark.parametrize("shares", [[-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]], ids=str)
@pytest.mark.parametrize("mode", ["graph", "layer"])
def test_shares_given_as_numbers_are_checked_like_text(recipe_gguf, mode, shares):
    with pytest.raises(JaxsplitError, match="tensor_split"):
        jaxsplit.load(recipe_gguf("llama"), split_mode=mode, devices=2, tensor_split=shares)
