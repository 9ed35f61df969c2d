"""A model's weights: the tensors behind its parameters, and loading them onto the devices."""

from jaxsplit.weights.sources import (
    Source,
    Sources,
    abstract_decoder,
    abstract_parameters,
    describe_split,
    layer_costs,
    parameter_bytes,
    parameter_placement,
    parameter_sources,
    parameters,
    split_model,
    stage_bytes,
)

__all__ = [
    "Source",
    "Sources",
    "abstract_decoder",
    "abstract_parameters",
    "describe_split",
    "layer_costs",
    "parameter_bytes",
    "parameter_placement",
    "parameter_sources",
    "parameters",
    "split_model",
    "stage_bytes",
]
