"""A network as a sequence of blocks: the units of locality, audit and timing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bpfree.errors import UsageError
from bpfree.networks.gnn import GraphBlock
from bpfree.networks.graph import Graph
from bpfree.networks.streams import StreamDropout

Shape = tuple[int, ...]


def children_of(network: nn.Sequential | Iterable[nn.Module]) -> list[nn.Module]:
    """The modules of a user's network in forward order, not cut into blocks yet.

    Raises:
        UsageError: the network is not a sequence of modules.
    """
    if isinstance(network, nn.Module) and not isinstance(network, (nn.Sequential, nn.ModuleList)):
        raise UsageError(
            f"a network is an nn.Sequential or a list of modules in forward order, got {type(network).__name__}"
        )
    if not isinstance(network, Iterable):
        raise UsageError(f"a network is an nn.Sequential or a list of modules in forward order, got {network!r}")
    modules = list(network)
    for module in modules:
        if not isinstance(module, nn.Module):
            raise UsageError(f"every block must be an nn.Module, got {type(module).__name__}")
    return modules


def as_blocks(network: nn.Sequential | Iterable[nn.Module]) -> nn.ModuleList:
    """The blocks of a user's network, in order.

    Each child of `network` is a block, cut where the user cut it. Children without parameters (`Flatten`,
    `ReLU`, pooling) cannot be trained alone: leading ones join the block after them, others the block
    before them. So `Sequential(Flatten(), Linear(8, 4), ReLU(), Linear(4, 4), ReLU())` has two blocks.
    Batch normalisation has parameters: as a child it would be a block, so it goes with its layer into an
    `nn.Sequential`, which is then one child.

    Args:
        network: an `nn.Sequential`, or any iterable of modules in forward order.

    Raises:
        UsageError: the network is not a sequence of modules, nothing in it has parameters, or some have no size yet.
    """
    groups: list[list[nn.Module]] = []
    leading: list[nn.Module] = []
    for module in children_of(network):
        _refuse_lazy(module)
        if any(True for _ in module.parameters()):
            groups.append([*leading, module])
            leading = []
        elif groups:
            groups[-1].append(module)
        else:
            leading.append(module)
    if not groups:
        raise UsageError("the network has no block with parameters, so there is nothing to train")
    return nn.ModuleList(group[0] if len(group) == 1 else nn.Sequential(*group) for group in groups)


def _refuse_lazy(network: nn.Module) -> None:
    for module in network.modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise UsageError(
                f"the size of a {type(module).__name__} is not known yet; run a batch through the network first"
            )


def infer_input_shape(blocks: Sequence[nn.Module]) -> Shape:
    """The shape of one input sample, as far as the first layer tells it.

    Raises:
        UsageError: the first layer with parameters is neither a `Linear` nor a graph convolution, so the size of an
            input is not known.
    """
    if isinstance(blocks[0], GraphBlock):
        return (blocks[0].in_features,)
    first = next((m for m in blocks[0].modules() if any(True for _ in m.parameters(recurse=False))), None)
    if isinstance(first, nn.Linear):
        return (first.in_features,)
    raise UsageError(
        "the input's shape cannot be told from the first layer; pass input_shape=(channels, height, width)"
    )


def sample_shape(input_shape: Shape | None, blocks: Sequence[nn.Module]) -> Shape:
    """The shape of one input sample as the user gave it, else as far as the first layer of `blocks` tells it.

    Raises:
        UsageError: it is no shape, or it was left out and cannot be told.
    """
    if input_shape is None:
        return infer_input_shape(blocks)
    if not isinstance(input_shape, (tuple, list)) or not all(type(n) is int and n > 0 for n in input_shape):
        raise UsageError(f"input_shape is that of one sample, such as (64,) or (3, 32, 32), got {input_shape!r}")
    return tuple(input_shape)


@torch.no_grad()
def block_output_shapes(blocks: Iterable[nn.Module], input_shape: Shape) -> list[Shape]:
    """The shape of one sample behind each block, found by sending zeros through the network once.

    Args:
        blocks: the blocks in forward order; their training mode and state are left as they are.
        input_shape: shape of one input sample, without the batch axis.

    Raises:
        UsageError: a block does not accept what comes out of the block before it, or returns more than one tensor.
    """
    shapes: list[Shape] = []
    signal: Tensor | Graph | None = None
    for index, block in enumerate(blocks):
        if signal is None:
            parameter = next(block.parameters())
            signal = torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device)
            if isinstance(block, GraphBlock):  # two nodes without an edge
                nothing = torch.empty(2, 0, dtype=torch.int64, device=parameter.device)
                signal = Graph.of(signal, nothing, torch.arange(2, device=parameter.device))
        was_training = block.training
        block.eval()
        try:
            signal = block(signal)
        except (RuntimeError, ValueError, IndexError) as error:
            shape = shapes[-1] if shapes else input_shape
            reason = str(error).strip().splitlines()[0]
            raise UsageError(f"block {index} does not accept inputs of shape {shape}: {reason}") from error
        finally:
            block.train(was_training)
        if not isinstance(signal, (Tensor, Graph)):
            raise UsageError(
                f"block {index} returns a {type(signal).__name__}, and a block hands on one tensor or Graph; wrap it "
                "in a module that returns what the next block takes"
            )
        shapes.append(tuple((signal.x if isinstance(signal, Graph) else signal).shape[1:]))
    return shapes


def dropout_linear_relu(block: nn.Module) -> tuple[StreamDropout | None, nn.Linear | None]:
    """The parts of a block that is `[Dropout ->] Linear -> ReLU` and nothing else; see `linear_relu`."""
    if isinstance(block, nn.Sequential) and len(block) and isinstance(block[0], StreamDropout):
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (block, block[0]))
        linear = None if hooked else linear_relu(block[1:])
        return (None if linear is None else block[0]), linear
    return None, linear_relu(block)


def linear_relu(block: nn.Module) -> nn.Linear | None:
    """The linear layer of a block that is `[Flatten ->] Linear -> ReLU` and nothing else, or None.

    Rules have closed-form updates for such blocks. A block with hooks is left to autograd, which runs them.
    """
    if not isinstance(block, nn.Sequential) or any(m._forward_hooks or m._forward_pre_hooks for m in block.modules()):
        return None
    layers = list(block)
    if layers and isinstance(layers[0], nn.Flatten) and (layers[0].start_dim, layers[0].end_dim) == (1, -1):
        layers = layers[1:]
    if len(layers) == 2 and type(layers[0]) is nn.Linear and type(layers[1]) is nn.ReLU:
        return layers[0]
    return None
