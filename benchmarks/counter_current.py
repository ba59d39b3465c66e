"""How the two networks of counter-current learning come to agree, as figures of a recorded run.

    bpfree run --algo ccl --dataset mnist --diagnose --results runs
    python benchmarks/counter_current.py courses runs/mnist-ccl-... --figure courses.png
    python benchmarks/counter_current.py features runs/mnist-ccl-... --figure features.png

"courses" reads metrics.jsonl: per layer the cosine between forward weights and transposed feedback weights, per level
the linear CKA between forward activations of validation samples and feedback activations of their class, over the
epochs. "features" loads the model: for every level, test samples and class templates on the first two principal
components of both, rows scaled to length 1; and the CKA of every forward level with every feedback level.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bpfree.algorithms import CounterCurrent
from bpfree.errors import CheckpointError
from bpfree.experiments import run as runs
from bpfree.experiments.records import RunFolder
from bpfree.metrics import linear_cka

COURSE = re.compile(r"(layer|level) (\d+) (alignment|CKA)")
TITLES = {"alignment": "cosine of U and transposed V", "CKA": "CKA of paired activations"}
SHOWN = 1000  # test samples in the picture of features


def courses(path: Path) -> dict[str, dict[str, list[float]]]:
    """ "alignment" per layer and "CKA" per level, a value per epoch.

    Args:
        path: a run folder.

    Raises:
        CheckpointError: it holds no diagnostics of a counter-current run.
    """
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in TITLES}
    for record in RunFolder.open(path).read_metrics():
        for name, value in record.items():
            match = COURSE.fullmatch(name)
            if match:
                found[match[3]].setdefault(f"{match[1]} {match[2]}", []).append(value)
    if not found["alignment"]:
        raise CheckpointError(f"{path} holds no diagnostics of a counter-current run; make one with --diagnose")
    return found


def draw_courses(found: dict[str, dict[str, list[float]]], figure: Path) -> None:
    """One panel per kind, one line per layer or level."""
    plt = _pyplot()
    canvas, panels = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.2), squeeze=False)
    for panel, (kind, lines) in zip(panels[0], found.items(), strict=True):
        for index, (name, values) in enumerate(lines.items()):
            colour = plt.get_cmap("viridis")(index / max(1, len(lines) - 1))
            panel.plot(range(1, len(values) + 1), values, label=name, color=colour)
        panel.set_xlabel("epoch")
        panel.set_title(TITLES[kind])
        panel.legend(frameon=False, fontsize="small")
    _save(canvas, figure)


def features(learner: CounterCurrent, inputs: Tensor, targets: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Of every level l < L the plane of its first two principal components, and CKA between all levels.

    Args:
        learner: of a classification run.
        inputs: (n, *input_shape).
        targets: (n,).

    Returns:
        Per level (n, 2) samples and (n, 2) the template of each sample's class; and (L, L) CKA, rows forward.
    """
    pairs = learner.paired_activations(inputs, targets)
    planes = []
    for a, b in pairs:
        rows = torch.nn.functional.normalize(torch.cat([a, b]), dim=1)
        rows = rows - rows.mean(0)
        plane = rows @ torch.linalg.svd(rows, full_matrices=False).Vh[:2].T
        planes.append((plane[: len(a)], plane[len(a) :]))
    maps = torch.stack([torch.stack([linear_cka(a, b) for _, b in pairs]) for a, _ in pairs])
    return planes, maps


def draw_features(planes: list[tuple[Tensor, Tensor]], maps: Tensor, targets: Tensor, figure: Path) -> None:
    """One panel per level, samples as dots and templates as crosses, coloured by class; then the map of CKA."""
    plt = _pyplot()
    canvas, panels = plt.subplots(1, len(planes) + 1, figsize=(2.8 * (len(planes) + 1), 2.9), squeeze=False)
    for level, (panel, (samples, templates)) in enumerate(zip(panels[0], planes, strict=False)):
        colours: dict[str, Any] = {"c": targets.tolist(), "cmap": "tab10"}
        panel.scatter(*samples.T.tolist(), s=3, alpha=0.5, **colours)
        panel.scatter(*templates.T.tolist(), s=60, marker="x", **colours)
        panel.set_title(f"level {level}")
        panel.set_xticks([])
        panel.set_yticks([])
    image = panels[0][-1].imshow(maps.tolist(), vmin=0, vmax=1, origin="lower", cmap="magma")
    panels[0][-1].set_xlabel("feedback level")
    panels[0][-1].set_ylabel("forward level")
    panels[0][-1].set_title("CKA")
    canvas.colorbar(image, ax=panels[0][-1])
    _save(canvas, figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(canvas: Any, figure: Path) -> None:
    canvas.tight_layout()
    canvas.savefig(figure, dpi=150)
    _pyplot().close(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["courses", "features"])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--figure", type=Path, required=True, help="where the figure goes; its suffix says the format")
    options = parser.parse_args()
    if options.what == "courses":
        draw_courses(courses(options.run), options.figure)
        return
    _, learner, (_, _, test) = runs.trained(options.run, torch.device("cpu"))
    if not isinstance(learner, CounterCurrent) or learner.task != "classify":
        parser.error(f"{options.run} holds no counter-current classifier")
    inputs, targets = next(iter(test.in_order(SHOWN)))
    assert isinstance(inputs, Tensor)
    draw_features(*features(learner, inputs, targets), targets, options.figure)


if __name__ == "__main__":
    main()
