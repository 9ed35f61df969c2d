"""Compiles programs of models with well-known shapes for GPUs that are not there.

  python tests/gpu/compile_programs.py

prints, as the last line, a JSON object of what was compiled, by name: `kernels`, their names in
order; `collectives`, how many of each kind; and `temporary`, bytes beside arguments and results.

What compiles is XLA's plugin for GPUs: the packages `jax-cuda13-plugin` and `jax-cuda13-pjrt` in
the version of jaxlib, with `nvidia-cuda-nvcc` and `nvidia-nvvm`. `make test` installs them.
"""

import dataclasses
import json
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# With a compilation cache, kernels that programs have in common are compiled once.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "xla_gpu_kernel_cache_file"
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import jax
import random_gguf
from gpu import internals
from jax.experimental import topologies

from jaxsplit.plan.compiled import collectives

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_A100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 167936 threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 1935360000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
  device_memory_size: 84974239744 shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA A100-SXM4-80GB"
"""
GPUS = {"H100": (_H100, 9.0), "A100": (_A100, 8.0)}

VOCABULARY = 32768

PROGRAMS = {
    f"{shape} {gpu} x{count} {what} {layers}": (shape, layers, gpu, count, options)
    for shape, gpu, count, what, options in (
        ("llama-8b", "H100", 1, "decode", {}),
        ("llama-8b", "H100", 2, "decode", {}),
        ("llama-8b", "H100", 2, "decode nccl", {"nccl": True}),
        ("llama-8b", "H100", 1, "decode 128", {"sequences": 128}),
        ("llama-8b", "H100", 2, "decode 128", {"sequences": 128}),
        ("llama-8b", "A100", 1, "decode", {}),
        ("llama-8b", "H100", 1, "prefill", {"prefill": 512}),
        ("llama-8b", "H100", 2, "prefill", {"prefill": 512}),
        ("llama-8b", "H100", 2, "prefill nccl", {"prefill": 512, "nccl": True}),
        ("llama-8b", "H100", 1, "prefill cuda", {"prefill": 512, "cuda": True}),
        ("llama-8b", "H100", 1, "decode cuda", {"cuda": True}),
        ("llama-8b", "H100", 1, "decode 8 cuda", {"cuda": True, "sequences": 8}),
        ("llama-8b", "H100", 1, "decode 128 cuda", {"cuda": True, "sequences": 128}),
        ("llama-8b", "H100", 2, "decode cuda", {"cuda": True, "nccl": True}),
        ("qwen3-30b-a3b", "H100", 1, "decode", {}),
        ("qwen3-30b-a3b", "H100", 1, "decode cuda", {"cuda": True}),
        ("qwen3-30b-a3b", "H100", 2, "decode", {}),
        ("llama-8b", "H100", 1, "decode IQ4_KS", {"mix": "mix-IQ4_KS"}),
        ("llama-8b", "H100", 1, "decode IQ2_KT", {"mix": "mix-IQ2_KT"}),
        ("qwen3-30b-a3b", "H100", 1, "decode IQ2_KL", {"mix": "mix-IQ2_KL"}),
        ("gpt-oss-20b", "H100", 1, "decode", {"mix": "MXFP4_MOE"}),
    )
    for layers in (1, 2)
}
"""By name: the model's shape and layers, the GPUs, and what is compiled."""

_NO_KERNELS = "parameter|constant|tuple|get-tuple-element|bitcast|partition-id|replica-id|after-all"


def kernels(text: str) -> list[str]:
    """What an optimized program launches, by name or operation, in order."""
    entry = text[text.index("\nENTRY") :]
    operations = re.findall(r"^ +(?:ROOT )?%([\w.-]+) = .*? ([a-z][\w-]*)\(", entry, re.MULTILINE)
    return [name for name, kind in operations if not re.fullmatch(_NO_KERNELS, kind)]


def main() -> None:
    """Compiles all programs."""
    jax.devices()  # finds the plugin
    found = {}
    for name, (shape, layers, gpu, count, options) in PROGRAMS.items():
        config, capability = GPUS[gpu]
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=config, topology=f"1x1x{count}"
        )
        small = dataclasses.replace(random_gguf.SHAPES[shape], layers=layers, vocab=VOCABULARY)
        random_gguf.SHAPES["small"] = small
        options = {"mix": "Q4_K_M", **options}
        file = random_gguf.random_model(f"small:{options.pop('mix')}")
        traced = internals.trace_for(topology.devices, capability, file, **options)
        compiled = traced.lower().compile()
        text = compiled.as_text()
        found[name] = {
            "kernels": kernels(text),
            "collectives": dict(collectives(text)[0]),
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
        }
        print(name, len(found[name]["kernels"]), found[name]["collectives"], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
