"""Who waits for whom when devices train together: queues and pipelines, in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from bpfree.experiments.links import Link

BUCKET_BYTES: Final = 25 * 2**20
"""Gradients that DDP collects before it reduces them: its default `bucket_cap_mb`."""


def reduced(begin: float, work: Iterable[float], reductions: Iterable[float], overlap: bool) -> float:
    """When the last all-reduce is done, if the first gradients are worked on from `begin` on.

    Reductions run one after another on the network, each as soon as its gradients are there; without overlap, work
    waits for them.
    """
    now = network = begin
    for seconds, reduction in zip(work, reductions, strict=True):
        now += seconds
        network = max(network, now) + reduction
        if not overlap:
            now = network
    return max(now, network)


def bucketed(sizes: Sequence[int], link: Link, replicas: int) -> list[float]:
    """Seconds of the all-reduce that begins behind each block: none until a bucket is full or all is done."""
    reductions, collected = [], 0
    for index, size in enumerate(sizes):
        collected += size
        full = collected >= BUCKET_BYTES or index + 1 == len(sizes)
        reductions.append(link.all_reduce(collected, replicas) if full else 0.0)
        collected = 0 if full else collected
    return reductions


def one_forward_one_backward(
    forward: Sequence[float], backward: Sequence[float], hops: Sequence[float], pieces: int
) -> list[float]:
    """When each stage has done its last backward pass, if all begin together.

    Stage s begins with the forward passes of min(m, p - s) micro-batches, then takes a backward and a forward pass in
    turn. It waits for what an operation needs; a link carries one message at a time in each direction. With equal
    stages and instant links this is (m + p - 1) times the two passes of a micro-batch.

    Args:
        forward, backward: seconds of each stage for one micro-batch.
        hops: seconds of a message between a stage and the next, one less.
        pieces: m.
    """
    stages = len(forward)
    warm_up = [min(pieces, stages - stage) for stage in range(stages)]
    forwards, backwards = [0] * stages, [0] * stages  # done so far
    clock, ahead_free, back_free = [0.0] * stages, [0.0] * stages, [0.0] * stages
    # when the inputs of each micro-batch, or the gradients of its outputs, are at a stage
    inputs: list[list[float]] = [[0.0] * pieces, *([] for _ in range(stages - 1))]
    gradients: list[list[float]] = [[] for _ in range(stages)]
    waiting = list(range(stages))
    while waiting:
        for stage in waiting:
            while backwards[stage] < pieces:
                goes_forward = forwards[stage] < min(pieces, warm_up[stage] + backwards[stage])
                source, done = (inputs, forwards) if goes_forward else (gradients, backwards)
                if len(source[stage]) <= done[stage]:
                    break
                begin = max(clock[stage], source[stage][done[stage]])
                clock[stage] = begin + (forward if goes_forward else backward)[stage]
                done[stage] += 1
                if goes_forward and stage + 1 < stages:
                    ahead_free[stage] = max(ahead_free[stage], clock[stage]) + hops[stage]
                    inputs[stage + 1].append(ahead_free[stage])
                elif goes_forward:
                    gradients[stage].append(clock[stage])
                elif stage:
                    back_free[stage] = max(back_free[stage], clock[stage]) + hops[stage - 1]
                    gradients[stage - 1].append(back_free[stage])
        waiting = [stage for stage in waiting if backwards[stage] < pieces]
    return clock
