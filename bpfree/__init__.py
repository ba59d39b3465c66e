"""bpfree: train neural networks without back-propagation, and measure what that costs and saves.

learner = bpfree.MonoForward(my_blocks, classes=10, lr=1e-3)
for x, y in my_loader:
    learner.step((x, y))
accuracy = (learner.scores(x_test).argmax(1) == y_test).float().mean()
"""

from bpfree import data
from bpfree.algorithms import (
    Backprop,
    CaFo,
    CompetitiveForward,
    CounterCurrent,
    DirectFeedback,
    ForwardForward,
    ForwardGNN,
    Learner,
    LocalLearning,
    MonoForward,
    NoProp,
    NoPropBackprop,
    algorithm,
    audit,
)
from bpfree.data import Batches, Dataset
from bpfree.data.graph_batches import GraphBatches
from bpfree.energy import EnergyMeter
from bpfree.errors import BpfreeError
from bpfree.experiments import Trainer, TrainingConfig, evaluate
from bpfree.networks import Graph, build_network

__version__ = "0.1.0"

__all__ = [
    "Backprop",
    "Batches",
    "BpfreeError",
    "CaFo",
    "CompetitiveForward",
    "CounterCurrent",
    "Dataset",
    "DirectFeedback",
    "EnergyMeter",
    "ForwardForward",
    "ForwardGNN",
    "Graph",
    "GraphBatches",
    "Learner",
    "LocalLearning",
    "MonoForward",
    "NoProp",
    "NoPropBackprop",
    "Trainer",
    "TrainingConfig",
    "algorithm",
    "audit",
    "build_network",
    "data",
    "evaluate",
]
