import math
from collections import OrderedDict

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from gnetlab.measure import visualize
from gnetlab.measure.visualize import visualize_channel
from gnetlab.net.model import googlenet

SMALL = {"steps": 96, "size": 48}


def gabor(angle, period=4.0, side=7):
    """A grey edge detector of 3 x side x side; 0: vertical stripes."""
    y, x = np.mgrid[:side, :side] - side // 2
    along = x * math.cos(angle) + y * math.sin(angle)
    wave = np.cos(2 * math.pi * along / period) * np.exp(-(x**2 + y**2) / 8)
    return torch.tensor((wave - wave.mean()) / 3).float().expand(3, side, side)


def plain(red, green, blue):
    return torch.tensor([red, green, blue]).float().view(3, 1, 1).expand(3, 7, 7) / 49


PLANTED = {
    "vertical": gabor(0.0),
    "horizontal": gabor(math.pi / 2),
    "red": plain(1, -1, -1),
    "blue": plain(-1, -1, 1),
}


@pytest.fixture(scope="module")
def planted():
    """One convolution whose filters are known."""
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 7, 2, 3, bias=False), relu=nn.ReLU()))
    model.conv.weight.data = torch.stack(list(PLANTED.values()))
    return nn.Sequential(OrderedDict(first=model))


@pytest.fixture(scope="module")
def network():
    return googlenet(width=0.1, norm="batch", weights="auto", aux=True)


def roughness(image):
    """Mean difference of neighbours along x and along y."""
    grey = image.astype(float).mean(2)
    return np.abs(np.diff(grey, axis=1)).mean(), np.abs(np.diff(grey, axis=0)).mean()


def test_inference_mode_does_not_matter(planted):
    options = {"steps": 2, "size": 16}
    with torch.inference_mode():
        found = visualize_channel(planted, "first", 1, **options)
    assert found.frame.reached[0] > found.frame.start[0]
    np.testing.assert_array_equal(
        found.images, visualize_channel(planted, "first", 1, **options).images
    )


# --- what is found ----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["channel", "neuron"])
def test_planted_filters_give_their_orientation_and_colour(planted, objective):
    # Shifts by more than a stripe leave one unit of so small a field nothing to grow on.
    options = SMALL | {"objective": objective, "transform": objective == "channel"}
    found = visualize_channel(planted, "first", range(4), **options)
    assert (found.frame.reached > found.frame.start + 0.3).all()
    assert found.images.shape == (4, 48, 48, 3)
    assert found.images.dtype == np.uint8
    part = slice(20, 28) if objective == "neuron" else slice(None)
    images = dict(zip(PLANTED, found.images[:, part, part], strict=True))
    along_x, along_y = roughness(images["vertical"])
    assert along_x > 2 * along_y
    along_x, along_y = roughness(images["horizontal"])
    assert along_y > 2 * along_x
    for name, channel in (("red", 0), ("blue", 2)):
        pixels = images[name].reshape(-1, 3).astype(int)
        excess = pixels[:, channel] - np.delete(pixels, channel, axis=1).max(1)
        assert np.percentile(excess, 90) > 60, name


def test_narrow_filters_give_narrow_stripes():
    conv = nn.Conv2d(3, 2, 7, 2, 3, bias=False)
    conv.weight.data = torch.stack([gabor(0.0, period) for period in (3.0, 6.0)])
    model = nn.Sequential(OrderedDict(first=nn.Sequential(conv, nn.ReLU())))
    images = visualize_channel(model, "first", [0, 1], transform=False, **SMALL).images
    spectra = np.abs(np.fft.rfft(images.mean(3) - 127, axis=2)).mean(1)
    spectra[:, :4] = 0  # brightness, which the filters do not see
    narrow, wide = spectra.argmax(1)
    assert narrow == pytest.approx(48 / 3, abs=2.5)
    assert wide == pytest.approx(48 / 6, abs=2.5)


@pytest.mark.parametrize("name", ["conv1", "inception3a", "inception4c.branch5x5", "fc"])
@pytest.mark.parametrize("objective", ["channel", "neuron"])
def test_activation_rises(network, name, objective):
    options = {"steps": 16, "size": 48, "transform": False}
    frame = visualize_channel(network, name, [0, 3], objective=objective, **options).frame
    assert (frame.reached > frame.start + 0.05).all()


def test_reached_is_the_activation_of_the_returned_image(planted, network):
    for model, name in ((planted, "first"), (network, "inception3a.branch3x3")):
        images, frame = visualize_channel(model, name, [1, 2], steps=4, size=32)
        with torch.no_grad():
            x = visualize.data.normalize(torch.from_numpy(images).permute(0, 3, 1, 2))
            for step_name, step in model.eval().named_children():
                if step_name == name.split(".")[0]:
                    x = step.branch3x3(x) if "." in name else step(x)
                    break
                x = step(x)
        expected = [x[i, channel].mean().item() for i, channel in enumerate((1, 2))]
        assert frame.reached.tolist() == pytest.approx(expected, rel=0.05, abs=0.01)


def test_a_channel_that_sleeps_at_the_start_is_woken():
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 2, 7, 2, 3), relu=nn.ReLU()))
    model.conv.weight.data = torch.stack([PLANTED["vertical"], PLANTED["red"]])
    model.conv.bias.data.fill_(-1)
    frame = visualize_channel(nn.Sequential(model), "0", [0, 1], **SMALL).frame
    assert frame.start.tolist() == [0, 0]
    assert (frame.reached > 0).all()


def test_a_channel_is_woken_ahead_of_a_relu_in_place_too():
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(in_place)))
        nn.init.constant_(net[0][0].bias, -0.4)
        found.append(visualize_channel(net, "0", [0], steps=30, size=32))
        assert net[0][1].inplace == in_place
    plain, other = found
    assert plain.frame.start[0] == 0 < plain.frame.reached[0]
    pd.testing.assert_frame_equal(other.frame, plain.frame, check_exact=True)
    assert np.array_equal(other.images, plain.images)


def test_more_steps_reach_more(planted):
    frames = [visualize_channel(planted, "first", 0, steps=s, size=32).frame for s in (0, 4, 16)]
    reached = [frame.reached.item() for frame in frames]
    assert reached == sorted(reached)
    assert frames[0].start.item() == frames[0].reached.item()


def test_neuron_looks_at_the_middle_and_channel_everywhere(planted):
    images = {
        objective: visualize_channel(
            planted, "first", 0, objective=objective, transform=False, **SMALL
        ).images[0]
        for objective in ("neuron", "channel")
    }
    middle, corner = slice(20, 28), slice(0, 8)
    ratio = {k: i[middle, middle].std() / i[corner, corner].std() for k, i in images.items()}
    assert ratio["neuron"] > 2 > ratio["channel"]


# --- repeatability, and what stays as it was --------------------------------------------------


def test_equal_seeds_give_equal_images_and_other_seeds_others(planted):
    first, again, other = (
        visualize_channel(planted, "first", [0, 2], steps=4, size=32, seed=s) for s in (3, 3, 4)
    )
    assert np.array_equal(first.images, again.images)
    pd.testing.assert_frame_equal(first.frame, again.frame)
    assert not np.array_equal(first.images, other.images)


def test_together_gives_about_the_same_as_alone(network):
    options = {"steps": 6, "size": 32}
    together = visualize_channel(network, "inception3a", [1, 8, 20], **options)
    for i, channel in enumerate((1, 8, 20)):
        alone = visualize_channel(network, "inception3a", channel, **options)
        difference = np.abs(together.images[i].astype(int) - alone.images[0])
        assert np.median(difference) <= 2
        assert together.frame.reached[i] == pytest.approx(alone.frame.reached[0], rel=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_global_random_state_stay_as_they_were(network, training):
    network.train(training)
    network.inception3a.eval()
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for parameter in network.parameters():
        parameter.grad = None
    network.fc.bias.grad = torch.ones(1000)
    random = torch.get_rng_state()
    with torch.no_grad():  # as a notebook may have it
        visualize_channel(network, "inception3b", 0, steps=2, size=32)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in network.modules()] == modes
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(network.fc.bias.grad, torch.ones(1000))
    assert all(p.grad is None for p in network.parameters() if p is not network.fc.bias)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_forward_pass_stops_at_the_module(network):
    ran = []
    handles = [
        step.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
        for name, step in network.named_children()
    ]
    visualize_channel(network, "inception3a.branch3x3", 0, steps=2, size=32)
    for handle in handles:
        handle.remove()
    assert "pool2" in ran
    assert not {"inception3a", "inception3b", "fc"} & set(ran)


# --- names and channels -----------------------------------------------------------------------


def test_branch_and_concat_index_name_the_same_unit(network):
    part = network.inception3a.branch_slices["branch5x5"]
    by_branch = visualize_channel(network, "inception3a.branch5x5", [1], steps=2, size=32)
    by_concat = visualize_channel(network, "inception3a", part.start + 1, steps=2, size=32)
    pd.testing.assert_frame_equal(by_branch.frame, by_concat.frame)
    assert np.array_equal(by_branch.images, by_concat.images)
    row = by_branch.frame.iloc[0]
    assert (row.module, row.stage, row.branch) == ("inception3a.branch5x5", "3a", "5x5")
    assert (row.channel, row.concat_index) == (1, part.start + 1)


def test_columns(network):
    columns = ["module", "stage", "branch", "channel", "concat_index", "start", "reached"]
    frame = visualize_channel(network, "inception3a.branch3x3.reduce", [0, 1], steps=0, size=32)[1]
    assert list(frame) == columns
    assert frame.index.tolist() == [0, 1]
    assert frame.channel.tolist() == [0, 1]
    assert frame.concat_index.isna().all()
    everywhere = visualize_channel(network, "inception3a", range(27), steps=0, size=32).frame
    assert everywhere.concat_index.tolist() == list(range(27))
    assert set(everywhere.branch) == {"1x1", "3x3", "5x5", "pool"}


@pytest.mark.parametrize("channels", [-1, 27, [0, 99], [0.5], []])
def test_unknown_channels_are_refused_with_how_many_there_are(network, channels):
    with pytest.raises(ValueError, match=r"'inception3a'.*it has 27: give some of 0 \.\.\. 26"):
        visualize_channel(network, "inception3a", channels, steps=1, size=32)


def test_unknown_names_and_objectives(network):
    with pytest.raises(ValueError, match=r"no module 'inception3a\.branch7x7'.*branch"):
        visualize_channel(network, "inception3a.branch7x7", 0)
    with pytest.raises(ValueError, match="objective='layer' asked; choose 'channel' or 'neuron'"):
        visualize_channel(network, "inception3a", 0, objective="layer")
    with pytest.raises(ValueError, match="steps=-1, size=32 asked"):
        visualize_channel(network, "inception3a", 0, steps=-1, size=32)
    with pytest.raises(RuntimeError, match="aux1 never ran; auxiliary heads run only in training"):
        visualize_channel(network, "aux1", 0, steps=1, size=32)


# --- the parametrization ----------------------------------------------------------------------


def test_transformations_are_lucids_within_their_limits():
    """A single bright dot is found shifted, turned and scaled no further than allowed."""
    side, at = 64, 48
    image = torch.full((1, 3, side, side), 0.5)
    image[:, :, at, at] = 1.0
    places = []
    for seed in range(60):
        moved = visualize._transformed(image, torch.Generator().manual_seed(seed))
        assert moved.shape == (1, 3, side + 12, side + 12)
        mass = (moved[0, 0] - 0.5).double()
        rows = torch.arange(side + 12).double()
        places.append([(mass.sum(d) * rows).sum() / mass.sum() for d in (1, 0)])
    offset = torch.tensor(places) - (at + 6)
    farthest = 6 + 16.5 * math.sqrt(2) * (0.1 + math.radians(10))
    assert offset.abs().max() < farthest
    assert offset.std(0).min() > 2
    assert offset.mean(0).abs().max() < 2


@pytest.mark.parametrize(("transform", "sides"), [(True, [32, 32, 44, 44, 32]), (False, [32] * 5)])
def test_every_step_sees_the_image_transformed_where_asked(planted, transform, sides):
    seen = []
    handle = planted.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    visualize_channel(planted, "first", 0, transform=transform, steps=2, size=32)
    handle.remove()
    assert [images.shape[-1] for images in seen] == sides  # shape, start, two steps, end


def test_nothing_transformed_when_the_draw_is_zero(monkeypatch):
    for name, value in {"JITTERS": (0,), "SCALES": (1.0,), "ANGLES": (0,)}.items():
        monkeypatch.setattr(visualize, name, value)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = visualize._transformed(image, torch.Generator())
    torch.testing.assert_close(moved[:, :, 6:-6, 6:-6], image, rtol=0, atol=1e-5)
    moved[:, :, 6:-6, 6:-6] = 0.5
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5), rtol=0, atol=1e-5)


def test_the_start_is_grey_with_mostly_low_frequencies():
    noise = torch.randn(1, 3, 64, 33, 2, generator=torch.Generator().manual_seed(0))
    image = visualize._image(visualize.START * noise, 64)
    assert image.shape == (1, 3, 64, 64)
    assert image.mean().item() == pytest.approx(0.5, abs=0.02)
    logit = visualize._image(noise, 64).logit()
    power = torch.fft.rfft2(logit.double()).abs().square().mean((0, 1))
    frequency = torch.hypot(torch.fft.fftfreq(64)[:, None], torch.fft.rfftfreq(64))
    low, high = (frequency > 0.02) & (frequency < 0.1), (frequency > 0.3) & (frequency < 0.5)
    ratio = (frequency[high].square().mean() / frequency[low].square().mean()).item()
    assert (power[low].mean() / power[high].mean()).item() > ratio / 3
    correlation = torch.corrcoef(logit[0].flatten(1))
    assert correlation[0, 1] > 0.5  # colours go together, as in photographs


@pytest.mark.gpu
def test_on_a_gpu(planted):
    model = planted.to("cuda")
    try:
        found = visualize_channel(model, "first", [0, 2], steps=8, size=32)
    finally:
        planted.to("cpu")
    on_cpu = visualize_channel(planted, "first", [0, 2], steps=8, size=32)
    assert found.frame.reached.tolist() == pytest.approx(on_cpu.frame.reached.tolist(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_visualized(dtype):
    model = googlenet(width=0.1, norm="batch", aux=False, seed=0).to(dtype)
    found = visualize_channel(model, "inception3a", [0], steps=1, size=32)
    assert found.images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("channels", [np.int64(1), torch.tensor([1]), np.array([1]), range(1, 2)])
def test_channels_in_any_form(channels):
    model = googlenet(width=0.1, norm="batch", aux=False, seed=0)
    found = visualize_channel(model, "inception3a.branch3x3", channels, steps=0, size=32)
    assert found.frame.channel.tolist() == [1]
