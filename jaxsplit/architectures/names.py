"""Which tensor of a GGUF file each parameter of the decoder is.

Tensor names: `gguf/constants.py` of the `gguf` package.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np

from jaxsplit.errors import JaxsplitError
from jaxsplit.formats import ModelFile
from jaxsplit.models.config import LayerConfig, ModelConfig
from jaxsplit.ops.moe.spec import MoEConfig

Layout = Callable[[LayerConfig], tuple[int, Sequence[int]]]
"""How the rows of a tensor are divided: into how many groups, and the rows of each part of one."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of a tensor that several parameters share.

    Attributes:
      tensor: its name.
      after: the parameters beside this one, in the same block, whose rows come before.
      part: instead: which part of each group of rows.
      layout: the groups.
    """

    tensor: str
    after: tuple[str, ...] = ()
    part: int = 0
    layout: Layout | None = None

    def of(
        self, available: int, count: int, block: LayerConfig | None, start: int = 0
    ) -> np.ndarray | None:
        """Which rows they are: int `[count]`; None: the tensor has not as many.

        Args:
          available: rows of the tensor.
          count: rows of the parameter.
          block: the layer; None: it is outside of layers.
          start: rows of the parameters that come before.
        """
        if self.layout is None or block is None:
            return np.arange(start, start + count) if start + count <= available else None
        try:
            groups, parts = self.layout(block)
        except AttributeError:  # the layer is of another kind
            return None
        if groups * sum(parts) != available or groups * parts[self.part] != count:
            return None
        start = sum(parts[: self.part])
        rows = np.arange(available).reshape(groups, -1)
        return rows[:, start : start + parts[self.part]].reshape(-1)


Names = Mapping[str, Sequence[str | Rows]]
"""Parameter path to the tensors that it may be, `{i}` being the layer: the first that is in the
file is taken."""


def block_names(**names: str | Rows | Sequence[str | Rows]) -> dict[str, list[str | Rows]]:
    """Names inside a block, given without its prefix and with `__` for dots."""
    found = {}
    for path, choices in names.items():
        choices = [choices] if isinstance(choices, str | Rows) else choices
        found[f"blocks.{{i}}.{path.replace('__', '.')}"] = [
            dataclasses.replace(choice, tensor=f"blk.{{i}}.{choice.tensor}")
            if isinstance(choice, Rows)
            else f"blk.{{i}}.{choice}"
            for choice in choices
        ]
    return found


def _qkv(end: str) -> dict[str, list[str | Rows]]:
    """Names of the three projections' weights or biases."""
    part = "kernel" if end == "weight" else end
    query, key = f"mixer.query.{part}", f"mixer.key.{part}"
    fused = f"attn_qkv.{end}"
    return block_names(
        **{
            query.replace(".", "__"): [f"attn_q.{end}", Rows(fused)],
            key.replace(".", "__"): [f"attn_k.{end}", Rows(fused, (query,))],
            f"mixer__value__{part}": [f"attn_v.{end}", Rows(fused, (query, key))],
        }
    )


def _halves(block: LayerConfig) -> tuple[int, list[int]]:
    """Rows of gates and of the others where each expert has both."""
    moe = cast(MoEConfig, getattr(block.mlp, "moe", block.mlp))
    return moe.experts, [moe.expert.intermediate_size] * 2


def side_by_side(names: Names) -> dict[str, Sequence[str | Rows]]:
    """Names of an MLP and of experts in one layer."""
    prefix = "blocks.{i}.mlp."
    parts = dict.fromkeys(("gate", "up", "down"), "dense")
    parts |= dict.fromkeys(("router", "experts", "expert_scale"), "moe")
    return {
        f"{prefix}{parts[part]}.{part}{rest}": choices
        for path, choices in names.items()
        for part, dot, end in [path.removeprefix(prefix).partition(".")]
        for rest in [dot + end]
        if path.startswith(prefix) and part in parts
    }


def beside(names: Names, name: str) -> Names:
    """Names of a mixer's parameters as those of a mixer of this name beside another."""

    def moved(choice: str | Rows) -> str | Rows:
        if isinstance(choice, str):
            return choice
        after = tuple(path.replace("mixer.", f"mixer.{name}.", 1) for path in choice.after)
        return dataclasses.replace(choice, after=after)

    return {
        path.replace(".mixer.", f".mixer.{name}.", 1): [moved(choice) for choice in choices]
        for path, choices in names.items()
        if ".mixer." in path
    }


NAMES: Names = {
    "embedding.table": ["token_embd.weight"],
    "embedding_norm.scale": ["token_embd_norm.weight"],
    "embedding_norm.bias": ["token_embd_norm.bias"],
    "embedding_offset": ["hrm.z_l_init"],
    "positions": ["position_embd.weight"],
    "freq_factors.freqs": ["rope_freqs.weight"],
    "freq_factors.long": ["rope_factors_long.weight"],
    "freq_factors.short": ["rope_factors_short.weight"],
    "per_layer_embeddings.embedding.table": ["per_layer_token_embd.weight"],
    "per_layer_embeddings.project.kernel": ["per_layer_model_proj.weight"],
    "per_layer_embeddings.norm.scale": ["per_layer_proj_norm.weight"],
    "norm.scale": ["output_norm.weight", "token_embd_norm.weight"],
    "norm.bias": ["output_norm.bias"],
    "head.kernel": ["output.weight"],
    "head.bias": ["output.bias"],
    **_qkv("weight"),
    **_qkv("bias"),
    "head_residual.gates.mix.kernel": ["output_hc_fn.weight"],
    "head_residual.gates.scale": ["output_hc_scale.weight"],
    "head_residual.gates.base": ["output_hc_base.weight"],
    "head_residual.norm.scale": ["output_hc_norm.weight"],
    "head_residual.down.kernel": ["output_hc_down.weight"],
    "head_residual.up.kernel": ["output_hc_up.weight"],
    "altup.kernel": ["altup_proj.weight"],
    "head_residual.kernel": ["altup_unembd_proj.weight"],
    "head_residual.score.scale": ["output_res_score.weight"],
    "blocks.{i}.after.end_norm.norm.scale": ["output_norm.weight"],
    **block_names(
        mixer_residual__gates__mix__kernel="hc_attn_fn.weight",
        mixer_residual__gates__scale="hc_attn_scale.weight",
        mixer_residual__gates__base="hc_attn_base.weight",
        mixer_residual__norm__scale="hc_attn_norm.weight",
        mixer_residual__down__kernel="hc_attn_down.weight",
        mixer_residual__up__kernel="hc_attn_up.weight",
        mixer_residual__inject__kernel="hc_attn_inject.weight",
        mixer_residual__score__scale="attn_res_score.weight",
        mlp_residual__gates__mix__kernel="hc_ffn_fn.weight",
        mlp_residual__gates__scale="hc_ffn_scale.weight",
        mlp_residual__gates__base="hc_ffn_base.weight",
        mlp_residual__norm__scale="hc_ffn_norm.weight",
        mlp_residual__down__kernel="hc_ffn_down.weight",
        mlp_residual__up__kernel="hc_ffn_up.weight",
        mlp_residual__inject__kernel="hc_ffn_inject.weight",
        mlp_residual__score__scale="ffn_res_score.weight",
        altup__router_norm__scale="altup_router_norm.weight",
        altup__router__kernel="altup_router.weight",
        altup__predict__kernel="altup_predict_coef.weight",
        altup__correct__kernel="altup_correct_coef.weight",
        altup__correct_scale="altup_correct_scale.weight",
        laurel__down__kernel="laurel_l.weight",
        laurel__up__kernel="laurel_r.weight",
        laurel__norm__scale="laurel_post_norm.weight",
        mixer_norm__scale="attn_norm.weight",
        mixer_norm__bias="attn_norm.bias",
        mixer_post_norm__scale="post_attention_norm.weight",
        mlp_norm__scale=["ffn_norm.weight", "post_attention_norm.weight"],
        mlp_norm__bias="ffn_norm.bias",
        mlp_post_norm__scale="post_ffw_norm.weight",
        after__per_layer_embedding__gate__kernel="inp_gate.weight",
        after__per_layer_embedding__out__kernel="proj.weight",
        after__per_layer_embedding__norm__scale="post_norm.weight",
        after__output_scale__scale="layer_output_scale.weight",
        after__carried__scale="layer_output_scale.weight",
        per_layer_embedding__gate__kernel="inp_gate.weight",
        per_layer_embedding__out__kernel="proj.weight",
        per_layer_embedding__norm__scale="post_norm.weight",
        mixer__query_scale="attn_q_norm.weight",
        mixer__query_norm__scale="attn_q_norm.weight",
        mixer__query_norm__bias="attn_q_norm.bias",
        mixer__key_norm__scale="attn_k_norm.weight",
        mixer__key_norm__bias="attn_k_norm.bias",
        mixer__sinks="attn_sinks.weight",
        mixer__gate__kernel="attn_gate.weight",
        mixer__out_norm__scale="attn_sub_norm.weight",
        mixer__out__kernel="attn_output.weight",
        mixer__out__bias="attn_output.bias",
        mlp__gate__kernel=["ffn_gate.weight", Rows("ffn_up.weight")],
        mlp__gate__bias="ffn_gate.bias",
        mlp__up__kernel=["ffn_up.weight", Rows("ffn_up.weight", ("mlp.gate.kernel",))],
        mlp__up__bias="ffn_up.bias",
        mlp__norm__scale="ffn_sub_norm.weight",
        mlp__down__kernel="ffn_down.weight",
        mlp__down__bias="ffn_down.bias",
        mlp__router__kernel="ffn_gate_inp.weight",
        mlp__router__bias="ffn_gate_inp.bias",
        mlp__table="ffn_gate_tid2eid.weight",
        mlp__selection_bias=["exp_probs_b.bias", "exp_probs_b"],
        mlp__expert_scale="ffn_down_exps.scale",
        mlp__experts__gate__kernel=[
            "ffn_gate_exps.weight",
            Rows("ffn_gate_up_exps.weight", part=0, layout=_halves),
        ],
        mlp__experts__gate__bias="ffn_gate_exps.bias",
        mlp__experts__up__kernel=[
            "ffn_up_exps.weight",
            Rows("ffn_gate_up_exps.weight", part=1, layout=_halves),
        ],
        mlp__experts__up__bias="ffn_up_exps.bias",
        mlp__experts__down__kernel="ffn_down_exps.weight",
        mlp__experts__down_bias="ffn_down_exps.bias",
        mlp__shared__gate__kernel=["ffn_gate_shexp.weight", Rows("ffn_up_shexp.weight")],
        mlp__shared__up__kernel=[
            "ffn_up_shexp.weight",
            Rows("ffn_up_shexp.weight", ("mlp.shared.gate.kernel",)),
        ],
        mlp__shared__down__kernel="ffn_down_shexp.weight",
        mlp__shared_gate="ffn_gate_inp_shexp.weight",
        mlp__latent_down__kernel=["ffn_latent_down.weight", "ffn_routed_down.weight"],
        mlp__latent_norm__scale="ffn_routed_norm.weight",
        mlp__latent_up__kernel=["ffn_latent_up.weight", "ffn_routed_up.weight"],
    ),
}


def tensor_names(
    file: ModelFile,
    config: ModelConfig,
    names: Names,
    unused: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[str, np.ndarray | None]]:
    """Which tensor each parameter comes from.

    Args:
      file: the model's header.
      config: its config.
      names: where parameters may come from.
      unused: pattern of tensors that the model does not need.
      shapes: of the parameters, by paths such as `blocks.0.mlp.up.kernel`.

    Returns:
      parameter path to tensor name, and which rows of it (`Source.rows`).

    Raises:
      JaxsplitError: tensors are missing, have another shape than the parameter, or would not be
        used; the message names them all.
    """
    more = file.metadata.get(f"{file.architecture}.nextn_predict_layers", 0)
    found, problems, taken = {}, [], {}
    for path, shape in shapes.items():
        layer = "".join(re.findall(r"^blocks\.(\d+)\.", path))
        choices = names.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", path), ())
        prefix = f"blocks.{layer}." if layer else ""
        source = config.source(int(layer)) if layer else ""
        misfit = None
        for choice in choices:
            name = (choice.tensor if isinstance(choice, Rows) else choice).format(i=source)
            tensor = file.tensors.get(name)
            if tensor is None:
                continue
            available = _rows(tensor.shape, len(shape) > 1)
            rows, fits = None, available == _rows(shape)
            if isinstance(choice, Rows):
                siblings = [prefix + sibling for sibling in choice.after]
                if all(sibling in shapes for sibling in siblings):
                    block = config.blocks[int(layer)] if layer else None
                    before = [_rows(shapes[s]) for s in siblings]
                    rows = choice.of(available, _rows(shape), block, sum(before))
                fits = rows is not None
                if rows is not None:
                    rows = rows.reshape(shape[:-1] if len(shape) > 1 else shape)
            if fits and (len(shape) == 1 or tensor.shape[-1:] == shape[-1:]):
                found[path] = name, rows
                taken[name] = taken.get(name, 0) + math.prod(shape)
                break
            misfit = misfit or f"{name} has shape {tensor.shape}, expected {shape}"
        else:
            first = choices[0] if choices else path
            first = first.tensor if isinstance(first, Rows) else first
            problems.append(misfit or f"{first.format(i=source)} is missing")
    for name, weights in taken.items():
        if weights < math.prod(shape := file.tensors[name].shape) and not re.match(unused, name):
            problems.append(f"{name} has shape {shape}, of which only a part would be used")
    problems += sorted(
        f"{name} is not used by this architecture"
        for name in set(file.tensors) - set(taken)
        if not re.match(unused, name) and not _is_beyond(name, config.layers, more)
    )
    if problems:
        rest = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise JaxsplitError(f"{file.path}: tensors do not fit: {'; '.join(problems[:5])}{rest}")
    return found


def _rows(shape: tuple[int, ...], is_matrix: bool | None = None) -> int:
    """Rows of an array: all its dimensions but the last; of a vector, whose tensor may have any
    shape, its elements."""
    is_matrix = len(shape) > 1 if is_matrix is None else is_matrix
    return math.prod(shape[:-1] if is_matrix else shape)


def _is_beyond(name: str, layers: int, more: int) -> bool:
    """Whether a tensor belongs to one of the layers that predict more tokens than the next."""
    match = re.match(r"blk\.(\d+)\.", name)
    return match is not None and layers <= int(match[1]) < layers + more
