"""Decoders with latent attention."""

import dataclasses
import math

import numpy as np

from jaxsplit.gguf.architectures.entry import Architecture, decoder
from jaxsplit.gguf.header import Header
from jaxsplit.gguf.names import Rows, block_names
from jaxsplit.models.config import BlockConfig, ModelConfig
from jaxsplit.models.mixer_config import LatentAttentionConfig


def _deepseek2(header: Header) -> ModelConfig:
    """Old files have keys' and values' projections of a head in one tensor, and give the widths of
    whole heads where newer ones give those of the latent vector."""
    fused = not header.has("blk.*.attn_k_b.weight")
    end = "" if fused else "_mla"
    turning = header.number("rope.dimension_count", least=2)
    width = header.number(f"attention.key_length{end}", least=turning + 1)
    factor = header.number("rope.scaling.factor", 1.0) or 1.0
    multiplier = header.number("rope.scaling.yarn_log_multiplier", 0.0)
    rope = header.rope(turning, interleaved=True)
    if multiplier:
        # YaRN's magnitude is in the scale of the scores instead.
        magnitude = 1 / (1 + 0.1 * math.log(factor))
        rope = dataclasses.replace(rope, attention_factor=magnitude)
    mixer = LatentAttentionConfig(
        heads=header.number("attention.head_count", least=1),
        head_dim=width - turning,
        value_dim=header.number(f"attention.value_length{end}", least=1),
        latent=header.number("attention.kv_lora_rank", least=1),
        query_latent=header.number("attention.q_lora_rank", 0),
        rope=rope,
        scale=(1 + multiplier * math.log(factor)) ** 2 / math.sqrt(width),
        norm=header.norm(),
        keys_by_row=fused,
    )
    return decoder(header, block={"mixer": mixer})


def _part(keys: bool) -> Rows:
    """The rows of keys or of values, which alternate by head."""

    def order(block: BlockConfig) -> np.ndarray:
        c = block.mixer
        rows = np.arange(c.heads * (c.head_dim + c.value_dim)).reshape(c.heads, -1)
        return rows[:, : c.head_dim] if keys else rows[:, c.head_dim :]

    return Rows("attn_kv_b.weight", order=order)


ARCHITECTURES = {
    "deepseek2": Architecture(
        _deepseek2,
        block_names(
            mixer__query_down__kernel="attn_q_a.weight",
            mixer__query_norm__scale="attn_q_a_norm.weight",
            mixer__query__kernel=["attn_q_b.weight", "attn_q.weight"],
            mixer__latent__kernel="attn_kv_a_mqa.weight",
            mixer__latent_norm__scale="attn_kv_a_norm.weight",
            mixer__key_up=["attn_k_b.weight", _part(keys=True)],
            mixer__value_up=["attn_v_b.weight", _part(keys=False)],
        ),
    ),
}
