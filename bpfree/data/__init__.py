"""Data: named data sets, users' own arrays, and how they reach a learner.

dataset = bpfree.data.load("digits")
train, validation, test = dataset.split()
"""

from bpfree.data.batches import Batches
from bpfree.data.catalog import DatasetInfo
from bpfree.data.dataset import SPLIT_SEED, Dataset, Part
from bpfree.data.registry import data_root, fetch, info, load, names, path, verify

__all__ = [
    "SPLIT_SEED",
    "Batches",
    "Dataset",
    "DatasetInfo",
    "Part",
    "data_root",
    "fetch",
    "info",
    "load",
    "names",
    "path",
    "verify",
]
