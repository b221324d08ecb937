"""The short table of gpu_norms.sh: what was to be shown on an H200, and what was found: `gpu_norms.py DIR`."""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main() -> int:
    """Print a line for each goal that there are figures for."""
    folder = Path(sys.argv[1])
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not found:
        sys.stdout.write(f"no figures in {folder}\n")
        return 1
    sys.stdout.write(f"{next(iter(found.values()))['device']}\n")
    for what, goal, value in [*_layers(found), *_models(found)]:
        sys.stdout.write(f"{what:<62} {goal:>12} {value:>12}\n")
    return 0


def _layers(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in ("norm", "norm_512", "shapes"):
        for shape in found.get(name, {"shapes": []})["shapes"]:
            layers = {(one["arm"], one["mode"]): one for one in reversed(shape["layers"])}  # the first of two counts
            copy = statistics.median(shape["copy_ms"]) / 2  # a byte read or written costs as much
            for part, moved, goal in (("forward", 2, "85 %"), ("backward", 3, "75 %")):
                share = 100 * moved * copy / _ms(layers["dyt", "eager"], part)
                wanted = f">= {goal}" if name == "norm" else ""
                yield f"{shape['shape']}: eager dyt {part}, share of copy bandwidth", wanted, f"{share:.0f} %"
                for arm, wanted in (("liger", "<= 1"), ("ln", ""), ("plain", "")):
                    if (arm, "eager") in layers:
                        ratio = _ms(layers["dyt", "eager"], part) / _ms(layers[arm, "eager"], part)
                        yield f"{shape['shape']}: eager dyt {part} / {arm}'s", wanted, f"{ratio:.3f}"
            if (host := layers["dyt", "eager"]["host_us"]) is not None:
                yield f"{shape['shape']}: host, eager dyt forward and backward, µs", "", f"{host:.0f}"
            for part in ("forward", "backward"):
                for arm in ("dyt", "sigmoid", "plain", "rms"):
                    if {(arm, "compiled"), ("ln", "compiled")} <= layers.keys():
                        goal = "<= 1.1" if (arm, part, name) == ("dyt", "backward", "norm") else ""
                        ratio = _ms(layers[arm, "compiled"], part) / _ms(layers["ln", "compiled"], part)
                        yield f"{shape['shape']}: compiled {arm} {part} / LN's", goal, f"{ratio:.3f}"


def _ms(layer: dict[str, Any], part: str) -> float:
    return statistics.median(layer[f"{part}_ms"])


def _models(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in ("eager", "compiled"):
        for measured in found.get(name, {"measured": []})["measured"]:
            for arm in measured["arms"]:
                rate = 1e3 * found[name]["batch"] / statistics.median(ms for row in arm["step_ms"] for ms in row)
                goal = ">= 3,500" if (name, measured["pass"]) == ("compiled", "train") else ""
                yield f"{found[name]['model']} {name} {measured['pass']} {arm['arm']}, img/s", goal, f"{rate:,.0f}"
    if "trainer" in found:
        bare, ours = found["trainer"]["bare_ms"][0], found["trainer"]["dytrun_ms"]
        ratio = statistics.median(b / a for a, b in zip(bare, ours, strict=True))
        yield "dytrun's loop / a bare one", "<= 1.03", f"{ratio:.3f}"
    if "llama" in found:
        for cell in found["llama"]["measured"]:
            if cell["arm"] in ("plain", "dyt", "identity") and cell["what"] == "whole":
                what = f"llama {cell['mode']} {cell['pass']}: {cell['arm']} / RMSNorm"
                yield what, "", f"{cell['ratio']['median']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
