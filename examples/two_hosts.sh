#!/usr/bin/env bash
# Two processes as two hosts would be, each with two CPU devices: half of the layers each.
# With real hosts: the same command on each, its own --process_id, and the address of the first.
set -euo pipefail
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2
python=${PYTHON:-python}
common=(--mesh=stage:2,tensor:2 --coordinator=localhost:${PORT:-12355} --num_processes=2
  --ctx_size=256 --temperature=0)
"$python" -m jaxsplit.generate "${common[@]}" --process_id=1 &
"$python" -m jaxsplit.generate "${common[@]}" --process_id=0 --prompt="The sky is" --n_predict=8
wait
