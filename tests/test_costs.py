"""Every count by a second route: torch's FlopCounterMode, fvcore, autograd, or by hand."""

import functools
import math
import warnings

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gnetlab as gl
from gnetlab.measure.costs import (
    classifier_metadata,
    depth,
    layer_costs,
    locate,
    reduction_costs,
    second_opinions,
    table_1,
)

COLUMNS = [
    "module", "stage", "branch", "kind", "output_shape", "parameters", "macs", "activations",
]  # fmt: skip

OURS = {
    "paper": lambda: gl.googlenet("paper"),
    "separable": lambda: gl.googlenet("paper", stem="separable"),
    "torchvision": lambda: gl.googlenet("torchvision"),
    "cifar": lambda: gl.googlenet("cifar"),
    "naive": lambda: gl.googlenet("naive"),
}
THEIRS = [
    "googlenet", "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn",
    "alexnet", "resnet50", "inception_v3", "mobilenet_v2",
]  # fmt: skip
SIDES = {"cifar": 32, "inception_v3": 299}  # pixels; the others 224
# Known exactly, from the literature of the reference and torchvision's own metadata.
MACS = {
    "paper": 1_582_671_872,
    "separable": 1_498_677_248,
    "torchvision": 1_498_376_192,
    "googlenet": 1_498_376_192,
    "cifar": 1_521_756_160,
    "vgg11": 7_609_090_048,
    "vgg13": 11_308_466_176,
    "vgg16": 15_470_264_320,
    "vgg19": 19_632_062_464,
    "alexnet": 714_188_480,
    "resnet50": 4_089_184_256,
    "inception_v3": 5_713_216_096,
    "mobilenet_v2": 300_774_272,
}
PARAMETERS = {
    "paper": 6_998_552,
    "separable": 6_983_576 + 8_280,  # weights and biases
    "torchvision": 6_624_904,
    "googlenet": 6_624_904,
    "cifar": 6_166_250,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "alexnet": 61_100_840,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
}
NETWORKS = pytest.mark.parametrize("name", [*OURS, *THEIRS])


def build(name):
    """A network on the meta device, in eval mode."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces a new initialization
        if name in OURS:
            return OURS[name]().eval()
        import torchvision.models

        slow = name in ("googlenet", "inception_v3")
        options = {"init_weights": False} if slow else {}
        return getattr(torchvision.models, name)(**options).eval()


@functools.cache
def costs_of(name):
    side = SIDES.get(name, 224)
    return layer_costs(build(name), (3, side, side))


def counted_by_torch(model, *shape):
    """MACs by FlopCounterMode, in total and by module (without the class's name in front)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    root = type(model).__name__
    by_module = {
        name.removeprefix(root).removeprefix("."): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
    }
    return counter.get_total_flops() // 2, by_module


@NETWORKS
def test_macs_equal_those_of_torchs_counter(name):
    side, costs = SIDES.get(name, 224), costs_of(name)
    total, by_module = counted_by_torch(build(name), 1, 3, side, side)
    assert costs.macs.sum() == total
    counted = costs[costs.macs > 0]
    assert len(counted) > 5
    assert dict(zip(counted.module, counted.macs, strict=True)) == {
        module: by_module[module] for module in counted.module
    }


@NETWORKS
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_macs_equal_those_of_fvcore(name):
    from fvcore.nn import FlopCountAnalysis

    # fvcore really computes, so images are small and the weights are left uninitialized.
    side = {"cifar": 16, "inception_v3": 96}.get(name, 64)
    model = build(name).to_empty(device="cpu")
    analysis = FlopCountAnalysis(model, torch.zeros(1, 3, side, side))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    expected = sum(counts[operator] for operator in ("conv", "linear", "addmm"))
    assert layer_costs(model, (3, side, side)).macs.sum() == expected > 1e6


@pytest.mark.parametrize("name", MACS)
def test_macs_are_exactly_the_known_ones(name):
    assert costs_of(name).macs.sum() == MACS[name]


@pytest.mark.parametrize("name", [n for n in THEIRS if n.endswith("_bn")])
def test_batch_norm_costs_no_macs(name):
    assert costs_of(name).macs.sum() == MACS[name.removesuffix("_bn")]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_exactly_the_known_ones(name):
    assert costs_of(name).parameters.sum() == PARAMETERS[name]


@pytest.mark.parametrize("name", ["paper", "naive", "googlenet", "vgg11_bn", "inception_v3"])
def test_parameters_are_those_that_take_part(name):
    model, side = build(name), SIDES.get(name, 224)
    model(torch.empty(1, 3, side, side, device="meta")).sum().backward()
    used = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert costs_of(name).parameters.sum() == sum(parameter.numel() for parameter in used)
    unused = len(list(model.parameters())) - len(used)
    assert (unused > 0) == (name != "vgg11_bn")  # heads do not run


@pytest.mark.parametrize("name", ["paper", "googlenet", "vgg16"])
def test_frame_is_as_documented(name):
    costs = costs_of(name)
    assert list(costs.columns) == COLUMNS
    assert costs.index.equals(pd.RangeIndex(len(costs)))
    assert {column: str(costs[column].dtype) for column in COLUMNS[5:]} == {
        "parameters": "int64", "macs": "Int64", "activations": "Int64",
    }  # fmt: skip
    assert costs.activations.tolist() == [math.prod(shape) for shape in costs.output_shape]
    assert costs.macs.notna().all()
    modules = dict(build(name).named_modules())
    assert costs.kind.tolist() == [type(modules[module]).__name__ for module in costs.module]


def test_rows_come_in_the_order_of_execution():
    model, ran = build("torchvision"), []
    for module_name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=module_name: ran.append(name))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert costs_of("torchvision").module.tolist() == ran


class Scale(nn.Module):
    """A layer that no formula knows."""

    def __init__(self, inner=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        if inner is not None:
            self.inner = inner

    def forward(self, x):
        x = x * self.scale
        return self.inner(x) if hasattr(self, "inner") else x


def test_an_unknown_layer_is_a_row_that_is_not_counted():
    model = nn.Sequential(Scale(), nn.Conv2d(3, 2, 1), Scale(nn.Conv2d(2, 4, 1)))
    model[2].scale = nn.Parameter(torch.ones(2, 1, 1))
    costs = layer_costs(model, (3, 5, 5)).set_index("module")
    assert costs.macs.isna().to_dict() == {"0": True, "1": False, "2.inner": False, "2": True}
    assert costs.parameters.to_dict() == {"0": 3, "1": 8, "2.inner": 12, "2": 2}
    assert costs.macs.dropna().tolist() == [6 * 25, 8 * 25]
    assert costs.activations["2"] == 100


def test_an_unknown_layer_without_parameters_is_a_row_too():
    class Mystery(nn.Module):
        def forward(self, x):
            return x @ x.mT

    costs = layer_costs(nn.Sequential(Mystery()), (3, 5, 5))
    assert costs.kind.tolist() == ["Mystery"]
    assert costs.macs.isna().all()


def test_an_output_that_is_no_tensor_is_not_counted():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair(3, 3)

        def forward(self, x):
            return self.pair(x)[0]

    costs = layer_costs(First(), (3,))
    assert costs.macs.isna().all()
    assert costs.parameters.tolist() == [12]
    assert costs.output_shape.tolist() == [()]


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before(training):
    model = gl.googlenet("torchvision", width=0.1, num_classes=3, seed=0)
    model.inception3a.eval()
    model.fc.weight.grad = torch.full_like(model.fc.weight, 7)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    places = [p.data_ptr() for p in [*model.parameters(), *model.buffers()]]
    random = torch.get_rng_state()
    layer_costs(model, (3, 64, 64), training=training)
    assert [module.training for module in model.modules()] == modes
    assert [p.data_ptr() for p in [*model.parameters(), *model.buffers()]] == places
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert (model.fc.weight.grad == 7).all()
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_mode_and_hooks_are_restored_after_an_error():
    model = gl.googlenet(width=0.1)
    model.conv1.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="takes N x 3"):
        layer_costs(model, (4, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


class Devices(TorchDispatchMode):
    """Remembers where every operation puts its results."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.seen |= {r.device.type for r in results if isinstance(r, torch.Tensor)}
        return result


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_computed_in_real_memory(training):
    model = gl.googlenet("paper", width=0.1, norm="batch")
    with Devices() as devices:
        layer_costs(model, (3, 64, 64), training=training)
    assert devices.seen == {"meta"}


HEAD_MACS = {"aux1": 512, "aux2": 528}  # input channels; then 128 x 4 x 4, 1024 and 1000


@pytest.mark.parametrize("name", ["torchvision", "googlenet", "paper"])
def test_training_counts_the_heads(name):
    costs = layer_costs(build(name), training=True)
    heads = costs[costs.stage.isin(HEAD_MACS)].groupby("stage")[["macs", "parameters"]].sum()
    for head, channels in HEAD_MACS.items():
        fully_connected = 2048 * 1024 + 1024 * 1000
        assert heads.macs[head] == channels * 128 * 16 + fully_connected
        extra = 2 * 128 if name != "paper" else 128  # batch norm's, or a bias
        assert heads.parameters[head] == channels * 128 + extra + fully_connected + 1024 + 1000
    assert costs.macs.sum() - costs_of(name).macs.sum() == heads.macs.sum() == 8_372_224


@pytest.mark.parametrize(("name", "side"), [("inception_v3", 299), ("torchvision", 15)])
def test_training_counts_where_batch_norm_sees_one_value(name, side):
    model = build(name)  # one image, one pixel: batch norm refuses that in training mode
    costs = layer_costs(model, (3, side, side), training=True)
    total, _ = counted_by_torch(model.train(), 2, 3, side, side)
    assert 2 * costs.macs.sum() == total


def test_a_layer_that_runs_twice_has_two_rows_and_its_parameters_once():
    layer = nn.Conv2d(3, 3, 3, padding=1)
    costs = layer_costs(nn.Sequential(layer, nn.ReLU(), nn.MaxPool2d(2), layer), (3, 8, 8))
    costs = costs[costs.kind == "Conv2d"]
    assert costs.module.nunique() == 1
    assert costs.parameters.tolist() == [3 * 3 * 9 + 3, 0]
    assert costs.macs.tolist() == [81 * 64, 81 * 16]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 5, stride=2, dilation=2), (4, 31)),
        (nn.Conv2d(4, 6, (3, 5), padding=(0, 2), groups=2), (4, 9, 11)),
        (nn.Conv3d(4, 6, 3, bias=False), (4, 5, 6, 7)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 9)),
        (nn.ConvTranspose2d(4, 6, 3), (4, 9, 11)),
        (nn.ConvTranspose2d(4, 6, (2, 3), stride=2, padding=1, output_padding=1), (4, 9, 11)),
        (nn.ConvTranspose2d(4, 6, 3, stride=3, groups=2, dilation=2), (4, 5, 7)),
        (nn.ConvTranspose3d(4, 6, 2, bias=False), (4, 3, 4, 5)),
        (nn.Linear(7, 5), (7,)),
        (nn.Linear(7, 5, bias=False), (3, 2, 7)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_formula_of_a_layer(layer, shape):
    costs = layer_costs(nn.Sequential(layer), shape)
    layer = layer.to("meta")
    total, _ = counted_by_torch(layer, 1, *shape)
    assert costs.macs.tolist() == [total]
    assert costs.output_shape.tolist() == [layer(torch.empty(1, *shape, device="meta")).shape[1:]]
    assert costs.parameters.tolist() == [sum(p.numel() for p in layer.parameters())]


def test_a_single_layer_is_a_model_too():
    assert layer_costs(nn.Linear(3, 2), (3,)).macs.tolist() == [6]


@pytest.mark.parametrize("training", [False, True])
def test_stages_and_branches_equal_those_of_torchvisions_network(training):
    def layers(name):
        costs = layer_costs(build(name), training=training)
        return costs[costs.macs > 0][COLUMNS[1:]].reset_index(drop=True)

    pd.testing.assert_frame_equal(layers("torchvision"), layers("googlenet"))


def test_stages_and_branches():
    costs = costs_of("paper")
    assert costs.stage.drop_duplicates().tolist() == [
        "stem", "3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "head",
    ]  # fmt: skip
    inside = costs[costs.module.str.startswith("inception")]
    assert inside.branch.value_counts().to_dict() == {
        "1x1": 18, "3x3": 36, "5x5": 36, "pool": 27,
    }  # fmt: skip
    assert (costs[~costs.module.str.startswith("inception")].branch == "").all()


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("inception4c.branch5x5.reduce.conv", ("4c", "5x5")),
        ("inception4c.branch3.1.conv", ("4c", "5x5")),
        ("inception5b.branch_pool.proj", ("5b", "pool")),
        ("inception5b.branch4.1.bn", ("5b", "pool")),
        ("inception3a", ("3a", "")),
        ("input_transform", ("stem", "")),
        ("conv2_reduce.conv", ("stem", "")),
        ("lrn2", ("stem", "")),
        ("maxpool2", ("stem", "")),
        ("pool3", ("3b", "")),
        ("maxpool4", ("4e", "")),
        ("aux2.conv.bn", ("aux2", "")),
        ("dropout", ("head", "")),
        ("layer3.0.conv1", ("layer3", "")),
    ],
)
def test_locate(module, place):
    assert locate(module) == place


def test_blocks_of_vgg_end_with_their_pool():
    costs = costs_of("vgg16")
    blocks = costs.groupby("stage", sort=False).kind.agg(list)
    assert blocks.index.tolist() == [*(f"block{i}" for i in range(1, 6)), "head"]
    assert [blocks[f"block{i}"].count("Conv2d") for i in range(1, 6)] == [2, 2, 3, 3, 3]
    assert all(blocks[f"block{i}"][-1] == "MaxPool2d" for i in range(1, 6))
    sides, widths, macs = [224, 112, 56, 28, 14], [3, 64, 128, 256, 512, 512], []
    for i, side in enumerate(sides):
        convolutions = widths[i] + (1 if i < 2 else 2) * widths[i + 1]
        macs.append(9 * side**2 * widths[i + 1] * convolutions)
    by_stage = costs.groupby("stage", sort=False).macs.sum()
    assert by_stage.tolist()[:5] == macs
    assert by_stage["head"] == 25088 * 4096 + 4096 * 4096 + 4096 * 1000


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("paper", 22), ("torchvision", 22), ("cifar", 29), ("naive", 13), ("alexnet", 8),
        ("vgg11", 11), ("vgg13", 13), ("vgg16", 16), ("vgg19", 19), ("vgg19_bn", 19),
    ],
)  # fmt: skip
def test_depth(name, layers):
    assert depth(costs_of(name)) == layers


def test_heads_do_not_add_to_the_depth():
    assert depth(layer_costs(build("paper"), training=True)) == 22


EXACT_TABLE = {  # weights, MACs
    "conv1": (9_408, 118_013_952),
    "conv2": (114_688, 359_661_568),
    "3a": (163_328, 128_049_152),
    "3b": (388_096, 304_267_264),
    "4a": (375_552, 73_608_192),
    "4b": (448_512, 87_908_352),
    "4c": (509_440, 99_850_240),
    "4d": (604_672, 118_515_712),
    "4e": (867_328, 169_996_288),
    "5a": (1_042_432, 51_079_168),
    "5b": (1_442_816, 70_697_984),
    "linear": (1_024_000, 1_024_000),
}


@pytest.fixture(scope="module")
def table():
    return table_1().set_index("stage")


def test_table_1_is_exact(table):
    exact = dict(zip(table.index, zip(table.parameters, table.macs, strict=True), strict=True))
    assert exact == EXACT_TABLE
    assert list(table.columns) == [
        "parameters", "printed_params", "macs", "printed_ops", "params_agree", "ops_agree",
    ]  # fmt: skip


def test_operations_that_agree_with_table_1(table):
    disagree = table.index[~table.ops_agree].tolist()
    assert disagree == ["conv1", "4a", "5a"]
    assert abs(table.macs["4a"] / 1e6 - table.printed_ops["4a"]) == pytest.approx(0.608192)


def test_parameters_that_agree_with_table_1(table):
    # Printed as rounded up or down: 3a has 159.5 K and is printed as 159 K.
    assert table.index[table.params_agree].tolist() == ["conv2", "3a", "linear"]


def test_the_separable_stem_fits_table_1_in_both_columns():
    row = table_1(build("separable")).set_index("stage").loc["conv1"]  # 2.65 K as 2.7 K
    assert (row.parameters, row.macs) == (2_712, 34_019_328)
    assert row.params_agree
    assert row.ops_agree


def test_table_1_leaves_normalization_out(table):
    with torch.device("meta"):
        model = gl.googlenet("paper", norm="batch")
    normalized = table_1(model).set_index("stage")
    assert normalized.parameters.equals(table.parameters)
    assert normalized.macs.equals(table.macs)


def test_second_opinions_are_equal(caplog):
    models = {
        "ours": gl.googlenet("paper", width=0.1, norm="batch"),
        "theirs": build("alexnet").to_empty(device="cpu").train(),
    }
    models["ours"].conv1.eval()
    modes = {name: [m.training for m in model.modules()] for name, model in models.items()}
    frame = second_opinions(models, (3, 64, 64))
    assert list(frame.columns) == ["model", "gnetlab", "fvcore", "torch"]
    assert frame.model.tolist() == ["ours", "theirs"]
    assert frame.fvcore.tolist() == frame.gnetlab.tolist() == frame.torch.tolist()
    assert frame.gnetlab.tolist() == [
        layer_costs(model, (3, 64, 64)).macs.sum() for model in models.values()
    ]
    assert modes == {name: [m.training for m in model.modules()] for name, model in models.items()}
    assert not caplog.records  # nothing to worry a reader with


def test_reductions_change_what_the_formulas_say():
    frame = reduction_costs()
    assert list(frame.columns) == ["variant", "stage", "macs", "out_channels", "pool_share"]
    assert frame.index.equals(pd.RangeIndex(18))
    by_variant = {variant: rows.set_index("stage") for variant, rows in frame.groupby("variant")}
    channels = 192
    for row in gl.TABLE_1[2:-1]:
        n1, _, n3, _, n5, pool = row.widths
        reduced = by_variant["with reductions"].loc[row.stage]
        assert reduced.macs == EXACT_TABLE[row.stage][1]
        assert reduced.out_channels == n1 + n3 + n5 + pool
        assert reduced.pool_share == pool / reduced.out_channels
        naive = by_variant["without"].loc[row.stage]
        assert naive.macs == row.size**2 * channels * (n1 + 9 * n3 + 25 * n5)
        assert naive.pool_share == channels / naive.out_channels
        channels += n1 + n3 + n5  # the pooling branch passes all of its input on
        assert naive.out_channels == channels


def test_published_classifiers():
    frame = classifier_metadata()
    assert list(frame.columns) == ["model", "weights", "top1", "top5", "parameters", "macs"]
    assert frame.notna().all(axis=None)
    assert len(frame) > 80
    first = frame[frame.weights == "IMAGENET1K_V1"].set_index("model")
    assert first.top1[["googlenet", "vgg16"]].tolist() == [69.778, 71.592]
    assert (first.top5 > first.top1).all()
    assert first.parameters["vgg16"] == PARAMETERS["vgg16"]
    for name in ("googlenet", "vgg16", "resnet50", "inception_v3"):  # printed to a million
        assert first.macs[name] == pytest.approx(MACS[name], abs=1e6)
