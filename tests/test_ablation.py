"""Ablation, against a network whose branch is silenced by a hook."""

import pytest
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure import ablation
from gnetlab.measure.ablation import branch_ablation


@pytest.fixture(scope="module")
def model():
    model = gl.googlenet("paper", weights="auto", aux=False, width=0.1, num_classes=3, seed=0)
    with torch.no_grad():
        model.fc.weight.mul_(20)  # confident enough that answers differ
    return model.train()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, 64, 64, generator=generator)
    labels = torch.randint(3, (12,), generator=generator)
    return list(zip(images.split(5), labels.split(5), strict=True))


@pytest.fixture(scope="module")
def frame(model, batches):
    return branch_ablation(model, batches)


def silenced(model, batches, name, value):
    """Logits with a branch's output replaced by `value(output)`."""
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _i, out: value(out))
    try:
        with torch.no_grad():
            return torch.cat([model.eval()(images) for images, _ in batches])
    finally:
        handle.remove()
        model.train()


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0.02, 0.06), (0.0, 0.3), (0.2, 0.2)])
def test_the_interval_holds_the_true_change_as_often_as_it_says(gained, lost):
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(1000):
        drawn = torch.rand(48, generator=generator)
        changes = (drawn < gained).double() - (drawn > 1 - lost).double()
        row = ablation._row("inception3a.branch1x1", "zero", changes[:, None].expand(48, 2), 1.0)
        held += row["low"] <= gained - lost <= row["high"]
        assert 0.02 < row["high"] - row["low"] < 0.6
    assert held / 1000 > 0.93


@pytest.mark.parametrize("name", ["inception3a.branch1x1", "inception4c.branch5x5",
                                  "inception5b.branch_pool"])  # fmt: skip
def test_zero_ablation_equals_a_branch_that_puts_out_zeros(name, model, batches, frame):
    labels = torch.cat([labels for _, labels in batches])
    whole = silenced(model, batches, name, lambda out: out)
    without = silenced(model, batches, name, torch.zeros_like)
    row = frame[(frame.module == name) & (frame.kind == "zero")].iloc[0]
    right = (without.argmax(1) == labels).double()
    differences = right - (whole.argmax(1) == labels).double()
    assert row.accuracy == pytest.approx(right.mean().item())
    assert row.change == pytest.approx(differences.mean().item())
    padded = torch.cat([differences, torch.tensor([0.0, 1.0, 0.0, -1.0]).double() / 2])
    weights = torch.tensor([1.0] * 12 + [0.5, 0.5, 0.5, 0.5]).double()
    middle = (padded.sign() * weights).sum().item() / 14  # Agresti and Min: n + 2
    square = (padded.sign() ** 2 * weights).sum().item() / 14
    margin = 1.96 * ((square - middle**2) / 14) ** 0.5
    assert (row.low, row.high) == pytest.approx((middle - margin, middle + margin))
    logits = (without - whole).gather(1, labels[:, None]).mean().item()
    assert row.logit_change == pytest.approx(logits, rel=1e-4)
    assert abs(logits) > 1e-3
    assert row.images == 12


def test_mean_ablation_equals_a_branch_that_puts_out_its_mean(model, batches, frame):
    name, kept = "inception4b.branch3x3", []
    silenced(model, batches, name, kept.append)  # append returns None: the output stays
    mean = torch.cat(kept).mean((0, 2, 3))[:, None, None]
    whole = silenced(model, batches, name, lambda out: out)
    without = silenced(model, batches, name, lambda out: mean.expand_as(out))
    labels = torch.cat([labels for _, labels in batches])
    row = frame[(frame.module == name) & (frame.kind == "mean")].iloc[0]
    expected = (without - whole).gather(1, labels[:, None]).mean().item()
    assert row.logit_change == pytest.approx(expected, rel=1e-3)


def test_frame_is_as_documented(frame, model):
    assert list(frame.columns) == [
        "module", "stage", "branch", "kind", "accuracy", "change", "low", "high", "logit_change",
        "images",
    ]  # fmt: skip
    assert len(frame) == 36 * 2
    assert set(frame.module) == set(gl.branch_names(model))
    assert ((frame.low <= frame.change) & (frame.change <= frame.high)).all()
    assert frame.accuracy.between(0, 1).all()


def test_the_model_is_as_before(model, batches):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    one = branch_ablation(model, batches[:1], kinds="zero")
    assert set(one.kind) == {"zero"}
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_wrong_input_is_refused(model, batches):
    with pytest.raises(ValueError, match=r"kinds=.'noise'.*zero, mean"):
        branch_ablation(model, batches, kinds="noise")
    with pytest.raises(ValueError, match="not gnetlab's"):
        branch_ablation(nn.Sequential(nn.Flatten()), batches)
    with pytest.raises(ValueError, match="no images"):
        branch_ablation(model, [])


def test_labels_are_class_numbers(model, batches):
    images, labels = batches[0]
    with pytest.raises(ValueError, match=r"torch.float32 were given; .* targets.long\(\)"):
        branch_ablation(model, [(images, labels.float())])
    frame, of_bytes = (branch_ablation(model, [(images, y)]) for y in (labels, labels.byte()))
    assert of_bytes.equals(frame)
