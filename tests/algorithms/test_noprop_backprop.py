"""Back-propagation through NoProp's chain against its NumPy reference."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bpfree.algorithms import NoPropBackprop
from bpfree.algorithms._noprop_parts import EmbeddingKind
from bpfree.data.batches import Batches
from bpfree.errors import UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.networks.streams import StreamDropout
from tests.algorithms.test_noprop import CLASSES, F64, INPUTS, LR, LinearDenoiser, batch, equal, sgd, weights
from tests.reference import noprop_backprop as reference


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_one_step_of_linear_blocks(steps: int) -> None:
    blocks = [LinearDenoiser(CLASSES) for _ in range(steps)]
    model = NoPropBackprop(blocks, CLASSES, input_shape=(INPUTS,), steps=steps, optimizer=sgd, noise_seed=0).double()
    x, y = batch()
    z_0 = copy.deepcopy(model.noise.streams[0]).normal((len(x), CLASSES), F64).numpy()
    linears = [(block.a.weight, block.b.weight, block.a.bias) for block in model.network]
    w, linear_map = model.gates, model.readout.linear
    moved = [*[p for three in linears for p in three], w, linear_map.weight, linear_map.bias]
    before = [parameter.detach().clone().numpy() for parameter in moved]
    triples = [tuple(before[3 * t : 3 * t + 3]) for t in range(steps)]
    loss, d_blocks, *others = reference.chain(x.numpy(), y.numpy(), z_0, triples, *before[3 * steps :])
    assert model.step((x, y))["loss"].item() == pytest.approx(loss, rel=1e-9)
    gradients = [*[d for three in d_blocks for d in three], *others]
    for parameter, start, gradient in zip(moved, before, gradients, strict=True):
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(parameter.detach().numpy(), start - LR * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["steps", "lanes"])
def test_a_chain_needs_a_block_and_a_lane(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must be at least 1"):
        NoPropBackprop([LinearDenoiser(CLASSES)], CLASSES, input_shape=(INPUTS,), **{name: 0})


@pytest.mark.gpu
@pytest.mark.parametrize("embeddings", ["onehot", "prototype"])
def test_lanes_change_no_bit(embeddings: EmbeddingKind) -> None:
    inputs, targets = torch.rand(160, INPUTS), torch.arange(160) % CLASSES
    ends = []
    for lanes, graph in ((1, False), (1, True), (2, True), (4, True)):
        torch.manual_seed(0)
        branch = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), StreamDropout(0.2))
        model = NoPropBackprop([branch], CLASSES, input_shape=(INPUTS,), steps=4, embeddings=embeddings, lanes=lanes)
        part = Batches(inputs, targets, device=torch.device("cuda"))
        Trainer(model.cuda(), part, part, TrainingConfig(batch_size=16, epochs=3, patience=3, graph=graph)).run()
        ends.append(weights(model))
    assert all(equal(ends[0], end) for end in ends[1:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dim": 20}, "embedding_dim would have no effect with embeddings=onehot; leave out embedding_dim"),
        ({"radial_sigma": 0.5}, "radial_sigma would have no effect with p_out=linear; leave out radial_sigma"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        NoPropBackprop([LinearDenoiser(CLASSES)], CLASSES, input_shape=(INPUTS,), steps=1, **options)
