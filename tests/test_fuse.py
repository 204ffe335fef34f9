"""A fused network is the network it was made of: that one, in float64, is the oracle."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gnetlab as gl
from gnetlab.net.fuse import FastResponseNorm, FusedInception, Parallel, fuse

NETWORKS = {
    "paper": {},
    "torchvision": {"transform_input": True},
    "cifar": {"in_channels": 1},
    "naive": {"norm": "batch"},
    "paper, batch norm, separable": {"norm": "batch", "stem": "separable"},
    "paper, inception stem": {"stem": "inception"},
    "paper, no norm, 3x3, compact": {"norm": None, "branch5x5": "3x3", "stem": "compact"},
}


def randomized(model):
    """Everything random, biases and batch norm's statistics too: none can be forgotten unseen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def ours(name="torchvision", **options):
    changes = NETWORKS.get(name, {})
    preset = name.split(",")[0]
    model = gl.googlenet(preset, width=0.25, num_classes=20, seed=0, **(changes | options))
    return randomized(model)


def images(model, count=2, side=64, **options):
    channels = next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, side, side, generator=generator).to(**options)


@torch.inference_mode()
def logits(model, x):
    """Of a copy in eval mode and in double."""
    return copy.deepcopy(model).double().eval()(x.double())


def error(found, expected):
    assert found.shape == expected.shape
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_equal(name, merge):
    model = ours(name)
    x = images(model)
    expected = logits(model, x)
    assert expected.std(dim=0).mean() > 1e-2  # the logits depend on the image
    fused = fuse(model, merge=merge)
    assert error(fused(x), expected) < 1e-5
    assert error(fuse(model.double(), merge=merge)(x.double()), expected) < 1e-12


@pytest.mark.parametrize("options", [{}, {"channels_last": False}, {"merge": False}])
@pytest.mark.parametrize("transform_input", [True, False])
def test_outputs_equal_torchvision(torchvision_googlenet, transform_input, options):
    model = torchvision_googlenet(transform_input=transform_input)
    nn.init.normal_(model.fc.bias)
    x = images(model)
    expected = logits(model, x)
    assert error(fuse(model, **options)(x), expected) < 1e-5
    assert error(fuse(model.double(), **options)(x.double()), expected) < 1e-6


def test_stages_keep_their_names(torchvision_googlenet):
    stages = [
        "conv1", "pool1", "conv2_reduce", "conv2", "pool2", "inception3a", "inception3b", "pool3",
        "inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "pool4",
        "inception5a", "inception5b", "avgpool", "flatten", "fc",
    ]  # fmt: skip
    for model in (torchvision_googlenet(), torchvision_googlenet(aux_logits=False)):
        assert [name for name, _ in fuse(model).named_children()] == stages
    fused = fuse(ours("torchvision"))
    assert [name for name, _ in fused.named_children()] == ["input_transform", *stages]
    parts = ["reduce", "branch3x3", "branch5x5", "branch_pool"]
    assert [name for name, _ in fused.inception3a.named_children()] == parts
    apart = fuse(ours("torchvision"), merge=False).inception3a
    assert [name for name, _ in apart.named_children()] == ["branch1x1", *parts[1:]]
    assert [name for name, _ in apart.branch3x3.named_children()] == ["reduce", "conv"]


def test_what_is_left(torchvision_googlenet):
    for model in (ours("paper", norm="batch"), torchvision_googlenet()):
        fused = fuse(model)
        kinds = [type(module) for module in fused.modules()]
        assert kinds.count(FusedInception) == 9
        assert kinds.count(nn.Conv2d) == 57 - 2 * 9
        assert not {nn.BatchNorm2d, nn.Dropout} & set(kinds)
        assert all(m.inplace for m in fused.modules() if isinstance(m, nn.ReLU))
        assert not any(module.training for module in fused.modules())
        assert not any(p.requires_grad for p in fused.parameters())
    assert [type(m) for m in fuse(ours("naive")).modules()].count(Parallel) == 9


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_stay(name):
    model = ours(name, aux=False)
    size = images(model).shape[1:]
    macs = [gl.layer_costs(m, input_size=size).macs.sum() for m in (model, fuse(model))]
    assert macs[0] == macs[1] > 0


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_is(training):
    model = ours("torchvision", norm="batch").train(training)
    model.inception3a.branch1x1.bn.eval()
    calls = []
    model.pool1.register_forward_hook(lambda *_: calls.append("pool1"))
    model.conv1.conv.register_forward_hook(lambda *_: calls.append("conv1"))
    before = copy.deepcopy(model)
    random_state = torch.get_rng_state()
    fused = fuse(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    fused(images(model))
    assert calls == []
    for tensor in fused.state_dict().values():
        tensor.zero_()
    after = dict(model.named_modules())
    for name, module in before.named_modules():
        assert after[name].training == module.training, name
    for (name, tensor), old in zip(
        model.state_dict().items(), before.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, old), name
        assert tensor.stride() == old.stride(), name
    assert all(p.requires_grad for p in model.parameters())
    model.eval()(images(model))
    assert calls == ["conv1", "pool1"]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", ["paper", "cifar", "paper, batch norm, separable"])
def test_any_memory_format_of_the_input(name, channels_last):
    model = ours(name)
    fused = fuse(model, channels_last=channels_last)
    x = images(model)
    expected, seen = logits(model, x), []
    for module in fused.modules():
        if isinstance(module, nn.Conv2d | nn.MaxPool2d | FastResponseNorm):
            module.register_forward_hook(lambda _, __, y: seen.append(y))
    for given in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
        kept = given.clone()
        assert error(fused(given), expected) < 1e-5
        assert torch.equal(given, kept)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last or given is x:  # contiguous weights follow the format of the input
            assert len(seen) > 45
            assert all(y.is_contiguous(memory_format=layout) for y in seen)
        seen.clear()


def test_bfloat16():
    model = ours("torchvision")
    x = images(model)
    found = fuse(model).to(torch.bfloat16)(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert error(found, logits(model, x)) < 0.05


def test_a_half_precision_model_is_folded_in_double():
    model = ours("torchvision").to(torch.bfloat16)
    conv, norm = model.conv1.conv, model.conv1.bn
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    expected = conv.weight.double() * scale.view(-1, 1, 1, 1)
    assert torch.equal(fuse(model).conv1.conv.weight, expected.bfloat16())


def test_a_model_without_memory_is_fused():
    with torch.device("meta"):
        model = gl.googlenet("torchvision", width=0.1)
    assert all(p.is_meta for p in fuse(model).parameters())


def test_gradients_reach_the_input():
    model = ours("paper").eval()
    x = images(model).requires_grad_()
    (wanted,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    (found,) = torch.autograd.grad(fuse(model)(x)[:, 0].sum(), x)
    assert error(found, wanted.double()) < 1e-4


@pytest.mark.parametrize("size", [1, 2, 4, 5])
def test_response_norm(size):
    x = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(0)).double() * 5
    expected = F.local_response_norm(x, size, alpha=0.3, beta=0.6, k=2.0)
    torch.testing.assert_close(FastResponseNorm(size, alpha=0.3, beta=0.6, k=2.0)(x), expected)


def test_it_can_be_traced_whole():
    """As torch.compile does it, without waiting for code to be generated."""
    torch.compiler.reset()  # what other tests compiled counts towards a limit
    model = ours("paper")
    x = images(model)
    compiled = torch.compile(fuse(model), backend="eager", fullgraph=True)
    assert error(compiled(x), logits(model, x)) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [True, False])
def test_on_cuda(channels_last):
    model = ours("torchvision")
    x = images(model)
    fused = fuse(model.cuda(), channels_last=channels_last)
    assert error(fused(x.cuda()).cpu(), logits(model.cpu(), x)) < 1e-2  # TF32 may be on


class Subclass(type(ours())):
    pass


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1)),
        lambda: nn.Sequential(ours()),
        lambda: fuse(ours()),
        lambda: Subclass(ours().architecture),
        lambda: torch.compile(ours(), backend="eager"),
    ],
)
def test_another_network_is_an_error(build):
    with pytest.raises(ValueError, match=r"fuse\(\) was given a \S+; it knows gnetlab's"):
        fuse(build())


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("conv1", nn.Identity()),
        ("conv1.bn", nn.GroupNorm(4, 16)),
        ("conv1.bn", nn.BatchNorm2d(16, track_running_stats=False)),
        ("conv2.relu", nn.GELU()),
        ("inception3a", nn.Identity()),
        ("inception3a.branch3x3", nn.Identity()),
        ("inception3a.branch3x3.reduce.relu", nn.GELU()),
        ("inception3a.branch3x3.reduce.conv", nn.Conv2d(48, 24, 3, padding=1)),
        ("inception3a.branch_pool.proj.relu", nn.Sigmoid()),
        ("inception4b.branch5x5.more", nn.Identity()),
        ("more", nn.Identity()),
    ],
)
def test_a_replaced_part_is_an_error(where, part):
    model = ours()
    parent, _, name = where.rpartition(".")
    model.get_submodule(parent).add_module(name, part)
    with pytest.raises(ValueError, match=r"which fuse\(\) does not know"):
        fuse(model)


def test_grouped_convolutions_of_one_input_are_not_merged():
    # Side by side they would fit, and each group read the channels of another.
    model = ours()
    branches = model.inception3a
    for unit in (branches.branch1x1, branches.branch3x3[0], branches.branch5x5[0]):
        inputs, outputs = unit.conv.in_channels, unit.conv.out_channels
        unit.conv = nn.Conv2d(inputs, outputs, 1, groups=2)
    with pytest.raises(ValueError, match=r"which fuse\(\) does not know"):
        fuse(model)
    x = images(model)
    assert error(fuse(model, merge=False)(x), logits(model, x)) < 1e-5


def test_another_classifier_is_kept():
    model = ours()
    model.fc = nn.Sequential(nn.Dropout(), nn.Linear(256, 3))
    x = images(model)
    assert error(fuse(model)(x), logits(model, x)) < 1e-5
