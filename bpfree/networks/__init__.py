"""Backbones as ordered blocks: what every learning rule trains, without a read-out."""

from bpfree.networks.blocks import as_blocks, block_output_shapes, infer_input_shape
from bpfree.networks.cnn import cnn
from bpfree.networks.gnn import GraphBlock, gnn
from bpfree.networks.graph import Edges, Graph
from bpfree.networks.heads import Head
from bpfree.networks.mlp import mlp
from bpfree.networks.noprop import Denoiser, image_branch
from bpfree.networks.registry import build_network, describe_networks
from bpfree.networks.streams import dropout_layers, set_dropout

__all__ = [
    "Denoiser",
    "Edges",
    "Graph",
    "GraphBlock",
    "Head",
    "as_blocks",
    "block_output_shapes",
    "build_network",
    "cnn",
    "describe_networks",
    "dropout_layers",
    "gnn",
    "image_branch",
    "infer_input_shape",
    "mlp",
    "set_dropout",
]
