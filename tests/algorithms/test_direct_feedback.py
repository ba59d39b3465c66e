"""Direct feedback alignment against its reference."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bpfree.algorithms import Backprop, DirectFeedback
from bpfree.networks import Graph, cnn, gnn
from tests.reference import direct_feedback as reference


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)  # the change is the gradient


def test_step_is_the_reference() -> None:
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU())
    learner = DirectFeedback(blocks, 3, optimizer=sgd).double()
    x, y = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    before = {name: value.detach().numpy().copy() for name, value in learner.named_parameters()}
    layers = [f"network.{i}.0." for i in range(2)]
    loss, expected, readout = reference.gradients(
        x.numpy(),
        y.numpy(),
        [before[f"{layer}weight"] for layer in layers],
        [before[f"{layer}bias"] for layer in layers],
        [value.numpy() for name, value in learner.named_buffers() if name.startswith("feedback")],
        before["readout.linear.weight"],
        before["readout.linear.bias"],
    )
    assert learner.step((x, y))["loss"].item() == pytest.approx(loss, rel=1e-12)
    after = dict(learner.named_parameters())
    for layer, gradients in zip([*layers, "readout.linear."], [*expected, readout], strict=True):
        for name, gradient in zip(("weight", "bias"), gradients, strict=True):
            change = before[layer + name] - after[layer + name].detach().numpy()
            np.testing.assert_allclose(change, gradient, rtol=1e-9, atol=1e-13)


def test_feedback_is_not_trained_and_is_part_of_a_checkpoint() -> None:
    learner = DirectFeedback(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), 3)
    before = learner.feedback_0.clone()
    learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])))
    assert torch.equal(before, learner.feedback_0)
    assert "feedback_0" in learner.state_dict()


def test_error_reaches_neighbours_through_the_blocks_own_convolution() -> None:
    """With one node asked about, a one-layer network learns from its neighbours' features only."""
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    x = torch.eye(4)
    graph = Graph.of(x, torch.tensor([[1, 0], [0, 1]]), torch.tensor([0]))
    learner = DirectFeedback(gnn("gcn", (4,), (8,)), 2, optimizer=sgd)
    weight = learner.blocks()[0].conv.lin.weight
    before = weight.detach().clone()
    learner.step((graph, torch.tensor([1])))
    changed = (weight != before).any(0)
    assert changed.tolist() == [True, True, False, False]


def test_one_block_with_the_readouts_weight_as_feedback_equals_back_propagation() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
    aligned = DirectFeedback(copy.deepcopy(network), 3, optimizer=sgd).double()
    globally = Backprop(network, 3, optimizer=sgd).double()
    globally.readout.load_state_dict(aligned.readout.state_dict())
    aligned.feedback_0.copy_(aligned.readout.weight.detach())
    batch = torch.randn(9, 5, dtype=torch.float64), torch.randint(3, (9,))
    assert aligned.step(batch)["loss"].item() == globally.step(batch)["loss"].item()
    for a, b in zip(aligned.parameters(), globally.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_a_convolution_block_descends_its_own_product_with_the_feedback() -> None:
    """Against finite differences of <e B, f(a)>, block by block, with batch statistics in it."""
    torch.manual_seed(0)
    learner = DirectFeedback(
        cnn((1, 8, 8), (3, 2), pool="max", batch_norm=True), 3, optimizer=sgd, input_shape=(1, 8, 8)
    )
    learner.double()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.randint(3, (6,))
    before = copy.deepcopy(learner)
    learner.step((x, y))
    with torch.no_grad():
        signal = x
        for block in before.blocks():
            signal = block(signal)
        error = before.readout(signal).softmax(1)
        error[torch.arange(6), y] -= 1
        signal = x
        for index, (block, trained) in enumerate(zip(before.blocks(), learner.blocks(), strict=True)):
            towards = torch.einsum("bc,cijk->bijk", error / 6, getattr(before, f"feedback_{index}"))
            for parameter, after in zip(block.parameters(), trained.parameters(), strict=True):
                flat, change = parameter.view(-1), (parameter - after).view(-1)
                for position in range(0, len(flat), 5):
                    kept = flat[position].item()
                    values = []
                    for moved in (kept + 1e-6, kept - 1e-6):
                        flat[position] = moved
                        values.append((towards * block(signal)).sum().item())
                    flat[position] = kept
                    assert change[position].item() == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-7)
            signal = block(signal)
