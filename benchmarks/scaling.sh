#!/usr/bin/env bash
# How models scale over the devices of this machine: tables and plots under DIR.
#
#   benchmarks/scaling.sh DIR
#   JAX_NUM_CPU_DEVICES=8 benchmarks/scaling.sh DIR --model=FILE.gguf -p 64 -n 8 -r 1
#
# Without flags of a model: 70B Q4_K_M, 8B Q4_K_M and 8B Q8_0 with random weights, in this order.
# What there is no time for is named and left out: nothing begins after LIMIT seconds (default: 480).
# What is in DIR is not measured again: the same command goes on where it stopped.
# PYTHON is the interpreter (default: python).
set -euo pipefail
out=${1:?"usage: benchmarks/scaling.sh DIR [flags of jaxsplit bench]"}
shift
here=$(dirname "$0")
limit=${LIMIT:-480}
python=${PYTHON:-python}
mkdir -p "$out"

if [ $# = 0 ]; then
  for model in llama-70b:Q4_K_M llama-8b:Q4_K_M llama-8b:Q8_0; do
    # What sums take is measured once.
    mkdir -p "$out/$model"
    if [ -e "$out/llama-70b:Q4_K_M/all_reduce.json" ] && [ ! -e "$out/$model/all_reduce.json" ]; then
      cp "$out/llama-70b:Q4_K_M/all_reduce.json" "$out/$model/"
    fi
    "$python" "$here/scaling.py" --out="$out/$model" --seconds=$((limit - SECONDS)) -- \
      "--random=$model" -p 2048 -n 32 -r 1
  done
  model=--random=llama-8b:Q4_K_M
else
  model=$1
  "$python" "$here/scaling.py" --out="$out/model" --seconds=$((limit - SECONDS)) -- "$@"
fi

devices=$("$python" -c "import jax; print(len(jax.devices()))")
if [ "$devices" -lt 4 ]; then
  exit
fi
half=$((devices / 2))
for slots in 1 16; do
  if [ -e "$out/shapes-$slots/mesh_shapes.md" ]; then
    continue
  elif [ $SECONDS -gt "$limit" ]; then
    echo "out of time: mesh shapes with $slots sequences were not measured"
    continue
  fi
  "$python" "$here/mesh_shapes.py" "$model" --out="$out/shapes-$slots" --slots="$slots" \
    --split="graph@tensor:$devices" \
    --split="graph@stage:2,tensor:$half" \
    --split="graph@data:2,tensor:$half"
done
