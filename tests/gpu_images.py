"""The image path on a GPU: batches finished there against the CPU's, copies that overlap, `bench=data` beside timm.

    python3 tests/gpu_images.py OUT_DIR [bench=data's overrides …]

Makes its own JPEGs, 500×375 pixels, in a scratch folder. Ends with 1 where a batch is not as it should be. On a machine
without a GPU it compares the CPU with itself, which shows that the script runs.
"""

import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dytrun import compose
from dytrun.data import RankShare, train_batches
from dytrun.sources import load_data

# Far above what another order of roundings makes of values up to 5, far below a wrong pixel.
MOST = 1e-4


def tree(root: Path, classes: int = 8, each: int = 64) -> Path:
    """Smooth pictures with some noise: about the bytes of a photograph."""
    y, x = np.mgrid[0:375, 0:500] / 60
    for number in range(classes * each):
        rng = np.random.default_rng(number)
        waves = [np.sin(rng.uniform(0.5, 4) * x + rng.uniform(0, 6)) * np.cos(rng.uniform(0.5, 4) * y) for _ in "rgb"]
        pixels = (np.stack(waves, axis=-1) * 70 + 128 + rng.normal(0, 12, (375, 500, 3))).clip(0, 255)
        folder = root / "train" / f"class{number % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:04}.jpg", quality=90)
    return root


def compared(root: Path, device: torch.device) -> float:
    """Return the largest difference of finished training batches, on the device and on the CPU."""
    config = compose.expand(
        ["data=folder", f"data.root={root}", "augment=paper", "augment.erase_prob=0.5", "data.train_split=train"]
    ).configs[0]
    data = load_data(config.data)
    worst = 0.0
    for batch, first in ((64, 0), (64, 3), (24, 0)):
        share = RankShare(0, 1, batch, 1, 7, first, first + 6)
        ours = train_batches(config, data, share, device, workers=2)
        for one, other in zip(ours, train_batches(config, data, share, torch.device("cpu"), 0), strict=True):
            assert torch.equal(one.indices.cpu(), other.indices)
            torch.testing.assert_close(one.targets.cpu(), other.targets, rtol=0, atol=1e-6)
            worst = max(worst, (one.images.cpu() - other.images).abs().max().item())
    return worst


def main() -> int:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        root = tree(Path(scratch))
        (root / "val").symlink_to("train")
        begun = time.monotonic()
        worst = compared(root, device)
        fallen_back = [str(one.message) for one in warned if "single operators" in str(one.message)]
        took = f"({time.monotonic() - begun:.0f} s)"
        lines = [f"{device}: finished batches differ from the CPU's by {worst:.2g} at most {took}", *fallen_back]
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
        command = [sys.executable, "-m", "dytrun", "bench=data", f"data.root={root}", "bench.peer=timm",
                   f"bench.out={out / 'bench-data.json'}", *overrides]  # fmt: skip
        done = subprocess.run(command, check=False)
    return int(worst > MOST or bool(fallen_back) or done.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
