"""Pictures of what a run has made."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from bpfree.errors import UsageError


def require_matplotlib() -> None:
    """Refuse to go on without the library that draws.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UsageError("reconstructions are drawn with matplotlib: pip install 'bpfree[plot]'")


def draw_reconstructions(file: Path, images: Tensor, reconstructions: Tensor) -> None:
    """Images in one row, their reconstructions below.

    Args:
        file: where the picture goes; its suffix says the format.
        images: (N, C, H, W), C = 1 for grey or 3 for colour. Where their values leave [0, 1], because they are
            standardised, both rows are scaled by the images' range.
        reconstructions: of the same shape; values outside of the images' range are cut off.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    low, high = min(0.0, images.min().item()), max(1.0, images.max().item())
    canvas, panels = plt.subplots(2, len(images), figsize=(len(images), 2), squeeze=False)
    for row, batch in zip(panels, (images, reconstructions), strict=True):
        for panel, image in zip(row, batch.float().cpu(), strict=True):
            panel.imshow(
                ((image - low) / (high - low)).clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1
            )
            panel.set_axis_off()
    canvas.subplots_adjust(0, 0, 1, 1, 0.05, 0.05)
    canvas.savefig(file, dpi=150)
    plt.close(canvas)
