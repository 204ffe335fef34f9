import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.net.architecture import MODULES, PRESETS, TABLE_1, Architecture
from gnetlab.net.model import (
    BRANCHES,
    AuxiliaryHead,
    ConvUnit,
    GoogLeNet,
    GoogLeNetOutput,
    HeadPool,
    Inception,
    InputTransform,
    LocalResponseNorm,
    SeparableUnit,
    branch_names,
    googlenet,
    initialize,
)
from gnetlab.net.weights import fill, from_torchvision

STEMS = ("paper", "separable", "cifar", "compact")
EVERY_MODULE_PLAN = [
    ("paper", {}),
    ("paper", {"stem": "separable", "norm": "batch"}),
    ("paper", {"stem": "compact", "norm": None}),
    ("torchvision", {"transform_input": True}),
    ("cifar", {}),
    ("naive", {}),
]


def images(side=64, *, count=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, side, side, generator=generator)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def on_meta(preset, **options):
    """A network without storage, for counting."""
    with torch.device("meta"):
        return googlenet(preset, **options)


def outputs_by_name(model, x):
    """One forward pass: every module's output, by name; the network itself is ''."""
    outputs = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return outputs


def assert_same(actual, expected, tolerance=1e-5):
    scale = expected.abs().max().item()
    assert 0.1 < scale < 1000, "an output of this size would prove nothing"
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


# --- the presets against oracles -----------------------------------------------------------


@pytest.mark.parametrize("transform_input", [False, True])
@pytest.mark.parametrize(("route", "shape"), [("fill", (2, 3, 99, 80)), ("file", (1, 3, 224, 224))])
def test_torchvision_preset_equals_torchvision(
    torchvision_googlenet, tmp_path, route, shape, transform_input
):
    theirs = torchvision_googlenet(aux_logits=True, transform_input=transform_input)
    options = {
        "num_classes": 20, "transform_input": transform_input, "aux": True,
        "dropout": 0.0, "head_dropout": 0.0,
    }  # fmt: skip
    if route == "fill":
        ours = googlenet("torchvision", **options)
        fill(ours, from_torchvision(theirs.state_dict()), "torchvision")
    else:
        torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
        ours = googlenet("torchvision", weights=tmp_path / "theirs.pth", **options)

    # 99 x 80 makes every ceil-mode pool matter, 224 x 224 the heads' pool; in double precision
    # nothing but the networks can differ.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = ours.double(), theirs.double()
    with torch.no_grad():
        assert_same(ours.eval()(x), theirs.eval()(x))
        got, expected = ours.train()(x), theirs.train()(x)
    assert_same(got.logits, expected.logits)
    assert_same(got.aux1, expected.aux_logits1)
    assert_same(got.aux2, expected.aux_logits2)
    updated = from_torchvision(theirs.state_dict())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, updated[name], rtol=1e-5, atol=1e-5, msg=name)


def test_torchvision_preset_fields_agree_with_torchvision_where_outputs_cannot_tell():
    from torchvision.models import googlenet as theirs

    with torch.device("meta"):
        model = theirs(weights=None, init_weights=False)
    ours = on_meta("torchvision", aux=True)
    assert ours.dropout.p == model.dropout.p
    assert ours.aux1.dropout.p == model.aux1.dropout.p
    assert ours.conv1.bn.momentum == model.conv1.bn.momentum
    assert [p.shape for p in ours.fc.parameters()] == [p.shape for p in model.fc.parameters()]


def reference_paper(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Table 1 and Caffe's BVLC prototxt, in plain functions over a state dict."""

    def conv(name, x, stride=1):
        weight, bias = state[f"{name}.conv.weight"], state[f"{name}.conv.bias"]
        return F.relu(F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2))

    def pool(x):
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    def lrn(x):
        window = F.pad(x**2, (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (1 + 1e-4 / 5 * window) ** 0.75

    def inception(name, x):
        return torch.cat([
            conv(f"{name}.branch1x1", x),
            conv(f"{name}.branch3x3.conv", conv(f"{name}.branch3x3.reduce", x)),
            conv(f"{name}.branch5x5.conv", conv(f"{name}.branch5x5.reduce", x)),
            conv(f"{name}.branch_pool.proj", F.max_pool2d(x, 3, 1, 1)),
        ], 1)  # fmt: skip

    def head(name, x):
        x = conv(f"{name}.conv", F.avg_pool2d(x, 5, 3)).flatten(1)
        x = F.relu(F.linear(x, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
        return F.linear(x, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])

    x = lrn(pool(conv("conv1", x, 2)))
    x = pool(lrn(conv("conv2", conv("conv2_reduce", x))))
    heads = {}
    for stage in MODULES:
        if stage in ("4a", "5a"):
            x = pool(x)
        x = inception(f"inception{stage}", x)
        if stage in ("4a", "4d"):
            name = "aux1" if stage == "4a" else "aux2"
            heads[name] = head(name, x)
    logits = F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])
    return GoogLeNetOutput(logits, **heads)


def test_paper_preset_equals_the_paper_written_in_plain_functions():
    options = {"dropout": 0.0, "head_dropout": 0.0, "num_classes": 20, "width": 0.25}
    model = googlenet("paper", init="kaiming", seed=0, **options)
    for name, parameter in model.named_parameters():  # biases and normalisation must matter
        if name.endswith("bias"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    x = images(224, count=1) * 60
    with torch.no_grad():
        got, expected = model(x), reference_paper(model.state_dict(), x)
        assert_same(model.eval()(x), expected.logits)
    for name in GoogLeNetOutput._fields:
        assert_same(getattr(got, name), getattr(expected, name))


def naive_by_hand(heads):
    """Figure 2(a): weights and biases of every layer; the pool branch passes all its channels."""
    total = (49 * 3 * 64 + 64) + (64 * 64 + 64) + (9 * 64 * 192 + 192)
    inputs = 192
    for stage, w in MODULES.items():
        total += inputs * w.conv1x1 + 9 * inputs * w.conv3x3 + 25 * inputs * w.conv5x5
        total += w.conv1x1 + w.conv3x3 + w.conv5x5
        inputs += w.conv1x1 + w.conv3x3 + w.conv5x5
        if heads and stage in ("4a", "4d"):
            total += (inputs * 128 + 128) + (2048 * 1024 + 1024) + (1024 * 1000 + 1000)
    return total + inputs * 1000 + 1000


@pytest.mark.parametrize(
    ("preset", "aux", "expected"),
    [
        ("paper", False, 6_998_552),
        ("paper", True, 13_378_280),
        ("torchvision", False, 6_624_904),
        ("torchvision", True, 13_004_888),
        ("cifar", None, 6_166_250),
        ("naive", False, naive_by_hand(heads=False)),
        ("naive", True, naive_by_hand(heads=True)),
    ],
)
def test_parameter_count(preset, aux, expected):
    assert parameters(on_meta(preset, aux=aux)) == expected


def test_naive_widths_grow_by_the_pool_branch():
    model = on_meta("naive", aux=False)
    widths = [model.get_submodule(f"inception{stage}").out_channels for stage in MODULES]
    assert widths == [416, 832, 1280, 1728, 2176, 2640, 3344, 4048, 4944]
    assert model.fc.in_features == 4944
    assert not any(
        "reduce" in name or "proj" in name for name, _ in model.inception3a.named_modules()
    )


def test_separable_stem_is_the_one_that_fits_table_1():
    model = on_meta("paper", stem="separable", aux=False)
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 6_983_576
    assert isinstance(model.conv1, SeparableUnit)
    assert sum(p.numel() for p in model.conv1.parameters() if p.dim() > 1) == 2712
    assert (model.conv1.depthwise.groups, model.conv1.depthwise.stride) == (3, (2, 2))


@pytest.mark.parametrize("preset", ["paper", "torchvision"])
def test_spatial_sizes_at_224_are_table_1s(preset):
    outputs = outputs_by_name(googlenet(preset, width=0.1).eval(), images(224, count=1))
    sides = {name: tuple(out.shape[2:]) for name, out in outputs.items() if out.dim() == 4}
    for row in TABLE_1:
        module = f"inception{row.stage}" if row.stage in MODULES else row.stage
        if module != "linear":
            assert sides[module] == (row.size, row.size), module
    for pool, side in {"pool1": 56, "pool2": 28, "pool3": 14, "pool4": 7, "avgpool": 1}.items():
        assert sides[pool] == (side, side), pool


def test_paper_normalizes_with_lrn_after_pool1_and_conv2_only():
    model = on_meta("paper")
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.LocalResponseNorm)}
    assert list(found) == ["lrn1", "lrn2"]
    for lrn in found.values():
        assert (lrn.size, lrn.alpha, lrn.beta, lrn.k) == (5, 1e-4, 0.75, 1.0)
    steps = [name for name, _ in model.named_children()]
    assert steps[:7] == ["conv1", "pool1", "lrn1", "conv2_reduce", "conv2", "lrn2", "pool2"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lrn_takes_half_precision_on_a_cpu_and_is_pytorchs_in_float32(dtype):
    lrn, theirs = (kind(5, 1e-4, 0.75, 1.0) for kind in (LocalResponseNorm, nn.LocalResponseNorm))
    x = torch.full((1, 9, 2, 2), 300.0)  # whose square is no float16
    assert torch.equal(lrn(x), theirs(x))
    assert torch.equal(lrn(x.to(dtype)), theirs(x.to(dtype).float()).to(dtype))
    x = torch.rand(1, 9, 2, 2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lrn(x), theirs(x))


@pytest.mark.parametrize(("norm", "expected"), [("batch", 57), ("lrn", 0), (None, 0)])
def test_batch_norm_follows_every_convolution_or_none(norm, expected):
    model = on_meta("paper", norm=norm, aux=False)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == expected
    assert sum(isinstance(m, nn.LocalResponseNorm) for m in model.modules()) == 2 * (norm == "lrn")
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(biases) == 57
    assert all((bias is None) == (norm == "batch") for bias in biases)


@pytest.mark.parametrize(
    ("branch5x5", "kernels"), [("5x5", [1, 5]), ("3x3", [1, 3]), ("3x3+3x3", [1, 3, 3])]
)
def test_branch5x5_kernels(branch5x5, kernels):
    model = on_meta("paper", branch5x5=branch5x5)
    convs = [m for m in model.inception4c.branch5x5.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(k, k) for k in kernels]
    assert [conv.out_channels for conv in convs] == [24, *[64] * (len(kernels) - 1)]


# --- heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "after", "inputs"), [("aux1", "inception4a", 512), ("aux2", "inception4d", 528)]
)
def test_head_sees_the_output_of_its_module(head, after, inputs):
    assert on_meta("paper").get_submodule(head).conv.conv.in_channels == inputs
    model, seen = googlenet("paper", width=0.1), {}
    model.get_submodule(after).register_forward_hook(lambda _m, _i, out: seen.update(out=out))
    model.get_submodule(head).register_forward_pre_hook(lambda _m, x: seen.update(head=x[0]))
    model(images())
    assert seen["head"] is seen["out"]


def test_head_has_the_papers_layers():
    head = AuxiliaryHead(Architecture(), 512)
    assert (head.conv.conv.kernel_size, head.conv.conv.out_channels) == ((1, 1), 128)
    assert (head.fc1.in_features, head.fc1.out_features) == (128 * 4 * 4, 1024)
    assert (head.fc2.in_features, head.fc2.out_features) == (1024, 1000)
    assert head.dropout.p == 0.7
    assert head.pool.kind == "5x5/3"


def test_head_pool_is_the_papers_5x5_3_at_14_and_adaptive_only_where_told():
    x = images(14, channels=8)
    papers = F.avg_pool2d(x, 5, 3)
    assert papers.shape[2:] == (4, 4)
    assert torch.equal(HeadPool("5x5/3")(x), papers)
    adaptive = HeadPool("adaptive")(x)
    assert torch.equal(adaptive, F.adaptive_avg_pool2d(x, 4))
    assert not torch.allclose(adaptive, papers)


@pytest.mark.parametrize("kind", ["5x5/3", "adaptive"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (13, 14), (16, 16), (17, 17), (14, 30)])
def test_head_pool_gives_4_by_4_from_any_size(kind, shape):
    pooled = HeadPool(kind)(torch.ones(1, 2, *shape))
    assert pooled.shape == (1, 2, 4, 4)
    torch.testing.assert_close(pooled, torch.ones_like(pooled))  # an average, without padding


@pytest.mark.parametrize(
    ("aux", "heads"),
    [
        (None, {"aux1", "aux2"}),
        (True, {"aux1", "aux2"}),
        ("aux1", {"aux1"}),
        (["aux2"], {"aux2"}),
        (("aux2", "aux1"), {"aux1", "aux2"}),
    ],
)
def test_training_gives_outputs_by_name_and_absent_heads_are_none(aux, heads):
    model = googlenet("paper", aux=aux, width=0.1, num_classes=7)
    out = model(images())
    assert isinstance(out, GoogLeNetOutput)
    assert out._fields == ("logits", "aux1", "aux2")
    assert out.logits.shape == (2, 7)
    for head in ("aux1", "aux2"):
        value = getattr(out, head)
        assert value.shape == (2, 7) if head in heads else value is None
    assert {name for name, _ in model.named_children() if name.startswith("aux")} == heads


def test_eval_gives_a_tensor_and_leaves_the_heads_alone():
    model = googlenet("paper", width=0.1, num_classes=7).eval()
    outputs = outputs_by_name(model, images())
    assert isinstance(outputs[""], Tensor)
    assert outputs[""].shape == (2, 7)
    assert not any(name.startswith("aux") for name in outputs)


@pytest.mark.parametrize(("preset", "aux"), [("paper", False), ("paper", ()), ("cifar", None)])
def test_training_without_heads_gives_a_tensor(preset, aux):
    model = googlenet(preset, aux=aux, width=0.1, num_classes=7)
    assert isinstance(model(images()), Tensor)


def test_unknown_head():
    with pytest.raises(ValueError, match="'aux3' asked; choose one of 'aux1', 'aux2'"):
        googlenet(aux="aux3")


# --- every step is a module -------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "changes"), EVERY_MODULE_PLAN)
def test_every_module_runs_exactly_once(preset, changes):
    model, runs = googlenet(preset, aux=True, width=0.1, **changes), {}
    for name, module in model.named_modules():
        runs[name] = 0
        module.register_forward_hook(lambda _m, _i, _o, n=name: runs.update({n: runs[n] + 1}))
    model(images())
    assert runs == dict.fromkeys(runs, 1)


@pytest.mark.parametrize(("preset", "changes"), EVERY_MODULE_PLAN)
def test_nothing_is_in_place(preset, changes):
    model = googlenet(preset, aux=True, width=0.1, **changes)
    assert {m.inplace for m in model.modules() if hasattr(m, "inplace")} == {False}
    x = images()
    seen, kept = {"input": x}, {"input": x.clone()}

    def keep(name, out):
        if isinstance(out, Tensor):
            seen[name], kept[name] = out, out.clone()

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _i, out, n=name: keep(n, out))
    with torch.no_grad():
        model(x)
    assert [name for name in seen if not torch.equal(seen[name], kept[name])] == []


@pytest.mark.parametrize(("preset", "changes"), EVERY_MODULE_PLAN)
def test_every_unit_ends_in_a_relu_module(preset, changes):
    model = googlenet(preset, aux=True, width=0.1, **changes)
    outputs = outputs_by_name(model, images())
    units = {n: m for n, m in model.named_modules() if isinstance(m, ConvUnit | SeparableUnit)}
    assert len(units) >= 30
    for name, unit in units.items():
        before, last = list(unit)[-2:]
        assert isinstance(last, nn.ReLU)
        before = next(n for n, m in model.named_modules() if m is before)
        assert torch.equal(outputs[name], outputs[before].clamp(min=0))


def test_extra_modules_are_copies_of_4c_between_the_heads():
    plain, deep = (googlenet(width=0.125, extra_modules=extra) for extra in (0, 2))
    added = ["inception4c_2", "inception4c_3"]
    names = [name for name, _ in deep.named_children()]
    assert [name for name in names if name not in added] == [n for n, _ in plain.named_children()]
    assert names[names.index("inception4c") + 1 :][:3] == [*added, "inception4d"]
    shapes = [p.shape for p in deep.inception4c.parameters()]
    for name in added:
        assert [p.shape for p in deep.get_submodule(name).parameters()] == shapes
    outputs = outputs_by_name(deep, images())
    assert outputs["inception4c_3"].shape == outputs["inception4c"].shape


@pytest.mark.parametrize("reduce", [True, False])
def test_branch_slices_say_where_each_branch_lies(reduce):
    model = googlenet("paper", reduce=reduce, width=0.1).eval()
    outputs = outputs_by_name(model, images())
    for name, module in model.named_modules():
        if isinstance(module, Inception):
            assert tuple(module.branch_slices) == BRANCHES
            assert outputs[name].shape[1] == module.out_channels
            assert module.branch_slices["branch_pool"].stop == module.out_channels
            for branch, where in module.branch_slices.items():
                assert torch.equal(outputs[name][:, where], outputs[f"{name}.{branch}"])


def test_branch_names_are_all_branches_in_forward_order():
    model = googlenet("paper", width=0.1).eval()
    expected = [f"inception{s}.{b}" for s, b in itertools.product(MODULES, BRANCHES)]
    assert branch_names(model) == expected
    ran = list(outputs_by_name(model, images()))
    assert [name for name in ran if name in expected] == expected


def test_input_transform_goes_from_imagenets_to_inceptions_normalisation():
    raw = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    torch.testing.assert_close(InputTransform()((raw - mean) / deviation), (raw - 0.5) / 0.5)


# --- what can be fed to it --------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "stem"), list(itertools.product(PRESETS, STEMS)))
def test_smallest_input_is_exact(preset, stem, monkeypatch):
    model = googlenet(preset, stem=stem, width=0.1, aux=False, num_classes=5).eval()
    smallest = model.architecture.smallest_input
    with torch.no_grad():
        assert model(torch.zeros(1, 3, smallest, smallest)).shape == (1, 5)
        assert model(torch.zeros(1, 3, smallest + 9, smallest)).shape == (1, 5)
        for shape in ((smallest - 1, smallest - 1), (smallest + 9, smallest - 1)):
            too_small = torch.zeros(1, 3, *shape)
            with pytest.raises(ValueError, match=f"smallest.* {smallest} x {smallest}"):
                model(too_small)
        # The check refuses nothing that the pools could reduce.
        monkeypatch.setattr(GoogLeNet, "_check_input", lambda *_: None)
        with pytest.raises(RuntimeError, match="too small"):
            model(too_small)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (3, 64, 64), (64, 64), (1, 4, 64, 64)])
def test_wrong_shape_is_named_beside_the_right_one(shape):
    model = googlenet(width=0.1)
    with pytest.raises(ValueError, match="this network takes N x 3 x H x W") as caught:
        model(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_other_channel_counts():
    model = googlenet("cifar", in_channels=1, width=0.1).eval()
    assert model(images(32, channels=1)).shape == (2, 10)
    with pytest.raises(ValueError, match="takes N x 1 x H x W"):
        model(images(32))


# --- building ---------------------------------------------------------------------------------


def test_googlenet_passes_on_what_it_is_asked():
    asked = {"aux": "aux2", "num_classes": 7, "width": 0.1, "norm": "batch", "stem": "compact"}
    model = googlenet("paper", **asked)
    assert model.architecture == PRESETS["paper"].change(
        heads=("aux2",), num_classes=7, width=0.1, norm="batch", stem="compact"
    )
    assert model.training
    assert model.weights_note == "random weights"


def test_unknown_change_reaches_the_reader():
    with pytest.raises(ValueError, match="Did you mean 'branch5x5'"):
        googlenet(branch5x="3x3")


FAN_IN, FAN_OUT = 64 * 9, 128 * 9


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("torchvision", 0.01),
        ("xavier", (2 / (FAN_IN + FAN_OUT)) ** 0.5),
        ("kaiming", (2 / FAN_IN) ** 0.5),
        (("gain", 1.0), (2 / FAN_IN) ** 0.5),
        (("gain", 0.25), 0.25 * (2 / FAN_IN) ** 0.5),
        ("caffe", (1 / FAN_IN) ** 0.5),
    ],
)
def test_initialize_draws_the_documented_deviation(init, expected):
    conv = nn.Conv2d(64, 128, 3)
    linear = nn.Linear(64 * 9, 128 * 9)  # the same fans
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        initialize(nn.Sequential(conv, linear), init)
    for layer in (conv, linear):
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(layer.weight.mean().item()) < 0.02 * expected
        assert (layer.bias == (0.2 if init == "caffe" else 0.0)).all()


def test_caffes_xavier_is_uniform_and_leaves_the_classifiers_biases_at_zero():
    model = googlenet("paper", init="caffe", seed=0, width=0.25)
    weight, bound = model.conv2.conv.weight, (3 / (16 * 9)) ** 0.5
    assert 0.98 * bound < weight.abs().max() <= bound
    for name, bias in {"fc": 0, "aux1.fc1": 0.2, "aux1.fc2": 0, "aux2.fc1": 0.2}.items():
        assert (model.get_submodule(name).bias == bias).all(), name
    assert (model.inception4e.branch5x5.reduce.conv.bias == 0.2).all()


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_the_gaussian_has_the_same_gain_at_every_width(width):
    model = googlenet("paper", init="gaussian", seed=0, width=width)
    weight = model.inception4e.branch3x3.conv.conv.weight
    gain = float(weight.detach().std()) * (weight[0].numel() / 2) ** 0.5
    assert gain == pytest.approx(0.01 * (160 * 9 / 2) ** 0.5, rel=0.02)
    assert not model.fc.bias.any()


def test_init_none_keeps_pytorchs_own():
    layer = nn.Linear(8, 8)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    initialize(layer, None)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_googlenet_initializes_the_whole_network():
    model = googlenet("paper", init=("gain", 0.5), seed=0, width=0.25)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.numel() > 20_000:
            expected = 0.5 * (2 / layer.weight[0].numel()) ** 0.5
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize("init", ["he", "gain", ("xavier", 2.0), ("he", 1.0), 3])
def test_bad_init_says_what_there_is(init):
    with pytest.raises(ValueError, match=r"choose 'torchvision', .*'kaiming' or") as caught:
        googlenet("cifar", width=0.1, init=init)
    assert repr(init) in str(caught.value)


@pytest.mark.parametrize("init", [None, "kaiming", "torchvision"])
def test_seed_is_reproducible_and_leaves_the_global_random_state_untouched(init):
    before = torch.get_rng_state()
    first, again, other = (
        googlenet("cifar", width=0.1, init=init, seed=seed).state_dict() for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = [name for name in first if name.endswith("conv.weight")]
    assert len(weights) > 50
    assert not any(torch.equal(first[name], other[name]) for name in weights)


def test_without_a_seed_every_network_differs():
    first, second = googlenet("cifar", width=0.1), googlenet("cifar", width=0.1)
    assert not torch.equal(first.fc.weight, second.fc.weight)


@pytest.mark.parametrize("init", [None, "kaiming"])
@pytest.mark.parametrize("aux", [True, "aux1", "aux2"])
def test_trunk_weights_are_the_same_with_and_without_heads(init, aux):
    plain = googlenet("paper", aux=False, width=0.1, init=init, seed=5).state_dict()
    headed = googlenet("paper", aux=aux, width=0.1, init=init, seed=5).state_dict()
    assert headed.keys() > plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], headed[name])] == []


def test_incomplete_gain_is_refused():
    with pytest.raises(ValueError, match="choose 'torchvision'"):
        googlenet(init=("gain",), width=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (images(32).double(), "images of torch.float64 .* takes torch.float32"),
        ((images(32) * 255).byte(), "images of torch.uint8 .* gnetlab.net.data.normalize"),
        (images(32).to("meta"), r"images on meta .* network is on cpu; .* images.to\('cpu'\)"),
        (images(32, channels=1), "in_channels=1"),
        (images(32).numpy(), "a ndarray was given; .* torch.from_numpy"),
        ((images(32), torch.zeros(2)), "a tuple was given; .* without labels"),
    ],
)
def test_images_that_do_not_fit_are_refused_with_what_to_do(given, message):
    with pytest.raises(ValueError, match=message):
        googlenet("cifar", width=0.1).eval()(given)


def test_autocast_makes_other_floats_fit():
    model = googlenet("cifar", width=0.1).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images(32).bfloat16()).dtype == torch.bfloat16


def test_on_tensors_without_values_other_types_are_refused_too():
    with torch.device("meta"):
        model = googlenet("cifar", width=0.1).eval()
    with pytest.raises(ValueError, match=r"images of torch.float64 .* takes torch.float32"):
        model(images(32).to("meta", torch.float64))


def test_a_replica_of_data_parallel_runs_without_parameters():
    model = googlenet("cifar", width=0.1, seed=0).eval()
    expected = model(images(32))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, parameter.detach())
    assert torch.equal(model(images(32)), expected)


def test_gaussian_initialization_asks_for_a_network_of_ours():
    with pytest.raises(ValueError, match=r"'gaussian' asked for a Linear, .* 'kaiming'"):
        initialize(nn.Linear(2, 2), "gaussian")


def test_a_width_of_1_is_a_width():
    half = PRESETS["paper"].change(width=0.5)
    assert googlenet(half, width=1.0).architecture.width == 1.0
    assert googlenet(half).architecture.width == 0.5
