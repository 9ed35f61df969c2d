"""What a block of threads may have on a GPU (CUDA C++ Programming Guide, "Technical Specifications
per Compute Capability")."""

_SHARED_KIB = (
    {7.0: 96, 7.2: 96, 7.5: 64}
    | {8.0: 163, 8.7: 163}
    | dict.fromkeys((9.0, 10.0, 10.1, 10.3, 11.0), 227)
)


def shared_kib(capability: float) -> int:
    """Shared memory of a block in KiB, by compute capability."""
    return 48 if capability < 7 else _SHARED_KIB.get(capability, 99)
