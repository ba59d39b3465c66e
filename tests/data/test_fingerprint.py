"""Fingerprints of data: the same for the same, others for others, whatever little differs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bpfree.data import Dataset, GraphDataset
from bpfree.data.fingerprint import ROWS, fingerprint, same_data


def images(samples: int = 3 * ROWS, **changes: Any) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (samples, 3, 4, 4), dtype=torch.uint8, generator=generator)
    targets = torch.arange(samples) % 5
    train = (changes.get("inputs", inputs), changes.get("targets", targets))
    return Dataset.from_arrays(train, (inputs[:20], targets[:20]), classes=5)


def features(change: float = 0.0) -> Dataset:
    values = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    return Dataset.from_arrays((values * (1 + change), torch.arange(50) % 2), (values, torch.arange(50) % 2))


def ring(nodes: int = 6, **changes: Any) -> GraphDataset:
    forth = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    parts: dict[str, Tensor] = {"edge_index": torch.cat([forth, forth.flip(0)], 1), "features": torch.eye(nodes)}
    return GraphDataset("ring", **{"labels": torch.arange(nodes) % 2, "classes": 2, **parts, **changes})


def test_the_same_data_have_the_same_fingerprint_also_from_a_record() -> None:
    for make in (images, features, ring):
        kept = json.loads(json.dumps(fingerprint(make())))
        assert same_data(kept, fingerprint(make()))
    whole = images()
    strided = replace(whole.train, inputs=whole.train.inputs.to(memory_format=torch.channels_last))
    assert same_data(fingerprint(whole), fingerprint(replace(whole, train=strided)))


def test_one_label_edge_or_size_makes_another() -> None:
    whole = images()
    one_off = whole.train.targets.clone()
    one_off[101] = (one_off[101] + 1) % 5
    others = [
        images(targets=one_off),
        images(3 * ROWS + 1),
        images(inputs=whole.train.inputs.flip(3)),
        images(inputs=255 - whole.train.inputs),
    ]
    for other in others:
        assert not same_data(fingerprint(whole), fingerprint(other))
    edges = ring().edge_index
    kept = (edges.sum(0) != 1).nonzero().flatten()  # without the edge between nodes 0 and 1
    for changed in (ring(edge_index=edges[:, kept]), ring(features=torch.eye(6).flip(0)), ring(8)):
        assert not same_data(fingerprint(ring()), fingerprint(changed))


@pytest.mark.parametrize(("change", "same"), [(1e-7, True), (1e-2, False)])
def test_features_may_differ_by_rounding_only(change: float, same: bool) -> None:
    assert same_data(fingerprint(features()), fingerprint(features(change))) == same
