"""Configurations of MLPs and of mixtures of experts."""

import dataclasses

from jaxsplit.ops.activations.functions import Activation
from jaxsplit.ops.norm.spec import NormConfig


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """An MLP with one hidden layer.

    Attributes:
      intermediate_size: number of hidden units.
      activation: as `jaxsplit.ops.activations.functions.activate` takes it.
      gated: the activated projection multiplies a second one (Shazeer 2020, arXiv:2002.05202).
      bias: the projections have biases.
      norm: of the hidden units; None: no norm.
      sparsity: gates below their mean plus this many standard deviations are 0; None: all are kept.
    """

    intermediate_size: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    norm: NormConfig | None = None
    sparsity: float | None = None


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538).

    Attributes:
      experts: number of experts.
      top_k: experts per token.
      expert: the MLP of each expert.
      routing: how logits become router weights: `softmax`, `sigmoid`, `sqrt_softplus`, or
        `softmax_after_topk`, the softmax over the top-k logits only.
      router_bias: the router has a bias.
      selection_bias: a bias per expert that affects the selection but not the router weights (Wang
        et al. 2024, arXiv:2408.15664).
      groups: groups of experts. A token selects its experts from the `used_groups` groups with the
        largest sums of their two best scores. 1: no groups.
      used_groups: see `groups`.
      normalize: router weights are divided by their sum.
      scale: multiplies router weights.
      expert_scale: a parameter per expert multiplies its router weights.
      apply_router_weight_on_input: router weights multiply the input of experts, not their output.
      shared: an MLP that every token goes through in addition; None: there is none.
      shared_gate: the sigmoid of a projection of the input multiplies the output of `shared`.
      by_token: a table tells the experts of each of `vocab` token ids; else the router selects
        them.
      latent: experts work on a projection of the input to this width, and their sum is projected
        back (LatentMoE); 0: on the input.
      latent_norm: of the sum before it is projected back; None: no norm.
    """

    experts: int
    top_k: int
    expert: MLPConfig
    routing: str = "softmax"
    router_bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    used_groups: int = 1
    normalize: bool = False
    scale: float = 1.0
    expert_scale: bool = False
    apply_router_weight_on_input: bool = False
    shared: MLPConfig | None = None
    shared_gate: bool = False
    by_token: bool = False
    vocab: int = 0
    latent: int = 0
    latent_norm: NormConfig | None = None
