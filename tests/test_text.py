"""Text and the language model on it: corpus, split, windows, exact evaluation, arms, whole runs, wrong input."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import config_of, lines, only
from warm import essence, step_of

from dytrun import corpus, text
from dytrun.arm import build_arm, build_plain
from dytrun.batch import NO_TARGET
from dytrun.compute import autocast
from dytrun.corpus import read_corpus, split
from dytrun.data import RankShare
from dytrun.errors import UserError
from dytrun.evaluate import evaluate
from dytrun.model import compile_model
from dytrun.norm import PointWise
from dytrun.plan import outline
from dytrun.records import RunResult
from dytrun.text import ValWindows, load_text, train_windows
from dytrun.weights import load_weights

CPU = torch.device("cpu")
SMALL = ("model=llama", "model.width=16", "model.depth=2", "model.heads=2", "model.hidden=24", "data=text",
         "data.context=16", "ema=off", "epochs=2", "global_batch=16", "optim.lr=1e-3", "optim.warmup_epochs=0",
         "machine.eval_batch_per_rank=7", "tracking.mode=off")  # fmt: skip

# Of runs on images, from before there was text.
NAMES = {
    "vit_b_dyt": "vit_base_patch16_224-dyt-imagenet-s0-f64a5a0e",
    "convnext_b_ln": "convnext_base-ln-imagenet-s0-37f5a640",
    "cifar10": "vit_tiny_patch16_224-rms-cifar10-s0-86373252",
    "folder": "vit_base_patch16_224-dyt-folder-s0-6034773e",
    "synthetic": "convnext_tiny-derf-synthetic-s0-47b232e8",
}


@pytest.fixture(scope="session")
def book(tmp_path_factory) -> Path:
    """Twenty kilobytes of text with something to learn in it."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("".join(f"{n} times {n % 7} is {n * (n % 7)}, é and not {n * 3 % 11}.\n" for n in range(700)))
    return path


@pytest.fixture
def small(book):
    """The configuration of a small run on the book."""
    pytest.importorskip("transformers")
    return lambda *more: config_of(*SMALL, f"data.root={book}", *more)


def test_every_tenth_of_a_hundred_contiguous_blocks_is_for_validation():
    pieces = [b"%04d......" % number for number in range(1000)]
    train, val = split(pieces)
    held = [int(val[place : place + 4]) for place in range(0, len(val), 10)]
    assert held == [number for number in range(1000) if number // 10 % 10 == 9]
    kept = [int(train[place : place + 4]) for place in range(0, len(train), 10)]
    assert sorted(held + kept) == list(range(1000))
    assert kept == sorted(kept)


def test_a_tree_is_its_text_files_in_the_order_of_their_paths_and_twins_count_once(tmp_path):
    for name, content in {"b.txt": "second\n", "a/z.md": "first\n", "c.rst": "second\n", "d.py": "third", "e.bin": "x",
                          "f.txt": "".join(f"line {n}\n" for n in range(300))}.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    pieces = list(corpus._lines(tmp_path))
    assert pieces[:4] == [b"first\n", b"second\n", b"third\n", b"line 0\n"]
    assert len(pieces) == 303
    train, val = read_corpus(str(tmp_path))
    assert len(train) + len(val) == sum(map(len, pieces))


def test_a_text_of_one_line_is_split_too_and_no_byte_is_changed(tmp_path):
    content = bytes(32 + n * n % 95 for n in range(200_000))  # as text8 is
    (tmp_path / "one.txt").write_bytes(content)
    train, val = read_corpus(str(tmp_path / "one.txt"))
    assert len(train) + len(val) == len(content) + 1
    assert 0.08 < len(val) / len(content) < 0.12
    assert content.startswith(train[:10_000])
    assert val[:1000] in content
    (tmp_path / "one.txt").write_bytes(b"a\rb\r\n" * 2000)
    assert b"".join(corpus._lines(tmp_path)) == b"a\rb\r\n" * 2000


def test_the_docstrings_are_the_same_in_every_process_and_none_is_there_twice():
    pieces = list(corpus._docstrings())
    assert len({*pieces}) == len(pieces) > 5000
    assert any(piece.startswith(b"Object for parsing command line strings") for piece in pieces)  # argparse's
    code = ("import hashlib; from dytrun.corpus import read_corpus; c = read_corpus(None);"
            "print(hashlib.sha256(c.train + b'|' + c.val).hexdigest(), len(c.train), len(c.val))")  # fmt: skip
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)})  # fmt: skip
    train, val = split(pieces)
    assert other.stdout.split() == [
        hashlib.sha256(train + b"|" + val).hexdigest(), str(len(train)), str(len(val))
    ]  # fmt: skip
    assert 0.08 < len(val) / (len(train) + len(val)) < 0.12


@pytest.mark.parametrize(("made", "said"), [
    ({}, "data.root: no "),
    ({"x.bin": b"1"}, "holds no file that ends with .txt, .md, .rst, .py"),
    ({"x.txt": b"good\n", "y.txt": b"\xff\xfe bad"}, r"y\.txt is no UTF-8 text \(byte 0\)"),
    ({"x.txt": b"one short line"}, "too little to train on one part and evaluate on another"),
    ({"x.txt": b""}, "too little to train"),
    ({"x.txt": b"ab\n" * 300}, "data.context: .* hold no window of 1024"),
])  # fmt: skip
def test_a_text_that_cannot_be_used_is_named(tmp_path, made, said):
    root = tmp_path / "tree"
    for name, content in made.items():
        root.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_text(config_of("model=llama", "data=text", "norm=rms", "data.context=1024", f"data.root={root}").data)


@pytest.mark.parametrize(("world", "batch"), [(1, 5), (2, 3), (3, 64)])
def test_every_validation_byte_but_the_first_is_predicted_once(book, world, batch):
    found = load_text(config_of(*SMALL, "norm=rms", f"data.root={book}").data)
    content, seen = found.val.content, np.zeros(len(found.val.content), dtype=int)
    for rank in range(world):
        for one in ValWindows(found.val, batch, (rank, world, CPU))():
            for row, window in enumerate(one.indices.tolist()):
                there = (one.targets[row] != NO_TARGET).numpy()
                places = window * 16 + np.flatnonzero(there)
                assert there[: there.sum()].all(), "what is no target is at the end"
                assert (one.images[row].numpy()[there] == content[places]).all()
                assert (one.targets[row].numpy()[there] == content[places + 1]).all()
                seen[places + 1] += 1
    assert seen[0] == 0
    assert (seen[1:] == 1).all()


def windows_of(config, found, world: int, accumulation: int, first_step: int, steps: int) -> list[set[tuple]]:
    """The windows of each step, from all ranks: what goes in and what is to be guessed."""
    batch = config.global_batch // world // accumulation
    per_epoch = found.train.num // config.global_batch
    result = [set() for _ in range(first_step, steps)]
    for rank in range(world):
        share = RankShare(rank, world, batch, accumulation, per_epoch, first_step, steps)
        for count, one in enumerate(train_windows(config, found.train, share, CPU)):
            rows = zip(one.images.tolist(), one.targets.tolist(), strict=True)
            result[count // accumulation] |= {(tuple(given), tuple(wanted)) for given, wanted in rows}
    return result


def test_training_windows_are_a_function_of_seed_and_step_alone(book):
    config = config_of(*SMALL, "norm=rms", f"data.root={book}")
    found = load_text(config.data)
    per_epoch = found.train.num // 16
    whole = windows_of(config, found, 1, 1, 0, 2 * per_epoch)
    assert whole == windows_of(config, found, 2, 4, 0, 2 * per_epoch)
    assert whole[5:] == windows_of(config, found, 2, 1, 5, 2 * per_epoch)
    other = windows_of(config.model_copy(update={"seed": 1}), found, 1, 1, 0, per_epoch)
    assert whole[:per_epoch] != other
    content = bytes(found.train.content)
    for given, wanted in whole[0]:
        assert given[1:] == wanted[:-1]
        assert bytes(given) + bytes(wanted[-1:]) in content
    (first, second) = (text.epoch_offset(16, 0, epoch) for epoch in (0, 1))
    assert first != second
    assert whole[0] != whole[per_epoch]
    share = RankShare(0, 1, 16, 1, per_epoch, 0, per_epoch)
    numbers = [n for one in train_windows(config, found.train, share, CPU) for n in one.indices.tolist()]
    assert len({*numbers}) == len(numbers) == 16 * per_epoch
    assert max(numbers) * 16 + 15 + 17 <= len(content)  # there is a byte behind the last one, whatever the offset


@pytest.mark.parametrize("norm", ["rms", "dyt"])
def test_evaluation_is_exact_whatever_the_batch(small, norm):
    config = small(f"norm={norm}")
    found = load_text(config.data)
    model, _ = build_arm(config, 256)
    content, losses = torch.from_numpy(found.val.content.astype(np.int64)), 0.0
    top1, top5 = [0, 0], [0, 0]  # at least, at most
    model.eval()
    with torch.no_grad():
        for start in range(0, len(content) - 1, 16):
            piece = content[start : start + 17]
            logits = model(piece[None, :-1])[0]
            losses += F.cross_entropy(logits.double(), piece[1:], reduction="sum").item()
            above = logits - logits.gather(1, piece[1:, None])
            # How many stand above the right one, and how many may: the last bits of a logit depend on the batch.
            for place, rank in enumerate(((above > -1e-5).sum(1) - 1, (above > 1e-5).sum(1))):
                top1[place] += int((rank == 0).sum())
                top5[place] += int((rank < 5).sum())
    assert max(top1[1] - top1[0], top5[1] - top5[0]) <= 2
    for batch in (1, 9):
        accuracy = evaluate(model, ValWindows(found.val, batch, (0, 1, CPU))(), found.val.num, autocast(config, CPU))
        assert accuracy.num == len(content) - 1
        assert top1[0] <= accuracy.top1_count <= top1[1]
        assert top5[0] <= accuracy.top5_count <= top5[1]
        assert accuracy.loss == pytest.approx(losses / (len(content) - 1), rel=1e-6)
        assert accuracy.correct is None


def test_arms_differ_by_the_norm_parameters_and_the_scale_of_the_embedding(small):
    plain = build_plain(small("norm=rms"), 256)
    (rms, _), (dyt, sites) = (build_arm(small(f"norm={norm}"), 256) for norm in ("rms", "dyt"))
    alphas = {f"{site.name}.alpha" for site in sites}
    assert len(sites) == 2 * 2 + 1
    assert {*dyt.state_dict()} - {*rms.state_dict()} == alphas | {"model.embed_tokens.scale"}
    assert {*rms.state_dict()} == {*plain.state_dict()}
    assert all(torch.equal(value, dyt.state_dict()[name]) for name, value in rms.state_dict().items())
    assert {float(dyt.state_dict()[name]) for name in alphas} == {1.0}
    assert float(dyt.state_dict()["model.embed_tokens.scale"]) == 4.0
    assert not any(module.bias is not None for module in dyt.modules() if isinstance(module, PointWise))
    tokens = torch.arange(32).view(2, 16)
    assert torch.allclose(rms(tokens), plain(tokens), atol=1e-5), "norm=rms computes what Hugging Face's norm does"
    assert rms(tokens).shape == (2, 16, 256)
    assert not torch.equal(dyt(tokens)[:, -1], dyt(tokens.flip(0))[:, -1])
    later = tokens.clone()
    later[:, 9:] = 7
    assert torch.allclose(dyt(tokens)[:, :9], dyt(later)[:, :9], atol=1e-6), "no byte sees those behind it"
    for norm, scale in (("dyt", "off"), ("rms", "on")):
        names = build_arm(small(f"norm={norm}", f"model.embedding_scale={scale}"), 256)[0].state_dict()
        assert ("model.embed_tokens.scale" in names) is (scale == "on")
    for given, std in (("auto", 16**-0.5), ("0.02", 0.02)):
        weight = build_plain(small("norm=rms", f"model.init_std={given}"), 256).get_input_embeddings().weight
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert small("norm=dyt").pair_id == small("norm=rms").pair_id == small("norm=derf").pair_id


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch._dynamo looks at .grad
@pytest.mark.slow
def test_a_llama_is_compiled_block_by_block(small):
    model, _ = build_arm(small("norm=dyt"), 256)
    compile_model(model, "blocks")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    for block in model.model.layers:
        assert block._compiled_call_impl is not None
        block._compiled_call_impl = torch.compile(block._call_impl, backend=counter, dynamic=False)
    model(torch.arange(32).view(2, 16)).sum().backward()
    assert counter.frame_count >= 1


def test_weights_without_the_scalar_of_the_embedding_say_which_key_to_set(small):
    rms, _ = build_arm(small("norm=rms"), 256)
    for scale in ("auto", "off"):
        dyt, _ = build_arm(small("norm=dyt", f"model.embedding_scale={scale}"), 256)
        if scale == "off":
            assert load_weights(dyt, rms.state_dict(), Path("rms.safetensors")).copied == len(rms.state_dict())
            continue
        with pytest.raises(UserError, match=r"embed_tokens\.scale; .* say model\.embedding_scale=off"):
            load_weights(dyt, rms.state_dict(), Path("rms.safetensors"))


def test_alphas_are_the_papers_by_width_unless_they_are_given():
    wide = ("model=llama", "data=text", "norm=dyt", "model.width=4096", "model.heads=32")
    norm = config_of(*wide).norm
    assert (norm.alpha_init, norm.rules, norm.types) == (0.2, {"attention": 0.8}, ["rmsnorm"])
    norm = config_of(*wide, "norm.rules={attention: 0.5, final: 0.1}").norm
    assert (norm.alpha_init, norm.rules) == (0.2, {"attention": 0.5, "final": 0.1})
    norm = config_of(*wide, "norm.alpha_init=0.3").norm
    assert (norm.alpha_init, norm.rules) == (0.3, {})
    page = config_of("experiment=llama_tiny", "hydra.mode=RUN", "norm=dyt")
    assert (page.norm.alpha_init, page.norm.rules) == (1.0, {}), "as its comment says"
    assert page.optim.min_lr == pytest.approx(page.optim.lr / 10)
    assert "augment" not in page.science()
    assert {*page.science()["data"]} == {"name", "context"}
    assert page.machine.workers == 0
    assert page.run_name.startswith("llama-dyt-text-s0-")


def test_runs_on_images_have_the_names_that_they_had_before_there_was_text():
    assert config_of("experiment=vit_b_dyt", "hydra.mode=RUN").run_name == NAMES["vit_b_dyt"]
    assert config_of("experiment=convnext_b_ln", "hydra.mode=RUN").run_name == NAMES["convnext_b_ln"]
    assert config_of("data=cifar10", "model=vit_ti", "norm=rms").run_name == NAMES["cifar10"]
    assert config_of("data=folder", "data.root=/x", "norm=dyt", "ema=off").run_name == NAMES["folder"]
    assert config_of("data=synthetic", "model=convnext_t", "norm=derf").run_name == NAMES["synthetic"]


@pytest.mark.parametrize(("typed", "said"), [
    (("model=llama", "data=digits", "norm=rms"), "model=llama reads text, say data=text"),
    (("model=vit_ti", "data=text"), "data=text takes a language model, say model=llama"),
    (("model=llama", "data=text"), "norm: model=llama has no LayerNorm to keep; its baseline is norm=rms"),
    (("model=llama", "data=text", "norm=group"), "norm: group takes its statistics over all bytes of a window"),
    (("model=llama", "data=text", "norm=dyt", "augment=light"), "augment: text is not augmented"),
    (("model=llama", "data=text", "norm=dyt", "machine.loader=dali"), "machine.loader: dali decodes images"),
    (("model=llama", "data=text", "norm=dyt", "optim.layer_decay=0.7"), "optim.layer_decay: "),
    (("model=llama", "data=text", "norm=dyt", "machine.workers=2"), "machine.workers: data=text is in memory"),
    (("model=llama", "data=text", "norm=dyt", "norm.calibrate=true"), "norm.calibrate: fits to LayerNorms"),
    (("model=llama", "data=text", "norm=dyt", "model.heads=3"), "model.heads: 3 heads cannot share a width of 128"),
    (("model=llama", "data=text", "norm=dyt", "model.drop_path=0.1"), "model.drop_path: another option of this group"),
    (("model=llama", "data=text", "norm=dyt", "data.image_size=32"), "data.image_size: another option of this group"),
    (("model=vit_ti", "data=digits", "data.context=32"), "data.context: another option of this group"),
    (("model=llama", "data=text", "norm=dyt", "model.embedding_scale=maybe"), "model.embedding_scale: 'maybe' is not"),
])  # fmt: skip
def test_what_does_not_belong_together_is_said_in_a_line(typed, said):
    with pytest.raises(UserError) as caught:
        config_of(*typed)
    assert len(caught.value.problems) == 1
    assert said in caught.value.problems[0]


def test_a_wrong_type_of_norm_is_the_line_that_it_is_everywhere(small):
    with pytest.raises(UserError, match=r"no LayerNorm to convert.*LlamaRMSNorm"):
        outline(small("norm=dyt", "norm.types=[layernorm]"))


def test_the_plan_of_a_text_speaks_of_no_image(small):
    found = outline(small("norm=dyt"))
    said = "\n".join(f"{name} {what}" for name, what in found.rows)
    assert not re.search(r"image|pixel| px|crop|augment|mixup|norm=ln", said)
    assert "training windows of 16 bytes" in said
    assert len(found.sites) == 5
    plain = outline(small("norm=rms")).rows
    twin = re.search(r"norm=dyt has ([\d,]+) parameters", dict(plain)["arms"])[1]
    assert f"llama: {twin} parameters" in dict(found.rows)["model"]


def test_without_transformers_one_line_says_what_to_install(tmp_path, book):
    code = "import sys; sys.modules['transformers'] = None; from dytrun.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "train", *SMALL, "norm=dyt", f"data.root={book}"],
                          capture_output=True, text=True, check=False, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"dytrun: model=llama: needs .*pip install 'dytrun\[llm\]'\n", done.stderr), done.stderr
    assert not list(tmp_path.glob("runs/*"))


@pytest.mark.parametrize("bench", ["model", "trainer", "data"])
def test_a_bench_of_images_refuses_a_language_model(bench):
    from dytrun.compose import expand

    with pytest.raises(UserError, match="bench=llama"):
        expand([f"bench={bench}", "model=llama", "data=text", "norm=rms", "augment=none"], "bench")


@pytest.mark.slow
def test_a_run_stopped_and_taken_up_again_ends_bit_equal_and_two_ranks_have_its_losses(warm, tmp_path, book):
    pytest.importorskip("transformers")
    args = ["train", *SMALL, "norm=dyt", f"data.root={book}", "epochs=3", "machine.devices=1",
            "tracking.log_every_steps=1", "machine.max_batch_per_rank=8"]  # fmt: skip
    whole = warm.run(tmp_path / "log1", *args, f"runs_dir={tmp_path}/whole")
    assert whole.code == 0, whole.said()
    said = whole.said()
    assert "nats a byte" in said
    assert re.search(r"top-1 / top-5 .* bytes", said)
    assert "windows/s" in said
    assert "image" not in said

    halted = warm.start(tmp_path / "log2", *args, f"runs_dir={tmp_path}/halted")
    halted.until(lambda: step_of(tmp_path / "halted") >= 20)
    halted.find("rank")  # the launcher passes the signal on
    os.kill(halted.pid, signal.SIGTERM)
    assert halted.wait() == 75, halted.said()
    assert warm.run(tmp_path / "log3", *args, f"runs_dir={tmp_path}/halted").code == 0
    assert essence(tmp_path / "halted") == essence(tmp_path / "whole")

    both = warm.run(tmp_path / "log4", *args, f"runs_dir={tmp_path}/both", "machine.devices=2")
    assert both.code == 0, both.said()
    one, two = (lines(only(tmp_path / name)) for name in ("whole", "both"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for left, right in zip(one, two, strict=True):
        for key in {"train/loss", "val/loss"} & left.keys():
            assert left[key] == pytest.approx(right[key], rel=1e-4)
    results = [RunResult.load(only(tmp_path / name) / "result.json") for name in ("whole", "both")]
    assert results[0].num_val == results[1].num_val == len(load_text(config_of(*args[1:]).data).val.content) - 1
    assert results[0].val_loss < 0.6 * np.log(256)
    run = only(tmp_path / "whole")
    assert not (run / "correct.npz").exists()
    assert "transformers" in results[0].versions

    again = warm.run(tmp_path / "log5", "eval", str(run))
    assert again.code == 0, again.said()
    assert "correct / bytes" in again.said()
    figures = json.loads((run / "eval.json").read_text())["raw"]
    assert (figures["top1"], figures["num"]) == (results[0].top1, results[0].num_val)
    assert figures["loss"] == pytest.approx(results[0].val_loss, rel=1e-6)


@pytest.mark.slow
def test_rms_is_the_baseline_of_the_report_and_a_step_that_diverged_is_done_again(warm, tmp_path, book):
    pytest.importorskip("transformers")
    args = ["train", *SMALL, f"data.root={book}", "epochs=1", "machine.devices=1", f"runs_dir={tmp_path}/runs"]
    job = warm.run(tmp_path / "log1", *args, "norm=rms,dyt", "-m")
    assert job.code == 0, job.said()
    said = job.said()
    assert re.search(r"dyt alpha_init=1 is [\d.]+ points (above|below) rms in next-byte top-1", said)
    assert "next-byte accuracy" in said
    assert re.search(r"dyt alpha_init=1, validation loss: [\d.]+ nats a byte (above|below) rms \(n = 1\)\.", said)
    table = said[said.index("runs in") :]
    rows = [line for line in table.splitlines() if "│" in line and "llama" in line]
    losses = [RunResult.load(path).val_loss for path in sorted((tmp_path / "runs").glob("*/result.json"))]
    assert [re.search(r"│ (rms|dyt)", row)[1] for row in rows] == ["rms", "dyt"]
    assert all(any(f"{loss:.4f}" in row for row in rows) for loss in losses)

    wild = warm.run(tmp_path / "log2", *args, "norm=identity", "optim.lr=1e4", f"runs_dir={tmp_path}/wild")
    assert wild.code == 1, wild.said()
    replay = warm.run(tmp_path / "log3", "replay", str(only(tmp_path / "wild")))
    assert replay.code == 0, replay.said()
    assert "windows whose loss is not finite" in replay.said()
    assert "reproduced" in replay.said()


def test_the_readmes_lines_run_as_they_stand():
    pytest.importorskip("transformers")
    block = re.search(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)[1]
    assert len([line for line in block.splitlines() if line]) == 5
    said = "print(len(sites), {site.alpha_init for site in sites}, model.get_input_embeddings().scale.item())"
    done = subprocess.run([sys.executable, "-c", block + said], capture_output=True, text=True, check=True)
    assert done.stdout == "5 {1.0} 8.0\n"
