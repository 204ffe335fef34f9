"""A step that does not fit into memory is taken in halves; how far a step goes is in test_loop."""

import warnings

import pandas as pd
import pytest
import torch
from test_loop import Blobs, OnCPU, run, small, smooth
from torch.nn import functional as F

from gnetlab.measure import loop
from gnetlab.measure.distributed import ALONE, Processes
from gnetlab.measure.gradients import GradientRecorder, weighted_losses
from gnetlab.measure.steps import Step

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def limited(model, largest, seen=None, error=FULL):
    """The model, on a device whose memory holds `largest` images in training."""
    inner = model.forward

    def forward(images):
        if model.training:
            if len(images) > largest:
                raise error
            if seen is not None:
                seen.append(len(images))
        return inner(images)

    model.forward = forward
    return model


def plain(**changes):
    return smooth(dropout=0.0, head_dropout=0.0, **changes)


@pytest.mark.parametrize("count", [8, 7])
def test_two_halves_have_the_gradient_and_the_metrics_of_the_whole(count):
    images, labels = Blobs().train_batch(0, count)
    whole = plain()
    output = whole(images)
    torch.stack(list(weighted_losses(output, labels).values())).sum().backward()
    model = limited(plain(), 4)
    step = Step(model, torch.optim.SGD(model.parameters(), 0.0), ALONE, None, None, False)
    with pytest.warns(UserWarning, match=f"batch of {count} images does not fit .*two halves"):
        metrics = step(images, labels, 0.3, False)
    for one, other in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    loss, accuracy = metrics["main"]
    expected = F.cross_entropy(output.logits, labels).item()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    right = (output.logits.argmax(1) == labels).float().mean()
    assert float(accuracy) == pytest.approx(float(right))
    assert metrics["total"][1] is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_goes_on_in_halves_after_one_warning(optimizer):
    options = {"steps": 3, "optimizer": optimizer, "learning_rate": 1e-3, "clip": 0.5}
    models, seen = (plain(), plain()), []
    recorders = [GradientRecorder(model, every=0) for model in models]
    expected = run(models[0], gradients=recorders[0], **options)
    with pytest.warns(UserWarning, match="batch norm sees half batches") as caught:
        found = run(limited(models[1], 4, seen), gradients=recorders[1], **options)
    assert len(caught) == 1
    assert "batch of 8 images" in str(caught[0].message)
    assert caught[0].filename.endswith("test_loop.py")  # who called train
    assert seen == [4, 4] * 3
    assert [metrics.attrs["parts"] for _, metrics in (expected, found)] == [1, 2]
    pd.testing.assert_frame_equal(found[1], expected[1], rtol=1e-4, atol=1e-6)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-3, atol=1e-5)
    frames = [recorder.totals() for recorder in recorders]
    pd.testing.assert_frame_equal(*frames, rtol=1e-3, atol=1e-6)


def test_a_backward_pass_that_does_not_fit_is_taken_again():
    model, failed = plain(), []

    def once(gradient):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return gradient

    model.conv2.conv.weight.register_hook(once)
    with pytest.warns(UserWarning, match="two halves"):
        weights, _ = run(model, steps=1)
    expected, _ = run(plain(), steps=1)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def test_a_training_that_goes_on_takes_halves_from_its_first_step(tmp_path):
    path, seen = tmp_path / "run.pt", []
    with pytest.warns(UserWarning, match="two halves"):
        expected = run(limited(plain(), 4), steps=4)
    with pytest.warns(UserWarning, match="two halves"):
        run(limited(plain(), 4), steps=2, checkpoint=path)
    found = run(limited(plain(), 8, seen), steps=4, checkpoint=path)
    assert seen == [4, 4] * 2
    assert found[1].attrs["parts"] == 2
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value)


def test_a_loss_that_is_not_finite_says_in_which_parts_too():
    model = limited(plain(), 4)
    with (
        pytest.warns(UserWarning, match="two halves"),
        pytest.raises(RuntimeError, match="loss became") as raised,
    ):
        run(model, steps=30, learning_rate=1e30)
    assert raised.value.metrics.attrs["parts"] == 2


def test_an_optimizer_whose_state_does_not_fit_says_what_to_try(monkeypatch):
    def step(_):
        raise FULL

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(RuntimeError, match=r"what Adam keeps .* Try optimizer='sgd'") as raised,
    ):
        run(plain(), optimizer="adam")
    assert raised.value.__cause__ is FULL


def test_an_optimizer_s_other_error_is_its_own(monkeypatch):
    other = RuntimeError("shapes differ")

    def step(_):
        raise other

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(RuntimeError) as raised:
        run(plain())
    assert raised.value is other


@pytest.mark.parametrize("text", ["CUDNN_STATUS_ALLOC_FAILED", "MPS backend out of memory"])
def test_all_ways_to_say_that_memory_is_full_are_known(text):
    seen = []
    with pytest.warns(UserWarning, match=f"{text}.*two halves"):
        run(limited(plain(), 4, seen, RuntimeError(text)), steps=1)
    assert seen == [4, 4]


def test_another_error_is_not_taken_for_one(recwarn):
    other = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError) as raised:
        run(limited(plain(), 4, error=other), steps=1)
    assert raised.value is other
    assert not recwarn.list


def test_half_a_batch_that_does_not_fit_is_an_error_that_says_what_to_try(tmp_path):
    path = tmp_path / "run.pt"
    with (
        pytest.warns(UserWarning, match="two halves"),
        pytest.raises(RuntimeError, match=r"half of it does not fit either\. Try a smaller batch"),
    ):
        run(limited(small(), 3), checkpoint=path)
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 1}, "half of it does not fit either"),
        ({"gradients": 2}, "gradients that are split by source need the whole batch"),
        ({"processes": 2}, "processes that wait for each other"),
        ({"capturing": True}, r"CUDA graph cannot be taken again \(capture=False\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_where_halves_do_not_help_the_first_failure_is_the_last(monkeypatch, options, reason):
    model = limited(plain(), 0)
    if options.get("capturing"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    recorder = GradientRecorder(model, every=2) if "gradients" in options else None
    among = Processes(0, options.get("processes", 1))
    sgd = torch.optim.SGD(model.parameters())
    step = Step(model, sgd, among, recorder, None, False)
    batch = Blobs().train_batch(0, options.get("batch_size", 8))
    with warnings.catch_warnings(action="error"), pytest.raises(RuntimeError, match=reason):
        step(*batch, 0.3, False)


def test_a_captured_step_is_captured_in_halves(monkeypatch):
    made, seen = [], []
    monkeypatch.setattr(loop, "_check_capture", lambda *_: None)
    monkeypatch.setattr(loop, "Captured", lambda step: made.append(OnCPU(step)) or made[-1])
    with pytest.warns(UserWarning, match="two halves"):
        run(limited(plain(), 4, seen), steps=5, capture=True)
    assert (made[0].aside, made[0].replays) == (3, 2)
    assert seen == [4, 4] * 5
