"""Mixtures of experts: routing and products against NumPy, their parts on devices, their memory."""

import dataclasses
from collections import Counter

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Q8_0, make_recipe, nmse, quick_jit, recipe_values
from tiny import fresh_rng

import jaxsplit
from jaxsplit.architectures import model_config
from jaxsplit.context import MatmulPolicy, forward_context
from jaxsplit.engine.runner import compiler_options
from jaxsplit.formats import open_gguf
from jaxsplit.models import MLPConfig, MoE, MoEConfig
from jaxsplit.models.layers import Norm, add_norm
from jaxsplit.ops.activations.layout import XLA_ONLY, Activations, RMSStatistics
from jaxsplit.ops.moe import router, triton_router
from jaxsplit.ops.norm.spec import NormConfig
from jaxsplit.plan.cost import trace_decode
from jaxsplit.quant import TYPES, QTensor, dequantize, unpack
from jaxsplit.sharding import make_partition

EMBED = 64
BASE = MoEConfig(experts=8, top_k=3, expert=MLPConfig(48))
MIXTURES = {
    "softmax": BASE,
    "normalized": dataclasses.replace(BASE, normalize=True, scale=1.5),
    "of the chosen": dataclasses.replace(
        BASE,
        expert=MLPConfig(48, "clamped_swiglu", bias=True),
        routing="softmax_after_topk",
        router_bias=True,
    ),
    "in groups": dataclasses.replace(
        BASE,
        routing="sigmoid",
        selection_bias=True,
        groups=4,
        used_groups=2,
        normalize=True,
        scale=2.5,
        shared=MLPConfig(40),
    ),
    "weighed first": dataclasses.replace(
        BASE,
        expert=MLPConfig(48, bias=True),
        top_k=2,
        routing="sigmoid",
        apply_router_weight_on_input=True,
        shared=MLPConfig(48),
    ),
    "gate of the shared": dataclasses.replace(
        BASE, shared=MLPConfig(40, bias=True), shared_gate=True
    ),
    "plain": dataclasses.replace(
        BASE, expert=MLPConfig(48, "gelu_tanh", gated=False), top_k=8, expert_scale=True
    ),
}


_unpacked = quick_jit(unpack, static_argnums=0)
_dequantized = quick_jit(dequantize)


@pytest.fixture
def rng():
    return fresh_rng()


def params_of(module):
    """A module's parameters by path."""
    return {
        ".".join(map(str, path)): param
        for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param))
    }


def random_moe(config, rng, embed=EMBED):
    """A mixture none of whose parameters are constants."""
    model = nnx.eval_shape(lambda: MoE(config, embed, rngs=nnx.Rngs(0)))
    for path, param in params_of(model).items():
        scale = param.shape[-1] ** -0.5 if "kernel" in path else 1.0
        value = rng.normal(size=param.shape, scale=scale)
        param.set_value(jnp.asarray(value.astype(np.float32)))
    return model


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def activated(name, up, gate):
    if name == "clamped_swiglu":
        gate = np.minimum(gate, 7)
        return gate * sigmoid(1.702 * gate) * (np.clip(up, -7, 7) + 1)
    if name == "gelu_tanh":
        return up * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return gate * sigmoid(gate) * up


def reference(config, params, x):
    """The mixture in float64, one token and one expert at a time: `[tokens, embed]`."""
    c = config
    p = {path: np.float64(_dequantized(param.get_value())) for path, param in params.items()}

    def part(name, x, expert=None):
        kernel, bias = p.get(f"{name}.kernel"), p.get(f"{name}.bias")
        if kernel is None:
            return None
        index = () if expert is None else expert
        return kernel[index] @ x + (0 if bias is None else bias[index])

    def token(x):
        logits = part("router", x)
        scores = {"softmax": softmax, "sigmoid": sigmoid}.get(c.routing, np.array)(logits)
        order = scores + p.get("selection_bias", 0)
        groups = order.reshape(c.groups, -1)
        if c.groups > 1:
            best = np.sort(groups)[:, -2:].sum(1)
            groups[np.argsort(best)[: -c.used_groups]] = -np.inf
        chosen = np.argsort(groups.reshape(-1))[-c.top_k :]
        weights = scores[chosen]
        if c.routing == "softmax_after_topk":
            weights = softmax(weights)
        if c.normalize:
            weights = weights / weights.sum()
        y = 0
        for weight, e in zip(weights * c.scale, chosen, strict=True):
            read = x * weight if c.apply_router_weight_on_input else x
            up, gate = part("experts.up", read, e), part("experts.gate", read, e)
            out = part("experts.down", activated(c.expert.activation, up, gate), e)
            if c.expert.bias:
                out = out + p["experts.down_bias"][e]
            if c.expert_scale:
                out = out * p["expert_scale"][e]
            y = y + (out if c.apply_router_weight_on_input else out * weight)
        if c.shared is not None:
            units = activated("silu", part("shared.up", x), part("shared.gate", x))
            shared = part("shared.down", units)
            y = y + shared * (sigmoid(p["shared_gate"] @ x) if c.shared_gate else 1)
        return y

    return np.stack([token(row) for row in np.float64(x)])


def output(model, x, **others):
    """What a mixture makes of an array, float32."""
    return model(Activations(x), **others).all_reduce(jnp.float32)


def check(config, model, x, limit=1e-11):
    """All tokens of a sequence, and each token a sequence of its own, as in a decode step."""
    expected = reference(config, params_of(model), x)
    for shape in {x.shape, (len(x), 1, x.shape[1])}:
        y = quick_jit(lambda x: output(model, x))(x.reshape(shape))
        assert nmse(y.reshape(x.shape), expected) < limit


# Results


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_equals_numpy(rng, name, tokens):
    model = random_moe(MIXTURES[name], rng)
    check(MIXTURES[name], model, rng.normal(size=(tokens, EMBED)).astype(np.float32))


@pytest.mark.parametrize("experts", [8, 100])
@pytest.mark.parametrize("name", [name for name, c in MIXTURES.items() if c.groups == 1])
def test_a_kernel_chooses_the_same_experts(rng, interpreter, name, experts):
    config = dataclasses.replace(MIXTURES[name], experts=experts, selection_bias=True)
    logits = rng.normal(size=(5, 1, experts)).astype(np.float32)
    bias, scale, more = rng.uniform(0, 1, (3, experts)).astype(np.float32)
    logits[2:, :, ::2] = logits[2:, :, 1::2]  # ties, but for the bias
    rms = RMSStatistics(jnp.asarray(rng.uniform(size=(5, 3)), jnp.float32), 1e-6, 2)
    for vectors, by, added in (((None, None), None, None), ((bias, scale), rms, more)):
        divided = logits if by is None else logits * np.asarray(by.inverse)[:, None, None] + added
        expected = router.topk_experts(jnp.asarray(divided), config, *vectors)
        options = {"rms": by, "logit_bias": added}
        found = triton_router.topk_experts(jnp.asarray(logits), config, *vectors, **options)
        assert np.array_equal(found[0], expected[0])
        assert np.allclose(found[1], expected[1], rtol=1e-6)


def test_all_tokens_may_choose_the_same_experts(rng, quick_compilation):
    """Tiles of 128 rows for 300 tokens; five experts have none."""
    config = dataclasses.replace(BASE, selection_bias=True)
    model = random_moe(config, rng)
    model.selection_bias.set_value(jnp.where(jnp.arange(8) % 3 == 1, 10.0, 0))
    check(config, model, rng.normal(size=(300, EMBED)).astype(np.float32))


def test_the_router_may_read_something_else(rng):
    model = random_moe(BASE, rng)
    x, other = jnp.asarray(rng.normal(size=(2, 4, EMBED)), jnp.float32)
    topk_ids, weights = model.route(Activations(other))
    expected = model.experts(Activations(x), topk_ids, weights).local_sum
    assert nmse(output(model, x, router_input=other), expected) < 1e-12
    assert nmse(output(model, x), expected) > 1e-3


def test_half_precision_is_summed_in_single(rng):
    model = random_moe(BASE, rng)
    x = jnp.asarray(rng.normal(size=(40, EMBED)), jnp.bfloat16)
    y = model(Activations(x)).local_sum
    assert y.dtype == jnp.float32
    assert nmse(y, reference(BASE, params_of(model), x)) < 1e-4


# Quantized stacks


def quantized(rng, kind, *shape):
    """A stack of random matrices as the device holds them."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if kind in ("Q8_0", "Q4_0"):
        values = shape[-1] ** -0.5 * rng.normal(size=shape).astype(np.float32)
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    else:  # Q4_K: any bytes, and scales of the usual size
        raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
        raw[..., :4] = np.frombuffer(np.float16([1e-3, 5e-3]).tobytes(), np.uint8)
    return _unpacked(kind, raw.view(np.uint8).reshape(*shape[:-1], -1, size))


def quantized_moe(rng, kind, config, embed):
    model = nnx.eval_shape(lambda: MoE(config, embed, rngs=nnx.Rngs(0)))
    for path, param in params_of(model).items():
        if path.startswith("experts") and path.endswith("kernel"):
            param.set_value(quantized(rng, kind, *param.shape))
        else:
            param.set_value(jnp.asarray(rng.normal(size=param.shape), jnp.float32))
    return model


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_K"])
def test_experts_may_be_quantized(rng, kind):
    sizes = (TYPES[kind].block, max(TYPES[kind].block, EMBED))
    config = dataclasses.replace(BASE, expert=MLPConfig(sizes[0]))
    model = quantized_moe(rng, kind, config, sizes[1])
    for tokens in (2, 30):
        check(config, model, rng.normal(size=(tokens, sizes[1])).astype(np.float32), 1e-10)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("change", [{}, {"gated": False}, {"bias": True}])
def test_kernels_multiply_with_chosen_experts(rng, change, rows):
    """The rounded activations differ a little, and nothing else does. What they are divided by is
    far from 1, and experts are chosen before it is known."""
    config = dataclasses.replace(BASE, expert=MLPConfig(64, **change))
    model = quantized_moe(rng, "Q8_0", config, 64)
    x = (rng.normal(size=(rows, 1, 64)) * 4).astype(np.float32)
    norm = Norm(NormConfig(), 64)
    norm.scale.set_value(jnp.asarray(rng.uniform(0.5, 1, 64), jnp.float32))

    def run(readers):
        @quick_jit
        def normalized_and_multiplied(x):
            rows, _ = add_norm(None, x, norm, readers)
            return model(rows).all_reduce(x.dtype)

        return normalized_and_multiplied(x)

    exact = run(XLA_ONLY)
    with forward_context(policy=MatmulPolicy(int8_activations=True, kernels=True, interpret=True)):
        found = run(model.readers(jnp.asarray(x)))
    assert 1e-8 < nmse(found, exact) < 2e-3


@pytest.mark.parametrize(("kind", "tokens"), [("Q8_0", 1), ("Q4_K", 1), ("Q8_0", 128), ("F32", 1)])
def test_one_expert_at_a_time_is_dequantized(rng, kind, tokens):
    embed, hidden = 512, 512
    config = dataclasses.replace(BASE, experts=16, top_k=2, expert=MLPConfig(hidden))
    model = (
        random_moe(config, rng, embed) if kind == "F32" else quantized_moe(rng, kind, config, embed)
    )
    graph, state = nnx.split(model)

    def run(state, x):
        return nnx.merge(graph, state)(Activations(x)).local_sum

    x = jax.ShapeDtypeStruct((tokens, embed), jnp.float32)
    program = jax.jit(run, compiler_options=compiler_options("cpu", decode=tokens == 1))
    memory = program.lower(state, x).compile().memory_analysis()
    matrix = 4 * embed * hidden
    rows = 4 * tokens * (2 * embed + 3 * config.top_k * hidden)
    assert memory.temp_size_in_bytes < (2.2 if tokens > 1 or kind == "F32" else 0.6) * matrix + rows


# Devices


def experts_recipe(name, *, hidden=96, fused=False):
    """A layer of a random Qwen 2 MoE: 8 experts, 3 for each token, and a shared one."""
    recipe = make_recipe(name, heads=4, kv_heads=2, layers=1)
    embed, experts, shared, arch = 128, 8, 64, "qwen2moe"
    kept = [t for t in recipe["tensors"] if "ffn_" not in t["name"] or "norm" in t["name"]]
    two = ["gate_up_exps"] if fused else ["gate_exps", "up_exps"]
    stacks = {
        **dict.fromkeys(two, (embed, 2 * hidden // len(two), experts)),
        "down_exps": (hidden, embed, experts),
        "gate_inp": (embed, experts),
        "gate_inp_shexp": (embed,),
        "gate_shexp": (embed, shared),
        "up_shexp": (embed, shared),
        "down_shexp": (shared, embed),
    }
    kept += [
        {
            "name": f"blk.0.ffn_{end}.weight",
            "shape": shape,
            **{"mean": 0.0, "std": 1.5 * shape[0] ** -0.5, "low": -4.0, "high": 4.0},
        }
        for end, shape in stacks.items()
    ]
    numbers = {"count": experts, "used_count": 3, "feed_forward_length": hidden}
    metadata = [[key.replace("llama.", f"{arch}."), *rest] for key, *rest in recipe["metadata"]]
    metadata += [[f"{arch}.expert_{key}", ["UINT32"], value] for key, value in numbers.items()]
    return {**recipe, "arch": arch, "metadata": metadata, "tensors": kept}


RECIPE = experts_recipe("experts")
KINDS = {"F32": None, "Q8_0": {"inp.weight": "F32", "inp_shexp.weight": "F32", **Q8_0}}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("mode", "mesh", "kind"),
    [
        *(
            ("graph", "expert:2", "Q8_0"),
            ("graph", "expert:3", "F32"),
            ("graph", "tensor:3", "F32"),
        ),
        *(("graph", "expert:2,tensor:2", "Q8_0"), ("row", "expert:3,tensor:2", "F32")),
        ("row", "tensor:2", "Q8_0"),
    ],
)
def test_every_mesh_computes_what_one_device_computes(load, recipe_gguf, rng, mode, mesh, kind):
    path = recipe_gguf(RECIPE, KINDS[kind])
    one = load(path, split_mode="none")
    split = jaxsplit.load(path, split_mode=mode, mesh=mesh, dtype="float32", ctx_size=256)
    tokens = rng.integers(0, 160, 37).tolist()
    expected = one.logits(tokens)
    assert nmse(split.logits(tokens), expected) <= 1e-9
    assert nmse(split.logits(tokens[:4], one_by_one=True), expected[:4]) <= 1e-9


def test_each_device_holds_its_experts(recipe_gguf):
    """Eight experts on three devices are padded to nine."""
    path = recipe_gguf(RECIPE, KINDS["Q8_0"])
    lm = jaxsplit.load(path, split_mode="graph", mesh="expert:3")
    stack = lm.model.blocks[0].mlp.experts.up.kernel.get_value()
    assert isinstance(stack, QTensor)
    assert stack.shape == (9, 96, 128)
    assert {shard.data.shape[0] for shard in stack.scale.addressable_shards} == {3}


def test_gate_and_up_may_be_one_tensor(recipe_gguf):
    recipe = experts_recipe("fused", fused=True)
    lm = jaxsplit.load(recipe_gguf(recipe), split_mode="none", ctx_size=8)
    spec = next(t for t in recipe["tensors"] if t["name"] == "blk.0.ffn_gate_up_exps.weight")
    gate, up = np.split(recipe_values(recipe["seed"], spec), 2, axis=1)
    experts = lm.model.blocks[0].mlp.experts
    assert np.array_equal(experts.gate.kernel.get_value(), gate)
    assert np.array_equal(experts.up.kernel.get_value(), up)


@pytest.mark.parametrize(
    ("mode", "mesh", "per_layer"),
    [
        *(("graph", {"tensor": 2}, {"all-reduce": 2}), ("graph", {"expert": 3}, {"all-reduce": 2})),
        ("graph", {"expert": 2, "tensor": 2}, {"all-reduce": 2}),
        # Heads, units of the experts and of the shared one, and the stream twice.
        ("row", {"tensor": 2}, {"all-gather": 5}),
        ("layer", {"stage": 1}, {}),
    ],
)
def test_devices_meet_twice_in_a_layer(recipe_gguf, mode, mesh, per_layer):
    config = model_config(open_gguf(recipe_gguf(RECIPE)))
    (stage,) = make_partition(config, mode, mesh, None).stages
    work = trace_decode(config, stage, jnp.float32, 64, 1)
    expected = Counter({kind: count * config.layers for kind, count in per_layer.items()})
    if mode != "layer":
        expected += Counter({"all-reduce": 1, "all-gather": 1})  # embedding and head
    assert work.collectives == expected
