"""Data: named data sets and graphs, users' own arrays, and how they reach a learner.

dataset = bpfree.data.load("digits")
train, validation, test = dataset.split()

graph = bpfree.data.load_graph("cora")
split = graph.node_split(0)
"""

from bpfree.data.batches import Batches
from bpfree.data.catalog import DATASETS, DatasetInfo, GraphInfo
from bpfree.data.dataset import SPLIT_SEED, Dataset, Part
from bpfree.data.graphs import EdgePart, EdgeSplit, GraphDataset, NodeSplit, load_graph
from bpfree.data.image_folders import FolderInfo, load_image_folder
from bpfree.data.registry import data_root, fetch, info, load, names, path, verify

__all__ = [
    "DATASETS",
    "SPLIT_SEED",
    "Batches",
    "Dataset",
    "DatasetInfo",
    "EdgePart",
    "EdgeSplit",
    "FolderInfo",
    "GraphDataset",
    "GraphInfo",
    "NodeSplit",
    "Part",
    "data_root",
    "fetch",
    "info",
    "load",
    "load_graph",
    "load_image_folder",
    "names",
    "path",
    "verify",
]
