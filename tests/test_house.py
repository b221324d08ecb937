"""The law of the house, read from the source with ast: who may import whom, how long a file and a function may be."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from dytrun.config import RunConfig
from dytrun.validation import _leaves

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dytrun"
FILES = sorted(PACKAGE.glob("*.py"))

# What each file may import of ours. A file that is not here may not exist.
MAY_IMPORT = {
    "__init__": {"library"},
    "library": {"alphas", "convert", "errors", "norm", "sites"},
    "foreign": set(),
    "__main__": {"cli"},
    "cli": {"commands", "compose", "errors", "guard", "owner", "pool", "slurm", "stop", "task", "usage", "validation"},
    "compose": {"bench_config", "config", "errors", "guard", "hydra_settings", "pack_config", "usage", "validation"},
    "task": {"commands", "compose", "errors", "launch", "ranks", "records", "stop", "terminal"},
    "board": {"task", "terminal"},
    "pool": {"board", "launcher_config", "machine", "ranks", "stop", "task"},
    "slurm": {"board", "errors", "launcher_config", "stop", "task", "terminal"},
    "commands": {
        "bench", "bench_config", "compose", "config", "dashboard", "errors", "launch", "owner", "pack", "pack_config",
        "probe", "records", "report", "shards", "task", "terminal", "watch",
    },
    "watch": {"board", "errors", "owner", "records", "task"},
    "usage": set(),
    "config": {"digest", "norm_config", "subject_config"},
    "norm_config": set(),
    "bench_config": {"config", "norm_config"},
    "bench": {
        "bench_config", "bench_data", "bench_model", "bench_norm", "bench_stack", "bench_trainer", "errors", "machine",
        "paired", "records", "wandb_link",
    },
    "bench_norm": {"bench_config", "errors", "model", "norm", "paired", "records", "timing"},
    "bench_model": {
        "arm", "batch", "bench_config", "compute", "config", "convert", "errors", "model", "norm", "norm_config",
        "paired", "records", "sites", "state", "timing",
    },
    "bench_trainer": {
        "arm", "bench_config", "bench_model", "checkpoint", "compute", "config", "distributed", "engine", "model",
        "norm", "optim", "paired", "records", "state", "surroundings", "throughput", "timing", "tracking",
    },
    "bench_data": {
        "batch", "bench_config", "bench_model", "bench_stages", "bench_trainer", "config", "data", "errors",
        "loader_arm", "machine", "paired", "records", "sources", "timing", "timm_loader",
    },
    "bench_stages": {"augment", "config", "data", "errors", "images", "jpeg", "pixels", "records", "sources", "timing"},
    "loader_arm": {"timing"},
    "timm_loader": {"config", "errors", "processes", "sources"},
    "bench_stack": {"bench_config", "errors", "llama", "model", "paired", "records", "timing"},
    "llama": {"norm"},
    "paired": set(),
    "timing": set(),
    "launcher_config": {"norm_config", "validation"},
    "digest": {"errors"},
    "validation": {"errors", "guard"},
    "guard": {"errors"},
    "hydra_settings": {"errors", "guard", "usage"},
    "records": set(),
    "launch": {
        "checkpoint", "config", "owner", "records", "plan", "ranks", "run", "distributed", "machine", "errors", "stop",
        "terminal",
    },
    "stop": set(),
    "owner": {"config", "errors", "records", "terminal"},
    "ranks": {"errors", "machine", "stop"},
    "plan": {
        "arm", "augment", "config", "convert", "feed", "machine", "model", "optim", "sites", "subject_config", "text",
        "warmstart",
    },
    "run": {
        "agreement", "arm", "checkpoint", "compute", "config", "data", "distributed", "engine", "errors", "evaluate",
        "feed", "jpeg", "machine", "model", "norm", "optim", "owner", "processes", "records", "replay", "resume",
        "sources", "state", "stop", "surroundings", "terminal", "throughput", "tracking", "validation", "warmstart",
        "watchdog",
    },
    "resume": {
        "checkpoint", "compute", "config", "distributed", "errors", "feed", "machine", "norm", "optim", "owner",
        "sources", "usage",
    },
    "replay": {
        "agreement", "batch", "checkpoint", "compute", "config", "data", "distributed", "errors", "feed", "optim",
        "records", "sources", "surroundings",
    },
    "arm": {"augment", "config", "convert", "data", "language", "library", "model", "sites", "subject_config"},
    "warmstart": {
        "arm", "calibrate", "config", "data", "digest", "distributed", "errors", "records", "sites", "sources",
        "weights",
    },
    "weights": {"checkpoint", "errors", "norm"},
    "calibrate": {"activations", "errors", "functions", "norm"},
    "activations": {"functions", "norm"},
    "probe": {
        "activations", "arm", "checkpoint", "compute", "config", "data", "errors", "machine", "model", "probe_figures",
        "probe_page", "probe_sites", "processes", "records", "run", "sites", "sources", "wandb_link",
        "wandb_reach",
    },
    "probe_sites": {"activations", "calibrate", "errors", "functions", "norm", "sites"},
    "probe_figures": {"functions", "probe_sites"},
    "probe_page": {"activations", "probe_figures", "probe_sites", "records"},
    "engine": {
        "activations", "agreement", "batch", "checkpoint", "compute", "config", "distributed", "errors", "evaluate",
        "optim", "records", "state", "surroundings", "watchdog",
    },
    "surroundings": {"batch", "checkpoint", "distributed", "optim", "throughput"},
    "agreement": {"distributed"},
    "alphas": set(),
    "corpus": {"errors"},
    "feed": {"batch", "config", "data", "sources", "text"},
    "language": {"errors", "subject_config"},
    "subject_config": {"alphas", "norm_config"},
    "text": {"augment", "batch", "config", "corpus", "data", "errors", "folders"},
    "compute": {"batch", "config", "distributed"},
    "state": {"checkpoint", "config", "distributed", "errors", "optim", "throughput"},
    "watchdog": {"distributed"},
    "evaluate": {"batch", "distributed", "errors", "records"},
    "batch": set(),
    "processes": {"errors", "stop"},
    "dali": {"augment", "dali_graph"},
    "dali_graph": {"augment", "rand_augment"},
    "data": {
        "augment", "batch", "config", "dali", "dali_graph", "errors", "finish", "images", "jpeg", "machine", "pixels",
        "processes", "rand_augment", "sources",
    },
    "images": {"errors", "jpeg", "pixels"},
    "jpeg": {"native", "pixels"},
    "sources": {"config", "errors", "folders", "images", "shards"},
    "folders": {"errors", "images"},
    "seal": set(),
    "shards": {"config", "errors", "folders", "norm_config", "seal"},
    "pack_config": {"config", "norm_config"},
    "intake": {"archives", "errors", "folders", "images", "pack_config", "parquet", "terminal"},
    "pack": {"errors", "folders", "intake", "pack_config", "packers", "records", "seal", "shards", "terminal"},
    "packers": {"errors", "folders", "images", "pixels", "records", "seal", "shards", "stop"},
    "archives": {"errors", "folders", "images"},
    "parquet": {"errors", "folders", "images"},
    "augment": {"config", "images", "pixels", "rand_augment"},
    "rand_augment": {"pixels"},
    "finish": {"augment", "config", "errors", "pixels"},
    "pixels": {"native"},
    "model": {"config", "errors", "subject_config", "validation"},
    "machine": {"config", "errors", "launcher_config"},
    "norm": {"cpu_kernels", "functions", "kernels"},
    "functions": set(),
    "cpu_kernels": {"native"},
    "native": set(),
    "kernels": {"curves"},
    "curves": set(),
    "convert": {"errors", "foreign", "functions", "norm", "sites"},
    "sites": {"errors", "foreign"},
    "optim": {"config", "errors", "norm"},
    "throughput": set(),
    "checkpoint": {"errors"},
    "distributed": {"errors"},
    "terminal": {"records"},
    "tracking": {"config", "errors", "journal", "records", "wandb_link", "wandb_reach"},
    "journal": {"errors", "records"},
    "wandb_link": {"config", "errors", "labels", "records", "site_chart", "wandb_log", "wandb_reach"},
    "wandb_log": set(),
    "wandb_reach": {"config", "errors"},
    "site_chart": set(),
    "dashboard": {"config", "errors", "pairs", "records", "report", "wandb_reach"},
    "labels": set(),
    "stats": set(),
    "image_stats": {"stats"},
    "runs": {"errors", "records"},
    "contrast": {"image_stats", "records", "runs", "stats"},
    "verdict": {"contrast", "stats"},
    "pairs": {"contrast", "errors", "labels", "records", "runs", "verdict"},
    "report": {"config", "contrast", "page", "pairs", "records", "runs", "stats", "verdict"},
    "page": {"cost_figures", "figures", "markup", "pairs", "recipe", "records", "runs", "site_figures"},
    "figures": {"contrast", "pairs", "runs"},
    "site_figures": {"figures"},
    "cost_figures": {"contrast", "figures", "runs"},
    "markup": {"figures"},
    "recipe": {"figures", "markup", "records", "runs"},
    "errors": set(),
}  # fmt: skip
ONLY_IN = {
    "hydra_plugins": {"slurm"},
    "hydra": {"cli", "compose", "hydra_settings", "pool", "slurm", "task"},
    "omegaconf": {"compose", "hydra_settings"},
    "submitit": {"launch", "slurm"},
    "wandb_workspaces": {"dashboard"},
    "wandb": {"wandb_link", "wandb_log", "wandb_reach"},
    "nvidia": {"dali_graph"},
    "triton": {"curves", "kernels"},
    "pyarrow": {"parquet"},
    "matplotlib": {"probe_figures"},
}
WITHOUT_TORCH = {
    "cli",
    "compose",
    "task",
    "stop",
    "board",
    "slurm",
    "launcher_config",
    "usage",
    "commands",
    "guard",
    "hydra_settings",
    "owner",
    "validation",
    "config",
    "records",
    "digest",
    "norm_config",
    "subject_config",
    "alphas",
    "corpus",
    "bench_config",
    "paired",
    "pairs",
    "contrast",
    "verdict",
    "runs",
    "report",
    "page",
    "figures",
    "site_figures",
    "cost_figures",
    "markup",
    "recipe",
    "stats",
    "image_stats",
    "errors",
    "terminal",
    "journal",
    "tracking",
    "wandb_link",
    "wandb_log",
    "watch",
    "wandb_reach",
    "site_chart",
    "dashboard",
    "labels",
    "images",
    "folders",
    "seal",
    "shards",
    "pack_config",
    "pack",
    "packers",
    "archives",
    "intake",
    "parquet",
    "pixels",
    "native",
}
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 350, 60, 6


def imports(tree: ast.Module, everywhere: bool = True) -> set[str]:
    """Return the modules that a file imports, dytrun's own as `dytrun.x`; or only those at its top."""
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "dytrun":
            names = {alias.name for alias in node.names}
            found |= {f"dytrun.{name}" if f"{name}.py" in {file.name for file in FILES} else "dytrun" for name in names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(str(node.module))
    return found


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_imports_only_what_its_room_allows(file):
    ours = {name.split(".")[1] for name in imports(ast.parse(file.read_text())) if name.startswith("dytrun.")}
    assert file.stem in MAY_IMPORT, f"{file.name} has no room in the house"
    assert ours <= MAY_IMPORT[file.stem], f"{file.name} may not import {sorted(ours - MAY_IMPORT[file.stem])}"


def test_every_room_of_the_law_exists():
    assert {file.stem for file in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_stays_in_its_files(library):
    users = {
        file.stem
        for file in FILES
        if any(name.split(".")[0] == library for name in imports(ast.parse(file.read_text())))
    }
    assert users == ONLY_IN[library]


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_light_files_do_not_import_torch(name):
    heavy = {"torch", "torchvision", "timm"}
    assert not {found.split(".")[0] for found in imports(ast.parse((PACKAGE / f"{name}.py").read_text()))} & heavy


def test_the_command_line_imports_nothing_heavy_at_its_top():
    waiting, seen = {"cli"}, set()
    while waiting:
        seen.add(name := waiting.pop())
        top = imports(ast.parse((PACKAGE / f"{name}.py").read_text()), everywhere=False)
        assert not {name.split(".")[0] for name in top} & {"hydra", "omegaconf", "pydantic", "torch", "rich", "numpy"}
        waiting |= {found.split(".")[1] for found in top if found.startswith("dytrun.")} - seen
    assert seen == {"cli", "compose", "errors", "guard", "stop", "task", "usage"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_and_functions_stay_small(file):
    text = file.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for function in functions(ast.parse(text)):
        lines = function.end_lineno - function.lineno + 1
        arguments = function.args
        count = len(arguments.posonlyargs + arguments.args + arguments.kwonlyargs)
        count -= bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
        assert lines <= MAX_FUNCTION_LINES, f"{function.name} has {lines} lines"
        assert count <= MAX_PARAMETERS, f"{function.name} takes {count} parameters"


def test_no_cupboards_and_no_inheritance_between_our_classes():
    assert not {"utils", "common", "helpers", "registry", "misc"} & {file.stem for file in FILES}
    trees = [ast.parse(file.read_text()) for file in FILES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    ours = {node.name for node in classes}
    for node in classes:
        bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
        assert not bases & ours, f"{node.name} inherits from {bases & ours}"
        assert not re.search(r"(Manager|Handler|Helper|Utils|Base|Trainer)$", node.name)


@pytest.mark.parametrize("file", [file for file in FILES if file.stem != "cli"], ids=lambda file: file.stem)
def test_only_the_command_line_prints(file):
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_every_key_of_the_configuration_is_read_somewhere():
    source = "\n".join(
        file.read_text() for file in FILES if file.stem not in ("config", "norm_config", "subject_config")
    )
    source += (PACKAGE / "config.py").read_text().partition("def _parts_fit")[2]
    dead = [path for path in _leaves(RunConfig) if not re.search(rf"[.\"']{path.rpartition('.')[2]}\b", source)]
    assert not dead


def test_the_configuration_types_hold_no_values():
    trees = [
        ast.parse((PACKAGE / name).read_text())
        for name in (
            "config.py",
            "norm_config.py",
            "subject_config.py",
            "launcher_config.py",
            "bench_config.py",
            "pack_config.py",
        )
    ]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "BaseModel" for base in node.bases):
            valued = [
                item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and item.value is not None
            ]
            assert not valued, f"{node.name} has values for {valued}; they belong in conf/"


def test_conf_holds_values_and_no_logic():
    for path in (ROOT / "conf").rglob("*.yaml"):
        text = path.read_text()
        # Hydra builds its launchers by name, and nothing else here is built so.
        ours = {"local_pool": "LocalPool", "slurm": "Slurm"} if path.parent.name == "launcher" else {}
        targets = re.findall(r"_target_: *(.*)", text)
        assert targets == ([f"hydra_plugins.dytrun.{ours[path.stem]}"] if ours else [])
        assert yaml.safe_load(text) is not None, path


def test_the_top_level_holds_nothing_else():
    allowed = {
        "pyproject.toml", "README.md", "constraints.txt", "LICENSE", "conf", "dytrun", "tests", "runs", ".ci",
        ".gitignore", ".git",
    }  # fmt: skip
    tracked = {path.name for path in ROOT.iterdir() if not path.name.startswith(".") or path.name in allowed}
    made = {"build", "dist", "data"} | {path.name for path in ROOT.glob("*.egg-info")}
    assert tracked - made <= allowed


def test_versions_agree():
    import dytrun

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == dytrun.__version__
