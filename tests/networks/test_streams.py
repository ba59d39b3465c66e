"""Streams of random numbers, and dropout from them."""

from __future__ import annotations

import pytest
import torch

from bpfree.networks.streams import Stream, StreamDropout

F64 = torch.float64


def test_streams_are_normal_and_uniform() -> None:
    stream = Stream(7)
    for values, moments in (
        (stream.normal((200_000,), F64), (0, 1, 0, 3)),
        (stream.uniform((200_000,), F64), (1 / 2, 1 / 3, 1 / 4, 1 / 5)),
    ):
        for power, moment in enumerate(moments, 1):
            spread = values.pow(power).std() / 200_000**0.5
            assert abs(values.pow(power).mean() - moment) < 4.5 * spread
    assert not torch.equal(stream.bits(4), stream.bits(4))


def test_dropout_keeps_the_mean_and_draws_anew() -> None:
    dropout = StreamDropout(0.2)
    x = torch.ones(300, 7, 9, 11)
    first, second = dropout(x), dropout(x)
    kept = (first != 0).double().mean().item()
    assert kept == pytest.approx(0.8, abs=4 * (0.16 / x.numel()) ** 0.5 + 2**-16)
    assert first.max().item() == pytest.approx(1.25)
    assert not torch.equal(first, second)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.gpu
def test_hashes_are_the_same_on_a_gpu() -> None:
    here, there = Stream(7), Stream(7).cuda()
    for count in (1, 5, 5000):
        assert torch.equal(here.bits(count), there.bits(count).cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_and_its_derivative_are_the_same_on_a_gpu(dtype: torch.dtype, layout: torch.memory_format) -> None:
    cpu, cuda = StreamDropout(0.3), StreamDropout(0.3).cuda()
    cuda.load_state_dict(cpu.state_dict())
    x = torch.rand(5, 3, 7, 7).to(dtype).to(memory_format=layout)
    by_mean = torch.rand(5, 3, 1, 1).to(dtype)  # spread over positions without being written out
    for _ in range(2):
        ends = []
        for dropout, values, derivative in ((cpu, x.clone(), by_mean), (cuda, x.cuda(), by_mean.cuda())):
            out = dropout(values.requires_grad_())
            out.backward(derivative.expand(out.shape))
            assert out.stride() == x.stride()
            assert values.grad is not None
            ends.append((out.detach().cpu(), values.grad.cpu()))
        for mine, theirs in zip(*ends, strict=True):
            assert torch.equal(mine == 0, theirs == 0)
            torch.testing.assert_close(mine, theirs)
    assert int(cpu.stream.count) == int(cuda.stream.count) == 2
