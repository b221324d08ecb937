#!/usr/bin/env bash
# How fast the norms are on a GPU, and whether they are right there. From the repository's root, on a machine with CUDA
# and dytrun's dependencies (and liger-kernel, if it is to be measured beside):
#
#     bash tests/gpu_norms.sh OUT_DIR            # under eight minutes on one H200 (estimated: not yet run there)
#     TRIAL=1 bash tests/gpu_norms.sh OUT_DIR    # the same in small, anywhere: whether the script itself works
#
# OUT_DIR gets a JSON file and a log of each measurement; what is printed last is the short table (gpu_norms.py) that
# belongs in runs/README.md, with the date and the device. Each part has a time limit, and the next one runs anyway.
set -uo pipefail
out=$1
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
vit_b=256x197x768 batch_512=512x197x768
others="256x197x1024,'128x128x56x56:channels_last','128x128x56x56:channels_first'"
model="model=vit_b precision=bf16 bench.batch=256"
rounds=21 fewer=11
if [ -n "${TRIAL:-}" ]; then
  vit_b=4x9x96 batch_512=8x9x96 others="4x9x128,'2x32x6x6:channels_last','2x32x6x6:channels_first'" rounds=3 fewer=3
  export TRITON_INTERPRET=1
  model="model=vit_ti precision=bf16 bench.batch=2"
fi

# part NAME LIMIT_S ARGUMENTS...: measure, keep what is printed.
part() {
  local name=$1 limit=$2
  shift 2
  echo "+ dytrun $* ($(date +%T))"
  timeout "$limit" python3 -m dytrun "$@" "bench.out=$out/$name.json" >"$out/$name.log" 2>&1 || {
    echo "$name failed ($?):"
    tail -3 "$out/$name.log"
  }
}

part norm 110 bench=norm precision=bf16 "bench.shapes=[$vit_b]" bench.rounds=$rounds
part norm_512 30 bench=norm precision=bf16 "bench.shapes=[$batch_512]" "bench.modes=[eager]" bench.rounds=$rounds
# shellcheck disable=SC2086
part model 150 bench=model $model machine.compile=blocks bench.rounds=$fewer
# shellcheck disable=SC2086
part trainer 60 bench=trainer $model norm=dyt machine.compile=blocks bench.rounds=$rounds
part shapes 90 bench=norm precision=bf16 "bench.shapes=[$others]" bench.rounds=$fewer
# The kernels against float64 on the device; many are compiled, so this comes last.
echo "+ pytest tests/kernel_cases.py ($(date +%T))"
timeout 120 python3 -m pytest -q -x -p no:cacheprovider -o addopts= -o timeout=0 -W ignore tests/kernel_cases.py \
  >"$out/kernels.log" 2>&1
tail -2 "$out/kernels.log"
[ -n "${TRIAL:-}" ] || part llama 120 bench=llama precision=bf16 bench.rounds=9
python3 tests/gpu_norms.py "$out"
