"""The gradient of each loss equals autograd's, and looking at it changes nothing."""

import copy
import io
import itertools
import math
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gnetlab as gl
from gnetlab.measure.gradients import (
    GradientRecorder,
    at_initialization,
    by_depth,
    gradient_flow,
    gradient_noise,
    heads_share,
    output_flow,
    split_gradients,
    weight_cuts,
    weighted_losses,
)
from gnetlab.net.data import PhotoCrops
from gnetlab.net.model import GoogLeNetOutput

COLUMNS = [
    "module", "stage", "branch", "kind", "source", "elements", "gradient_rms", "weight_rms",
    "relative", "cosine_to_main", "projection_share", "energy_share", "weight_dot_gradient",
]  # fmt: skip
STILL = {"dropout": 0.0, "head_dropout": 0.0}
NORMS = pytest.mark.parametrize("norm", [None, "lrn", "batch"])


def small(norm=None, **options):
    options = {"init": "kaiming", "num_classes": 4, "width": 0.1, "seed": 0} | options
    return gl.googlenet(stem="compact", norm=norm, **options)


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


TARGETS = torch.tensor([0, 1, 2, 3, 0, 1])


def weights_of(model):
    return {
        name.removesuffix(".weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
    }


def test_inference_mode_does_not_matter(images):
    expected = gradient_flow(small(**STILL), images, TARGETS)
    model = small(**STILL)
    with torch.inference_mode():
        made_inside, targets = images + 0, TARGETS + 0
        pd.testing.assert_frame_equal(gradient_flow(model, made_inside, targets), expected)


def test_an_empty_batch_is_an_error(images):
    with pytest.raises(ValueError, match="an empty batch was given"):
        gradient_flow(small(), images[:0], TARGETS[:0])


@NORMS
@pytest.mark.parametrize("head_weight", [0.3, 1.7])
def test_each_source_equals_autograd_on_its_own_forward_pass(images, norm, head_weight):
    model, images = small(norm).double(), images.double()
    torch.manual_seed(5)  # dropout
    split = split_gradients(model, images, TARGETS, head_weight=head_weight)
    weights = weights_of(model)
    assert list(split) == list(weights)
    for source, factor in {"logits": 1, "aux1": head_weight, "aux2": head_weight}.items():
        torch.manual_seed(5)
        loss = factor * F.cross_entropy(getattr(model.train()(images), source), TARGETS)
        expected = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        source = "main" if source == "logits" else source
        for name, gradient in zip(weights, expected, strict=True):
            assert (source in split[name]) == (gradient is not None)
            if gradient is not None:
                torch.testing.assert_close(split[name][source], gradient, rtol=1e-9, atol=1e-12)


@NORMS
def test_the_sources_sum_up_to_the_gradient_of_the_total_loss(images, norm):
    model, images = small(norm).double(), images.double()
    torch.manual_seed(5)
    split = split_gradients(model, images, TARGETS)
    torch.manual_seed(5)
    output = model(images)
    losses = [F.cross_entropy(logits, TARGETS) for logits in output]
    (losses[0] + 0.3 * losses[1] + 0.3 * losses[2]).backward()
    for name, weight in weights_of(model).items():
        parts = sum(gradient for source, gradient in split[name].items() if source != "total")
        tolerance = {"rtol": 1e-9, "atol": 1e-12 * float(weight.grad.abs().max())}
        torch.testing.assert_close(split[name]["total"], weight.grad, **tolerance)
        torch.testing.assert_close(parts, weight.grad, **tolerance)


@NORMS
def test_the_shares_of_the_sources_add_up_to_one(images, norm):
    flow = gradient_flow(small(norm).double(), images.double(), TARGETS)
    sources, total = flow[flow.source != "total"], flow[flow.source == "total"]
    sums = sources.groupby("module", sort=False).projection_share.sum()
    assert (sums - 1).abs().max() < 1e-9
    assert (total[["projection_share", "energy_share"]] - 1).abs().max(axis=None) < 1e-9
    assert sources.energy_share.between(0, 1 + 1e-12).all()
    alone = sources.groupby("module").source.transform("size") == 1
    assert (sources[alone].energy_share - 1).abs().max() < 1e-9
    # of two sources, what is not the one's is the other's
    pairs = sources.groupby("module").filter(lambda rows: len(rows) == 2)
    sums = pairs.groupby("module").energy_share.sum()
    assert len(sums) > 10
    assert (sums - 1).abs().max() < 1e-9
    assert not sources.projection_share.between(0, 1).all()


def test_heads_reach_only_what_lies_before_them(images):
    flow = gradient_flow(small(), images, TARGETS)
    sources = flow.groupby("stage").source.agg(set).to_dict()
    everything = {"main", "aux1", "aux2", "total"}
    assert sources == {
        **dict.fromkeys(["stem", "3a", "3b", "4a"], everything),
        **dict.fromkeys(["4b", "4c", "4d"], everything - {"aux1"}),
        **dict.fromkeys(["4e", "5a", "5b", "head"], everything - {"aux1", "aux2"}),
        "aux1": {"aux1", "total"},
        "aux2": {"aux2", "total"},
    }
    assert (flow.groupby(["module", "source"]).size() == 1).all()


@pytest.mark.parametrize("heads", [("aux1",), ()])
def test_heads_that_are_not_there_have_no_rows(images, heads):
    flow = gradient_flow(small(aux=heads), images, TARGETS)
    assert set(flow.source) == {"main", *heads, "total"}
    if not heads:
        assert flow.gradient_rms[::2].tolist() == flow.gradient_rms[1::2].tolist()


def test_frame_is_as_documented(images):
    model = small("batch")
    flow = gradient_flow(model, images, TARGETS)
    assert list(flow.columns) == COLUMNS
    assert flow.index.equals(pd.RangeIndex(len(flow)))
    assert flow.module.drop_duplicates().tolist() == list(weights_of(model))
    assert set(flow.kind) == {"Conv2d", "Linear"}
    place = flow.drop_duplicates("module").set_index("module")[["stage", "branch"]]
    assert place.loc["inception4b.branch5x5.reduce.conv"].tolist() == ["4b", "5x5"]
    assert place.loc["aux2.fc1"].tolist() == ["aux2", ""]


@NORMS
def test_numbers_equal_a_direct_computation(images, norm):
    model, images = small(norm).double(), images.double()
    torch.manual_seed(5)
    split = split_gradients(model, images, TARGETS)
    torch.manual_seed(5)
    flow = gradient_flow(model, images, TARGETS)
    assert len(flow) == sum(len(by_source) for by_source in split.values())
    for row in flow.itertuples():
        gradient, total = split[row.module][row.source], split[row.module]["total"]
        weight = model.get_submodule(row.module).weight.detach()
        count, dot = math.sqrt(gradient.numel()), float((weight * gradient).sum())
        assert row.elements == weight.numel()
        assert row.gradient_rms == pytest.approx(float(gradient.norm()) / count, rel=1e-9)
        assert row.weight_rms == pytest.approx(float(weight.norm()) / count, rel=1e-9)
        assert row.relative == pytest.approx(row.gradient_rms / row.weight_rms, rel=1e-9)
        scale = float(weight.norm() * gradient.norm())
        assert row.weight_dot_gradient == pytest.approx(dot, rel=1e-9, abs=1e-12 * scale)
        share = float((gradient * total).sum() / total.square().sum())
        scale = float(gradient.norm() / total.norm())
        assert row.projection_share == pytest.approx(share, rel=1e-9, abs=1e-12 * scale)
        energies = [float(part.square().sum()) for part in (gradient, total - gradient)]
        assert row.energy_share == pytest.approx(energies[0] / sum(energies), rel=1e-9)
        if "main" not in split[row.module]:
            assert math.isnan(row.cosine_to_main)
            continue
        main = split[row.module]["main"]
        direct = F.cosine_similarity(gradient.flatten(), main.flatten(), 0, eps=1e-300)
        assert row.cosine_to_main == pytest.approx(float(direct), abs=1e-9)
    assert flow.cosine_to_main.max() < 1 + 1e-9
    assert flow.cosine_to_main[flow.source == "aux1"].std() > 0.01


@pytest.mark.parametrize("init", ["kaiming", "torchvision"])
def test_the_cosine_of_main_to_itself_is_one_however_small(images, init):
    flow = gradient_flow(small(init=init), images, TARGETS)
    main = flow[flow.source == "main"]
    assert (main.gradient_rms.min() < 1e-12) == (init == "torchvision")
    assert (main.cosine_to_main - 1).abs().max() < 1e-9


def flow_by_source(model, images, **options):
    torch.manual_seed(5)
    flow = gradient_flow(model, images, TARGETS, **options)
    return flow.pivot(index="module", columns="source", values="gradient_rms")


def test_heads_are_linear_in_their_weight(images):
    once, twice = (flow_by_source(small(), images, head_weight=w) for w in (0.3, 0.6))
    assert (twice[["aux1", "aux2"]] / once[["aux1", "aux2"]] - 2).abs().max(axis=None) < 1e-5
    pd.testing.assert_series_equal(twice.main, once.main, check_exact=True)
    assert (once.loc["conv1.conv", ["aux1", "aux2"]] > 0).all()
    layers = ["aux1.fc1", "aux1.fc2"]
    pd.testing.assert_series_equal(once.total[layers], once.aux1[layers], check_names=False)


def test_without_head_weight_the_total_is_main(images):
    flow = flow_by_source(small(), images, head_weight=0)
    reached = flow[flow.main.notna()]
    assert len(reached) == len(flow) - 6  # three layers in each head
    pd.testing.assert_series_equal(reached.total, reached.main, check_exact=True, check_names=False)
    assert (flow[["aux1", "aux2"]].fillna(0) == 0).all(axis=None)
    torch.manual_seed(5)
    rows = gradient_flow(small(), images, TARGETS, head_weight=0).set_index(["module", "source"])
    assert rows.projection_share["conv1.conv"].tolist() == [1, 0, 0, 1]
    assert rows.energy_share["conv1.conv"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("element", [(0, 0, 1, 1), (5, 2, 0, 2)])
def test_finite_differences_of_one_weight(images, element):
    model = small(dropout=0.0, head_dropout=0.0).double()
    images, weight, step = images.double(), model.conv1.conv.weight, 1e-6
    split = split_gradients(model, images, TARGETS)["conv1.conv"]
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight[element] += sign * step
            main, aux1, aux2 = (F.cross_entropy(logits, TARGETS) for logits in model(images))
            weight[element] -= sign * step
            losses.append(torch.stack([main, 0.3 * aux1, 0.3 * aux2, main + 0.3 * (aux1 + aux2)]))
    slopes = (losses[0] - losses[1]) / (2 * step)
    found = torch.stack([split[source][element] for source in ("main", "aux1", "aux2", "total")])
    torch.testing.assert_close(found, slopes, rtol=1e-5, atol=1e-8)
    assert (found.abs() > 1e-4).all()


def outputs_by_hand(model, images, targets, weight):
    """sqrt(mean over images of |dL/dx|^2), image by image: (module, source) -> flow."""
    squares = {}
    for image, target in zip(images.split(1), targets.split(1), strict=True):
        outputs = {}
        hooks = [
            module.register_forward_hook(
                lambda _m, _i, output, name=name, outputs=outputs: outputs.update({name: output})
            )
            for name, module in model.named_children()
            if name.startswith(("conv", "inception"))
        ]
        main, aux1, aux2 = (F.cross_entropy(logits, target) for logits in model(image))
        losses = {"main": main, "aux1": weight * aux1, "aux2": weight * aux2}
        losses["total"] = sum(losses.values())
        for hook in hooks:
            hook.remove()
        for source, loss in losses.items():
            found = torch.autograd.grad(
                loss, list(outputs.values()), retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(outputs, found, strict=True):
                if gradient is not None:
                    squares.setdefault((name, source), []).append(float(gradient.square().sum()))
    assert all(len(values) == len(images) for values in squares.values())
    return {key: math.sqrt(sum(values) / len(images)) for key, values in squares.items()}


STAGES = ["conv1", "conv2_reduce", "conv2", "3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]


@pytest.mark.parametrize("norm", [None, "lrn"])
def test_the_gradient_of_outputs_equals_image_by_image(images, norm):
    model, images = small(norm, **STILL).double(), images[:4].double()
    flow = output_flow(model, images, TARGETS[:4], head_weight=0.7)
    direct = outputs_by_hand(model, images, TARGETS[:4], 0.7)
    assert list(flow.columns) == ["module", "stage", "source", "flow"]
    assert flow.index.equals(pd.RangeIndex(len(flow)))
    found = flow.set_index(["module", "source"]).flow.to_dict()
    assert found == pytest.approx(direct, rel=1e-9)
    assert flow.stage.drop_duplicates().tolist() == STAGES
    names = [name if name.startswith("conv") else f"inception{name}" for name in STAGES]
    assert flow.module.drop_duplicates().tolist() == names
    sources = flow.groupby("stage", sort=False).source.agg(list)
    assert sources["4a"] == ["main", "aux1", "aux2", "total"]
    assert sources["4b"] == sources["4d"] == ["main", "aux2", "total"]
    assert sources["4e"] == sources["5b"] == ["main", "total"]


def test_outputs_of_a_network_without_heads_and_with_copies(images):
    flow = output_flow(small(aux=False, extra_modules=2), images, TARGETS)
    stages = [*STAGES[:8], "4c_2", "4c_3", *STAGES[8:]]
    assert flow.stage.tolist() == [stage for stage in stages for _ in range(2)]
    assert flow.source.tolist() == ["main", "total"] * len(stages)
    assert flow.flow[::2].tolist() == flow.flow[1::2].tolist()


def cuts_of(model, images):
    layers = gradient_flow(model, images, TARGETS).assign(norm="n", init="i", seed=3)
    return weight_cuts(layers)


@pytest.mark.parametrize(
    ("double", "tolerance"), [(False, 1e-4), (True, 1e-9)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("branch5x5", ["5x5", "3x3+3x3"])
def test_every_cut_carries_the_same_without_norm_and_biases(images, double, tolerance, branch5x5):
    kind = torch.float64 if double else torch.float32
    model = small(init=("gain", 0.6), branch5x5=branch5x5, extra_modules=1, **STILL).to(kind)
    cuts = cuts_of(model, images.to(kind))
    assert list(cuts.columns) == ["norm", "init", "seed", "stage", "weight_dot_gradient"]
    assert cuts[["norm", "init", "seed"]].drop_duplicates().to_numpy().tolist() == [["n", "i", 3]]
    assert cuts.stage.tolist() == [*STAGES[:8], "4c_2", *STAGES[8:], "fc"]
    logits = model(images.to(kind)).logits.detach().requires_grad_()
    F.cross_entropy(logits, TARGETS).backward()
    direct = float((logits.detach() * logits.grad).sum())
    assert cuts.weight_dot_gradient.tolist() == pytest.approx([direct] * 14, rel=tolerance)


@pytest.mark.parametrize("kernels", ["5x5", "3x3+3x3"])
def test_the_convolution_after_the_reduction_counts(images, kernels):
    # with biases, so that no other cut carries the same
    layers = gradient_flow(small(branch5x5=kernels, init=None), images, TARGETS)
    layers = layers.assign(norm="", init="", seed=0)
    cuts = weight_cuts(layers).set_index("stage").weight_dot_gradient
    main = layers[layers.source == "main"].set_index("module").weight_dot_gradient
    names = ["branch1x1", "branch3x3.conv", "branch5x5.conv", "branch_pool.proj"]
    assert cuts["4b"] == pytest.approx(main[[f"inception4b.{name}.conv" for name in names]].sum())
    assert cuts["conv2_reduce"] == main["conv2_reduce.conv"]


@pytest.mark.parametrize("options", [{"init": None}, {"init": "caffe"}, {"norm": "batch"}], ids=str)
def test_biases_and_norms_break_the_identity(images, options):
    cuts = cuts_of(small(**{"norm": None} | options).double(), images.double())
    values = cuts.weight_dot_gradient
    assert values.max() - values.min() > 0.1 * values.abs().max()


def test_cuts_are_summed_within_each_network():
    layers = pd.DataFrame(
        [
            ("conv1.conv", "main", 1.0, "n", "a", 0), ("conv1.conv", "aux1", 9.0, "n", "a", 0),
            ("inception3a.branch1x1.conv", "main", 2.0, "n", "a", 0),
            ("inception3a.branch3x3.reduce.conv", "main", 9.0, "n", "a", 0),
            ("inception3a.branch3x3.conv.conv", "main", 3.0, "n", "a", 0),
            ("aux1.conv.conv", "main", 9.0, "n", "a", 0), ("fc", "total", 9.0, "n", "a", 0),
            ("fc", "main", 4.0, "n", "a", 1), ("fc", "main", 5.0, "m", "a", 1),
            ("conv1.conv", "main", 6.0, "n", "b", 0),
        ],
        columns=["module", "source", "weight_dot_gradient", "norm", "init", "seed"],
    )  # fmt: skip
    assert weight_cuts(layers).to_numpy().tolist() == [
        ["n", "a", 0, "conv1", 1.0], ["n", "a", 0, "3a", 5.0], ["n", "a", 1, "fc", 4.0],
        ["m", "a", 1, "fc", 5.0], ["n", "b", 0, "conv1", 6.0],
    ]  # fmt: skip


def batches_of(count, size=4, kind=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 16, 16, generator=generator).to(kind),
            torch.randint(4, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("norm", [None, "batch"])
def test_gradient_noise_equals_a_direct_computation(norm):
    model, batches = small(norm).double(), batches_of(3)
    found = gradient_noise(model, iter(batches), seed=7, head_weight=0.5)
    assert list(found.columns) == [
        "module", "stage", "branch", "kind", "source", "signal_rms", "noise_rms", "snr",
        "cosine_to_main", "cosine_std", "batches",
    ]  # fmt: skip
    splits = []
    for i, batch in enumerate(batches):
        torch.manual_seed(7 + i)  # dropout
        splits.append(split_gradients(model, *batch, head_weight=0.5))
    rows = [(name, source) for name, by_source in splits[0].items() for source in by_source]
    assert list(zip(found.module, found.source, strict=True)) == rows
    assert (found.batches == 3).all()
    unresolved = 0
    for row in found.itertuples():
        vectors = torch.stack([split[row.module][row.source].flatten() for split in splits])
        gram = vectors @ vectors.T
        signal = float(gram.sum() - gram.trace()) / 6
        noise = float(gram.trace()) / 3 - signal
        count = vectors.shape[1]
        assert row.noise_rms == pytest.approx(math.sqrt(noise / count), rel=1e-9)
        if signal > 0:
            assert row.signal_rms == pytest.approx(math.sqrt(signal / count), rel=1e-7)
            assert row.snr == pytest.approx(signal / noise, rel=1e-7)
        else:
            unresolved += 1
            assert math.isnan(row.signal_rms)
            assert math.isnan(row.snr)
        if "main" in splits[0][row.module]:
            main = torch.stack([split[row.module]["main"].flatten() for split in splits])
            cosines = F.cosine_similarity(vectors, main, eps=1e-300)
            assert row.cosine_to_main == pytest.approx(float(cosines.mean()), abs=1e-9)
            assert row.cosine_std == pytest.approx(float(cosines.std()), abs=1e-9)
        else:
            assert math.isnan(row.cosine_to_main)
    assert 0 < unresolved < len(found)
    place = found.set_index(["module", "source"])[["stage", "branch", "kind"]]
    assert place.loc["inception4b.branch5x5.reduce.conv", "main"].tolist() == [
        "4b",
        "5x5",
        "Conv2d",
    ]


def test_equal_batches_have_no_noise():
    found = gradient_noise(small(**STILL).double(), batches_of(1) * 4)
    assert (found.noise_rms < 1e-7 * found.signal_rms).all()
    assert found.cosine_std.abs().max() < 1e-9
    flow = gradient_flow(small(**STILL).double(), *batches_of(1)[0])
    assert found.signal_rms.tolist() == pytest.approx(flow.gradient_rms.tolist(), rel=1e-9)
    dropped = gradient_noise(small().double(), batches_of(1) * 4)
    assert (dropped[dropped.module == "fc"].noise_rms > 0).all()


def test_opposite_batches_have_no_signal():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    image = torch.ones(1, 2, 1, 1)
    found = gradient_noise(model, [(image, torch.tensor([label])) for label in (0, 1)])
    assert found.signal_rms.isna().all()
    assert found.snr.isna().all()
    # gradients +-1/2 in each of the four weights: |g|^2 = 1, signal -1, noise 2
    assert found.noise_rms.tolist() == pytest.approx([math.sqrt(2 / 4)] * 2)


def test_a_gradient_that_is_no_number_has_no_noise_of_zero():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    batches = [(torch.full((1, 2, 1, 1), value), torch.tensor([0])) for value in (1.0, math.nan)]
    found = gradient_noise(model, batches)
    assert found[["signal_rms", "noise_rms", "snr"]].isna().all(axis=None)


@pytest.mark.parametrize("count", [0, 1])
def test_noise_takes_two_batches(count):
    with pytest.raises(ValueError, match=f"{count} batches given; noise takes at least two"):
        gradient_noise(small(), iter(batches_of(count, kind=torch.float32)))


NETWORK = {"stem": "compact", "width": 0.25, "num_classes": 16}
BOUNDS = {  # of total over main at conv1, in every seed of the prototype
    ("none", "gaussian"): (1000, math.inf),
    ("none", "default"): (30, math.inf),
    ("none", "gain 0.6"): (5, math.inf),
    ("none", "Glorot"): (1.5, math.inf),
    ("batch norm", "default"): (0.8, 1.25),
}


@pytest.fixture(scope="module")
def initial():
    random = torch.get_rng_state()
    data, seeds = PhotoCrops(size=32), range(3)
    inits = {"gaussian": "gaussian", "default": None, "gain 0.6": ("gain", 0.6), "Glorot": "xavier"}
    plain = at_initialization(data, {"none": None}, inits, seeds, **NETWORK)
    normed = at_initialization(data, {"batch norm": "batch"}, {"default": None}, seeds, **NETWORK)
    assert torch.equal(torch.get_rng_state(), random)
    layers, outputs = (
        pd.concat(both, ignore_index=True) for both in zip(plain, normed, strict=True)
    )
    return type(plain)(layers, outputs)


@pytest.mark.parametrize("key", BOUNDS, ids=", ".join)
def test_what_heads_add_at_conv1_at_initialization(initial, key):
    shares = heads_share(initial.layers)
    shares = shares[shares.configuration == ", ".join(key)]
    low, high = BOUNDS[key]
    assert shares.seed.tolist() == [0, 1, 2]
    assert shares.ratio.between(low, high).all()
    assert shares.energy_share.between(0, 1).all()
    if low >= 30:
        assert (shares.energy_share > 0.99).all()


def propagation(initial, norm, init):
    rows = initial.outputs[initial.outputs.source == "main"]
    rows = rows[(rows.norm == norm) & (rows.init == init)]
    flow = rows.pivot(index="seed", columns="stage", values="flow")
    assert len(flow) == 3
    return flow["conv1"] / flow["5b"]


def test_whether_the_gradient_of_outputs_vanishes_at_initialization(initial):
    assert (propagation(initial, "none", "gain 0.6") < 0.01).all()
    assert (propagation(initial, "batch norm", "default") > 5).all()


def test_cuts_at_initialization(initial):
    cuts = weight_cuts(initial.layers)
    cuts = cuts[cuts.norm == "none"].set_index(["init", "seed", "stage"]).weight_dot_gradient
    table = cuts.unstack("stage")
    assert table.shape == (12, 13)
    spread = (table.max(axis=1) - table.min(axis=1)) / table.abs().max(axis=1)
    for init in ("gaussian", "gain 0.6", "Glorot"):
        assert (spread[init] < 1e-4).all()
    assert (spread["default"] > 0.1).all()


TINY = {"stem": "compact", "width": 0.1, "num_classes": 16, "batch_size": 2}


def test_at_initialization_measures_every_combination():
    norms, inits = {"none": None, "norm": "batch"}, {"a": "xavier", "b": None}
    found = at_initialization(PhotoCrops(size=16), norms, inits, iter((4, 2)), **TINY)
    assert found._fields == ("layers", "outputs")
    columns = ["module", "stage", "source", "flow"]
    expected = list(itertools.product(norms, inits, (4, 2)))
    for frame, own in zip(found, (COLUMNS, columns), strict=True):
        assert list(frame.columns) == [*own, "norm", "init", "seed"]
        assert frame.index.equals(pd.RangeIndex(len(frame)))
        runs = frame.groupby(["norm", "init", "seed"], sort=False).size()
        assert list(runs.index) == expected
        assert runs.nunique() == 1


def test_at_initialization_is_the_gradient_of_a_seeded_network(initial):
    model = gl.googlenet(**NETWORK, norm=None, init="xavier", seed=1)
    batch = PhotoCrops(size=32).train_batch(0, 64, 1)
    for look, frame in zip((gradient_flow, output_flow), initial, strict=True):
        torch.manual_seed(1)
        alone = look(model, *batch)
        rows = frame[(frame.norm == "none") & (frame.init == "Glorot") & (frame.seed == 1)]
        rows = rows[alone.columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, alone, rtol=1e-5)


def test_heads_share_by_hand():
    rows = [
        ("conv1.conv", "main", 2.0, 0.9, "b", 1), ("conv1.conv", "total", 3.0, 1.0, "b", 1),
        ("conv1.conv", "main", 4.0, 0.25, "a", 0), ("conv1.conv", "total", 2.0, 1.0, "a", 0),
        ("conv1.conv", "aux1", 9.0, 0.5, "a", 0),
        ("fc", "main", 5.0, 1.0, "b", 1), ("fc", "total", 5.0, 1.0, "b", 1),
    ]  # fmt: skip
    columns = ["module", "source", "gradient_rms", "energy_share", "norm", "seed"]
    flow = pd.DataFrame(rows, columns=columns).assign(init="x")
    shares = heads_share(flow)
    assert list(shares.columns) == ["configuration", "seed", "ratio", "energy_share"]
    assert shares.configuration.tolist() == ["b, x", "a, x"]
    assert shares.seed.tolist() == [1, 0]
    assert shares.ratio.tolist() == [1.5, 0.5]
    assert shares.energy_share.tolist() == pytest.approx([0.1, 0.75])
    assert heads_share(flow, "fc").ratio.tolist() == [1.0]


def test_the_energy_of_both_heads_together(images):
    torch.manual_seed(5)
    split = split_gradients(small(), images, TARGETS)["conv1.conv"]
    torch.manual_seed(5)
    flow = gradient_flow(small(), images, TARGETS).assign(norm="", init="", seed=0)
    energies = [float(g.square().sum()) for g in (split["main"], split["aux1"] + split["aux2"])]
    found = heads_share(flow).energy_share.item()
    assert found == pytest.approx(energies[1] / sum(energies), rel=1e-5)


def test_by_depth():
    data, options = PhotoCrops(size=16), TINY | {"batch_size": 16}
    found = by_depth(data, iter((0, 3, 6)), (1, 0), init=("gain", 0.6), **options)
    assert list(found.columns) == [
        "modules", "seed", "source", "conv1_rms", "first_to_last", "propagation",
    ]  # fmt: skip
    keys = list(zip(found.modules, found.source, found.seed, strict=True))
    assert keys == list(itertools.product((9, 12, 15), ("main", "total"), (1, 0)))
    for _, rows in found[found.source == "main"].groupby("seed"):
        assert (rows.propagation.iloc[1:].to_numpy() < 0.3 * rows.propagation.iloc[:-1]).all()
        assert (rows.first_to_last / rows.first_to_last.iloc[0]).between(0.1, 10).all()


def test_by_depth_takes_seeds_from_any_iterable():
    found = by_depth(PhotoCrops(size=16), [0, 1], iter((4, 2)), **TINY)
    assert found.seed.tolist() == [4, 2] * 4


def test_by_depth_reads_what_at_initialization_measures():
    data = PhotoCrops(size=16)
    found = by_depth(data, [2], [3], norm="batch", init="xavier", **TINY)
    direct = at_initialization(data, {"x": "batch"}, {"y": "xavier"}, [3], extra_modules=2, **TINY)
    assert found.modules.tolist() == [11, 11]
    for row in found.itertuples():
        rms = direct.layers[direct.layers.source == row.source].set_index("module").gradient_rms
        flow = direct.outputs[direct.outputs.source == row.source].set_index("stage").flow
        assert row.conv1_rms == pytest.approx(rms["conv1.conv"])
        assert row.first_to_last == pytest.approx(rms["conv1.conv"] / rms["fc"])
        assert row.propagation == pytest.approx(flow["conv1"] / flow["5b"])


LOOKS = {
    "gradient_flow": gradient_flow,
    "output_flow": output_flow,
    "gradient_noise": lambda model, *batch: gradient_noise(model, [batch, batch]),
}


@NORMS
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_as_before(images, norm, look, fails):
    model = small(norm).train()
    model.inception3a.eval()
    model.fc.weight.grad = torch.full_like(model.fc.weight, 7)
    model.conv2.requires_grad_(False)
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    targets = TARGETS + 100 if fails else TARGETS
    try:
        LOOKS[look](model, images, targets)
    except IndexError:
        assert fails
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert (model.fc.weight.grad == 7).all()
    assert [not parameter.requires_grad for parameter in model.parameters()] == frozen


@NORMS
def test_a_training_step_afterwards_is_bit_identical(images, norm):
    trained = []
    for look in (False, True):
        model = small(norm)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(3)
        for _ in range(2):
            if look:
                gradient_flow(model, images, TARGETS)
            optimizer.zero_grad()
            sum(weighted_losses(model(images), TARGETS).values()).backward()
            if look:
                gradient_flow(model, images, TARGETS)
            optimizer.step()
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][key], trained[1][key]) for key in trained[0])
    assert not torch.equal(trained[0]["conv1.conv.weight"], small(norm).conv1.conv.weight)


def test_there_is_one_forward_pass_in_training_mode(images):
    model, passes = small().eval(), []
    model.register_forward_pre_hook(lambda m, _: passes.append(m.training))
    gradient_flow(model, images, TARGETS)
    assert passes == [True]


def test_no_grad_outside_does_not_matter(images):
    inside = flow_by_source(small(), images)
    with torch.no_grad():
        outside = flow_by_source(small(), images)
    pd.testing.assert_frame_equal(inside, outside, check_exact=True)


def test_frozen_weights_have_no_rows(images):
    model = small()
    model.conv1.requires_grad_(False)
    flow = gradient_flow(model, images, TARGETS)
    assert "conv1.conv" not in set(flow.module)
    assert "conv2_reduce.conv" in set(flow.module)


def test_torchvisions_network_is_split_too(torchvision_googlenet, images):
    model = torchvision_googlenet(4, aux_logits=True)
    flow = gradient_flow(model, images.repeat(1, 1, 3, 3), TARGETS)
    sources = flow.groupby("module").source.agg(set)
    assert sources["conv1.conv"] == {"main", "aux1", "aux2", "total"}
    assert sources["inception4b.branch1.conv"] == {"main", "aux2", "total"}
    assert sources["aux1.fc1"] == {"aux1", "total"}


class Tagged(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.conv1, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(5, 4)
        self.relu = nn.ReLU(inplace=in_place)

    def forward(self, x):
        return self.fc(self.relu(self.conv1(x)).mean((2, 3)))


def test_an_output_that_is_overwritten_in_place_is_an_error(images):
    assert output_flow(Tagged(False), images, TARGETS).module.tolist() == ["conv1"] * 2
    with pytest.raises(RuntimeError, match="'conv1' is overwritten in place"):
        output_flow(Tagged(True), images, TARGETS)


def test_a_partly_frozen_network_is_measured_and_a_frozen_one_refused(images):
    model = Tagged(False)
    model.conv1.requires_grad_(False)
    assert output_flow(model, images, TARGETS).empty  # nothing below needs a gradient
    assert set(gradient_flow(model, images, TARGETS).module) == {"fc"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="unfreeze some"):
        gradient_flow(model, images, TARGETS)


def test_what_is_not_logits_is_refused(images):
    class Pair(WithUnused):
        def forward(self, x):
            return (super().forward(x), 0)

    with pytest.raises(ValueError, match="returned tuple; gradients are split for logits"):
        gradient_flow(Pair(), images, TARGETS)


def test_a_head_by_another_name_is_refused_and_not_dropped(images):
    class Output(NamedTuple):  # as torchvision's Inception v3
        logits: torch.Tensor
        aux_logits: torch.Tensor | None

    class Headed(WithUnused):
        head = True

        def forward(self, x):
            logits = super().forward(x)
            return Output(logits, 2 * logits if self.head else None)

    model = Headed()
    for look in (gradient_flow, split_gradients):
        with pytest.raises(ValueError, match="returned Output of logits, aux_logits; gradients"):
            look(model, images, TARGETS)
    model.head = False
    assert set(gradient_flow(model, images, TARGETS).source) == {"main", "total"}


def test_autocast_outside_does_not_matter(images):
    inside = flow_by_source(small(), images)
    with torch.autocast("cpu", torch.bfloat16):
        outside = flow_by_source(small(), images)
    pd.testing.assert_frame_equal(inside, outside, check_exact=True)


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.unused, self.fc = nn.Conv2d(3, 5, 3), nn.Linear(2, 2), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc(self.conv1(x).mean((2, 3)))


def test_a_weight_that_no_loss_reaches_has_no_rows(images):
    flow = gradient_flow(WithUnused(), images, TARGETS)
    assert flow.module.tolist() == ["conv1", "conv1", "fc", "fc"]
    assert flow.source.tolist() == ["main", "total"] * 2


def test_losses_go_by_name():
    logits = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    whole = weighted_losses(GoogLeNetOutput(*logits), TARGETS, 0.5)
    direct = [F.cross_entropy(values, TARGETS) for values in logits]
    assert whole == {"main": direct[0], "aux1": 0.5 * direct[1], "aux2": 0.5 * direct[2]}
    assert weighted_losses(logits[0], TARGETS) == {"main": direct[0]}
    only = weighted_losses(GoogLeNetOutput(logits[0], None, logits[2]), TARGETS)
    assert only == {"main": direct[0], "aux2": 0.3 * direct[2]}


def train_by_hand(model, images, recorder=None, steps=5, before=None, start=0, optimizer=None):
    """A few steps of SGD; `before(step)` is called ahead of each."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(start, steps):
        if before:
            before(step)
        losses = weighted_losses(model(images + step), TARGETS)
        optimizer.zero_grad()
        if recorder:
            recorder.before_backward(losses)
        torch.stack(list(losses.values())).sum().backward()
        if recorder:
            recorder.after_backward()
        optimizer.step()
    return optimizer


@NORMS
def test_a_recorded_training_is_bit_identical(images, norm):
    states = []
    for recorded in (False, True):
        model = small(norm)
        torch.manual_seed(3)
        train_by_hand(model, images, GradientRecorder(model, every=2) if recorded else None)
        states.append((model.state_dict(), torch.get_rng_state()))
    (plain, random), (recorded, other_random) = states
    assert torch.equal(random, other_random)
    assert all(torch.equal(value, recorded[key]) for key, value in plain.items())
    assert not torch.equal(plain["conv1.conv.weight"], small(norm).conv1.conv.weight)


def test_totals_are_the_norms_of_the_gradient_at_every_step(images):
    model, expected = small(), []
    model.conv2.requires_grad_(False)
    recorder = GradientRecorder(model, every=0)
    for step in range(3):
        model.zero_grad()
        losses = weighted_losses(model(images), TARGETS)
        if step == 1:  # no gradient in the heads; then none from 4b on, but in aux1
            losses = {"main": losses["main"]}
        elif step == 2:
            losses = {"aux1": losses["aux1"]}
        sum(losses.values()).backward()
        recorder.after_backward()
        for name, weight in weights_of(model).items():
            if weight.grad is not None:
                expected.append((step, name, float(weight.grad.square().mean().sqrt())))
    totals = recorder.totals()
    assert list(totals.columns) == ["step", "module", "stage", "branch", "gradient_rms"]
    assert totals.index.equals(pd.RangeIndex(len(totals)))
    steps, names, values = zip(*expected, strict=True)
    assert totals.step.tolist() == list(steps)
    assert totals.module.tolist() == list(names)
    assert totals.gradient_rms.tolist() == pytest.approx(list(values), rel=1e-5)
    for stage, with_gradient in {
        "4a": [0, 1, 2],
        "4b": [0, 1],
        "aux1": [0, 2],
        "aux2": [0],
    }.items():
        assert sorted(set(totals.step[totals.stage == stage])) == with_gradient
    assert "conv2.conv" not in names
    place = totals.set_index(["step", "module"])[["stage", "branch"]]
    assert place.loc[1, "inception5a.branch_pool.proj.conv"].tolist() == ["5a", "pool"]


@NORMS
def test_splits_are_the_flow_at_that_step(images, norm):
    model, direct = small(norm, **STILL), []
    recorder = GradientRecorder(model, every=2)

    def look(step):
        assert recorder.splits_now() == (step % 2 == 0)
        if step % 2 == 0:
            direct.append(gradient_flow(model, images + step, TARGETS).assign(step=step))

    train_by_hand(model, images, recorder, before=look)
    splits = recorder.splits()
    assert list(splits.columns) == ["step", *COLUMNS]
    expected = pd.concat(direct, ignore_index=True)[["step", *COLUMNS]]
    assert sorted(set(splits.step)) == [0, 2, 4]
    # of the weights at the step, not of those at the end
    pd.testing.assert_frame_equal(splits, expected, rtol=1e-5, atol=1e-12)
    totals = recorder.totals().merge(splits[splits.source == "total"], on=["step", "module"])
    assert len(totals) == 3 * len(weights_of(model))
    assert totals.gradient_rms_x.tolist() == pytest.approx(totals.gradient_rms_y.tolist(), rel=1e-4)


def test_a_recorder_that_never_splits(images):
    model, asked = small(), []
    recorder = GradientRecorder(model, every=0)
    train_by_hand(model, images, recorder, 3, lambda _: asked.append(recorder.splits_now()))
    assert asked == [False] * 3
    assert list(recorder.splits().columns) == ["step", *COLUMNS]
    assert len(recorder.splits()) == 0
    assert sorted(set(recorder.totals().step)) == [0, 1, 2]


def test_a_recorder_before_the_first_step():
    recorder = GradientRecorder(small())
    assert recorder.every == 20
    assert len(recorder.totals()) == len(recorder.splits()) == 0
    assert list(recorder.totals().columns) == ["step", "module", "stage", "branch", "gradient_rms"]
    with pytest.raises(RuntimeError, match="after the backward pass"):
        recorder.norms()
    with pytest.raises(RuntimeError, match="after the backward pass"):
        recorder.after_backward()
    assert recorder.step == 0


@pytest.mark.parametrize("stop", [0, 3, 4])
def test_a_recorder_goes_on_from_its_state(images, stop):
    whole = small()
    torch.manual_seed(3)
    recorder = GradientRecorder(whole, every=2)
    train_by_hand(whole, images, recorder)

    model = small()
    torch.manual_seed(3)
    first = GradientRecorder(model, every=2)
    optimizer = train_by_hand(model, images, first, stop)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = GradientRecorder(model, every=2)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.step == stop
    kept = second.totals(), second.splits()
    pd.testing.assert_frame_equal(kept[0], first.totals(), check_exact=True)
    pd.testing.assert_frame_equal(kept[1], first.splits(), check_exact=True)
    train_by_hand(model, images, second, start=stop, optimizer=optimizer)
    pd.testing.assert_frame_equal(second.totals(), recorder.totals(), check_exact=True)
    pd.testing.assert_frame_equal(second.splits(), recorder.splits(), check_exact=True)
    assert first.step == stop


def test_what_a_recorder_keeps_does_not_change_with_the_network(images):
    model = small()
    recorder = GradientRecorder(model, every=1)
    train_by_hand(model, images, recorder, 1)
    state, totals, splits = (
        copy.deepcopy(recorder.state_dict()),
        recorder.totals(),
        recorder.splits(),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
            parameter.grad.zero_()
    pd.testing.assert_frame_equal(recorder.totals(), totals, check_exact=True)
    pd.testing.assert_frame_equal(recorder.splits(), splits, check_exact=True)
    assert torch.equal(recorder.state_dict()["norms"], state["norms"])


@pytest.mark.parametrize(
    "targets", [TARGETS.float(), F.one_hot(TARGETS), TARGETS[0], TARGETS.int(), TARGETS > 1]
)
@pytest.mark.parametrize("norm", [None, "batch"])
def test_targets_are_class_numbers(images, targets, norm):
    with pytest.raises(ValueError, match=r"targets of shape .* targets.long\(\)"):
        gradient_flow(small(norm), images, targets)


def test_class_numbers_may_be_bytes(images):
    found = [gradient_flow(small(), images, of) for of in (TARGETS, TARGETS.byte())]
    pd.testing.assert_frame_equal(*found, check_exact=True)


def test_output_flow_of_a_network_without_named_stages(images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(ValueError, match=r"Sequential has no child conv1.*take gradient_flow"):
        output_flow(model, images, TARGETS)
    assert len(gradient_flow(model, images, TARGETS)) == 2
