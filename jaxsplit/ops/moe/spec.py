"""Which MLPs, and which mixtures of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """A perceptron with one hidden layer.

    Attributes:
      intermediate_size: its width.
      activation: a name that `jaxsplit.ops.activations.functions.activate` knows.
      gated: a second projection is multiplied with the activated one (Shazeer 2020,
        arXiv:2002.05202).
      bias: the projections have biases.
    """

    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538).

    Attributes:
      experts: number of experts.
      top_k: experts for each token.
      expert: each of them.
      routing: an expert's weight is the `softmax` of the router's logits, their `sigmoid`, or
        `softmax_after_topk`, the softmax over the top-k logits.
      router_bias: the logits have biases.
      selection_bias: experts have biases that decide about the choice only (Wang et al. 2024,
        arXiv:2408.15664).
      groups: groups of experts, of which the `used_groups` whose two best experts have the largest
        sums are chosen first; 1: all experts are in one.
      used_groups: see `groups`.
      normalize: weights are divided by their sum.
      scale: multiplies weights.
      expert_scale: so does a parameter of each expert.
      apply_router_weight_on_input: weights multiply the input of experts, not their output.
      shared: an MLP that all tokens go through beside; None: there is none.
      shared_gate: its output is multiplied with the sigmoid of a projection of the input.
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
