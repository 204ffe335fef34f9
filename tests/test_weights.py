import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from gnetlab.measure.activations import branch_summary
from gnetlab.net import weights
from gnetlab.net.architecture import PRESETS
from gnetlab.net.data import PhotoCrops
from gnetlab.net.model import googlenet
from gnetlab.net.weights import (
    BUNDLED,
    BUNDLED_SHA256,
    calibrate_batch_norm,
    calibration_images,
    fill,
    find,
    from_torchvision,
    read_checkpoint,
    saved_architecture,
)

IMAGENET_FILE = "googlenet-1378be20.pth"
SUFFIXES = (".pth", ".pt", ".safetensors")


def small(preset="cifar", **options):
    return googlenet(preset, **{"width": 0.1, "num_classes": 5, "seed": 0} | options)


def images(side=64, *, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def predict(model, x):
    with torch.no_grad():
        return model.eval()(x)


def same_state(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def save(state, path):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty torch.hub cache of the test's own, and a network that fails the test if used."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def used(*_args, **_options):
        pytest.fail("the network was used")

    monkeypatch.setattr(urllib.request, "urlopen", used)
    monkeypatch.setattr(torch.hub, "download_url_to_file", used)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def place_imagenet(monkeypatch, path, state):
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "IMAGENET_SHA256", digest[:8])


# --- ImageNet's, and "auto" -------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["bundled", "auto"])
def test_bundled_weights_need_no_network(asked):
    model = googlenet(weights=asked).eval()
    assert model.weights_note.startswith("bundled weights (trained on crops of 16 photographs")
    arch = model.architecture
    assert (arch.norm, arch.branch5x5, arch.heads, arch.num_classes) == ("batch", "5x5", (), 16)
    assert model.classes == PhotoCrops().classes
    # As good as their card says, of half of the crops that it is about.
    card = json.loads(BUNDLED.with_suffix(".json").read_text())
    right = count = 0
    for images, labels in PhotoCrops(size=64, test_size=512).test_batches(128):
        with torch.no_grad():
            right += int((model(images).argmax(1) == labels).sum())
        count += len(labels)
    assert right / count == pytest.approx(card["held_out_accuracy"]["64"], abs=0.05)
    assert card["sha256"] == BUNDLED_SHA256


def test_bundled_weights_are_small_and_no_branch_is_silent():
    assert BUNDLED.stat().st_size < 14e6
    summary = branch_summary(googlenet(weights="bundled"), calibration_images(96, 3))
    assert summary.energy_ratio.min() > 0.02
    assert (summary.dead < 0.5 * summary.channels).all()


def test_damaged_bundled_weights_are_an_error(monkeypatch, tmp_path):
    damaged = tmp_path / "bundled.safetensors"
    damaged.write_bytes(BUNDLED.read_bytes()[:-1])
    for path, digest in ((damaged, "SHA-256 is [0-9a-f]{64}"), (tmp_path / "none", "missing")):
        monkeypatch.setattr(weights, "BUNDLED", path)
        for asked in ("bundled", "auto"):
            with pytest.raises(ValueError, match=rf"is damaged: its .*{digest}.*Install gnetlab"):
                googlenet(weights=asked)


@pytest.mark.parametrize(
    "changes", [{"aux": True}, {"width": 0.5}, {"num_classes": 10}, {"preset": "torchvision"}]
)
def test_auto_is_random_for_a_network_that_the_bundled_weights_do_not_fit(changes):
    assert googlenet(weights="auto", **changes).weights_note.startswith("random weights (seed 0)")


@pytest.mark.parametrize("asked", ["imagenet", "auto"])
def test_imagenet_weights_give_torchvisions_outputs(hub, monkeypatch, torchvision_googlenet, asked):
    theirs = torchvision_googlenet(1000, aux_logits=True)
    place_imagenet(monkeypatch, hub / IMAGENET_FILE, theirs.state_dict())
    theirs.transform_input = True  # as torchvision sets it for these weights
    model = googlenet(weights=asked)
    assert model.architecture == PRESETS["torchvision"].change(heads=(), transform_input=True)
    assert "ImageNet" in model.weights_note
    assert "3x3" in model.weights_note
    assert (len(model.classes), model.classes[281]) == (1000, "tabby")
    x = images(96).double()
    expected = predict(theirs.double(), x)
    torch.testing.assert_close(predict(model.double(), x), expected, rtol=1e-5, atol=1e-5)


def test_imagenet_weights_are_known_by_their_digest_at_any_path(
    tmp_path, monkeypatch, torchvision_googlenet
):
    theirs = torchvision_googlenet(1000, aux_logits=True)
    place_imagenet(monkeypatch, tmp_path / "moved.pth", theirs.state_dict())
    theirs.transform_input = True
    model = googlenet(weights=tmp_path / "moved.pth")
    assert model.architecture == PRESETS["torchvision"].change(heads=(), transform_input=True)
    assert model.weights_note.startswith("ImageNet")
    x = images(96).double()
    expected = predict(theirs.double(), x)
    torch.testing.assert_close(predict(model.double(), x), expected, rtol=1e-5, atol=1e-5)


def test_imagenet_weights_bring_their_heads_where_asked(hub, monkeypatch, torchvision_googlenet):
    theirs = torchvision_googlenet(1000, aux_logits=True)
    place_imagenet(monkeypatch, hub / IMAGENET_FILE, theirs.state_dict())
    model = googlenet("torchvision", weights="imagenet", aux=True)
    assert model.architecture.heads == ("aux1", "aux2")
    for head in ("aux1", "aux2"):
        ours = model.get_submodule(head).fc2.weight
        assert torch.equal(ours, getattr(theirs, head).fc2.weight)


@pytest.mark.parametrize("asked", ["imagenet", "auto"])
def test_damaged_imagenet_file_is_an_error_also_for_auto(hub, asked):
    (hub / IMAGENET_FILE).write_bytes(b"half a download")
    digest = hashlib.sha256(b"half a download").hexdigest()[:8]
    with pytest.raises(ValueError, match=f"starts with {digest}, expected 1378be20") as caught:
        googlenet(weights=asked)
    assert str(hub / IMAGENET_FILE) in str(caught.value)
    assert "Delete the file" in str(caught.value)


def test_imagenet_without_a_network_says_what_to_do(hub, monkeypatch):
    def unreachable(*_args, **_options):
        raise urllib.error.URLError("no route")

    for offline in (True, False):
        if not offline:
            monkeypatch.delenv("GNETLAB_OFFLINE")
            monkeypatch.setattr(urllib.request, "urlopen", unreachable)
        reason = "GNETLAB_OFFLINE is set" if offline else "no route"
        with pytest.raises(RuntimeError, match=reason) as caught:
            googlenet(weights="imagenet")
        for advice in ("Connect to the internet", str(hub / IMAGENET_FILE), "weights='auto'"):
            assert advice in str(caught.value)
    assert "random" in googlenet(weights="auto", width=0.1).weights_note


def test_imagenet_is_fetched_into_the_cache_with_its_digest(hub, monkeypatch):
    asked = []

    def fetch(url, place, hash_prefix):
        asked.append((url.rsplit("/", 1)[-1], Path(place), hash_prefix))
        Path(place).write_bytes(b"weights")

    monkeypatch.delenv("GNETLAB_OFFLINE")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    monkeypatch.setattr(weights, "IMAGENET_SHA256", digest)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_a, **_o: contextlib.nullcontext())
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    hub.rmdir()  # the first fetch of all makes the folder
    for _ in range(2):  # the second time it is there
        assert find("imagenet").path == hub / IMAGENET_FILE
    assert asked == [(IMAGENET_FILE, hub / IMAGENET_FILE, digest)]


@pytest.mark.parametrize("preset", ["cifar", "naive"])
def test_imagenet_weights_refuse_another_preset(hub, monkeypatch, preset):
    place_imagenet(monkeypatch, hub / IMAGENET_FILE, {})
    with pytest.raises(ValueError, match=f"belong to preset 'torchvision', but '{preset}'"):
        googlenet(preset, weights="imagenet")


def test_auto_leaves_imagenet_aside_for_another_preset(hub, monkeypatch):
    place_imagenet(monkeypatch, hub / IMAGENET_FILE, {})
    model = googlenet("cifar", weights="auto", width=0.1)
    assert model.architecture == PRESETS["cifar"].change(width=0.1)
    assert "random weights (seed 0)" in model.weights_note


@pytest.mark.parametrize("change", [{"width": 0.1}, {"num_classes": 5}, {"stem": "compact"}])
def test_auto_leaves_imagenet_aside_for_a_changed_network(hub, monkeypatch, change):
    place_imagenet(monkeypatch, hub / IMAGENET_FILE, {})
    model = googlenet(weights="auto", **change)
    assert "random weights (seed 0)" in model.weights_note
    assert not model.architecture.transform_input


def test_auto_offline_is_seeded_and_says_so():
    before = torch.get_rng_state()
    first, again, other = (googlenet(weights="auto", width=0.1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.weights_note == ("random weights (seed 3), batch norm calibrated on photographs")
    assert first.architecture == PRESETS["paper"].change(norm="batch", width=0.1)
    assert same_state(first, again)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_auto_offline_has_unit_batch_norm_on_the_photographs():
    model, outputs = googlenet(weights="auto", width=0.1).eval(), {}
    names = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    names = [name for name in names if not name.startswith("aux")]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: outputs.update({name: out})
        )
    predict(model, calibration_images(64, 3))
    assert list(outputs) == names
    assert len(names) == 57
    for name, out in outputs.items():
        assert out.mean((0, 2, 3)).abs().max() < 0.15, name
        assert out.std((0, 2, 3)).median().item() == pytest.approx(1, abs=0.1), name


@pytest.mark.parametrize("options", [{"norm": "lrn"}, {"norm": None}])
def test_auto_without_batch_norm_does_not_claim_calibration(options):
    assert googlenet(weights="auto", width=0.1, seed=2, **options).weights_note == (
        "random weights (seed 2)"
    )


def test_auto_takes_grey_and_small_images():
    model = googlenet("cifar", weights="auto", in_channels=1, width=0.1)
    assert predict(model, torch.zeros(1, 1, 32, 32)).shape == (1, 10)


# --- calibration ------------------------------------------------------------------------------


def deepest(model, x):
    """The standard deviation of inception5b's output."""
    seen = []
    handle = model.inception5b.register_forward_hook(lambda _m, _i, out: seen.append(out))
    predict(model, x)
    handle.remove()
    return seen[0].std().item()


def test_calibration_keeps_a_random_network_from_collapsing():
    model, x = googlenet("torchvision", aux=False, width=0.25, seed=0), calibration_images(64, 3)
    assert deepest(model, x) < 1e-4
    calibrate_batch_norm(model, x)
    assert 0.2 < deepest(model, x) < 2


@pytest.mark.parametrize("passes", [1, 3])
def test_calibration_sets_the_statistics_of_the_images_and_nothing_else(passes):
    model, x = small(), images(32, count=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(images(32) * 9)  # statistics of a training, which must be forgotten
    model.inception3a.branch1x1.bn.eval()  # as someone might have frozen it
    modes = [module.training for module in model.modules()]
    calibrate_batch_norm(model, x, passes=passes)
    after = model.state_dict()
    changed = {name.rsplit(".", 1)[-1] for name in after if not after[name].equal(before[name])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    assert [module.training for module in model.modules()] == modes
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}
    first = model.conv1.conv(x).transpose(0, 1).flatten(1).detach()
    torch.testing.assert_close(model.conv1.bn.running_mean, first.mean(1))
    torch.testing.assert_close(model.conv1.bn.running_var, first.var(1))


def test_calibration_restores_the_model_when_it_fails():
    model = small()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="takes N x 3"):
        calibrate_batch_norm(model, torch.zeros(1, 1, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert model.conv1.bn.momentum == 0.1


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_calibration_images(channels):
    x = calibration_images(24, channels)
    assert x.shape == (16, channels, 24, 24)
    assert len({image.sum().item() for image in x}) == 16


# --- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_with_our_own_names(tmp_path, suffix):
    model = small()
    path = save(model.state_dict(), tmp_path / f"own{suffix}")
    for given in (path, str(path)):
        loaded = small(weights=given, seed=1)
        assert same_state(loaded, model)
        assert loaded.weights_note == f"weights from own{suffix}"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_torchvisions_names_become_ours(tmp_path, torchvision_googlenet, suffix):
    theirs = torchvision_googlenet(aux_logits=True).state_dict()
    read = read_checkpoint(save(theirs, tmp_path / f"theirs{suffix}")).state
    with torch.device("meta"):
        ours = googlenet("torchvision", num_classes=20).state_dict()
    assert {k: v.shape for k, v in read.items()} == {k: v.shape for k, v in ours.items()}
    assert from_torchvision(read) == read  # our names pass through


@pytest.mark.parametrize("heads", [(), ("aux1",), ("aux1", "aux2")])
def test_a_file_brings_the_heads_that_it_has(tmp_path, heads):
    model = small("paper", aux=heads)
    path = save(model.state_dict(), tmp_path / "own.pth")
    assert small("paper", weights=path).architecture.heads == heads
    trunk = small("paper", weights=path, aux=False)
    assert trunk.architecture.heads == ()
    assert torch.equal(trunk.fc.weight, model.fc.weight)


def test_a_training_checkpoint_restores_its_architecture(tmp_path):
    model = small("cifar", aux="aux1", stem="compact", num_classes=7, in_channels=1)
    content = {
        "model": model.state_dict(),
        "architecture": dataclasses.asdict(model.architecture),
        "step": 12,
    }
    torch.save(content, tmp_path / "run.pt")
    loaded = googlenet(weights=tmp_path / "run.pt")
    assert loaded.architecture == model.architecture
    assert same_state(loaded, model)
    again = googlenet(weights=tmp_path / "run.pt", dropout=0.3, aux=False)  # changes still apply
    assert again.architecture == model.architecture.change(dropout=0.3, heads=())


def test_a_checkpoint_of_a_fine_tuned_network_has_the_classes_of_its_last_layer(tmp_path):
    model = small("cifar", num_classes=7)
    model.fc = nn.Linear(model.fc.in_features, 3)
    content = {"model": model.state_dict(), "architecture": dataclasses.asdict(model.architecture)}
    torch.save(content, tmp_path / "run.pt")
    for options in ({}, {"num_classes": 3}):
        loaded = googlenet(weights=tmp_path / "run.pt", **options)
        assert same_state(loaded, model)
        assert loaded.architecture == model.architecture.change(num_classes=3)


def test_a_training_checkpoint_without_architecture_needs_its_preset(tmp_path):
    model = small("cifar")
    torch.save({"model": model.state_dict()}, tmp_path / "run.pt")
    assert same_state(small("cifar", weights=tmp_path / "run.pt", seed=1), model)


@pytest.mark.parametrize(
    "fields", [{"steem": "paper"}, {"norm": "instance"}, {"width": "wide"}, {"heads": 3}, [1]]
)
def test_saved_architecture_that_cannot_be_read(fields):
    with pytest.raises(ValueError, match=r"run\.pt holds an architecture that cannot be read"):
        saved_architecture(fields, "run.pt")


@pytest.mark.parametrize("options", [{}, {"width": 0.2}])
def test_state_that_does_not_fit_is_listed_and_changes_nothing(options):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value + 1 for name, value in small(**options).state_dict().items()}
    del state["conv1.conv.weight"], state["conv1.bn.bias"]
    state |= {"conv9.weight": torch.zeros(1), "fc.weight": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"own\.pth does not fit this network") as caught:
        fill(model, state, "own.pth")
    text = str(caught.value)
    assert "missing (2): conv1.bn.bias; conv1.conv.weight" in text
    assert "unexpected (1): conv9.weight" in text
    differ = sum(state[k].shape != before[k].shape for k in before.keys() & state.keys())
    assert f"different shape ({differ}): " in text
    assert ("; ..." in text) == (differ > 4)
    if not options:
        assert "fc.weight: file (2, 3), network (5, 102)" in text
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_fill_wants_every_head_that_the_network_has_but_no_other():
    plain, headed = small("paper", aux=False), small("paper", aux=True, seed=1)
    fill(plain, headed.state_dict(), "headed.pth")
    assert torch.equal(plain.conv1.conv.weight, headed.conv1.conv.weight)
    with pytest.raises(ValueError, match=r"missing \(12\): aux1\.conv\.conv\.bias"):
        fill(headed, plain.state_dict(), "plain.pth")


def test_fill_does_without_batch_counters():
    model, other = small(), small(seed=1)
    state = {k: v for k, v in other.state_dict().items() if not k.endswith("tracked")}
    fill(model, state, "old.pth")
    assert torch.equal(model.fc.weight, other.fc.weight)


# --- files that must be refused ---------------------------------------------------------------


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("where", ["tensor", "bare", "model", "architecture", "plain pickle"])
def test_a_hostile_file_is_refused_and_never_run(tmp_path, where):
    marker, path = tmp_path / "marker", tmp_path / "hostile.pth"
    hostile = Hostile(marker)
    if where == "plain pickle":
        path.write_bytes(pickle.dumps({"conv1.conv.weight": hostile}, protocol=2))
    else:
        torch.save(
            {
                "tensor": {"conv1.conv.weight": hostile},
                "bare": hostile,
                "model": {"model": hostile},
                "architecture": {"model": small().state_dict(), "architecture": hostile},
            }[where],
            path,
        )
    with pytest.raises(ValueError, match=r"hostile\.pth was refused.*could run code"):
        googlenet(weights=path)
    assert not marker.exists()
    # Read without care, this very file does its harm.
    if where == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("left", [0, 5, 200, -100])
def test_a_truncated_file_is_refused(tmp_path, suffix, left):
    path = save(small().state_dict(), tmp_path / f"cut{suffix}")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"cut{suffix}"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_text_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"notes{suffix}"
    path.write_text("weights: to be found\n" * 20)
    with pytest.raises(ValueError, match=f"notes{suffix}"):
        googlenet(weights=path)


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "loss": 0.5},
        {1: torch.zeros(1)},
        [torch.zeros(1)],
        torch.zeros(2),
        {"model": {"a": 1}},
    ],
    ids=["numbers", "numbered", "list", "tensor", "model"],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no state dict"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["nowhere.pth", "imagenet1k", "folder"])
def test_a_path_that_is_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder")
    with pytest.raises(FileNotFoundError, match=f"weights='{name}' asked: no such file") as caught:
        googlenet(weights=name)
    assert "'imagenet', 'bundled', 'auto'" in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.pth", "nowhere.safetensors"])
def test_reading_a_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / name)


def test_weights_and_init_together():
    with pytest.raises(ValueError, match="weights='auto' and init='kaiming' asked; give one"):
        googlenet(weights="auto", init="kaiming")


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("torchvision", {"num_classes": 5, "width": 0.25}),
        ("torchvision", {"num_classes": 5, "width": 0.25, "aux": False}),
        ("paper", {"norm": "batch", "num_classes": 16, "aux": False, "width": 0.25}),
        ("paper", {"num_classes": 3, "branch5x5": "3x3+3x3", "aux": False, "width": 0.5}),
    ],
)
def test_a_bare_state_dict_says_what_network_it_is_of(tmp_path, preset, options):
    made = googlenet(preset, seed=1, **options)
    path = save(made.state_dict(), tmp_path / "bare.pth")
    model = googlenet(weights=path)
    assert same_state(model, made)
    assert model.architecture.change(name="") == made.architecture.change(name="")


@pytest.mark.parametrize(
    ("made", "given", "assumed"),
    [
        ({"norm": None}, {}, " (assumed: pool4_size=3, transform_input=False, norm='lrn')"),
        ({"norm": None}, {"norm": None, "pool4_size": 3}, " (assumed: transform_input=False)"),
        (
            {"norm": "batch"}, {"transform_input": "caffe"},
            " (assumed: pool4_size=3, batch_norm_eps=0.001)",
        ),
        (
            {"norm": None}, {"norm": None, "pool4_size": 2, "transform_input": True}, ""
        ),
    ],
)  # fmt: skip
def test_the_note_says_what_a_state_dict_does_not_tell(tmp_path, made, given, assumed):
    made = googlenet(width=0.1, num_classes=3, seed=1, aux=False, **made)
    path = save(made.state_dict(), tmp_path / "bare.pth")
    model = googlenet(weights=path, width=0.1, **given)
    assert model.weights_note == f"weights from bare.pth{assumed}"


def test_what_bundled_training_writes_loads_by_its_path():
    model = googlenet(weights=BUNDLED)
    assert same_state(model, googlenet(weights="bundled"))


def test_a_fingerprint_tells_weights_apart():
    one, same = (googlenet("cifar", width=0.125, seed=1) for _ in range(2))
    assert weights.fingerprint(one) == weights.fingerprint(same)
    with torch.no_grad():
        same.fc.bias[0] += 1e-6
    assert weights.fingerprint(one) != weights.fingerprint(same)
    halves = [weights.fingerprint(model.bfloat16()) for model in (one, same)]
    assert halves[0] == weights.fingerprint(one) == halves[1]  # what differed is rounded away


def test_weights_of_another_number_of_classes_say_how_to_fine_tune():
    with pytest.raises(ValueError, match=r"tell 16 classes apart, .*nn.Linear\(.*, 5\)"):
        googlenet(weights="bundled", num_classes=5)
    assert len(googlenet(weights="bundled", num_classes=16).classes) == 16


def test_auto_takes_what_fits_a_width_of_1():
    assert "bundled" in googlenet(weights="auto", width=1.0).weights_note


def test_random_weights_are_seeded_and_calibrated():
    model, again = (googlenet(weights="random", width=0.125, seed=3) for _ in range(2))
    assert model.weights_note == "random weights (seed 3), batch norm calibrated on photographs"
    assert weights.fingerprint(model) == weights.fingerprint(again)
    assert model.inception5b.branch1x1.bn.running_mean.abs().sum() > 0
