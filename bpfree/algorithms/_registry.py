"""Learning rules by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, get_type_hints

from torch import nn

from bpfree.algorithms.backprop import DEEP_SUPERVISION, LADDER, Backprop
from bpfree.algorithms.cafo import CaFo
from bpfree.algorithms.competitive_forward import CWCOMP, DEEPER_FORWARD, SCALABLE, CompetitiveForward
from bpfree.algorithms.counter_current import CounterCurrent
from bpfree.algorithms.direct_feedback import DirectFeedback
from bpfree.algorithms.forward_forward import ForwardForward
from bpfree.algorithms.forward_gnn import ForwardGNN
from bpfree.algorithms.learner import Learner, Paper
from bpfree.algorithms.local_learning import DGL, GREEDY, INFOPRO, PREDSIM, LocalLearning
from bpfree.algorithms.mono_forward import MonoForward
from bpfree.algorithms.noprop import NoProp
from bpfree.algorithms.noprop_backprop import NoPropBackprop
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape


@dataclass(frozen=True)
class Algorithm:
    """A rule as the command line knows it.

    Attributes:
        name: the long name, and the stem of its files.
        alias: the short name.
        learner: the class that implements it.
        description: one line for `bpfree list`.
        paper: where the rule comes from.
        defaults: keyword arguments that make the class this rule.
    """

    name: str
    alias: str
    learner: type[Learner]
    description: str
    paper: Paper
    defaults: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[str, Any]:
        """Every keyword argument that a user may set, with its default."""
        signature = inspect.signature(self.learner.__init__)
        return {
            name: self.defaults.get(name, parameter.default)
            for name, parameter in signature.parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "input_shape"
        }

    def annotations(self) -> dict[str, Any]:
        """What each of `parameters` may be, as the learner's constructor says."""
        hints = get_type_hints(self.learner.__init__)
        return {name: hints[name] for name in self.parameters()}

    def build(self, network: nn.Sequential, classes: int, input_shape: Shape, **parameters: Any) -> Learner:
        """A learner for `network`; 0 classes are the task "autoencode".

        Raises:
            UsageError: a task that the rule cannot learn, a parameter that it does not have (with the nearest one it
                has), a bad value, or a network that it cannot train.
        """
        known = self.parameters()
        for name in parameters:
            if name not in known:
                raise unknown_name(f"parameter of {self.name}", name, known)
        if classes == 0 and "autoencode" not in self.learner.tasks:
            raise UsageError(f"{self.name} cannot autoencode; it learns to {' and '.join(self.learner.tasks)}")
        support = self.learner.supports(network)
        if not support.ok:
            raise UsageError(f"{self.name} cannot train this network: {support.reason}")
        build: Callable[..., Learner] = self.learner
        return build(network, classes, input_shape=input_shape, **{**self.defaults, **parameters})


ALGORITHMS: Final = (
    Algorithm("backprop", "bp", Backprop, "back-propagation, the baseline", Backprop.paper),
    Algorithm(
        "deep_supervision",
        "bp-ds",
        Backprop,
        "control: back-propagation with Mono-Forward's local heads beside the read-out",
        DEEP_SUPERVISION,
        {"auxiliary_weight": 0.3},
    ),
    Algorithm(
        "mono_forward_joint",
        "mf-joint",
        Backprop,
        "control: Mono-Forward's heads and read-out, but gradients through the whole network",
        LADDER,
        {"auxiliary_weight": 1.0, "readout": "goodness", "optimizer": "adam"},
    ),
    Algorithm(
        "mono_forward",
        "mf",
        MonoForward,
        "Mono-Forward: each block learns from its own linear classifier",
        MonoForward.paper,
    ),
    Algorithm(
        "forward_forward",
        "ff",
        ForwardForward,
        "Forward-Forward: each layer is lively on data with the right label and quiet with a wrong one",
        ForwardForward.paper,
    ),
    Algorithm(
        "deeper_forward",
        "dff",
        CompetitiveForward,
        "DeeperForward: in every layer classes compete for mean activity; layer normalisation, shortcuts",
        DEEPER_FORWARD,
        {"inference": "selected"},
    ),
    Algorithm(
        "channel_competition",
        "cwc",
        CompetitiveForward,
        "CwComp: in every layer groups of channels compete for mean squared activity",
        CWCOMP,
        {
            "goodness": "squares",
            "normalizer": "none",
            "normalize_input": False,
            "inference": "last",
            "optimizer": "adam",
        },
    ),
    Algorithm(
        "scalable_forward",
        "sff",
        CompetitiveForward,
        "Scalable Forward-Forward: each block, with back-propagation inside, learns from an auxiliary convolution",
        SCALABLE,
        {"goodness": "auxiliary", "normalizer": "channels", "normalize_input": False, "optimizer": "adam", "lr": 1e-3},
    ),
    Algorithm(
        "cafo",
        "cafo",
        CaFo,
        "CaFo: a linear predictor on each block, in closed form or by descent; blocks are random or feedback-aligned",
        CaFo.paper,
    ),
    Algorithm(
        "greedy_local_learning",
        "greedy",
        LocalLearning,
        "greedy local learning: each block learns from a small classifier, all at once",
        GREEDY,
        {"host": "greedy"},
    ),
    Algorithm(
        "decoupled_greedy_learning",
        "dgl",
        LocalLearning,
        "DGL: each block learns from a classifier that shrinks its maps first and costs little",
        DGL,
    ),
    Algorithm(
        "predsim",
        "predsim",
        LocalLearning,
        "PredSim: each block makes samples of one class alike, and learns a little from a linear classifier",
        PREDSIM,
        {"host": "predsim"},
    ),
    Algorithm(
        "infopro",
        "infopro",
        LocalLearning,
        "InfoPro: each block keeps what reconstructs the image and what tells its class",
        INFOPRO,
        {"host": "infopro"},
    ),
    Algorithm(
        "momentum_auxiliary_network",
        "man",
        LocalLearning,
        "MAN: DGL (or another host) behind a momentum copy of the next block's first unit and a trainable one",
        LocalLearning.paper,
        {"ema": True, "bias": "twin"},
    ),
    Algorithm(
        "forward_gnn",
        "fgnn",
        ForwardGNN,
        "ForwardGNN: graph layers learn forward from class prototypes, goodness or links",
        ForwardGNN.paper,
    ),
    Algorithm(
        "noprop",
        "noprop",
        NoProp,
        "NoProp: each block learns to tell a label from the input and the label's noisy embedding",
        NoProp.paper,
    ),
    Algorithm(
        "noprop_backprop",
        "noprop-bp",
        NoPropBackprop,
        "control: NoProp's blocks in a gated chain, back-propagation through all of them",
        NoPropBackprop.paper,
    ),
    Algorithm(
        "counter_current",
        "ccl",
        CounterCurrent,
        "counter-current learning: a second network from labels to inputs; each pair of layers learns to agree",
        CounterCurrent.paper,
    ),
    Algorithm(
        "direct_feedback",
        "dfa",
        DirectFeedback,
        "control: direct feedback alignment, the output's error through fixed random weights",
        DirectFeedback.paper,
    ),
)


def algorithm(name: str) -> Algorithm:
    """The rule called `name`, by its short or long name; `-` and `_` are the same.

    Raises:
        UsageError: no such rule; the message names the nearest ones.
    """
    by_name = {alias: entry for entry in ALGORITHMS for alias in (entry.alias, entry.name.replace("_", "-"))}
    wanted = name.lower().replace("_", "-")
    if wanted not in by_name:
        raise unknown_name("algorithm", name, by_name)
    return by_name[wanted]
