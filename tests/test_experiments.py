"""The pages of conf/experiment/: each published result, its recipe and its figure, against the papers' numbers."""

import re

import pytest
from conftest import config_of

from dytrun.usage import CONF

# About no published figure.
OWN = re.compile(r"quickstart|llama_tiny")
PAGES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if not OWN.match(path.stem))

# page: (model, drop-path, norm, top-1). DyT: arXiv 2503.10622 v2; drop-path from its repository's README.
DYT_PAPER = {
    "vit_b_ln": ("vit_base_patch16_224", 0.1, "ln", 82.3),
    "vit_b_dyt": ("vit_base_patch16_224", 0.1, "dyt", 82.5),
    "vit_l_ln": ("vit_large_patch16_224", 0.4, "ln", 83.1),
    "vit_l_dyt": ("vit_large_patch16_224", 0.4, "dyt", 83.6),
    "convnext_b_ln": ("convnext_base", 0.5, "ln", 83.7),
    "convnext_b_dyt": ("convnext_base", 0.5, "dyt", 83.7),
    "convnext_l_ln": ("convnext_large", 0.5, "ln", 84.3),
    "convnext_l_dyt": ("convnext_large", 0.5, "dyt", 84.4),
    "vit_b_dyt_lr6e-3": ("vit_base_patch16_224", 0.1, "dyt", 82.8),
    "vit_b_dyt_alpha1": ("vit_base_patch16_224", 0.1, "dyt", 82.6),
    "vit_s_dyt": ("vit_small_patch16_224", 0.1, "dyt", 80.3),
    "vit_s_hardtanh": ("vit_small_patch16_224", 0.1, "hardtanh", 79.9),
    "vit_s_sigmoid": ("vit_small_patch16_224", 0.1, "sigmoid", 79.6),
    "vit_s_identity": ("vit_small_patch16_224", 0.1, "identity", None),
    "vit_b_hardtanh": ("vit_base_patch16_224", 0.1, "hardtanh", 82.2),
    "vit_b_sigmoid": ("vit_base_patch16_224", 0.1, "sigmoid", 81.6),
    "vit_b_identity": ("vit_base_patch16_224", 0.1, "identity", None),
    "vit_b_dyt_no_alpha": ("vit_base_patch16_224", 0.1, "dyt", 81.1),
    "vit_b_hardtanh_no_alpha": ("vit_base_patch16_224", 0.1, "hardtanh", 80.7),
    "vit_b_sigmoid_no_alpha": ("vit_base_patch16_224", 0.1, "sigmoid", 80.7),
    "vit_b_alpha_init": ("vit_base_patch16_224", 0.1, "dyt", None),
    "vit_l_alpha_init": ("vit_large_patch16_224", 0.4, "dyt", None),
    "convnext_b_alpha_init": ("convnext_base", 0.5, "dyt", None),
    "convnext_l_alpha_init": ("convnext_large", 0.5, "dyt", None),
}
# Derf: arXiv 2512.10938 v2; drop-path from its Table 17, which is not DyT's.
_B, _L = ("vit_base_patch16_224", 0.15), ("vit_large_patch16_224", 0.5)
DERF_PAPER = {
    "vit_b_ln_dp015": (*_B, "ln", 82.3),
    "vit_b_dyt_dp015": (*_B, "dyt", 82.5),
    "vit_b_derf": (*_B, "derf", 82.8),
    "vit_b_rms": (*_B, "rms", 82.4),
    "vit_b_group": (*_B, "group", 82.5),
    "vit_l_ln_dp05": (*_L, "ln", 83.1),
    "vit_l_dyt_dp05": (*_L, "dyt", 83.6),
    "vit_l_derf": (*_L, "derf", 83.8),
    "vit_l_rms": (*_L, "rms", 83.0),
    "vit_l_group": (*_L, "group", 83.1),
    "vit_b_satursin": (*_B, "satursin", 82.6),
    "vit_b_arcsinh_clip": (*_B, "arcsinh_clip", 82.5),
    "vit_b_exproot": (*_B, "exproot", 82.4),
    "vit_b_arctan": (*_B, "arctan", 82.4),
    "vit_b_smoothsign": (*_B, "smoothsign", 82.4),
    "vit_b_isru": (*_B, "isru", 82.3),
    "vit_b_expsign": (*_B, "expsign", 82.2),
    "vit_b_cubsign": (*_B, "cubsign", 81.4),
    "vit_b_linear_clip": (*_B, "hardtanh", 82.3),
    "vit_b_derf_no_shift": (*_B, "derf", 82.6),
    "vit_b_dyt_shift": (*_B, "dyt", 82.6),
}
PUBLISHED = DYT_PAPER | DERF_PAPER
# What a page may change of the paper's recipe besides model and norm.
CHANGED = {
    "vit_b_dyt_lr6e-3": {"lr": 6e-3}, "vit_b_dyt_alpha1": {"alpha_init": 1.0},
    "vit_b_linear_clip": {"shift_init": 0.0},
    "vit_b_derf_no_shift": {"shift_init": None}, "vit_b_dyt_shift": {"shift_init": 0.0},
}  # fmt: skip
CHANGED |= {f"vit_b_{f}_no_alpha": {"alpha_init": 1.0, "learn_alpha": False} for f in ("dyt", "hardtanh", "sigmoid")}


def test_there_is_a_page_for_each_published_result_and_no_other():
    assert set(PAGES) == set(PUBLISHED)


@pytest.mark.parametrize("page", PUBLISHED)
def test_a_page_is_the_papers_recipe(page):
    config = config_of(f"experiment={page}", "hydra.mode=RUN")
    model, drop_path, norm, top1 = PUBLISHED[page]
    changed = CHANGED.get(page, {})
    assert (config.model.name, config.model.drop_path, config.norm.name) == (model, drop_path, norm)
    assert (config.published.page, config.published.top1, config.published.differs) == (page, top1, [])
    paper = "2503.10622" if page in DYT_PAPER else "2512.10938"
    assert paper in config.published.source
    betas = (0.9, 0.95) if "large_patch16" in model else (0.9, 0.999)
    assert config.optim.model_dump() == {
        "lr": changed.get("lr", 4e-3), "betas": betas, "eps": 1e-8, "weight_decay": 0.05, "min_lr": 1e-6,
        "warmup_epochs": 20, "clip_grad": None, "layer_decay": 1.0, "stop_at_spike": False,
    }  # fmt: skip
    assert config.augment.model_dump() == {
        "scale": (0.08, 1.0), "ratio": (0.75, 4 / 3), "interpolation": "bicubic", "hflip": 0.5,
        "rand_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4, "erase_prob": 0.25, "erase_mode": "pixel",
        "mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "mix_switch_prob": 0.5, "smoothing": 0.1,
    }  # fmt: skip
    assert (config.epochs, config.global_batch, config.precision) == (300, 4096, "fp32")
    assert config.ema.model_dump() == {"enabled": True, "decay": 0.9999}
    assert (config.data.name, config.data.image_size, config.init_from) == ("imagenet", 224, None)
    if norm not in ("ln", "rms", "group"):
        own_shift = 0.0 if page in DERF_PAPER and norm not in ("dyt", "hardtanh") else None
        assert config.norm.shift_init == changed.get("shift_init", own_shift)
        assert config.norm.learn_alpha is changed.get("learn_alpha", True)
        if not page.endswith("alpha_init"):
            assert config.norm.alpha_init == changed.get("alpha_init", 0.5)
    kwargs = {"ls_init_value": 1e-6, "head_init_scale": 1.0} if "convnext" in model else {"global_pool": "avg"}
    assert config.model.kwargs == kwargs


@pytest.mark.parametrize("page", PUBLISHED)
def test_a_page_says_paper_command_figure_cost_and_what_is_open(page):
    text = (CONF / "experiment" / f"{page}.yaml").read_text()
    for word in ("Paper:", "Expected:", "Cost:", "Open:"):
        assert f"# {word}" in text
    assert f"dytrun train experiment={page} data.root=" in text
    top1 = PUBLISHED[page][3]
    if top1 is not None:
        assert f"{top1} % top-1" in text
    assert re.search(r"[\d.]+e\d+ FLOP", text)
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize("page", [page for page in PUBLISHED if page.endswith("_alpha_init")])
def test_a_sweep_over_alpha_has_the_papers_values_around_it(page):
    text = (CONF / "experiment" / f"{page}.yaml").read_text()
    values = [float(value) for value in re.search(r"norm.alpha_init: (.*)", text)[1].split(",")]
    assert {0.5, 1.0, 1.2} <= set(values)
    assert (min(values), max(values)) == (0.1, 2.0)


def test_the_two_papers_disagree_about_drop_path_and_both_say_so():
    for ours, theirs in (("vit_b_ln", "vit_b_ln_dp015"), ("vit_l_dyt", "vit_l_dyt_dp05")):
        one, other = ((CONF / "experiment" / f"{page}.yaml").read_text() for page in (ours, theirs))
        assert theirs in one
        assert ours in other
        assert PUBLISHED[ours][3] == PUBLISHED[theirs][3]
