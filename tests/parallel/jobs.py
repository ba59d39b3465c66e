"""What the processes of the pool are asked to do, and the same in one process."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bpfree.algorithms import Learner, algorithm
from bpfree.data.batches import Batches
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.experiments.train import InterruptedRunError
from bpfree.networks import cnn, mlp
from bpfree.networks.streams import Stream
from bpfree.parallel import Alone, Ranks, Spread, Team, layer, spread_over
from bpfree.parallel import data as data_parallel
from bpfree.parallel.layer import LayerTeam, Link

CLASSES = 4
SHAPE = (2, 8, 8)
BATCH = 12
SAMPLED: dict[str, Any] = {"batch_size": BATCH, "graphs": True}

NETWORKS = {
    "mlp": lambda: mlp(SHAPE, (24, 20, 16, 12, 8)),
    "mlp-1": lambda: mlp(SHAPE, (24,)),
    "mlp-2": lambda: mlp(SHAPE, (24, 20)),
    "cnn": lambda: cnn(SHAPE, (8, 12)),
    "cnn-bn": lambda: cnn(SHAPE, (6, 8, 10), pool="max", batch_norm=True),
}


def make_learner(rule: str, network: str, options: dict[str, Any]) -> Learner:
    """A float64 learner, the same in every process."""
    torch.manual_seed(3)
    return algorithm(rule).build(NETWORKS[network](), CLASSES, SHAPE, **options).double()


def samples(count: int, seed: int) -> Batches:
    """Images whose class is the quadrant that is lit, with noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    targets = torch.randint(CLASSES, (count,), generator=generator)
    for image, target in zip(images, targets, strict=True):
        row, column = divmod(int(target), 2)
        image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
    return Batches(images, targets, dtype=torch.float64)


def train(
    ranks: Ranks | None,
    *,
    rule: str,
    network: str = "mlp",
    options: dict[str, Any] | None = None,
    form: str = "layer",
    cut: tuple[int, ...] = (),
    mesh: tuple[int, ...] = (),
    training: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train, or go on from `state`, possibly only for `stop_after` decisions; weights, records and checkpoint."""
    learner = make_learner(rule, network, options or {})
    learner_train, validation = samples(60, 0), samples(30, 1)
    config = TrainingConfig(
        **{"batch_size": BATCH, "epochs": 3, "precision": "fp32", "checkpoint_every": 1e9, **(training or {})}
    )
    team: Team = Alone()
    if ranks is not None:
        sample = next(iter(learner_train.in_order(BATCH)))
        team = spread_over(ranks, Spread(form, cut, mesh), learner, sample, **SAMPLED)
    asked = itertools.count(1)
    saved: list[dict[str, Any]] = []
    remembered: list[int] = []
    trainer = Trainer(
        learner,
        learner_train,
        validation,
        config,
        seed=5,
        on_epoch=lambda record: remembered.append(sum(best.numel() for best in trainer._best or ())),
        save=saved.append,
        # only the leader's wish counts
        interrupted=lambda: stop_after is not None and team.leader and next(asked) >= stop_after,
        team=team,
    )
    if state is not None:
        trainer.load_state_dict(copy.deepcopy(state))  # pipes hand tensors over in memory that processes share
    stopped = False
    try:
        trainer.run()
    except InterruptedRunError:
        stopped = True
    if not stopped:
        team.collect(learner)
    held = sum(parameter.requires_grad for parameter in learner.parameters())
    return {
        "weights": {name: value for name, value in learner.state_dict().items() if isinstance(value, Tensor)},
        "history": trainer.progress.history,
        "flops": trainer.progress.flops,
        "steps": trainer.progress.steps,
        "stopped": stopped,
        "state": saved[-1] if saved else None,
        "trained": held,
        "remembered": remembered,
        "team": team.describe(),
    }


def train_in_small_buckets(ranks: Ranks, **arguments: Any) -> dict[str, Any]:
    """`train` with a message for every gradient, as it comes."""
    size, data_parallel.BUCKET_BYTES = data_parallel.BUCKET_BYTES, 1  # type: ignore[misc]
    try:
        return train(ranks, **arguments)
    finally:
        data_parallel.BUCKET_BYTES = size  # type: ignore[misc]


def without_streams(patch: pytest.MonkeyPatch) -> None:
    """Let what handles CUDA streams run on the CPU."""
    patch.setattr(torch.cuda, "current_stream", lambda: None)
    patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def train_uncaptured(ranks: Ranks, **arguments: Any) -> dict[str, Any]:
    """`train` where rank 1 finds, after its rehearsal, that its steps cannot be CUDA graphs."""
    tried: list[Any] = []
    captures: list[bool] = []
    expect = LayerTeam.expect

    def expected(team: LayerTeam, steps: int) -> None:
        captures.append(team.captures)
        team.captures = ranks.rank == 1 and not tried
        expect(team, steps)

    def broken(chain: Any, *given: Any, **options: Any) -> None:
        tried.append(chain)
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        patch.setattr(LayerTeam, "expect", expected)
        patch.setattr(layer, "_Graphed", broken)
        without_streams(patch)
        found = train(ranks, **arguments)
    words = [str(warning.message) for warning in said if "CUDA graph" in str(warning.message)]
    return {**found, "tried": len(tried), "still": any(captures), "words": words}


def refuse(ranks: Ranks, *, rule: str, form: str, network: str = "mlp", **options: Any) -> None:
    """Try to spread what cannot be."""
    cut = options.pop("cut", ())
    learner = make_learner(rule, network, options)
    sample = next(iter(samples(BATCH, 0).in_order(BATCH)))
    spread_over(ranks, Spread(form, cut), learner, sample, **SAMPLED)


def agree(ranks: Ranks) -> list[Any]:
    """The small messages."""
    return [
        ranks.agree(ranks.rank == 0, ranks.rank == 1),
        ranks.add([1.5, float(ranks.rank), None if ranks.rank == 1 else 2.0]),
        ranks.from_leader(f"from {ranks.rank}"),
        ranks.of_all(ranks.rank**2),
    ]


def order_of_an_epoch(ranks: Ranks) -> list[str]:
    """What this rank does in its last epoch, in order: steps, answers, and what all ranks wait for."""
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_update", "_scores", "share_rating", "share_metrics", "add"):
            method = getattr(LayerTeam, name)

            def noted(team: LayerTeam, given: Any, name: str = name, method: Any = method) -> Any:
                done.append(name)
                return method(team, given)

            patch.setattr(LayerTeam, name, noted)
        train(ranks, rule="mf", training={"epochs": 2})
    starts = [index for index, name in enumerate(done) if name == "_update" and done[index - 1] == "add"]
    return done[starts[-1] :]


def order_of_a_borrowing_step(ranks: Ranks) -> list[str]:
    """What this rank does in its second step, in order, where the first one's last block borrows from the second's."""
    done: list[str] = []

    def note(patch: pytest.MonkeyPatch, owner: Any, name: str, words: Callable[..., str]) -> None:
        method = getattr(owner, name)

        def noted(*given: Any, **options: Any) -> Any:
            done.append(words(*given, **options))
            return method(*given, **options)

        patch.setattr(owner, name, noted)

    def kind_of(action: str) -> Callable[..., str]:
        return lambda link, kind, *rest: f"{action} {kind if isinstance(kind, str) else kind[0]}"

    with pytest.MonkeyPatch.context() as patch:
        note(patch, LayerTeam, "_update", lambda *given: "step")
        note(patch, Link, "send", kind_of("send"))
        note(patch, Link, "receive", kind_of("receive"))
        note(patch, Link, "room", lambda link, most=None: "room" if most is None else f"room {most}")
        note(patch, layer, "arrived", lambda pending: "arrived")
        note(patch, layer._Eager, "learn", lambda *given: "learn")
        note(patch, layer._Eager, "end", lambda *given: "end")
        train(ranks, rule="man", options={"host": "greedy", "head": "0c1f", "k": 3}, training={"epochs": 1})
    steps = [index for index, name in enumerate(done) if name == "step"]
    return [name for name in done[steps[1] + 1 : steps[2]] if name != "room"]


def threads_left(ranks: Ranks, *, form: str, mesh: tuple[int, ...] = ()) -> tuple[int, int]:
    """Threads of gloo in this process, while the ranks train together and when it has left."""
    train(ranks, rule="mf", form=form, mesh=mesh, training={"epochs": 1})
    before = _gloo_threads()
    ranks.leave()
    return before, _gloo_threads()


def _gloo_threads() -> int:
    names = [thread / "comm" for thread in Path("/proc/self/task").iterdir()]
    return sum(name.read_text().strip() == "pt_gloo_runloop" for name in names)


def draws(ranks: Ranks) -> list[float]:
    """What a block's random stream gives this rank for its part of a batch, after one step."""
    learner = make_learner("noprop", "mlp-2", {"steps": 2, "width": 16, "noise_seed": 1})
    team = spread_over(ranks, Spread("data"), learner, next(iter(samples(BATCH, 0).in_order(BATCH))), **SAMPLED)
    team.stages(learner)[0].step(next(iter(samples(BATCH, 0).in_order(BATCH))))
    stream = next(module for module in learner.modules() if isinstance(module, Stream))
    drawn: list[float] = stream.uniform((4,), torch.float64).tolist()
    return drawn


def moved_by_looking(ranks: Ranks) -> int:
    """How many parameters and buffers are others after all frozen parts were on this rank's device to look at data."""
    learner = make_learner("cafo", "cnn-bn", {"loss": "ce", "optimizer": "adam"})
    team = spread_over(ranks, Spread("layer"), learner, next(iter(samples(BATCH, 0).in_order(BATCH))), **SAMPLED)

    def to(module: nn.Module, device: torch.device) -> nn.Module:
        """Between two devices PyTorch makes other buffers."""
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.clone()
        return module

    before = [*learner.parameters(), *learner.buffers()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", to)
        with team.assembled(learner):
            pass
    return sum(old is not new for old, new in zip(before, (*learner.parameters(), *learner.buffers()), strict=True))


def lent_while_learning(ranks: Ranks) -> list[int]:
    """How many messages to the rank before are under way when this rank's units begin to learn, by steps."""
    learner = make_learner("man", "cnn-bn", {"optimizer": "adam", "lr": 0.01, "head_pool": "flatten"})
    batch = next(iter(samples(BATCH, 0).in_order(BATCH)))
    team = spread_over(ranks, Spread("layer"), learner, batch, **SAMPLED)
    assert isinstance(team, LayerTeam)
    (stage,) = team.stages(learner)
    under_way: list[int] = []
    learn = layer._Eager.learn

    def noted(part: Any, *given: Any) -> Any:
        under_way.append(-1 if team._back_before is None else len(team._back_before._sent))
        return learn(part, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer._Eager, "learn", noted)
        team.expect(3)
        for _ in range(3):
            stage.step(batch)
        team.drain()
    return under_way


def sent_from_buffers(ranks: Ranks, *, rule: str, options: dict[str, Any], cut: tuple[int, ...]) -> tuple[int, int]:
    """How many tensors this rank sends in a step and an answer, and how many lie where the next messages arrive."""
    learner = make_learner(rule, "mlp", options)
    batch = next(iter(samples(BATCH, 0).in_order(BATCH)))
    team = spread_over(ranks, Spread("layer", cut), learner, batch, **SAMPLED)
    assert isinstance(team, LayerTeam)
    sent: list[Tensor] = []
    send = Link.send

    def noted(link: Link, kind: Any, signal: tuple[Tensor, ...]) -> None:
        sent.extend(signal)
        send(link, kind, signal)

    Link.send = noted  # type: ignore[method-assign]
    try:
        (stage,) = team.stages(learner)
        stage.step(batch)
        with torch.no_grad():
            stage.scores(batch[0])
        team.drain()
    finally:
        Link.send = send  # type: ignore[method-assign]
    links = [link for link in (team._before, team._after) if link is not None]
    buffers = {
        t.untyped_storage().data_ptr() for link in links for many in link._buffers.values() for s in many for t in s
    }
    return len(sent), sum(tensor.untyped_storage().data_ptr() in buffers for tensor in sent)
