"""Streamed statistics equal those computed from all maps at once."""

import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure import activations
from gnetlab.measure.activations import (
    add_moments,
    branch_statistics,
    branch_summary,
    liveliest_channels,
    random_control,
)
from gnetlab.measure.hooks import record
from gnetlab.net.architecture import Widths, architecture
from gnetlab.net.model import BRANCHES, Inception

COLUMNS = [
    "module", "stage", "branch", "channel", "concat_index", "mean", "variance", "zero_fraction",
    "energy", "energy_share", "channel_share",
]  # fmt: skip


def small(preset="torchvision", **changes):
    return gl.googlenet(preset, width=0.1, num_classes=5, seed=0, init="kaiming", **changes)


@pytest.fixture(scope="module")
def batches():
    """Batches of unequal size and unequal contrast."""
    generator = torch.Generator().manual_seed(0)
    sizes = {3: 0.2, 1: 3.0, 4: 1.0}
    return [scale * torch.randn(n, 3, 48, 48, generator=generator) for n, scale in sizes.items()]


@pytest.fixture(scope="module")
def statistics(batches):
    return branch_statistics(small(), batches)


@pytest.fixture(scope="module")
def maps(batches):
    """Every branch's and every module's output for all images, in float64."""
    model = small().eval()
    modules = [name for name, m in model.named_modules() if isinstance(m, Inception)]
    names = [*modules, *gl.branch_names(model)]
    with torch.no_grad(), record(model, names, reduce=lambda s, m: [*(s or []), m]) as kept:
        for batch in batches:
            model(batch)
    return {name: torch.cat(kept[name]).double() for name in names}


def test_frame_is_as_documented(statistics, maps):
    assert list(statistics.columns) == COLUMNS
    assert statistics.index.equals(pd.RangeIndex(len(statistics)))
    branches = statistics.groupby("module", sort=False)
    assert list(branches.groups) == gl.branch_names(small())
    for name, rows in branches:
        assert rows.channel.tolist() == list(range(maps[name].shape[1]))
        stage, branch = name.removeprefix("inception").split(".branch")
        assert set(rows.stage) == {stage}
        assert set(rows.branch) == {branch.removeprefix("_")}


def test_statistics_equal_a_direct_computation(statistics, maps):
    for name, rows in statistics.groupby("module"):
        whole = maps[name].transpose(0, 1).flatten(1)  # channels x (images and positions)
        direct = {
            "mean": whole.mean(1),
            "variance": whole.var(1, correction=0),
            "zero_fraction": (whole == 0).double().mean(1),
            "energy": whole.square().mean(1),
        }
        for column, expected in direct.items():
            scale = float(expected.max())
            np.testing.assert_allclose(rows[column], expected, rtol=1e-4, atol=1e-6 * scale)
    assert 0.2 < statistics.zero_fraction.mean() < 0.8


def test_shares(statistics, maps):
    stages = statistics.groupby("stage")
    np.testing.assert_allclose(stages.energy_share.sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(stages.channel_share.sum(), 1, rtol=1e-12)
    for stage, rows in stages:
        energy = maps[f"inception{stage}"].square().mean((0, 2, 3))
        expected = energy / energy.sum()
        np.testing.assert_allclose(rows.energy_share, expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(rows.channel_share, 1 / len(energy))


@pytest.mark.parametrize(
    ("preset", "changes"),
    [("torchvision", {}), ("naive", {}), ("torchvision", {"extra_modules": 2}),
     ("torchvision", {"stem": "inception"})],
)  # fmt: skip
def test_concat_index_is_the_channel_of_the_modules_output(preset, changes, batches):
    model = small(preset, **changes)
    frame = branch_statistics(model, batches[:1])
    modules = frame.module.str.rpartition(".")[0]
    names = list(modules.unique())
    assert len(names) == 9 + changes.get("extra_modules", 0) + 2 * ("stem" in changes)
    assert frame.stage.nunique() == len(names) - ("stem" in changes)
    for shares in (frame.energy_share, frame.channel_share):
        np.testing.assert_allclose(shares.groupby(modules).sum(), 1, rtol=1e-12)
    with torch.no_grad(), record(model.eval(), names) as outputs:
        model(batches[0])
    for module, rows in frame.groupby(modules):
        output = outputs[module]
        assert sorted(rows.concat_index) == list(range(output.shape[1]))
        mean = output.double().mean((0, 2, 3))[torch.tensor(rows.concat_index.to_numpy())]
        np.testing.assert_allclose(rows["mean"], mean, rtol=1e-5, atol=1e-6 * float(mean.max()))
        slices = model.get_submodule(module).branch_slices
        starts = rows.module.map(lambda name, s=slices: s[name.rpartition(".")[2]].start)
        assert (rows.concat_index == starts + rows.channel).all()


def test_one_tensor_is_one_batch(batches):
    model = small()
    alone, listed = (branch_statistics(model, b) for b in (batches[0], [batches[0]]))
    pd.testing.assert_frame_equal(alone, listed, check_exact=True)


def test_memory_does_not_grow_with_the_batches(batches):
    model, outputs, alive = small(), [], []
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda *call: outputs.append(weakref.ref(call[-1].untyped_storage()))
        )
        for name in gl.branch_names(model)
    ]

    def stream():
        for batch in batches:
            yield batch
            alive.append(sum(ref() is not None for ref in outputs))

    branch_statistics(model, stream())
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 36 * 3
    assert alive == [0, 0, 0]


@pytest.mark.parametrize("mode", ["train", "eval", "frozen batch norm"])
def test_the_model_is_as_before(mode, batches):
    model = small().train(mode != "eval")
    if mode == "frozen batch norm":
        model.conv1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    asked = []
    own = model.conv1.register_forward_hook(
        lambda m, *_: asked.append((m.training, torch.is_grad_enabled()))
    )
    branch_statistics(model, batches)
    own.remove()
    assert asked == [(False, False)] * 3
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes


def test_mode_and_hooks_are_restored_after_an_error(batches):
    model = small()
    with pytest.raises(ValueError, match="takes N x 3"):
        branch_statistics(model, [batches[0], batches[0][:, :2]])
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_inception_modules_is_an_error():
    with pytest.raises(ValueError, match="Sequential has no Inception modules"):
        branch_statistics(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(1, 3, 8, 8))


class OneModule(nn.Module):
    """One Inception module of Figure 2(a): its pooling branch passes its input through."""

    def __init__(self):
        super().__init__()
        self.inception3a = Inception(architecture("naive"), 2, Widths(4, 4, 4, 4, 4, 4))

    def forward(self, x):
        return self.inception3a(x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sums_do_not_overflow_in_half_precision(dtype):
    # Sums of 2 x 64 x 64 values of 1000, and their squares, are far beyond float16's 65504.
    images = torch.full((2, 2, 64, 64), 1000, dtype=dtype)
    images[:, 1] = 0
    frame = branch_statistics(OneModule().to(dtype), images)
    pool = frame[frame.branch == "pool"]
    np.testing.assert_allclose(pool["mean"], [1000, 0], rtol=1e-4)
    np.testing.assert_allclose(pool.energy, [1e6, 0], rtol=1e-3)
    np.testing.assert_allclose(pool.variance, 0, atol=1e3)
    assert pool.zero_fraction.tolist() == [0, 1]


def test_sums_over_many_batches_lose_no_small_batch():
    # In float32, 2^24 + 1 = 2^24: ones after a bright batch would vanish.
    model = OneModule()
    batches = [torch.full((1, 2, 64, 64), 2.0**20), *[torch.ones(1, 2, 1, 1)] * 64]
    frame = branch_statistics(model, batches)
    mean = frame[frame.branch == "pool"]["mean"]
    count = 64 * 64 + 64
    np.testing.assert_allclose(mean * count - 2.0**32, 64, atol=1e-3)


@pytest.mark.parametrize(
    ("bias", "changed"), [(float("nan"), BRANCHES[:1]), (-1.0, BRANCHES)], ids=["sick", "silent"]
)
def test_what_has_no_energy_to_share_out_has_no_share(bias, changed, batches):
    model = small()
    for branch in changed:
        for norm in getattr(model.inception5b, branch).modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.zeros_(norm.weight)
                nn.init.constant_(norm.bias, bias)
    share = branch_summary(model, batches).set_index("stage").energy_share
    assert share["5b"].isna().all()
    assert share["5a"].sum() == pytest.approx(1)


@pytest.fixture(scope="module")
def branches(batches):
    return branch_summary(small(), batches)


def test_summary_is_as_documented(branches):
    assert set(branches.columns) == {
        "module", "stage", "branch", "channels", "energy_share", "channel_share", "energy_ratio",
        "zero_fraction", "dead", "effective_rank", "rank_share",
    }  # fmt: skip
    assert branches.index.equals(pd.RangeIndex(36))
    assert branches.module.tolist() == gl.branch_names(small())


def test_summary_sums_up(branches, maps):
    by_module = branches.set_index("module")
    for stage in branches.stage.unique():
        module = f"inception{stage}"
        energy = maps[module].square().sum()
        for branch in BRANCHES:
            row, here = by_module.loc[f"{module}.{branch}"], maps[f"{module}.{branch}"]
            share = float(here.square().sum() / energy)
            channel_share = here.shape[1] / maps[module].shape[1]
            assert row.channels == here.shape[1]
            assert row.energy_share == pytest.approx(share, rel=1e-4)
            assert row.channel_share == pytest.approx(channel_share)
            assert row.energy_ratio == pytest.approx(share / channel_share, rel=1e-4)
            assert row.zero_fraction == pytest.approx(float((here == 0).double().mean()))
            assert row.dead == int((here == 0).all(0).flatten(1).all(1).sum())
    sums = branches.groupby("stage")[["energy_share", "channel_share"]].sum()
    np.testing.assert_allclose(sums, 1, rtol=1e-12)


def test_dead_channels_are_counted():
    model = OneModule()
    with torch.no_grad():
        model.inception3a.branch1x1.conv.weight[:3] = -1
        model.inception3a.branch1x1.conv.weight[3] = 1
        model.inception3a.branch1x1.conv.bias.zero_()
    frame = branch_summary(model, torch.ones(1, 2, 8, 8)).set_index("branch")
    assert frame.dead["1x1"] == 3
    assert frame.zero_fraction["1x1"] == 0.75
    assert frame.dead["pool"] == 0


def test_effective_rank_is_the_corrected_participation_ratio(branches, maps):
    by_module = branches.set_index("module")
    for name in gl.branch_names(small()):
        values = maps[name].transpose(0, 1).flatten(1)
        eigenvalues = torch.linalg.eigvalsh(torch.cov(values, correction=0)).clamp(min=0)
        if eigenvalues.sum() == 0:
            assert np.isnan(by_module.effective_rank[name])
            continue
        ratio = float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())
        expected = 1 / (1 / ratio - 1 / values.shape[1])
        assert by_module.effective_rank[name] == pytest.approx(expected, rel=1e-3)
        assert by_module.rank_share[name] == pytest.approx(expected / len(values), rel=1e-3)


def test_effective_rank_of_known_covariances():
    """Full-rank noise has its number of channels, even from a small sample; copies have 1."""

    generator = torch.Generator().manual_seed(0)
    model = OneModule()
    conv = model.inception3a.branch1x1.conv
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, 0, 0, 0] = torch.arange(1.0, conv.out_channels + 1)
        conv.bias.zero_()
    images = torch.rand(4, 2, 8, 8, generator=generator)
    frame = branch_summary(model, images).set_index("branch")
    assert frame.effective_rank["1x1"] == pytest.approx(1, abs=0.01)  # copies of one pixel value
    noise = torch.randn(200, 10, 1, 1, generator=generator)
    corrected = activations._effective_rank(add_moments(None, noise))
    covariance = torch.cov(noise[:, :, 0, 0].T, correction=0)
    plain = float(covariance.trace() ** 2 / covariance.square().sum())
    assert plain < 9.7 < corrected < 10.3


def test_effective_rank_of_hardly_anything_is_na():
    model = small()
    one = branch_summary(
        model, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    )
    deep = one[one.stage.isin(["5a", "5b"])]  # one position
    assert deep.effective_rank.isna().all()
    assert (one.effective_rank.dropna() >= 1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_random_control_has_the_networks_precision(batches, dtype):
    control = random_control(small().to(dtype), batches[0].to(dtype))
    assert {p.dtype for p in control.parameters()} == {dtype}


def test_random_control_has_the_architecture_and_calibrated_batch_norm(batches):
    model = small()
    control = random_control(model, batches[0], seed=3)
    again = random_control(model, batches[0], seed=3)
    assert control.architecture == model.architecture
    assert not control.training
    weights = control.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, weights[key])
    assert not torch.equal(weights["conv1.conv.weight"], model.state_dict()["conv1.conv.weight"])
    with torch.no_grad(), record(control, "conv2.bn") as maps:
        control(batches[0])
    deviation = maps["conv2.bn"].transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(deviation, torch.ones_like(deviation), rtol=0.05, atol=0)


def test_liveliest_channels_vary_most(batches, maps):
    model, image = small(), batches[0][:1]
    sheet = liveliest_channels(model, image, 3)
    assert list(sheet) == ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    assert list(sheet["3a"]) == ["1x1", "3x3", "5x5", "pool"]
    for stage, by_branch in sheet.items():
        for branch, found in zip(BRANCHES, by_branch.values(), strict=True):
            whole = maps[f"inception{stage}.{branch}"][0].numpy()
            strongest = np.argsort(-whole.std(axis=(1, 2)), kind="stable")[:3]
            assert found.dtype == np.float32
            scale = np.abs(whole).max()
            np.testing.assert_allclose(found, whole[strongest], rtol=1e-4, atol=1e-5 * scale)
    assert model.training
    assert len(liveliest_channels(model, image, 999)["5b"]["pool"]) == 13


def test_a_bright_but_even_channel_is_not_lively():
    images = torch.zeros(1, 2, 8, 8, dtype=torch.bfloat16)
    images[:, 0] = 100
    images[:, 1, 4, 4] = 1
    pool = liveliest_channels(OneModule().bfloat16(), images)["3a"]["pool"]
    assert pool[:, 4, 4].tolist() == [1, 100]


@pytest.mark.parametrize("image", [torch.zeros(1, 2, 8, 8), torch.zeros(1, 3, 8, 8)])
def test_looking_at_channels_restores_the_mode(image):
    model = OneModule()
    model.inception3a.branch1x1.eval()
    modes = [module.training for module in model.modules()]
    try:
        liveliest_channels(model, image)
    except RuntimeError:
        assert image.shape[1] == 3
    assert [module.training for module in model.modules()] == modes


def test_statistics_under_channels_last_and_autocast(batches, statistics):
    model = small().to(memory_format=torch.channels_last)
    images = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    with torch.autocast("cpu", torch.bfloat16):
        half = branch_statistics(model, images)
    for column in ("mean", "energy", "zero_fraction"):
        scale = statistics[column].max()
        np.testing.assert_allclose(half[column], statistics[column], rtol=0.1, atol=0.05 * scale)


@pytest.mark.parametrize("nothing", [[], torch.empty(0, 3, 32, 32), [torch.empty(0, 3, 32, 32)]])
def test_no_images(nothing):
    with pytest.raises(ValueError, match="no images were given; give a batch"):
        branch_statistics(small(), nothing)
