#!/usr/bin/env bash
# What the norms do, on a GPU, and what looking at them costs; which of the GPU's own numbers W&B keeps. From the
# repository's root, on a machine with CUDA and dytrun's dependencies:
#
#     bash tests/gpu_probes.sh FASHION_MNIST_DIR OUT_DIR
#
# FASHION_MNIST_DIR holds the four IDX files (Debian: dataset-fashion-mnist). About four minutes on one H200 (estimated:
# not yet run). Figures belong in runs/README.md, with the date and the device.
set -euo pipefail
data=$1 out=$2
mkdir -p "$out"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# LN against DyT, a ViT-S of 64 tokens and twelve blocks.
runs=$(mktemp -d)
python3 -m dytrun train -m model=vit_s model.kwargs.patch_size=4 data=fashion_mnist "data.root=$data" augment=light \
  epochs=15 global_batch=512 machine.max_batch_per_rank=512 optim.lr=1e-3 optim.warmup_epochs=2 ema=off \
  precision=bf16 machine.compile=blocks norm=ln,dyt tracking.mode=offline "runs_dir=$runs" 2>&1 | tee "$out/train.log"
for run in "$runs"/vit*/; do
  name=$(basename "$run")
  cp "$run/result.json" "$out/$name.json"
  python3 -m dytrun probe "$run" "out=$out/$name" 2>&1 | tee -a "$out/probe.log" || echo "no probe of $name" | tee -a "$out/probe.log"
  for part in "$run"/wandb/offline-run-*; do
    wandb leet inspect --json "$part" | grep -o '"gpu[^"]*"' | sort | uniq -c | tee -a "$out/wandb.log" || true
  done
done

# A probe every 20 steps of a ViT-B, beside none.
python3 tests/probe_cost.py 20 10 model=vit_b norm=dyt precision=bf16 machine.compile=blocks global_batch=128 \
  machine.max_batch_per_rank=128 2>&1 | tee "$out/probe_cost.log"
