"""What every learning rule must do, on every backbone it supports: driven by the registry."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bpfree.algorithms import ALGORITHMS, Algorithm, Learner, algorithm, audit
from bpfree.data.batches import Batches
from bpfree.data.graph_batches import AnyBatches, GraphBatches
from bpfree.errors import UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.experiments.config import parse_settings
from bpfree.networks import Graph, build_network, cnn, gnn, mlp
from tests.seeds import manual_seed

CLASSES = 4
SHAPE = (2, 8, 8)
FEATURES = (12,)
KNOWN = 24  # nodes of every graph whose labels are known; none of them is asked about
BACKBONES: dict[str, Callable[[], nn.Sequential]] = {
    "mlp": lambda: mlp(SHAPE, (24,) * 3),
    "cnn": lambda: cnn(SHAPE, (6, 8)),
    "cnn-bn": lambda: cnn(SHAPE, (6, 8), pool="max", batch_norm=True),
    "gcn": lambda: gnn("gcn", FEATURES, (24,) * 3),
    "sage": lambda: gnn("sage", FEATURES, (24,) * 3),
    "gat": lambda: gnn("gat", FEATURES, (24,) * 3),
}
GRAPHS = ("gcn", "sage", "gat")
AUXILIARY = {"optimizer": "adam", "head_pool": "flatten"}  # the mean over positions does not tell quadrants apart
OPTIONS: dict[str, dict[str, object]] = {
    "mf": {},
    "mf-sequential": {"schedule": "sequential"},
    "mf-post-sums": {"pass_on": "post", "inference": "sum_probs", "input_projection": True},
    "cafo": {"ridge": 1e-3},
    "cafo-sequential": {"ridge": 1e-3, "schedule": "sequential"},
    "cafo-ce": {"loss": "ce"},
    "cafo-sl": {"loss": "sl", "schedule": "sequential"},
    "cafo-dfa": {"loss": "ce", "block_training": "dfa"},
    "noprop-bp": {"steps": 2, "width": 32},
    "noprop": {"steps": 3, "width": 32},
    "noprop-learned": {"steps": 3, "width": 32, "embeddings": "learned", "p_out": "radial", "embedding_dim": 6},
    "noprop-prototype": {
        "steps": 2,
        "width": 32,
        "embeddings": "prototype",
        "shared_updates": "step",
        "alpha_bar_max": 0.99,
    },
    "noprop-ct": {"variant": "ct", "steps": 20, "width": 64},
    "noprop-ct-learned": {"variant": "ct", "steps": 8, "width": 64, "embeddings": "learned", "sampler": "ode"},
    "noprop-fm": {"variant": "fm", "steps": 8, "width": 64},
    "noprop-fm-learned": {"variant": "fm", "steps": 8, "width": 64, "embeddings": "learned"},
    "ff": {},
    "ff-random-concat": {"negatives": "random", "label": "concat", "inference": "softmax"},
    "ff-symba": {"loss": "symba", "goodness": "mean"},
    "ff-collaboration": {"loss": "collaboration-preceding"},
    "ff-greedy": {"schedule": "greedy"},
    "ff-hybrid": {"negatives": "hybrid", "inference": "softmax"},
    "ccl": {"optimizer": "adam"},
    "ccl-dot": {"similarity": "dot", "optimizer": "adam", "centralize": True, "warmup_steps": 2},
    "greedy": {**AUXILIARY},
    "dgl": {**AUXILIARY},
    "predsim": {**AUXILIARY},
    "infopro": {**AUXILIARY, "lanes": 3},
    "man": {**AUXILIARY, "lanes": 2},
    "man-scale": {**AUXILIARY, "host": "infopro-contrast", "scale": True, "ema_update": "after"},
    "man-learnable": {**AUXILIARY, "host": "predsim", "ema": False},
    "cwc-readout": {"loss": "cwg", "inference": "readout", "lanes": 2},
    "dff": {"lanes": 3},
    "fgnn": {},
    "fgnn-symba": {"variant": "ff-vn", "loss": "symba"},
    "fgnn-ff-la": {"variant": "ff-la"},
    "fgnn-ff-vn": {"variant": "ff-vn"},
    "fgnn-t2i": {"variant": "sf-t2i"},
    "fgnn-t2l": {"variant": "sf-t2l"},
}
RESIZED = ("fgnn-ff-la", "fgnn-t2i", "ff-random-concat")  # their layers take labels or states from above as inputs
FORWARD = (*(rule for rule in OPTIONS if rule.partition("-")[0] == "ff"), "dff", "cwc", "cwc-readout", "sff")
HOSTED = tuple(rule for rule in OPTIONS if "head_pool" in OPTIONS[rule])
GOODNESS = ("fgnn-symba", "fgnn-ff-la", "fgnn-ff-vn")
BACKPROPAGATING = ("bp", "bp-ds", "mf-joint", "noprop-bp")
ALL = 99  # blocks, or as many as there are
DRAWN = ("ff", "ff-symba", "ff-collaboration")
"""Their read-out draws the negatives: what it has heard changes a draw now and then, and not in any two steps."""
HEARD = {
    **dict.fromkeys((*BACKPROPAGATING, "dfa", "cafo-dfa"), (ALL, ALL)),  # gradients, or the error of the output
    **dict.fromkeys(DRAWN, (ALL, ALL)),
    **dict.fromkeys(("ccl", "ccl-dot"), (0, ALL)),  # the feedback network has learnt from all levels
    **dict.fromkeys(("man", "man-scale"), (0, 1)),  # copies of the next block's weights
    **dict.fromkeys(("noprop-learned", "noprop-prototype"), (0, ALL)),  # embeddings learn from all blocks
    "fgnn-t2i": (1, ALL),  # layers 1, 3, .. hear what 2, 4, .. have said in this step, the others of the last one
    "fgnn-t2l": (0, ALL),  # all hear of the last step
}
"""On how many later blocks an update depends: within the step, and within two. Rules that are not here: on none."""
STEPS = {
    **dict.fromkeys(("mf-post-sums", "cafo", "cafo-sequential", "cafo-sl", "noprop", "noprop-prototype"), 30),
    **dict.fromkeys(("ff-random-concat", "ff-hybrid", "ccl"), 30),
    **dict.fromkeys(("cafo-ce", "noprop-bp", "noprop-learned", "dff", "cwc-readout", *HOSTED), 40),
    **dict.fromkeys(("cwc", "ff", "ff-greedy"), 80),
    **dict.fromkeys(("noprop-ct", "noprop-ct-learned"), 100),  # their noise schedules learn too
    **dict.fromkeys(("ff-symba", "fgnn-ff-vn"), 120),
}
"""How many batches teach the separable set, with some to spare. Rules that are not here: 60."""
COPIED = (
    "noprop-bp",
    *(rule for rule in OPTIONS if rule.startswith("noprop")),
)  # the network is one branch of each of their blocks
ALIASES = [rule.alias for rule in ALGORITHMS]
RULES = [rule.alias for rule in ALGORITHMS if rule.alias not in OPTIONS] + list(OPTIONS)


def entry(rule: str) -> Algorithm:
    return algorithm(rule if rule in ALIASES else rule.partition("-")[0])


def backbones(rule: str) -> list[str]:
    """Those that the rule says it supports; of the rules for images, an input projection is not for graphs."""
    return [name for name in supported(entry(rule).learner) if rule != "mf-post-sums" or name not in GRAPHS]


@functools.cache
def supported(learner: type[Learner]) -> list[str]:
    """Kept, since making all networks takes long and parameters of tests ask more than 300 times."""
    return [name for name, make in BACKBONES.items() if learner.supports(make()).ok]


def options_of(rule: str, **parameters: object) -> dict[str, object]:
    """With a learning rate, if something learns by steps."""
    options = {**OPTIONS.get(rule, {}), **parameters}
    return options if "lr" in entry(rule).learner.idle(options) else {"lr": 3e-3, **options}


def build(rule: str, backbone: str, seed: int = 0, **parameters: object) -> Learner:
    manual_seed(seed)
    shape = FEATURES if backbone in GRAPHS else SHAPE
    return entry(rule).build(BACKBONES[backbone](), CLASSES, shape, **options_of(rule, **parameters))


def batch(backbone: str, size: int = 16, seed: int = 0) -> tuple[Any, Tensor]:
    """Separable by every backbone: images, or nodes of a graph, and their classes."""
    return nodes(size, seed) if backbone in GRAPHS else images(size, seed)


def nodes(size: int, seed: int) -> tuple[Graph, Tensor]:
    """Nodes that are tied to their own class, more often than not, and whose features lean towards it."""
    generator = torch.Generator().manual_seed(seed)
    count = size + KNOWN
    y = torch.randint(CLASSES, (count,), generator=generator)
    y[size:] = torch.arange(KNOWN) % CLASSES
    x = 0.3 * torch.randn(count, *FEATURES, generator=generator)
    x[torch.arange(count), y] += 1
    ends = torch.randint(count, (2, 6 * count), generator=generator)
    ends = ends[:, (y[ends[0]] == y[ends[1]]) & (ends[0] != ends[1])]
    known = torch.arange(size, count)
    return Graph.of(x, torch.cat([ends, ends.flip(0)], 1), torch.arange(size), known, y[known]), y[:size].clone()


def data(x: Any, y: Tensor, device: str) -> AnyBatches:
    return GraphBatches(x.to(device), y) if isinstance(x, Graph) else Batches(x, y, device=device)


def images(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose class is the quadrant that is bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (size,), generator=generator)
    x = 0.3 * torch.randn(size, *SHAPE, generator=generator)
    quadrants = torch.eye(CLASSES).view(CLASSES, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return x + quadrants[y], y


def learn(learner: Learner, batches: Iterable[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """Updates of everything, whatever the schedule; the last one's metrics."""
    metrics = {}
    for x, y in batches:
        for stage in learner.stages():
            metrics.update(stage.step((stage.prepared(x), y)))
    for stage in learner.stages():
        if stage.finish is not None:
            stage.finish(())
    return metrics


def step(learner: Learner, x: Any, y: Tensor) -> dict[str, Tensor]:
    """One update of everything."""
    return learn(learner, [(x, y)])


def snapshot(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*module.parameters(), *module.buffers())]


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


every = pytest.mark.parametrize(("rule", "backbone"), [(r, b) for r in RULES for b in backbones(r)])


@every
def test_learns_a_separable_set(rule: str, backbone: str) -> None:
    # Goodness answers by trying each class on all nodes asked about, which misleads their neighbours: ask about few.
    # Bounds leave room for what the rounding of another processor makes of a training.
    asked, least = (16, 0.85) if rule in GOODNESS else (200, 0.9)
    rates = {**dict.fromkeys((*GOODNESS, *COPIED, *FORWARD, *HOSTED, "dfa"), 1e-2), "ccl": 0.1}
    learner = build(rule, backbone, **({"lr": rates[rule]} if rule in rates else {}))
    learn(learner, (batch(backbone, 64, seed=index) for index in range(STEPS.get(rule, 60))))
    right = 0.0
    for seed in range(1000, 1000 + 208 // asked):
        x, y = batch(backbone, asked, seed=seed)
        right += (learner.scores(x).argmax(1) == y).float().mean().item()
    assert right / (208 // asked) > least


@every
def test_scores_have_one_column_per_class_and_no_gradient(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    x, _ = batch(backbone, 7)
    scores = learner.scores(x.with_x(x.x.requires_grad_()) if isinstance(x, Graph) else x.requires_grad_())
    assert scores.shape == (7, CLASSES)
    assert scores.isfinite().all()
    assert not scores.requires_grad


@every
def test_labels_are_out_of_reach_at_inference(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    x, y = batch(backbone)
    step(learner, x, y)
    before = learner.scores(x)
    y.fill_(-999)  # a learner that kept the labels would now fail or answer otherwise
    assert torch.equal(before, learner.scores(x))
    order = torch.arange(len(x) - 1, -1, -1)  # nor does a sample see its neighbours in the batch
    turned = x.asking(x.nodes[order]) if isinstance(x, Graph) else x[order]
    torch.testing.assert_close(before[order], learner.scores(turned))


@every
def test_scores_leave_mode_and_state_alone(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    x, y = batch(backbone)
    step(learner, x, y)
    before = snapshot(learner)
    modes = [module.training for module in learner.modules()]
    learner.scores(x)
    assert modes == [module.training for module in learner.modules()]
    learner.eval()
    learner.scores(x)
    assert not any(module.training for module in learner.modules())
    assert identical(before, snapshot(learner))


@every
def test_same_seed_same_weights(rule: str, backbone: str) -> None:
    first, second, other = build(rule, backbone), build(rule, backbone), build(rule, backbone, seed=1)
    for index in range(2):
        for learner in (first, second, other):
            step(learner, *batch(backbone, seed=index))
    assert identical(snapshot(first), snapshot(second))
    assert not identical(snapshot(first), snapshot(other))


@pytest.mark.parametrize(
    ("rule", "backbone"), [(r, b) for r in RULES if r not in (*RESIZED, *COPIED) for b in backbones(r)]
)
def test_every_rule_starts_from_the_same_network(rule: str, backbone: str) -> None:
    assert identical(snapshot(build(rule, backbone).network), snapshot(build("bp", backbone).network))


@every
def test_save_and_load_go_on_bit_for_bit(rule: str, backbone: str) -> None:
    straight = build(rule, backbone)
    for index in range(4):
        if index == 2:
            file = io.BytesIO()
            torch.save(straight.state_dict(), file)
        step(straight, *batch(backbone, seed=index))
    resumed = build(rule, backbone, seed=1)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for index in range(2, 4):
        step(resumed, *batch(backbone, seed=index))
    assert identical(snapshot(straight), snapshot(resumed))


@every
def test_copies_are_independent(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    step(learner, *batch(backbone))
    twin = copy.deepcopy(learner)
    before = snapshot(learner)
    step(twin, *batch(backbone, seed=1))
    assert identical(before, snapshot(learner))
    step(learner, *batch(backbone, seed=1))
    assert identical(snapshot(twin), snapshot(learner))


@every
def test_every_parameter_is_trained_once(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    driven = [id(p) for o in learner.optimizers() for group in o.param_groups for p in group["params"]]
    trained = [p for p in learner.parameters() if p.requires_grad]
    assert sorted(driven) == sorted(id(p) for p in trained)
    solved = [
        p for p in learner.parameters() if not p.requires_grad and all(p is not q for q in learner.network.parameters())
    ]
    before = [p.detach().clone() for p in (*trained, *solved)]
    for _ in range(2 if rule.startswith("man") else 1):  # its copies follow what a first step has changed
        step(learner, *batch(backbone))
    assert before
    assert not any(torch.equal(a, b) for a, b in zip(before, (*trained, *solved), strict=True))


@pytest.mark.parametrize("rule", [rule.alias for rule in ALGORITHMS])
def test_rules_that_cannot_autoencode_say_so(rule: str) -> None:
    if "autoencode" in entry(rule).learner.tasks:
        return
    backbone = backbones(rule)[0]
    shape = FEATURES if backbone in GRAPHS else SHAPE
    with pytest.raises(UsageError, match="cannot autoencode"):
        entry(rule).build(BACKBONES[backbone](), 0, shape)
    if not entry(rule).defaults:
        with pytest.raises(UsageError, match="classes must be at least 2, got 0"):
            entry(rule).learner(BACKBONES[backbone](), 0, input_shape=shape)


autoencoders = pytest.mark.parametrize("rule", ["bp", "ccl"])


def autoencoder(rule: str, **parameters: object) -> Learner:
    manual_seed(0)
    return entry(rule).build(build_network("autoencoder:6x12", SHAPE), 0, SHAPE, **parameters)


@autoencoders
def test_autoencoders_learn_to_reconstruct(rule: str) -> None:
    learner = autoencoder(rule, lr=0.03, optimizer="momentum")
    for seed in range(80):
        x, _ = images(32, seed)
        learner.step((x, x))
    x, _ = images(64, 1000)
    made = learner.scores(x)
    assert made.shape == x.shape
    assert (made - x).square().mean() < 0.7 * (x - x.mean(0)).square().mean()


@autoencoders
def test_autoencoders_go_on_bit_for_bit_and_read_nothing_from_the_device(rule: str) -> None:
    straight, resumed = autoencoder(rule), autoencoder(rule)
    x, _ = images(16, 0)
    straight.step((x, x))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for learner in (straight, resumed):
        with NoHostReads():
            learner.stages()[0].update((x, x))
        assert all(value.isfinite() for value in learner.step((x[:1], x[:1])).values())
    assert identical(snapshot(straight), snapshot(resumed))


@autoencoders
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x, y), "targets like its inputs"),
        (lambda x, y: (x, x[:, :1]), "targets like its inputs"),
        (lambda x, y: (x[:, :1], x[:, :1]), "expected"),
        (lambda x, y: (x[:0], x[:0]), "empty"),
    ],
)
def test_wrong_batches_of_autoencoders_get_a_clear_error(
    rule: str, spoil: Callable[..., tuple[Tensor, Tensor]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        autoencoder(rule).step(spoil(*images(4, 0)))


@pytest.mark.gpu
@autoencoders
def test_graphs_of_autoencoders_equal_eager_steps(rule: str) -> None:
    x, y = images(160, 0)
    results = []
    for graph in (False, True):
        learner = autoencoder(rule, lr=0.01, optimizer="momentum").cuda()
        part = Batches(x, y, device="cuda", reconstruct=True)
        config = TrainingConfig(batch_size=16, epochs=2, graph=graph, precision="fp32", lr_schedule="cosine")
        progress = Trainer(learner, part, part, config).run()
        assert all(stage["graph"] == graph for stage in progress.finished)
        results.append(learner.scores(x.to("cuda")))
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


@autoencoders
def test_a_network_that_returns_another_shape_is_no_autoencoder(rule: str) -> None:
    with pytest.raises(UsageError, match="returns what it is given"):
        entry(rule).build(cnn(SHAPE, (6, 8)), 0, SHAPE)


@pytest.mark.parametrize("rule", [rule.alias for rule in ALGORITHMS])
def test_a_setting_of_a_wrong_type_is_refused_in_one_line(rule: str) -> None:
    types = {"7": int, "0.25": float, "abc": str, "true": bool}
    for name, annotation in entry(rule).annotations().items():
        wanted = str(annotation)
        accepted = 0
        for text in (*types, "nan", "-inf", "[1]", "{}", "1979-05-27"):
            setting = f"{name}={text}"
            with contextlib.suppress(UsageError):
                value = parse_settings((setting,), rule)[name]
                accepted += 1
                # it is of a type that the constructor names, a whole number also where that is a float
                assert type(value) is types.get(text) or (text, value) == ("7", 7.0), setting
                assert type(value).__name__ in wanted or (type(value) is str and "Literal" in wanted), setting
                # and if its value is wrong the learner says so
                build(rule, backbones(rule)[0], **{name: value})
        assert accepted, name


@pytest.mark.parametrize("rule", [rule.alias for rule in ALGORITHMS])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_numbers_that_make_no_sense_are_refused_in_one_line(rule: str, value: str) -> None:
    for name in entry(rule).parameters():
        with contextlib.suppress(UsageError):
            build(rule, backbones(rule)[0], **parse_settings((f"{name}={value}",), rule))


@pytest.mark.parametrize("rule", ALIASES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")], ids=repr)
def test_numbers_that_are_not_finite_are_refused(rule: str, value: float) -> None:
    learner = entry(rule).learner
    numbers = [name for name, annotation in entry(rule).annotations().items() if "float" in str(annotation)]
    assert {"lr", "weight_decay"} <= set(numbers)
    for name in numbers:
        with pytest.raises(UsageError, match=f"{name} must be a finite number, got {value}"):
            learner(BACKBONES["mlp"](), CLASSES, input_shape=SHAPE, **{name: value})


@pytest.mark.parametrize("rule", ALIASES)
def test_options_of_another_type_are_refused_in_one_line(rule: str) -> None:
    """Whether the class is called or the registry builds it; no number is a text, a truth value or a list."""
    backbone = backbones(rule)[0]
    shape = FEATURES if backbone in GRAPHS else SHAPE
    wrong: dict[str, tuple[Any, ...]] = {
        "float": ("a", True, [0.1], b"1"),
        "int": ("a", 1.5, True),
        "bool": ("yes", 1, 0.0),
        "str": (3, 0.5, True, ["adam"], b"adam"),
    }
    for name, annotation in entry(rule).annotations().items():
        kinds = {kind for kind in wrong if re.search(rf"\b{kind}\b", str(annotation))}
        if len(kinds) != 1 or "Callable" in str(annotation) or "bpfree." in str(annotation):  # which have own tests
            continue
        for value in wrong[kinds.pop()]:
            for make in (entry(rule).learner, entry(rule).build):
                with pytest.raises(UsageError, match=rf"^{name} must be .*, got ") as caught:
                    make(BACKBONES[backbone](), CLASSES, input_shape=shape, **{name: value})
                assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers() -> None:
    for lr in (1, np.float32(0.1), np.float64(0.1), np.int64(1)):
        assert build("mf", "mlp", lr=lr).optimizers()[0].param_groups[0]["lr"] == lr


class AnyChoice:
    """A tuner's trial that draws."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        assert low < high
        return self._random.choice((low, high))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._random.choice(choices)


@pytest.mark.parametrize("rule", ALIASES)
@pytest.mark.parametrize("seed", range(5))
def test_search_space_holds_parameters_of_the_rule(rule: str, seed: int) -> None:
    found = entry(rule).learner.search_space(AnyChoice(seed), {})
    assert set(found) <= set(entry(rule).parameters())
    backbone = backbones(rule)[0]
    entry(rule).build(BACKBONES[backbone](), CLASSES, FEATURES if backbone in GRAPHS else SHAPE, **found)


@every
def test_supported_networks_are_said_to_be(rule: str, backbone: str) -> None:
    assert entry(rule).learner.supports(BACKBONES[backbone]()).ok


@every
def test_step_reports_scalars_without_gradient(rule: str, backbone: str) -> None:
    metrics = step(build(rule, backbone), *batch(backbone))
    assert metrics
    for value in metrics.values():
        assert value.shape == ()
        assert value.isfinite()
        assert not value.requires_grad


@every
@pytest.mark.parametrize("size", [1, 3])
def test_small_batches(rule: str, backbone: str, size: int) -> None:
    assert all(value.isfinite() for value in step(build(rule, backbone), *batch(backbone, size)).values())


@every
def test_layout_of_the_input_does_not_matter(rule: str, backbone: str) -> None:
    x, y = batch(backbone)
    values = x.x if isinstance(x, Graph) else x
    strided = torch.stack([values, values], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    if isinstance(x, Graph):
        strided = x.with_x(strided)
    plain, other = build(rule, backbone), build(rule, backbone)
    a, b = step(plain, x, y), step(other, strided, y)
    for name, value in a.items():
        torch.testing.assert_close(value, b[name])


@every
def test_float64(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    x, y = batch(backbone)
    step(learner, x, y)
    learner.double()  # with what its optimisers keep
    assert all(value.dtype == torch.float64 for value in step(learner, x.to(torch.float64), y).values())
    assert learner.scores(x.to(torch.float64)).dtype == torch.float64


@every
def test_bfloat16_autocast(rule: str, backbone: str) -> None:
    plain, reduced = build(rule, backbone), build(rule, backbone)
    x, y = batch(backbone, 64)
    expected = step(plain, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        got = step(reduced, x, y)
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value.item(), rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in reduced.parameters())


@pytest.mark.parametrize(("rule", "backbone"), [(r, b) for r in RULES for b in backbones(r) if b not in GRAPHS])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x[:, :1], y), "expected"),
        (lambda x, y: (x[0], y), "expected"),
        (lambda x, y: (x, y[:-1]), "class indices"),
        (lambda x, y: (x, y.float()), "class indices"),
        (lambda x, y: (x, y[:, None]), "class indices"),
        (lambda x, y: ((255 * x).to(torch.uint8), y), "floating point"),
        (lambda x, y: (x.to_sparse(), y), "dense"),
        (lambda x, y: (x, y + CLASSES), r"\[0, 4\)"),
        (lambda x, y: (x[:0], y[:0]), "empty"),
    ],
)
def test_wrong_batches_get_a_clear_error(
    rule: str, backbone: str, spoil: Callable[..., tuple[Tensor, Tensor]], message: str
) -> None:
    learner = build(rule, backbone)
    before = snapshot(learner)
    stage = learner.stages()[0]
    x, y = spoil(*batch(backbone))
    with pytest.raises(UsageError, match=message):
        stage.step((stage.prepared(x), y))
    assert identical(before, snapshot(learner))


@pytest.mark.parametrize(("rule", "backbone"), [(r, b) for r in RULES for b in backbones(r) if b in GRAPHS])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x.with_x(x.x[:, :1]), y), "expected"),
        (lambda x, y: (x, y[:-1]), "class indices"),
        (lambda x, y: (x, y.float()), "class indices"),
        (lambda x, y: (x, y + CLASSES), r"\[0, 4\)"),
        (lambda x, y: (x.asking(x.nodes[:0]), y[:0]), "empty"),
    ],
)
def test_wrong_graphs_get_a_clear_error(
    rule: str, backbone: str, spoil: Callable[..., tuple[Graph, Tensor]], message: str
) -> None:
    learner = build(rule, backbone)
    before = snapshot(learner.network)
    stage = learner.stages()[0]
    x, y = spoil(*batch(backbone))
    with pytest.raises(UsageError, match=message):
        stage.step((stage.prepared(x), y))
    assert identical(before, snapshot(learner.network))


PLAIN = [rule for rule in RULES if "mlp" in backbones(rule)]


@pytest.mark.parametrize("rule", PLAIN)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: x[:2], r"pair \(inputs, targets\), got Tensor"),
        (lambda x, y: (x, y, y), "pair"),
        (lambda x, y: (x.numpy(), y), "inputs are a tensor or a Graph, got ndarray"),
        (lambda x, y: (x, y.tolist()), "targets are a tensor, got list"),
    ],
)
def test_what_is_no_batch_gets_a_clear_error(rule: str, wrong: Callable[..., Any], message: str) -> None:
    stage = build(rule, "mlp").stages()[0]
    x, y = batch("mlp")
    with pytest.raises(UsageError, match=message):
        stage.step(wrong(stage.prepared(x), y))


@pytest.mark.parametrize("rule", PLAIN)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[:, :1], r"\(16, 1, 8, 8\), expected \(batch, 2, 8, 8\)"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: x.double(), "inputs are float64 on cpu, this .* is float32 on cpu"),
    ],
)
def test_scores_of_wrong_inputs_get_a_clear_error(rule: str, wrong: Callable[..., Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(rule, "mlp").scores(wrong(batch("mlp")[0]))


@pytest.mark.parametrize(("rule", "backbone"), [(r, b) for r in RULES for b in backbones(r) if b in ("mlp", "gcn")])
def test_a_graph_for_a_network_of_tensors_or_the_other_way_round_gets_a_clear_error(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    x, y = batch("gcn" if backbone == "mlp" else "mlp")
    message = "takes tensors, got a Graph" if backbone == "mlp" else "takes a Graph, got a tensor"
    with pytest.raises(UsageError, match=message):
        learner.scores(x)
    with pytest.raises(UsageError, match=message if len(learner.stages()) == 1 else "loop over learner.stages"):
        learner.step((x, y))


@pytest.mark.parametrize("rule", PLAIN)
def test_parts_that_disagree_are_named(rule: str) -> None:
    learner = build(rule, "mlp")
    linear = next(module for module in learner.network.modules() if isinstance(module, nn.Linear))
    linear.to(torch.float64)  # in part, as when a learner is built from a converted network
    with pytest.raises(UsageError, match="float32 on cpu and others float64 on cpu"):
        learner.scores(batch("mlp")[0])


@pytest.mark.parametrize("rule", PLAIN)
def test_a_step_in_inference_mode_gets_a_clear_error(rule: str) -> None:
    learner = build(rule, "mlp")
    with torch.inference_mode():
        learner.scores(batch("mlp")[0])
        with pytest.raises(UsageError, match=r"torch\.inference_mode\(\) does not allow; leave it"):
            step(learner, *batch("mlp"))


@pytest.mark.parametrize(
    ("error", "mixed"), [(RuntimeError("my own"), False), (torch.OutOfMemoryError("my own"), True)]
)
def test_errors_that_no_disagreement_explains_stay_what_they_are(error: RuntimeError, mixed: bool) -> None:
    learner = build("bp", "mlp")

    def fail(*_: Any) -> None:
        raise error

    learner.network[0].register_forward_pre_hook(fail)
    if mixed:
        learner.network[1].double()
    with pytest.raises(type(error), match="my own"):
        learner.scores(batch("mlp")[0])


@pytest.mark.parametrize("rule", ALIASES)
@pytest.mark.parametrize("classes", [4.0, "4", None, -1, True])
def test_what_is_no_number_of_classes_gets_a_clear_error(rule: str, classes: Any) -> None:
    backbone = backbones(rule)[0]
    shape = FEATURES if backbone in GRAPHS else SHAPE
    with pytest.raises(UsageError, match="classes is how many there are"):
        entry(rule).build(BACKBONES[backbone](), classes, shape)


@pytest.mark.parametrize("rule", RULES)
def test_two_classes_are_learned_and_one_is_refused(rule: str) -> None:
    backbone = backbones(rule)[0]
    shape = FEATURES if backbone in GRAPHS else SHAPE
    with pytest.raises(UsageError, match="at least 2 classes, got 1"):
        entry(rule).build(BACKBONES[backbone](), 1, shape, **options_of(rule))
    manual_seed(0)
    learner = entry(rule).build(BACKBONES[backbone](), 2, shape, **options_of(rule))
    x, y = batch(backbone)
    if isinstance(x, Graph):
        x = replace(x, labels=x.labels % 2)
    metrics = step(learner, x, y % 2)
    scores = learner.scores(x)
    assert scores.shape == (len(y), 2)
    assert all(value.isfinite().all() for value in (scores, *metrics.values()))


@pytest.mark.parametrize("rule", ALIASES)
@pytest.mark.parametrize("shape", [128, (2, 8.0, 8), (0,), "2x8x8"])
def test_what_is_no_shape_gets_a_clear_error(rule: str, shape: Any) -> None:
    with pytest.raises(UsageError, match="input_shape is that of one sample"):
        entry(rule).learner(BACKBONES[backbones(rule)[0]](), CLASSES, input_shape=shape)


@pytest.mark.parametrize("rule", ALIASES)
@pytest.mark.parametrize("network", [nn.Linear(4, 4), 7])
def test_what_is_no_network_gets_a_clear_error(rule: str, network: Any) -> None:
    with pytest.raises(UsageError, match="or a list of modules in forward order"):
        entry(rule).learner(network, CLASSES, input_shape=(4,))


@pytest.mark.parametrize("rule", ["mf", "bp", "ff"])
def test_a_network_without_sizes_gets_a_clear_error(rule: str) -> None:
    for lazy in (nn.LazyLinear(4), nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d(affine=False))):
        with pytest.raises(UsageError, match=r"Lazy.* is not known yet; run a batch through the network first"):
            entry(rule).learner(nn.Sequential(lazy, nn.ReLU()), CLASSES, input_shape=(4,))


@pytest.mark.parametrize(
    ("rule", "backbone"), [(r, b) for r in RULES if r not in COPIED for b in backbones(r) if b in ("mlp", "gcn")]
)
def test_a_frozen_block_stays_and_the_others_learn(rule: str, backbone: str) -> None:
    network = BACKBONES[backbone]()
    network[0].requires_grad_(False)
    shape = FEATURES if backbone in GRAPHS else SHAPE
    options = options_of(rule)
    if backbone in GRAPHS and rule in RESIZED:
        with pytest.raises(UsageError, match="block 0 more inputs and so new weights, which cannot stay frozen"):
            entry(rule).build(network, CLASSES, shape, **options)
        return
    learner = entry(rule).build(network, CLASSES, shape, **options)
    before = snapshot(learner)
    frozen = snapshot(learner.network[0])
    step(learner, *batch(backbone))
    assert identical(frozen, snapshot(learner.network[0]))
    assert not identical(before, snapshot(learner))


def test_a_state_of_another_network_is_refused() -> None:
    manual_seed(0)
    other = entry("bp").build(mlp(SHAPE, (24,) * 2), CLASSES, SHAPE)
    with pytest.raises(UsageError, match="the state is that of another network"):
        build("bp", "mlp").load_state_dict(other.state_dict())


@pytest.mark.parametrize(("saved", "loaded"), [("adam", "sgd"), ("momentum", "adam"), ("adam", "adamw")])
def test_a_state_of_another_optimizer_is_refused(saved: str, loaded: str) -> None:
    other = build("mf", "mlp", optimizer=saved)
    step(other, *batch("mlp"))
    with pytest.raises(UsageError, match="build it with the same"):
        build("mf", "mlp", optimizer=loaded).load_state_dict(other.state_dict())


def test_a_state_that_does_not_name_its_optimizers_is_taken() -> None:
    straight = build("mf", "mlp")
    step(straight, *batch("mlp"))
    state = copy.deepcopy(straight.state_dict())
    for saved in state["_extra_state"]:
        del saved["kind"]
    resumed = build("mf", "mlp", seed=1)
    resumed.load_state_dict(state)
    for learner in (straight, resumed):
        step(learner, *batch("mlp", seed=1))
    assert identical(snapshot(straight), snapshot(resumed))


class NoHostReads(TorchDispatchMode):
    """Fails when a step asks for a value on the host, which would stall a GPU, or makes a shape depend on one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
            torch.ops.aten.equal.default,
        ), f"{function} reads from the device"
        return function(*args, **(kwargs or {}))


@every
def test_no_step_reads_from_the_device(rule: str, backbone: str) -> None:
    learner = build(rule, backbone)
    x, y = batch(backbone)
    step(learner, x, y)
    for stage in learner.stages():
        inputs = stage.prepared(x)
        with NoHostReads():
            stage.update((inputs, y))


@every
def test_updates_depend_on_later_blocks_only_as_declared(rule: str, backbone: str) -> None:
    """Isolation: noise on everything in block j > i, and block i's update is bit-identical, but for channels."""
    batches = [batch(backbone, seed=seed) for seed in range(24 if rule in DRAWN else 8)]
    found = audit(build(rule, backbone), batches)
    last = len(found.trained) - 1
    assert not found.faults
    assert (found.reach, found.late_reach) == tuple(min(last, blocks) for blocks in HEARD.get(rule, (0, 0)))
    assert found.entered == (tuple(range(1, last + 1)) if rule in BACKPROPAGATING else ())


@pytest.mark.gpu
@every
def test_cuda_agrees_with_cpu(rule: str, backbone: str) -> None:
    """In float64: a ReLU unit or a maximum near a tie may fall either way in float32, and Adam enlarges it.

    It also enlarges the rounding of gradients that are zero but for rounding, by up to lr / eps.
    """
    cpu, cuda = build(rule, backbone).double(), build(rule, backbone).double().cuda()
    for index in range(3):
        x, y = batch(backbone, seed=index)
        a, b = step(cpu, x.to(torch.float64), y), step(cuda, x.to(torch.float64).to("cuda"), y.cuda())
        for name, value in a.items():
            torch.testing.assert_close(value, b[name].cpu(), rtol=1e-5, atol=1e-8)


@pytest.mark.gpu
@every
def test_no_step_waits_for_the_gpu(rule: str, backbone: str) -> None:
    learner = build(rule, backbone).cuda()
    x, y = (part.to("cuda") for part in batch(backbone))
    step(learner, x, y)
    prepared = [(stage, stage.prepared(x)) for stage in learner.stages()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for stage, inputs in prepared:
            stage.step((inputs, y))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# PyTorch Geometric's attention adds up with atomic operations, in no fixed order
repeatable = pytest.mark.parametrize(("rule", "backbone"), [(r, b) for r in RULES for b in backbones(r) if b != "gat"])


@pytest.mark.gpu
@repeatable
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_two_runs_on_a_gpu_end_in_the_same_bits(rule: str, backbone: str, graph: bool) -> None:
    x, y = batch(backbone, 160)
    results = []
    for _ in range(2):
        learner = build(rule, backbone).cuda()
        part = data(x, y, "cuda")
        Trainer(learner, part, part, TrainingConfig(batch_size=16, epochs=2, graph=graph)).run()
        results.append(snapshot(learner))
    assert identical(*results)


@pytest.mark.gpu
@every
def test_graph_replay_equals_eager_steps(rule: str, backbone: str) -> None:
    x, y = batch(backbone, 160)
    results = []
    for graph in (False, True):
        learner = build(rule, backbone).cuda()
        part = data(x, y, "cuda")
        config = TrainingConfig(batch_size=16, epochs=3, graph=graph, precision="fp32", lr_schedule="cosine")
        progress = Trainer(learner, part, part, config).run()
        assert all(stage.get("graph", graph) == graph for stage in progress.finished)  # one pass is not a graph
        results.append(learner.scores(x.to("cuda")))
    # a graph may pick other kernels, and 30 steps enlarge what they round differently; noise that a replay repeats or
    # inputs that it does not see change scores by more
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
