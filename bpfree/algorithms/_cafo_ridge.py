"""Ridge regression of one-hot targets on features that arrive in batches: statistics, and all solutions of a grid.

    minimise (1/N) ||Xc W^T - Yc||_F^2 + ridge ||W||_F^2      Xc, Yc centred; the bias is not penalised

    W^T = (Xc^T Xc + N ridge I)^-1 Xc^T Yc                    primal, as soon as there are more samples than features
    W^T = Xc^T (Xc Xc^T + N ridge I)^-1 Yc                    dual, before
    b   = mean(Y) - W mean(X)

At ridge 0 the inverses are pseudo-inverses, which gives the solution of minimum norm. Shapes: X (N, D), Y (N, C),
W (C, D), b (C,).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from bpfree.algorithms.learner import Processes
from bpfree.errors import TrainingError, UsageError

PANEL: Final = 1024
"""Columns of the Gram matrix that one product makes; those left of its diagonal block are known by symmetry."""

GRAM_PRECISIONS: Final = {"float64": torch.float64, "float32": torch.float32}


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products in float32, whatever a run allows: TF32 keeps 10 bits of each factor."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class RidgeStatistics(nn.Module):
    """What ridge regression needs of its samples, gathered batch by batch.

    Samples are kept as they are until there are more of them than features; from then on only sums are: memory is
    min(N, D) D numbers, however many samples come. Sums are in float64, of products in `precision`; any cut of the
    samples into batches gives the same sums, and any share of them among processes. A state dict holds what has been
    gathered and not cleared.

    Args:
        features: D.
        outputs: C.
        precision: of the products: "float64", or "float32" for devices whose float64 is slow (TF32 is never used).
    """

    def __init__(self, features: int, outputs: int, precision: str = "float64") -> None:
        super().__init__()
        self.features, self.outputs = features, outputs
        self._dtype = GRAM_PRECISIONS[precision]
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.count = 0
        self._epsilon = 0.0  # to which the features are rounded
        self._rows: list[tuple[Tensor, Tensor]] = []  # (n, D) and (n, C), as long as N <= D
        self._sums: dict[str, Tensor] = {}  # gram (D, D) upper triangle, cross (D, C), x (D,), y (C,)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Take note of some samples; never waits for the device.

        Args:
            x: (n, D) features.
            y: (n, C) targets.
        """
        self._move(x.device)
        self.count += len(x)
        self._epsilon = max(self._epsilon, torch.finfo(x.dtype).eps)
        self._rows.append((x, y))
        if self.count > self.features:
            for rows in self._rows:
                self._add_products(*rows)
            self._rows = []

    @torch.no_grad()
    def merge(self, processes: Processes, device: torch.device) -> None:
        """Note here what all processes have noted; rows of all, as long as they are no more than features.

        Args:
            processes: all of them call this.
            device: where the statistics are to be.
        """
        self._move(device)
        seen = torch.zeros(2, processes.size, dtype=torch.float64, device=device)
        seen[:, processes.rank] = torch.tensor([self.count, self._epsilon], dtype=torch.float64)
        counts = processes.sum(seen)[0].long().tolist()
        self._epsilon, self.count = seen[1].max().item(), sum(counts)
        if not self.count:
            return
        if self.count <= self.features:
            first = sum(counts[: processes.rank])
            own = slice(first, first + counts[processes.rank])
            whole = [torch.zeros(self.count, width, dtype=torch.float64, device=device) for width in self._widths]
            for position, values in enumerate(whole):
                if self._rows:
                    values[own] = torch.cat([rows[position] for rows in self._rows]).double()
                processes.sum(values)
            self._rows = [(whole[0], whole[1])]
            return
        for rows in self._rows:
            self._add_products(*rows)
        self._rows = []
        self._sums = self._sums or self._no_sums(device)
        for values in self._sums.values():
            processes.sum(values)

    @property
    def _widths(self) -> tuple[int, int]:
        return self.features, self.outputs

    def _no_sums(self, device: torch.device) -> dict[str, Tensor]:
        D, C = self._widths
        shapes: dict[str, tuple[int, ...]] = {"gram": (D, D), "cross": (D, C), "x": (D,), "y": (C,)}
        return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}

    def _add_products(self, x: Tensor, y: Tensor) -> None:
        self._sums = self._sums or self._no_sums(x.device)
        x, y = x.to(self._dtype), y.to(self._dtype)
        with torch.autocast(x.device.type, enabled=False), exact_products():
            for start in range(0, self.features, PANEL):
                self._sums["gram"][start : start + PANEL, start:] += x[:, start : start + PANEL].T @ x[:, start:]
            self._sums["cross"] += x.T @ y
        self._sums["x"] += x.sum(0, dtype=torch.float64)
        self._sums["y"] += y.sum(0, dtype=torch.float64)

    def problem(self, device: torch.device, *, centred: bool = True) -> RidgeProblem:
        """The regression on all samples so far.

        Args:
            device: where to solve it.
            centred: whether there is a bias.

        Raises:
            UsageError: there is no sample.
        """
        if not self.count:
            raise UsageError("nothing to solve: no batch has been seen since the last solution")
        self._move(device)
        if self._rows:
            x = torch.cat([rows[0] for rows in self._rows]).double()
            y = torch.cat([rows[1] for rows in self._rows]).double()
            mean_x, mean_y = (x.mean(0), y.mean(0)) if centred else (x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1]))
            noise = self._noise(x.square().sum(), torch.float64)
            x, y = x - mean_x, y - mean_y
            return RidgeProblem(x @ x.T, y, x, mean_x, mean_y, self.count, noise)
        sums = self._sums
        noise = self._noise(sums["gram"].diagonal().sum(), self._dtype)
        gram = sums["gram"].triu()
        gram += gram.triu(1).T
        cross = sums["cross"].clone()
        mean_x, mean_y = sums["x"] / self.count, sums["y"] / self.count
        if centred:
            gram.addr_(mean_x, mean_x, alpha=-self.count)
            cross.addr_(mean_x, mean_y, alpha=-self.count)
        else:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        return RidgeProblem(gram, cross, None, mean_x, mean_y, self.count, noise)

    def _noise(self, trace: Tensor, products: torch.dtype) -> Tensor:
        """How large an eigenvalue of X^T X may be by rounding alone, before X is centred: by that of features, to the
        square, and by that of products."""
        return trace * max(self._epsilon**2, torch.finfo(products).eps)

    def get_extra_state(self) -> dict[str, Any]:
        return {"count": self.count, "epsilon": self._epsilon, "rows": self._rows, "sums": self._sums}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.count, self._epsilon = state["count"], state["epsilon"]
        self._rows, self._sums = list(state["rows"]), dict(state["sums"])

    def _move(self, device: torch.device) -> None:
        """What a checkpoint held may be elsewhere."""
        self._rows = [(x.to(device), y.to(device)) for x, y in self._rows]
        self._sums = {name: value.to(device) for name, value in self._sums.items()}


@dataclass(frozen=True, eq=False)
class RidgeProblem:
    """The linear system of a ridge regression, primal (D, D) or dual (N, N), in float64.

    Attributes:
        matrix: Xc^T Xc or Xc Xc^T.
        right: Xc^T Yc or Yc.
        rows: Xc in the dual form, which maps its solution to W; None in the primal form.
        mean_x: (D,) what the features were centred by.
        mean_y: (C,) what the targets were centred by.
        count: N.
        noise: eigenvalues up to this may be rounding errors, 0-d.
    """

    matrix: Tensor
    right: Tensor
    rows: Tensor | None
    mean_x: Tensor
    mean_y: Tensor
    count: int
    noise: Tensor

    @property
    def scale(self) -> float:
        """Mean variance of the features, trace(Xc^T Xc) / (N D): the unit in which a ridge is neither big nor small."""
        return self.matrix.diagonal().sum().item() / (self.count * len(self.mean_x))

    def solve(self, ridges: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The solutions for all of `ridges`.

        Returns:
            (R, C, D) weights and (R, C) biases, float64.

        Raises:
            TrainingError: the features are not finite, or a ridge is too small for them.
        """
        shifts = [self.count * ridge for ridge in ridges]
        # one decomposition would serve all, and takes as long as about a dozen factorisations
        solutions = self._by_eigenvectors(shifts) if min(shifts) == 0 else self._by_cholesky(shifts)
        weights = torch.stack([solution if self.rows is None else self.rows.T @ solution for solution in solutions])
        if not weights.isfinite().all():
            raise TrainingError("the closed form has no finite solution; check the inputs or choose a larger ridge")
        weights = weights.mT
        return weights, self.mean_y - weights @ self.mean_x

    def _by_cholesky(self, shifts: Sequence[float]) -> list[Tensor]:
        solutions = []
        for shift in shifts:
            shifted = self.matrix.clone()
            shifted.diagonal().add_(shift)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if info.item():
                raise TrainingError(
                    f"features are too nearly dependent, or not finite, for ridge {shift / self.count:g}; "
                    "choose a larger one, or 0 for the solution of minimum norm"
                )
            solutions.append(torch.cholesky_solve(self.right, factor))
        return solutions

    def _by_eigenvectors(self, shifts: Sequence[float]) -> list[Tensor]:
        """One decomposition for all; eigenvalues that are rounding errors belong to no feature and are left out."""
        if not self.matrix.isfinite().all():
            raise TrainingError("features are not finite; check the inputs")
        values, vectors = torch.linalg.eigh(self.matrix)
        rotated = vectors.T @ self.right
        kept = values > torch.maximum(self.noise, torch.finfo(values.dtype).eps * len(values) * values[-1])
        return [vectors @ (torch.where(kept, 1 / (values + shift), 0)[:, None] * rotated) for shift in shifts]
