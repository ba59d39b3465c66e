"""Back-propagation and its two controls against the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bpfree.algorithms import Backprop, algorithm
from bpfree.errors import UsageError
from bpfree.networks import build_network
from tests.reference import backprop as reference

LR = 0.1


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def blocks() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU()).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))


def as_numpy(learner: Backprop) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy().copy() for name, p in learner.named_parameters()}


@pytest.mark.parametrize(
    ("name", "weight", "heads"),
    [("bp", 0.0, 0), ("bp-ds", 0.7, 3), ("mf-joint", 1.3, 2)],
    ids=["bp", "bp-ds", "mf-joint"],
)
def test_one_step_equals_the_numpy_reference(name: str, weight: float, heads: int) -> None:
    parameters = {"auxiliary_weight": weight} if heads else {}
    learner = algorithm(name).build(blocks(), 3, (5,), optimizer=sgd, **parameters).double()
    x, y = batch()
    before = as_numpy(learner)
    metrics = learner.step((x, y))
    after = as_numpy(learner)

    weights = [before[f"network.{i}.0.weight"] for i in range(3)]
    biases = [before[f"network.{i}.0.bias"] for i in range(3)]
    projections = [before[f"heads.{i}.linear.weight"] for i in range(heads)]
    readout_bias = before.get("readout.linear.bias", np.zeros(3))
    loss, head_losses, dWs, dbs, dW_out, db_out, dMs = reference.gradients(
        x.numpy(), y.numpy(), weights, biases, before["readout.linear.weight"], readout_bias, projections, weight
    )
    assert metrics["loss"].item() == pytest.approx(loss, rel=1e-9)
    for i, head_loss in enumerate(head_losses):
        assert metrics[f"block {i} loss"].item() == pytest.approx(head_loss, rel=1e-9)
    expected = {"readout.linear.weight": dW_out}
    if "readout.linear.bias" in before:
        expected["readout.linear.bias"] = db_out
    for i in range(3):
        expected[f"network.{i}.0.weight"], expected[f"network.{i}.0.bias"] = dWs[i], dbs[i]
    for i in range(heads):
        expected[f"heads.{i}.linear.weight"] = dMs[i]
    assert set(expected) == set(after)
    for key, gradient in expected.items():
        np.testing.assert_allclose(after[key], before[key] - LR * gradient, rtol=0, atol=1e-9)


def test_the_ladder_has_the_heads_it_is_defined_by() -> None:
    built = {name: algorithm(name).build(blocks(), 3, (5,)) for name in ("bp", "bp-ds", "mf-joint")}
    assert [len(learner.heads) for learner in built.values()] == [0, 3, 2]
    assert [learner.readout.linear.bias is not None for learner in built.values()] == [True, True, False]


def test_errors_travel_through_the_whole_network() -> None:
    learner = Backprop(blocks(), 3).double()
    x, y = batch()
    learner.step((x, y))
    gradient_before = [p.grad.clone() for p in learner.network[0].parameters()]
    with torch.no_grad():
        learner.readout.linear.weight.mul_(2)
    learner.step((x, y))
    assert not all(
        torch.equal(a, p.grad) for a, p in zip(gradient_before, learner.network[0].parameters(), strict=True)
    )


def test_bad_values_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean linear"):
        Backprop(blocks(), 3, readout="linaer")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="auxiliary_weight"):
        Backprop(blocks(), 3, auxiliary_weight=float("nan"))


def test_nothing_is_pooled_of_vectors() -> None:
    with pytest.raises(UsageError, match="head_pool would have no effect where there are no feature maps"):
        Backprop(blocks(), 3, head_pool="gap")
    hidden = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Sequential(nn.Flatten(), nn.Linear(36, 5)))
    model = Backprop(hidden, 3, head_pool="gap", auxiliary_weight=0.5, input_shape=(1, 5, 5))
    assert [head.weight.shape[1] for head in (*model.heads, model.readout)] == [4, 5, 5]


def test_gradients_are_centralised_then_clipped() -> None:
    batch_of_both = batch()
    torch.manual_seed(0)
    plain = Backprop(blocks(), 3, lr=1e-12).double()
    torch.manual_seed(0)
    conditioned = Backprop(blocks(), 3, lr=1e-12, centralize=True, clip=0.1).double()
    for learner in (plain, conditioned):
        learner.step(batch_of_both)
    wanted = [p.grad - p.grad.mean(1, keepdim=True) if p.ndim > 1 else p.grad for p in plain.parameters()]
    length = torch.cat([gradient.flatten() for gradient in wanted]).norm()
    assert length > 0.1
    for gradient, parameter in zip(wanted, conditioned.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 0.1 / length * gradient, rtol=1e-4, atol=1e-8)


def test_recomputing_keeps_less_and_ends_in_the_same_bits() -> None:
    def build(recompute: bool) -> Backprop:
        torch.manual_seed(5)
        network = build_network("resnet:20", (3, 8, 8))
        return Backprop(network, 3, head_pool="gap", recompute=recompute, input_shape=(3, 8, 8))

    models, kept = [build(False), build(True)], []
    for model in models:
        packed: list[int] = []

        def pack(tensor: torch.Tensor, packed: list[int] = packed) -> torch.Tensor:
            packed.append(tensor.nbytes)
            return tensor

        torch.manual_seed(6)
        for _ in range(3):
            batch = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model.step(batch)
        kept.append(sum(packed))
    assert kept[1] < kept[0] / 10  # nothing from inside a block
    for weights in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(*weights)
    for statistics in zip(*(model.buffers() for model in models), strict=True):
        assert torch.equal(*statistics)
    assert models[1].variant == "recompute"


def test_recomputing_refuses_dropout() -> None:
    with pytest.raises(UsageError, match="dropout"):
        Backprop(build_network("deeper:4x8", (3, 8, 8)), 3, recompute=True, input_shape=(3, 8, 8))
