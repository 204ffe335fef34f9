"""Augmented crops: where they are cut, what happens to their colours, and that they repeat."""

import numpy as np
import pytest
import torch

from gnetlab.net.augment import AugmentedCrops, recolour
from gnetlab.net.data import PhotoCrops


@pytest.fixture(scope="module")
def crops():
    return AugmentedCrops(size=32, quarters=True)


def test_batches_depend_on_step_size_and_seed_alone(crops):
    images, labels = crops.train_batch(3, 8, seed=1)
    again, same = crops.train_batch(3, 8, seed=1)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(images, crops.train_batch(4, 8, seed=1)[0])
    assert not torch.equal(images, crops.train_batch(3, 8, seed=2)[0])
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    before = torch.get_rng_state()
    crops.train_batch(3, 8)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("quarters", [True, False])
def test_test_crops_are_those_of_photocrops(quarters):
    plain = next(PhotoCrops(size=48, scale=(40, 180)).test_batches(16))
    ours = next(AugmentedCrops(size=48, quarters=quarters).test_batches(16))
    assert torch.equal(plain[0], ours[0])
    assert torch.equal(4 * plain[1] if quarters else plain[1], ours[1])


def test_classes_are_photographs_or_photographs_and_quarter_turns(crops):
    plain = AugmentedCrops(size=32)
    assert len(crops.classes) == 64
    assert crops.classes[9] == f"{plain.classes[2]}, a quarter turned"
    labels = crops.train_batch(0, 4000)[1]
    assert labels.bincount(minlength=64).min() > 30  # of 62
    assert plain.train_batch(0, 4000)[1].bincount(minlength=16).min() > 190  # of 250


@pytest.mark.parametrize("quarters", [True, False])
def test_crops_are_turned_by_quarters_on_demand_only(monkeypatch, quarters):
    data, turns = AugmentedCrops(size=16, quarters=quarters), []
    cut = data._grid
    monkeypatch.setattr(data, "_grid", lambda *given: turns.append(given[1]) or cut(*given))
    data.train_batch(0, 64)
    assert turns[0].unique().tolist() == ([0, 1, 2, 3] if quarters else [0])


def test_every_pixel_comes_from_the_training_region(crops):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16).repeat(40)
    quarter = torch.arange(4).repeat(160)
    grid = crops._grid(labels, quarter, generator).view(len(labels), 32, 32, 2)
    high, wide = crops._atlas.shape[2:]
    rows, columns = (grid[..., 1] + 1) * high / 2, (grid[..., 0] + 1) * wide / 2
    for i, label in enumerate(labels.tolist()):
        fits = []
        for level, (origin, _, _) in enumerate(crops._places[label]):
            for part in crops.regions("train", label):
                top, left, height, width = (v / 2**level for v in part)
                fits.append(
                    rows[i].min() >= origin + top - 0.01
                    and rows[i].max() <= origin + top + height + 0.01
                    and columns[i].min() >= 1 + left - 0.01
                    and columns[i].max() <= 1 + left + width + 0.01
                )
        assert any(fits), crops.classes[label]


def test_crops_are_turned_and_mirrored_but_not_torn(crops):
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(400, dtype=torch.long)
    quarter = torch.arange(4).repeat(100)
    grid = crops._grid(labels, quarter, generator).view(400, 32, 32, 2)
    high, wide = crops._atlas.shape[2:]
    pixels = torch.stack([grid[..., 0] * wide / 2, grid[..., 1] * high / 2], dim=-1)
    right, down = pixels[:, 0, 1] - pixels[:, 0, 0], pixels[:, 1, 0] - pixels[:, 0, 0]
    # The sides stand at right angles, in ratios of up to 4:3, in both orientations.
    assert (right * down).sum(1).abs().max() < 1e-2
    ratio = right.norm(dim=1) / down.norm(dim=1)
    assert 0.74 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.35
    turning = right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0]
    assert 0.4 < (turning > 0).float().mean() < 0.6
    degrees = torch.rad2deg(torch.atan2(down[:, 0], down[:, 1]))
    off = (degrees - 90 * (degrees / 90).round()).abs()
    assert 20 < off.max() < 25.5
    turns = ((degrees / 90).round() % 4).view(100, 4)  # the label says by which quarter
    assert (turns == turns[0]).all()
    assert sorted(turns[0].tolist()) == [0, 1, 2, 3]
    upright = crops._grid(labels, torch.zeros(400, dtype=torch.long), generator)
    upright = upright.view(400, 32, 32, 2)
    assert (upright[:, 1, 0, 1] > upright[:, 0, 0, 1]).all()  # down is down


def test_colours_change_and_grey_stays_about_grey():
    grey = torch.full((400, 3, 4, 4), 0.5)
    mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    images = (grey - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    out = recolour(images, torch.Generator().manual_seed(0))
    rgb = (out * deviation.view(3, 1, 1) + mean.view(3, 1, 1)).mean((2, 3))
    assert rgb.std(dim=1).median() < 0.03
    assert 0.05 < rgb.mean(1).std() < 0.2
    red = torch.tensor([0.9, 0.1, 0.1]).view(1, 3, 1, 1).expand(400, 3, 4, 4)
    images = (red - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    out = recolour(images, torch.Generator().manual_seed(0))
    rgb = (out * deviation.view(3, 1, 1) + mean.view(3, 1, 1)).mean((2, 3))
    without_colour = rgb.std(dim=1) < 0.02
    assert 0.1 < without_colour.float().mean() < 0.35
    strongest = rgb[~without_colour].argmax(1)
    assert len(np.unique(strongest)) == 3  # some red things become green or blue
    assert (strongest == 0).float().mean() > 0.4  # most stay red
