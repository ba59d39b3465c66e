"""Weights of several processes against those of one: bit for bit where blocks are spread, to rounding with batches."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from bpfree.algorithms import ALGORITHMS, Algorithm
from bpfree.algorithms.local_units import HasLocalUnits, LocalUnits
from bpfree.errors import UsageError
from bpfree.parallel import layer
from tests.parallel import jobs
from tests.parallel.pool import Pool

LOCAL = {"optimizer": "adam", "lr": 0.01, "head_pool": "flatten"}
RULES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mf": ("mf", "mlp", {}),
    "mf-sums": ("mf", "mlp", {"inference": "sum_probs", "input_projection": True}),
    "mf-post": ("mf", "cnn-bn", {"pass_on": "post", "inference": "sum_logits"}),
    "greedy": ("greedy", "cnn-bn", {**LOCAL}),
    "dgl": ("dgl", "cnn-bn", {**LOCAL, "optimizer": "sgd"}),
    "predsim": ("predsim", "cnn-bn", {**LOCAL}),
    "infopro": ("infopro", "cnn-bn", {**LOCAL}),
    "man": ("man", "cnn-bn", {**LOCAL}),
    "man-light": ("man", "mlp", {**LOCAL, "bias": "light"}),
    "ff": ("ff", "mlp", {"negatives": "random"}),
    "ff-softmax": ("ff", "mlp", {"negatives": "random", "loss": "symba", "inference": "softmax", "label": "concat"}),
    "ff-hybrid": ("ff", "mlp", {"negatives": "hybrid", "inference": "softmax"}),
}
NOPROP = ("noprop", "mlp-2", {"steps": 5, "width": 16})


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def without_joules(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**record, "joules_at_start": None} for record in history]


def check(found: list[dict[str, Any]], expected: dict[str, Any], *, shared_work: bool = False) -> None:
    """The leader has the weights of one process, and all ranks the same records.

    What every process does for itself (NoProp's read-out, masks of hybrids) is counted as often as it is done.
    """
    assert same(found[0]["weights"], expected["weights"])
    for rank in found:
        assert without_joules(rank["history"]) == without_joules(expected["history"])
        assert rank["steps"] == expected["steps"]
        if shared_work:
            assert expected["flops"] < rank["flops"] < len(found) * expected["flops"]
        else:
            assert rank["flops"] == expected["flops"]


@pytest.mark.parametrize("name", RULES)
def test_layers_on_two_ranks_learn_what_one_process_learns(name: str, pool: Pool) -> None:
    rule, network, options = RULES[name]
    job = {"rule": rule, "network": network, "options": options}
    found = pool.run(2, jobs.train, **job)
    check(found, jobs.train(None, **job), shared_work=name == "ff-hybrid")
    # neither rank trained everything, and together they did
    whole = sum(parameter.requires_grad for parameter in jobs.make_learner(rule, network, options).parameters())
    assert all(0 < rank["trained"] < whole for rank in found)
    assert sum(rank["trained"] for rank in found) == whole


def test_ranks_remember_the_best_state_of_their_own_blocks(pool: Pool) -> None:
    job: dict[str, Any] = {"rule": "mf", "training": {"epochs": 4}}
    first, second = pool.run(2, jobs.train, **job)
    expected = jobs.train(None, **job)
    check([first, second], expected)
    assert all(0 < numbers < expected["remembered"][-1] for numbers in (*first["remembered"], *second["remembered"]))
    assert first["remembered"][-1] + second["remembered"][-1] == expected["remembered"][-1]


@pytest.mark.parametrize("cut", [(0, 3, 4), (2, 3, 4)])
def test_uneven_cuts(cut: tuple[int, ...], pool: Pool) -> None:
    found = pool.run(3, jobs.train, rule="mf", cut=cut)
    check(found, jobs.train(None, rule="mf"))
    assert found[0]["team"] == {"form": "layer", "ranks": 3, "last_units": list(cut)}


@pytest.mark.parametrize(
    ("rule", "options"), [("ff", {"negatives": "random"}), ("mf", {"inference": "sum_logits"})], ids=["ff", "mf-sums"]
)
def test_what_is_passed_on_does_not_lie_where_the_next_message_arrives(
    rule: str, options: dict[str, Any], pool: Pool
) -> None:
    """The rank in the middle hands on, unchanged, what it received of the first one's layers."""
    first, middle, last = pool.run(
        3, jobs.sent_from_buffers, rule=rule, options=options, cut=(1, 3, 5 if rule == "ff" else 4)
    )
    assert first[0] > 0
    assert middle[0] > first[0]
    assert last[0] == 0
    assert [buffered for _, buffered in (first, middle, last)] == [0, 0, 0]


def test_momentum_copies_over_four_ranks(pool: Pool) -> None:
    job = {"rule": "man", "network": "mlp", "options": LOCAL}
    check(pool.run(4, jobs.train, **job), jobs.train(None, **job))


def test_schedules_and_early_stopping_are_those_of_one_process(pool: Pool) -> None:
    training = {"lr_schedule": "cosine", "warmup_epochs": 1, "epochs": 8, "patience": 1}
    job = {"rule": "mf", "options": {"lr": 0.05}, "training": training}
    expected = jobs.train(None, **job)
    assert len(expected["history"]) < 8  # it does stop early
    check(pool.run(2, jobs.train, **job), expected)


def test_what_is_borrowed_is_exchanged_between_two_steps(pool: Pool) -> None:
    """In one order on both sides, and over before either learns."""
    first, second = pool.run(2, jobs.order_of_a_borrowing_step)
    assert first == ["learn", "send step", "receive borrowed", "arrived", "room 0", "end"]
    assert second == ["receive step", "send borrowed", "arrived", "room 0", "learn", "end"]


def test_a_rank_validates_without_waiting_for_the_steps_of_others(pool: Pool) -> None:
    for order in pool.run(2, jobs.order_of_an_epoch):
        assert order == ["_update"] * 5 + ["_scores", "share_rating", "share_metrics", "add"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_independent_blocks(ranks: int, pool: Pool) -> None:
    rule, network, options = NOPROP
    job = {"rule": rule, "network": network, "options": options, "form": "block"}
    check(pool.run(ranks, jobs.train, **job), jobs.train(None, **job), shared_work=True)


CAFO: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ce": ("mlp", {"loss": "ce"}, {}),
    "sl": ("cnn", {"loss": "sl", "aggregate": "sum_logit"}, {}),
    "batch-norm": ("cnn-bn", {"loss": "ce", "optimizer": "sgd"}, {}),
    "not kept": ("cnn-bn", {"loss": "ce"}, {"cache": False}),
}


@pytest.mark.parametrize("form", ["layer", "block"])
@pytest.mark.parametrize("name", CAFO)
def test_predictors_of_frozen_blocks(name: str, form: str, pool: Pool) -> None:
    """Blocks are run by whoever needs them, and handed on in one of the forms; what predictors learn is the same."""
    network, options, training = CAFO[name]
    job = {"rule": "cafo", "network": network, "options": options, "form": form, "training": training}
    found = pool.run(2, jobs.train, **job)
    expected = jobs.train(None, **job)
    start = jobs.make_learner("cafo", network, options)
    learnt = {name: value for name, value in start.state_dict().items() if name.startswith("predictors")}
    assert learnt
    assert not any(torch.equal(expected["weights"][name], value) for name, value in learnt.items())
    check(found, expected, shared_work=form == "block")
    whole = sum(parameter.requires_grad for parameter in start.parameters())
    assert all(0 < rank["trained"] < whole for rank in found)
    assert sum(rank["trained"] for rank in found) == whole


def test_resuming_predictors_with_another_number_of_ranks(pool: Pool) -> None:
    job: dict[str, Any] = {"rule": "cafo", "network": "cnn-bn", "options": {"loss": "ce"}}
    expected = jobs.train(None, **job)
    first = pool.run(3, jobs.train, **job, stop_after=2)[0]
    assert first["stopped"]
    second = pool.run(2, jobs.train, **job, form="block", stop_after=1, state=first["state"])[0]
    assert second["stopped"]
    found = jobs.train(None, **job, state=second["state"])
    assert same(found["weights"], expected["weights"])
    assert without_joules(found["history"]) == without_joules(expected["history"])


DATA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bp": ("bp", "mlp", {}),
    "bp-centralize": ("bp", "mlp", {"centralize": True}),
    "mf": ("mf", "mlp", {}),
    "mf-post": ("mf", "mlp", {"pass_on": "post"}),
    "mf-post-one": ("mf", "mlp-1", {"pass_on": "post"}),
    "mf-sequential": ("mf", "mlp-2", {"schedule": "sequential"}),
    "greedy": ("greedy", "mlp", {"head": "0c1f"}),
    "man-after": ("man", "mlp", {"host": "greedy", "head": "0c1f", "bias": "light", "ema_update": "after"}),
    "dfa": ("dfa", "mlp", {}),
    "cwc": ("cwc", "cnn", {}),
    "cwc-selected": ("cwc", "cnn", {"inference": "selected"}),
    "cafo-ce": ("cafo", "mlp", {"loss": "ce"}),
    "ccl": ("ccl", "cnn", {"clip": 0.0}),  # which compares all samples of the batch with each other
    "ccl-flood": ("ccl", "mlp", {"clip": 0.01, "flood": 0.7, "warmup_steps": 3, "centralize": True}),
    "ccl-dot": ("ccl", "mlp", {"clip": 0.0, "similarity": "dot", "scale": 0.5}),
    "ccl-clip": ("ccl", "mlp", {"clip": 0.01, "clip_scope": "network", "similarity": "dot"}),
}


@pytest.mark.parametrize(("name", "small"), [*((name, False) for name in DATA), ("bp", True), ("bp-centralize", True)])
def test_parts_of_a_batch_learn_what_the_batch_teaches(name: str, small: bool, pool: Pool) -> None:
    """Also when gradients travel one by one, while the error goes backwards."""
    rule, network, options = DATA[name]
    # few steps: what rounding differs by grows from step to step
    options = {**options, "optimizer": "sgd", "lr": 0.01}
    job = {"rule": rule, "network": network, "options": options, "form": "data", "training": {"epochs": 1}}
    found = pool.run(3, jobs.train_in_small_buckets if small else jobs.train, **job)
    expected = jobs.train(None, **job)
    start = jobs.make_learner(rule, network, options).state_dict()
    moved = 0.0
    for key, value in expected["weights"].items():
        for rank in found:
            torch.testing.assert_close(rank["weights"][key], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[0]["weights"][key], found[1]["weights"][key])  # ranks do not drift apart
        moved = max(moved, float((value.double() - start[key].double()).abs().max()) if value.numel() else 0.0)
    assert moved > 1e-6  # there was something to get wrong


@pytest.mark.parametrize("network", ["mlp", "cnn"])  # more samples than features, and fewer
@pytest.mark.parametrize("batch_size", [12, 60])
def test_a_closed_form_adds_up_what_ranks_have_seen(network: str, batch_size: int, pool: Pool) -> None:
    job: dict[str, Any] = {"rule": "cafo", "network": network, "form": "data", "training": {"batch_size": batch_size}}
    expected = jobs.train(None, **job)
    start = jobs.make_learner("cafo", network, {}).state_dict()
    found = pool.run(3, jobs.train, **job)
    for rank in found:
        assert rank["flops"] >= expected["flops"]  # all ranks solve
        for key, value in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][key], value, rtol=1e-9, atol=1e-9)
    assert same(found[0]["weights"], found[1]["weights"])
    solved = "predictors.0.predictors.each.0.weight"
    assert not torch.allclose(found[0]["weights"][solved], start[solved])
    first = pool.run(2, jobs.train, **job, stop_after=2)[0]
    if batch_size == 12:  # half-way through its one pass; nothing is lost, nothing counts twice
        assert first["stopped"]
        second = pool.run(3, jobs.train, **job, stop_after=2, state=first["state"])[0]
        assert second["stopped"]
        alone = jobs.train(None, **job, state=second["state"])
        for key, value in expected["weights"].items():
            torch.testing.assert_close(alone["weights"][key], value, rtol=1e-9, atol=1e-9)


TOGETHER: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ff-hard": ("ff", "mlp", {}),
    "ff-collaboration": ("ff", "mlp", {"loss": "collaboration", "negatives": "random"}),
    "noprop-ct": ("noprop", "mlp-2", {"variant": "ct", "steps": 4, "width": 8}),
    "noprop-learned": ("noprop", "mlp-2", {"embeddings": "learned", "steps": 4, "width": 8}),
    "noprop-step": ("noprop", "mlp-2", {"shared_updates": "step", "steps": 4, "width": 8}),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_blocks_that_cannot_be_spread_can_learn_from_parts_of_a_batch(name: str, pool: Pool) -> None:
    """They draw numbers of their own for their rows, so that the weights are not those of one process."""
    rule, network, options = TOGETHER[name]
    job = {"rule": rule, "network": network, "options": options, "form": "data", "training": {"epochs": 1}}
    first, second = pool.run(2, jobs.train, **job)
    assert same(first["weights"], second["weights"])
    start = jobs.make_learner(rule, network, options)
    moved = [not torch.equal(first["weights"][key], value) for key, value in start.named_parameters()]
    assert sum(moved) > len(moved) / 2  # of some the first gradients are zero


MESH: dict[str, dict[str, Any]] = {
    "mf": {},
    "man": {"ema": True, "bias": "light", "head": "0c1f", "host": "greedy"},
    "cafo": {"loss": "ce"},
}


@pytest.mark.parametrize("rule", MESH)
def test_blocks_times_parts_of_a_batch(rule: str, pool: Pool) -> None:
    """Two runs of blocks times two halves of a batch."""
    options = {"optimizer": "sgd", "lr": 0.01, **MESH[rule]}
    job = {"rule": rule, "options": options, "form": "layer,data", "mesh": (2, 2)}
    found = pool.run(4, jobs.train, **job, training={"epochs": 1})
    expected = jobs.train(None, **job, training={"epochs": 1})
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found[0]["weights"][key], value, rtol=1e-12, atol=1e-12)
    assert same(found[0]["weights"], found[1]["weights"])  # rank 1 leads the other column
    losses = [name for name in expected["history"][0] if name.endswith("loss")]
    assert len(losses) > 2
    for name in losses:
        assert found[3]["history"][0][name] == pytest.approx(expected["history"][0][name], rel=1e-5)


def test_statistics_of_a_divided_batch_are_those_of_all_ranks(pool: Pool) -> None:
    job = {"rule": "bp", "network": "cnn-bn", "form": "data", "training": {"epochs": 1}}
    first, second = pool.run(2, jobs.train, **job)
    assert same(first["weights"], second["weights"])
    one = jobs.train(None, **job)["weights"]
    kept = [name for name in one if name.endswith("running_mean")]
    assert kept
    for name in kept:  # means over ranks; not bit for bit, as each rank normalises by its own rows
        torch.testing.assert_close(first["weights"][name], one[name], rtol=0.1, atol=0.02)


def test_ranks_draw_numbers_of_their_own_for_their_rows(pool: Pool) -> None:
    rule, network, options = NOPROP
    job = {"rule": rule, "network": network, "options": options, "form": "data", "training": {"epochs": 1}}
    first, second = pool.run(2, jobs.train, **job)
    assert same(first["weights"], second["weights"])
    counts = [name for name in first["weights"] if name.endswith(".count")]
    expected = jobs.train(None, **job)["weights"]
    assert counts
    assert all(torch.equal(first["weights"][name], expected[name]) for name in counts)
    one, two = pool.run(2, jobs.draws)
    assert len({*one, *two}) == 8


@pytest.mark.parametrize("before", ["layer", "alone"])
def test_resuming_with_another_number_of_ranks(before: str, pool: Pool) -> None:
    """2 -> 1 -> 3 ranks; the state of an epoch in training goes along."""
    job: dict[str, Any] = {"rule": "man", "network": "mlp", "options": LOCAL, "training": {"epochs": 4}}
    expected = jobs.train(None, **job)
    stops = {**job, "stop_after": 2}
    first = pool.run(2, jobs.train, **stops)[0] if before == "layer" else jobs.train(None, **{**job, "stop_after": 4})
    assert first["stopped"]
    second = jobs.train(None, **{**stops, "stop_after": 3}, state=first["state"])
    assert second["stopped"]
    assert 0 < first["steps"] < second["steps"] < expected["steps"]
    third = pool.run(3, jobs.train, **job, state=second["state"])
    check(third, expected)


def test_resuming_independent_blocks(pool: Pool) -> None:
    rule, network, options = NOPROP
    job: dict[str, Any] = {"rule": rule, "network": network, "options": options, "form": "block"}
    first = pool.run(3, jobs.train, **job, stop_after=2)[0]
    assert first["stopped"]
    found = pool.run(2, jobs.train, **job, state=first["state"])
    expected = jobs.train(None, **job)
    assert same(found[0]["weights"], expected["weights"])
    assert without_joules(found[0]["history"]) == without_joules(expected["history"])


@pytest.mark.parametrize(
    ("ranks", "job", "reason"),
    [
        (3, {"rule": "mf", "form": "layer", "network": "mlp-2"}, "3 ranks are more than the 2 blocks"),
        (2, {"rule": "mf", "form": "layer", "schedule": "sequential"}, "one block at a time"),
        (2, {"rule": "mf", "form": "block"}, "need each other's activations"),
        (2, {"rule": "mf", "form": "layer", "cut": (1, 3)}, "rising to 4"),
        (2, {"rule": "ccl", "form": "layer"}, "feedback stream"),
        (2, {"rule": "bp", "form": "layer"}, "from the blocks behind it"),
        (2, {"rule": "ff", "form": "layer"}, "negatives=random"),
        (2, {"rule": "ff", "form": "layer", "negatives": "random", "loss": "collaboration-preceding"}, "adds up"),
        (2, {"rule": "cafo", "form": "block"}, "in one place; use loss=ce or loss=sl, or --parallel data"),
        (2, {"rule": "cafo", "form": "layer", "loss": "ce", "block_training": "dfa"}, "block_training=random"),
        (2, {"rule": "cafo", "form": "layer", "loss": "ce", "schedule": "sequential"}, "one predictor at a time"),
        (2, {"rule": "man", "form": "layer", "ema_update": "after"}, "ema_update=before"),
        (2, {"rule": "noprop", "form": "block", "variant": "ct", "steps": 4}, "one block"),
        (2, {"rule": "noprop", "form": "block", "embeddings": "learned", "steps": 4}, "embeddings=onehot"),
        (2, {"rule": "bp", "form": "data", "clip": 1.0}, "clip=0"),
        (2, {"rule": "bp", "form": "data", "dropout": 0.5}, "the same numbers"),
        (4, {"rule": "ff", "form": "data", "cut": (1,)}, "each has all of them"),
    ],
)
def test_what_cannot_be_spread_says_why(ranks: int, job: dict[str, Any], reason: str, pool: Pool) -> None:
    with pytest.raises(UsageError, match=reason):
        pool.run(ranks, jobs.refuse, **job)


@pytest.mark.parametrize("entry", ALGORITHMS, ids=lambda entry: entry.alias)
def test_every_rule_is_a_chain_or_says_why_not(entry: Algorithm) -> None:
    assert hasattr(entry.learner, "local_units") != bool(entry.learner.undivided)


@pytest.mark.parametrize("graphs", [False, True])
def test_units_that_step_optimizers_can_be_timed_as_graphs(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch refuses to capture a step of Adam whose state would be read on the host."""
    rule, network, options = NOPROP
    learner = jobs.make_learner(rule, network, options)
    batch = next(iter(jobs.samples(jobs.BATCH, 0).in_order(jobs.BATCH)))
    captured: list[bool] = []

    def replayed(work: Callable[[], Any]) -> Callable[[], Any]:
        def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            captured.extend(group["capturable"] for group in optimizer.param_groups)

        hook = register_optimizer_step_pre_hook(note)
        work()
        hook.remove()
        return work

    jobs.without_streams(monkeypatch)
    monkeypatch.setattr(layer, "_replayed", replayed)
    assert len(layer.unit_seconds(learner, batch, torch.device("cpu"), graphs=graphs)) == options["steps"]
    assert captured == [True] * (options["steps"] if graphs else 0)
    assert not any(group["capturable"] for optimizer in learner.optimizers() for group in optimizer.param_groups)


class Casts(TorchDispatchMode):
    """Counts weights that become bfloat16."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(args[0], torch.nn.Parameter) and args[0].ndim == 2 and found.dtype == torch.bfloat16:
            self.count += 1
        return found


def test_units_are_timed_with_the_casts_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step enters autocast anew, and casts every weight again; nor may the casts of all units stay in memory."""
    learner = jobs.make_learner("mf", "mlp", {}).float()
    inputs, targets = next(iter(jobs.samples(jobs.BATCH, 0).in_order(jobs.BATCH)))
    casts: list[int] = []

    def counted(work: Callable[[], Any], device: torch.device, readings: int) -> float:
        with Casts() as mode:
            work()
        casts.append(mode.count)
        return 1.0

    monkeypatch.setattr(layer, "least_seconds", counted)
    with torch.autocast("cpu", torch.bfloat16):
        layer.unit_seconds(learner, (inputs.float(), targets), torch.device("cpu"), graphs=False)
    assert len(casts) == 5
    assert min(casts) >= 1


@pytest.mark.parametrize(("rule", "options"), [("mf", {}), ("ff", {"negatives": "random"})])
def test_units_are_timed_without_the_activations_of_those_before(
    rule: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step keeps what its updates read, once for each time that a unit is run."""
    learner = jobs.make_learner(rule, "mlp", options)
    batch = next(iter(jobs.samples(jobs.BATCH, 0).in_order(jobs.BATCH)))
    held: list[int] = []

    def counted(work: Callable[[], Any], device: torch.device, readings: int) -> float:
        for _ in range(20):
            work()
        gc.collect()
        rows = (jobs.BATCH, 2 * jobs.BATCH)
        held.append(sum(type(o) is torch.Tensor and o.ndim == 2 and len(o) in rows for o in gc.get_objects()))
        return 1.0

    monkeypatch.setattr(layer, "least_seconds", counted)
    layer.unit_seconds(learner, batch, torch.device("cpu"), graphs=False)
    assert len(held) >= 4
    assert max(held) - held[0] < 20


def test_units_that_cannot_be_captured_are_timed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.without_streams(monkeypatch)

    def broken(work: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(layer, "_replayed", broken)
    learner = jobs.make_learner("mf", "mlp", {})
    batch = next(iter(jobs.samples(jobs.BATCH, 0).in_order(jobs.BATCH)))
    with pytest.warns(UserWarning, match="cannot be a CUDA graph and runs eagerly"):
        seconds = layer.unit_seconds(learner, batch, torch.device("cpu"), graphs=True)
    assert len(seconds) == 5
    assert min(seconds) > 0


def test_a_rank_whose_step_cannot_be_captured_goes_on_eagerly(pool: Pool) -> None:
    job: dict[str, Any] = {"rule": "man", "network": "mlp", "options": LOCAL}  # activations forward, parameters back
    found = pool.run(2, jobs.train_uncaptured, **job)
    check(found, jobs.train(None, **job))
    assert [(rank["tried"], rank["still"]) for rank in found] == [(0, False), (1, False)]
    assert [len(rank["words"]) for rank in found] == [0, 1]
    assert "runs eagerly (operation not permitted when stream is capturing)" in found[1]["words"][0]


class FakeGraph:
    """On the CPU: what is captured runs at once, and replays do nothing."""

    def pool(self) -> None:
        return None

    def replay(self) -> None:
        return None


@pytest.mark.parametrize("hands_on", [True, False])
def test_what_a_graph_hands_on_does_not_lie_in_the_memory_of_graphs(
    hands_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of two steps share a pool, and one runs while the other's signal is still being sent."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: nullcontext())
    chain = cast(HasLocalUnits, jobs.make_learner("mf", "mlp", {})).local_units()
    made: list[torch.Tensor] = []
    learn = LocalUnits.learn

    def noted(*arguments: Any, **options: Any) -> Any:
        step, signal, metrics = learn(*arguments, **options)
        made.extend(signal)
        return step, signal, metrics

    monkeypatch.setattr(LocalUnits, "learn", noted)
    batch = next(iter(jobs.samples(jobs.BATCH, 0).in_order(jobs.BATCH)))
    graphed = layer._Graphed(chain, range(2), batch, None, hands_on=hands_on, pool=None)
    signal, _ = graphed.learn(batch, None)
    assert len(made) == 1
    assert len(signal) == (1 if hands_on else 0)
    for tensor, value in zip(signal, made, strict=False):
        assert torch.equal(tensor, value)
        assert tensor.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()


def test_looking_at_data_leaves_every_tensor_with_its_owner(pool: Pool) -> None:
    assert pool.run(2, jobs.moved_by_looking) == [0, 0]


def test_what_a_rank_lends_has_been_taken_when_it_learns(pool: Pool) -> None:
    """On a GPU that learning fills, the message would wait for its end, and the rank before for the message."""
    assert pool.run(3, jobs.lent_while_learning) == [[-1, -1, -1], [0, 0, 0], [0, 0, 0]]


def test_small_messages(pool: Pool) -> None:
    found = pool.run(3, jobs.agree)
    assert found == [[(True, False), [4.5, 3.0, None], "from 0", [0, 1, 4]]] * 3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for threads in /proc")
@pytest.mark.parametrize(("form", "mesh"), [("layer", ()), ("data", ()), ("layer,data", (2, 2))])
def test_a_rank_that_leaves_ends_the_threads_of_its_groups(form: str, mesh: tuple[int, ...], pool: Pool) -> None:
    """One of them that is late aborts the process when Python has begun to end."""
    found = pool.run(4, jobs.threads_left, form=form, mesh=mesh)
    assert all(before > 0 for before, _ in found)
    assert [left for _, left in found] == [0, 0, 0, 0]
