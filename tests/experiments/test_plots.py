"""Figures and the report, from made-up records."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image

from bpfree.algorithms import ALGORITHMS
from bpfree.cli import cli
from bpfree.errors import CheckpointError, DataError
from bpfree.experiments import plots as plotting
from bpfree.experiments.collect import collect
from bpfree.experiments.plots import Plot, color, make_plots, save
from tests.experiments.synthetic import make_run

KINDS = ("accuracy-joules", "idle-dynamic", "epochs", "pareto")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rules on two depths; curves are 40 % plus 4 points a pass, and differ between seeds in joules alone."""
    root = tmp_path_factory.mktemp("study")
    for depth in (3, 6):
        for rule, factor in (("bp", 1.0), ("mf", 0.5)):
            for seed in range(3):
                step = 100 * factor * (1 + 0.1 * seed)
                curve = [(step * epoch if epoch else None, 44.0 + 4 * epoch) for epoch in range(5)]
                options = {"curve": curve, "joules": 5 * step, "mib": 50 * depth * factor}
                make_run(root, rule, seed, accuracy=60 + factor, network=f"mlp:{depth}x2000", **options)  # type: ignore[arg-type]
    return root


@pytest.fixture(scope="module")
def plots(study: Path) -> list[Plot]:
    return make_plots(collect(study))


def named(plots: list[Plot], *parts: str) -> Plot:
    (plot,) = (plot for plot in plots if all(part in plot.name for part in parts))
    return plot


def rgb(name: str) -> tuple[int, ...]:
    return tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))


def shows(image: bytes, name: str) -> bool:
    """Whether a colour is in the figure, in at least 50 pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).reshape(-1, 3)
    return int((np.abs(pixels.astype(int) - rgb(name)).max(1) <= 2).sum()) >= 50


def test_every_rule_has_a_colour_of_its_own() -> None:
    colors = [color(entry.alias) for entry in ALGORITHMS]
    assert len(set(colors)) == len(colors)


def test_rules_that_are_new_get_spare_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: value for name, value in plotting.COLORS.items() if name not in {"bp", "mf"}}
    monkeypatch.setattr(plotting, "COLORS", known)
    assert [color("bp"), color("mf")] == list(plotting.SPARE[:2])


def test_a_rule_has_one_colour_in_every_figure(plots: list[Plot]) -> None:
    for plot in plots:
        if "6x2000" in plot.name or "epochs" in plot.name:  # over epochs the lines of the fixture coincide
            continue
        image = plot.image("png")
        assert shows(image, color("mf")), plot.name
        assert shows(image, color("bp")), plot.name
        assert not shows(image, color("ff")), plot.name


def test_what_is_drawn(plots: list[Plot]) -> None:
    kinds = [f"cifar10-mlp-{depth}x2000-own-NVIDIA-H200-{kind}" for depth in (3, 6) for kind in KINDS]
    assert [plot.name for plot in plots] == [*kinds, "cifar10-own-NVIDIA-H200-memory-depth"]
    assert "simulated energy" in plots[0].title


def test_figures_say_what_arms_are_rated_by(plots: list[Plot], tmp_path: Path) -> None:
    assert "Test accuracy against energy" in named(plots, "3x2000", "pareto").title
    for rule in ("bp", "fgnn"):
        make_run(tmp_path, rule, 0, dataset="cora", network="gcn:2x8", metric="ROC-AUC")
    for plot in make_plots(collect(tmp_path)):
        if not plot.name.endswith("idle-dynamic"):
            plot.draw(axes := Figure().add_subplot())
            assert "ROC-AUC" in plot.title
            assert "ROC-AUC" in axes.get_ylabel()


def test_bands_over_joules(plots: list[Plot]) -> None:
    """At j joules a run is at 40 % + 4 j / step; steps are 100, 110, 120 J and the cheapest run ends at 500 J."""
    rows = [row for row in named(plots, "3x2000", "accuracy-joules").rows if row["arm"] == "bp"]
    assert {row["n"] for row in rows} == {3}
    assert (rows[0]["joules"], rows[-1]["joules"]) == (pytest.approx(100), pytest.approx(600))
    assert [row["joules"] for row in rows] == sorted(row["joules"] for row in rows)
    together = [row for row in rows if row["there"] == 3]
    assert together[0]["joules"] == pytest.approx(120)  # the last of the first validations
    assert together[-1]["joules"] == pytest.approx(500)
    for row in together:
        for name, step in (("high", 100), ("median", 110), ("low", 120)):
            # between validations a straight line in log joules, which lies above the one in joules
            exact = 40 + 4 * row["joules"] / step
            assert exact - 1e-9 <= row[name] <= exact + 0.5
    assert together[-1]["high"] == pytest.approx(60)
    assert (rows[0]["there"], rows[0]["low"], rows[0]["high"]) == (1, pytest.approx(44), pytest.approx(44))
    assert (rows[-1]["there"], rows[-1]["low"]) == (1, pytest.approx(60))


def test_runs_that_are_never_at_the_same_joules_are_drawn_all_the_same(tmp_path: Path) -> None:
    """One run ends before the first validation of the next one; a third one has a single validation."""
    curves = ([(None, 30), (100, 40), (200, 50)], [(None, 35), (1000, 60), (2000, 70)], [(None, 20), (None, 90)])
    for seed, curve in enumerate(curves):
        make_run(tmp_path, "mf", seed, joules=(300, 3000, 9000)[seed], curve=curve)
    plot = named(make_plots(collect(tmp_path)), "accuracy-joules")
    assert {row["n"] for row in plot.rows} == {3}
    known = {round(row["joules"], 6): row for row in plot.rows if row["there"]}
    assert {row["there"] for row in known.values()} == {1}
    ends = {100: 30, 300: 50, 1000: 35, 3000: 70, 9000: 90}
    assert {at: known[at]["median"] for at in ends} == pytest.approx(ends)
    gaps = [row for row in plot.rows if not row["there"]]
    assert gaps
    assert all(300 < row["joules"] < 1000 or 3000 < row["joules"] < 9000 for row in gaps)
    assert all(row["low"] is row["median"] is row["high"] is None for row in gaps)
    assert shows(plot.image("png"), color("mf"))  # the marker of the single validation


def test_idle_and_dynamic_add_up(plots: list[Plot]) -> None:
    for row in named(plots, "3x2000", "idle-dynamic").rows:
        assert row["idle_j"] == pytest.approx(200)  # 20 W for 10 s
        assert row["idle_j"] + row["dynamic_j"] == pytest.approx(550 if row["arm"] == "bp" else 275)


def test_pareto_front(tmp_path: Path) -> None:
    for rule, joules, accuracy in (("bp", 100, 60), ("mf", 80, 61), ("dfa", 50, 50), ("ff", 90, 61)):
        make_run(tmp_path, rule, 0, joules=joules, accuracy=accuracy)
    rows = named(make_plots(collect(tmp_path)), "pareto").rows
    assert {row["arm"]: row["front"] for row in rows} == {"bp": False, "mf": True, "dfa": True, "ff": False}


def test_memory_against_depth(plots: list[Plot], tmp_path: Path) -> None:
    rows = named(plots, "memory").rows
    assert {(row["arm"], row["blocks"], row["mib"]) for row in rows} == {
        ("bp", 3, 150), ("bp", 6, 300), ("mf", 3, 75), ("mf", 6, 150)
    }  # fmt: skip
    for network in ("mlp:3x2000", "mlp:6x1000"):  # which differ in width too
        make_run(tmp_path, "mf", 0, network=network)
    assert not any("memory" in plot.name for plot in make_plots(collect(tmp_path)))


def test_runs_without_joules_are_drawn_over_epochs_alone(tmp_path: Path) -> None:
    make_run(tmp_path, "mf", 0, joules=None, curve=[(None, 40), (None, 50)])
    assert [plot.name.split("H200-")[1] for plot in make_plots(collect(tmp_path))] == ["epochs"]


def test_files_lie_beside_each_other_and_hold_the_same(plots: list[Plot], tmp_path: Path) -> None:
    plot = named(plots, "3x2000", "pareto")
    written = save([plot], tmp_path / "figures")
    assert [path.name for path in written] == [f"{plot.name}.{suffix}" for suffix in ("png", "pdf", "csv")]
    with Image.open(written[0]) as image:
        image.verify()
    assert written[1].read_bytes().startswith(b"%PDF-")
    rows = list(csv.DictReader(io.StringIO(written[2].read_text())))
    assert [(row["arm"], float(row["joules"])) for row in rows] == [(r["arm"], r["joules"]) for r in plot.rows]
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write"):
        save([plot], tmp_path / "file")


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        make_plots([])
    result = CliRunner().invoke(cli, ["plot", str(tmp_path)])
    assert result.exit_code == 1
    assert "no finished run" in result.stderr


# The report


class Page(HTMLParser):
    """Tags that are open, images, text of cells, and everything that could load something."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given["src"] or "")
        if tag == "td":
            self.cells.append("")
        if "id" in given:
            self.anchors.add(given["id"] or "")
        self.links += [value or "" for name, value in attrs if name in {"href", "srcset", "data", "poster", "action"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="module")
def page(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    command = ["report", str(study), "--out", str(path), "--with-reference", "--title", "A <test> & more"]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.stdout.strip() == str(path)
    return path


def test_the_report_is_one_page_with_everything_in_it(page: Path, study: Path, plots: list[Plot]) -> None:
    text = page.read_text()
    parsed = Page(text)
    assert parsed.open == []
    assert len(parsed.images) == len(plots)
    for source in parsed.images:
        kind, _, content = source.partition(",")
        assert kind == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        image.load()
        assert image.width > 500
        assert len(image.convert("L").getcolors() or []) > 10  # not an empty canvas
    assert {"T1", "T2", "T3", "T4", "T5", "T6", "T7", "figures"} <= parsed.anchors
    printed = (
        CliRunner().invoke(cli, ["table", str(study), "-t", "T3", "--with-reference", "--format", "markdown"]).stdout
    )
    expected = [c.strip() for line in printed.splitlines()[4:] if line.startswith("|") for c in line[1:-1].split(" | ")]
    assert all(cell in parsed.cells for cell in expected)
    assert "A &lt;test&gt; &amp; more" in text
    assert "Energy is simulated" in text


def test_the_report_loads_nothing(page: Path) -> None:
    text = page.read_text()
    parsed = Page(text)
    assert not parsed.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert all(link.startswith("#") and link[1:] in parsed.anchors for link in parsed.links)
    assert not re.search(r"url\(|@import|https?://", re.sub(r"data:image/png;base64,[^\"]*", "", text))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_report_in_a_browser(page: Path, tmp_path: Path) -> None:
    """Every figure has its size in the page that a browser lays out, and nothing is complained about."""
    probed = tmp_path / "probed.html"
    probe = (
        "<script>document.title = [...document.images].map(i => i.complete && i.naturalWidth > 500 "
        "&& i.offsetHeight > 0).join()</script>"
    )
    probed.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert set(title[1].split(",")) == {"true"}
    assert "CONSOLE" not in done.stderr


def test_host_bound_rows_and_comparisons_are_told(tmp_path: Path) -> None:
    for seed in range(2):
        for rule in ("bp", "mf"):
            make_run(tmp_path, rule, seed, utilisation=0.1, joules=1000 * math.exp(seed))
    CliRunner().invoke(cli, ["report", str(tmp_path)], catch_exceptions=False)
    text = (tmp_path / "report.html").read_text()
    assert "Rows labelled host-bound" in text
    assert "<td>host-bound</td>" in text
