"""The explorer's measurements, and its page read without a browser."""

import base64
import io
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import gnetlab as gl
from gnetlab import explorer as door
from gnetlab.draw import explorer
from gnetlab.explorer import LiveExplorer, explore
from gnetlab.measure.attribution import branch_attribution
from gnetlab.net.data import Photograph, open_image, photographs, preprocess
from gnetlab.net.weights import calibrate_batch_norm, calibration_images

SIDE, CLASSES = 64, 10


def network(preset="paper", **options):
    options = {"width": 0.1, "aux": False, "num_classes": CLASSES, "seed": 0} | options
    return gl.googlenet(preset, init="kaiming", **options)


@pytest.fixture(scope="module")
def model():
    return network(norm="batch")


@pytest.fixture(scope="module")
def found(model):
    return explore(model, ["cat", "coffee"], size=SIDE)


def truth(model, image, size=SIDE):
    """The maps of one picture by a plain recording."""
    model.eval()
    with torch.no_grad(), gl.record(model, gl.branch_names(model)) as maps:
        model(preprocess(open_image(image).pixels, size))
    return {name: values[0].numpy() for name, values in maps.items()}


def unpacked(document, picture):
    """What a page holds of one picture: (description, name -> maps, name -> attribution, facts)."""
    about = json.loads(re.search(r'id="data">(.*?)</script>', document, re.S)[1])
    about = about["pictures"][picture]
    text = re.search(rf'id="maps{picture}">(.*?)</script>', document, re.S)[1]
    content = zlib.decompress(base64.b64decode(text, validate=True))
    branches, offset, codes = about["branches"], 0, []
    counts = [len(b["channels"] or range(b["count"])) for b in branches]
    for counted in (counts, [1] * len(branches)):
        for branch, count in zip(branches, counted, strict=True):
            shape = (count, *branch["side"])
            codes.append(np.frombuffer(content, np.uint8, np.prod(shape), offset).reshape(shape))
            offset += codes[-1].size
    numbers = np.frombuffer(content[offset:], "<f4")
    facts = numbers[: 6 * sum(counts)].reshape(6, -1)
    low, high = numbers[6 * sum(counts) :].reshape(2, -1)
    names = [branch["module"] for branch in branches]
    split = np.split(facts, np.cumsum(counts)[:-1], axis=1)
    maps = {n: scaled(c, f[0], f[1]) for n, c, f in zip(names, codes, split, strict=False)}
    cams = {n: scaled(c, low[i : i + 1], high[i : i + 1])[0]
            for i, (n, c) in enumerate(zip(names, codes[len(names) :], strict=True))}  # fmt: skip
    return about, maps, cams, facts


def scaled(codes, low, high):
    return low[:, None, None] + codes / 255 * (high - low)[:, None, None]


def close(one, other):
    """Within 1/255 of the channel's own range."""
    assert one.shape == other.shape
    step = (other.max((-2, -1)) - other.min((-2, -1)))[..., None, None] / 255
    assert (np.abs(one - other) <= 0.51 * step + 1e-5 * np.abs(other).max()).all()


def test_the_page_holds_every_map_of_every_branch(model, found):
    names = gl.branch_names(model)
    document = found.html()
    for i, image in enumerate(("cat", "coffee")):
        about, maps, cams, facts = unpacked(document, i)
        expected = truth(model, image)
        assert list(maps) == names
        assert len(maps) == 36
        for name in names:
            close(maps[name], expected[name])
        explained = branch_attribution(
            model, preprocess(open_image(image).pixels, SIDE), method="grad_cam"
        )
        for name in names:
            close(cams[name], explained[name][0])
        assert about["name"] == image
        known = [
            [m.min(), m.max(), m.mean(), m.std(), (m == 0).mean(), (m.astype(float) ** 2).mean()]
            for values in expected.values()
            for m in values
        ]
        np.testing.assert_allclose(facts.T, known, rtol=1e-4, atol=1e-6)


def test_indices_and_statistics(model, found):
    frame = found.statistics
    assert list(frame.columns) == [
        "picture", "module", "stage", "branch", "channel", "concat_index", "mean", "minimum",
        "maximum", "deviation", "zero_fraction", "energy",
    ]  # fmt: skip
    pixels = preprocess(open_image("coffee").pixels, SIDE)
    known = gl.branch_statistics(model, pixels)
    rows = frame[frame.picture == "coffee"].reset_index(drop=True)
    keys = ["module", "stage", "branch", "channel", "concat_index"]
    pd.testing.assert_frame_equal(rows[keys], known[keys])
    for column in ("mean", "zero_fraction", "energy"):
        np.testing.assert_allclose(rows[column], known[column], rtol=1e-4, atol=1e-6)
    for branch in unpacked(found.html(), 0)[0]["branches"]:
        module = model.get_submodule(branch["module"].rpartition(".")[0])
        assert module.branch_slices[branch["module"].rpartition(".")[2]].start == branch["start"]


def test_one_forward_pass_sees_all_pictures(model, monkeypatch):
    passes = []
    with monkeypatch.context() as patched:
        forward = type(model).forward
        patched.setattr(type(model), "forward", lambda m, x: passes.append(len(x)) or forward(m, x))
        patched.setattr(door, "branch_attribution", lambda *_, **__: {})
        explore(model, ["cat", "coffee"], size=SIDE)
    assert passes == [2]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(training):
    model = network("paper", norm="batch", aux=True).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.conv1.eval()
    modes = [module.training for module in model.modules()]
    explore(model, "cat", size=SIDE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("preset", "size", "options"),
    [("cifar", 32, {}), ("torchvision", 64, {}), ("naive", 64, {}), ("paper", 64, {"norm": None}),
     ("paper", 64, {"stem": "inception"}), ("paper", 48, {"stem": "compact"})],
)  # fmt: skip
def test_every_preset(preset, size, options):
    model = network(preset, width=0.05, **options)
    document = explore(model, "cat", size=size).html()
    about, maps, _, _ = unpacked(document, 0)
    assert list(maps) == gl.branch_names(model)
    pairs = [(branch["stage"], branch["branch"]) for branch in about["branches"]]
    assert len(set(pairs)) == len(maps)
    for name, values in truth(model, "cat", size).items():
        close(maps[name], values)


def test_only_the_liveliest_channels(model):
    about, maps, _, _ = unpacked(explore(model, "cat", size=SIDE, channels=3).html(), 0)
    for branch in about["branches"]:
        expected = truth(model, "cat")[branch["module"]]
        if branch["channels"] is None:
            assert branch["count"] <= 3
            continue
        deviations = expected.std((1, 2))
        assert sorted(deviations[branch["channels"]]) == sorted(np.sort(deviations)[-3:])
        close(maps[branch["module"]], expected[branch["channels"]])


def test_targets_by_number_and_name(model):
    names = [f"thing {i}" for i in range(CLASSES)]
    some = explore(model, ["cat", "coffee"], size=SIDE, targets=["thing 3", 4], classes=names)
    assert [picture.target for picture in some.pictures] == ["thing 3 (3)", "thing 4 (4)"]
    pixels = torch.cat([preprocess(open_image(i).pixels, SIDE) for i in ("cat", "coffee")])
    expected = branch_attribution(model, pixels, torch.tensor([3, 4]), method="grad_cam")
    for i, picture in enumerate(some.pictures):
        for name, values in picture.attribution.items():
            np.testing.assert_allclose(values, expected[name][i], rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        probabilities = model.eval()(pixels).softmax(1)
    label, probability = some.pictures[0].predictions[0]
    assert label == f"thing {probabilities[0].argmax()} ({probabilities[0].argmax()})"
    assert probability == pytest.approx(probabilities[0].max().item(), rel=1e-4)
    method = explore(model, "cat", size=SIDE, targets=1, method="gradient_x_activation")
    assert "Gradient \\u00d7 activation" in method.html()


def test_a_networks_own_classes_are_named_unless_others_are_given():
    model = network()
    model.classes = tuple(f"own {i}" for i in range(CLASSES))
    own, given = (explore(model, "cat", size=SIDE, targets=3, classes=c)
                  for c in (None, [f"given {i}" for i in range(CLASSES)]))  # fmt: skip
    assert [e.pictures[0].target for e in (own, given)] == ["own 3 (3)", "given 3 (3)"]


def test_errors_say_what_was_asked_and_what_to_try(model, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    cases = [
        ({"images": []}, ValueError, "no images were given.*'cat'"),
        ({"images": ["cat", "dog"]}, FileNotFoundError, "'dog'.*coffee"),
        ({"images": broken}, ValueError, "broken.png cannot be read.*PNG"),
        ({"images": torch.zeros(1, 3, 8, 8)}, ValueError, "Tensor was given.*Photograph"),
        ({"images": Photograph("x", np.zeros((9, 9)), "")}, ValueError, "H x W x 3 uint8"),
        ({"targets": CLASSES}, ValueError, "class 10 asked; this network has 10.*0 to 9"),
        ({"targets": -1}, ValueError, "class -1 asked"),
        ({"targets": "dog"}, ValueError, "class 'dog' asked"),
        ({"targets": [1, 2, 3]}, ValueError, "3 targets for 1 images"),
        ({"classes": ["a"]}, ValueError, "1 names in classes; this network has 10"),
        ({"channels": 0}, ValueError, "channels=0 asked"),
        ({"method": "magic"}, ValueError, "method='magic' asked"),
        ({"size": 8}, ValueError, "8 x 8 pixels was given"),
        ({"model": nn.Conv2d(3, 3, 1)}, ValueError, "Conv2d has no Inception modules"),
    ]
    for changes, error, words in cases:
        with pytest.raises(error, match=words):
            explore(**({"model": model, "images": "cat", "size": SIDE} | changes))


def test_too_many_maps_and_values_without_end(model, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(door, "LARGEST", 1000)
        with pytest.raises(ValueError, match="fewer images, a smaller size"):
            explore(model, "cat", size=SIDE)
    with pytest.raises(ValueError, match="not finite"):
        explorer.quantize(np.array([[[0, np.nan]]]))
    flat, low, high = explorer.quantize(np.full((1, 2, 2), 3.5))
    assert not flat.any()
    assert low == high == 3.5


class Loads(HTMLParser):
    """Every attribute that makes a browser fetch, and the frames' documents."""

    def __init__(self):
        super().__init__()
        self.found, self.frames, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "srcdoc":
                self.frames.append(value)
            elif name in ("src", "href", "srcset", "data", "poster", "action"):
                self.found.append(value)


def loads(text):
    parser = Loads()
    parser.feed(text)
    return parser


def test_nothing_is_fetched(found, tmp_path):
    saved = found.save(tmp_path / "new" / "page.html")
    document = saved.read_text(encoding="utf-8")
    shown = found._repr_html_()
    for text in (document, shown):
        parsed = loads(text)
        assert all(value.startswith("data:") for value in parsed.found), parsed.found
        assert "link" not in parsed.tags or text.count("<link") == text.count('<link rel="icon"')
        assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|import\(", text)
    assert loads(shown).frames == [document]


def test_hostile_names_stay_text(model):
    name = "</script><script>alert(1)</script><!--\"'&[[data]]"
    hostile = Photograph(name, photographs()["cat"].pixels, "<img src=x onerror=alert(2)>")
    classes = [name] * CLASSES
    found = explore(model, hostile, size=SIDE, classes=classes)
    plain = explore(model, "cat", size=SIDE)
    document, shown = found.html(), loads(found._repr_html_())
    assert loads(document).tags == loads(plain.html()).tags
    assert shown.tags == ["div", "iframe", "img"]
    assert shown.frames == [document]
    assert unpacked(document, 0)[0]["name"] == name


def test_a_notebook_shows_the_sheet_where_it_cannot_show_the_page(found):
    bundle = found._repr_mimebundle_()
    png = base64.b64decode(bundle["image/png"])
    image = Image.open(io.BytesIO(png))
    assert image.width == 864
    still = re.search(r'<img src="data:image/png;base64,([^"]+)"', bundle["text/html"])[1]
    assert base64.b64decode(still) == png
    assert "cat, coffee" in bundle["text/plain"]
    figure = found.figure(1)
    assert figure.get_label().startswith("coffee: ")
    assert len(figure.axes) == 37
    frame = found.pictures[1].statistics
    best = frame[frame.module == "inception3a.branch1x1"].nlargest(1, "deviation").channel
    assert str(best.item()) in [ax.get_title("center") for ax in figure.axes]


def test_a_real_network_fits_into_its_size():
    model = network("paper", norm="batch", width=1.0, num_classes=1000)
    calibrate_batch_norm(model, calibration_images(64, 3))
    found = explore(model, "cat")
    assert sum(len(values) for values in found.pictures[0].maps.values()) == 5488
    assert len(found._repr_html_()) <= 1.5e6


def test_controls_measure_anew_and_keep_what_was_there(model, monkeypatch, tmp_path):
    monkeypatch.delenv(door.BATCH, raising=False)
    monkeypatch.setattr(door, "_kernel_listens", lambda: True)
    live = explore(model, "cat", size=SIDE)
    assert isinstance(live, LiveExplorer)
    changes = []
    picture, target, method, status = live.controls(lambda: changes.append(live.html())).children
    before = live.html()
    target.value = "7"
    assert live.pictures[0].target == "class 7"
    assert len(changes) == 1
    assert changes[0] != before
    method.value = "gradient_x_activation"
    assert live.method == "gradient_x_activation"
    assert live.pictures[0].target == "class 7"
    picture.value = "coffee"
    assert live.pictures[0].name == "coffee"
    kept = live.html()
    for control, wrong, words in (
        (picture, str(tmp_path / "<none>.png"), "&lt;none&gt;.png"),
        (target, "77", "0 to 9"),
    ):
        good = control.value
        control.value = wrong
        assert words in status.value
        assert "no such file" in status.value or "class" in status.value
        assert live.html() == kept
        control.value = good
        assert status.value == ""
    assert live.pictures[0].name == "coffee"


def test_a_batch_run_has_no_controls(model, monkeypatch):
    monkeypatch.setattr(door, "_kernel_listens", lambda: True)
    monkeypatch.setenv(door.BATCH, "1")
    assert not isinstance(explore(model, "cat", size=SIDE), LiveExplorer)
    monkeypatch.delenv(door.BATCH)
    monkeypatch.setattr(door, "_kernel_listens", lambda: False)
    assert not isinstance(explore(model, "cat", size=SIDE), LiveExplorer)


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel])
def test_a_network_inside_another_is_the_same_to_look_at(model, found, wrap):
    inside = explore(wrap(model), ["cat", "coffee"], size=SIDE)
    theirs, own = (unpacked(explorer.html(), 1) for explorer in (inside, found))
    for one, other in zip(theirs[0]["branches"], own[0]["branches"], strict=True):
        assert {**one, "module": ""} == {**other, "module": ""}
    for column in ("stage", "branch", "channel", "concat_index", "mean"):
        assert inside.statistics[column].equals(found.statistics[column])


def test_copies_of_a_module_are_modules_of_their_own():
    found = explore(network(norm="batch", extra_modules=2), "cat", size=SIDE)
    stages = found.statistics.stage.unique().tolist()
    assert stages == ["3a", "3b", "4a", "4b", "4c", "4c_2", "4c_3", "4d", "4e", "5a", "5b"]
    about = unpacked(found.html(), 0)[0]
    assert [b["stage"] for b in about["branches"]] == [s for s in stages for _ in range(4)]
    assert all(b["start"] == 0 for b in about["branches"][::4])


@pytest.mark.parametrize("target", [np.int64(3), torch.tensor(3), np.array([3]), "3", [3]])
def test_a_class_may_be_given_as_any_whole_number(model, target):
    assert (
        explore(model, "cat", size=SIDE, targets=target, channels=1).pictures[0].target == "class 3"
    )


def test_names_of_classes_may_be_an_array(model):
    named = explore(model, "cat", size=SIDE, channels=1, classes=np.array(list("abcdefghij")))
    assert named.pictures[0].target[0] in "abcdefghij"


@pytest.mark.parametrize(("asked", "message"), [
    ({"targets": [2.7]}, "class 2.7 asked; this network has 10 classes"),
    ({"size": 0}, "size=0 asked; give the side"),
])  # fmt: skip
def test_what_is_no_class_and_no_size(model, asked, message):
    with pytest.raises(ValueError, match=message):
        explore(model, "cat", **{"size": SIDE} | asked)
