"""The command line: help, plans, exit codes and the lines that go with them. In this process, but for the clock."""

import subprocess
import sys

import pytest
from conftest import TINY, children_cpu_s

from dytrun import cli, compose
from dytrun.usage import COMMANDS, EXAMPLES


def run(monkeypatch, capsys, *args: str) -> tuple[int, str, list[str]]:
    monkeypatch.setattr(sys, "argv", ["dytrun", *args])
    try:
        code = cli.main()
    except SystemExit as left:
        code = left.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip().splitlines()


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_takes_less_than_a_second_of_a_processor(args):
    took = []
    for _ in range(3):
        begun = children_cpu_s()
        done = subprocess.run([sys.executable, "-m", "dytrun", *args], capture_output=True, text=True, check=True)
        took.append(children_cpu_s() - begun)
    assert min(took) < 1
    if len(args) > 1:
        assert all(example in done.stdout for example in EXAMPLES[args[0]])
        assert len(EXAMPLES[args[0]]) == 5


def test_help_lists_every_group_and_key(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "train", "--help")
    for text in ("convnext_b", "fashion_mnist", "quickstart", "global_batch", "max_batch_per_rank", "Mixing partners"):
        assert text in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "'trian' is no command; did you mean 'train'?"),
        (["train", "norm=dyt", "model=timm", "model.name=resnet18"], "no LayerNorm to convert"),
        (["train", "norm=dyt", "model=timm", "model.name=resnet18", "data=digits", "global_batch=8"], "no LayerNorm"),
        (["train", "model=timm", "model.name=vit_bas_patch16_224"], "mean 'vit_base_patch16_224'?"),
        (["train", "model=timm", "model.name=vit_base_patch16_224.nope"], "has no model"),
        (["train", *TINY, "model.kwargs.patch_size=0"], "cannot build vit_tiny_patch16_224"),
        (["train", *TINY, "model.kwargs.depth=-1"], "cannot"),
        (["train", *TINY, "model.kwargs.in_chans=1"], "cannot take RGB images"),
        (["train", *TINY, "model.drop_path=0.1", "model.kwargs.drop_path_rate=0.5"], "say model.drop_path instead"),
        (["train", "=3"], "=3: no key"),
        (["train", *TINY, "norm=dyt", "norm.rules={blocks.9.*: 0.8}"], "norm.rules: 'blocks.9.*' matches no site"),
        (["train", *TINY, "norm=dyt", "norm.rules={final: -1}"], "norm.rules.final: -1"),
        (["train", *TINY, "norm=dyt", "norm.include=[attn]"], "norm.include: 'attn' matches no site"),
        (["train", *TINY, "norm=dyt", "norm.exclude=['*']"], "leave none of the 5 sites"),
        (["train", *TINY, "norm=dyt", "norm.types=[rmsnorm]"], "no RMSNorm to convert (it has 5 LayerNorm)"),
        (["train", *TINY, "norm=dyt", "norm.types=[batchnorm]"], "norm.types: 'batchnorm'"),
        (["train", *TINY, "norm=dyt", "norm.num_groups=2"], "norm.num_groups: another option of this group"),
        (["train", *TINY, "norm=group", "norm.num_groups=5"], "5 groups cannot share the 16 channels"),
        (["train", *TINY, "norm=ln", "norm.alpha_init=1"], "norm.alpha_init: another option of this group"),
        (["train", *TINY, "norm=dty"], "norm=dty: no such option; did you mean 'dyt'?"),
        (["train", *TINY, "norm=_point_wise"], "norm.name: a value is needed"),
        (["train", *TINY, "experiment=vit_b_dyt_"], "did you mean 'vit_b_dyt'?"),
        (["train", *TINY, "norm=dyt", "norm.calibrate=true"], "there is no trained norm to fit"),
        (["train", *TINY, "init_from=/nowhere.pth"], "init_from: /nowhere.pth cannot be read"),
        (["train", *TINY, "init_from=/"], "init_from: / is a directory; give a file of weights"),
        (["eval", "runs", "more"], "takes one directory"),
        (["eval", "-m", "runs"], "takes one directory"),
        (["report", "it's"], "it's: no directory"),
        (["train", "model=vit_b", "norm=dyt"], "IMAGENET_DIR"),
        (["train", "data.root=/nowhere"], "/nowhere is no folder"),
        (["train", "data=digits", "data.image_size=16"], "global_batch: 4096 is more than the 1437 training images"),
        (["train", "data=digits", "global_batch=32"], "is no multiple of the patch size 16"),
        (["train", *TINY, "model.kwargs.bogus=1"], "cannot build vit_tiny_patch16_224"),
        (["train", *TINY, "machine.devices=[0,1]"], "machine.devices: [0, 1] names GPUs"),
        (["train", *TINY, "machine.devices=[0,0]"], "machine.devices: [0, 0] names a device twice"),
        (["train", *TINY, "runs_dir='a\nb'"], "runs_dir: 'a\\nb' is not allowed"),
        (["train", *TINY, "hydra/launcher=local_pool"], "hydra/launcher: it starts the jobs of a sweep"),
        (["train", *TINY, "-m", "hydra/launcher=local_pool", "hydra.launcher.jobs=1000"], "hydra.launcher.jobs: 1000"),
        (["train", *TINY, "-m", "hydra/launcher=local_pool", "hydra.launcher.jobs=0"], "hydra.launcher.jobs: 0 is not"),
        (["train", *TINY, "global_batch=2000"], "more than the 1437 training images"),
        (["train", *TINY, "global_batch=33", "machine.devices=2"], "cannot be split over 2 ranks"),
        (["train", *TINY, "runs_dir=/proc/nowhere"], "runs_dir: /proc/nowhere"),
        (["train", *TINY, "data.root=/mnt"], "data.root: digits comes with dytrun, and /mnt is not read"),
        (["train", "runs"], "'runs' is no key=value"),
        (["train", "--config-dir", "/nowhere"], "--config-dir: /nowhere is no directory"),
        (["train", "model=timm", "model.name=resnet18", "data=digits", "augment=none", "global_batch=32",
          "machine.compile=blocks"],
         "this model has no blocks to compile one by one"),
        (["eval"], "dir: which run?"),
        (["eval", "/nowhere"], "/nowhere: no run there"),
        (["report", "/nowhere"], "/nowhere: no directory"),
        (["report", "a" * 300], f"dir: {'a' * 40}… is longer than a path can be"),
        (["train", "data=folder", f"data.root={'a/' * 3000}"], "a/a/a/… is longer than a path can be"),
        (["report", "confidence=2"], "confidence: 2"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, args, said):
    code, _, err = run(monkeypatch, capsys, *args)
    assert code == 2
    assert len(err) == 1, err
    assert err[0].startswith("dytrun: ")
    assert said in err[0]
    assert not list(tmp_path.iterdir()), "nothing may be left behind"


def test_a_mapping_that_is_typed_twice_is_merged_in_what_is_checked_and_in_what_runs(monkeypatch, capsys):
    words = ("model.kwargs={depth: 1}", "seed=1", "seed=2", "dry_run=true")
    (config,) = compose.expand([*TINY, *words]).configs
    assert (config.model.kwargs["depth"], config.model.kwargs["patch_size"], config.seed) == (1, 4, 2)
    code, out, err = run(monkeypatch, capsys, "train", *TINY, *words)
    assert (code, err) == (0, [])
    assert f"runs/{config.run_name}\n" in out


def test_all_that_is_wrong_is_said_at_once(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "train", "norm=dyt", "norm.alpha_init=-1", "optim.lr=abc", "+bogus=1")
    assert code == 2
    assert len(err) == 3
    assert all(any(key in line for line in err) for key in ("norm.alpha_init", "optim.lr", "bogus"))


def test_a_sweep_is_checked_whole_before_its_first_run(monkeypatch, capsys, tmp_path):
    code, _, err = run(monkeypatch, capsys, "train", "-m", *TINY, "norm=dyt", "norm.alpha_init=0.5,-1")
    assert (code, len(err)) == (2, 1)
    assert "norm.alpha_init: -1" in err[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "norm", "sites", "params"),
    [
        ("vit_b", "dyt", "25 sites converted", "86,567,681"),
        ("vit_b", "ln", "25 LayerNorm sites kept", "86,567,656"),
        ("convnext_l", "dyt", "41 sites converted", "197,767,377"),
    ],
)
def test_a_dry_run_prints_the_plan_and_touches_nothing(monkeypatch, capsys, tmp_path, model, norm, sites, params):
    code, out, err = run(monkeypatch, capsys, "train", f"model={model}", f"norm={norm}", "dry_run=true")
    assert (code, err) == (0, [])
    assert sites in out
    assert f"{params} parameters" in out
    assert "93,600 = 300 epochs × 312" in out
    assert "precision=bf16 is the faster choice" in out
    assert not list(tmp_path.iterdir())


def test_a_dry_sweep_prints_every_plan_and_touches_nothing(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, "train", "experiment=quickstart", "dry_run=true")
    assert code == 0
    assert out.count("plan (nothing was touched)") == 4
    assert not list(tmp_path.iterdir())


def test_a_batch_other_than_the_papers_prints_the_rule(monkeypatch, capsys):
    _, out, _ = run(monkeypatch, capsys, "train", "dry_run=true", "global_batch=1024")
    assert "scaled linearly to 1024 is 0.001" in out


@pytest.mark.parametrize(
    "args",
    [["--cfg", "job", "norm=dyt"], ["norm=dyt", "--cfg", "job"], ["--cfg=job", "norm=dyt"],
     ["seed=1", "--cfg", "job", "norm=dyt"], ["norm=dyt", "-c", "job", "-p", "norm"]],
)  # fmt: skip
def test_hydra_shows_what_it_always_shows(monkeypatch, capsys, args):
    code, out, err = run(monkeypatch, capsys, "train", *args)
    assert (code, err) == (0, [])
    assert "alpha_init: auto" in out


def test_keys_may_stand_on_both_sides_of_a_flag(monkeypatch, capsys):
    args = [*TINY[:6], "-m", "norm=ln,dyt", "global_batch=32", "dry_run=true", "augment=none"]
    code, out, err = run(monkeypatch, capsys, "train", *args)
    assert (code, err) == (0, [])
    assert out.count("plan (nothing was touched)") == 2


def test_completion_can_be_installed(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "-sc", "install=bash")
    assert code == 0
    assert "complete" in out
    assert "dytrun" in out


@pytest.mark.parametrize(
    ("line", "offered"),
    [("dytrun ", "eval"), ("dytrun train norm=", "norm=dyt"), ("dytrun train norm=dyt norm.", "norm.alpha_init=")],
)
def test_shells_can_complete(monkeypatch, capsys, line, offered):
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    _, out, _ = run(monkeypatch, capsys, "-sc", "query=bash")
    assert offered in out


def test_an_experiment_prints_its_figure_its_whole_recipe_and_its_sites(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "train", "experiment=vit_b_dyt", "dry_run=true")
    assert (code, err) == (0, [])
    for text in (
        "vit_b_dyt: top-1 82.5 % (arXiv 2503.10622 v2, Table 1)", "drop-path 0.1", "global_pool=avg",
        "alpha starts at 0.5",
        "crop of 0.08 to 1 of the area, ratio 0.75 to 1.333, bicubic", "flip 0.5", "rand-m9-mstd0.5-inc1",
        "pixel erasing 0.25", "mixup 0.8, cutmix 1, probability 1, switch 0.5; label smoothing 0.1",
        "resize 256, centre crop 224, bicubic", "mean 0.485/0.456/0.406, std 0.229/0.224/0.225",
        "AdamW, betas 0.9 0.999",
        "eps 1e-08", "weight decay 0.05", "no clipping", "decay 0.9999", "lr 0 → 0.004 in 6,240 steps, cosine → 1e-06",
        "4096 =", "fp32 with TF32",
    ):  # fmt: skip
        assert text in out, text
    table = [line[1:-1].split("│") for line in out.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in row] for row in table]
    assert len(rows) == 25
    assert rows[3] == ["blocks.1.norm2", "LayerNorm", "768", "channels last", "feed_forward", "1", "dyt", "0.5"]
    assert rows[-1] == ["fc_norm", "LayerNorm", "768", "channels last", "final", "", "dyt", "0.5"]


def test_imagenet_is_planned_where_it_is_not_but_said_to_be_missing(monkeypatch, capsys):
    args = ["train", "experiment=vit_b_dyt", "data.root=/nowhere"]
    code, out, err = run(monkeypatch, capsys, *args, "dry_run=true")
    assert (code, err) == (0, [])
    assert "1000 classes (data.root=/nowhere is not on this machine: needed to train)" in out
    code, _, err = run(monkeypatch, capsys, *args)
    assert (code, len(err)) == (2, 1)


def test_what_a_run_changes_of_its_page_is_said(monkeypatch, capsys):
    args = ["train", "experiment=vit_b_dyt", "dry_run=true"]
    _, out, _ = run(monkeypatch, capsys, *args, "seed=3", "data.root=null", "machine.compile=blocks")
    assert "is not that recipe" not in out
    _, out, _ = run(monkeypatch, capsys, "train", "experiment=vit_l_alpha_init", "dry_run=true")
    assert out.count("vit_l_alpha_init: no figure") == 8
    assert "is not that recipe" not in out
    _, out, _ = run(monkeypatch, capsys, *args, "optim.lr=1e-3", "norm=ln")
    assert "This run is not that recipe: norm.name ln, there dyt; optim.lr 0.001, there 0.004" in out


def test_the_site_table_says_what_stays_and_where_alpha_starts(monkeypatch, capsys):
    rules = ["norm=dyt", "norm.rules={attention: 0.8, feed_forward@0: 0.2}", "norm.exclude=[final]", "dry_run=true"]
    _, out, _ = run(monkeypatch, capsys, "train", *TINY, *rules)
    rows = [[cell.strip() for cell in line[1:-1].split("│")] for line in out.splitlines() if line.startswith("│")]
    assert [(row[0], row[6], row[7]) for row in rows] == [
        ("blocks.0.norm1", "dyt", "0.8"), ("blocks.0.norm2", "dyt", "0.2"), ("blocks.1.norm1", "dyt", "0.8"),
        ("blocks.1.norm2", "dyt", "0.5"), ("fc_norm", "itself", ""),
    ]  # fmt: skip
    assert "4 sites converted to DyT (LayerNorm), alpha starts at 0.2, 0.5, 0.8; left alone: 1 LayerNorm" in out
