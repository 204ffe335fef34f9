"""Every count by a second route: torch's FlopCounterMode, fvcore, autograd, or by hand."""

import gc
import math
import threading
import weakref
from collections import OrderedDict

import pandas as pd
import pytest
import torch
import torchvision.models
from networks import MACS, NETWORKS, PARAMETERS, SIDES, THEIRS, build, costs_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gnetlab as gl
from gnetlab.measure.costs import layer_costs, locate, summed
from gnetlab.measure.shapes import forward_pass

COLUMNS = [
    "module", "stage", "branch", "kind", "operation", "output_shape", "parameters", "macs",
    "activations", "bias_additions", "elementwise", "comparisons", "input_bytes", "output_bytes",
    "weight_bytes", "live_bytes", "depth", "intensity",
]  # fmt: skip


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


@NETWORKS
@pytest.mark.parametrize("training", [False, True])
def test_both_engines_say_the_same(name, training):
    if name == "inception_v3" and training:
        side = 299  # its auxiliary head needs it
    else:
        side = {"cifar": 16, "inception_v3": 96}.get(name, 64)
    model = build(name)
    frames = [
        layer_costs(model, (3, side, side), training=training, engine=engine)
        for engine in ("shapes", "meta")
    ]
    pd.testing.assert_frame_equal(*frames)


@pytest.mark.parametrize(
    "name",
    ["densenet121", "shufflenet_v2_x0_5", "mnasnet0_5", "squeezenet1_1", "efficientnet_b0",
     "convnext_tiny", "mobilenet_v3_small", "resnext50_32x4d", "vit_b_32"],
)  # fmt: skip
def test_other_families_run_on_shapes_alone(name):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)().eval()
    side = 224 if name == "vit_b_32" else 64
    costs = layer_costs(model, (3, side, side), engine="shapes")
    total, _ = counted_by_torch(model, 1, 3, side, side)
    assert costs.macs.sum() == total
    assert costs.parameters.sum() == sum(p.numel() for p in model.parameters())
    assert costs.macs.notna().all()


@pytest.mark.parametrize("name", ["paper", "googlenet", "vgg16"])
def test_frame_is_as_documented(name):
    costs = costs_of(name)
    assert list(costs.columns) == COLUMNS
    assert costs.index.equals(pd.RangeIndex(len(costs)))
    kinds = dict.fromkeys(COLUMNS[6:-1], "int64") | {"macs": "Int64", "activations": "Int64"}
    assert {column: str(costs[column].dtype) for column in kinds} == kinds
    assert costs.activations.tolist() == [math.prod(shape) for shape in costs.output_shape]
    assert costs.macs.notna().all()
    modules = dict(build(name).named_modules())
    layers = costs[costs.kind.str[0].str.isupper()]
    assert layers.kind.tolist() == [type(modules[module]).__name__ for module in layers.module]
    functions = costs[costs.kind.str[0].str.islower()]
    assert (functions.kind == functions.operation).all()
    assert set(functions.kind) == {"paper": {"cat"}, "googlenet": {"cat", "relu"}}.get(name, set())


@pytest.mark.parametrize("engine", ["shapes", "meta"])
def test_rows_come_in_the_order_of_execution(engine):
    model, ran = build("torchvision"), []
    for module_name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=module_name: ran.append(name))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    expected = ran.copy()
    costs = layer_costs(model, engine=engine)
    assert costs.module[costs.kind != "cat"].tolist() == expected
    assert ran == expected  # hooks of the user's see nothing of the counting


class Scale(nn.Module):
    """A layer, or a container, with a parameter of its own."""

    def __init__(self, channels, inner=None):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        if inner is not None:
            self.inner = inner

    def forward(self, x):
        x = x * self.scale
        return self.inner(x) if hasattr(self, "inner") else x


@pytest.mark.parametrize("engine", ["shapes", "meta"])
def test_parameters_that_functions_use_are_counted_where_they_are_used(engine):
    model = nn.Sequential(Scale(3), nn.Conv2d(3, 2, 1), Scale(2, nn.Conv2d(2, 4, 1)))
    costs = layer_costs(model, (3, 5, 5), engine=engine)
    assert costs.module.tolist() == ["0", "1", "2", "2.inner"]
    assert costs.kind.tolist() == ["Scale", "Conv2d", "mul", "Conv2d"]
    assert costs.parameters.tolist() == [3, 8, 2, 12]
    assert costs.macs.tolist() == [0, 6 * 25, 0, 8 * 25]
    assert costs.elementwise.tolist() == [75, 0, 50, 0]


class Mystery(nn.Module):
    """Calls a function that no rule knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(7))

    def forward(self, x):
        return torch.fft.rfft2(x).real.contiguous()


class InContainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bias = nn.Conv2d(3, 2, 1), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return torch.flip(self.conv(x), (2,))


def test_what_no_rule_knows_is_a_row_that_is_not_counted():
    costs = layer_costs(nn.Sequential(Mystery(), InContainer()), (3, 5, 4))
    assert costs.module.tolist() == ["0", "1.conv", "1", "1"]
    assert costs.kind.tolist() == ["Mystery", "Conv2d", "flip", "InContainer"]
    assert costs.macs.isna().tolist() == [True, False, True, True]
    assert costs.parameters.tolist() == [7, 8, 0, 5]  # own parameters that nobody was seen to use
    assert costs.output_shape.tolist() == [(3, 5, 3), (2, 5, 3), (2, 5, 3), (2, 5, 3)]
    with pytest.raises(NotImplementedError, match="fft_rfft2"):
        layer_costs(nn.Sequential(Mystery()), (3, 5, 4), engine="shapes")


@pytest.mark.parametrize("engine", ["shapes", "meta"])
def test_a_layer_whose_weights_nothing_was_seen_to_use_is_not_counted(engine):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(7))

        def forward(self, x):
            return x

    costs = layer_costs(nn.Sequential(Idle(), nn.Identity()), (3, 5, 4), engine=engine)
    assert costs.macs.isna().tolist() == [True, False]
    assert costs.parameters.tolist() == [7, 0]


def test_matrix_products_are_macs():
    class Gram(nn.Module):
        def forward(self, x):
            return x @ x.transpose(2, 3)

    costs = layer_costs(nn.Sequential(Gram()), (3, 5, 4), engine="shapes")
    assert costs.macs.tolist() == [3 * 5 * 5 * 4]


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


@pytest.mark.parametrize("engine", ["shapes", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before(training, engine):
    model = gl.googlenet("torchvision", width=0.1, num_classes=3, seed=0)
    model.inception3a.eval()
    model.fc.weight.grad = torch.full_like(model.fc.weight, 7)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    places = [p.data_ptr() for p in [*model.parameters(), *model.buffers()]]
    random = torch.get_rng_state()
    attributes = [sorted(module.__dict__) for module in model.modules()]
    layer_costs(model, (3, 64, 64), training=training, engine=engine)
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    assert [module.training for module in model.modules()] == modes
    assert [p.data_ptr() for p in [*model.parameters(), *model.buffers()]] == places
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert (model.fc.weight.grad == 7).all()
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


class OwnNorm(nn.BatchNorm2d):
    """Runs its own forward, which counts batches in a buffer."""


class Replaces(nn.Module):
    """Gives its buffer a new value instead of changing it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls = self.calls + 1
        return torch.relu(x)


@pytest.mark.parametrize("engine", ["shapes", "meta"])
@pytest.mark.parametrize("inference", [False, True])
def test_buffers_that_a_forward_pass_moves_are_put_back(engine, inference):
    norm = nn.utils.parametrizations.spectral_norm
    with torch.inference_mode(inference):
        model = nn.Sequential(norm(nn.Conv2d(3, 4, 1)), OwnNorm(4), Replaces())
        buffers = dict(model.named_buffers())
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        layer_costs(model, (3, 4, 4), training=True, engine=engine)
        for name, buffer in model.named_buffers():
            assert buffer is buffers[name]
            assert torch.equal(buffer, before[name])


def test_mode_and_hooks_are_restored_after_an_error():
    model = gl.googlenet(width=0.1)
    model.conv1.eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match="takes N x 3"):
        layer_costs(model, (4, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


class Operations(TorchDispatchMode):
    """Remembers the operations that reach ATen, and where they put their results."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.seen |= {(str(function), r.device.type) for r in results if isinstance(r, Tensor)}
        return result


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_computed(training):
    model = gl.googlenet("paper", width=0.1, norm="batch")
    with Operations() as operations:
        layer_costs(model, (3, 64, 64), training=training, engine="shapes")
    assert not operations.seen
    with Operations() as operations:
        layer_costs(model, (3, 64, 64), training=training, engine="meta")
    assert {device for _, device in operations.seen} == {"meta"}


@pytest.mark.parametrize("engine", ["shapes", "meta"])
def test_layers_that_drop_at_random_draw_nothing(engine):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), torchvision.ops.StochasticDepth(0.5, "row"))
    before = torch.get_rng_state()
    layer_costs(model, (3, 4, 4), training=True, engine=engine)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("engine", ["shapes", "meta"])
def test_a_counted_model_can_be_forgotten(engine):
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    gone = weakref.ref(model)
    layer_costs(model, (3, 4, 4), engine=engine)
    del model
    gc.collect()
    assert gone() is None


def test_models_in_inference_mode_are_counted():
    with torch.inference_mode():
        model = gl.googlenet("torchvision", width=0.1)
        costs = layer_costs(model, (3, 64, 64), engine="shapes")
        assert costs.equals(layer_costs(model, (3, 64, 64), engine="meta"))


def test_another_thread_can_run_the_model_meanwhile():
    class Waits(nn.Module):
        def forward(self, x):
            if not isinstance(x, Tensor):  # the counting pass: let the other thread run
                started.set()
                assert done.wait(300)
            return F.relu(x)

    def other():
        assert started.wait(300)
        outputs.append(model(torch.full((1, 3, 4, 4), -1.0)))
        done.set()

    started, done, outputs = threading.Event(), threading.Event(), []
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Waits())
    thread = threading.Thread(target=other)
    thread.start()
    costs = layer_costs(model, (3, 4, 4), engine="shapes")
    thread.join()
    assert costs.kind.tolist() == ["Conv2d", "Waits"]
    assert outputs[0].shape == (1, 3, 4, 4)


def test_a_compiled_model_is_counted_as_what_it_wraps():
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())
    expected = layer_costs(model, (3, 4, 4))
    assert layer_costs(torch.compile(model), (3, 4, 4)).equals(expected)
    model.compile()
    compiled = model._compiled_call_impl
    assert layer_costs(model, (3, 4, 4)).equals(expected)
    assert model._compiled_call_impl is compiled


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
    assert costs.depth.tolist() == [1, 1, 1, 2]
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
        # Which variables its forward keeps alive is each network's own business.
        columns = [column for column in COLUMNS[1:] if column != "live_bytes"]
        return costs[costs.macs > 0][columns].reset_index(drop=True)

    pd.testing.assert_frame_equal(layers("torchvision"), layers("googlenet"))


def test_stages_and_branches():
    costs = costs_of("paper")
    assert costs.stage.drop_duplicates().tolist() == [
        "stem", "3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "head",
    ]  # fmt: skip
    inside = costs[costs.module.str.startswith("inception") & (costs.kind != "cat")]
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


def test_layers_of_another_network_are_no_stages_of_googlenets():
    names = ["conv1", "pool1", "conv2", "pool3", "conv3", "maxpool4"]
    layers = {n: nn.Conv2d(3, 3, 3) if "conv" in n else nn.MaxPool2d(2, 1) for n in names}
    model = nn.Sequential(OrderedDict(layers | {"flatten": nn.Flatten()}))
    assert layer_costs(model, (3, 16, 16)).stage.tolist() == [*names, "head"]
    assert layer_costs(torch.compile(build("paper"))).stage.equals(costs_of("paper").stage)


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


def test_a_branch_has_one_name_in_every_module_whatever_its_kernel():
    changes = {"stem": "inception", "extra_modules": 1, "branch5x5": "3x3", "width": 0.1}
    costs = layer_costs(gl.googlenet("paper", **changes), (3, 64, 64))
    found = costs[costs.module.str.startswith("inception")].groupby("module", sort=False).branch
    assert set(found.first()) <= {"1x1", "3x3", "5x5", "pool", ""}


def test_a_weight_that_two_layers_share_is_counted_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    for engine in ("shapes", "meta"):
        costs = layer_costs(nn.Sequential(first, second), (4,), engine=engine)
        assert costs.parameters.tolist() == [16, 0]


def test_branches_of_inception_v3_come_from_what_meets_in_a_concatenation():
    costs = costs_of("inception_v3")
    by_place = costs.groupby(["stage", "branch"], sort=False)
    modules = {}
    for (stage, branch), rows in by_place:
        if branch:
            tops = {module.split(".")[1] for module in rows.module if "." in module}
            modules.setdefault(stage, {})[branch] = tops
    assert modules["Mixed_5b"] == {
        "1x1": {"branch1x1"},
        "5x5": {"branch5x5_1", "branch5x5_2"},
        "3x3+3x3": {"branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"},
        "pool": {"branch_pool"},
    }
    assert list(modules["Mixed_6b"]) == ["1x1", "1x7+7x1", "7x1+1x7+7x1+1x7", "pool"]
    # Here two branches end in concatenations of their own; the outer one decides.
    assert [len(names) for names in modules["Mixed_7c"].values()] == [1, 3, 4, 1]
    pools = costs[costs.kind == "avg_pool2d"]
    assert len(pools) == 9
    assert (pools.branch == "pool").all()  # a function that no module's name gives away


def test_inputs_that_pass_untouched_are_no_branch():
    with torch.device("meta"):
        model = torchvision.models.densenet121().eval()
    assert set(layer_costs(model, (3, 64, 64)).branch) == {""}


def stored_by_autograd(model, image):
    """Bytes that a forward pass keeps for the backward one, beyond the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(image)
    assert output is not None
    return sum(storage.nbytes() for storage in kept.values())


TRAINABLE = {
    "paper": (lambda: gl.googlenet("paper", width=0.25), 224),
    "paper without norm": (lambda: gl.googlenet("paper", norm=None, width=0.25), 64),
    "torchvision": (lambda: gl.googlenet("torchvision", width=0.25), 64),
    "inception stem": (lambda: gl.googlenet("paper", stem="inception", width=0.25), 64),
    "googlenet": (lambda: torchvision.models.googlenet(init_weights=False), 64),
    "vgg11_bn": (lambda: torchvision.models.vgg11_bn(), 32),
    "resnet18": (lambda: torchvision.models.resnet18(), 64),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(), 64),
}
KEEPING = TRAINABLE | {
    "convnext_tiny": (lambda: torchvision.models.convnext_tiny(stochastic_depth_prob=0.0), 64),
    "vision transformer": (
        lambda: torchvision.models.VisionTransformer(32, 16, 2, 4, 32, 64, num_classes=5), 32
    ),
    "cifar": (lambda: gl.googlenet("cifar", width=0.25), 32),  # its dropout drops nothing
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPING)
def test_stored_activations_are_those_that_autograd_keeps(name):
    make, side = KEEPING[name]
    model = make().train()
    costs = layer_costs(model, (3, side, side), training=True)
    norms = costs.output_shape[costs.operation == "batch_norm"]
    statistics = 2 * 4 * sum(shape[0] for shape in norms)  # per batch, not per image
    stored = stored_by_autograd(model, torch.zeros(2, 3, side, side))
    assert 2 * costs.stored_bytes.sum() == stored - statistics
    assert costs.live_bytes.iloc[-1] >= costs.stored_bytes.sum()


class Applied(nn.Module):
    """A function or a layer, on what has a gradient."""

    def __init__(self, function):
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(1)), function

    def forward(self, x):
        return self.function(x + self.scale)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (nn.ConvTranspose1d(8, 4, 3), (8, 32)),
        (nn.ConvTranspose2d(8, 4, 3), (8, 16, 12)),
        (nn.MaxPool1d(2), (8, 32)),
        (nn.MaxPool3d(2), (8, 8, 6, 4)),
        (nn.AvgPool1d(2), (8, 32)),
        (nn.AvgPool3d(2), (8, 8, 6, 4)),
        (nn.AdaptiveAvgPool1d(4), (8, 32)),
        (nn.AdaptiveAvgPool3d(1), (8, 8, 6, 4)),
        (nn.AdaptiveMaxPool2d(4), (8, 16, 12)),
        (nn.LayerNorm(12), (8, 16, 12)),
        (nn.ELU(), (8, 16, 12)),
        (nn.Softplus(), (8, 16, 12)),
        (nn.Mish(), (8, 16, 12)),
        (lambda x: x / (x + x), (8, 16)),
        (lambda x: 2 * x, (8, 16)),
        (lambda x: F.scaled_dot_product_attention(x, x + x, x), (2, 8, 16)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).replace(" ", ""),
)
def test_a_layer_stores_what_autograd_keeps(function, shape):
    model = Applied(function).train()
    costs = layer_costs(model, shape, training=True)
    assert costs.stored_bytes.sum() == stored_by_autograd(model, torch.rand(1, *shape))


def test_instance_norm_stores_its_input():
    costs = layer_costs(Applied(nn.InstanceNorm2d(4)), (4, 6, 5), training=True)
    assert costs.stored_bytes.sum() == 4 * 4 * 6 * 5


@pytest.mark.parametrize("name", [n for n in TRAINABLE if n != "mobilenet_v2"])
def test_backward_macs_equal_those_of_torchs_counter(name):
    # FlopCounterMode takes the backward pass of a depthwise convolution for that of a dense one.
    make, side = TRAINABLE[name]
    with torch.device("meta"):
        model = make().train()
    costs = layer_costs(model, (3, side, side), training=True)
    with FlopCounterMode(display=False) as counter:
        outputs = model(torch.empty(2, 3, side, side, device="meta"))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(output.sum() for output in outputs if output is not None).backward()
    assert 2 * 2 * (costs.macs + costs.backward_macs).sum() == counter.get_total_flops()


def test_frozen_weights_have_no_backward_macs():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    costs = layer_costs(model, (3, 2, 2), training=True)
    assert costs.backward_macs.tolist() == [0, 20 * 4, 30 * 4]
    assert costs.stored_bytes.tolist() == [0, 4 * 4 * 4, 0 + 5 * 4 * 4]


@pytest.mark.parametrize("engine", ["shapes", "meta"])
def test_bytes_by_hand(engine):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=True), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    costs = layer_costs(model, (3, 6, 6), engine=engine)
    assert costs.input_bytes.tolist() == [4 * 108, 4 * 64, 4 * 64, 0]
    assert costs.output_bytes.tolist() == [4 * 64, 4 * 64, 4 * 16 + 8 * 16, 0]
    assert costs.weight_bytes.tolist() == [4 * 112, 0, 0, 0]
    assert costs.bias_additions.tolist() == [64, 0, 0, 0]
    assert costs.elementwise.tolist() == [0, 64, 0, 0]
    assert costs.comparisons.tolist() == [0, 0, 3 * 16, 0]
    # The caller holds the image while the model runs; each output dies after its successor.
    assert costs.live_bytes.tolist() == [4 * 172, 4 * (108 + 128), 4 * (108 + 80), 4 * (108 + 16)]
    assert costs.intensity[0] == 2 * 108 * 16 * 4 / 4 / (4 * (108 + 64 + 112)) * 1.0
    assert costs.intensity.isna().tolist() == [False, False, False, True]


def test_what_runs_in_place_takes_no_new_memory():
    def peak(inplace):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace), nn.Conv2d(8, 1, 1))
        return layer_costs(model, (3, 4, 4)).live_bytes.max()

    assert peak(False) - peak(True) == 4 * (8 + 8 - 8 - 1) * 16


def test_half_precision_halves_the_bytes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    whole = layer_costs(model, (3, 6, 6))
    half = layer_costs(model.bfloat16(), (3, 6, 6))
    for column in ("input_bytes", "output_bytes", "weight_bytes", "live_bytes"):
        assert (2 * half[column]).equals(whole[column])


def test_a_model_that_cannot_run_raises_its_own_error():
    with pytest.raises(RuntimeError, match="channel"):
        layer_costs(nn.Sequential(nn.Conv2d(4, 2, 1)), (3, 5, 5))
    with pytest.raises(RuntimeError, match="too small"):
        layer_costs(torchvision.models.vgg11(), (3, 16, 16))


class Viewed(nn.Module):
    """As tutorials have it: of how many pixels its images are stands in its forward."""

    def __init__(self, *sizes):
        super().__init__()
        self.conv, self.fc, self.sizes = nn.Conv2d(1, 2, 3), nn.Linear(18, 4), sizes

    def forward(self, x):
        return self.fc(self.conv(x).view(self.sizes))


@pytest.mark.parametrize("side", [4, 6])  # fewer and more pixels than its 5 x 5
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Viewed(-1, 18), "invalid for input of size"),
        (Viewed(1, 18), "invalid for input of size"),
        (nn.Sequential(nn.LayerNorm((1, 5, 5)), nn.Flatten()), "normalized_shape"),
    ],
    ids=["view", "reshape", "layer norm"],
)
def test_an_image_of_another_size_raises_what_the_model_raises(model, message, side):
    assert layer_costs(model, (1, 5, 5)).macs.notna().all()
    with pytest.raises(RuntimeError, match=message):
        model(torch.zeros(1, 1, side, side))
    with pytest.raises(RuntimeError, match=message):
        layer_costs(model, (1, side, side))


@pytest.mark.parametrize("layer", [nn.ReflectionPad2d(4), nn.CircularPad2d(4), nn.ZeroPad2d(-2)])
def test_padding_that_an_image_is_too_small_for_is_an_error(layer):
    layer_costs(nn.Sequential(layer), (1, 5, 5))
    with pytest.raises(RuntimeError):
        layer(torch.zeros(1, 1, 3, 3))
    with pytest.raises(RuntimeError):
        layer_costs(nn.Sequential(layer), (1, 3, 3))


class Attending(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "options", [{"kdim": 8, "vdim": 8}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str
)
def test_attention_in_another_form_is_not_counted_as_if_it_were_plain(options):
    layer = nn.MultiheadAttention(16, 4, batch_first=True, **options)
    query = nn.Linear(8, 16) if "kdim" in options else nn.Identity()
    model = Attending(
        lambda m, x: m.layer(m.query(x), x, x, need_weights=False)[0], layer=layer, query=query
    )
    costs = layer_costs(model, (5, 8 if "kdim" in options else 16))
    assert costs[costs.module == "layer"].macs.isna().all()


def test_attention_of_one_query_on_several_batches_is_not_counted_as_one():
    model = Attending(lambda _, x: F.scaled_dot_product_attention(x[:, :1], x, x))
    assert layer_costs(model, (3, 4, 8)).macs.isna().any()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 4, 3, padding="same", dilation=2), (2, 9, 9)),
        (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 9, 9)),
        (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 8, 8)),
        (nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), (2, 9, 9)),
        (nn.MaxPool2d(2, 2, padding=1, ceil_mode=True), (2, 5, 5)),
        (nn.AvgPool2d(3, 2, padding=1, ceil_mode=True), (2, 8, 8)),
        (nn.MaxPool2d((3, 2), (1, 2), dilation=(2, 1)), (2, 9, 8)),
        (nn.AdaptiveAvgPool2d((None, 3)), (2, 9, 8)),
        (nn.AdaptiveMaxPool2d(2), (2, 9, 8)),
        (nn.Flatten(2), (2, 9, 8)),
        (nn.GroupNorm(2, 4), (4, 3, 3)),
        (nn.LocalResponseNorm(5), (4, 3, 3)),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_shapes_are_pytorchs(layer, shape):
    model = nn.Sequential(layer)
    costs = layer_costs(model, shape, engine="auto")
    assert costs.output_shape.iloc[-1] == tuple(model(torch.zeros(1, *shape)).shape[1:])
    if "reflect" not in str(layer):
        forward_pass(model, shape, engine="shapes")


def test_sums_over_layers():
    costs = costs_of("paper")
    whole = summed(costs)
    assert len(whole) == 1
    assert whole.macs[0] == MACS["paper"]
    assert whole.bytes[0] == sum(
        costs[f"{kind}_bytes"].sum() for kind in ("input", "output", "weight")
    )
    assert whole.outputs[0] == costs.activations[costs.macs > 0].sum() == 3_227_160
    assert whole.live_bytes[0] == costs.live_bytes.max()
    assert whole.depth[0] == 22
    assert whole.intensity[0] == 2 * MACS["paper"] / whole.bytes[0]
    stages = summed(costs, ["stage", "branch"]).set_index(["stage", "branch"])
    assert stages.macs["3a", "5x5"] == 784 * (192 * 16 + 25 * 16 * 32)
    assert stages.macs.sum() == MACS["paper"]
    training = layer_costs(build("torchvision"), training=True)
    assert summed(training, "stage").stored_bytes.sum() == training.stored_bytes.sum()


def test_a_side_alone_is_no_input_size():
    with pytest.raises(ValueError, match=r"input_size=32 asked; .* \(3, 224, 224\)"):
        layer_costs(nn.Identity(), 32)


def test_an_unknown_engine_is_an_error():
    with pytest.raises(ValueError, match="engine='shape' asked; choose 'auto', 'shapes' or 'meta'"):
        layer_costs(nn.Identity(), (3, 5, 4), engine="shape")
