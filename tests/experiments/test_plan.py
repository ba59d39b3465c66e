"""Plans for many devices, against hand-made numbers, brute force, and simulations that share no code with the model."""

from __future__ import annotations

import gc
import heapq
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.parameter import is_lazy

from bpfree.algorithms import algorithm
from bpfree.errors import DataError, UsageError
from bpfree.experiments import block_times
from bpfree.experiments.block_times import Subject, count, measure, read_measurements, read_profile, write_profile
from bpfree.experiments.links import LINKS, Link
from bpfree.experiments.plan import (
    BlockCost,
    Measurement,
    Prediction,
    Profile,
    backprop_plan,
    compare,
    local_plan,
    predict,
    with_block_seconds,
)

FREE = Link("free", math.inf, 0.0)
GIGABYTE = Link("1 GB/s", 1e9, 1e-3)


def profile(blocks: Sequence[BlockCost], batch_size: int = 10, backprop: Sequence[BlockCost] = ()) -> Profile:
    return Profile("mf", "mlp", batch_size, 1000, 80, tuple(blocks), tuple(backprop))


def even(count: int, forward: float = 1.0, gradient: float = 2.0, **bytes_: int) -> list[BlockCost]:
    return [BlockCost(f"block {index}", forward, gradient, **bytes_) for index in range(count)]


def random_blocks(seed: int, count: int, messages: bool = False) -> list[BlockCost]:
    draw = random.Random(seed)
    return [
        BlockCost(
            f"block {index}",
            draw.uniform(0.1, 1),
            draw.uniform(0.1, 2),
            draw.uniform(0, 0.5),
            output_bytes=draw.randrange(1, 2_000_000_000),
            gradient_bytes=draw.randrange(1, 1_000_000_000),
            message_bytes=draw.randrange(1, 1_000_000_000) if messages else 0,
        )
        for index in range(count)
    ]


# -- links ----------------------------------------------------------------------------------------------------


def test_a_message_takes_latency_and_bandwidth() -> None:
    assert GIGABYTE.transfer(5_000_000) == pytest.approx(0.006)
    assert GIGABYTE.transfer(0) == 0


@pytest.mark.parametrize("replicas", [2, 3, 8])
def test_a_ring_passes_pieces_round_twice(replicas: int) -> None:
    """Each device sends a piece to its neighbour in every round; R - 1 rounds add up, R - 1 hand out."""
    pieces = [{(owner, piece) for piece in range(replicas)} for owner in range(replicas)]
    rounds = 0
    while any(len(held) < replicas**2 for held in pieces):
        before = [set(held) for held in pieces]
        for device in range(replicas):
            # in round t a device forwards what it holds of piece device - t
            piece = (device - rounds) % replicas
            pieces[(device + 1) % replicas] |= {part for part in before[device] if part[1] == piece}
        rounds += 1
    size = 6_000_000
    assert GIGABYTE.all_reduce(size, replicas) <= rounds * (1e-3 + size / replicas / 1e9) * (1 + 1e-12)
    slow = Link("no latency", 1e9, 0.0)  # where a ring is never slower than a tree
    assert slow.all_reduce(size, replicas) == pytest.approx(rounds * size / replicas / 1e9)


def test_many_replicas_take_a_tree() -> None:
    assert GIGABYTE.all_reduce(1000, 1024) == pytest.approx(2 * 10 * 1e-3 + 2e-6)
    assert GIGABYTE.all_reduce(1000, 1) == 0


@pytest.mark.parametrize("wrong", [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, -1.0), (1.0, math.inf)])
def test_links_that_do_not_exist(wrong: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="of a link must"):
        Link("wrong", *wrong)


def test_links_by_name_are_per_direction() -> None:
    # H100: "900 GB/s" of NVLink and "128 GB/s" of PCIe count both directions; a 100 Gb/s port carries 12.5 GB/s
    gigabytes = {name: link.bytes_per_second / 1e9 for name, link in LINKS.items()}
    assert (gigabytes["nvlink4"], gigabytes["pcie5"], gigabytes["ethernet100"]) == (450, 64, 12.5)


# -- layers ---------------------------------------------------------------------------------------------------


def simulated_pipeline(
    ranks: Sequence[tuple[float, float]], hops: Sequence[float], messages: Sequence[float], steps: int
) -> list[float]:
    """Event by event: when the last rank begins each step.

    Args:
        ranks: (seconds until the outputs are there, seconds of the whole step) of each.
        hops: seconds from each rank to the next.
        messages: seconds of what the next rank sends back after each step; 0 is nothing, which nobody waits for.
        steps: how many.

    A rank needs inputs, and a buffer to write outputs to. A transfer needs the link, and a buffer to arrive in, which
    is free again when the step that reads it has ended. There are two buffers on each side.
    """
    count = len(ranks)
    begun = [0] * count
    busy = [False] * count
    arrived, reserved, leaving, ready = ([0] * count for _ in range(4))
    link_busy = [False] * count
    back = [0] * count  # messages that a rank has got from the next one
    begins: list[float] = []
    events: list[tuple[float, int, str, int]] = [(0.0, 0, "look", 0)]
    number = itertools.count(1)
    while events:
        now, _, kind, rank = heapq.heappop(events)
        if kind == "outputs":
            ready[rank] += 1
        elif kind == "end":
            busy[rank] = False
            reserved[rank] -= 1
            if rank and messages[rank - 1]:
                heapq.heappush(events, (now + messages[rank - 1], next(number), "message", rank - 1))
        elif kind == "message":
            back[rank] += 1
        elif kind == "arrival":
            link_busy[rank] = False
            leaving[rank] -= 1
            arrived[rank + 1] += 1
        for r in range(count):
            is_last = r == count - 1
            if not is_last and ready[r] and not link_busy[r] and reserved[r + 1] < 2:
                ready[r] -= 1
                link_busy[r] = True
                reserved[r + 1] += 1
                heapq.heappush(events, (now + hops[r], next(number), "arrival", r))
            fed = begun[r] < steps if r == 0 else arrived[r] > 0
            told = is_last or not messages[r] or back[r] >= begun[r] - 1
            if fed and told and not busy[r] and (is_last or leaving[r] < 2):
                busy[r] = True
                begun[r] += 1
                if r == 0:
                    reserved[r] += 1
                else:
                    arrived[r] -= 1
                if is_last:
                    begins.append(now)
                else:
                    leaving[r] += 1
                    heapq.heappush(events, (now + ranks[r][0], next(number), "outputs", r))
                heapq.heappush(events, (now + ranks[r][1], next(number), "end", r))
    return begins


def as_simulated(
    plan: Prediction, blocks: Sequence[BlockCost], link: Link, target_bytes: int
) -> tuple[list[tuple[float, float]], list[float], list[float]]:
    ranks, hops, messages = [], [], []
    for rank in plan.ranks:
        mine = blocks[rank.first : rank.last + 1]
        whole = sum(b.forward_seconds + b.gradient_seconds + b.update_seconds for b in mine)
        after = mine[-1].gradient_seconds + sum(b.update_seconds for b in mine)
        ranks.append((whole - after, whole))
        hops.append(link.latency_seconds + (mine[-1].output_bytes + target_bytes) / link.bytes_per_second)
        waits = link.latency_seconds + mine[-1].message_bytes / link.bytes_per_second
        messages.append(waits if mine[-1].message_bytes else 0.0)
    return ranks, hops, messages


@pytest.mark.parametrize("seed", range(12))
def test_fill_and_step_are_those_of_a_simulated_pipeline(seed: int) -> None:
    blocks = random_blocks(seed, 7)
    link = Link("test", random.Random(seed).choice([5e8, 2e9, 1e12]), 0.01)
    for stages in (1, 2, 3, 5, 7):
        plan = local_plan(profile(blocks), link, stages)
        begins = simulated_pipeline(*as_simulated(plan, blocks, link, 80), steps=30)
        assert begins == pytest.approx([plan.fill_seconds + n * plan.step_seconds for n in range(30)])


@pytest.mark.parametrize("seed", range(8))
def test_messages_from_the_next_rank_slow_a_simulated_pipeline_as_predicted(seed: int) -> None:
    blocks = random_blocks(seed, 6, messages=True)
    link = Link("test", random.Random(seed).choice([5e8, 2e9]), 0.01)
    for stages in (2, 3, 6):
        plan = local_plan(profile(blocks), link, stages)
        begins = simulated_pipeline(*as_simulated(plan, blocks, link, 80), steps=80)
        assert (begins[-1] - begins[-41]) / 40 == pytest.approx(plan.step_seconds)
        assert begins[0] == pytest.approx(plan.fill_seconds)


def test_a_message_may_be_what_a_step_waits_for() -> None:
    blocks = even(2, 1.0, 1.0, output_bytes=1, message_bytes=5_000_000_000)
    plan = local_plan(profile(blocks), Link("1 GB/s", 1e9, 0.0), 2)
    assert plan.bound == "message"
    assert plan.step_seconds == pytest.approx((1 + 2 + 5) / 2)  # forward, whole next step, message: two steps a round
    assert plan.ranks[1].returned_bytes == 5_000_000_000


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("replicas", [1, 3])
def test_the_cut_is_the_best_of_all_cuts(seed: int, replicas: int) -> None:
    """Of all cuts, none has a faster slowest rank or link; reductions by a timeline of their own."""
    blocks = random_blocks(seed, 7)
    link = Link("test", 1e9, 0.05)

    def seconds(cut: tuple[int, ...]) -> float:
        slowest = 0.0
        for start, stop in itertools.pairwise((0, *cut, 7)):
            done, free = 0.0, 0.0
            for block in blocks[start:stop]:
                done += block.forward_seconds + block.gradient_seconds
                if replicas > 1:
                    piece = 0.05 + block.gradient_bytes / replicas / 1e9
                    tree = 0.05 * 2 * 2 + 2 * block.gradient_bytes / 1e9  # two levels of two, for three replicas
                    free = max(free, done) + min(2 * (replicas - 1) * piece, tree)
            rank = max(done, free) + sum(block.update_seconds for block in blocks[start:stop])
            hop = 0.05 + (blocks[start - 1].output_bytes + 80) / 1e9 if start else 0.0
            slowest = max(slowest, rank, hop)
        return slowest

    for stages in range(1, 8):
        best = min(map(seconds, itertools.combinations(range(1, 7), stages - 1)))
        assert local_plan(profile(blocks), link, stages, replicas).step_seconds == pytest.approx(best)


def test_even_blocks_scale_perfectly_but_for_the_fill() -> None:
    plan = local_plan(profile(even(8)), FREE, 4, steps=100)
    assert [(rank.first, rank.last) for rank in plan.ranks] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert plan.step_seconds == 6
    assert plan.fill_seconds == 3 * (3 + 1)  # each of three ranks: a whole block, and the next one's forward pass
    assert plan.bubble == 12 / (12 + 600)
    assert plan.efficiency == pytest.approx(600 / 612)
    assert plan.speedup == pytest.approx(4 * 600 / 612)
    assert plan.samples_per_second == pytest.approx(10 / 6 * 600 / 612)
    assert (plan.idle, plan.imbalance, plan.bound) == (0, 0, "compute")


def test_an_uneven_cut_is_idle_elsewhere() -> None:
    plan = local_plan(profile(even(5)), FREE, 2)
    assert plan.step_seconds == 9
    assert plan.idle == pytest.approx(1 - (9 + 6) / 2 / 9)
    assert plan.imbalance == pytest.approx(9 / 7.5 - 1)
    assert plan.speedup == pytest.approx(15 / 9)


def test_a_slow_link_is_what_a_step_waits_for() -> None:
    plan = local_plan(profile(even(2, output_bytes=7_000_000_000)), Link("1 GB/s", 1e9, 0.0), 2)
    assert plan.bound == "link"
    assert plan.step_seconds == pytest.approx(7 + 80e-9)
    assert plan.link_bytes == 7_000_000_080


def test_blocks_without_each_other_send_nothing() -> None:
    slow = Link("slow", 1.0, 100.0)
    plan = local_plan(profile(even(6, output_bytes=10**9)), slow, 3, form="block")
    assert (plan.step_seconds, plan.fill_seconds, plan.link_bytes) == (6, 0, 0)


def test_memory_of_layers_by_hand() -> None:
    blocks = [
        BlockCost("a", 1, 1, 0, 100, 10, 11, 12, 7),
        BlockCost("b", 1, 1, 0, 200, 20, 21, 22, 5),
        BlockCost("c", 2, 2, 0, 300, 30, 31, 32, 6),
    ]
    first, second = local_plan(profile(blocks), FREE, 2).ranks
    assert (first.parameter_bytes, first.gradient_bytes, first.optimizer_bytes) == (30, 32, 34)
    # graphs live one at a time; two batches of inputs and targets come in, two of outputs go out
    assert first.activation_bytes == 7 + 2 * (1000 + 80) + 2 * 200
    assert second.activation_bytes == 6 + 2 * (200 + 80)
    assert second.memory_bytes == 30 + 31 + 32 + 566
    assert (first.sent_bytes, second.sent_bytes) == (280, 0)


# -- data -----------------------------------------------------------------------------------------------------


def test_reductions_hide_behind_the_next_block_or_do_not() -> None:
    # two replicas: a ring of two messages of half the gradients, that is one second each block
    blocks = [BlockCost(str(i), 1.0, 2.0, 0.5, gradient_bytes=1_000_000_000) for i in range(3)]
    link = Link("1 GB/s", 1e9, 0.0)
    hidden = local_plan(profile(blocks), link, 1, 2)
    assert hidden.step_seconds == pytest.approx(9 + 1 + 1.5)  # only the last one shows
    assert local_plan(profile(blocks), link, 1, 2, overlap=False).step_seconds == pytest.approx(9 + 3 + 1.5)
    assert hidden.samples_per_step == 20
    assert hidden.efficiency == pytest.approx(10.5 / 11.5)
    assert (hidden.bound, hidden.reduced_bytes) == ("all-reduce", 3e9)


def test_ddp_hides_buckets_behind_the_backward_pass() -> None:
    blocks = [BlockCost(str(i), 1.0, 2.0, 0.5, gradient_bytes=1_000_000_000) for i in range(3)]
    link = Link("1 GB/s", 1e9, 0.0)
    assert backprop_plan(profile([], backprop=blocks), link, 1, 2).step_seconds == pytest.approx(9 + 1 + 1.5)
    small = [replace(block, gradient_bytes=10 * 2**20) for block in blocks]  # one bucket of 25 MiB, one of all, 30
    plan = backprop_plan(profile([], backprop=small), Link("slow", 10 * 2**20, 0.0), 1, 2)
    assert plan.step_seconds == pytest.approx(9 + 3 + 1.5)


@pytest.mark.parametrize("seed", range(5))
def test_backward_overlap_is_a_queue(seed: int) -> None:
    blocks = random_blocks(seed, 6)
    link = Link("1 GB/s", 1e9, 0.0)
    clock = sum(block.forward_seconds for block in blocks)
    finished = 0.0
    for block in reversed(blocks):  # all are larger than a bucket
        clock += block.gradient_seconds
        finished = max(clock, finished) + 2 * 3 / 4 * block.gradient_bytes / 1e9
    expected = max(clock, finished) + sum(block.update_seconds for block in blocks)
    assert backprop_plan(profile([], backprop=blocks), link, 1, 4).step_seconds == pytest.approx(expected)


# -- back-propagation's pipeline ------------------------------------------------------------------------------


def simulated_1f1b(forward: Sequence[float], backward: Sequence[float], hop: float, pieces: int) -> float:
    """Seconds of a step, as the longest path: operations wait for those before them in their stage and in their batch.

    Solved by relaxation, which needs no order of the operations. Links carry one message at a time.
    """
    stages = len(forward)
    before: dict[tuple[str, int, int], list[tuple[str, int, int]]] = {}
    weights: dict[tuple[str, int, int], float] = {}
    for stage in range(stages):
        ahead = min(pieces, stages - stage)
        order = [("F", i) for i in range(ahead)]
        for i in range(pieces):
            order.append(("B", i))
            if ahead + i < pieces:
                order.append(("F", ahead + i))
        assert len(order) == 2 * pieces
        for (kind, piece), previous in zip(order, [None, *order], strict=False):
            node = (kind, stage, piece)
            weights[node] = (forward if kind == "F" else backward)[stage]
            before[node] = [] if previous is None else [(previous[0], stage, previous[1])]
            source = stage - 1 if kind == "F" else stage + 1
            if 0 <= source < stages:
                message = (kind.lower(), source, piece)
                weights[message] = hop
                before[message] = [(kind, source, piece), *([(kind.lower(), source, piece - 1)] if piece else [])]
                before[node].append(message)
    finished = dict.fromkeys(weights, 0.0)
    changed = True
    while changed:
        changed = False
        for node, weight in weights.items():
            latest = weight + max((finished[one] for one in before[node]), default=0.0)
            changed |= latest > finished[node]
            finished[node] = latest
    return max(finished.values())


@pytest.mark.parametrize(("stages", "pieces"), [(2, 1), (2, 8), (4, 4), (4, 16), (8, 32)])
def test_1f1b_is_the_simulated_schedule_with_the_known_bubble(stages: int, pieces: int) -> None:
    blocks = even(8, float(pieces), 2.0 * pieces)
    plan = backprop_plan(profile([], 64, blocks), FREE, stages, microbatches=pieces)
    per_stage = 8 / stages
    simulated = simulated_1f1b([per_stage] * stages, [2 * per_stage] * stages, 0.0, pieces)
    assert plan.step_seconds == pytest.approx(simulated) == pytest.approx((pieces + stages - 1) * 3 * per_stage)
    assert plan.bubble == pytest.approx((stages - 1) / (pieces + stages - 1))
    assert plan.idle == pytest.approx(plan.bubble)
    assert plan.efficiency == pytest.approx(1 - plan.bubble)


@pytest.mark.parametrize("seed", range(8))
def test_1f1b_of_uneven_stages_and_slow_links_is_the_simulated_schedule(seed: int) -> None:
    draw = random.Random(seed)
    stages = draw.choice([2, 3, 4])
    pieces = draw.choice([1, stages, 4 * stages])
    blocks = [BlockCost(str(i), draw.uniform(1, 2), draw.uniform(2, 4), output_bytes=1) for i in range(stages)]
    hop = draw.choice([0.0, 0.1, 3.0])
    plan = backprop_plan(profile([], 64, blocks), Link("test", math.inf, hop), stages, microbatches=pieces)
    forward = [block.forward_seconds / pieces for block in blocks]
    backward = [block.gradient_seconds / pieces for block in blocks]
    assert plan.step_seconds == pytest.approx(simulated_1f1b(forward, backward, hop, pieces))
    assert plan.bound == ("link" if hop else "compute")


def test_1f1b_keeps_as_many_micro_batches_as_there_are_stages_behind() -> None:
    blocks = even(4, 1.0, 2.0, output_bytes=400, saved_bytes=800)
    plan = backprop_plan(profile([], 8, blocks), FREE, 4, microbatches=8)
    assert [rank.activation_bytes for rank in plan.ranks] == [
        800 * 4 / 8 + 2 * (1000 + 400) / 8 + 80,
        800 * 3 / 8 + 2 * (400 + 400) / 8 + 80,
        800 * 2 / 8 + 2 * (400 + 400) / 8 + 80,
        800 * 1 / 8 + 2 * 400 / 8 + 80,
    ]
    assert plan.link_bytes == 800  # activations ahead and gradients back


def test_micro_batches_have_samples() -> None:
    small = profile([], 4, even(3))
    assert backprop_plan(small, FREE, 3).microbatches == 4  # not twelve
    with pytest.raises(UsageError, match="5 micro-batches cannot be made of 4 samples"):
        backprop_plan(small, FREE, 3, microbatches=5)


# -- all forms ------------------------------------------------------------------------------------------------


def by_form(plans: Sequence[Prediction]) -> dict[str, Prediction]:
    return {f"{one.algorithm} {one.form}" + ("" if one.overlap else " plain"): one for one in plans}


@pytest.mark.parametrize("devices", [2, 8, 12, 60, 1024])
def test_the_best_factorisation_is_found(devices: int) -> None:
    blocks = [replace(block, gradient_bytes=10**8 * (1 + i % 3)) for i, block in enumerate(random_blocks(3, 12))]
    given = profile(blocks, backprop=blocks)
    link = Link("test", 2e9, 1e-4)
    found = by_form(predict(given, link, devices, steps=1000))
    layouts = [(p, devices // p) for p in range(1, 13) if devices % p == 0]
    best = max(local_plan(given, link, *layout, steps=1000).samples_per_second for layout in layouts)
    assert found["mf layer x data"].samples_per_second == best
    best = max(backprop_plan(given, link, *layout).samples_per_second for layout in layouts)
    assert found["bp 1f1b x data"].samples_per_second == best
    assert all(one.devices == devices for one in found.values())


def test_more_devices_than_blocks_become_replicas_and_say_so() -> None:
    found = by_form(predict(profile(even(3)), FREE, 8))
    layer = found["mf layer"]
    assert (layer.stages, layer.replicas) == (2, 4)
    assert "8 GPUs are more than the 3 blocks" in layer.note
    assert set(found) == {"mf layer", "mf data", "mf data plain", "mf layer x data"}
    odd = by_form(predict(profile(even(3)), FREE, 7))
    assert "mf layer" not in odd
    assert "7 GPUs are no number of equal replicas of 2 to 3 stages" in odd["mf layer x data"].note


def test_one_device_is_one_process() -> None:
    found = predict(profile(even(3), backprop=even(3)), FREE, 1)
    assert [(one.algorithm, one.form, one.efficiency) for one in found] == [
        ("mf", "one-process", 1),
        ("bp", "one-process", 1),
    ]


def test_the_summed_batch_can_be_bounded() -> None:
    found = by_form(predict(profile(even(4)), FREE, 8, largest_batch=25))
    assert {name: one.samples_per_step for name, one in found.items()} == {"mf layer": 20, "mf layer x data": 20}
    assert predict(profile(even(3)), FREE, 7, largest_batch=60) == []
    with pytest.raises(UsageError, match="more than 9"):
        predict(profile(even(4)), FREE, 8, largest_batch=9)


def test_layouts_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="4 ranks cannot share 3 blocks; use at most 3, and replicas for the rest"):
        local_plan(profile(even(3)), FREE, 4)
    with pytest.raises(UsageError, match="at least 1"):
        local_plan(profile(even(3)), FREE, 0)
    with pytest.raises(UsageError, match="at least 1"):
        predict(profile(even(3)), FREE, 0)
    with pytest.raises(UsageError, match="no times"):
        backprop_plan(profile(even(3)), FREE)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, "1"])
def test_times_that_are_none(seconds: float) -> None:
    with pytest.raises(DataError, match="forward_seconds must be a number"):
        BlockCost("block 0", seconds, 1.0)


def test_profiles_that_are_none() -> None:
    with pytest.raises(DataError, match="must take some time"):
        BlockCost("block 0", 0.0, 0.0)
    with pytest.raises(DataError, match="at least one block"):
        profile([])
    with pytest.raises(DataError, match="2 blocks of the rule, but 3 of back-propagation"):
        profile(even(2), backprop=even(3))
    with pytest.raises(DataError, match="batch_size"):
        profile(even(2), batch_size=0)


# -- measured steps -------------------------------------------------------------------------------------------


def test_a_measured_step_beside_its_prediction() -> None:
    measured = Measurement("layer", 2, 10, "mlp", "mf", step_seconds=8.0)
    found = compare(measured, profile(even(4)), FREE)
    assert found.predicted.step_seconds == 6
    assert found.error == pytest.approx(-0.25)
    alone = replace(measured, form="one-process", ranks=1)
    assert compare(alone, profile(even(4)), FREE).predicted.step_seconds == 12
    data = replace(measured, form="data", ranks=4)
    assert compare(data, profile(even(4)), FREE).predicted.replicas == 4
    block = replace(measured, form="block", ranks=4)
    assert compare(block, profile(even(4, output_bytes=10**12)), GIGABYTE).predicted.step_seconds == 3
    backward = replace(profile([], backprop=even(4)), algorithm="bp")
    piped = replace(measured, form="1f1b", algorithm="bp", microbatches=5)
    assert compare(piped, backward, FREE).predicted.step_seconds == pytest.approx(12 / 2 * (5 + 1) / 5)


def test_measurements_are_of_what_was_planned() -> None:
    measured = Measurement("layer", 2, 10, "mlp", "mf", 8.0)
    for changed, message in (
        ({"batch_size": 20}, "of batch_size 10, the measurement is of 20"),
        ({"network": "cnn"}, "of network mlp, the measurement is of cnn"),
        ({"algorithm": "dgl"}, "of algorithm mf, the measurement is of dgl"),
    ):
        with pytest.raises(DataError, match=message):
            compare(replace(measured, **changed), profile(even(4)), FREE)
    for wrong in ({"form": "tensor"}, {"ranks": 0}, {"step_seconds": 0.0}, {"form": "one-process"}, {"form": "1f1b"}):
        with pytest.raises(DataError):
            replace(measured, **wrong)
    with pytest.raises(DataError, match="its pipeline is 1f1b"):
        replace(measured, algorithm="bp")


def test_known_times_replace_those_of_the_rule() -> None:
    timed = with_block_seconds(profile(even(2), backprop=even(2)), [3.0, 6.0], "a record")
    assert [block.seconds for block in timed.local] == [3, 6]
    assert [block.forward_seconds for block in timed.local] == pytest.approx([1, 2])
    assert timed.backprop == tuple(even(2))
    with pytest.raises(DataError, match="3 block times, but mlp has 2 blocks"):
        with_block_seconds(timed, [1.0, 1.0, 1.0], "a record")


# -- blocks of real networks ----------------------------------------------------------------------------------


def subject(rule: str, network: str, shape: tuple[int, ...], batch_size: int = 8, **parameters: object) -> Subject:
    return Subject(algorithm(rule), network, shape, 10, batch_size, parameters, "fp32", torch.device("cpu"))


def test_bytes_of_an_mlp_are_those_of_its_matrices() -> None:
    found = count(subject("mf", "mlp:20x30x30", (1, 4, 4), batch_size=100), [1.0, 2.0, 3.0], "a record")
    first, second, _ = found.local
    sizes = [16 * 20 + 20 + 20 * 10, 20 * 30 + 30 + 30 * 10]  # W, b and the projection
    assert [first.parameter_bytes, second.parameter_bytes] == [4 * size for size in sizes]
    assert [first.gradient_bytes, second.gradient_bytes] == [4 * size for size in sizes]
    # Adam: two moments, and a number of steps for each of three parameters
    assert [first.optimizer_bytes, second.optimizer_bytes] == [8 * size + 3 * 4 for size in sizes]
    assert (first.output_bytes, second.output_bytes) == (100 * 20 * 4, 100 * 30 * 4)
    assert (found.input_bytes, found.target_bytes) == (100 * 16 * 4, 100 * 8)
    assert first.saved_bytes == 100 * (16 + 20) * 4  # closed form: inputs and outputs
    assert (first.seconds, second.seconds, found.backprop, found.source) == (1, 2, (), "a record")


@pytest.mark.parametrize(("rule", "network", "kinds"), [("mf", "mlp:8x30", 3), ("man", "resnet:20", 9)])
def test_blocks_that_are_alike_are_counted_once(
    rule: str, network: str, kinds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of many large blocks would take minutes."""
    counted: list[int] = []
    costs = block_times._costs

    def noted(wanted: Subject, parts: block_times._Parts, index: int, *rest: Any) -> Any:
        counted.append(index)
        return costs(wanted, parts, index, *rest)

    monkeypatch.setattr(block_times, "_costs", noted)
    wanted = subject(rule, network, (3, 8, 8))
    seconds = [1.0] * len(block_times._Parts.of(wanted).blocks)
    found = count(wanted, seconds, "a record")
    assert len(counted) == 2 * kinds  # for two sizes of a batch
    monkeypatch.setattr(block_times, "_structure", lambda *made_of: object())
    assert count(wanted, seconds, "a record") == found
    assert len(counted) == 2 * (kinds + len(seconds))


def test_blocks_that_have_been_counted_are_freed() -> None:
    """Networks that fill a machine can be planned with, one block after another."""
    count(subject("mf", "mlp:29x31x31", (1, 4, 4), batch_size=4), [1.0, 1.0, 1.0], "a record")
    gc.collect()
    tensors = (kept for kept in gc.get_objects() if isinstance(kept, torch.Tensor) and not is_lazy(kept))
    assert not [kept for kept in tensors if kept.shape == (31, 31)]


def test_bytes_of_back_propagation_have_a_read_out_at_the_end_only() -> None:
    found = count(subject("bp", "mlp:20x30x30", (1, 4, 4)), [1.0, 2.0, 3.0], "a record")
    assert [block.parameter_bytes for block in found.backprop] == [4 * 340, 4 * 630, 4 * (930 + 310)]
    assert found.local == ()
    assert found.own == found.backprop


def test_counted_bytes_are_those_of_the_measured_batch() -> None:
    wanted = subject("dgl", "cnn:4x6x8", (3, 8, 8), batch_size=9)
    measured = measure(wanted, readings=1)
    counted = count(wanted, [1.0, 1.0, 1.0], "a record")
    for ours, theirs in zip(counted.local, measured.local, strict=True):
        sizes = [{k: v for k, v in vars(block).items() if k.endswith("_bytes")} for block in (ours, theirs)]
        assert sizes[0] == sizes[1]
    assert len(measured.backprop) == 3
    assert all(block.seconds > 0 for block in (*measured.local, *measured.backprop))


@pytest.mark.parametrize("parameters", [{}, {"k": 3}])
def test_a_block_is_charged_with_its_own_auxiliary_network(parameters: dict[str, int]) -> None:
    """Parameters of all blocks are those of the whole learner; the last block has a read-out only."""
    wanted = subject("dgl", "resnet:20", (3, 8, 8), batch_size=2, **parameters)
    with torch.random.fork_rng():
        from bpfree.networks import build_network

        whole = wanted.rule.build(build_network("resnet:20", (3, 8, 8)), 10, (3, 8, 8), **parameters)
    found = count(wanted, [1.0] * len(whole.blocks()), "a record")
    assert sum(block.parameter_bytes for block in found.local) == 4 * sum(p.numel() for p in whole.parameters())


def test_man_needs_the_next_blocks_first_unit() -> None:
    found = count(subject("man", "cnn:4x6x8", (3, 8, 8), batch_size=2), [1.0, 1.0, 1.0], "a record")
    assert [block.message_bytes for block in found.local] == [4 * (4 * 6 * 9 + 6), 4 * (6 * 8 * 9 + 8), 0]


@pytest.mark.parametrize("rule", ["mf", "ff", "dgl", "greedy", "predsim"])
def test_rules_with_simultaneous_blocks_can_be_planned(rule: str) -> None:
    network, shape = ("mlp:40x40x40", (1, 4, 4)) if rule == "ff" else ("cnn:20x20x20", (1, 8, 8))
    parameters = {"negatives": "random"} if rule == "ff" else {}
    found = count(subject(rule, network, shape, batch_size=2, **parameters), [1.0, 1.0, 1.0], "a record")
    assert len(found.local) == 3
    assert all(block.gradient_bytes for block in found.local)


@pytest.mark.parametrize(
    ("rule", "network", "parameters", "reason"),
    [
        ("mf", "mlp:2x8", {"schedule": "sequential"}, "2 stages one after another"),
        ("mf", "mlp:2x8", {"input_projection": True}, "before the first block"),
        ("ff", "mlp:2x8", {"negatives": "hard"}, "use negatives=random"),
        ("cwc", "cnn:20x20", {}, "class selection over all of them"),
        ("ccl", "mlp:2x8", {}, "feedback stream runs from the last block"),
        ("bp-ds", "mlp:2x8", {}, "the baseline that plans know is bp"),
        ("infopro", "cnn:4x8", {}, "reconstruct"),
        ("bp", "mlp:2x8", {"recompute": True}, "leave out recompute"),
    ],
)
def test_rules_that_cannot_be_planned_say_why(
    rule: str, network: str, parameters: dict[str, object], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        count(subject(rule, network, (1, 8, 8), **parameters), [1.0, 1.0], "a record")


# -- files ----------------------------------------------------------------------------------------------------


def test_profiles_survive_a_file(tmp_path: Path) -> None:
    given = profile(random_blocks(0, 3), backprop=even(3))
    write_profile(given, tmp_path / "times.json")
    assert read_profile(tmp_path / "times.json") == replace(given, source=str(tmp_path / "times.json"))


def test_a_block_may_have_one_time_only(tmp_path: Path) -> None:
    values = {**asdict(profile(even(1))), "local": [{"name": "a", "seconds": 6.0, "output_bytes": 5}]}
    (tmp_path / "times.json").write_text(json.dumps(values))
    assert read_profile(tmp_path / "times.json").local == (BlockCost("a", 2.0, 4.0, output_bytes=5),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "does not hold block times"),
        ('{"network": "mlp"}', "does not hold block times"),
        ('{"local": [{"name": "a"}]}', "does not hold block times"),
        ('{"local": [{"name": "a", "seconds": "x"}]}', "does not hold block times"),
    ],
)
def test_files_that_hold_no_times(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_profile(tmp_path / "times.json")
    with pytest.raises(DataError, match="No such file"):
        read_profile(tmp_path / "none.json")


def test_measured_steps_are_read_from_an_object_or_a_list(tmp_path: Path) -> None:
    record = {"form": "layer", "ranks": 2, "batch_size": 8, "network": "mlp", "algo": "mf", "step_seconds": 0.5}
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**record, "hardware": "two GPUs", "block_seconds": None}))
    assert read_measurements(path) == [Measurement("layer", 2, 8, "mlp", "mf", 0.5)]
    path.write_text(json.dumps([record, {**record, "block_seconds": [0.1, 0.2]}]))
    assert [one.block_seconds for one in read_measurements(path)] == [(), (0.1, 0.2)]
    for wrong in ([], [3], {"form": "layer"}, {**record, "ranks": "two"}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="hold"):
            read_measurements(path)
