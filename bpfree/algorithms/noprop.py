"""NoProp: every block learns, on its own, to predict the embedding of the label from the input and a noisy label.

Paper: Li, Teh, Pascanu, "NoProp: Training Neural Networks without Full Back-propagation or Full Forward-propagation",
CoLLAs 2025, arXiv 2503.24322 (v1: "... without Back-propagation or Forward-propagation"). Time t runs from noise to
label, abar_t is the product of the alphas from t up to T, so abar and SNR = abar / (1 - abar) grow with t.

NoProp-DT ("dt"; section 3, eq. 8, Algorithm 1), blocks t = 1..T:

    z_t ~ q(z_t | y) = N(sqrt(abar_t) u_y, 1 - abar_t)           u_y a row of W_E, (B, d)
    uhat_t = softmax(block_t(x, z_{t-1})) W_E                    (B, C) (C, d) -> (B, d)
    loss_t = -log p_out(y | z_T) + KL(q(z_0 | y) || N(0, I)) + T/2 eta (SNR(t) - SNR(t-1)) |uhat_t - u_y|^2
    z_t <- a_t uhat_t + b_t z_{t-1} + sqrt(c_t) noise            inference from z_0 ~ N(0, I); argmax p_out(. | z_T)
    a_t = sqrt(abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})      alpha_{t-1} = abar_{t-1} / abar_t
    b_t = sqrt(alpha_{t-1}) (1 - abar_t) / (1 - abar_{t-1})
    c_t = (1 - abar_t) (1 - alpha_{t-1}) / (1 - abar_{t-1})

NoProp-CT ("ct"): one block with a time input, abar(t) = sigmoid(-gamma(t)) learned, eta/2 E_t[SNR'(t) |uhat - u_y|^2].
NoProp-FM ("fm"): one block, z_t = t u_y + (1 - t) z_0 (+ sigma noise), eta |block(x, z_t, t) W_E - (u_y - z_0)|^2;
inference by Euler's steps, the class is that of the nearest embedding.

A gradient stays within one block. W_E (unless one-hot), p_out and gamma are shared and learn from every block's loss.
CE sees z_T alone, never what a block says of the input.

Deviations from the paper, and what it leaves open:
- Algorithm 1 goes over the data once per block; here a step trains every block, in order, on one batch. With one-hot
  embeddings blocks do not interact, so only the batches that a block sees together with others differ. p_out and a
  learned W_E take one step per block and batch in both. An epoch here is Algorithm 1's. With shared_updates="step" they
  take one step per batch, down the sum of all blocks' losses, so that blocks can learn side by side.
- The schedule is "cosine" without a formula: here Nichol and Dhariwal's with s = 0.008, abar clamped to
  [alpha_bar_min, alpha_bar_max]. The upper clamp alone sets the last block's weight.
- sigma and start of p_out, sigma of the flow, gamma's start and hidden width, the scale of prototypes, how CT samples
  and how time is embedded are not given: options, or constants in `_noprop_parts.py`, `_noprop_processes.py` and
  `networks/noprop.py`.
- Neither W_E nor gamma decays; the paper does not say.
- Noise comes from a stream per block, at inference from the sample's own values (see `networks/streams.py`), so blocks
  can be trained in any order or in processes of their own, and an answer does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bpfree.algorithms._lanes import Lanes, check_lanes
from bpfree.algorithms._noprop_parts import (
    BlockNoise,
    EmbeddingKind,
    Embeddings,
    Readout,
    ReadoutKind,
    SampleNoise,
    Shared,
    blocks_of,
    embedding_width,
    radial_width,
)
from bpfree.algorithms._noprop_processes import (
    DENOISING,
    READOUT,
    ContinuousDiffusion,
    DiscreteDiffusion,
    Draws,
    FlowMatching,
    Process,
    Terms,
)
from bpfree.algorithms._optim import OptimizerFactory, make_optimizer, parameters_of, set_gradients, trained
from bpfree.algorithms.learner import (
    Batch,
    Channel,
    Learner,
    Metrics,
    Paper,
    Stage,
    Support,
    Trial,
    accuracy,
    check_batch,
    check_classes,
    evaluation_mode,
    refuse_idle,
)
from bpfree.algorithms.local_units import LocalUnit, LocalUnits, Signal
from bpfree.errors import UsageError, unknown_name
from bpfree.networks.blocks import Shape, as_blocks, children_of, sample_shape
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.noprop import BRANCH_WIDTH, Denoiser
from bpfree.networks.streams import Stream

VariantName = Literal["dt", "ct", "fm"]
SharedUpdates = Literal["block", "step"]
SHARED_UPDATES: Final = ("block", "step")
EMBEDDINGS_IN_COMMON: Final = Channel(
    "shared embeddings", "embeddings of the classes, which learn from the losses of all blocks", 1
)
ALPHA_BAR_MIN: Final = 1e-4
ALPHA_BAR_MAX: Final = 1 - 1e-4
GAMMA_MIN: Final = -2.5
GAMMA_MAX: Final = 3.0


@dataclass(frozen=True)
class Variant:
    """A process, what the paper's table of hyperparameters says of it, and the options that no other process has."""

    build: Callable[[_Options], Process]
    steps: int
    eta: float
    own: tuple[str, ...]


@dataclass(frozen=True)
class _Options:
    """What the processes are built from."""

    steps: int
    eta: float
    alpha_bar: tuple[float, float]
    gamma: tuple[float, float]
    path_sigma: float


VARIANTS: Final = {
    "dt": Variant(
        lambda o: DiscreteDiffusion(o.steps, o.eta, *o.alpha_bar), 10, 0.1, ("alpha_bar_min", "alpha_bar_max")
    ),
    "ct": Variant(lambda o: ContinuousDiffusion(o.steps, o.eta, *o.gamma), 1000, 1.0, ("gamma_min", "gamma_max")),
    "fm": Variant(lambda o: FlowMatching(o.steps, o.eta, o.path_sigma), 1000, 1.0, ("path_sigma",)),
}


class NoProp(Learner):
    """NoProp-DT, CT and FM.

    Args:
        network: the image branch, any network for images or vectors; each block gets one of its own, the first this
            one, the others fresh copies. `image_branch` has the paper's. Or a list of `Denoiser`s: the blocks as they
            are.
        classes: number of classes C.
        lr: learning rate.
        optimizer: "adamw", "adam", "sgd", or a function from parameters to an optimiser; one for each block.
        weight_decay: decay of the blocks and of p_out.
        variant: "dt" (T blocks), "ct" or "fm" (one block for all times).
        embeddings: rows of W_E: "onehot" (fixed), "learned" (`embedding_dim` wide), "prototype" (as wide as an input;
            `prepare` makes them medoids of the training set).
        embedding_dim: d of learned embeddings; None: 20 as in the paper.
        embedding_scale: of W_E against unit vectors, or against the images; what learns is W_E over it.
        p_out: "linear" (None) or "radial"; "fm" has none with one-hot embeddings.
        radial_sigma: sigma of the radial p_out; None: 0.5.
        steps: T of "dt"; steps of inference of "ct" and "fm". None: 10, 1000, 1000 as in the paper.
        eta: weight of the denoising loss. None: 0.1, 1, 1 as in the paper.
        alpha_bar_min: lower clamp of abar in "dt"; None: 1e-4.
        alpha_bar_max: upper clamp of abar in "dt"; None: 1 - 1e-4.
        gamma_min: g0 of "ct" at the start; None: -2.5.
        gamma_max: g1 of "ct" at the start; None: 3.
        path_sigma: sigma of the path in "fm"; None: 0.
        sampler: "stochastic" (dt as in the paper, ct), "mean" without the noise term (dt, ct), "last-mean" without that
            of the last step (dt), or "ode" (ct, fm). None: "stochastic" for dt, "mean" for ct, "ode" for fm.
        width: units of the label and time branches and of the trunk.
        noise_seed: fixes noise and dropout of training and the noise of inference; None takes it from PyTorch's global
            generator.
        draw: which draw of the inference noise `scores` uses.
        validation_steps: denoising steps when a state is rated during training; None: as many as `steps`. "dt" takes
            at most T, and then uses evenly spread blocks.
        shared_updates: when p_out and learned embeddings take a step: after each "block" as in Algorithm 1, or once
            per "step", by the sum of the blocks' gradients.
        lanes: blocks that learn at the same time in a CUDA graph, if they share nothing that learns in between.
        input_shape: shape of one input sample; needed when the first layer is not a `Linear`.

    Raises:
        UsageError: a network or value that does not fit, or a value that the other choices leave without effect.

    Example:
        >>> branch = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> learner = NoProp(branch, classes=3, steps=2)
        >>> sorted(learner.step((torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))
        ['block 0 loss', 'block 1 loss', 'read-out loss']
    """

    paper = Paper(
        title="NoProp: Training Neural Networks without Full Back-propagation or Full Forward-propagation",
        authors="Li, Teh, Pascanu",
        year=2025,
        arxiv="2503.24322",
        follows="equation 8 and Algorithm 1 (DT), sections on continuous time (CT) and flow matching (FM)",
    )
    locality = "block"

    def __init__(
        self,
        network: nn.Sequential | Iterable[nn.Module],
        classes: int,
        *,
        lr: float = 1e-3,
        optimizer: str | OptimizerFactory = "adamw",
        weight_decay: float = 1e-3,
        variant: VariantName = "dt",
        embeddings: EmbeddingKind = "onehot",
        embedding_dim: int | None = None,
        embedding_scale: float = 1.0,
        p_out: ReadoutKind | None = None,
        radial_sigma: float | None = None,
        steps: int | None = None,
        eta: float | None = None,
        alpha_bar_min: float | None = None,
        alpha_bar_max: float | None = None,
        gamma_min: float | None = None,
        gamma_max: float | None = None,
        path_sigma: float | None = None,
        sampler: str | None = None,
        width: int = BRANCH_WIDTH,
        noise_seed: int | None = None,
        draw: int = 0,
        validation_steps: int | None = None,
        shared_updates: SharedUpdates = "block",
        lanes: int = 6,
        input_shape: Shape | None = None,
    ) -> None:
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        usual = VARIANTS[variant]
        own = {
            "alpha_bar_min": alpha_bar_min,
            "alpha_bar_max": alpha_bar_max,
            "gamma_min": gamma_min,
            "gamma_max": gamma_max,
            "path_sigma": path_sigma,
        }
        refuse_idle(own, own.keys() - set(usual.own), f"variant={variant}")
        process = usual.build(
            _Options(
                steps=usual.steps if steps is None else steps,
                eta=usual.eta if eta is None else eta,
                alpha_bar=(
                    ALPHA_BAR_MIN if alpha_bar_min is None else alpha_bar_min,
                    ALPHA_BAR_MAX if alpha_bar_max is None else alpha_bar_max,
                ),
                gamma=(GAMMA_MIN if gamma_min is None else gamma_min, GAMMA_MAX if gamma_max is None else gamma_max),
                path_sigma=path_sigma or 0.0,
            )
        )
        if sampler is not None and sampler not in process.samplers:
            raise unknown_name(f"sampler of {variant}", sampler, process.samplers)
        if shared_updates not in SHARED_UPDATES:
            raise unknown_name("shared_updates", shared_updates, SHARED_UPDATES)
        check_lanes(lanes)
        if validation_steps is not None and validation_steps < 1:
            raise UsageError(f"validation_steps must be at least 1, got {validation_steps}")
        if variant == "dt" and validation_steps is not None and validation_steps > process.steps:
            raise UsageError(
                f"validation_steps must be at most the number of blocks {process.steps}, got {validation_steps}"
            )
        modules = children_of(network)
        check_classes(classes)
        shape = sample_shape(input_shape, list(as_blocks(modules)))
        dim = embedding_width(embeddings, classes, embedding_dim, shape)
        count = 1 if process.timed else process.steps
        super().__init__(
            blocks_of(modules, count, classes, dim, shape, process.timed, embeddings == "prototype", width),
            classes,
            shape,
        )
        self.kind, self.sampler, self.draw = variant, sampler or process.samplers[0], draw
        self.process, self.lanes, self.shared_updates = process, lanes, shared_updates
        self.validation_steps = process.steps if validation_steps is None else validation_steps
        self.embeddings = Embeddings(embeddings, classes, dim, embedding_scale)
        # the class of a flow's end is read off the embeddings; p_out only keeps learned ones apart
        reads = variant != "fm" or self.embeddings.learned
        if not reads:
            refuse_idle(
                {"p_out": p_out, "radial_sigma": radial_sigma},
                ("p_out", "radial_sigma"),
                f"variant=fm and embeddings={embeddings}",
            )
        kind = "linear" if p_out is None else p_out
        self.readout = Readout(kind, self.embeddings, radial_width(kind, radial_sigma)) if reads else None
        self.channels = (EMBEDDINGS_IN_COMMON,) if self.embeddings.learned and len(self.network) > 1 else ()
        self.noise = BlockNoise(self.network, noise_seed)
        self._block_optimizers = tuple(
            make_optimizer(trained(block), optimizer, lr=lr, weight_decay=weight_decay) for block in self.network
        )
        undecayed = trained(self.embeddings, self.process)
        self._shared_optimizers = tuple(
            make_optimizer(parameters, optimizer, lr=lr, weight_decay=decay)
            for parameters, decay in ((trained(self.readout), weight_decay), (undecayed, 0.0))
            if parameters
        )

    @property
    def shared(self) -> Shared:
        """W_E and p_out."""
        return Shared(self.embeddings, self.readout)

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Make prototypes the medoids of a training set; other embeddings are left as they are.

        Args:
            batches: the training set in batches as for `step`, on the learner's device.

        Raises:
            UsageError: a class has no sample.
        """
        self.shared.prepare(batches)

    def stages(self) -> tuple[Stage, ...]:
        """One stage: all blocks learn from each batch, each on its own."""
        return (
            self.joint_stage(
                "all blocks",
                (*self._block_optimizers, *self._shared_optimizers),
                self._update,
                scores=lambda inputs: self._denoise(inputs, self.validation_steps, self.draw),
            ),
        )

    def _update(self, batch: Batch) -> Metrics:
        if self._apart and self.shared_updates == "block":
            return self._local_units().update(batch)
        if self.shared_updates == "step":
            learned = self._learn_together(batch)
        else:
            learned = [self._learn_block(index, batch) for index in range(len(self.network))]
        metrics = {f"block {index} loss": terms.pop(DENOISING) for index, terms in enumerate(learned)}
        return {**metrics, **_of_the_whole(learned)}

    def local_units(self) -> LocalUnits:
        """The blocks, which have no parameter in common and hand nothing to each other while they learn.

        Raises:
            UsageError: there is one block, or blocks share something that learns with them.
        """
        if self.kind != "dt":
            raise UsageError(f"variant={self.kind} has one block for all times; those of variant=dt can be spread")
        if not self._apart:
            raise UsageError(f"embeddings={self.embeddings.kind} learn from every block's loss; use embeddings=onehot")
        if self.shared_updates == "step":
            raise UsageError("shared_updates=step adds up the gradients of all blocks; use shared_updates=block")
        if self.validation_steps != self.process.steps:
            raise UsageError("validation_steps below the number of blocks would leave some of them out; leave it away")
        return self._local_units()

    def _local_units(self) -> LocalUnits:
        return LocalUnits(
            units=tuple(
                LocalUnit(f"block {index}", (block,), partial(self._learn_unit, index), partial(self._pass_unit, index))
                for index, block in enumerate(self.network)
            ),
            begin=self._begin,
            enter=lambda step: (),
            end=lambda step, members: _of_the_whole(step.shared),
            join=lambda step: step.lanes.join(),
            ask=lambda inputs: (inputs, self._sample_noise(inputs, self.draw)),
            offer=lambda question: (question[1](0),),
            answer=lambda signal, question: self.process.scores(signal[0], self.shared),
            independent=True,
        )

    def _begin(self, batch: Batch) -> Step:
        """Draw for every block, wherever it learns; p_out learns from those draws alone, the same in every process."""
        _, y = batch
        draws = [self._draw(index, y) for index in range(len(self.network))]
        lanes = Lanes(y.device, self.lanes + 1 if len(draws) > 1 else 0)
        with lanes.lane(self.lanes):
            learned = [self._learn_shared(y, drawn) for drawn in draws]
        return Step(batch, draws, lanes, learned)

    def _learn_unit(self, index: int, signal: Signal, step: Step) -> tuple[Signal, Metrics]:
        with step.lanes.lane(index % self.lanes):
            terms = self._learn_alone(index, step.batch, step.draws[index])
        return (), {f"block {index} loss": terms[DENOISING]}

    def _pass_unit(self, index: int, signal: Signal, question: tuple[Tensor, SampleNoise]) -> Signal:
        x, noise = question
        process = self.process
        assert isinstance(process, DiscreteDiffusion)
        block, (z,) = self._block(index), signal
        _, z = process.denoise(block, index, index + 1, x, z, self.shared, noise, self.sampler, index)
        return (z,)

    @torch.enable_grad()
    def _learn_together(self, batch: Batch) -> list[Metrics]:
        """Every block's update, side by side; then one of what they share, by the sum of their gradients."""
        x, y = batch
        shared = parameters_of(self._shared_optimizers)
        lanes = Lanes(y.device, self.lanes if len(self.network) > 1 else 0)
        learned, gradients = [], []
        for index, optimizer in enumerate(self._block_optimizers):
            with lanes.lane(index % self.lanes):
                terms = self.process.terms(index, self._block(index), x, y, self.shared, self._draw(index, y))
                own = parameters_of([optimizer])
                found = torch.autograd.grad(_sum(terms), [*own, *shared])
                _step([optimizer], found[: len(own)])
                gradients.append(found[len(own) :])
                learned.append(_detached(terms))
        lanes.join()
        _step(self._shared_optimizers, [torch.stack(same).sum(0) for same in zip(*gradients, strict=True)])
        return learned

    def learn_block(self, index: int, batch: Batch) -> Metrics:
        """One update of one block, and of what blocks share: the body of Algorithm 1.

        With one-hot embeddings a block learns the same, bit for bit, in whatever order and in whatever process the
        others do; p_out learns from each call.

        Args:
            index: t - 1.
            batch: as for `step`.

        Returns:
            The terms of the block's loss by name, 0-d.

        Raises:
            UsageError: there is no such block, or the batch does not fit.
        """
        if type(index) is not int or not 0 <= index < len(self.network):
            raise UsageError(f"the index of a block lies in [0, {len(self.network)}), got {index!r}")
        check_batch(batch, self.input_shape, self.classes)
        return self._learn_block(index, batch)

    @torch.enable_grad()
    def _learn_block(self, index: int, batch: Batch) -> Metrics:
        x, y = batch
        draws = self._draw(index, y)
        if self._apart:
            return {**self._learn_alone(index, batch, draws), **self._learn_shared(y, draws)}
        terms = self.process.terms(index, self._block(index), x, y, self.shared, draws)
        return _descend(terms, (self._block_optimizers[index], *self._shared_optimizers))

    @property
    def _apart(self) -> bool:
        """Whether blocks share nothing that learns with them: neither embeddings nor a schedule."""
        return not trained(self.embeddings, self.process)

    def _draw(self, index: int, y: Tensor) -> Draws:
        stream = self.noise.streams[index]
        assert isinstance(stream, Stream)
        return self.process.draw(y, self.shared, stream)

    def _block(self, index: int) -> Denoiser:
        block = self.network[index]
        assert isinstance(block, Denoiser)
        return block

    @torch.enable_grad()
    def _learn_alone(self, index: int, batch: Batch, draws: Draws) -> Metrics:
        terms = self.process.block_terms(index, self._block(index), *batch, self.shared, draws)
        return _descend(terms, (self._block_optimizers[index],))

    @torch.enable_grad()
    def _learn_shared(self, y: Tensor, draws: Draws) -> Metrics:
        terms = self.process.shared_terms(y, self.shared, draws)
        return _descend(terms, self._shared_optimizers) if terms else {}

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, C): denoise from noise, then p_out (fm: nearest embedding)."""
        return self._denoise(inputs, self.process.steps, self.draw)

    @torch.no_grad()
    def sample(self, inputs: Tensor, *, steps: int | None = None, draw: int | None = None) -> Tensor:
        """Scores with another number of steps, or from another draw of the noise, in evaluation mode.

        Args:
            inputs: (B, *input_shape).
            steps: denoising steps; "dt" takes at most T and then uses evenly spread blocks. None: the learner's.
            draw: which draw of the noise; None: the learner's.

        Returns:
            (B, C) scores.

        Raises:
            UsageError: more steps than blocks ("dt"), or fewer than one.
        """
        steps = self.process.steps if steps is None else steps
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        with evaluation_mode(self):
            return self._denoise(inputs, steps, self.draw if draw is None else draw)

    def _denoise(
        self, inputs: Tensor, steps: int, draw: int, watch: Callable[[int, Tensor], None] = lambda step, logits: None
    ) -> Tensor:
        """Scores; `watch` sees each step's logits."""
        noise = self._sample_noise(inputs, draw)
        blocks: tuple[Any, ...] = self.blocks()
        way = self.process.trajectory(blocks, inputs, self.shared, noise, self.sampler, steps)
        for step, (logits, state) in enumerate(way):
            watch(step, logits)
            z = state
        return self.process.scores(z, self.shared)

    def _sample_noise(self, inputs: Tensor, draw: int) -> SampleNoise:
        return SampleNoise(inputs, self.noise.key, draw, self.embeddings.dim, self.embeddings.weight.dtype)

    @torch.no_grad()
    def diagnostics(self, batch: Batch) -> Metrics:
        """Accuracy of each block's own logits on the way ("dt"), of the first and last step's otherwise.

        The first is that of a plain classifier: it sees noise in place of a label. Of embeddings that learn also the
        distance of the two that are closest: classes whose embeddings meet cannot be told apart again.
        """
        inputs, targets = batch
        last = self.process.steps - 1
        report = {}

        def watch(step: int, logits: Tensor) -> None:
            if self.kind == "dt" or step in (0, last):
                name = f"block {step}" if self.kind == "dt" else "first step" if step == 0 else "last step"
                report[f"{name} accuracy"] = accuracy(logits, targets)

        self._denoise(inputs, self.process.steps, self.draw, watch)
        if self.embeddings.learned:
            report["closest embeddings"] = self.embeddings.closest()
        return report

    @property
    def variant(self) -> str:
        """Process, embeddings and the sampler, unless that is the paper's of dt or the only one."""
        usual = self.sampler == "stochastic" or len(self.process.samplers) == 1
        sampler = "" if usual else f", {self.sampler}"
        return f"{self.kind}, {self.embeddings.kind}{sampler}"

    @classmethod
    def supports(cls, network: nn.Sequential | Iterable[nn.Module]) -> Support:
        """Networks for images and vectors; graphs have no embedding to add to an input."""
        if any(isinstance(block, GraphBlock) for block in network):
            return Support(False, "its blocks read one input per label, not a graph")
        return Support(True)

    @staticmethod
    def search_space(trial: Trial, fixed: Mapping[str, Any]) -> dict[str, Any]:
        """The weight of the denoising loss."""
        return {"eta": trial.suggest_float("eta", 0.03, 3.0, log=True)}


@dataclass(frozen=True, eq=False)
class Step:
    """What blocks of a step share: the batch, every block's draws, side streams, and what p_out learned from."""

    batch: Batch
    draws: list[Draws]
    lanes: Lanes
    shared: list[Metrics]


def _of_the_whole(learned: Sequence[Terms]) -> Metrics:
    """Metrics of what blocks share: the terms of the last block's loss, the read-out's as a mean over blocks."""
    readout = [terms[READOUT] for terms in learned if READOUT in terms]
    metrics = {f"{name} loss": value for name, value in learned[-1].items() if name != READOUT}
    if readout:
        metrics[f"{READOUT} loss"] = torch.stack(readout).mean()
    return metrics


def _sum(terms: Terms) -> Tensor:
    first, *others = terms.values()
    return torch.stack([first, *others]).sum() if others else first


def _detached(terms: Terms) -> Metrics:
    return {name: value.detach() for name, value in terms.items()}


def _step(optimizers: Sequence[Optimizer], gradients: Sequence[Tensor]) -> None:
    set_gradients(parameters_of(optimizers), gradients)
    for optimizer in optimizers:
        optimizer.step()
        # one block's gradients in memory at a time, and none for the shared parameters to find in the next block
        optimizer.zero_grad(set_to_none=True)


def _descend(terms: Terms, optimizers: Sequence[Optimizer]) -> Metrics:
    """One step down the sum of the terms, which are given back."""
    _step(optimizers, torch.autograd.grad(_sum(terms), parameters_of(optimizers)))
    return _detached(terms)
