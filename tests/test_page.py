"""report.html: what is drawn, by hand; that nothing of a run gets past the escaping; and the page in a real browser."""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import plotly.graph_objects as go
import pytest
from browser import CHROMIUM, Browser
from test_report import built, put

from dytrun.cost_figures import costs
from dytrun.figures import Chart, alpha_sweeps, grouped, over_epochs, spread, thinned
from dytrun.runs import load_runs
from dytrun.site_figures import by_depth

SITES = ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "fc_norm")
# Columns of the table that are said above it, or that come first.
ABOVE = ("pair", "model", "data", "norm")
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"


def train(directory: Path, *overrides: str, top1=(20.0, 60.0, 80.0), sites=(), command="dytrun train", **fields):
    """Leave a run that measured `top1` after each epoch; one that is not finished has no result of its own."""
    is_whole = fields.get("status", "finished") == "finished"
    fields = {"top1": top1[-1] if is_whole else None, "epochs": 3} | fields
    name = put(directory, *overrides, **fields).science_id
    (path,) = directory.glob(f"*{name}")
    lines = []
    for epoch, value in enumerate(top1, 1):
        axes = {"step": 44 * epoch, "epoch": float(epoch), "samples_seen": 1408 * epoch}
        lines.append(axes | {"train/loss": 3.0 / epoch, "perf/images_per_s": 100.0 + epoch})
        probes = {"alpha": 0.5 + 0.1 * epoch, "input_std": 2.0 * epoch, "saturation": 0.1 * epoch}
        lines.append(axes | {f"norm/{what}/{site}": value for what, value in probes.items() for site in sites})
        lines.append(axes | {"val/top1": value})
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (path / "starts.jsonl").write_text(json.dumps({"command": command, "started": "2026-11-22T10:00:00+00:00"}) + "\n")


def groups_of(directory: Path):
    (pair,) = built(directory).pairs
    return grouped(pair, load_runs(directory)[0])


def page_of(directory: Path) -> str:
    built(directory)
    return (directory / "report.html").read_text()


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """Two arms with three seeds, a sweep with an arm that diverged, another device, another recipe, a hostile run."""
    directory = tmp_path_factory.mktemp("everything")
    for seed in range(3):
        train(directory, f"seed={seed}", top1=(20.0 + seed, 60.0, 80.0 + seed), sites=SITES)
        train(directory, "norm=dyt", f"seed={seed}", top1=(10.0, 50.0, 79.0 + seed**2), sites=SITES, images_per_s=80.0)
    train(directory, "norm=dyt", "norm.alpha_init=0.1", sites=SITES, device="NVIDIA H200", ranks=8)
    train(directory, "norm=dyt", "norm.alpha_init=2.0", top1=(12.0, 9.0), status="diverged", sites=SITES)
    train(directory, "norm=derf", top1=(20.0, 61.0, 81.0))
    evil = {"norm_impl": EVIL, "device": EVIL, "data_pack": EVIL, "versions": {"torch": EVIL}, "sites": [EVIL, 'a"b']}
    train(directory, "optim.lr=2e-3", command=f"dytrun train '{EVIL}'", **evil)
    return directory


def test_the_mean_and_the_band_are_over_the_finished_seeds(tmp_path):
    for seed, top1 in enumerate(((10.0, 50.0), (20.0, 60.0), (30.0, 64.0))):
        train(tmp_path, f"seed={seed}", top1=top1)
    train(tmp_path, "seed=3", top1=(90.0,), status="diverged")
    (group,) = groups_of(tmp_path)
    found = spread(group.runs, "val/top1", 300)
    assert (found.xs, found.means, found.n) == ([1.0, 2.0], [20.0, 58.0], 3)
    # Differences from the mean: 10, 0, 10; then 8, 2, 6 (squares 64 + 4 + 36 = 104, over n - 1 = 2).
    assert found.stds == pytest.approx([10.0, 52**0.5])
    top1 = over_epochs([group])[0]
    band, mean = top1.data[0], top1.data[-1]
    assert (band["fill"], band["y"]) == ("toself", pytest.approx([30, 58 + 52**0.5, 58 - 52**0.5, 10], abs=1e-3))
    assert (mean["x"], mean["y"]) == ([1, 2], [20, 58])
    (cross,) = (trace for trace in top1.data if trace.get("marker", {}).get("symbol") == "x")
    assert (cross["x"], cross["y"], cross["name"]) == ([1], [90], "ln, seed 3: diverged")
    assert top1.rows == [["1", "20.00 ± 10.00"], ["2", "58.00 ± 7.21"]]
    assert "from 20.00 to 58.00 ± 7.21 at epoch 2, mean of 3 seeds; seed 3 diverged after epoch 1" in top1.said


def test_one_seed_is_a_line_without_a_band(tmp_path):
    train(tmp_path)
    (line,) = over_epochs(groups_of(tmp_path))[0].data
    assert line["y"] == [20, 60, 80]
    assert "one seed" in over_epochs(groups_of(tmp_path))[0].said


def test_long_lines_are_thinned_and_that_is_said(tmp_path):
    assert thinned(range(1000), 4) == [0, 333, 666, 999]
    assert thinned([1, 2], 4) == [1, 2]
    train(tmp_path, top1=[float(number % 90) for number in range(1000)])
    top1 = over_epochs(groups_of(tmp_path))[0]
    assert len(top1.data[0]["x"]) == 300
    assert (top1.data[0]["x"][0], top1.data[0]["x"][-1]) == (1, 1000)
    assert "At most 300 points" in top1.note


def test_a_sweep_over_alpha_is_drawn_with_its_diverged_arms(tmp_path):
    put(tmp_path, top1=91.0)
    for alpha, top1 in ((0.1, 80.0), (0.5, 90.0), (2.0, None)):
        put(tmp_path, "norm=dyt", f"norm.alpha_init={alpha}", top1=top1, status="finished" if top1 else "diverged")
    put(tmp_path, "norm=derf")
    (sweep,) = alpha_sweeps(groups_of(tmp_path))
    level, line, lost = sweep.data
    assert (level["name"], level["y"]) == ("ln", [91, 91])
    assert (line["x"], line["y"]) == ([0.1, 0.5], [80, 90])
    assert (lost["x"], lost["text"]) == ([2.0], ["diverged"])
    page = (tmp_path / "report.html").read_text()
    assert "Top-1 in percent against alpha_init: 0.1: 80.00; 0.5: 90.00; 2: diverged; ln: 91.00" in page
    assert "Validation top-1, %, against alpha_init: dyt" in page


def test_costs_of_two_settings_are_two_charts(tmp_path):
    put(tmp_path, images_per_s=100.0)
    put(tmp_path, "norm=dyt", images_per_s=80.0)
    speed, memory = costs(groups_of(tmp_path))
    assert (speed.title, speed.rows[1]) == (
        "Images a second", ["dyt alpha_init=0.5", "F.layer_norm, eager", "80 (0.80 ×)", "1"],
    )  # fmt: skip
    assert memory.data[0]["x"] == [1, 1]
    put(tmp_path, "norm=dyt", "seed=1", images_per_s=900.0, device="GPU")
    charts = costs(groups_of(tmp_path))
    assert [chart.title for chart in charts[::2]] == [f"Images a second, setting {number} of 2" for number in (1, 2)]
    assert [len(chart.rows) for chart in charts] == [2, 2, 1, 1]
    assert charts[2].rows[0][2] == "900"
    assert "GPU × 1" in charts[2].note
    assert "not comparable" in charts[2].note


def test_norms_are_drawn_by_depth_whatever_line_has_them(tmp_path):
    train(tmp_path, sites=SITES)
    train(tmp_path, "norm=dyt", sites=SITES)
    depth = by_depth(groups_of(tmp_path))
    assert depth.kinds == [("blocks.*.norm1", "solid"), ("blocks.*.norm2", "8px,4px"), ("fc_norm", "2px,3px")]
    assert depth.ends == ("blocks.0.norm1", "fc_norm")
    titles = [chart.title for chart in depth.charts]
    assert titles[:3] == ["alpha at the end, by depth", "ln: alpha", "dyt alpha_init=0.5: alpha"]
    assert titles[-1] == "dyt alpha_init=0.5: share of saturated inputs"
    chart = depth.charts[2]
    assert [trace["y"] for trace in chart.data] == [[0.6, 0.7, 0.8]] * 5
    assert len({trace["line"]["color"] for trace in chart.data}) == 5
    assert chart.rows[0] == ["blocks.0.norm1", "0.600", "0.800"]
    assert depth.charts[1].layout["yaxis"]["range"] == chart.layout["yaxis"]["range"]
    put(tmp_path / "bare")
    assert by_depth(groups_of(tmp_path / "bare")) is None


def test_json_and_page_hold_the_tables_numbers(tmp_path):
    put(tmp_path, top1=91.25)
    put(tmp_path, "norm=dyt", top1=90.5)
    found = built(tmp_path)
    values = json.loads((tmp_path / "report.json").read_text())
    assert [arm["top1"]["mean"] for arm in values["pairs"][0]["arms"]] == [91.25, 90.5]
    page = (tmp_path / "report.html").read_text()
    rows = re.findall(r"<tr>(.*?)</tr>", page.partition("</table>")[0].replace("<wbr>", ""))
    cells = [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(?:<svg.*?</svg> )?([^<]*)", row)] for row in rows
    ]
    columns, lines = found.table()
    kept = [columns.index("norm"), *(place for place, name in enumerate(columns) if name not in ABOVE)]
    assert cells == [[columns[place] for place in kept], *([line[place] for place in kept] for line in lines)]
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?http', page)


def test_the_page_says_how_to_do_it_again(tmp_path):
    train(tmp_path, command="dytrun train 'seed=0,1'")
    train(tmp_path, "norm=dyt", command="dytrun train norm=dyt", commit="abc", dirty=True)
    page = page_of(tmp_path)
    assert html.escape("dytrun train 'seed=0,1'") in page
    for path in tmp_path.glob("*/config.json"):
        config = html.escape(json.dumps(json.loads(path.read_text()), indent=1, ensure_ascii=False))
        assert config in page
    assert "<th scope=row>norm.name</th><td>ln</td><td>dyt</td>" in page
    assert "<th scope=row>commit</th><td>–</td><td>abc, with changes</td>" in page
    assert "<th scope=row>optim.lr</th>" not in page
    assert "<th scope=row>seed</th>" not in page
    for path in tmp_path.glob("*/starts.jsonl"):
        path.unlink()
    assert page_of(tmp_path).count("Its command was not recorded") == 2


def test_where_every_run_diverged_no_chart_is_promised(tmp_path):
    for overrides in ((), ("norm=dyt",), ("norm=dyt", "norm.alpha_init=2")):
        train(tmp_path, *overrides, top1=(), status="diverged")
    page = page_of(tmp_path)
    assert not alpha_sweeps(groups_of(tmp_path))
    assert "Over the epochs" not in page and "Where alpha starts" not in page and "Reproduce" in page


def test_comparisons_are_named_by_what_keeps_them_apart(tmp_path):
    for overrides in ((), ("optim.lr=2e-3",)):
        train(tmp_path, *overrides)
        train(tmp_path, "norm=dyt", *overrides)
    page = page_of(tmp_path)
    assert {"optim.lr=0.001", "optim.lr=0.002"} == set(re.findall(r"<h2 id=pair-.*, (.*)</h2>", page))
    assert page.count("<a href=#pair-") == 2


def test_nothing_of_a_run_is_read_as_html(everything):
    page = page_of(everything)
    assert EVIL[:12] not in page.replace("</script>\n<script>", "").partition("id=charts")[0]
    assert "<img" not in page.partition("<script>")[0]
    data = re.search(r"<script id=charts type=application/json>(.*?)</script>", page, re.DOTALL)[1]
    assert "<" not in data
    assert "&lt;/script&gt;" in json.dumps(json.loads(data))
    policy = re.search(r'http-equiv=Content-Security-Policy content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert re.findall(r"'sha256-(.*?)'", policy) == hashes


def test_figures_are_what_plotly_takes(everything):
    charts: list[Chart] = []
    report = built(everything)
    for pair in report.pairs:
        groups = grouped(pair, load_runs(everything)[0])
        charts += [*over_epochs(groups), *alpha_sweeps(groups), *costs(groups), *by_depth(groups).charts]
    assert len(charts) > 20
    for chart in charts:
        go.Figure({"data": chart.data, "layout": chart.layout})
        assert all(len(row) == len(chart.columns) for row in chart.rows)


# Contrast as WCAG 2 has it; of every text that is shown, against the nearest background.
CONTRAST = """(() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => rgb(text).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = rgb(getComputedStyle(node).backgroundColor);
      if (found.length < 4 || found[3]) return getComputedStyle(node).backgroundColor;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) =>
    [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()) && node.checkVisibility()
    && !["SCRIPT", "STYLE"].includes(node.tagName));
  return texts.map((node) => {
    const style = getComputedStyle(node);
    const [one, other] = [light(node.ownerSVGElement ? style.fill : style.color), light(ground(node))].sort();
    return [(other + 0.05) / (one + 0.05), node.textContent.slice(0, 30)];
  });
})()"""
LINT = """(() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const ids = all("[id]").map((node) => node.id);
  const levels = all("h1, h2, h3, h4").map((node) => Number(node.tagName[1]));
  return {
    lang: document.documentElement.lang,
    landmarks: all("header, main, footer").map((node) => node.localName),
    unlabelled: all("[role=img], [role=region], nav").filter((node) => !node.ariaLabel && !node.ariaLabelledByElements)
      .length,
    sameLabels: all("section, [role=region]:not(details *)").map((node) => node.ariaLabel ?? "")
      .filter((label, place, labels) => label && labels.indexOf(label) !== place),
    uncaptioned: all("table").filter((node) => !node.caption || !node.querySelector("th[scope=row]")).length,
    unfocusable: all(".scroll, pre").filter((node) => node.tabIndex !== 0).length,
    unnamed: all("input, button, summary").filter((node) => !node.textContent && !node.labels?.[0]?.textContent).length,
    twice: ids.filter((id, place) => ids.indexOf(id) !== place),
    jumps: levels.filter((level, place) => place && level > levels[place - 1] + 1),
  };
})()"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.slow
def test_the_page_in_a_real_browser(everything, tmp_path):
    built(everything)
    with Browser(tmp_path / "profile") as browser:
        browser.show(1280)
        browser.open(everything / "report.html")
        drawn = browser.run(
            "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll('.main-svg').length)"
        )
        assert len(drawn) > 20
        assert all(drawn)
        assert browser.run("document.querySelectorAll('.js-line').length") > 50
        assert browser.run(LINT) == {
            "lang": "en", "landmarks": ["header", "main", "footer"], "unlabelled": 0, "sameLabels": [],
            "uncaptioned": 0, "unfocusable": 0, "unnamed": 0, "twice": [], "jumps": [],
        }  # fmt: skip

        # The charts' text follows the scheme while the page is open.
        for scheme in ("light", "dark", "light"):
            browser.show(1280, scheme=scheme)
            found = browser.run(CONTRAST)
            assert any("epoch" in text for _, text in found)
            assert min(found)[0] >= 4.5, min(found)
        _use_the_keyboard(browser)

        browser.show(390, 844)
        browser.wait(
            "document.documentElement.scrollWidth == 390 && "
            "Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.clientWidth)) <= 390"
        )
        browser.show(1280)

        pdf = browser.pdf()
        assert pdf.startswith(b"%PDF")
        assert 3 < len(re.findall(rb"/Type\s*/Page\b", pdf)) < 40
        assert browser.run("document.querySelectorAll('details[open]').length") == 0
        assert browser.log == []

        # Even a hole in the escaping would run nothing.
        browser.run("document.body.insertAdjacentHTML('beforeend', `" + EVIL.removeprefix("</script>") + "`)")
        browser.run("new Promise((done) => setTimeout(done, 200))")
        assert browser.run("document.title") == "dytrun report"
        assert any("Content Security Policy" in line for line in browser.log)


def _use_the_keyboard(browser: Browser) -> None:
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "skip"
    assert browser.run("document.activeElement.getBoundingClientRect().left") >= 0
    assert browser.run("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    visible = "document.querySelector('.plot').data.filter((t) => t.meta === 1).map((t) => t.visible)"
    box = "document.querySelector('.arms input[data-arm=\"1\"]')"
    browser.run(f"{box}.focus(), {box}.click()")
    assert set(browser.run(visible)) == {False}
    browser.run(f"{box}.click()")
    assert set(browser.run(visible)) == {True}
