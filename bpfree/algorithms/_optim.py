"""Optimisers by name, built the same way for every learning rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from bpfree.errors import UsageError, unknown_name

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
OPTIMIZERS: Final = ("adam", "adamw", "sgd", "momentum", "gd")
SGD_MOMENTUM: Final = 0.9
FACTORY: Final = "optimizer is a name, such as adam, or a function from parameters to an optimiser"


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    optimizer: str | OptimizerFactory,
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float | None = None,
) -> Optimizer:
    """One optimiser over `parameters`.

    Args:
        parameters: what it updates.
        optimizer: "adam", "adamw", "sgd" (Nesterov momentum 0.9), "momentum" (plain momentum 0.9), "gd" (no momentum),
            or a function from a parameter list to any `torch.optim.Optimizer`, which then ignores `lr` and
            `weight_decay`.
        lr: learning rate.
        weight_decay: coupled (L2), but decoupled for "adamw".
        momentum: instead of 0.9, for "sgd" and "momentum".

    Raises:
        UsageError: unknown name, no name or function of this kind, a rate that is not a positive number, or
            momentum of an optimiser without.
    """
    trained = list(parameters)
    if momentum is not None and not (optimizer in ("sgd", "momentum") and 0 <= momentum < 1):
        raise UsageError(f"momentum is a number from 0 to 1 for optimizer=sgd or momentum, got {momentum}")
    if callable(optimizer):
        made = optimizer(trained)
        if not isinstance(made, Optimizer):
            raise UsageError(f"{FACTORY}, got one that returns a {type(made).__name__}")
        return made
    if not isinstance(optimizer, str):
        raise UsageError(f"{FACTORY}, got {optimizer!r}")
    if not lr > 0 or not weight_decay >= 0:
        raise UsageError(f"lr must be positive and weight_decay not negative, got {lr} and {weight_decay}")
    if optimizer == "adam":
        return Adam(trained, lr=lr, weight_decay=weight_decay, fused=True)
    if optimizer == "adamw":
        return AdamW(trained, lr=lr, weight_decay=weight_decay, fused=True)
    if optimizer in {"sgd", "momentum"}:
        nesterov = optimizer == "sgd"
        kept = SGD_MOMENTUM if momentum is None else momentum
        return SGD(trained, lr=lr, weight_decay=weight_decay, momentum=kept, nesterov=nesterov, fused=True)
    if optimizer == "gd":
        return SGD(trained, lr=lr, weight_decay=weight_decay, fused=True)
    raise unknown_name("optimizer", optimizer, OPTIMIZERS)


def trained(*modules: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of these modules that the user has not frozen."""
    return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]


def parameters_of(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    """What these optimisers train, in their order."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def set_gradients(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor]) -> None:
    """Hand each parameter its gradient, in the parameter's precision."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.to(parameter.dtype)


def is_heard(optimizer: Optimizer) -> bool:
    """Whether somebody has asked to be told of an optimiser's steps, and so expects gradients in `.grad`: the audit,
    processes that average them, a user's hook."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def centralize_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Take the mean over inputs off each output unit's gradient; vectors (biases) are left as they are.

    Yong, Huang, Hua, Zhang, "Gradient Centralization", ECCV 2020, arXiv 2004.01461, equation 1.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.ndim > 1:
            parameter.grad.sub_(parameter.grad.mean(tuple(range(1, parameter.ndim)), keepdim=True))


def materialize_state(optimizer: Optimizer) -> None:
    """Give an optimiser its (all zero) state before the first real step, leaving the parameters as they are.

    A CUDA graph needs state that exists before capture; a step of zero length makes it. State that exists
    already, after a resumed checkpoint, is left alone.
    """
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    set_gradients(parameters, (torch.zeros_like(parameter) for parameter in parameters))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
