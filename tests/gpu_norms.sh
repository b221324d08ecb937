#!/usr/bin/env bash
# How fast the norms are on a GPU, and whether they are right there. From the repository's root, on a machine with CUDA
# and dytrun's dependencies (and liger-kernel, if it is to be measured beside):
#
#     bash tests/gpu_norms.sh OUT_DIR            # layers, a ViT-B, the trainer, the kernels' values
#     bash tests/gpu_norms.sh OUT_DIR llama      # the paper's table of efficiency
#     TRIAL=1 bash tests/gpu_norms.sh OUT_DIR    # the same in small, anywhere: whether the script itself works
#
# On one H200 the first is estimated at six minutes (it has not yet been run there), and ends after nine at the latest.
# OUT_DIR gets a JSON file and a log of each part. What is printed last is the short table (gpu_norms.py) that belongs
# in runs/README.md, with the date and the device. A part that fails does not stop the next one, and counts in the exit
# status.
set -uo pipefail
out=$1
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
vit_b=256x197x768 batch_512=512x197x768
others="256x197x1024,'128x128x56x56:channels_last','128x128x56x56:channels_first'"
# Without drop-path, whose rate is another one in every block, all blocks are one compiled graph.
model=(model=vit_b model.drop_path=0 precision=bf16 bench.batch=256 machine.compile=blocks)
rounds=21 fewer=9
if [ -n "${TRIAL:-}" ]; then
  export TRITON_INTERPRET=1
  vit_b=4x9x96 batch_512=8x9x96 others="4x9x128,'2x32x6x6:channels_last','2x32x6x6:channels_first'"
  model=(model=vit_ti model.drop_path=0 precision=bf16 bench.batch=2 machine.compile=blocks)
  rounds=3 fewer=3
fi

failed=0
finish() {
  python3 tests/gpu_norms.py "$out"
  echo "$failed part(s) failed"
  exit "$failed"
}
trap finish EXIT

# part NAME LIMIT_S COMMAND...: run, keep what is printed.
part() {
  local name=$1 limit=$2
  shift 2
  echo "+ $* ($(date +%T))"
  timeout "$limit" python3 -m "$@" >"$out/$name.log" 2>&1 || {
    failed=$((failed + 1))
    echo "$name failed:"
    tail -3 "$out/$name.log"
  }
}
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" dytrun "$@" "bench.out=$out/$name.json"
}

if [ "${2:-}" = llama ]; then
  bench llama 500 bench=llama precision=bf16 bench.rounds=$fewer
  exit
fi
bench norm 100 bench=norm precision=bf16 "bench.shapes=[$vit_b]" bench.rounds=$rounds
bench norm_512 30 bench=norm precision=bf16 "bench.shapes=[$batch_512]" "bench.modes=[eager]" bench.rounds=$fewer
bench compiled 120 bench=model "${model[@]}" "bench.modes=[compiled]" bench.rounds=$fewer bench.steps=4
bench eager 70 bench=model "${model[@]}" "bench.modes=[eager]" bench.rounds=$fewer bench.steps=4
bench trainer 50 bench=trainer "${model[@]}" norm=dyt bench.rounds=$fewer
bench shapes 90 bench=norm precision=bf16 "bench.shapes=[$others]" bench.rounds=$fewer
# The kernels against float64 on the device: right before fast, but there are many to compile.
part kernels 80 pytest -q -x -p no:cacheprovider -o addopts= -o timeout=0 -W ignore tests/kernel_cases.py
tail -1 "$out/kernels.log"
