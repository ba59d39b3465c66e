"""The isolation audit of a run: its learner, on its data, before any training."""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

import torch

from bpfree import data
from bpfree.algorithms import algorithm
from bpfree.algorithms.audit import STEPS, Audit, audit
from bpfree.algorithms.learner import LooksAtData
from bpfree.experiments.config import RunConfig, resolve
from bpfree.experiments.run import AnyDataset, build_learner, load_batches, pick_device, preferred_layout
from bpfree.experiments.stepper import numerics
from bpfree.experiments.train import EVALUATION_BATCH
from bpfree.networks import build_network

WARM_UP: Final = 20
"""Steps before those that are watched: enough for Forward-Forward's read-out, which starts at zero, to tell classes."""

BATCH_SIZE: Final = 32
"""Samples per step: what depends on what does not change with their number."""


def usual_config(rule: str, **options: Any) -> RunConfig:
    """The run of a rule on the first packaged data set whose usual network it can train.

    Args:
        rule: its short or long name.
        options: of `resolve`; data set, network and task are chosen here.

    Raises:
        UsageError: see `resolve`.
    """
    configs = [resolve(rule, name, **options) for name, entry in data.DATASETS.items() if entry.packaged]
    return next(filter(_trainable, configs), configs[0])


def _trainable(config: RunConfig) -> bool:
    entry = data.info(config.dataset)
    shape = (entry.features,) if isinstance(entry, data.GraphInfo) else entry.input_shape
    with torch.random.fork_rng(devices=()):
        return algorithm(config.algorithm).learner.supports(build_network(config.network, shape)).ok


def audit_run(
    config: RunConfig,
    dataset: AnyDataset,
    *,
    steps: int = STEPS,
    warm_up: int = WARM_UP,
    batch_size: int = BATCH_SIZE,
) -> Audit:
    """Audit the learner of a run on the run's training data, in float32.

    Args:
        config: the run.
        dataset: what it trains on.
        steps: steps that are watched.
        warm_up: steps before them, at least 1.
        batch_size: samples per step; a graph is a batch of its own.

    Raises:
        UsageError: the rule cannot train the network, or something in `config` does not fit.
        TrainingError: the same steps do not give the same bits.
    """
    device = pick_device(config.device)
    learner = build_learner(config, dataset, device)
    train, validation = load_batches(config, dataset, device, preferred_layout(learner, device), test=False)
    with numerics("fp32"):
        if isinstance(learner, LooksAtData):
            learner.prepare(train.in_order(EVALUATION_BATCH))
        epochs = (train.epoch(train.draw(config.seed, 0, step), batch_size) for step in range(warm_up + steps))
        return audit(
            learner,
            [next(iter(epoch)) for epoch in epochs],
            steps=steps,
            validation=list(islice(validation.in_order(EVALUATION_BATCH), 1)),
            seed=config.seed,
        )
