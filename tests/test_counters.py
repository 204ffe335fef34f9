"""What other tools print, by running those that are here."""

import contextlib
import io
import warnings

import pytest
import torch
import torchvision
from networks import build, costs_of
from torch.utils.flop_counter import FlopCounterMode

import gnetlab as gl
from gnetlab.measure.costs import layer_costs
from gnetlab.measure.counters import TOOLS, beside_fvcore, explain, second_opinions


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


def run_fvcore(model, image):
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, image).unsupported_ops_warnings(False)
    return int(analysis.uncalled_modules_warnings(False).total())


def run_flop_counter(model, image):
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops()


def run_ptflops(backend):
    def run(model, image):
        from ptflops import get_model_complexity_info

        return get_model_complexity_info(
            model, tuple(image.shape[1:]), as_strings=False, print_per_layer_stat=False,
            backend=backend,
        )[0]  # fmt: skip

    return run


def run_thop(model, image):
    from thop import profile

    return int(profile(model, (image,), verbose=False)[0])


def run_torchinfo(model, image):
    from torchinfo import summary

    return summary(model, tuple(image.shape), verbose=0, device="cpu").total_mult_adds


def run_torchprofile(model, image):
    from torchprofile import profile_macs

    return profile_macs(model, image)


RUN = {
    "fvcore": run_fvcore,
    "FlopCounterMode": run_flop_counter,
    "ptflops, aten": run_ptflops("aten"),
    "ptflops, pytorch": run_ptflops("pytorch"),
    "thop": run_thop,
    "torchinfo": run_torchinfo,
    "torchprofile": run_torchprofile,
}
SMALL = {
    "paper": 64, "torchvision": 64, "cifar": 16, "googlenet": 64, "vgg11": 64, "vgg11_bn": 64,
    "alexnet": 64, "resnet18": 64, "inception_v3": 96, "mobilenet_v2": 64, "squeezenet1_1": 64,
}  # fmt: skip


@pytest.mark.parametrize("tool", RUN)
def test_tools_print_what_is_explained(tool):
    package = tool.split(",")[0]
    if package in ("ptflops", "thop", "torchinfo", "torchprofile"):
        pytest.importorskip(package)
    for name, side in SMALL.items():
        model = build(name).to_empty(device="cpu").eval()  # some tools leave marks: one for each
        costs = layer_costs(model, (3, side, side))
        with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            printed = RUN[tool](model, torch.zeros(1, 3, side, side))
        explained = explain(costs, tool)
        assert printed == explained.operations.sum() > 1e6, name
        assert (explained.operations != 0).all()


def test_calflops_by_hand():
    costs = costs_of("vgg11")  # calflops itself needs half a dozen large packages
    assert set(RUN) | {"calflops"} == set(TOOLS)
    relu = costs[costs.operation == "relu"].activations.sum()
    pools = costs[costs.operation.str.contains("pool")]
    biases = costs[costs.operation == "conv2d"].activations.sum()
    expected = 2 * costs.macs.sum() + relu + pools.input_bytes.sum() // 4 + biases
    assert explain(costs, "calflops").operations.sum() == expected


def test_explanations_of_all_tools_are_those_of_each():
    every = explain(costs_of("paper"))
    assert every.tool.drop_duplicates().tolist() == list(TOOLS)
    for tool, rows in every.groupby("tool", sort=False):
        assert rows.reset_index(drop=True).equals(explain(costs_of("paper"), tool))


def test_unknown_tools_and_uncounted_layers_are_refused():
    with pytest.raises(ValueError, match=r"'fvcor'.*'fvcore'.*Known: fvcore; FlopCounterMode"):
        explain(costs_of("paper"), "fvcor")
    costs = costs_of("paper").copy()
    costs.loc[3, "macs"] = None
    with pytest.raises(ValueError, match="was not counted"):
        explain(costs)


def test_what_fvcores_two_terms_do_not_explain_is_said():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.GroupNorm(2, 4))
    frame = beside_fvcore(model, (3, 8, 8)).set_index("module")
    assert frame.unexplained["0"] == 0
    assert frame.unexplained["1"] == frame.fvcore["1"] > 0  # group norm, which fvcore counts


def test_fvcores_count_per_module_is_explained():
    model = gl.googlenet("torchvision", width=0.1)
    frame = beside_fvcore(model, (3, 64, 64))
    assert list(frame.columns) == [
        "module", "macs", "fvcore", "batch_norm", "adaptive_pool", "unexplained",
    ]  # fmt: skip
    assert "inception4c" in frame.module.tolist()
    assert (frame.unexplained == 0).all()
    assert (frame.fvcore > frame.macs).sum() == 13  # three convolutions, nine modules, last pool
    assert frame.macs.sum() == layer_costs(model, (3, 64, 64)).macs.sum()
    assert model.training


def test_functions_of_the_models_own_forward_have_their_own_count():
    # mobilenet_v2 pools between its children; fvcore has the whole network under the same name.
    frame = beside_fvcore(torchvision.models.mobilenet_v2(), (3, 64, 64)).set_index("module")
    assert frame.fvcore["MobileNetV2"] == frame.adaptive_pool["MobileNetV2"] == 1280 * 2 * 2
    assert (frame.unexplained == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_counted(dtype):
    model = gl.googlenet("torchvision", width=0.1).to(dtype)
    counts = second_opinions({"": model}, (3, 64, 64)).iloc[0]
    assert counts.gnetlab == counts.fvcore == counts.torch
    assert (beside_fvcore(model, (3, 64, 64)).unexplained == 0).all()
