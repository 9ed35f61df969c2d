"""How a model's axes lie on devices, and which meshes are refused."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxsplit.errors import JaxsplitError
from jaxsplit.models import AttentionConfig, BlockConfig, MLPConfig, ModelConfig, RopeConfig
from jaxsplit.sharding import (
    MESH_AXES,
    SPLIT_MODES,
    AxisLayout,
    choose_devices,
    even,
    grouped_heads,
    make_partition,
    parse_mesh,
    split_mode,
)
from jaxsplit.sharding.axes import EMBED, Axis

HEADS = [
    (heads, kv_heads, devices)
    for heads, kv_heads, devices in itertools.product(range(1, 17), range(1, 17), range(1, 17))
    if heads % kv_heads == 0
] + [(heads, kv, n) for heads, kv in ((32, 8), (64, 8), (40, 10), (9, 3), (71, 1)) for n in (3, 8)]
BLOCKS = (1, 32, 256)


def by_device(layout):
    """Units by device and slot: int `[devices, slots]`."""
    return layout.units.reshape(layout.devices, -1)


def check_elements(layout):
    """`elements` names each original element exactly as often as its unit, in the unit's order."""
    elements = layout.elements()
    assert elements.shape == (layout.size,)
    assert len(elements) % layout.devices == 0
    for slot, piece in zip(layout.units, elements.reshape(-1, layout.unit), strict=True):
        if slot < 0:
            assert (piece == -1).all()
        else:
            assert np.array_equal(piece, slot * layout.unit + np.arange(layout.unit))
    assert set(elements[elements >= 0]) == set(range(layout.original))


def check_sub_blocks(layout, block):
    """The axis put together from pieces of blocks is the axis of `elements`."""
    sub_block, source, index = layout.sub_blocks(block)
    assert block % sub_block == 0
    assert (layout.size // layout.devices) % sub_block == 0, "a sub-block on two devices"
    assert len(source) == len(index) == layout.size // sub_block
    assert ((index >= 0) & (index < block // sub_block)).all()
    start = source * block + index * sub_block
    elements = np.where(source[:, None] < 0, -1, start[:, None] + np.arange(sub_block))
    assert np.array_equal(elements.reshape(-1), layout.elements())
    if layout.unit % block == 0:
        assert sub_block == block, "whole blocks would do"


# Layouts


@pytest.mark.parametrize("devices", range(1, 17))
def test_units_are_shared_out_evenly(devices):
    for count, unit in itertools.product(range(1, 70), (1, 3, 32)):
        layout = even(count, unit, devices)
        assert (layout.unit, layout.devices) == (unit, devices)
        units = layout.units[layout.units >= 0]
        assert np.array_equal(units, np.arange(count)), "each once, in order"
        assert len(layout.units) == devices * math.ceil(count / devices), "more padding than needed"
        assert np.array_equal(layout.units[:count], np.arange(count)), "padding comes last"
        assert (layout.original, layout.size) == (count * unit, len(layout.units) * unit)
        check_elements(layout)
        for block in BLOCKS:
            if layout.original % block == 0:
                check_sub_blocks(layout, block)


def test_every_head_has_a_place_beside_its_key_and_value_head():
    for heads, kv_heads, devices in HEADS:
        case = f"{heads} heads, {kv_heads} KV heads, {devices} devices"
        query, kv = grouped_heads(heads, kv_heads, 8, devices)
        assert query.devices == kv.devices == devices, case
        assert sorted(query.units[query.units >= 0]) == list(range(heads)), case
        assert set(kv.units[kv.units >= 0]) == set(range(kv_heads)), case
        # On each device, each key and value slot serves equally many query slots, in order.
        assert len(query.units) % len(kv.units) == 0, case
        served = np.repeat(by_device(kv), len(query.units) // len(kv.units), axis=1)
        groups = np.where(query.units < 0, -1, query.units // (heads // kv_heads))
        used = query.units >= 0
        assert np.array_equal(served.reshape(-1)[used], groups[used]), case


def test_heads_are_padded_and_copied_only_where_they_do_not_divide():
    for heads, kv_heads, devices in HEADS:
        case = f"{heads} heads, {kv_heads} KV heads, {devices} devices"
        group = heads // kv_heads
        query, kv = grouped_heads(heads, kv_heads, 8, devices)
        if kv_heads % devices == 0:
            assert np.array_equal(kv.units, np.arange(kv_heads)), case
            assert np.array_equal(query.units, np.arange(heads)), case
        elif devices % kv_heads == 0 and group % (devices // kv_heads) == 0:
            assert np.array_equal(query.units, np.arange(heads)), case
            assert np.array_equal(by_device(kv)[:, 0], np.arange(devices) // (devices // kv_heads))
        # Never more than whole groups on as few devices as possible.
        most = math.ceil(kv_heads / devices) * group
        assert math.ceil(heads / devices) <= by_device(query).shape[1] <= most, case
        assert math.ceil(kv_heads / devices) <= by_device(kv).shape[1] <= kv_heads, case


def test_heads_that_all_devices_can_share_leave_none_idle():
    for heads, kv_heads, devices in HEADS:
        query, _ = grouped_heads(heads, kv_heads, 8, devices)
        if heads % devices == 0 and (kv_heads % devices == 0 or devices % kv_heads == 0):
            assert (by_device(query) >= 0).any(axis=1).all()


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 100, 128, 256])
def test_elements_and_sub_blocks_of_heads_put_the_axis_together(head_dim):
    for heads, kv_heads, devices in HEADS[::7]:
        for layout in grouped_heads(heads, kv_heads, head_dim, devices):
            check_elements(layout)
            for block in BLOCKS:
                if layout.original % block == 0:
                    check_sub_blocks(layout, block)


def test_blocks_stay_whole_where_heads_that_stay_together_allow_it():
    """Of 8 heads of 64, four make up a block of 256: on two devices no block is cut."""
    query, _ = grouped_heads(8, 8, 64, 2)
    sub_block, source, index = query.sub_blocks(256)
    assert (sub_block, source.tolist(), index.tolist()) == (256, [0, 1], [0, 0])
    query, _ = grouped_heads(8, 8, 64, 8)
    sub_block, source, index = query.sub_blocks(256)
    assert (sub_block, source.tolist()) == (64, [0, 0, 0, 0, 1, 1, 1, 1])
    assert index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_an_axis_in_any_order_is_put_together_from_sub_blocks():
    rng = np.random.default_rng(0)
    for unit, block in itertools.product((1, 16, 48, 64, 256), BLOCKS):
        for _ in range(20):
            units = int(rng.integers(1, 5)) * block // math.gcd(block, unit)
            slots = rng.permutation(np.append(np.arange(units), np.full(units % 4, -1)))
            check_sub_blocks(AxisLayout(unit, slots, 1), block)


# Meshes


def refused(match, function, *arguments, **options):
    """Calls what has to raise; the message is one line."""
    with pytest.raises(JaxsplitError, match=match) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_mesh_is_parsed():
    assert parse_mesh("tensor:4") == {"tensor": 4}
    assert parse_mesh(" tensor:16 ") == {"tensor": 16}
    assert list(parse_mesh(",".join(f"{axis}:2" for axis in MESH_AXES))) == list(MESH_AXES)


@pytest.mark.parametrize(
    "text",
    [
        *("tensor", "tensor:", "4", "tensor:0", "tensor:-2", "tensor:2.5", "tensor:two"),
        *("tensor=4", "tensor:4,", ",tensor:4", "tensor:4:2", "tensor: ", "tensor:²", ","),
    ],
)
def test_a_mesh_of_another_form_is_refused(text):
    message = refused(r"is not of the form axis:size", parse_mesh, text)
    assert f"mesh={text}" in message
    assert "tensor:4" in message


def test_an_unknown_axis_is_refused_and_the_known_are_listed():
    message = refused(r"mesh=tenser:4: unknown axis 'tenser'; supported", parse_mesh, "tenser:4")
    assert all(axis in message for axis in MESH_AXES)
    refused("unknown axis 'Tensor'", parse_mesh, "Tensor:4")
    refused("unknown axis ''", parse_mesh, ":4")


def test_an_axis_given_twice_is_refused():
    refused(r"mesh=tensor:2,tensor:4.*twice", parse_mesh, "tensor:2,tensor:4")


def test_devices_are_chosen():
    all_devices = jax.devices()
    assert choose_devices("graph") == ({"tensor": 8}, all_devices)
    assert choose_devices("graph", 3) == ({"tensor": 3}, all_devices[:3])
    assert choose_devices("graph", mesh="tensor:5") == ({"tensor": 5}, all_devices[:5])
    assert choose_devices("graph", 5, "tensor:5") == ({"tensor": 5}, all_devices[:5])
    some = [all_devices[6], all_devices[1]]
    assert choose_devices("graph", some) == ({"tensor": 2}, some)
    assert choose_devices("none") == ({"tensor": 1}, all_devices[:1])
    assert choose_devices("none", main_device=7) == ({"tensor": 1}, all_devices[7:])
    assert choose_devices("none", some, main_device=1) == ({"tensor": 1}, some[1:])
    assert choose_devices("none", mesh="tensor:1") == ({"tensor": 1}, all_devices[:1])


def test_an_unknown_split_mode_is_refused_and_the_known_are_listed():
    for function in (split_mode, choose_devices, stage_in_mode):
        message = refused(r"split_mode=diagonal is not supported", function, "diagonal")
        assert all(mode in message for mode in SPLIT_MODES)


@pytest.mark.parametrize("count", [-1, 0, 9, 1000])
def test_a_number_of_devices_that_there_are_not_is_refused(count):
    message = refused(r"devices", choose_devices, "graph", count)
    assert str(count) in message
    assert "8 cpu devices" in message
    assert "JAX_NUM_CPU_DEVICES" in message


def test_a_mesh_larger_than_the_devices_is_refused():
    message = refused(
        r"mesh=tensor:16 needs 16 devices.*8 cpu devices",
        choose_devices,
        "graph",
        mesh="tensor:16",
    )
    assert "JAX_NUM_CPU_DEVICES" in message
    refused(
        r"mesh=tensor:99999999999999999999", choose_devices, "graph", None, "tensor:" + "9" * 20
    )


@pytest.mark.parametrize("count", [2, 8])
def test_a_mesh_that_is_not_made_of_the_devices_given_is_refused(count):
    match = rf"mesh=tensor:4 needs 4 devices, there are {count}"
    refused(match, choose_devices, "graph", count, "tensor:4")
    refused(match, choose_devices, "graph", jax.devices()[:count], "tensor:4")


def test_a_mesh_for_the_mode_without_one_is_refused():
    message = refused(r"mesh=tensor:2.*split_mode=none", choose_devices, "none", mesh="tensor:2")
    assert "leave one of the two flags out" in message


@pytest.mark.parametrize("main_device", [-1, 8])
def test_a_main_device_that_is_not_there_is_refused(main_device):
    match = rf"main_device={main_device}.*8 devices"
    refused(match, choose_devices, "none", main_device=main_device)
    some = jax.devices()[:2]
    refused(r"main_device=2.*2 devices", choose_devices, "none", some, main_device=2)


def test_an_empty_list_of_devices_is_refused():
    refused("devices is empty", choose_devices, "graph", [])


# Partitions

BLOCK = BlockConfig(AttentionConfig(6, 2, 32, 32, RopeConfig(dim=32)), MLPConfig(160))
CONFIG = ModelConfig("test", vocab=101, embed=64, context=128, blocks=(BLOCK,))
HEADS_AXIS, KV_HEADS_AXIS = BLOCK.mixer.axes
MLP_AXIS, VOCAB, EMBED_OUT = Axis("mlp", 160), Axis("vocab", 101), Axis("embed_out", 64)
SIZES = {HEADS_AXIS: 6 * 32, KV_HEADS_AXIS: 2 * 32, MLP_AXIS: 160, VOCAB: 101, EMBED_OUT: 64}


def stage_in_mode(mode, devices=4, **options):
    shape, places = {"tensor": devices}, jax.devices()[:devices]
    (stage,) = make_partition(CONFIG, mode, shape, places, **options).stages
    return stage


@pytest.mark.parametrize("devices", range(1, 9))
def test_a_partition_lays_out_all_axes(devices):
    stage = stage_in_mode("graph", devices, block_multiple={MLP_AXIS: 32})
    assert stage.mesh.shape == {"data": 1, "expert": 1, "tensor": devices}
    assert stage.mesh.devices.ravel().tolist() == jax.devices()[:devices]
    for axis, size in SIZES.items():
        layout = stage.layout(axis, size)
        assert layout.original == size
        assert layout.devices == (devices if axis != EMBED_OUT else 1), axis
        check_elements(layout)
        assert stage.layout(axis.columns, size) == layout
        assert stage.padded((size, 7), (axis, EMBED)) == (layout.size, 7)
        # A mesh of one device splits nothing.
        split = devices > 1 and axis != EMBED_OUT
        assert stage.table.get(axis.name, ()) == (("tensor",) if split else ()), axis
    assert stage.layout(MLP_AXIS, 160).unit == 32
    assert stage.layout(EMBED, 64) is None


def test_nothing_is_split_in_mode_none():
    stage = stage_in_mode("none", 1)
    assert stage.rules.table == {}
    for axis, size in SIZES.items():
        layout = stage.layout(axis, size)
        assert layout.devices == 1
        assert np.array_equal(layout.elements(), np.arange(layout.original))


def test_specs_name_the_mesh_axis_of_split_axes_only():
    stage = stage_in_mode("graph", 4, reduce_dtype=jnp.bfloat16)
    assert stage.rules.reduce_dtype == jnp.bfloat16
    assert stage.spec((HEADS_AXIS, EMBED)) == PartitionSpec(("tensor",), None)
    assert stage.spec((EMBED, MLP_AXIS)) == PartitionSpec(None, ("tensor",))
    assert stage.spec((EMBED,)) == PartitionSpec(None)
    assert stage.spec((None, KV_HEADS_AXIS, None)) == PartitionSpec(None, ("tensor",), None)
    assert stage_in_mode("none", 1).spec((HEADS_AXIS, MLP_AXIS)) == PartitionSpec(None, None)
