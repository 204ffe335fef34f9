"""The recipe for weights without a download, shortened."""

import hashlib
import json

import pytest
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure import bundled
from gnetlab.measure.loop import train


def test_conv1_starts_small():
    model = bundled.start(0)
    assert model.conv1.conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert model.conv2.conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
    assert torch.equal(model.conv1.conv.weight, bundled.start(0).conv1.conv.weight)
    assert model.architecture.branch5x5 == "5x5"
    assert model.architecture.norm == "batch"


def test_weight_decay_spares_batch_norm():
    names = [name for name, _ in bundled.start(0).named_parameters()]
    decays = {name: bundled.weight_decay(name) for name in names}
    assert decays["conv1.conv.weight"] == 1e-2
    assert decays["inception3a.branch3x3.conv.conv.weight"] == decays["fc.weight"] == 5e-4
    assert all(decays[name] == 0 for name in names if ".bn." in name or name.endswith("bias"))
    assert sum(decay > 0 for decay in decays.values()) == 58


def test_low_frequencies_of_noise_and_of_edges():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 64, 7)
    assert 0.3 < bundled.low_frequency_energy(conv) < 0.65
    edge = torch.linspace(-1, 1, 7).view(1, 1, 1, 7).expand(64, 3, 7, 7)
    conv.weight.data.copy_(edge)
    assert bundled.low_frequency_energy(conv) > 0.8
    checkerboard = (-1.0) ** (torch.arange(7)[:, None] + torch.arange(7))
    conv.weight.data.copy_(checkerboard.expand(64, 3, 7, 7))
    assert bundled.low_frequency_energy(conv) < 0.1


def test_photographs_are_told_without_their_turns():
    fc = nn.Linear(3, 8)
    features = torch.randn(5, 3)
    expected = fc(features).unflatten(1, (2, 4)).mean(2)
    bundled._pool_classes(fc)
    assert fc.out_features == 2
    torch.testing.assert_close(fc(features), expected)


def test_a_short_training_writes_weights_and_their_card(tmp_path, monkeypatch):
    phases = [phase | {"size": 32} for phase in bundled.RECIPE["phases"]]
    small = bundled.RECIPE | {"batch_size": 4, "phases": phases}
    monkeypatch.setattr(bundled, "RECIPE", small)
    monkeypatch.setattr(bundled, "held_out_accuracy", lambda _: {"64": 0.5})
    path = tmp_path / "new" / "weights.safetensors"
    card = bundled.train_bundled(path, steps=2, progress=False)
    assert json.loads(path.with_suffix(".json").read_text()) == card
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [phase["steps"] for phase in card["recipe"]["phases"]] == [2] * 3
    assert not list(path.parent.glob("*.pt"))
    assert path.stat().st_size < 14e6
    model = gl.googlenet("paper", norm="batch", aux=False, num_classes=16, weights=path)
    assert model.conv1.conv.weight.dtype == torch.float32
    assert model.conv1.bn.running_mean.abs().sum() > 0


def test_an_interrupted_training_goes_on_and_another_recipe_starts_anew(tmp_path, monkeypatch):
    tame = {"size": 32, "learning_rate": 1e-3}
    phases = [phase | tame for phase in bundled.RECIPE["phases"][:2]]
    monkeypatch.setattr(bundled, "RECIPE", bundled.RECIPE | {"batch_size": 2, "phases": phases})
    monkeypatch.setattr(bundled, "held_out_accuracy", lambda _: {})
    whole = bundled.train_bundled(tmp_path / "whole.safetensors", steps=2, progress=False)
    path, ran = tmp_path / "cut.safetensors", []

    def until_the_second(model, data, **options):
        if len(ran) == 1:
            raise KeyboardInterrupt
        ran.append(len(data.classes))
        return train(model, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(bundled, "train", until_the_second)
        with pytest.raises(KeyboardInterrupt):
            bundled.train_bundled(path, steps=2, progress=False)
    assert ran == [64]
    assert len(list(tmp_path.glob("cut.*-1.pt"))) == 1
    other = bundled.train_bundled(path, steps=1, progress=False)  # not from the other's checkpoint
    fresh = bundled.train_bundled(tmp_path / "fresh.safetensors", steps=1, progress=False)
    assert other["sha256"] == fresh["sha256"] != whole["sha256"]
    assert bundled.train_bundled(path, steps=2, progress=False)["sha256"] == whole["sha256"]
