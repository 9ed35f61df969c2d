"""CUDA C++ inside compiled programs, without a CUDA toolkit.

NVRTC, which comes with JAX's packages for NVIDIA GPUs, compiles a kernel to PTX for any compute
capability; XLA launches it as one of its own kernels, in CUDA graphs too.
"""
