"""Goodness of each layer for positive and negative data over a recorded Forward-Forward run, as a figure.

    bpfree run --algo ff --dataset digits --results runs
    python benchmarks/goodness.py runs/digits-ff-... --figure goodness.png

Reads the metrics.jsonl of the run: means over each epoch of training, every negative with the label drawn for it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from bpfree.errors import CheckpointError
from bpfree.experiments.records import METRICS

POSITIVE = re.compile(r"(layer \d+) positive goodness")


def goodness_courses(path: Path) -> dict[str, dict[str, list[float]]]:
    """Per layer: "epoch", "positive" and "negative" mean goodness while training.

    Args:
        path: a run folder.

    Raises:
        CheckpointError: it holds no epochs of a Forward-Forward run.
    """
    file = path / METRICS
    epochs: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    courses: dict[str, dict[str, list[float]]] = {}
    for record in epochs:
        for name, value in record.items():
            found = POSITIVE.fullmatch(name)
            if found:
                layer = found[1]
                course = courses.setdefault(layer, {"epoch": [], "positive": [], "negative": []})
                course["epoch"].append(record["epoch"])
                course["positive"].append(value)
                course["negative"].append(record[f"{layer} negative goodness"])
    if not courses:
        raise CheckpointError(f"{path} holds no epochs of a Forward-Forward run")
    return courses


def draw(courses: dict[str, dict[str, list[float]]], figure: Path) -> None:
    """One panel per layer, both kinds of data on one axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, panels = plt.subplots(1, len(courses), figsize=(3.2 * len(courses), 2.8), squeeze=False, sharex=True)
    for panel, (layer, course) in zip(panels[0], courses.items(), strict=True):
        panel.plot(course["epoch"], course["positive"], color="tab:blue", label="positive")
        panel.plot(course["epoch"], course["negative"], color="tab:red", label="negative")
        panel.set_title(layer)
        panel.set_xlabel("epoch")
    panels[0][0].set_ylabel("mean goodness")
    panels[0][0].legend(frameon=False)
    canvas.tight_layout()
    canvas.savefig(figure, dpi=150)
    plt.close(canvas)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--figure", type=Path, required=True, help="where the figure goes; its suffix says the format")
    options = parser.parse_args()
    draw(goodness_courses(options.run), options.figure)


if __name__ == "__main__":
    main()
