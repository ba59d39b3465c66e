"""Options on how to train, which commands that train share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, Final

import click

from bpfree.data.batches import AUGMENTATIONS
from bpfree.experiments.schedules import SCHEDULES
from bpfree.experiments.stepper import PRECISIONS
from bpfree.experiments.train import MONITORS, SPLITS

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

SEARCHED: Final[tuple[Decorator, ...]] = (
    click.option("--epochs", type=click.IntRange(min=1), help="Cap on epochs per stage.  [default: 100]"),
    click.option(
        "--patience", type=click.IntRange(min=1), help="Epochs without improvement that end a stage.  [default: 20]"
    ),
    click.option("--batch-size", type=click.IntRange(min=1), help="Samples per step.  [default: 128]"),
    click.option("--lr-schedule", type=click.Choice(SCHEDULES), help="Learning-rate schedule.  [default: constant]"),
    click.option(
        "--dropout",
        type=click.FloatRange(0, 1, max_open=True),
        help="Of the network's dropout layers.  [default: the network's own]",
    ),
)
"""What a tuner has options of its own for."""

SETTINGS: Final[tuple[Decorator, ...]] = (
    click.option("--min-delta", type=click.FloatRange(min=0), help="What counts as improvement.  [default: 0]"),
    click.option("--warmup-epochs", type=click.FloatRange(min=0), help="Linear learning-rate warm-up.  [default: 0]"),
    click.option("--precision", type=click.Choice(PRECISIONS), help="Arithmetic of matrix products.  [default: tf32]"),
    click.option(
        "--augmentation", type=click.Choice(AUGMENTATIONS), help="Augmentation.  [default: the data set's own]"
    ),
    click.option(
        "--standardize/--no-standardize",
        default=None,
        help="Standardise inputs by the data set's mean and deviation, or leave images in [0, 1].  "
        "[default: standardize]",
    ),
    click.option(
        "--mean",
        type=float,
        help="Subtract this from all channels, of images in [0, 1].  [default: the set's mean]",
    ),
    click.option("--std", type=float, help="Goes with --mean: divide by this.  [default: the set's deviation]"),
    click.option("--validation", type=click.IntRange(min=1), help="Validation samples.  [default: the data set's own]"),
    click.option(
        "--diagnose/--no-diagnose",
        default=None,
        help="Note the rule's own diagnostics of validation data after every epoch.  [default: no-diagnose]",
    ),
    click.option("--monitor", type=click.Choice(MONITORS), help="What validation wants better.  [default: loss]"),
    click.option("--split", type=click.Choice(SPLITS), help="Graphs: which split.  [default: the graph's own]"),
    click.option(
        "--validate-every", type=click.IntRange(min=1), help="Graphs: steps between validations.  [default: 2]"
    ),
    click.option(
        "--graph-parts",
        type=click.IntRange(min=1),
        help="Graphs: cut the nodes into this many random parts, for graphs that do not fit the device.  [default: 1]",
    ),
    click.option(
        "--cache/--no-cache",
        default=None,
        help="Keep what frozen blocks make of the inputs, instead of running them in every step.  [default: cache]",
    ),
    click.option("--graph/--no-graph", default=None, help="CUDA graphs for training steps.  [default: graph]"),
    click.option(
        "--checkpoint-every",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="Time between checkpoints.  [default: 60]",
    ),
)


TESTED: Final[tuple[Decorator, ...]] = (
    click.option(
        "--reveal-validation/--no-reveal-validation",
        default=None,
        help="Graphs: show validation labels to the rule at test.  [default: no-reveal-validation]",
    ),
)


def training_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option per training setting that all arms of a comparison share; None where the user says nothing."""
    return _add((*SEARCHED, *SETTINGS, *TESTED), function)


def setting_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, but only those that a tuner does not search and that mean something without a test."""
    return _add(SETTINGS, function)


def _add(options: tuple[Decorator, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    return reduce(lambda decorated, option: option(decorated), reversed(options), function)
