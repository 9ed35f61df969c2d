"""What the GPU tests use beside the public API: the only file here that knows internal names."""

import jax

from jaxsplit.context import MatmulPolicy


def kernels_run(device: jax.Device) -> bool:
    """Whether this package's kernels run on a device."""
    return MatmulPolicy.for_device(device).kernels
