"""Decoders of attention and one MLP in each layer."""

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

from jaxsplit.architectures.entry import (
    Architecture,
    decoder,
    head_norms,
    only_post_norms,
    post_norms,
    rotations,
    scaled,
    unscaled,
    uses,
)
from jaxsplit.architectures.harmless import NO_WINDOW, ONE_BASE
from jaxsplit.architectures.header import Header
from jaxsplit.architectures.names import block_names
from jaxsplit.errors import JaxsplitError
from jaxsplit.models.block_config import ParallelBlockConfig, SwitchedBlockConfig
from jaxsplit.models.config import BlockConfig, ModelConfig
from jaxsplit.models.mixer_config import LinearConfig
from jaxsplit.models.residual_config import CarriedConfig, EndNormConfig, SwitchConfig
from jaxsplit.ops.activations.functions import XIELU


def _apertus(header: Header) -> ModelConfig:
    def parameter(name: str, layer: int) -> float:
        """Of a layer, or of all."""
        value = header.file.key(key := f"xielu.{name}")
        value = value[layer] if isinstance(value, list) and layer < len(value) else value
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise JaxsplitError(f"{header.file.path}: {key} is {value!r}, expected numbers")
        return value

    def activation(layer: int) -> XIELU:
        alpha_p, alpha_n = (
            math.log1p(math.exp(parameter(name, layer))) for name in ("alpha_p", "alpha_n")
        )
        beta = parameter("beta", layer)
        return XIELU(alpha_p, beta + alpha_n, beta, parameter("eps", layer))

    return decoder(
        header,
        attention=head_norms(header),
        block=lambda layer: {"mlp": header.mlp(layer, activation(layer))},
    )


def _baichuan(header: Header) -> ModelConfig:
    if header.layers not in (32, 40):
        raise JaxsplitError(
            f"{header.file.path}: baichuan with {header.layers} layers is not supported; with 32 "
            "(7B) and 40 (13B) it is"
        )
    with_rope = header.layers == 32
    return decoder(
        header, interleaved=True, attention={} if with_rope else {"rope": None, "alibi": 8.0}
    )


def _bitnet(header: Header) -> ModelConfig:
    norm = header.norm()
    return decoder(
        header,
        attention={"out_norm": norm},
        block=lambda layer: {"mlp": dataclasses.replace(header.mlp(layer), norm=norm)},
    )


def _bloom(header: Header) -> ModelConfig:
    return decoder(
        header,
        activation="gelu_tanh",
        attention={"rope": None, "alibi": 8.0},
        embedding_norm=header.norm(),
    )


def _command_r(header: Header) -> ModelConfig:
    large = header.layers >= 64
    return decoder(
        header,
        interleaved=True,
        attention=head_norms(header, norm_over="each") if large else {},
        block={"mlp_norm": None},
        block_type=ParallelBlockConfig,
        logit_scale=header.number("logit_scale", 0.0) or 1.0,
    )


def _cohere2(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed(4)
    return decoder(
        header,
        interleaved=True,
        attention=lambda layer: {"window": window} if local[layer] else {"rope": None},
        block={"mlp_norm": None},
        block_type=ParallelBlockConfig,
        logit_scale=header.number("logit_scale"),
    )


def _cogvlm(header: Header) -> ModelConfig:
    rope = dataclasses.replace(header.rope(header.head_dim()), base=10000.0)
    return decoder(header, attention={"rope": rope})


def _deci(header: Header) -> ModelConfig:
    """Layers may lack attention, have a projection in its place, or lack an MLP."""

    def block(layer: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if not header.count("attention.head_count", layer=layer):
            found["mixer"] = None
        elif not header.count("attention.head_count_kv", layer=layer):
            found["mixer"] = LinearConfig()
        if not header.count("feed_forward_length", layer=layer):
            found["mlp"] = None
        return found

    return decoder(header, interleaved=True, block=block)


def _exaone4(header: Header) -> ModelConfig:
    large, norms = header.layers == 64, head_norms(header)
    window, local = header.window(4096, least=int(large)), header.windowed(4)

    def attention(layer: int) -> dict[str, Any]:
        if not large:
            return norms
        return norms | ({"window": window} if local[layer] else {"rope": None})

    return decoder(header, attention=attention, block=only_post_norms(header))


def _falcon(header: Header) -> ModelConfig:
    block = {} if header.has("blk.*.attn_norm_2.weight") else {"mlp_norm": None}
    return _gelu(header, block=block, block_type=ParallelBlockConfig)


def _hunyuan_vl(header: Header) -> ModelConfig:
    header = dataclasses.replace(header, sections_kept=True)
    rope = header.rope(header.head_dim())
    alpha = header.number("rope.scaling.alpha", 0.0) or 1.0
    rope = dataclasses.replace(rope, base=rope.base * alpha ** (rope.dim / (rope.dim - 2)))
    return decoder(header, attention=head_norms(header, norm_first=False, rope=rope))


def _jais(header: Header) -> ModelConfig:
    largest = header.number("attention.max_alibi_bias", 0.0) or None
    scale = 1 / header.head_dim()
    return decoder(header, attention={"rope": None, "alibi": largest, "scale": scale})


def _learned_positions(header: Header) -> ModelConfig:
    positions = header.file.tensor("position_embd.weight").shape[0]
    return decoder(
        header,
        activation="gelu_tanh",
        attention={"rope": None},
        learned_positions=positions,
        context=min(header.context_length, positions),
    )


def _gptneox(header: Header) -> ModelConfig:
    parallel = header.flag("use_parallel_residual", True)
    return _gelu(header, block_type=ParallelBlockConfig if parallel else BlockConfig)


def _minicpm(header: Header) -> ModelConfig:
    defaults = {
        "embedding_scale": 12.0,
        "residual_scale": 1.4 / math.sqrt(header.layers),
        "logit_scale": 256 / header.embed,
    }
    return decoder(header, **scaled(header, **defaults))


def _mistral3(header: Header) -> ModelConfig:
    length = "rope.scaling.original_context_length"
    temperature = header.temperature(length, header.context_length)
    return decoder(header, interleaved=True, attention={"attn_temperature": temperature})


def _mpt(header: Header) -> ModelConfig:
    attention = {
        "rope": None,
        "alibi": header.number("attention.max_alibi_bias", 0.0) or None,
        "clip_qkv": header.number("attention.clamp_kqv", 0.0) or None,
    }
    return decoder(header, activation="gelu_tanh", attention=attention)


def _muse(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed()
    norms = head_norms(header)
    post_norm = dataclasses.replace(header.norm(), epsilon=1e-8)

    def attention(layer: int) -> dict[str, Any]:
        positions = {"window": window} if local[layer] else {"rope": None}
        return norms | positions | {"gate": header.gate(layer)}

    return decoder(
        header,
        interleaved=True,
        attention=attention,
        block={"mixer_post_norm": post_norm, "mlp_post_norm": post_norm},
        embedding_norm=header.norm(scale=False, bias=False),
        logit_scale=header.number("logit_scale", 1.0),
        logit_softcap=header.number("final_logit_softcapping", 0.0) or None,
    )


def _olmo(header: Header) -> ModelConfig:
    norm = header.norm(scale=False, bias=False)
    return decoder(
        header,
        interleaved=True,
        attention={"clip_qkv": header.number("attention.clamp_kqv", 0.0) or None},
        block={"mixer_norm": norm, "mlp_norm": norm},
        norm=norm,
    )


def _olmo2(header: Header) -> ModelConfig:
    norms = head_norms(header, norm_over="all")
    window, local = header.window(0, least=0), header.windowed(4)
    rope = header.rope(header.head_dim())

    def attention(layer: int) -> dict[str, Any]:
        if not window or not local[layer]:
            return norms
        return norms | {"window": window, "rope": unscaled(rope, attention_factor=1.0)}

    return decoder(header, attention=attention, block=only_post_norms(header))


def _plamo3(header: Header) -> ModelConfig:
    window, local = header.window(0, least=0), header.windowed(8)
    rope, local_rope = rotations(header)
    norms = head_norms(header)

    def attention(layer: int) -> dict[str, Any]:
        if not window or not local[layer]:
            return norms | {"rope": rope}
        return norms | {"rope": local_rope, "window": window}

    return decoder(header, attention=attention, block=post_norms(header))


def _qwen(header: Header) -> ModelConfig:
    # The key counts gates and other hidden units.
    hidden = header.size("feed_forward_length", least=2) // 2
    return decoder(header, block=lambda layer: {"mlp": header.mlp(layer, hidden=hidden)})


def _smollm3(header: Header) -> ModelConfig:
    return decoder(
        header, interleaved=True, attention=lambda layer: {"rope": None} if layer % 4 == 3 else {}
    )


def _spark(header: Header) -> ModelConfig:
    window, local = header.window(), header.windowed()
    rope = header.rope(header.head_dim())
    local_rope = header.rope(header.head_dim(), end="_swa")
    base = header.number("rope.freq_base_swa", rope.base, above=1)
    local_rope = dataclasses.replace(local_rope, base=base)

    def attention(layer: int) -> dict[str, Any]:
        positions = {"rope": local_rope, "window": window} if local[layer] else {"rope": rope}
        return positions | {"gate": header.gate(layer)}

    return decoder(header, activation="gelu_tanh", attention=attention)


def _stablelm(header: Header) -> ModelConfig:
    norms = header.has("blk.*.attn_q_norm.weight")
    attention = head_norms(header, norm_over="each") if norms else {}
    build = decoder if header.has("blk.*.ffn_norm.weight") else _parallel
    return build(header, attention=attention)


def _glm4(header: Header) -> ModelConfig:
    # Models that read images too rotate by halves.
    interleaved = not header.sections or 0 in header.sections[:2]
    return decoder(header, interleaved=interleaved, block=post_norms(header))


def _nanbeige(header: Header) -> ModelConfig:
    """All layers are used several times, with the last norm between."""
    loops = header.count("num_loops", 1, least=1)
    plain = header.flag("skip_loop_final_norm", False)
    once = decoder(header, interleaved=True)
    norm = BlockConfig(None, None, after=(EndNormConfig(header.norm()),), source=header.layers)
    between = () if plain else (norm,)
    layers = uses(once, range(header.layers))
    blocks = layers + (between + layers) * (loops - 1)
    return dataclasses.replace(once, blocks=blocks)


def _granite_switch(header: Header) -> ModelConfig:
    """Granite with adapters in the file, which tokens switch on."""
    count = header.count("adapters.count", least=1)

    def tokens(name: str) -> list[int]:
        ids = header(key := f"adapters.token_ids_{name}")
        whole = isinstance(ids, list) and all(isinstance(i, int) for i in ids)
        if not whole or len(ids) != count or not all(0 <= i < header.vocab for i in ids):
            raise header.wrong(key, ids, f"{count} token ids")
        return ids

    switch = SwitchConfig(
        adapters=count + 1,
        rank=header.size("adapters.lora_rank"),
        tokens=tuple(tokens("activate")),
        gain=header.number("adapters.router_gain", above=0),
    )
    choices = scaled(header)
    common = choices.pop("block")

    def block(layer: int) -> dict[str, Any]:
        return common | {"switch": dataclasses.replace(switch, first=layer == 0)}

    return decoder(
        header,
        block=block,
        block_type=SwitchedBlockConfig,
        carried=count + 1,
        substitutes=tuple(zip(switch.tokens, tokens("substitute"), strict=True)),
        **choices,
    )


def _hrm(header: Header) -> ModelConfig:
    """Two stacks of layers, each with a state of its own that reads both (hierarchical reasoning
    model, Wang et al. 2025, arXiv:2506.21734): after several uses of the lower stack comes one of
    the higher stack, and that several times. The stream is the state that is computed, and it
    carries the other one."""
    if header.flag("hrm.prefix_lm", False):
        raise header.wrong("hrm.prefix_lm", True, "false: prompts are read causally")
    size = header.count("hrm.layers_per_stack", least=1)
    high, low = (header.count(f"hrm.{name}_cycles", least=1) for name in "hl")
    if header.blocks != size * high * (low + 1):
        expected = f"{size * high * (low + 1)}, the uses of {2 * size} layers"
        raise header.wrong("block_count", header.blocks, expected)
    header = dataclasses.replace(header, physical_layers=2 * size)
    norm = header.norm(scale=False, bias=False)
    once = decoder(
        header,
        attention=lambda layer: {"gate": header.gate(layer)},
        block={"mixer_norm": norm, "mlp_norm": norm},
        norm=norm,
        embedding_scale=header.number("embedding_scale", 1.0),
        carried=header.embed,
        carries_embedding=True,
        embedding_offset=True,
    )
    stacks = {"l": uses(once, range(size)), "h": uses(once, range(size, 2 * size))}
    order = ("l" * low + "h") * high
    blocks = stacks["l"]
    for before, stack in itertools.pairwise(order):
        swap = before != stack  # else the stack that comes computes the same state again
        after = EndNormConfig(norm), CarriedConfig(swap=swap)
        joint = BlockConfig(None, None, after=after, source=2 * size + swap)
        blocks = (*blocks, joint, *stacks[stack])
    return dataclasses.replace(once, blocks=blocks)


def _talkie(header: Header) -> ModelConfig:
    """Norms have no parameters, and each layer adds the embedding."""
    norm = header.norm(scale=False, bias=False)
    norms = {"query_norm": norm, "key_norm": norm, "norm_first": False, "query_scale": True}
    return decoder(
        header,
        attention=norms,
        block={"mixer_norm": norm, "mlp_norm": norm, "after": (CarriedConfig(scaled=True),)},
        norm=norm,
        embedding_norm=norm,
        carried=header.embed,
        carries_embedding=True,
        logit_scale=header.number("logit_scale", 0.0) or 1.0,
    )


_interleaved = partial(decoder, interleaved=True)
_gelu = partial(decoder, activation="gelu_tanh")
_parallel = partial(decoder, block={"mlp_norm": None}, block_type=ParallelBlockConfig)
_squared_relu = partial(decoder, activation="relu2")

_layer_norm = partial(Architecture, norms="layer")
_windowless = partial(Architecture, harmless=NO_WINDOW)

ARCHITECTURES = {
    "apertus": Architecture(_apertus),
    # With experts: Mixtral.
    "llama": _windowless(partial(_interleaved, experts={"normalize": True})),
    "arcee": Architecture(partial(_squared_relu, interleaved=True)),
    "baichuan": Architecture(_baichuan),
    "bitnet": Architecture(_bitnet),
    "bloom": _layer_norm(_bloom),
    "chatglm": Architecture(_interleaved),
    "codeshell": _layer_norm(_gelu),
    "cogvlm": Architecture(_cogvlm, unused=r"blk\.\d+\.vis_"),
    "cohere2": _layer_norm(_cohere2, harmless=ONE_BASE),
    "command-r": _layer_norm(_command_r),
    "deci": Architecture(_deci),
    "ernie4_5": Architecture(_interleaved),
    "exaone": Architecture(decoder),
    "exaone4": Architecture(_exaone4, harmless=ONE_BASE),
    "falcon": _layer_norm(
        _falcon,
        {
            f"blocks.{{i}}.{norm}.{end}": [f"blk.{{i}}.{name}.{tensor}" for name in names]
            for norm, names in (
                ("mixer_norm", ("attn_norm_2", "attn_norm")),
                ("mlp_norm", ("attn_norm",)),
            )
            for end, tensor in (("scale", "weight"), ("bias", "bias"))
        },
    ),
    "glm4": Architecture(_glm4),
    "gpt2": _layer_norm(_learned_positions),
    "gptneox": _layer_norm(_gptneox),
    "granite": Architecture(lambda h: decoder(h, **scaled(h))),
    "graniteswitch": Architecture(
        _granite_switch,
        block_names(
            **{
                f"{path}__switched__{part}": f"{tensor}.lora_{end}"
                for path, tensor in (
                    ("mixer__query", "attn_q"),
                    ("mixer__key", "attn_k"),
                    ("mixer__value", "attn_v"),
                    ("mixer__out", "attn_output"),
                    ("mlp__gate", "ffn_gate"),
                    ("mlp__up", "ffn_up"),
                    ("mlp__down", "ffn_down"),
                )
                for part, end in (("down", "a"), ("up", "b"))
            }
        ),
    ),
    "hrm_text": Architecture(_hrm),
    "hunyuan-dense": Architecture(lambda h: decoder(h, attention=head_norms(h, norm_first=False))),
    "hunyuan_vl": Architecture(_hunyuan_vl),
    "internlm2": Architecture(_interleaved),
    "jais": _layer_norm(_jais),
    "jais2": _layer_norm(_squared_relu),
    "maincoder": Architecture(
        lambda h: decoder(h, interleaved=True, attention=head_norms(h, norm_first=False))
    ),
    "minicpm": Architecture(_minicpm),
    "mistral3": Architecture(_mistral3),
    "mpt": _layer_norm(_mpt),
    "muse-glimmer": Architecture(_muse),
    "nanbeige": Architecture(_nanbeige),
    "nemotron": _layer_norm(_squared_relu),
    "olmo": _layer_norm(_olmo),
    "olmo2": Architecture(_olmo2, harmless=ONE_BASE),
    "openelm": Architecture(lambda h: decoder(h, attention=head_norms(h))),
    "orion": _layer_norm(decoder),
    "paddleocr": Architecture(decoder),
    "pangu-embedded": Architecture(decoder),
    "phi2": _layer_norm(partial(_parallel, activation="gelu_tanh")),
    "phi3": _windowless(decoder),
    "plamo": Architecture(_parallel),
    "plamo3": Architecture(
        _plamo3,
        block_names(
            mixer_post_norm__scale=["post_attention_norm", "post_attention_norm.weight"],
            mlp_post_norm__scale=["post_ffw_norm", "post_ffw_norm.weight"],
        ),
    ),
    "qwen": Architecture(_qwen),
    "qwen2": _windowless(decoder),
    "qwen2vl": _windowless(decoder),
    "qwen3": _windowless(lambda h: decoder(h, attention=head_norms(h))),
    "qwen3vl": _windowless(lambda h: decoder(h, attention=head_norms(h))),
    "refact": Architecture(partial(decoder, attention={"rope": None, "alibi": 8.0})),
    "seed_oss": Architecture(decoder),
    "smollm3": Architecture(_smollm3),
    "spark2_5": Architecture(_spark),
    "stablelm": _layer_norm(
        _stablelm, harmless={"use_parallel_residual": "the tensors of norms tell it"}
    ),
    "starcoder": _layer_norm(_learned_positions),
    "starcoder2": _layer_norm(_gelu, harmless=NO_WINDOW),
    "talkie": Architecture(_talkie),
    "xverse": Architecture(_interleaved),
}
