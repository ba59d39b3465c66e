"""Learning rules, one file each, behind one contract."""

from bpfree.algorithms._registry import ALGORITHMS, Algorithm, algorithm
from bpfree.algorithms.audit import Audit, audit
from bpfree.algorithms.backprop import Backprop
from bpfree.algorithms.cafo import CaFo
from bpfree.algorithms.competitive_forward import CompetitiveForward
from bpfree.algorithms.counter_current import CounterCurrent
from bpfree.algorithms.direct_feedback import DirectFeedback
from bpfree.algorithms.forward_forward import ForwardForward
from bpfree.algorithms.forward_gnn import ForwardGNN
from bpfree.algorithms.learner import Batch, Channel, Learner, Paper, Stage, Support
from bpfree.algorithms.local_learning import LocalLearning
from bpfree.algorithms.mono_forward import MonoForward
from bpfree.algorithms.noprop import NoProp
from bpfree.algorithms.noprop_backprop import NoPropBackprop

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Audit",
    "Backprop",
    "Batch",
    "CaFo",
    "Channel",
    "CompetitiveForward",
    "CounterCurrent",
    "DirectFeedback",
    "ForwardForward",
    "ForwardGNN",
    "Learner",
    "LocalLearning",
    "MonoForward",
    "NoProp",
    "NoPropBackprop",
    "Paper",
    "Stage",
    "Support",
    "algorithm",
    "audit",
]
