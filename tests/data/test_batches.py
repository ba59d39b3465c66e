"""Device-resident batches: order, normalisation, augmentation, and what may be kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bpfree.data.batches import CROP_PADDING, SHIFT, Batches, crop_flip, shift
from bpfree.errors import DataError, UsageError


def images(count: int = 20, channels: int = 3, size: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(256, (count, channels, size, size + 2), dtype=torch.uint8, generator=generator),
        torch.randint(5, (count,), generator=generator),
    )


def epoch(batches: Batches, *seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All samples of one epoch as one batch."""
    inputs, targets = batches.staging(1, len(batches))
    batches.fill(batches.draw(*seed), 0, inputs[0], targets[0])
    return inputs[0], targets[0]


def test_normalisation_follows_the_formula() -> None:
    x, y = images()
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    (got, _), *rest = list(Batches(x, y, mean=mean, std=std).in_order(20))
    assert not rest
    column = np.array(mean)[:, None, None], np.array(std)[:, None, None]
    np.testing.assert_allclose(got.numpy(), (x.numpy() / 255 - column[0]) / column[1], atol=1e-6)


def test_features_are_normalised_per_feature_and_otherwise_untouched() -> None:
    x, y = torch.randn(6, 4), torch.arange(6)
    (plain, _), *_ = Batches(x, y).in_order(6)
    assert torch.equal(plain, x)
    mean, std = (1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 1.0, 2.0)
    (got, _), *_ = Batches(x, y, mean=mean, std=std).in_order(6)
    torch.testing.assert_close(got, (x - torch.tensor(mean)) / torch.tensor(std))


def test_an_epoch_is_every_sample_once_with_its_label() -> None:
    x, y = torch.arange(50.0)[:, None], torch.arange(50)
    got, targets = epoch(Batches(x, y), 1, 2, 3)
    assert sorted(targets.tolist()) == list(range(50))
    assert torch.equal(got[:, 0].long(), targets)
    assert targets.tolist() != list(range(50))


def test_epochs_depend_on_the_whole_seed_and_on_nothing_else() -> None:
    x, y = torch.arange(50.0)[:, None], torch.arange(50)
    batches = Batches(x, y)
    first = epoch(batches, 7, 0, 0)[1]
    torch.manual_seed(123)
    assert torch.equal(first, epoch(batches, 7, 0, 0)[1])
    for other in ((8, 0, 0), (7, 1, 0), (7, 0, 1)):
        assert not torch.equal(first, epoch(batches, *other)[1])


def test_pieces_of_an_epoch_make_the_whole() -> None:
    x, y = images()
    batches = Batches(x, y, augmentation="crop-flip")
    whole, targets = epoch(batches, 3)
    draw = batches.draw(3)
    inputs, labels = batches.staging(5, 4)
    for piece in range(5):
        batches.fill(draw, 4 * piece, inputs[piece], labels[piece])
    assert torch.equal(inputs.flatten(0, 1), whole)
    assert torch.equal(labels.flatten(), targets)
    served = list(batches.epoch(draw, 6))
    assert [len(inputs) for inputs, _ in served] == [6, 6, 6, 2]
    for batch, parts in zip((whole, targets), zip(*served, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), batch)
    (late, _), *rest = batches.epoch(draw, 6, first_batch=2)
    assert torch.equal(late, whole[12:18])
    assert len(rest) == 1


def test_crop_and_flip_equal_numpy() -> None:
    """Pad by reflection, cut the window, mirror: the oracle is numpy.pad and slicing."""
    x, _ = images(30)
    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(30, generator=generator)
    offsets = torch.randint(2 * CROP_PADDING + 1, (30, 2), generator=generator)
    flips = torch.randint(2, (30, 1), dtype=torch.bool, generator=generator)
    got = crop_flip(x, order, offsets, flips).numpy()
    height, width = x.shape[2:]
    for position, index in enumerate(order.tolist()):
        padded = np.pad(x[index].numpy(), ((0, 0), (CROP_PADDING,) * 2, (CROP_PADDING,) * 2), mode="reflect")
        row, column = offsets[position].tolist()
        window = padded[:, row : row + height, column : column + width]
        np.testing.assert_array_equal(got[position], window[:, :, ::-1] if flips[position] else window)


def test_shift_equals_numpy() -> None:
    """Pad with zeros and cut the window: the oracle is numpy.pad and slicing."""
    x, _ = images(60)
    order = torch.randperm(60)
    offsets = torch.randint(2 * SHIFT + 1, (60, 2))
    assert len(offsets.unique(dim=0)) > 15
    got = shift(x, order, offsets).numpy()
    height, width = x.shape[2:]
    for position, index in enumerate(order.tolist()):
        padded = np.pad(x[index].numpy(), ((0, 0), (SHIFT,) * 2, (SHIFT,) * 2))
        row, column = offsets[position].tolist()
        np.testing.assert_array_equal(got[position], padded[:, row : row + height, column : column + width])


def test_shifts_are_drawn_anew_for_every_epoch_and_reach_the_batch() -> None:
    x, y = images(500, channels=1)
    batches = Batches(x, y, augmentation="shift")
    first, second = batches.draw(0), batches.draw(1)
    assert first.offsets is not None
    assert second.offsets is not None
    assert first.flips is None
    assert sorted(first.offsets.unique().tolist()) == list(range(2 * SHIFT + 1))
    assert not torch.equal(first.offsets, second.offsets)
    inputs, _ = epoch(batches, 0)
    torch.testing.assert_close(inputs, shift(x, first.order, first.offsets)[: len(inputs)] / 255)


def test_augmentation_draws_all_offsets_and_both_directions() -> None:
    x, y = images(2000, channels=1)
    draw = Batches(x, y, augmentation="crop-flip").draw(0)
    assert draw.offsets is not None
    assert draw.flips is not None
    assert sorted(draw.offsets.unique().tolist()) == list(range(2 * CROP_PADDING + 1))
    # 2000 fair coins: 5 standard deviations are 112
    assert 888 < draw.flips.sum().item() < 1112


def test_evaluation_order_is_stored_order_without_augmentation() -> None:
    x, y = images()
    got = list(Batches(x, y, augmentation="crop-flip").in_order(8))
    assert [len(targets) for _, targets in got] == [8, 8, 4]
    torch.testing.assert_close(torch.cat([inputs for inputs, _ in got]), x / 255)
    assert torch.equal(torch.cat([targets for _, targets in got]), y)


def test_kept_outputs_equal_outputs_computed_again() -> None:
    x, y = torch.randn(11, 4), torch.arange(11)
    layer = torch.nn.Linear(4, 3)
    kept = Batches(x, y).map(lambda inputs: layer(inputs).detach(), batch_size=4)
    got, targets = epoch(kept, 5)
    inputs, again = epoch(Batches(x, y), 5)
    assert torch.equal(targets, again)
    torch.testing.assert_close(got, layer(inputs).detach(), rtol=0, atol=1e-6)
    assert not kept.inputs.requires_grad


def test_outputs_of_augmented_samples_are_not_kept() -> None:
    x, y = images()
    with pytest.raises(DataError, match="every epoch has its own"):
        Batches(x, y, augmentation="crop-flip").map(lambda inputs: inputs, batch_size=4)


def test_channels_last_changes_layout_only() -> None:
    x, y = images()
    plain, last = Batches(x, y), Batches(x, y, layout=torch.channels_last)
    a, b = epoch(plain, 0)[0], epoch(last, 0)[0]
    assert torch.equal(a, b)
    assert b.is_contiguous(memory_format=torch.channels_last)
    assert next(last.in_order(5))[0].is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_augmented_or_normalised_is_refused() -> None:
    x, y = images()
    with pytest.raises(DataError, match="crop-flip needs images"):
        Batches(torch.randn(5, 4), torch.arange(5), augmentation="crop-flip")
    with pytest.raises(DataError, match="larger than 4 pixels"):
        Batches(x[:, :, :4], y, augmentation="crop-flip")
    with pytest.raises(UsageError, match="did you mean crop-flip"):
        Batches(x, y, augmentation="crop_flip")
    with pytest.raises(DataError, match="3 channels"):
        Batches(x, y, mean=(0.5,), std=(0.5,))


@pytest.mark.gpu
def test_epochs_are_the_same_on_every_device() -> None:
    x, y = images()
    cpu, cuda = (Batches(x, y, device=device, augmentation="crop-flip") for device in ("cpu", "cuda"))
    (a, b), (c, d) = epoch(cpu, 4), epoch(cuda, 4)
    assert torch.equal(a, c.cpu())
    assert torch.equal(b, d.cpu())


@pytest.mark.parametrize("augmentation", ["none", "crop-flip"])
def test_samples_to_be_reconstructed_are_their_own_targets_as_they_are_served(augmentation: str) -> None:
    x, y = images()
    batches = Batches(x, y, augmentation=augmentation, reconstruct=True)
    staged = batches.stage(2, 5)
    staged.fill(batches.draw(1), 0, 2)
    for inputs, targets in (staged[1], *batches.epoch(batches.draw(1), 5), *batches.in_order(7)):
        assert inputs.is_floating_point()
        assert targets is inputs


def test_answers_are_rated_by_the_highest_score_and_cross_entropy() -> None:
    batches = Batches(*images())
    scores, targets = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0], [5.0, 4.0, 3.0]]), torch.tensor([1, 0, 2])
    assert batches.hits(scores, targets).item() == 2
    rows = [(3.0, (1.0, 3.0, 2.0)), (0.0, (0.0, -1.0, -2.0)), (3.0, (5.0, 4.0, 3.0))]
    expected = sum(np.log(np.exp(row).sum()) - own for own, row in rows)
    assert batches.losses(scores, targets).item() == pytest.approx(expected)


def test_reconstructions_are_rated_by_squared_error_and_r_squared() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    x, y = images(50)
    batches = Batches(x, y, reconstruct=True)
    assert (batches.criterion, batches.metric) == ("MSE", "R2")
    total, hits, made = 0.0, 0.0, []
    for inputs, targets in batches.in_order(20):  # unequal batches
        made.append((targets + 0.1 * torch.randn_like(inputs)).flatten(1))
        reconstructions = made[-1].view_as(targets)
        total += batches.losses(reconstructions, targets).item()
        hits += batches.hits(reconstructions, targets).item()
    wanted, got = x.flatten(1).double().numpy() / 255, torch.cat(made).numpy()
    assert total / 50 == pytest.approx(sklearn_metrics.mean_squared_error(wanted, got), rel=1e-5)
    r2 = sklearn_metrics.r2_score(wanted, got, multioutput="variance_weighted")
    assert hits / 50 == pytest.approx(r2, rel=1e-5)


def test_as_many_targets_as_inputs() -> None:
    x, y = images()
    with pytest.raises(DataError, match="20 inputs but 19 targets"):
        Batches(x, y[:-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="there is no cuda here"):
        Batches(*images(), device="cuda")
