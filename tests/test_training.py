"""Training is plain SGD: reproducible, resumable, and loud when it goes wrong."""

import io
import math
import os
import pickle
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gnetlab as gl
from gnetlab.measure import training
from gnetlab.measure.training import compare, escape_steps, evaluate, train

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
    assert main[-3:].mean() < 0.4 * main[:3].mean()


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
    weights, _ = run(steps=3, seed=4, **ours)
    model, data, weight = small(), Blobs(), ours.get("head_weight", 0.3)
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
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-7)


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
    monkeypatch.setattr(training, "_cosine", lambda *place: asked.append(place) or 0.0)
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


NETWORK = {"stem": "compact", "norm": "batch", "width": 0.1, "num_classes": 4}
OPTIONS = {"steps": 3, "batch_size": 8, "progress": False}


def test_compare_trains_every_variant_from_every_seed():
    variants = {"with": {}, "without": {"aux": False, "norm": None}}
    frame = compare(variants, Blobs(), iter((3, 1)), network=NETWORK, **OPTIONS)
    assert list(frame.columns) == [*COLUMNS, "variant", "seed"]
    assert frame.index.equals(pd.RangeIndex(len(frame)))
    runs = dict(list(frame.groupby(["variant", "seed"], sort=False)))
    assert list(runs) == [("with", 3), ("with", 1), ("without", 3), ("without", 1)]
    for (variant, seed), rows in runs.items():
        _, alone = run(gl.googlenet(**NETWORK | variants[variant], seed=seed), seed=seed, **OPTIONS)
        found = rows[COLUMNS].reset_index(drop=True)
        pd.testing.assert_frame_equal(found, alone, check_exact=True)


def test_compared_runs_do_not_go_on_from_each_others_checkpoint(tmp_path):
    options = OPTIONS | {"checkpoint": tmp_path / "run.pt"}
    try:
        frame = compare({"with": {}}, Blobs(), (0, 1), network=NETWORK, **options)
    except ValueError:
        return  # refused
    first, second = (rows.loss.tolist() for _, rows in frame.groupby("seed"))
    assert first != second


def run_of(losses, **columns):
    """Metrics with these main losses in training; everything else lies below chance."""
    rows = [
        {
            "step": step,
            "split": split,
            "source": source,
            "loss": 0.1 * step,
            "accuracy": 0.01 * step,
        }
        for step in range(1, len(losses) + 1)
        for split in ("train", "test")
        for source in ("main", "aux1")
    ]
    frame = pd.DataFrame(rows)
    main = (frame.split == "train") & (frame.source == "main")
    frame.loc[main, "loss"] = losses
    return frame.assign(**columns)


@pytest.mark.parametrize(
    ("smooth", "classes", "step"),
    [(1, 4, 5), (4, 4, 5), (8, 4, 8), (9, 4, None), (1, 100, 1), (1, 2, None)],
)
def test_escape_from_chance(smooth, classes, step):
    chance = math.log(4)
    metrics = pd.concat(
        [
            run_of([chance] * 4 + [0.5 * chance] * 4, variant="b", seed=1),
            run_of([chance] * 5, variant="a", seed=0),
        ]
    )
    frame = escape_steps(metrics, classes, smooth=smooth)
    assert list(frame.columns) == ["variant", "seed", "escape_step", "test_loss", "test_accuracy"]
    assert str(frame.escape_step.dtype) == "Int64"
    assert frame.variant.tolist() == ["b", "a"]
    assert frame.seed.tolist() == [1, 0]
    assert frame.test_loss.tolist() == pytest.approx([0.8, 0.5])
    assert frame.test_accuracy.tolist() == pytest.approx([0.08, 0.05])
    stuck = 1 if (smooth, classes) == (1, 100) else None
    assert [None if pd.isna(s) else s for s in frame.escape_step] == [step, stuck]
