"""What a forward pass depends on beside its modules and arrays: one context, set while tracing."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from jaxsplit.cuda.nvrtc import compiles_for
from jaxsplit.errors import JaxsplitError
from jaxsplit.pallas import has_triton
from jaxsplit.sharding.axes import AxisRules

if TYPE_CHECKING:
    from jaxsplit.comm.peers import PeerGroup


def compute_capability(device: jax.Device) -> float:
    """That of an NVIDIA GPU, such as 9.0; 0 of any other device."""
    found = str(getattr(device, "compute_capability", ""))
    nvidia = device.platform in ("gpu", "cuda") and found.replace(".", "").isdigit()
    return float(found) if nvidia else 0.0


_CUDA_CAPABILITY = 6.1
"""With an instruction for dot products of 8-bit integers."""

_NEEDED = {
    "triton": "a GPU of compute capability 8.0 or later, and a JAX with Pallas-Triton",
    "cuda": "an NVIDIA GPU of compute capability 6.1 or later, and an NVRTC that compiles for it "
    "and is no newer than the driver (jax[cuda12] and jax[cuda13] install one)",
}


@dataclasses.dataclass(frozen=True)
class MatmulPolicy:
    """How activations are multiplied with matrices.

    Attributes:
      int8_activations: one or two rows, and with CUDA C++ alone up to 16 or 64, are rounded to 8
        bits for quantized matrices.
      float8: rows too many for kernels that dequantize as they multiply are rounded to 8-bit
        floating point, and so are the quantized matrices.
      kernels: the devices run Triton kernels.
      cuda: compute capability for which kernels in CUDA C++ are compiled; 0: there are none. Beside
        Triton kernels, they multiply what those do not.
      interpret: kernels are interpreted, to test them without a GPU.
      pdl: a kernel may start before the one it depends on has ended (programmatic dependent
        launch), which takes compute capability 9.0.
    """

    int8_activations: bool = False
    float8: bool = False
    kernels: bool = False
    cuda: float = 0.0
    interpret: bool = False
    pdl: bool = False

    @property
    def has_kernels(self) -> bool:
        """Whether any backend's kernels run."""
        return self.kernels or self.cuda > 0

    @property
    def only_cuda(self) -> bool:
        """Whether all kernels are in CUDA C++."""
        return self.cuda > 0 and not self.kernels

    @staticmethod
    def for_device(device: jax.Device, kernels: str = "auto") -> "MatmulPolicy":
        """The policy of a device, without rounding.

        Args:
          device: of the mesh.
          kernels: as in `LoadConfig`. Triton needs compute capability 8.0, and a JAX that has it;
            CUDA C++ needs 6.1, and NVRTC.

        Raises:
          JaxsplitError: these kernels do not run on this device.
        """
        if kernels == "interpret":
            return MatmulPolicy(kernels=True, interpret=True)
        capability = compute_capability(device)
        runs = {
            "triton": capability >= 8 and has_triton(),
            "cuda": capability >= _CUDA_CAPABILITY and compiles_for(capability),
            "xla": True,
        }
        if not runs.get(kernels, True):
            raise JaxsplitError(
                f"kernels={kernels} does not run on {device.device_kind} with JAX "
                f"{jax.__version__}: it needs {_NEEDED[kernels]}; try kernels=auto"
            )
        chosen = next(name for name in runs if runs[name]) if kernels == "auto" else kernels
        if chosen == "cuda":
            return MatmulPolicy(cuda=capability)
        cuda = capability if kernels == "auto" and runs["cuda"] else 0.0
        return MatmulPolicy(kernels=chosen == "triton", cuda=cuda, pdl=capability >= 9)


DEFAULT_POLICY = MatmulPolicy()
"""Without kernels, without rounding."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What decides how the forward pass is traced.

    Attributes:
      rules: which mesh axes split which logical axes.
      policy: how matrices are multiplied.
      peers: devices that all-reduce in kernels; None: there are none.
      fuse_all_reduce: matmul kernels send their results to the peers themselves.
      lora_scales: of each adapter in each sequence, float32 `[batch, adapters]`; None: those that
        the adapters were loaded with.
      token_adapters: which of a model's own adapters each token has, float32 `[batch, time,
        adapters]`, one 1 each; None: the model has none.
    """

    rules: AxisRules = dataclasses.field(default=AxisRules(), metadata={"static": True})
    policy: MatmulPolicy = dataclasses.field(default=DEFAULT_POLICY, metadata={"static": True})
    peers: "PeerGroup | None" = None
    fuse_all_reduce: bool = dataclasses.field(default=True, metadata={"static": True})
    lora_scales: jax.Array | None = None
    token_adapters: jax.Array | None = None


_PLAIN = ForwardContext()
_current: contextvars.ContextVar[ForwardContext] = contextvars.ContextVar(
    "forward_context", default=_PLAIN
)


def current_context() -> ForwardContext:
    """The context of the code that is being traced."""
    return _current.get()


def interpreted() -> bool:
    """Whether kernels of the code that is being traced are interpreted."""
    return current_context().policy.interpret


@contextlib.contextmanager
def forward_context(context: ForwardContext | None = None, **changes: Any) -> Iterator[None]:
    """Sets the context of the code that is traced inside the block.

    Args:
      context: the new one; None: the current one.
      **changes: fields of it to change.
    """
    token = _current.set(dataclasses.replace(context or _current.get(), **changes))
    try:
        yield
    finally:
        _current.reset(token)
