"""Glances at the norms of a compiled model: python probe_compiled.py prints, for each way to compile, what was compiled
before the first glance and after some, and whether the same batch still gives the same loss. For test_probe, because
jaxtyping's hook and torch.compile do not go together.
"""

import json
import sys

import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters

from dytrun import activations
from dytrun.arm import build_arm
from dytrun.bench_model import random_batch
from dytrun.compose import expand
from dytrun.compute import autocast, train_loss
from dytrun.model import compile_model

CPU = torch.device("cpu")
torch.set_num_threads(1)
torch._inductor.config.compile_threads = 1
config = expand([*sys.argv[1:], "norm=dyt"]).configs[0]
found = {}
for how in ("model", "blocks"):
    torch._dynamo.reset()
    counters.clear()
    model, sites = build_arm(config, 10)
    compile_model(model, how)
    model.train()
    batch = random_batch(config, 16, CPU)
    seen = []
    for _ in range(3):
        loss = train_loss(model, batch, config)
        loss.backward()
        compiled = {name: dict(counters[name]) for name in ("stats", "frames", "graph_break")}
        seen.append([loss.item(), compiled])
        glance = activations.glance(model, [site.name for site in sites], batch.images[:8], autocast(config, CPU))
    found[how] = {"seen": seen, "sites": len(glance.alpha)}
sys.stdout.write(json.dumps(found))
