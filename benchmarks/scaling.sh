#!/usr/bin/env bash
# How models scale over the devices of this machine, in some ten minutes: tables and plots under DIR.
#
#   benchmarks/scaling.sh DIR
#   JAX_NUM_CPU_DEVICES=8 benchmarks/scaling.sh DIR --model=FILE.gguf -p 64 -n 8 -r 1
#
# Without flags of a model: 70B Q4_K_M, 8B Q4_K_M and 8B Q8_0 with random weights, in this order.
# What there is no time for is named and left out: nothing begins after LIMIT seconds (default: 540).
# PYTHON is the interpreter (default: python).
set -euo pipefail
out=${1:?"usage: benchmarks/scaling.sh DIR [flags of scaling.py]"}
shift
here=$(dirname "$0")
limit=${LIMIT:-540}
python=${PYTHON:-python}
runs=("$*")
if [ $# = 0 ]; then
  runs=()
  for model in llama-70b:Q4_K_M llama-8b:Q4_K_M llama-8b:Q8_0; do
    runs+=("--random=$model -p 2048 -n 32 -r 1")
  done
fi

for i in "${!runs[@]}"; do
  # The flags are words on purpose.
  # shellcheck disable=SC2086
  "$python" "$here/scaling.py" ${runs[$i]} --out="$out/$i" --seconds=$((limit - SECONDS))
done

devices=$("$python" -c "import jax; print(len(jax.devices()))")
if [ "$devices" -lt 4 ]; then
  exit
fi
half=$((devices / 2))
model=${runs[-1]%% *}
for slots in 1 16; do
  if [ $SECONDS -gt "$limit" ]; then
    echo "out of time: mesh shapes with $slots sequences were not measured"
    continue
  fi
  "$python" "$here/mesh_shapes.py" "$model" --out="$out/shapes-$slots" --slots="$slots" \
    --split="graph@tensor:$devices" \
    --split="graph@stage:2,tensor:$half" \
    --split="graph@data:2,tensor:$half"
done
