"""From noise to the embedding of a label and back: the discrete and continuous diffusions and the flow of NoProp.

Time runs from noise to label (opposite to DDPM): abar grows with t, and so does SNR = abar / (1 - abar).

Shapes: `B` batch, `C` classes, `d` width of an embedding, `T` steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bpfree.algorithms._captures import walked
from bpfree.algorithms._noprop_parts import SampleNoise, Shared
from bpfree.errors import UsageError
from bpfree.networks.noprop import Denoiser
from bpfree.networks.streams import Stream

COSINE_OFFSET: Final = 0.008  # Nichol and Dhariwal, arXiv 2102.09672
SCHEDULE_UNITS: Final = 32
Terms = dict[str, Tensor]
DENOISING, READOUT, PRIOR = "denoising", "read-out", "prior"


class Coefficients(NamedTuple):
    """Of the posterior q(z_t | z_s, y) = N(a u_y + b z_s, c I) for s < t."""

    a: Tensor
    b: Tensor
    c: Tensor


def posterior(
    before: Tensor, after: Tensor, rest_before: Tensor | None = None, rest_after: Tensor | None = None
) -> Coefficients:
    """The posterior's coefficients from abar_s and abar_t; with s = t - 1 those of the paper's section 3.

    Any s < t will do, since the product of the alphas between them is abar_s / abar_t. `rest_before` and `rest_after`
    are 1 - abar_s and 1 - abar_t where they are known better than by this difference.
    """
    rest_before = 1 - before if rest_before is None else rest_before
    rest_after = 1 - after if rest_after is None else rest_after
    alpha, lost = before / after, (rest_before - rest_after) / after  # lost = 1 - alpha
    return Coefficients(
        after.sqrt() * lost / rest_before, alpha.sqrt() * rest_after / rest_before, rest_after * lost / rest_before
    )


def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar)."""
    return alpha_bar / (1 - alpha_bar)


def cosine_alpha_bars(steps: int, low: float, high: float) -> Tensor:
    """abar_0..abar_T of the cosine schedule, clamped to [low, high]: (T + 1,) float64.

    Raises:
        UsageError: clamps outside (0, 1) or the wrong way round, or so narrow that abar does not grow at each step.
    """
    if not 0 < low < high < 1:
        raise UsageError(f"alpha_bar_min and alpha_bar_max must satisfy 0 < min < max < 1, got {low} and {high}")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    remaining = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    signal = ((remaining + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2).cos().square()
    bars = (signal / signal[-1]).clamp(low, high)
    if not bool((bars.diff() > 0).all()):
        raise UsageError(f"the clamps {low} and {high} flatten a schedule of {steps} steps; widen them")
    return bars


def prior_loss(alpha_bar: Tensor, targets: Tensor) -> Tensor:
    """KL(q(z_0 | y) || N(0, I)), mean over (B, d) embeddings: (abar |u|^2 - d abar - d ln(1 - abar)) / 2."""
    dim = targets.shape[1]
    squares = targets.square().sum(1).mean()
    return 0.5 * (alpha_bar * squares - dim * alpha_bar - dim * torch.log1p(-alpha_bar))


def noised(alpha_bar: Tensor, targets: Tensor, noise: Tensor, rest: Tensor | None = None) -> Tensor:
    """A sample of q(z_t | y): sqrt(abar) u_y + sqrt(1 - abar) noise; (B, d), abar 0-d or (B, 1), `rest` 1 - abar."""
    return alpha_bar.sqrt() * targets + (1 - alpha_bar if rest is None else rest).sqrt() * noise


def squared_errors(estimates: Tensor, targets: Tensor) -> Tensor:
    """(B,): squared Euclidean distances, a sum over d and not a mean."""
    return (estimates - targets).square().sum(1)


def mean_squared_error(estimates: Tensor, targets: Tensor) -> Tensor:
    """The mean of `squared_errors`, in the fewest kernels."""
    return F.mse_loss(estimates, targets, reduction="sum") / len(targets)


class Draws(NamedTuple):
    """What a block's step draws for a batch: (B, d) embeddings of the labels, (2, B, d) noise, (B,) times if any."""

    targets: Tensor
    noise: Tensor
    time: Tensor | None


class Process(nn.Module, ABC):
    """A way between noise and embeddings: what it makes of a batch in training, and how it samples.

    Attributes:
        samplers: names of the ways to sample, its own first.
        timed: whether one block serves all times.
        steps: T; where one block serves all times, how many steps inference takes.
    """

    samplers: ClassVar[tuple[str, ...]]
    timed: ClassVar[bool]

    def __init__(self, steps: int, eta: float) -> None:
        super().__init__()
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        if not eta > 0:
            raise UsageError(f"eta must be positive, got {eta}")
        self.steps, self.eta = steps, eta

    def draw(self, y: Tensor, shared: Shared, stream: Stream) -> Draws:
        """Embeddings, times and noise for (B,) classes."""
        targets = shared.embeddings(y)
        time = stream.uniform((len(y),), targets.dtype) if self.timed else None
        return Draws(targets, stream.normal((2, *targets.shape), targets.dtype), time)

    @abstractmethod
    def block_terms(self, index: int, block: Denoiser, x: Tensor, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """The terms of block `index`'s loss that need the block, on (B, *input_shape) inputs, to be added up."""

    @abstractmethod
    def shared_terms(self, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """The terms of a block's loss in which no block has a part: of the read-out and the prior."""

    def terms(self, index: int, block: Denoiser, x: Tensor, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """All terms of block `index`'s loss, to be added up."""
        return {
            **self.block_terms(index, block, x, y, shared, draws),
            **self.shared_terms(y, shared, draws),
        }

    @abstractmethod
    def trajectory(
        self, blocks: Sequence[Denoiser], x: Tensor, shared: Shared, noise: SampleNoise, sampler: str, steps: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """From noise to an embedding in `steps` steps: after each, (B, C) logits of its block and (B, d) z."""

    @abstractmethod
    def scores(self, z: Tensor, shared: Shared) -> Tensor:
        """(B, d) end of a trajectory -> (B, C) class scores."""


class DiscreteDiffusion(Process):
    """NoProp-DT: T blocks, block t from z_{t-1} to the label (the paper's eq. 8, Algorithm 1).

    Args:
        steps: T.
        eta: weight of the denoising loss.
        low: clamp of abar from below.
        high: clamp of abar from above; it alone sets the last block's weight.
    """

    samplers = ("stochastic", "last-mean", "mean")
    timed = False
    alpha_bars: Tensor
    weights: Tensor

    def __init__(self, steps: int, eta: float, low: float, high: float) -> None:
        super().__init__(steps, eta)
        bars = cosine_alpha_bars(steps, low, high)
        self.register_buffer("alpha_bars", bars)  # abar_0 .. abar_T
        self.register_buffer("weights", 0.5 * steps * eta * snr(bars).diff())  # of blocks 1 .. T

    def block_terms(self, index: int, block: Denoiser, x: Tensor, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """T/2 eta (SNR(t) - SNR(t-1)) |uhat - u_y|^2 from z_{t-1}."""
        before = noised(self.alpha_bars[index], draws.targets, draws.noise[0])
        estimates = shared.embeddings.estimate(block(x, before))
        return {DENOISING: self.weights[index] * mean_squared_error(estimates, draws.targets)}

    def shared_terms(self, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """CE(z_T) + KL, z_T drawn independently of z_{t-1}."""
        last = noised(self.alpha_bars[-1], draws.targets, draws.noise[1])
        terms = {READOUT: F.cross_entropy(shared.read(last), y)}
        if shared.embeddings.learned:  # otherwise a constant
            terms[PRIOR] = prior_loss(self.alpha_bars[0], draws.targets)
        return terms

    def trajectory(
        self, blocks: Sequence[Denoiser], x: Tensor, shared: Shared, noise: SampleNoise, sampler: str, steps: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One block after another; with fewer steps than blocks, evenly spread blocks jump further."""
        if not 1 <= steps <= self.steps:
            raise UsageError(f"NoProp-DT with {self.steps} blocks denoises in 1 to {self.steps} steps, not {steps}")
        stops = [round(step * self.steps / steps) for step in range(steps + 1)]
        z = noise(0)
        for step in range(steps):
            at, to = stops[step], stops[step + 1]
            logits, z = self.denoise(blocks[at], at, to, x, z, shared, noise, sampler, step)
            yield logits, z

    def denoise(
        self,
        block: Denoiser,
        at: int,
        to: int,
        x: Tensor,
        z: Tensor,
        shared: Shared,
        noise: SampleNoise,
        sampler: str,
        step: int,
    ) -> tuple[Tensor, Tensor]:
        """Step `step` of inference, from z_at to z_to: z = a uhat + b z + sqrt(c) noise; (B, C) logits and (B, d) z.

        The sampler "mean" leaves the noise out, "last-mean" in the step to z_T only, as Algorithm 2 of DDPM does (Ho,
        Jain and Abbeel 2020).
        """
        logits = block(x, z)
        a, b, c = posterior(self.alpha_bars[at], self.alpha_bars[to])
        z = a * shared.embeddings.estimate(logits) + b * z
        if sampler == "stochastic" or (sampler == "last-mean" and to < self.steps):
            z = z + c.sqrt() * noise(step + 1)
        return logits, z

    def scores(self, z: Tensor, shared: Shared) -> Tensor:
        """Logits of p_out(y | z_T)."""
        return shared.read(z)


class Moves(NamedTuple):
    """(steps,) each: a step of inference makes `towards` u + `kept` z + `spread` noise of a prediction u and of z."""

    towards: Tensor
    kept: Tensor
    spread: Tensor | None


class TimedProcess(Process):
    """One block for all times, which inference asks again and again on a grid from 0 to 1."""

    timed = True

    @abstractmethod
    def predict(self, logits: Tensor, shared: Shared) -> Tensor:
        """What (B, C) logits of the block say of embeddings, (B, d)."""

    @abstractmethod
    def moves(self, times: Tensor, sampler: str) -> Moves:
        """The steps between (steps + 1,) times."""

    def trajectory(
        self, blocks: Sequence[Denoiser], x: Tensor, shared: Shared, noise: SampleNoise, sampler: str, steps: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Steps on an even grid of times."""
        (block,) = blocks
        z = noise(0)
        times = torch.linspace(0, 1, steps + 1, dtype=z.dtype, device=z.device)
        grid = torch.stack([column for column in (times[:-1], *self.moves(times, sampler)) if column is not None])
        features = block.encode(x)

        def advance(z: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
            time, towards, kept, *spread = grid.index_select(1, step[None])
            logits = block.decode(features, z, time.expand(len(z)))
            following = towards * self.predict(logits, shared) + kept * z
            return logits, following + spread[0] * noise(step + 1) if spread else following

        return walked(advance, z, steps)


class NoiseSchedule(nn.Module):
    """The learned schedule of NoProp-CT: abar(t) = sigmoid(-gamma(t)) with gamma falling from g1 to g0.

    gamma(t) = g0 + (g1 - g0) (1 - gbar(t)), gbar(t) = (g(t) - g(0)) / (g(1) - g(0)), g(t) = v . sigmoid(w t + b) with
    v, w > 0 (softplus). g1 - g0 is an exponential, so that g0 < g1 whatever is learned.

    Args:
        low: g0 at the start.
        high: g1 at the start.

    Raises:
        UsageError: `low` is not below `high`.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        if not low < high:
            raise UsageError(f"gamma_min must lie below gamma_max, got {low} and {high}")
        self.low = nn.Parameter(torch.tensor(float(low)))
        self.log_range = nn.Parameter(torch.tensor(math.log(high - low)))
        self.slopes = nn.Parameter(torch.randn(SCHEDULE_UNITS))
        self.shifts = nn.Parameter(torch.randn(SCHEDULE_UNITS))
        self.heights = nn.Parameter(torch.randn(SCHEDULE_UNITS))

    @property
    def high(self) -> Tensor:
        """g1 = gamma(0)."""
        return self.low + self.log_range.exp()

    def _grow(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """g and its derivative at (n,) times."""
        slopes, heights = F.softplus(self.slopes), F.softplus(self.heights)
        units = torch.sigmoid(time[:, None] * slopes + self.shifts)
        return (units * heights).sum(1), (units * (1 - units) * slopes * heights).sum(1)

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) times in [0, 1] -> gamma and its derivative, both (n,)."""
        values, slopes = self._grow(time)
        ends, _ = self._grow(torch.stack([torch.zeros_like(self.low), torch.ones_like(self.low)]))
        span, extent = self.log_range.exp(), ends[1] - ends[0]
        return self.low + span * (1 - (values - ends[0]) / extent), -span * slopes / extent


class ContinuousDiffusion(TimedProcess):
    """NoProp-CT: one block for all times, and a learned noise schedule (the paper's section 3.2).

    Args:
        steps: steps of inference.
        eta: weight of the denoising loss.
        low: g0 at the start.
        high: g1 at the start.
    """

    samplers = ("mean", "stochastic", "ode")  # its own first: see results/noprop

    def __init__(self, steps: int, eta: float, low: float, high: float) -> None:
        super().__init__(steps, eta)
        self.schedule = NoiseSchedule(low, high)

    def block_terms(self, index: int, block: Denoiser, x: Tensor, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """eta/2 E_t[SNR'(t) |uhat - u_y|^2], SNR' = -gamma' exp(-gamma)."""
        gamma, slope = self.schedule(draws.time)
        # sigmoid(gamma) is 1 - abar, whose difference is 0 in float32 from gamma = -17 on
        before = noised(torch.sigmoid(-gamma)[:, None], draws.targets, draws.noise[0], torch.sigmoid(gamma)[:, None])
        errors = squared_errors(shared.embeddings.estimate(block(x, before, draws.time)), draws.targets)
        return {DENOISING: 0.5 * self.eta * (-slope * (-gamma).exp() * errors).mean()}

    def shared_terms(self, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """CE(z_1) + KL."""
        low = self.schedule.low
        last = noised(torch.sigmoid(-low), draws.targets, draws.noise[1], torch.sigmoid(low))
        return {
            READOUT: F.cross_entropy(shared.read(last), y),
            PRIOR: prior_loss(torch.sigmoid(-self.schedule.high), draws.targets),
        }

    def predict(self, logits: Tensor, shared: Shared) -> Tensor:
        """uhat, confined to the embeddings' convex hull."""
        return shared.embeddings.estimate(logits)

    def moves(self, times: Tensor, sampler: str) -> Moves:
        """The posterior's steps on the grid, or Euler's on dz/dt = -gamma'/2 (sqrt(abar) uhat - abar z)."""
        gammas, slopes = self.schedule(times)
        bars, rests = torch.sigmoid(-gammas), torch.sigmoid(gammas)
        if sampler == "ode":
            pace = -slopes[:-1] / (2 * (len(times) - 1))
            return Moves(pace * bars[:-1].sqrt(), 1 - pace * bars[:-1], None)
        a, b, c = posterior(bars[:-1], bars[1:], rests[:-1], rests[1:])
        return Moves(a, b, c.sqrt() if sampler == "stochastic" else None)

    def scores(self, z: Tensor, shared: Shared) -> Tensor:
        """Logits of p_out(y | z_1)."""
        return shared.read(z)


class FlowMatching(TimedProcess):
    """NoProp-FM: one block predicts the velocity from noise to embedding (the paper's section 3.3).

    Args:
        steps: steps of inference.
        eta: weight of the loss.
        sigma: standard deviation around the straight path.
    """

    samplers = ("ode",)

    def __init__(self, steps: int, eta: float, sigma: float) -> None:
        super().__init__(steps, eta)
        if not sigma >= 0:
            raise UsageError(f"path_sigma must not be negative, got {sigma}")
        self.sigma = sigma

    def block_terms(self, index: int, block: Denoiser, x: Tensor, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """eta |v(z_t, x, t) - (z_1 - z_0)|^2, and CE of z_t + (1 - t) v if embeddings are learned."""
        targets, noise, time = draws
        assert time is not None
        moment = time[:, None]
        z = torch.lerp(noise[0], targets, moment)
        if self.sigma:
            z = z + self.sigma * noise[1]
        velocity = self.predict(block(x, z, time), shared)
        terms = {DENOISING: self.eta * mean_squared_error(velocity, targets - noise[0])}
        if shared.readout is not None:
            terms[READOUT] = F.cross_entropy(shared.read(z + (1 - moment) * velocity), y)
        return terms

    def shared_terms(self, y: Tensor, shared: Shared, draws: Draws) -> Terms:
        """None: the cross-entropy sees where the block's velocity leads."""
        return {}

    def predict(self, logits: Tensor, shared: Shared) -> Tensor:
        """The velocity logits W_E, not confined to the embeddings' convex hull."""
        return shared.embeddings.project(logits.to(shared.embeddings.weight.dtype))

    def moves(self, times: Tensor, sampler: str) -> Moves:
        """Euler's steps along the velocity."""
        every = torch.ones_like(times[1:])
        return Moves(every / len(every), every, None)

    def scores(self, z: Tensor, shared: Shared) -> Tensor:
        """The nearest embedding scores highest."""
        return shared.embeddings.log_similarity(z, 1.0)
