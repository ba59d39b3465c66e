"""Whether data are the same as earlier ones, told from a few numbers of them that a record can keep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from bpfree.data.dataset import Dataset
from bpfree.data.graphs import GraphDataset

ROWS: Final = 64
TOLERANCE: Final = 1e-4
"""Features that were computed anew, on another machine perhaps, may differ in their last bits."""


def fingerprint(dataset: Dataset | GraphDataset) -> dict[str, Any]:
    """What tells training data from others of the same name: shapes, labels and edges, and some samples.

    Takes milliseconds whatever the data, for only 64 samples at equal distances are looked at. The test part is left
    alone: a trial of a tuner has a fingerprint too.

    Returns:
        "digest", SHA-256 of shapes, labels and edges, and "sums", one weighted sum of features per sample looked at.
    """
    if isinstance(dataset, GraphDataset):
        features, exact = dataset.features, [dataset.labels, dataset.edge_index]
    else:
        features, exact = dataset.train.inputs, [dataset.train.targets]
    digest = hashlib.sha256(str([tuple(tensor.shape) for tensor in (features, *exact)]).encode())
    for tensor in exact:
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return {"digest": digest.hexdigest(), "sums": _sums(features).tolist()}


def _sums(values: Tensor) -> Tensor:
    """(N, ...) -> at most (64,): sums over samples with weights from 0 to 1, so that order matters too."""
    rows = values[:: max(1, len(values) // ROWS)][:ROWS].flatten(1).double().cpu()
    return rows @ torch.linspace(0, 1, rows.shape[1], dtype=torch.float64)


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two fingerprints are of the same data, up to rounding of features."""
    if one["digest"] != other["digest"] or len(one["sums"]) != len(other["sums"]):
        return False
    first, second = (torch.tensor(found["sums"], dtype=torch.float64) for found in (one, other))
    return bool((first - second).abs().max() <= TOLERANCE * first.abs().max())
