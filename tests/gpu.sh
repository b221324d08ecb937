#!/usr/bin/env bash
# What only a GPU can show; the norms' speed is another script's (gpu_norms.sh). From the repository's root, on a machine
# with CUDA and dytrun's dependencies:
#
#     bash tests/gpu.sh FASHION_MNIST_DIR OUT_DIR
#
# FASHION_MNIST_DIR holds the four IDX files (Debian: dataset-fashion-mnist). OUT_DIR gets the log, the report and the
# results, small enough to copy home; figures belong in runs/README.md, with the date and the device. About ten
# minutes on one H200 (estimated: not yet run).
set -euo pipefail
data=$1 out=$2
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# The engine's tests on the device: accumulation, precision, clipping, divergence without a stop, EMA, resuming.
# addopts without the shape checks, whose packages may be missing there.
DYTRUN_TEST_DEVICE=cuda python3 -m pytest -q -p no:cacheprovider -o addopts= -o timeout=0 -W ignore \
  tests/test_engine.py tests/test_parity.py 2>&1 |
  tee "$out/engine.log" || echo "engine tests failed on the device" | tee -a "$out/engine.log"

# The image path: batches finished on the device against the CPU's, the loader beside timm's, does it feed a ViT-B? About
# two minutes.
python3 tests/gpu_images.py "$out" model=vit_b precision=bf16 machine.compile=blocks machine.max_batch_per_rank=128 \
  'bench.workers=[4,15]' bench.rounds=5 2>&1 | tee "$out/images.log" || echo "the image path failed" | tee -a "$out/images.log"

# LN against DyT on real images, bf16, compiled; a ViT-S of 64 tokens.
runs=$(mktemp -d)
python3 -m dytrun train -m model=vit_s model.kwargs.patch_size=4 data=fashion_mnist "data.root=$data" augment=light \
  epochs=15 global_batch=512 machine.max_batch_per_rank=512 optim.lr=1e-3 optim.warmup_epochs=2 ema=off \
  precision=bf16 machine.compile=blocks norm=ln,dyt,derf seed=0,1 tracking.mode=off "runs_dir=$runs" 2>&1 |
  tee "$out/train.log"
cp "$runs/report.json" "$runs/report.html" "$out"
for result in "$runs"/*/result.json; do
  cp "$result" "$out/$(basename "$(dirname "$result")").json"
done

# Compile time and step time of a ViT-B and a ConvNeXt-B: uncompiled, block by block, whole. About six minutes.
python3 tests/scaling.py --rounds 1 2>&1 | tee "$out/scaling.log"

# What checkpoints cost a ViT-B, with this machine's disk. About two minutes.
python3 tests/checkpoint_cost.py --every 20 --steps 100 model=vit_b precision=bf16 global_batch=128 \
  machine.max_batch_per_rank=128 ema=on 2>&1 | tee "$out/checkpoint_cost.log"
