"""NoProp: the fourteen tests of its specification, and what its options promise."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bpfree.algorithms import NoProp, _captures, algorithm
from bpfree.algorithms._noprop_parts import EmbeddingKind, Embeddings, SampleNoise, medoid
from bpfree.algorithms._noprop_processes import (
    ContinuousDiffusion,
    DiscreteDiffusion,
    NoiseSchedule,
    cosine_alpha_bars,
    noised,
    posterior,
    prior_loss,
    snr,
)
from bpfree.algorithms.learner import evaluation_mode
from bpfree.data.batches import Batches
from bpfree.errors import UsageError
from bpfree.experiments import Trainer, TrainingConfig
from bpfree.experiments.config import resolve
from bpfree.experiments.train import InterruptedRunError
from bpfree.networks import Denoiser, build_network, mlp
from bpfree.networks.noprop import denoisers
from bpfree.networks.streams import StreamDropout
from tests.reference import noprop as reference

F64 = torch.float64
CLASSES = 3
INPUTS = 5
LR = 0.05


class LinearDenoiser(Denoiser):
    """Logits x A^T + z B^T + t w + bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(INPUTS, CLASSES), nn.Linear(dim, CLASSES, bias=False)
        self.w = nn.Parameter(torch.randn(CLASSES))

    def encode(self, x: Tensor) -> Tensor:
        return self.a(x)

    def decode(self, features: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        timed = 0 * self.w if time is None else time[:, None] * self.w
        return features + self.b(z) + timed


class Oracle(Denoiser):
    """Says a sample's class, which the sample holds in its first value, as surely as `sharpness` asks."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def encode(self, x: Tensor) -> Tensor:
        return self.sharpness * F.one_hot(x[:, 0].long(), CLASSES)

    def decode(self, features: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        return features


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR)


def linear(count: int = 4, dim: int = CLASSES, **options: Any) -> NoProp:
    steps = {"steps": count} if options.get("variant", "dt") == "dt" else {}
    blocks = [LinearDenoiser(dim) for _ in range(count if steps else 1)]
    options = {"optimizer": sgd, "noise_seed": 5, **steps, **options}
    return NoProp(blocks, CLASSES, input_shape=(INPUTS,), **options).double()


def learner(steps: int = 3, **options: Any) -> NoProp:
    branch = nn.Sequential(*mlp((INPUTS,), (8,))[0], StreamDropout(0.2))
    return NoProp([branch], CLASSES, input_shape=(INPUTS,), steps=steps, **{"noise_seed": 1, "width": 8, **options})


def batch(size: int = 8, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return torch.randn(size, INPUTS, dtype=dtype), torch.arange(size) % CLASSES


def weights(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in module.state_dict().values() if isinstance(tensor, Tensor)]


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# 1. coefficients

# t, abar, a, b, c, SNR(t) - SNR(t-1) for T = 10, as the specification prints them
TABLE = """
1 .024092 .154586 .062881 .971955 .024586
2 .094046 .233740 .469853 .690511 .079122
3 .203121 .267143 .598518 .472344 .151088
4 .340810 .295971 .638617 .334198 .262116
5 .493844 .330356 .637874 .237943 .458661
6 .647478 .377217 .608252 .165259 .861030
7 .786911 .445877 .548310 .107106 1.85616
8 .898706 .553418 .444811 .059133 5.17938
9 .972093 .734819 .264904 .020799 25.9607
10 .9999 .996467 .003533 .000100 9964.17
"""


def test_coefficients_of_the_specification() -> None:
    printed = np.array([row.split() for row in TABLE.strip().splitlines()], float)
    bars = cosine_alpha_bars(10, 1e-4, 1 - 1e-4)
    a, b, c = posterior(bars[:-1], bars[1:])
    for column, values in zip(printed.T[1:], (bars[1:], a, b, c, snr(bars).diff()), strict=True):
        np.testing.assert_allclose(values.numpy(), column, rtol=3e-6, atol=6e-7)
    assert bars[0] == pytest.approx(1e-4)


@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_coefficients_agree_with_numpy_and_keep_mean_and_variance(steps: int) -> None:
    low, high = (1e-4, 1 - 1e-4) if steps <= 10 else (1e-6, 1 - 1e-6)
    bars = cosine_alpha_bars(steps, low, high)
    expected = reference.cosine_alpha_bars(steps, low, high)
    np.testing.assert_allclose(bars.numpy(), expected, rtol=1e-12)
    before, after = bars[:-1], bars[1:]
    a, b, c = posterior(before, after)
    for got, wanted in zip((a, b, c), reference.coefficients(expected), strict=True):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-9)
        assert (got > 0).all()
    assert (bars.diff() > 0).all()
    assert (snr(bars).diff() > 0).all()
    alpha = before / after
    same = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(a + b * before.sqrt(), after.sqrt(), **same)
    torch.testing.assert_close(b**2 * (1 - before) + c, 1 - after, **same)
    torch.testing.assert_close(alpha * (1 - after) + 1 - alpha, 1 - before, **same)
    torch.testing.assert_close(a**2 / (2 * c), 0.5 * snr(bars).diff(), **same)
    whole = (bars[0] / bars[-1]).sqrt() * (1 - bars[-1]) / (1 - bars[0])
    torch.testing.assert_close(b.prod(), whole, **same)


def test_a_jump_is_the_steps_it_replaces() -> None:
    bars = cosine_alpha_bars(6, 1e-4, 0.999)
    mean, scale, variance = torch.zeros((), dtype=F64), torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    for t in range(1, 6):
        a, b, c = posterior(bars[t], bars[t + 1])
        mean, scale, variance = a + b * mean, b * scale, b**2 * variance + c
    torch.testing.assert_close(torch.stack([mean, scale, variance]), torch.stack(posterior(bars[1], bars[6])))


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.4), (0.0, 0.9), (0.1, 1.0), (0.3, 0.31)])
def test_clamps_that_make_no_schedule_are_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError, match=r"alpha_bar_min|clamps"):
        cosine_alpha_bars(10, low, high)


# 2. Monte Carlo


def test_noising_and_denoising_chains_have_the_marginals() -> None:
    count, u, T = 100_000, 1.3, 6
    bars = cosine_alpha_bars(T, 1e-3, 0.999)
    alpha = torch.cat([bars[:-1] / bars[1:], bars[-1:]])

    def agrees(z: Tensor, bar: Tensor) -> None:
        mean, variance = bar.sqrt() * u, 1 - bar
        assert abs(z.mean() - mean) < 4 * (variance / count).sqrt()
        assert abs(z.var() - variance) < 4 * variance * (2 / count) ** 0.5

    z = alpha[T].sqrt() * u + (1 - alpha[T]).sqrt() * torch.randn(count, dtype=F64)
    for t in range(T, -1, -1):
        agrees(z, bars[t])
        z = alpha[t - 1].sqrt() * z + (1 - alpha[t - 1]).sqrt() * torch.randn(count, dtype=F64)
    z = noised(bars[0], torch.full((count,), u, dtype=F64), torch.randn(count, dtype=F64))
    for t in range(1, T + 1):
        a, b, c = posterior(bars[t - 1], bars[t])
        z = a * u + b * z + c.sqrt() * torch.randn(count, dtype=F64)
        agrees(z, bars[t])


# 3. losses and one block's update against NumPy


def linear_arrays(model: NoProp, index: int) -> dict[str, Any]:
    block, readout = model.network[index], model.readout
    arrays = {"A": block.a.weight, "B": block.b.weight, "w": block.w, "bias": block.a.bias}
    if readout is not None:
        arrays |= {"F": readout.linear.weight, "f": readout.linear.bias}
    return {name: tensor.detach().numpy().copy() for name, tensor in arrays.items()}


def upcoming(model: NoProp, index: int, *, time: bool, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """What a block's stream will give next: times, and the two noises."""
    stream = copy.deepcopy(model.noise.streams[index])
    t = stream.uniform((shape[0],), F64).numpy() if time else np.zeros(shape[0])
    return t, stream.normal((2, *shape), F64).numpy()


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("embeddings", ["onehot", "learned"])
@pytest.mark.parametrize("index", [0, 2, 3])
def test_one_update_of_a_block_agrees_with_numpy(embeddings: str, scale: float, index: int) -> None:
    dim = CLASSES if embeddings == "onehot" else 4
    width = None if dim == CLASSES else dim
    model = linear(embeddings=embeddings, embedding_dim=width, embedding_scale=scale, dim=dim, eta=0.3)
    x, y = batch()
    _, (before, last) = upcoming(model, index, time=False, shape=(len(x), dim))
    old = linear_arrays(model, index)
    del old["w"]
    table = model.embeddings.weight.detach().numpy().copy()
    np.testing.assert_allclose(table @ table.T, scale**2 * np.eye(CLASSES), atol=2e-6)  # drawn in float32
    bars = reference.cosine_alpha_bars(4, 1e-4, 1 - 1e-4)
    terms, gradients = reference.dt_block(
        index + 1, x.numpy(), y.numpy(), before, last, W_E=table, abar=bars, eta=0.3, **old
    )
    got = model.learn_block(index, (x, y))
    for name, value in got.items():
        assert value.item() == pytest.approx(terms[name], rel=1e-9)
    assert ("prior" in got) == (embeddings == "learned")
    new = linear_arrays(model, index)
    for name, value in old.items():
        np.testing.assert_allclose(new[name], value - LR * gradients[name], rtol=1e-9, atol=1e-11)
    # what learns is W_E / scale
    moved = scale**2 * gradients["W_E"] if embeddings == "learned" else 0
    np.testing.assert_allclose(model.embeddings.weight.detach().numpy(), table - LR * moved, rtol=1e-9, atol=1e-11)


def test_float32_agrees_with_numpy() -> None:
    model, double = linear(eta=0.3).float(), linear(eta=0.3)
    double.load_state_dict(model.state_dict())
    x, y = batch()
    single, exact = model.learn_block(1, (x.float(), y)), double.learn_block(1, (x, y))
    for name, value in single.items():
        assert value.item() == pytest.approx(exact[name].item(), rel=1e-5)
    for a, b in zip(model.network[1].parameters(), double.network[1].parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma_min", [-17.0, -20.0])
def test_a_schedule_that_ends_without_noise_stays_finite(gamma_min: float) -> None:
    """1 - sigmoid(20) is 0 in float32, and the derivative of its square root is not a number."""
    model = learner(variant="ct", gamma_min=gamma_min).float()
    x, y = batch()
    model.step((x.float(), y))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.scores(x.float()).isfinite().all()


def test_prior_vanishes_with_its_signal_and_is_the_divergence_of_gaussians() -> None:
    u = torch.randn(7, 4, dtype=F64)
    for bar in (1e-4, 0.3, 0.9):
        got = prior_loss(torch.tensor(bar, dtype=F64), u)
        assert got.item() == pytest.approx(reference.prior(bar, u.numpy()), rel=1e-9)
    assert abs(prior_loss(torch.tensor(1e-12, dtype=F64), u).item()) < 1e-10


def test_continuous_loss_agrees_with_numpy() -> None:
    model = linear(variant="ct", eta=0.7)
    x, y = batch()
    t, (before, last) = upcoming(model, 0, time=True, shape=(len(x), CLASSES))
    schedule = model.process.schedule
    parts = (schedule.low, schedule.log_range.exp(), F.softplus(schedule.slopes), schedule.shifts)
    arrays = [part.detach().numpy() for part in (*parts, F.softplus(schedule.heights))]
    expected = reference.ct_terms(
        t, x.numpy(), y.numpy(), before, last, schedule=arrays, eta=0.7, **linear_arrays(model, 0)
    )
    got = model.learn_block(0, (x, y))
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected, rel=1e-6)


def test_the_schedule_learns_from_all_that_it_is_in() -> None:
    # weight and noise of the denoising loss, noise of the read-out, the prior
    model = linear(variant="ct", eta=0.7)
    x, y = batch()
    t, (before, last) = upcoming(model, 0, time=True, shape=(len(x), CLASSES))
    arrays = linear_arrays(model, 0)
    start = {name: values.detach().clone() for name, values in model.process.schedule.named_parameters()}

    def loss(**moved: Tensor) -> float:
        raw = {**start, **moved}
        spans = raw["log_range"].exp(), F.softplus(raw["slopes"]), raw["shifts"], F.softplus(raw["heights"])
        schedule = [part.numpy() for part in (raw["low"], *spans)]
        terms = reference.ct_terms(t, x.numpy(), y.numpy(), before, last, schedule=schedule, eta=0.7, **arrays)
        return float(sum(terms.values()))

    model.learn_block(0, (x, y))
    for name, values in model.process.schedule.named_parameters():
        found = ((start[name] - values.detach()) / LR).flatten()[:3]
        for place, slope in enumerate(found.tolist()):
            step = torch.zeros_like(start[name])
            step.view(-1)[place] = 1e-3
            wanted = (loss(**{name: start[name] + step}) - loss(**{name: start[name] - step})) / 2e-3
            assert slope == pytest.approx(wanted, rel=1e-3, abs=1e-5), (name, place)


@pytest.mark.parametrize("sigma", [0.0, 0.4])
def test_flow_loss_agrees_with_numpy(sigma: float) -> None:
    model = linear(variant="fm", embeddings="learned", embedding_dim=4, dim=4, path_sigma=sigma, eta=0.7)
    x, y = batch()
    t, (start, path) = upcoming(model, 0, time=True, shape=(len(x), 4))
    table = model.embeddings.weight.detach().numpy().copy()
    expected = reference.fm_terms(
        t, x.numpy(), y.numpy(), start, path, W_E=table, sigma=sigma, eta=0.7, **linear_arrays(model, 0)
    )
    got = model.learn_block(0, (x, y))
    assert {name: value.item() for name, value in got.items()} == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("sigma", [0.0, 0.4])
def test_embeddings_of_a_flow_learn_from_path_target_and_readout(sigma: float) -> None:
    model = linear(variant="fm", embeddings="learned", embedding_dim=4, dim=4, path_sigma=sigma, eta=0.7)
    x, y = batch()
    t, (start, path) = upcoming(model, 0, time=True, shape=(len(x), 4))
    arrays, table = linear_arrays(model, 0), model.embeddings.weight.detach().numpy().copy()
    readout = {name: arrays.pop(name) for name in ("F", "f")}

    def loss(W_E: np.ndarray) -> float:
        terms = reference.fm_terms(
            t, x.numpy(), y.numpy(), start, path, W_E=W_E, sigma=sigma, eta=0.7, **arrays, **readout
        )
        return float(sum(terms.values()))

    slopes = np.zeros_like(table)
    for place in np.ndindex(table.shape):
        moved = np.zeros_like(table)
        moved[place] = 1e-6
        slopes[place] = (loss(table + moved) - loss(table - moved)) / 2e-6
    model.learn_block(0, (x, y))
    np.testing.assert_allclose((table - model.embeddings.weight.detach().numpy()) / LR, slopes, rtol=1e-5, atol=1e-7)


def test_the_radial_readout_is_the_papers() -> None:
    model = linear(embeddings="learned", embedding_dim=4, dim=4, p_out="radial", radial_sigma=0.3)
    z = torch.randn(7, 4, dtype=F64)
    table, readout = model.embeddings.weight.detach().numpy(), model.readout
    said = z.numpy() @ readout.linear.weight.detach().numpy().T + readout.linear.bias.detach().numpy()
    shares = np.exp(said) / np.exp(said).sum(1, keepdims=True)
    distances = ((shares @ table)[:, None] - table[None]) ** 2
    expected = np.exp(-distances.sum(2) / (2 * 0.3**2))
    found = readout(z, model.embeddings).softmax(1).detach().numpy()
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-9)


# 4. isolation


def all_terms(model: NoProp, index: int, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    draws = model.process.draw(y, model.shared, model.noise.streams[index])
    return model.process.terms(index, model.network[index], x, y, model.shared, draws)


def test_a_blocks_loss_reaches_no_other_block() -> None:
    model = learner()
    x, y = batch(dtype=torch.float32)
    for index in range(3):
        terms = all_terms(model, index, x, y)
        model.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        for other, block in enumerate(model.network):
            reached = [parameter.grad is not None for parameter in block.parameters()]
            assert all(reached) if other == index else not any(reached)


def test_other_blocks_and_the_readout_leave_a_block_alone() -> None:
    plain, disturbed = learner(), learner()
    disturbed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for module in (disturbed.network[0], disturbed.network[2], disturbed.readout):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    x, y = batch(dtype=torch.float32)
    for _ in range(2):
        a, b = plain.learn_block(1, (x, y)), disturbed.learn_block(1, (x, y))
        assert torch.equal(a["denoising"], b["denoising"])
        assert not torch.equal(a["read-out"], b["read-out"])
    assert equal(weights(plain.network[1]), weights(disturbed.network[1]))


# 5. order


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [(torch.randn(8, INPUTS, generator=generator), torch.arange(8) % CLASSES) for _ in range(4)]


def trained_in(order: Sequence[int]) -> NoProp:
    torch.manual_seed(3)
    model = learner()
    for index in order:
        torch.rand(index + 1)  # whatever else draws from the global generator
        for pair in batches():
            model.learn_block(index, pair)
    return model


def trained_alone(index: int) -> list[Tensor]:
    torch.set_num_threads(1)
    return weights(trained_in([index]).network[index])


def test_blocks_learn_the_same_in_any_order_or_alone() -> None:
    torch.manual_seed(3)
    together = learner()
    for pair in batches():
        together.step(pair)
    expected = [weights(block) for block in together.network]
    for order in itertools.permutations(range(3)):
        assert all(equal(a, weights(b)) for a, b in zip(expected, trained_in(order).network, strict=True))
    for index in range(3):
        assert equal(expected[index], trained_alone(index))


def test_blocks_learn_the_same_in_processes_of_their_own() -> None:
    expected = [weights(block) for block in trained_in(range(3)).network]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert all(equal(a, b) for a, b in zip(expected, pool.map(trained_alone, range(3)), strict=True))


@pytest.mark.parametrize("embeddings", ["learned", "prototype"])
def test_an_interrupted_run_ends_in_the_same_bits(embeddings: str) -> None:
    x, y = torch.randn(48, INPUTS), torch.arange(48) % CLASSES
    part = Batches(x, y, device="cpu")
    config = TrainingConfig(batch_size=8, epochs=3)

    def model() -> NoProp:
        torch.manual_seed(0)
        return learner(embeddings=embeddings)

    straight, stopped, resumed = model(), model(), model()
    Trainer(straight, part, part, config).run()
    done: list[int] = []
    saved: list[dict[str, Any]] = []
    trainer = Trainer(
        stopped,
        part,
        part,
        config,
        on_steps=lambda *_: done.append(1),
        save=lambda state: saved.append(copy.deepcopy(state)),
        interrupted=lambda: len(done) == 1,
    )
    with pytest.raises(InterruptedRunError):
        trainer.run()
    torch.rand(3)
    again = Trainer(resumed, part, part, config)
    again.load_state_dict(saved[-1])
    assert 0 < again.progress.steps < 18
    again.run()
    assert equal(weights(straight), weights(resumed))


# 6. estimates


def test_estimates_are_in_the_hull_of_the_embeddings() -> None:
    logits = 3 * torch.randn(20, CLASSES, dtype=F64)
    onehot = Embeddings("onehot", CLASSES, CLASSES).double()
    assert torch.equal(onehot.estimate(logits), logits.softmax(1))
    learned = Embeddings("learned", CLASSES, 7).double()
    coefficients = torch.linalg.lstsq(learned.weight.T, learned.estimate(logits).T).solution.T
    assert (coefficients >= 0).all()
    torch.testing.assert_close(coefficients.sum(1), torch.ones(20, dtype=F64))
    # drawn in float32
    torch.testing.assert_close(learned.weight @ learned.weight.T, torch.eye(CLASSES, dtype=F64), rtol=0, atol=2e-6)


def test_velocity_is_linear_in_the_logits() -> None:
    model = linear(variant="fm", embeddings="learned", embedding_dim=4, dim=4)
    logits = torch.randn(5, CLASSES, dtype=F64)
    one, three = (model.process.predict(scale * logits, model.shared) for scale in (1, 3))
    torch.testing.assert_close(three, 3 * one)
    torch.testing.assert_close(one, logits @ model.embeddings.weight)


# 7. embeddings


def test_learned_embeddings_learn_from_target_noising_and_projection() -> None:
    model = learner(embeddings="learned", embedding_dim=6)
    x, y = batch(dtype=torch.float32)
    table = model.embeddings.weight.detach().clone()
    terms = all_terms(model, 0, x, y)
    whole = torch.autograd.grad(terms["denoising"], model.embeddings.weight, retain_graph=True)[0]
    absent = torch.autograd.grad(terms["read-out"], model.embeddings.weight)[0]
    assert whole.abs().sum(1).all()
    assert absent.abs().sum() > 0  # through z_T
    model.step((x, y))
    assert not torch.equal(table, model.embeddings.weight)


def test_one_shared_update_per_step_follows_the_sum_of_the_blocks_gradients() -> None:
    options = {"embeddings": "learned", "embedding_dim": 6, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    model = learner(shared_updates="step", **options)
    alone, separate = ([copy.deepcopy(model) for _ in model.network] for _ in range(2))
    x, y = batch(dtype=torch.float32)
    shared = [model.embeddings.weight, *model.readout.parameters()]
    expected = [parameter.detach().clone() for parameter in shared]
    for index, other in enumerate(alone):
        parameters = [other.embeddings.weight, *other.readout.parameters()]
        gradients = torch.autograd.grad(sum(all_terms(other, index, x, y).values()), parameters, retain_graph=True)
        for wanted, gradient in zip(expected, gradients, strict=True):
            wanted -= 0.1 * gradient
    model.step((x, y))
    for parameter, wanted in zip(shared, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-4, atol=1e-5)
    for index, other in enumerate(separate):  # a block's own update is the same as ever
        other.learn_block(index, (x, y))
        assert equal(weights(model.network[index]), weights(other.network[index]))


def test_onehot_embeddings_stay_the_identity() -> None:
    model = learner()
    model.step(batch(dtype=torch.float32))
    assert not model.embeddings.weight.requires_grad
    assert torch.equal(model.embeddings.weight, torch.eye(CLASSES))


# 8. predictions


@pytest.mark.parametrize("options", [{}, {"variant": "ct", "steps": 20}, {"variant": "fm", "steps": 20}])
def test_predictions_depend_on_seed_and_draw_but_not_on_the_batch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = learner(**options)
    x, y = batch(12, torch.float32)
    model.step((x, y))
    scores = model.scores(x)
    assert torch.equal(scores, model.scores(x))
    parts = torch.cat([model.scores(x[:5]), model.scores(x[5:])])
    torch.testing.assert_close(scores, parts)
    assert not torch.allclose(scores, model.sample(x, draw=1))
    torch.manual_seed(0)
    other = learner(noise_seed=2, **options)
    other.network.load_state_dict(model.network.state_dict())
    other.embeddings.load_state_dict(model.embeddings.state_dict())
    if model.readout is not None:
        other.readout.load_state_dict(model.readout.state_dict())
    assert not torch.allclose(scores, other.scores(x))


def test_noise_of_samples_steps_and_draws_is_standard_and_independent() -> None:
    x = torch.randn(4000, 2)
    key = torch.tensor(3)
    noises = [SampleNoise(x, key, draw, 5, F64)(step) for draw, step in itertools.product(range(2), range(2))]
    table = torch.cat([*noises], 1)
    correlation = torch.corrcoef(table.T) - torch.eye(20)
    assert correlation.abs().max() < 5 / 4000**0.5
    assert table.mean(0).abs().max() < 4.5 / 4000**0.5
    assert (table.var(0) - 1).abs().max() < 4.5 * (2 / 4000) ** 0.5


def test_diagnostics_see_embeddings_that_meet() -> None:
    model = learner(embeddings="learned", embedding_dim=3)
    with torch.no_grad():
        model.embeddings.weight.copy_(torch.tensor([[0.0, 0, 0], [3, 4, 0], [3, 4, 2], [9, 9, 9]])[:CLASSES])
    batch = torch.randn(6, INPUTS), torch.arange(6) % CLASSES
    assert model.diagnostics(batch)["closest embeddings"].item() == pytest.approx(2)
    assert "closest embeddings" not in learner().diagnostics(batch)


# 9. oracles


def oracle(sharpness: float, **options: Any) -> NoProp:
    steps = options.pop("steps", 10)
    count = steps if options.get("variant", "dt") == "dt" else 1
    blocks = [Oracle(sharpness) for _ in range(count)]
    model = NoProp(blocks, CLASSES, input_shape=(INPUTS,), steps=steps, noise_seed=0, **options)
    if model.readout is not None:
        with torch.no_grad():
            model.readout.linear.weight.copy_(torch.eye(CLASSES))
            model.readout.linear.bias.zero_()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "mean"},
        {"sampler": "last-mean"},
        {"p_out": "radial"},
        {"variant": "ct", "steps": 1000},
        # these keep the noise that the schedule ends with, so there must be little
        {"variant": "ct", "steps": 1000, "sampler": "stochastic", "gamma_min": -7.0},
        {"variant": "ct", "steps": 1000, "sampler": "ode", "gamma_min": -7.0},
    ],
)
def test_oracle_blocks_are_always_right_and_empty_ones_guess(options: dict[str, Any]) -> None:
    count = 600 if options.get("variant") == "ct" else 3000
    y = torch.arange(count) % CLASSES
    x = torch.randn(count, INPUTS)
    x[:, 0] = y
    assert torch.equal(oracle(100.0, **options).scores(x).argmax(1), y)
    guesses = (oracle(0.0, **options).scores(x).argmax(1) == y).double().mean().item()
    assert guesses == pytest.approx(1 / CLASSES, abs=4.5 * (2 / 9 / count) ** 0.5)


class Turning(Oracle):
    """Says the class early on, and others later."""

    def decode(self, features: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        assert time is not None
        return torch.where(time[:, None] < 0.5, features, -features)


def test_diagnostics_rate_every_block_or_the_first_and_the_last_step() -> None:
    y = torch.arange(9) % CLASSES
    x = torch.randn(9, INPUTS)
    x[:, 0] = y
    blocks = oracle(100.0, steps=3)
    with torch.no_grad():
        blocks.network[1].sharpness.neg_()
    found = {name: value.item() for name, value in blocks.diagnostics((x, y)).items()}
    assert found == {"block 0 accuracy": 1, "block 1 accuracy": 0, "block 2 accuracy": 1}
    for variant in ("ct", "fm"):
        model = NoProp([Turning(100.0)], CLASSES, input_shape=(INPUTS,), variant=variant, steps=4)
        found = {name: value.item() for name, value in model.diagnostics((x, y)).items()}
        assert found == {"first step accuracy": 1, "last step accuracy": 0}


def test_only_several_blocks_share_embeddings_that_learn() -> None:
    learned = {"embeddings": "learned", "embedding_dim": 4}
    assert oracle(1.0).channels == ()
    assert NoProp([Oracle(1.0)], CLASSES, input_shape=(INPUTS,), variant="ct", **learned).channels == ()
    assert len(NoProp([Oracle(1.0), Oracle(1.0)], CLASSES, input_shape=(INPUTS,), steps=2, **learned).channels) == 1


@pytest.mark.parametrize("steps", [4, 2])
@pytest.mark.parametrize(("sampler", "noisy"), [("stochastic", 0), ("last-mean", 1), ("mean", 4)])
def test_inference_of_blocks_agrees_with_numpy(sampler: str, noisy: int, steps: int) -> None:
    """All steps but the last `noisy` draw noise; with two steps the second and the fourth abar are the stops."""
    model = linear(4, sampler=sampler)
    x, _ = batch()
    noise = model._sample_noise(x, 0)
    stops = reference.cosine_alpha_bars(4, 1e-4, 1 - 1e-4)[:: 4 // steps]
    z = noise(0).numpy()
    for step, (a, b, c) in enumerate(zip(*reference.coefficients(stops), strict=True)):
        w = linear_arrays(model, step * 4 // steps)
        estimate = reference.softmax(x.numpy() @ w["A"].T + z @ w["B"].T + w["bias"])
        z = a * estimate + b * z
        if step < steps - noisy:
            z = z + np.sqrt(c) * noise(step + 1).numpy()
    np.testing.assert_allclose(model.sample(x, steps=steps).numpy(), z @ w["F"].T + w["f"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 7, 10])
def test_fewer_steps_than_blocks_denoise_too(steps: int) -> None:
    x = torch.randn(60, INPUTS)
    x[:, 0] = torch.arange(60) % CLASSES
    assert torch.equal(oracle(100.0).sample(x, steps=steps).argmax(1), x[:, 0].long())


def test_more_steps_than_blocks_are_refused() -> None:
    with pytest.raises(UsageError, match="1 to 10 steps"):
        oracle(1.0).sample(torch.randn(2, INPUTS), steps=11)


# 10. the learned schedule


def test_schedule_falls_between_its_ends() -> None:
    for _ in range(20):
        schedule = NoiseSchedule(-5.0, 6.0).double()
        for parameter in schedule.parameters():
            nn.init.normal_(parameter)
        gamma, slope = schedule(torch.linspace(0, 1, 200, dtype=F64))
        assert (gamma.diff() < 0).all()
        assert (slope < 0).all()
        torch.testing.assert_close(gamma[0], schedule.high)
        torch.testing.assert_close(gamma[-1], schedule.low)
    fresh = NoiseSchedule(-5.0, 6.0)
    assert (fresh.low.item(), fresh.high.item()) == pytest.approx((-5, 6))


def test_slope_of_the_signal_to_noise_ratio_is_autograds() -> None:
    schedule = NoiseSchedule(-3.0, 4.0).double()
    time = torch.rand(50, dtype=F64, requires_grad=True)
    gamma, slope = schedule(time)
    expected = torch.autograd.grad((-gamma).exp().sum(), time)[0]
    torch.testing.assert_close(-slope * (-gamma).exp(), expected)


def test_ode_keeps_the_noise_of_a_sample() -> None:
    """d/dt [sqrt(abar) u + sqrt(1 - abar) e] is the drift of the ODE, which many Euler steps follow."""
    process = ContinuousDiffusion(4000, 1.0, -3.0, 3.0).double()
    u, e = torch.randn(2, 6, dtype=F64)
    model = oracle(1e4, variant="ct", steps=10, sampler="ode").double()
    schedule = process.schedule
    time = torch.rand(1, dtype=F64, requires_grad=True)
    gamma, slope = schedule(time)
    bar = torch.sigmoid(-gamma)
    path = bar.sqrt() * u + (1 - bar).sqrt() * e
    speed = torch.stack([torch.autograd.grad(value, time, retain_graph=True)[0][0] for value in path])
    torch.testing.assert_close(speed, -slope / 2 * (bar.sqrt() * u - bar * path))
    x = torch.zeros(4, INPUTS, dtype=F64)
    start = torch.randn(4, CLASSES, dtype=F64)
    way = process.trajectory(model.blocks(), x, model.shared, lambda step: start, "ode", 4000)
    end = list(way)[-1][1]
    first, last = torch.sigmoid(-schedule.high), torch.sigmoid(-schedule.low)
    target = model.embeddings(torch.zeros(4, dtype=torch.int64))
    noise = (start - first.sqrt() * target) / (1 - first).sqrt()
    torch.testing.assert_close(end, noised(last, target, noise), rtol=0, atol=5e-3)


def test_both_ends_of_the_schedule_learn() -> None:
    model = linear(variant="ct")
    schedule = model.process.schedule
    terms = all_terms(model, 0, *batch())
    gradients = torch.autograd.grad(sum(terms.values()), list(schedule.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


# 11. flow matching


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_the_true_velocity_leads_to_the_embedding(steps: int) -> None:
    start = torch.randn(6, CLASSES, dtype=F64)
    y = torch.arange(6) % CLASSES
    goal = torch.eye(CLASSES, dtype=F64)[y]

    class Straight(Denoiser):
        def encode(self, x: Tensor) -> Tensor:
            return goal - start

        def decode(self, features: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
            return features

    model = linear(variant="fm")
    way = model.process.trajectory([Straight()], start, model.shared, lambda step: start, "ode", steps)
    end = list(way)[-1][1]
    torch.testing.assert_close(end, goal, rtol=0, atol=1e-10)
    assert torch.equal(model.process.scores(end, model.shared).argmax(1), y)


def test_the_class_of_a_flow_is_the_nearest_embedding() -> None:
    embeddings = Embeddings("learned", CLASSES, 4).double()
    with torch.no_grad():
        embeddings.weight.mul_(torch.tensor([[1.0], [5.0], [0.2]]))  # the largest inner product would mislead
    z = torch.randn(50, 4, dtype=F64)
    assert torch.equal(embeddings.log_similarity(z, 1.0).argmax(1), torch.cdist(z, embeddings.weight).argmin(1))


def test_a_flow_of_fixed_embeddings_has_no_readout() -> None:
    assert linear(variant="fm").readout is None
    assert linear(variant="fm", embeddings="learned", embedding_dim=4, dim=4).readout is not None


# 12. sizes and prototypes

PAPERS_PRESETS = {
    # blocks of the paper's sizes (columns of SIZES), passes over the data, and the paper's own steps
    "noprop-mnist-learned": (("dt", (1, 28, 28), 10), 1, 100, 10),
    "noprop-cifar10-learned": (("dt", (3, 32, 32), 10), 1, 150, 10),
    "noprop-mnist-prototype": (("dt", (1, 28, 28), 10), 2, 100, 10),
    "noprop-cifar10-prototype": (("dt", (3, 32, 32), 10), 2, 150, 10),
    "noprop-mnist-fm-prototype": (("ct", (1, 28, 28), 10), 2, 100, 1000),
    "noprop-cifar10-fm-prototype": (("ct", (3, 32, 32), 10), 2, 500, 1000),
    "noprop_backprop-mnist-learned": (("dt", (1, 28, 28), 10), 1, 100, 10),
    "noprop_backprop-cifar10-learned": (("dt", (3, 32, 32), 10), 1, 150, 10),
    "noprop_backprop-mnist-prototype": (("dt", (1, 28, 28), 10), 2, 100, 10),
    "noprop_backprop-cifar10-prototype": (("dt", (3, 32, 32), 10), 2, 150, 10),
}


# exact parameters per block that round to the paper's Table 5 (v2): one-hot, 20 dimensions, prototypes
SIZES = {
    ("dt", (1, 28, 28), 10): (919_946, 922_506, 1_401_738),
    ("dt", (3, 32, 32), 10): (1_215_434, 1_217_994, 1_992_714),
    ("dt", (3, 32, 32), 100): (1_250_084, 1_229_604, 2_004_324),
    ("ct", (1, 28, 28), 10): (867_722, 870_282, 1_482_122),
    ("ct", (3, 32, 32), 10): (1_163_210, 1_165_770, 2_073_098),
    ("ct", (3, 32, 32), 100): (1_197_860, 1_177_380, 2_084_708),
}


@pytest.mark.parametrize("name", PAPERS_PRESETS)
def test_presets_with_wider_embeddings_are_the_papers(name: str) -> None:
    (kind, shape, classes), column, epochs, steps = PAPERS_PRESETS[name]
    config = resolve(preset=name)
    model = algorithm(config.algorithm).build(build_network(config.network, shape), classes, shape, **config.parameters)
    sizes = {sum(p.numel() for p in block.parameters()) for block in model.network}
    assert sizes == {SIZES[kind, shape, classes][column]}
    assert (len(model.network), config.parameters["steps"]) == (10 if kind == "dt" else 1, steps)
    dim = 20 if column == 1 else int(np.prod(shape))
    assert tuple(model.embeddings.weight.shape) == (classes, dim)
    training = config.training
    assert (training.epochs, training.patience, training.batch_size) == (epochs, epochs, 128)
    assert (config.parameters["lr"], config.parameters["weight_decay"]) == (1e-3, 1e-3)
    assert config.parameters["optimizer"] == ("adam" if kind == "ct" else "adamw")


@pytest.mark.parametrize(("kind", "shape", "classes"), SIZES)
def test_blocks_have_the_papers_sizes(kind: str, shape: tuple[int, ...], classes: int) -> None:
    counts = []
    for dim, prototypes in ((classes, False), (20, False), (int(np.prod(shape)), True)):
        network = build_network(f"noprop:{kind}", shape)
        block = denoisers(network, 1, classes, dim, shape, timed=kind == "ct", prototypes=prototypes)[0]
        counts.append(sum(parameter.numel() for parameter in block.parameters()))
    assert tuple(counts) == SIZES[kind, shape, classes]


def test_a_prototype_has_the_smallest_median_distance() -> None:
    # median distances are 2, 1, 2, 8, 28; the mean distance would be smallest at 2
    line = torch.tensor([[0.0], [1.0], [2.0], [9.0], [30.0]])
    assert medoid(line).item() == 1
    assert medoid(torch.tensor([[5.0], [0.0], [1.0], [2.0]])).item() == 2


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_training_begins_by_choosing_prototypes(scale: float) -> None:
    x = torch.randn(60, INPUTS)
    y = torch.arange(60) % CLASSES
    chosen = []
    model = learner(steps=2, embeddings="prototype", embedding_scale=scale)
    part = Batches(x, y, device="cpu")
    config = TrainingConfig(batch_size=20, epochs=1, precision="fp32")
    Trainer(
        model, part, part, config, on_steps=lambda *_: chosen.append(model.embeddings.weight.detach().clone())
    ).run()
    expected = scale * torch.stack(
        [x[y == c][np.median(torch.cdist(x[y == c], x[y == c]), 1).argmin()] for c in range(CLASSES)]
    )
    assert chosen[0].shape == expected.shape
    # the first steps of Adam move a value of W_E / scale by no more than the rate each
    assert (chosen[0] - expected).abs().max() < scale * 3 * 2 * 1e-3 * 1.5


# 13. training and inference see the same


def test_blocks_meet_at_inference_what_they_were_trained_on() -> None:
    model = oracle(100.0, steps=6, alpha_bar_max=0.99)
    count = 20_000
    x = torch.randn(count, INPUTS)
    x[:, 0] = torch.arange(count) % CLASSES
    targets = torch.eye(CLASSES)[x[:, 0].long()]
    met: list[Tensor] = []
    for block in model.network:
        block.register_forward_pre_hook(lambda module, inputs: met.append(inputs[1].detach()))
    model.scores(x)
    for z, bar in zip(met, model.process.alpha_bars[:-1].tolist(), strict=True):
        residual = z - bar**0.5 * targets
        # the chain starts from N(0, I) and not from q(z_0 | y): off by at most sqrt(abar_0) in the mean
        assert residual.mean(0).abs().max() < 4.5 * ((1 - bar) / count) ** 0.5 + 0.01
        assert residual.var().item() == pytest.approx(1 - bar, rel=0.03)


# 14. labels


@pytest.mark.parametrize("variant", ["dt", "ct", "fm"])
def test_prediction_never_reads_an_embedding_of_a_label(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learner(variant=variant)
    x, y = batch(dtype=torch.float32)
    model.step((x, y))
    expected = model.sample(x, steps=3)

    def refuse(self: Embeddings, targets: Tensor) -> Tensor:
        raise AssertionError("a label was read")

    monkeypatch.setattr(Embeddings, "forward", refuse)
    y.fill_(-999)
    assert torch.equal(expected, model.sample(x, steps=3))


# options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "xt"}, "variant"),
        ({"embeddings": "two-hot"}, "embeddings"),
        ({"p_out": "cubic"}, "p_out"),
        ({"sampler": "ode"}, "sampler of dt"),
        ({"variant": "fm", "sampler": "mean"}, "sampler of fm"),
        ({"eta": 0.0}, "eta"),
        ({"steps": 0}, "steps"),
        ({"shared_updates": "never"}, "shared_updates"),
        ({"lanes": 0}, "lanes"),
        ({"width": 0}, "width"),
        ({"steps": 4, "validation_steps": 5}, "validation_steps"),
        ({"variant": "ct", "validation_steps": 0}, "validation_steps"),
        ({"variant": "ct", "gamma_min": 3.0, "gamma_max": 3.0}, "gamma_min"),
        ({"variant": "fm", "path_sigma": -1.0}, "path_sigma"),
        ({"p_out": "radial", "radial_sigma": 0.0}, "radial_sigma must be positive"),
        ({"radial_sigma": 0.5}, "radial_sigma would have no effect with p_out=linear"),
        ({"gamma_min": -7.0, "gamma_max": 7.0}, "gamma_min and gamma_max would have no effect with variant=dt"),
        ({"path_sigma": 0.0}, "path_sigma would have no effect with variant=dt"),
        ({"variant": "ct", "alpha_bar_min": 1e-4}, "alpha_bar_min would have no effect with variant=ct"),
        ({"variant": "fm", "alpha_bar_max": 0.9}, "alpha_bar_max would have no effect with variant=fm"),
        ({"variant": "fm", "p_out": "linear"}, "p_out would have no effect with variant=fm and embeddings=onehot"),
        (
            {"variant": "fm", "p_out": "radial", "radial_sigma": 1.0},
            "p_out and radial_sigma",
        ),
        ({"embeddings": "learned", "embedding_dim": 0}, "embedding_dim must be at least 1"),
        ({"embedding_scale": 0.0}, "embedding_scale must be positive, got 0.0"),
        ({"embedding_dim": 20}, "embedding_dim would have no effect with embeddings=onehot; leave out embedding_dim"),
        ({"embeddings": "prototype", "embedding_dim": 20}, "embedding_dim would have no effect with embeddings=prot"),
        ({"embeddings": "one-hot", "embedding_dim": 20}, "unknown embeddings 'one-hot'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        learner(**options)


@pytest.mark.parametrize("network", ["resnet:20", "deeper:tiny", "mobilenet:small"])
def test_blocks_start_from_the_distribution_of_the_network(network: str) -> None:
    """Whatever drew it: these networks do not draw as PyTorch's layers do by themselves."""
    model = NoProp(build_network(network, (3, 32, 32)), 10, steps=3, input_shape=(3, 32, 32))
    first, *others = ([p for p in block.image.parameters() if p.numel() > 1000] for block in model.network)
    assert first
    for other in others:
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        for a, b in zip(first, other, strict=True):
            assert b.std().item() == pytest.approx(a.std().item(), rel=0.1)
            assert b.mean().item() == pytest.approx(a.mean().item(), abs=0.1 * a.std().item())


@pytest.mark.parametrize("embeddings", ["onehot", "learned"])
def test_learn_block_checks_what_it_is_given(embeddings: EmbeddingKind) -> None:
    model = learner(embeddings=embeddings, steps=3)
    before = copy.deepcopy(tree_leaves(model.state_dict()))
    x, y = torch.randn(4, INPUTS), torch.tensor([0, 1, 2, 0])
    wrong: list[tuple[Any, Any, str]] = [
        (3, (x, y), "block"),
        (-1, (x, y), "block"),
        (True, (x, y), "block"),
        (1.0, (x, y), "block"),
        (0, (x[:, 1:], y), "inputs have shape"),
        (0, (x, y + 1), "targets must lie in"),
        (0, x, "a batch is a pair"),
    ]
    for index, given, message in wrong:
        with pytest.raises(UsageError, match=message):
            model.learn_block(index, given)
    for now, then in zip(tree_leaves(model.state_dict()), before, strict=True):
        assert torch.equal(now, then) if isinstance(now, Tensor) else now == then
    assert model.learn_block(2, (x, y))


def test_a_discrete_state_is_rated_with_up_to_as_many_steps_as_blocks() -> None:
    model = learner(steps=4, validation_steps=2)
    x = torch.randn(5, INPUTS)
    (stage,) = model.stages()
    with evaluation_mode(model), torch.no_grad():
        assert torch.equal(stage.scores_of_inputs(x), model.sample(x, steps=2))


def test_blocks_draw_dropout_of_their_own() -> None:
    model = NoProp(nn.Sequential(nn.Linear(INPUTS, 8), nn.ReLU(), StreamDropout(0.5)), CLASSES, steps=3)
    keys = {int(module.stream.key) for module in model.network.modules() if isinstance(module, StreamDropout)}
    assert len(keys) == 3


def test_another_number_of_denoisers_than_steps_is_refused() -> None:
    with pytest.raises(UsageError, match="expected 10 denoisers"):
        NoProp([LinearDenoiser(CLASSES)], CLASSES, input_shape=(INPUTS,))


def test_blocks_start_apart_but_biases_at_zero() -> None:
    model = NoProp(mlp((INPUTS,), (8,)), CLASSES, steps=3)
    linears = [next(part for part in block.image.modules() if isinstance(part, nn.Linear)) for block in model.network]
    assert not torch.equal(linears[0].weight, linears[1].weight)
    assert not torch.equal(linears[1].weight, linears[2].weight)
    assert not any(part.bias.any() for part in linears)


def test_the_weights_of_the_discrete_loss() -> None:
    process = DiscreteDiffusion(10, 0.1, 1e-4, 1 - 1e-4)
    expected = 5 * 0.1 * reference.snr_steps(reference.cosine_alpha_bars(10, 1e-4, 1 - 1e-4))
    np.testing.assert_allclose(process.weights.numpy(), expected, rtol=1e-9)


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu() -> None:
    inputs, key = torch.rand(6, 4), torch.tensor(3)
    here_noise = SampleNoise(inputs, key, 1, 5, torch.float64)
    there_noise = SampleNoise(inputs.cuda(), key.cuda(), 1, 5, torch.float64)
    for step in (0, 4):
        torch.testing.assert_close(here_noise(step), there_noise(step).cpu(), rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_lanes_change_no_bit() -> None:
    inputs, targets = torch.rand(160, INPUTS), torch.arange(160) % CLASSES
    ends = []
    for lanes in (1, 2, 5):
        torch.manual_seed(0)
        model = learner(lanes=lanes).cuda()
        part = Batches(inputs, targets, device=torch.device("cuda"))
        Trainer(model, part, part, TrainingConfig(batch_size=16, epochs=3, patience=3)).run()
        ends.append(weights(model))
    assert equal(ends[0], ends[1])
    assert equal(ends[0], ends[2])


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "sampler"), [("ct", "stochastic"), ("ct", "mean"), ("ct", "ode"), ("fm", "ode")])
def test_denoising_in_a_graph_is_that_step_by_step(variant: str, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = learner(variant=variant, sampler=sampler).cuda()
    inputs = torch.rand(7, INPUTS, device="cuda")
    for _ in range(2):  # the second time with other weights
        replayed = model.sample(inputs, steps=50)
        with monkeypatch.context() as patch:
            patch.setattr(_captures, "WORTH_A_GRAPH", 51)
            assert torch.equal(replayed, model.sample(inputs, steps=50))
        model.step((inputs, torch.arange(7, device="cuda") % CLASSES))


@pytest.mark.gpu
def test_a_denoiser_that_no_graph_can_hold_denoises_eagerly() -> None:
    class Asking(LinearDenoiser):
        def decode(self, features: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
            assert z.isfinite().all().item()
            return super().decode(features, z, time)

    model = NoProp([Asking(CLASSES)], CLASSES, input_shape=(INPUTS,), variant="fm").cuda()
    inputs = torch.rand(7, INPUTS, device="cuda")
    with pytest.warns(UserWarning, match="cannot be a CUDA graph"):
        scores = model.sample(inputs, steps=50)
    torch.testing.assert_close(scores.cpu(), model.cpu().sample(inputs.cpu(), steps=50), rtol=1e-4, atol=1e-4)
