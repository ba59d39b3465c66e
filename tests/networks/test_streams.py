"""Streams of random numbers, and dropout from them."""

from __future__ import annotations

import pytest
import torch

from bpfree.networks.streams import (
    Stream,
    StreamDropout,
    derive,
    hashes,
    normal,
    normal_numbers,
    uniform,
    uniform_numbers,
)

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
    assert not torch.equal(stream.normal((4,), F64), stream.normal((4,), F64))


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
        bits = [hashes(stream.key, stream.draw(), count) for stream in (here, there)]
        assert torch.equal(bits[0], bits[1].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 1000, 4097])
@pytest.mark.parametrize("key", [derive(7), [derive(7, sample) for sample in range(5)]])
def test_numbers_of_a_gpus_kernels_are_those_of_the_formulas(
    key: int | list[int], width: int, dtype: torch.dtype
) -> None:
    keys, count = torch.tensor(key).cuda(), torch.tensor(3).cuda()
    bits = hashes(keys, count, width)
    uniforms, normals = uniform_numbers(keys, count, width, dtype), normal_numbers(keys, count, width, dtype)
    assert uniforms.dtype == normals.dtype == dtype
    assert torch.equal(uniforms, uniform(bits).to(dtype))
    torch.testing.assert_close(normals, normal(bits).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("share", [(0, 1), (0, 4), (1, 4), (3, 4)])
def test_a_gpu_counts_draws_alike(share: tuple[int, int]) -> None:
    streams = Stream(7), Stream(7).cuda()
    for stream in streams:
        stream.share = share
    here, there = ([int(stream.draw()) for _ in range(3)] for stream in streams)
    assert here == there == [index * share[1] + share[0] for index in range(3)]
    assert [int(stream.count) for stream in streams] == [3, 3]


@pytest.mark.gpu
def test_every_replay_of_a_graph_draws_anew() -> None:
    eager, captured = Stream(7), Stream(7).cuda()
    for stream in (eager, captured):  # what compiles kernels cannot be captured
        stream.normal((3, 5), F64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        numbers = captured.normal((3, 5), F64)
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(numbers.cpu(), eager.normal((3, 5), F64), rtol=1e-12, atol=1e-12)


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
