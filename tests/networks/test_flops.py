"""Floating-point operations: their number, and what counting them leaves in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import convert_conv2d_weight_memory_format

from bpfree import build_network
from bpfree.algorithms import Backprop
from bpfree.data.batches import Batches
from bpfree.experiments.stepper import Stepper
from bpfree.networks.flops import FlopCounter


def test_a_step_of_an_mlp_counts_its_matrix_products() -> None:
    learner = Backprop(build_network("mlp:2x7", (5,)), 3)
    with FlopCounter() as counter:
        learner.step((torch.randn(11, 5), torch.randint(3, (11,))))
    forward = 2 * 11 * (5 * 7 + 7 * 7 + 7 * 3)
    inputs = 2 * 11 * (7 * 7 + 7 * 3)  # gradients of what goes into a layer; the data needs none
    assert counter.get_total_flops() == 2 * forward + inputs


def most_alive(counting: AbstractContextManager[Any]) -> int:
    """The largest number of convolutions' outputs that are in memory at once during a recomputed step."""
    torch.manual_seed(0)
    learner = Backprop(build_network("resnet:20", (3, 8, 8)), 3, head_pool="gap", recompute=True, input_shape=(3, 8, 8))
    outputs: list[StorageWeakRef] = []
    most = 0

    def seen(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal most
        outputs.append(StorageWeakRef(output.untyped_storage()))
        most = max(most, sum(not kept.expired() for kept in outputs))

    for module in learner.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(seen)
    with counting:
        learner.step((torch.randn(2, 3, 8, 8), torch.tensor([0, 1])))
    return most


def test_counting_keeps_nothing_alive() -> None:
    plain = most_alive(nullcontext())
    assert plain < 5  # of 21 convolutions: a block has two
    assert most_alive(FlopCounter()) == plain


@pytest.mark.gpu
def test_recomputing_halves_the_peak_of_captured_steps() -> None:
    device, layout = torch.device("cuda"), torch.channels_last
    images = Batches(torch.randn(1024, 3, 32, 32), torch.randint(10, (1024,)), device=device, layout=layout)

    def peak(recompute: bool) -> int:
        network = build_network("resnet:32", (3, 32, 32))
        learner = Backprop(network, 10, head_pool="gap", recompute=recompute, input_shape=(3, 32, 32)).to(device)
        convert_conv2d_weight_memory_format(learner, layout)
        stepper = Stepper(
            learner,
            learner.stages()[0],
            images,
            live_prefix=None,
            batch_size=1024,
            precision="bf16",
            scheduled=False,
            graph=True,
        )
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        stepper.rehearse(images.draw(0))
        assert stepper.use_graph
        stepper.run(stepper.capacity, lambda: False)
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated(device) - before
        stepper.close()
        return most

    assert peak(recompute=True) < 0.6 * peak(recompute=False)
