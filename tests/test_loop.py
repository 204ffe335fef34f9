"""Training is plain SGD or Adam: reproducible, resumable, and loud when it goes wrong."""

import io
import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gnetlab as gl
from gnetlab.measure import loop, steps
from gnetlab.measure.gradients import GradientRecorder, gradient_flow
from gnetlab.measure.loop import evaluate, train

COLUMNS = ["step", "split", "source", "loss", "accuracy"]


class Blobs:
    """Four classes, each with its own colour, in noise; 19 test images in unequal batches."""

    classes, in_channels, size = ("red", "green", "blue", "grey"), 3, 16
    device = torch.device("cpu")

    def __init__(self, stop_at=None, nan_at=None):
        self.stop_at, self.nan_at, self.asked = stop_at, nan_at, []

    def _draw(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(4, (count,), generator=generator)
        images = 0.3 * torch.randn(count, 3, self.size, self.size, generator=generator)
        colours = torch.cat([torch.eye(3), torch.zeros(1, 3)])
        return images + 2 * colours[labels][:, :, None, None], labels

    def train_batch(self, step, batch_size, seed=0):
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((step, batch_size, seed))
        images, labels = self._draw(batch_size, 1000 * seed + step)
        return (images * math.nan if step == self.nan_at else images), labels

    def test_batches(self, batch_size=8):  # noqa: ARG002
        for i, count in enumerate((8, 8, 3)):
            yield self._draw(count, 10**6 + i)


def small(**changes):
    options = {"stem": "compact", "norm": "batch", "width": 0.1, "num_classes": 4, "seed": 0}
    return gl.googlenet(**(options | changes))


def smooth(**changes):
    """A network whose training does not blow rounding up, as batch norm over few pixels does."""
    return small(norm=None, init="xavier", **changes)


def run(model=None, data=None, **options):
    """Train quietly; return the model's weights and the metrics."""
    model = model or small()
    options = {"steps": 6, "batch_size": 8, "progress": False} | options
    metrics = train(model, data or Blobs(), **options)
    return model.state_dict(), metrics


def assert_equal(one, other):
    (weights, metrics), (other_weights, other_metrics) = one, other
    pd.testing.assert_frame_equal(metrics, other_metrics, check_exact=True)
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[key]) for key, value in weights.items())


def test_the_loss_decreases_on_an_easy_task():
    _, metrics = run(small(init="kaiming"), steps=20, batch_size=16, learning_rate=0.01)
    main = metrics[(metrics.source == "main") & (metrics.split == "train")].loss
    assert main[-3:].mean() < 0.5 * main[:3].mean()


def test_frame_is_as_documented():
    _, metrics = run(steps=5, test_every=2)
    assert list(metrics.columns) == COLUMNS
    assert metrics.index.equals(pd.RangeIndex(len(metrics)))
    test = metrics[metrics.split == "test"]
    assert test.step.tolist() == [2, 4, 5]
    assert test.source.tolist() == ["main"] * 3
    rest = metrics[metrics.split == "train"]
    assert rest.step.tolist() == [step for step in range(1, 6) for _ in range(4)]
    assert rest.source.tolist() == ["main", "aux1", "aux2", "total"] * 5
    assert (metrics.accuracy.isna() == (metrics.source == "total")).all()
    assert metrics.accuracy.dropna().between(0, 1).all()
    assert metrics.step.is_monotonic_increasing


@pytest.mark.parametrize("heads", [(), ("aux1",), ("aux2",)])
def test_heads_that_are_not_there_have_no_rows(heads):
    _, metrics = run(small(aux=heads), steps=2)
    assert set(metrics.source) == {"main", *heads, "total"}
    assert metrics[metrics.split == "test"].step.tolist() == [2]


def test_the_heads_of_torchvisions_network_have_our_names(torchvision_googlenet):
    data = Blobs()
    data.size = 64
    model = torchvision_googlenet(4, aux_logits=True)
    _, metrics = run(model, data, steps=1, batch_size=2)
    rows = metrics[metrics.split == "train"].set_index("source")
    assert rows.index.tolist() == ["main", "aux1", "aux2", "total"]
    expected = rows.loss["main"] + 0.3 * (rows.loss["aux1"] + rows.loss["aux2"])
    assert rows.loss["total"] == pytest.approx(expected, rel=1e-5)


def test_heads_are_told_apart_by_name():
    model = small()
    bias = {"main": model.fc, "aux1": model.aux1.fc2, "aux2": model.aux2.fc2}
    for i, layer in enumerate(bias.values()):  # each always answers its own class
        nn.init.zeros_(layer.weight)
        layer.bias = nn.Parameter(50.0 * torch.eye(4)[i])
    _, metrics = run(model, steps=1, batch_size=34, head_weight=0.7)
    _, labels = Blobs().train_batch(0, 34)
    first = metrics[metrics.split == "train"].set_index("source")
    for i, source in enumerate(bias):
        share = float((labels == i).double().mean())
        assert first.accuracy[source] == pytest.approx(share)
        assert first.loss[source] == pytest.approx(50 * (1 - share), rel=1e-5)
    assert first.loss["total"] == pytest.approx(
        first.loss["main"] + 0.7 * (first.loss["aux1"] + first.loss["aux2"]), rel=1e-5
    )
    assert len(set(labels.bincount(minlength=4)[:3].tolist())) == 3


@pytest.mark.parametrize(
    ("ours", "sgd"),
    [
        ({}, {"lr": 0.05, "momentum": 0.9}),
        ({"nesterov": True}, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        ({"learning_rate": 0.2, "momentum": 0.0, "clip": 0.5}, {"lr": 0.2}),
        (
            {"weight_decay": 0.1, "head_weight": 1.0},
            {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
        ),
    ],
)
def test_it_is_plain_sgd_on_the_weighted_losses(ours, sgd):
    weights, _ = run(smooth(), steps=3, seed=4, **ours)
    model, data, weight = smooth(), Blobs(), ours.get("head_weight", 0.3)
    optimizer = torch.optim.SGD(model.parameters(), **sgd)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for step in range(3):
            images, labels = data.train_batch(step, 8, 4)
            main, aux1, aux2 = (F.cross_entropy(logits, labels) for logits in model(images))
            optimizer.zero_grad()
            torch.stack([main, weight * aux1, weight * aux2]).sum().backward()
            if "clip" in ours:
                nn.utils.clip_grad_norm_(model.parameters(), ours["clip"])
            optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "clip": 0.5}], ids=str)
def test_it_is_adam_if_asked(options):
    weights, _ = run(smooth(), steps=4, optimizer="adam", learning_rate=1e-3, seed=4, **options)
    model, data = smooth(), Blobs()
    decay = options.get("weight_decay", 0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=decay)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for step in range(4):
            images, labels = data.train_batch(step, 8, 4)
            main, aux1, aux2 = (F.cross_entropy(logits, labels) for logits in model(images))
            optimizer.zero_grad()
            torch.stack([main, 0.3 * aux1, 0.3 * aux2]).sum().backward()
            if "clip" in options:
                nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
            optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "rmsprop"}, "optimizer='rmsprop' asked; choose one of sgd, adam"),
        ({"heads_until": -0.1}, "heads_until=-0.1 asked"),
        ({"heads_until": 1.01}, "heads_until=1.01 asked"),
        ({"clip": -1.0}, "clip=-1.0 asked; give the largest norm of the gradient, more than 0"),
        ({"clip": 0}, "clip=0 asked"),
        ({"clip": math.nan}, "clip=nan asked"),
        ({"steps": 0}, "steps=0 asked; give a number of steps from 1$"),
        ({"gradients": GradientRecorder(small())}, "is of another model than the one to train"),
        ({"capture": True}, "capture=True asked, but the model is on cpu"),
        ({"test_every": 0}, "test_every=0 asked; give a number of steps from 1, or None"),
        ({"save_every": 0}, "save_every=0 asked; give a number of steps from 1"),
    ],
)
def test_unknown_options_are_errors_before_anything_happens(tmp_path, options, message):
    data = Blobs()
    with pytest.raises(ValueError, match=message):
        run(data=data, checkpoint=tmp_path / "run.pt", **options)
    assert data.asked == []
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("until", "counted"), [(0.5, 3), (0.51, 4), (0.0, 0), (1 / 6, 1), (1.0, 6)]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_heads_count_until_a_share_of_the_steps(until, counted, optimizer):
    rate = 0.05 if optimizer == "sgd" else 0.001
    options = {"optimizer": optimizer, "learning_rate": rate, "seed": 4}
    weights, metrics = run(smooth(), heads_until=until, **options)
    model, data = smooth(), Blobs()
    kinds = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), rate, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), rate),
    }
    steps = kinds[optimizer]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for step in range(6):
            images, labels = data.train_batch(step, 8, 4)
            main, aux1, aux2 = (F.cross_entropy(logits, labels) for logits in model(images))
            steps.zero_grad()
            (main + (0.3 * (aux1 + aux2) if step < counted else 0)).backward()
            steps.step()
    trunk = {key: v for key, v in model.state_dict().items() if not key.startswith("aux")}
    assert "fc.weight" in trunk
    # Adam divides by the gradient's own size: where that is near zero, rounding decides the step.
    atol = 1e-5 if optimizer == "sgd" else 1e-4
    for key, value in trunk.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=atol)
    train = metrics[metrics.split == "train"].pivot(index="step", columns="source", values="loss")
    heads = train.total - train.main
    expected = 0.3 * (train.aux1 + train.aux2) * (train.index <= counted)
    assert heads.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_weight_decay_can_depend_on_the_name():
    def after_one_step(weight_decay):
        model = small()
        before = model.conv1.conv.weight.detach().clone()
        train(model, Blobs(), steps=1, batch_size=4, learning_rate=0.1, weight_decay=weight_decay,
              progress=False)  # fmt: skip
        return model, before

    plain, _ = after_one_step(0.0)
    chosen, before = after_one_step(lambda name: 0.5 if name == "conv1.conv.weight" else 0.0)
    difference = plain.conv1.conv.weight - chosen.conv1.conv.weight
    torch.testing.assert_close(difference, 0.1 * 0.5 * before, rtol=1e-4, atol=1e-6)
    assert torch.equal(plain.conv2.conv.weight, chosen.conv2.conv.weight)


def test_the_cosine_scales_the_learning_rate_of_every_group(monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "rate_share", lambda *place: asked.append(place) or 0.0)
    model = small()
    before = [p.detach().clone() for p in model.parameters()]
    train(model, Blobs(), steps=2, batch_size=4, learning_rate=0.1, cosine=True, progress=False,
          weight_decay=lambda name: 0.1 if "conv1" in name else 0.0)  # fmt: skip
    assert asked == [(0, 2), (1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_equal_seeds_give_equal_results():
    first, second, other = run(seed=3), run(seed=3), run(seed=4)
    assert_equal(first, second)
    assert not first[1].loss.equals(other[1].loss)
    assert not torch.equal(first[0]["conv1.conv.weight"], other[0]["conv1.conv.weight"])


def test_batches_depend_on_step_and_seed_only():
    data = Blobs()
    run(data=data, steps=3, batch_size=5, seed=9)
    assert data.asked == [(0, 5, 9), (1, 5, 9), (2, 5, 9)]


@pytest.mark.parametrize("stop_at", [3, 5, 8])
@pytest.mark.parametrize("norm", ["batch", None])
def test_an_interrupted_training_goes_on_as_if_it_never_was(tmp_path, stop_at, norm):
    options = {"steps": 9, "save_every": 3, "test_every": 4, "seed": 2}
    whole = run(small(norm=norm), **options)
    path = tmp_path / "deeper" / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(small(norm=norm), Blobs(stop_at=stop_at), checkpoint=path, **options)
    data = Blobs()
    again = run(small(norm=norm, seed=77), data, checkpoint=path, **options)
    assert_equal(whole, again)
    assert [step for step, *_ in data.asked] == list(range(stop_at // 3 * 3, 9))


def test_a_training_can_be_made_longer(tmp_path):
    path = tmp_path / "run.pt"
    run(steps=4, test_every=4, checkpoint=path)
    assert_equal(run(steps=8, test_every=4), run(steps=8, test_every=4, checkpoint=path))


@pytest.mark.parametrize(
    ("options", "was", "asked"),
    [
        ({"seed": 1}, "seed=0", "seed=1"),
        ({"batch_size": 4, "clip": 1.0}, "batch_size=8, clip=None", "batch_size=4, clip=1.0"),
        ({"learning_rate": 0.1}, "learning_rate=0.05", "learning_rate=0.1"),
        ({"momentum": 0.5}, "momentum=0.9", "momentum=0.5"),
        ({"weight_decay": lambda _: 0.1}, r"weight_decay=\[0.0\]", r"weight_decay=\[0.1\]"),
        ({"cosine": True}, "cosine=False", "cosine=True"),
        ({"optimizer": "adam"}, "optimizer='sgd', momentum=0.9", "optimizer='adam'"),
        ({"steps": 1}, "for 2 steps", "steps=1"),
    ],
    ids=lambda of: ", ".join(of) if isinstance(of, dict) else "",
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, options, was, asked):
    path, data = tmp_path / "run.pt", Blobs()
    run(steps=2, checkpoint=path)
    saved, model = path.read_bytes(), small(seed=77)
    with pytest.raises(
        ValueError,
        match=f"cannot go on from .*run.pt: it .*{was}.* but {asked}.*another checkpoint",
    ):
        run(model, data, **{"steps": 4, "checkpoint": path} | options)
    assert path.read_bytes() == saved
    assert data.asked == []
    assert torch.equal(model.fc.weight, small(seed=77).fc.weight)


def test_a_checkpoint_of_numpys_numbers_is_gone_on_from(tmp_path):
    path = tmp_path / "run.pt"
    names = ("learning_rate", "momentum", "weight_decay", "clip")
    options = {name: np.float64(0.1) for name in names}
    run(steps=2, checkpoint=path, **options)
    options = {name: value.item() for name, value in options.items()}
    run(steps=3, checkpoint=path, **options)


def test_a_checkpoint_without_settings_is_gone_on_from(tmp_path):
    path = tmp_path / "run.pt"
    run(steps=2, checkpoint=path)
    content = torch.load(path)
    del content["settings"]
    torch.save(content, path)
    assert_equal(run(steps=2), run(small(seed=77), steps=2, checkpoint=path))


def test_a_finished_training_is_only_read(tmp_path):
    path, data = tmp_path / "run.pt", Blobs()
    finished = run(checkpoint=path)
    assert_equal(finished, run(small(seed=77), data, checkpoint=path))
    assert data.asked == []


def test_saving_changes_nothing(tmp_path):
    assert_equal(run(), run(checkpoint=tmp_path / "run.pt", save_every=1))


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch, error):
    path = tmp_path / "run.pt"
    run(steps=3, checkpoint=path)
    before, save = path.read_bytes(), torch.save

    def broken(content, file):
        buffer = io.BytesIO()
        save(content, buffer)
        Path(file).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        raise error("no space left")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(error, match="no space left"):
        run(steps=5, checkpoint=path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["run.pt"]


def test_a_checkpoint_is_a_network_for_googlenet(tmp_path):
    path = tmp_path / "run.pt"
    model = small(branch5x5="3x3+3x3", aux="aux1")
    weights, _ = run(model, checkpoint=path)
    loaded = gl.googlenet(weights=path)
    assert loaded.architecture == model.architecture
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    assert os.listdir(tmp_path) == ["run.pt"]


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def damaged(kind, path):
    whole = path.read_bytes()
    if kind == "of another network":
        run(small(width=0.2), checkpoint=path.with_name("other.pt"), steps=1)
        return path.with_name("other.pt").read_bytes()
    if kind == "a bare state dict":
        buffer = io.BytesIO()
        torch.save(small().state_dict(), buffer)
        return buffer.getvalue()
    if kind == "hostile":
        return pickle.dumps(Hostile(path.with_name("hacked")), protocol=2)
    return {"empty": b"", "truncated": whole[: len(whole) // 2], "garbage": b"garbage" * 99}[kind]


@pytest.mark.parametrize(
    "kind",
    ["empty", "truncated", "garbage", "of another network", "a bare state dict", "hostile"],
)
def test_a_damaged_checkpoint_is_an_error(tmp_path, kind):
    path = tmp_path / "run.pt"
    run(steps=1, checkpoint=path)
    content = damaged(kind, path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"(?s)cannot go on from .*run\.pt.*Delete the file"):
        run(steps=2, checkpoint=path)
    assert path.read_bytes() == content
    assert not (tmp_path / "hacked").exists()


def test_a_loss_that_is_not_finite_is_an_error_that_keeps_the_metrics(tmp_path):
    path, data = tmp_path / "run.pt", Blobs(nan_at=3)
    run(steps=2, checkpoint=path)
    saved = path.read_bytes()
    with pytest.raises(RuntimeError, match=r"main loss became nan at step 4.*clip=1\.0") as caught:
        run(data=data, steps=60, checkpoint=path, save_every=6)
    metrics = caught.value.metrics
    assert list(metrics.columns) == COLUMNS
    finite = metrics[metrics.step <= 3]
    assert sorted(finite.step.unique()) == [1, 2, 3]
    assert finite.loss.notna().all()
    assert metrics.loss[metrics.step == 4].isna().all()
    assert path.read_bytes() == saved
    assert len(data.asked) <= 6 - 2  # found before the next checkpoint


def test_a_loss_that_is_not_finite_ends_the_training_soon():
    data = Blobs(nan_at=3)
    with pytest.raises(RuntimeError, match="nan at step 4"):
        run(data=data, steps=200)
    assert len(data.asked) < 30


def test_the_source_of_a_loss_that_is_not_finite_is_named():
    model = small()
    model.aux2.fc2.bias = nn.Parameter(torch.tensor([math.inf, 0, 0, 0]))
    with pytest.raises(RuntimeError, match="aux2 loss became nan at step 1"):
        run(model, steps=25)


def test_the_last_update_may_not_break_the_network_unseen(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.raises(RuntimeError, match=r"loss became (nan|inf) at step 1"):
        run(steps=1, learning_rate=1e38, checkpoint=path)
    assert not path.exists()


@pytest.mark.parametrize("clip", [0.05, 1e9, None])
def test_clip_bounds_the_gradient(clip):
    model = small()
    run(model, steps=1, clip=clip)
    norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    if clip == 0.05:
        assert norm == pytest.approx(0.05, rel=1e-3)
    else:
        assert norm > 0.5


def test_the_global_random_state_is_untouched(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run(steps=2, checkpoint=tmp_path / "run.pt")
    run(steps=3, checkpoint=tmp_path / "run.pt")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert_equal(run(steps=3), run(steps=3))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("progress", [False, True])
def test_progress_is_shown_if_asked_for_and_on_a_terminal(capsys, monkeypatch, progress, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run(steps=2, progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("2/2" in shown.err) == (progress and terminal)
    assert (shown.err == "") != (progress and terminal)


def test_channels_last_is_the_same_training():
    model, layouts = small(), []
    model.register_forward_pre_hook(
        lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    _, fast = run(model, steps=2, channels_last=True)
    assert layouts == [True] * (2 + 3)  # training and test batches
    assert model.conv1.conv.weight.is_contiguous(memory_format=torch.channels_last)
    _, plain = run(steps=2)
    pd.testing.assert_frame_equal(fast, plain, rtol=1e-3)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_algorithms_for_the_length_of_the_training(wanted):
    model, modes = small(), []
    model.register_forward_pre_hook(
        lambda *_: modes.append(torch.are_deterministic_algorithms_enabled())
    )
    found = run(model, steps=2, deterministic=wanted)
    assert modes == [wanted] * (2 + 3)  # training and test batches
    assert not torch.are_deterministic_algorithms_enabled()
    assert_equal(found, run(steps=2))


class Untested(Blobs):
    def test_batches(self, batch_size=8):  # noqa: ARG002
        return iter(())


def test_data_without_test_images_are_refused_before_training():
    data = Untested()
    with pytest.raises(ValueError, match=r"test_batches\(\) of Untested gives nothing"):
        run(data=data)
    assert data.asked == []
    for options in ({}, {"split": "train", "batches": 0}):
        with pytest.raises(ValueError, match="asked of Untested, which gave no image"):
            evaluate(small(), data, **options)


def test_evaluate_equals_a_direct_computation():
    weights, _ = run(steps=3)
    model = small()
    model.load_state_dict(weights)
    images, labels = (torch.cat(parts) for parts in zip(*Blobs().test_batches(), strict=True))
    with torch.no_grad():
        logits = model.eval()(images)
    scores = evaluate(model.train(), Blobs())
    assert scores.keys() == {"loss", "accuracy"}
    assert scores["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert len(labels) == 19


@pytest.mark.parametrize("mode", ["train", "eval", "frozen batch norm"])
def test_evaluate_leaves_the_model_as_before(mode):
    model = small().train(mode != "eval")
    if mode == "frozen batch norm":
        model.conv1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    asked = []
    model.register_forward_pre_hook(
        lambda m, _: asked.append((m.training, torch.is_grad_enabled()))
    )
    evaluate(model, Blobs())
    assert asked == [(False, False)] * 3
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes


class Few(Blobs):
    """Has no batch of more than 20 images."""

    def train_batch(self, step, batch_size, seed=0):
        if batch_size > 20:
            raise ValueError(f"batch_size={batch_size} asked, but there are 20 images to train on")
        return super().train_batch(step, batch_size, seed)


@pytest.mark.parametrize(("data", "size"), [(Blobs, 256), (Few, 16)])
def test_evaluate_on_training_images(data, size):
    weights, _ = run(steps=3)
    model = small()
    model.load_state_dict(weights)
    batches = [Blobs().train_batch(step, size) for step in range(3)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = model.eval()(images)
    scores = evaluate(model, data(), split="train", batches=3)
    assert scores["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert scores["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert scores != evaluate(model, data(), split="train", batches=1)


def test_evaluate_knows_two_splits():
    with pytest.raises(ValueError, match="split='val' asked; choose 'test' or 'train'"):
        evaluate(small(), Blobs(), split="val")


@pytest.mark.parametrize("data", [Blobs, Few])
def test_training_images_are_evaluated_beside_each_test(data):
    model = small()
    weights, metrics = run(model, data(), steps=5, test_every=2, train_batches=2, seed=3)
    rows = metrics[metrics.split.isin(["test", "train_eval"])]
    assert rows.split.tolist() == ["test", "train_eval"] * 3
    assert rows.step.tolist() == [2, 2, 4, 4, 5, 5]
    assert (rows.source == "main").all()
    for name, found in [("train", rows.iloc[-1]), ("test", rows.iloc[-2])]:
        direct = evaluate(model, data(), split=name, batches=2)
        assert {"loss": found.loss, "accuracy": found.accuracy} == direct
    assert rows.loss.iloc[-1] != rows.loss.iloc[-2]
    plain, others = run(small(), data(), steps=5, test_every=2, seed=3)
    rest = metrics[metrics.split != "train_eval"].reset_index(drop=True)
    assert_equal((weights, rest), (plain, others))


@pytest.mark.parametrize("options", [{}, {"clip": 0.1, "mixed_precision": False}], ids=str)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_recording_gradients_changes_nothing(norm, options):
    plain = run(small(norm=norm), **options)
    model = small(norm=norm)
    recorder = GradientRecorder(model, every=2)
    assert_equal(plain, run(model, gradients=recorder, **options))
    layers = [name for name, p in model.named_parameters() if p.dim() > 1]
    totals = recorder.totals()
    assert totals.step.value_counts().to_dict() == dict.fromkeys(range(6), len(layers))
    assert sorted(set(recorder.splits().step)) == [0, 2, 4]
    assert recorder.step == 6


def test_what_is_recorded_is_the_gradient_before_clipping():
    model = small(dropout=0.0, head_dropout=0.0)
    flow = gradient_flow(model, *Blobs().train_batch(0, 8))
    recorder = GradientRecorder(model, every=1)
    run(model, steps=1, clip=1e-3, gradients=recorder)
    split = recorder.splits().drop(columns="step")
    pd.testing.assert_frame_equal(split, flow, rtol=1e-4, atol=1e-9)
    total = flow[flow.source == "total"].gradient_rms.tolist()
    assert recorder.totals().gradient_rms.tolist() == pytest.approx(total, rel=1e-4)


def test_a_recorder_sees_when_heads_no_longer_count():
    model = small()
    recorder = GradientRecorder(model, every=1)
    run(model, steps=4, heads_until=0.5, gradients=recorder)
    splits = recorder.splits()
    heads = splits[splits.source.isin(["aux1", "aux2"])].groupby("step").gradient_rms
    assert heads.max()[[2, 3]].tolist() == [0, 0]
    assert (heads.min()[[0, 1]] > 0).all()
    totals = recorder.totals()
    totals = totals[totals.stage == "aux1"].groupby("step").gradient_rms.max()
    assert totals[[2, 3]].tolist() == [0, 0]


def test_a_step_that_is_split_is_taken_in_float32():
    model, kinds = small(), []
    model.conv1.register_forward_hook(
        lambda module, _i, output: kinds.append(output.dtype) if module.training else None
    )
    recorder = GradientRecorder(model, every=3)
    run(model, steps=5, mixed_precision=True, gradients=recorder)
    half, whole = torch.bfloat16, torch.float32
    assert [kind == whole for kind in kinds] == [True, False, False, True, False]
    assert set(kinds) == {half, whole}
    assert sorted(set(recorder.totals().step)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("stop_at", [3, 8])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_interrupted_recording_goes_on_as_if_it_never_was(tmp_path, stop_at, optimizer):
    options = {"steps": 9, "save_every": 3, "seed": 2, "optimizer": optimizer, "cosine": True}
    options |= {"learning_rate": 0.01, "heads_until": 0.6, "train_batches": 1, "test_every": 4}

    def recorded(stop_at=None, seed=0, **others):
        model = small(seed=seed)
        recorder = GradientRecorder(model, every=2)
        try:
            found = run(model, Few(stop_at), gradients=recorder, **options, **others)
        except KeyboardInterrupt:
            found = None
        return found, recorder

    path = tmp_path / "run.pt"
    whole, recorder = recorded()
    interrupted, first = recorded(stop_at, checkpoint=path)
    assert interrupted is None
    assert first.step == stop_at
    again, second = recorded(seed=77, checkpoint=path)
    assert_equal(whole, again)
    for kind in ("totals", "splits"):
        frames = getattr(second, kind)(), getattr(recorder, kind)()
        pd.testing.assert_frame_equal(*frames, check_exact=True)
    assert sorted(set(second.splits().step)) == [0, 2, 4, 6, 8]


def test_a_checkpoint_without_gradients_cannot_go_on_with_a_recorder(tmp_path):
    path, model = tmp_path / "run.pt", small()
    run(steps=2, checkpoint=path)
    with pytest.raises(
        ValueError,
        match=r"cannot go on from .*run\.pt: .* gradients_every=None, but gradients_every=20 asked",
    ):
        run(model, steps=4, checkpoint=path, gradients=GradientRecorder(model))


@pytest.mark.parametrize("every", [None, 1])
def test_a_recording_is_not_gone_on_with_by_another_recorder_or_none(tmp_path, every):
    path, model = tmp_path / "run.pt", small()
    run(model, steps=2, checkpoint=path, gradients=GradientRecorder(model, every=2))
    recorder = every and GradientRecorder(model, every=every)
    with pytest.raises(ValueError, match=f"gradients_every=2, but gradients_every={every} asked"):
        run(model, steps=4, checkpoint=path, gradients=recorder)


def test_a_loss_that_is_not_finite_keeps_the_gradients():
    model = small()
    recorder = GradientRecorder(model, every=2)
    with pytest.raises(RuntimeError, match="nan at step 4") as caught:
        run(model, Blobs(nan_at=3), steps=60, gradients=recorder, clip=1.0)
    metrics = caught.value.metrics
    assert metrics[metrics.step <= 3].loss.notna().all()
    assert set(metrics.source) == {"main", "aux1", "aux2", "total"}  # and no norms
    assert {0, 1, 2} <= set(recorder.totals().step)
    assert {0, 2} <= set(recorder.splits().step)
    plain = small()
    direct = GradientRecorder(plain, every=2)
    run(plain, steps=3, gradients=direct, clip=1.0)
    kept = recorder.totals()
    kept = kept[kept.step < 3].reset_index(drop=True)
    pd.testing.assert_frame_equal(kept, direct.totals(), check_exact=True)


class OnCPU(steps.Captured):
    """Records a step as a graph would be, without one: same memory in, same memory out."""

    def __init__(self, update):
        super().__init__(update)
        self.aside, self.recordings, self.replays = 0, [], 0

    def _aside(self, *step):
        self.aside += 1
        return self._update(*step)

    def _recorded(self, weight, split):
        taken, images, labels, written = self, self._images, self._labels, {}
        self.recordings.append((tuple(images.shape), weight))

        class Graph:
            def replay(self):
                taken.replays += 1
                found = taken._update(images, labels, weight, split)
                for source, pair in found.items():
                    memory = written.setdefault(
                        source, tuple(v if v is None else torch.empty_like(v) for v in pair)
                    )
                    for place, value in zip(memory, pair, strict=True):
                        if value is not None:
                            place.copy_(value)
                taken._metrics = written

        return Graph()


def test_a_captured_step_gives_what_the_step_gives():
    def update(images, labels, weight, split):
        assert split is False
        main = (images.sum() * weight, labels.sum().float())
        return {"main": main, "total": (images.mean() + labels[0], None)}

    take = OnCPU(update)
    steps = [(8, 0.3)] * 6 + [(8, 0.0)] * 3 + [(5, 0.0)] * 2 + [(8, 0.3)]
    found, expected, given = [], [], []
    for step, (count, weight) in enumerate(steps):
        images, labels = Blobs().train_batch(step, count)
        given.append((images, images.clone(), labels, labels.clone()))
        found.append(take(images, labels, weight, False))
        expected.append(update(images, labels, weight, False))
    assert found == expected  # also those of earlier steps, whose memory was written since
    for images, images_before, labels, labels_before in given:
        assert torch.equal(images, images_before)
        assert torch.equal(labels, labels_before)
    image = (3, 16, 16)
    assert take.aside == 3
    assert take.recordings == [
        ((8, *image), 0.3), ((8, *image), 0.0), ((5, *image), 0.0), ((8, *image), 0.3)
    ]  # fmt: skip
    assert take.replays == len(steps) - 3


@pytest.fixture
def captured(monkeypatch):
    """`train` captures on the CPU too; all that were made, and all optimizers."""
    made, optimizers = [], []
    monkeypatch.setattr(loop, "_check_capture", lambda *_: None)
    monkeypatch.setattr(loop, "Captured", lambda update: made.append(OnCPU(update)) or made[-1])
    real = loop.make_optimizer
    monkeypatch.setattr(
        loop, "make_optimizer", lambda *options: optimizers.append(real(*options)) or optimizers[-1]
    )
    return made, optimizers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adam", "learning_rate": 0.001, "cosine": True},
        {"cosine": True, "clip": 0.5, "heads_until": 0.6},
        {"weight_decay": lambda name: 0.1 * ("conv1" in name), "cosine": True},
    ],
    ids=" ".join,
)
def test_a_captured_training_is_the_same(captured, options):
    options = {"steps": 10, "learning_rate": 0.01, "test_every": 5} | options
    found = []
    for capture in (False, True):
        model = smooth()
        recorder = GradientRecorder(model, every=4)
        found.append((*run(model, capture=capture, gradients=recorder, **options), recorder))
    (weights, metrics, recorder), (other_weights, others, other) = found
    pd.testing.assert_frame_equal(others, metrics, rtol=1e-3, atol=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(other_weights[key], value, rtol=1e-3, atol=1e-4)
    pd.testing.assert_frame_equal(other.totals(), recorder.totals(), rtol=0.01, atol=1e-5)
    assert sorted(set(other.splits().step)) == [0, 4, 8]
    made, (_, optimizer) = captured
    assert [taken.aside for taken in made] == [3]
    assert made[0].replays == 10 - 3 - 3  # three are split
    assert len(made[0].recordings) == (2 if "heads_until" in options else 1)
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_optimizer_of_a_captured_step_takes_the_same_steps(name):
    def decay(name):
        return 0.1 if "conv" in name else 0.0

    models, trained = (small(norm=None), small(norm=None)), []
    for model, capture in zip(models, (False, True), strict=True):
        optimizer = steps.make_optimizer(name, model, 0.5, 0.9, decay, name == "sgd", capture)
        assert len(optimizer.param_groups) == 2
        generator = torch.Generator().manual_seed(0)
        for rate in (0.01, 0.003, 0.02, 0.0, 0.01):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            steps.set_rate(optimizer, rate)
            optimizer.step()
        for group in optimizer.param_groups:
            assert isinstance(group["lr"], torch.Tensor) == capture
            assert float(group["lr"]) == pytest.approx(0.01)
            assert group["fused"] or not capture
        trained.append(model.state_dict())
    for key, value in trained[0].items():
        torch.testing.assert_close(trained[1][key], value, rtol=1e-5, atol=1e-6)
    assert not torch.equal(trained[0]["fc.weight"], small(norm=None).fc.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("capture", [False, True])
def test_a_checkpoint_goes_on_with_and_without_capture(tmp_path, captured, capture, optimizer):
    options = {"optimizer": optimizer, "cosine": True, "checkpoint": tmp_path / "run.pt"}
    run(steps=4, capture=not capture, **options)
    run(steps=8, capture=capture, **options)
    _, (_, second) = captured
    for group in second.param_groups:
        # a graph cannot follow a learning rate that is a number
        assert isinstance(group["lr"], torch.Tensor) == capture
        assert bool(group.get("capturable")) == (capture and optimizer == "adam")


class OnCUDA(Blobs):
    device = torch.device("cuda")

    def _draw(self, count, seed):
        return tuple(part.cuda() for part in super()._draw(count, seed))


def on_cuda(capture, every=0, stop_at=None, **options):
    """Weights, metrics and recorder of a training on CUDA."""
    model = small(norm=None, dropout=0.0, head_dropout=0.0, init="xavier").cuda()
    recorder = GradientRecorder(model, every=every) if every else None
    options = {"steps": 8, "learning_rate": 0.01, "clip": 1.0} | options
    found = run(model, OnCUDA(stop_at), capture=capture, gradients=recorder, **options)
    return *found, recorder


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "adam", "learning_rate": 1e-3}, {"cosine": True, "heads_until": 0.7}],
    ids=str,
)
def test_a_captured_training_on_a_gpu_is_the_same(options):
    weights, metrics, _ = on_cuda(False, **options)
    found, others, _ = on_cuda(True, **options)
    by_default, _, _ = on_cuda(None, **options)
    pd.testing.assert_frame_equal(others, metrics, rtol=1e-3, atol=1e-3)
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(by_default[key], value, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_a_recorder_works_with_a_captured_training_on_a_gpu():
    (_, _, plain), (_, _, captured) = (on_cuda(capture, every=5) for capture in (False, True))
    assert sorted(set(captured.splits().step)) == [0, 5]
    pd.testing.assert_frame_equal(captured.totals(), plain.totals(), rtol=0.01, atol=1e-5)
    columns = ["step", "module", "source", "elements", "gradient_rms"]
    splits = (recorder.splits()[columns] for recorder in (captured, plain))
    pd.testing.assert_frame_equal(*splits, rtol=0.01, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_interrupted_captured_training_on_a_gpu_goes_on(tmp_path, optimizer):
    options = {"steps": 12, "save_every": 6, "optimizer": optimizer, "learning_rate": 1e-3}
    options |= {"cosine": True}
    weights, metrics, _ = on_cuda(True, **options)
    with pytest.raises(KeyboardInterrupt):
        on_cuda(True, stop_at=8, checkpoint=tmp_path / "run.pt", **options)
    found, others, _ = on_cuda(True, checkpoint=tmp_path / "run.pt", **options)
    pd.testing.assert_frame_equal(others, metrics, rtol=1e-3, atol=1e-3)
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-3)
