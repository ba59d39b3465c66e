"""The public names of bpfree, which `bpfree` hands out when they are first asked for."""

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
