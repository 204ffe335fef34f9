"""The gradient of each loss equals autograd's, and looking at it changes nothing."""

import math

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gnetlab as gl
from gnetlab.measure.gradients import (
    at_initialization,
    gradient_flow,
    split_gradients,
    total_over_main,
    weighted_losses,
)
from gnetlab.net.data import PhotoCrops
from gnetlab.net.model import GoogLeNetOutput

COLUMNS = [
    "module", "stage", "branch", "kind", "source", "gradient_rms", "weight_rms", "relative",
    "cosine_to_main",
]  # fmt: skip
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
    model = small(norm)
    torch.manual_seed(5)
    split = split_gradients(model, images, TARGETS)
    torch.manual_seed(5)
    output = model(images)
    losses = [F.cross_entropy(logits, TARGETS) for logits in output]
    (losses[0] + 0.3 * losses[1] + 0.3 * losses[2]).backward()
    for name, weight in weights_of(model).items():
        parts = sum(gradient for source, gradient in split[name].items() if source != "total")
        tolerance = {"rtol": 1e-4, "atol": 1e-5 * float(weight.grad.abs().max())}
        torch.testing.assert_close(split[name]["total"], weight.grad, **tolerance)
        torch.testing.assert_close(parts, weight.grad, **tolerance)


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
    model = small(norm)
    torch.manual_seed(5)
    split = split_gradients(model, images, TARGETS)
    torch.manual_seed(5)
    flow = gradient_flow(model, images, TARGETS)
    assert len(flow) == sum(len(by_source) for by_source in split.values())
    for row in flow.itertuples():
        gradient = split[row.module][row.source].double()
        weight = model.get_submodule(row.module).weight.detach()
        count = math.sqrt(gradient.numel())
        assert row.gradient_rms == pytest.approx(float(gradient.norm()) / count, rel=1e-6)
        assert row.weight_rms == pytest.approx(float(weight.norm()) / count, rel=1e-5)
        assert row.relative == pytest.approx(row.gradient_rms / row.weight_rms)
        if "main" not in split[row.module]:
            assert math.isnan(row.cosine_to_main)
            continue
        main = split[row.module]["main"].double()
        direct = F.cosine_similarity(gradient.flatten(), main.flatten(), 0, eps=1e-300)
        assert row.cosine_to_main == pytest.approx(float(direct), abs=1e-6)
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


def test_without_head_weight_the_total_is_main(images):
    flow = flow_by_source(small(), images, head_weight=0)
    reached = flow[flow.main.notna()]
    assert len(reached) == len(flow) - 6  # three layers in each head
    pd.testing.assert_series_equal(reached.total, reached.main, check_exact=True, check_names=False)
    assert (flow[["aux1", "aux2"]].fillna(0) == 0).all(axis=None)


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


BOUNDS = {  # of the ratio at conv1, in every seed of the prototype
    ("none", "gain 0.6"): (5, math.inf),
    ("none", "Glorot"): (1.5, math.inf),
    ("batch norm", "gain 0.6"): (0.8, 1.25),
    ("batch norm", "Glorot"): (0.8, 1.25),
}


@pytest.fixture(scope="module")
def initial():
    random = torch.get_rng_state()
    flow = at_initialization(
        PhotoCrops(size=32), {"none": None, "batch norm": "batch"},
        {"gain 0.6": ("gain", 0.6), "Glorot": "xavier"}, (0, 1),
        stem="compact", width=0.25, num_classes=16,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), random)
    return flow


def test_at_initialization_measures_every_combination(initial):
    assert list(initial.columns) == [*COLUMNS, "norm", "init", "seed"]
    assert initial.index.equals(pd.RangeIndex(len(initial)))
    runs = initial.groupby(["norm", "init", "seed"], sort=False).size()
    assert list(runs.index) == [(*key, seed) for key in BOUNDS for seed in (0, 1)]
    assert runs.nunique() == 1


def test_at_initialization_takes_seeds_from_any_iterable():
    inits = {"a": "xavier", "b": "kaiming"}
    options = {"stem": "compact", "width": 0.1, "num_classes": 16, "batch_size": 2}
    flow = at_initialization(PhotoCrops(size=16), {"none": None}, inits, iter((4, 2)), **options)
    runs = flow[["init", "seed"]].drop_duplicates().to_numpy().tolist()
    assert runs == [["a", 4], ["a", 2], ["b", 4], ["b", 2]]


def test_at_initialization_is_gradient_flow_of_a_seeded_network(initial):
    model = gl.googlenet(
        stem="compact", width=0.25, num_classes=16, norm=None, init="xavier", seed=1
    )
    batch = PhotoCrops(size=32).train_batch(0, 64, 1)
    torch.manual_seed(1)
    alone = gradient_flow(model, *batch)
    rows = initial[(initial.norm == "none") & (initial.init == "Glorot") & (initial.seed == 1)]
    pd.testing.assert_frame_equal(rows[COLUMNS].reset_index(drop=True), alone)


@pytest.mark.parametrize("key", BOUNDS, ids=", ".join)
def test_what_heads_add_at_conv1_at_initialization(initial, key):
    ratios = total_over_main(initial)
    ratios = ratios[ratios.configuration == ", ".join(key)].ratio
    low, high = BOUNDS[key]
    assert len(ratios) == 2
    assert ratios.between(low, high).all()


def test_total_over_main_by_hand():
    rows = [
        ("conv1.conv", "main", 2.0, "b", 1), ("conv1.conv", "total", 3.0, "b", 1),
        ("conv1.conv", "main", 4.0, "a", 0), ("conv1.conv", "total", 2.0, "a", 0),
        ("conv1.conv", "aux1", 9.0, "a", 0),
        ("fc", "main", 5.0, "b", 1), ("fc", "total", 5.0, "b", 1),
    ]  # fmt: skip
    flow = pd.DataFrame(rows, columns=["module", "source", "gradient_rms", "norm", "seed"])
    ratios = total_over_main(flow.assign(init="x"))
    assert list(ratios.columns) == ["configuration", "seed", "ratio"]
    assert ratios.to_numpy().tolist() == [["b, x", 1, 1.5], ["a, x", 0, 0.5]]
    assert total_over_main(flow.assign(init="x"), "fc").ratio.tolist() == [1.0]


@NORMS
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_random_state_are_as_before(images, norm, fails):
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
        gradient_flow(model, images, targets)
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
