"""Attributions equal Captum's, layer by layer, and autograd's, in float64."""

import numpy as np
import pandas as pd
import pytest
import torch

import gnetlab as gl
from gnetlab.measure.attribution import (
    attribution_shares,
    branch_attribution,
    by_stage,
    image_attribution,
)
from gnetlab.measure.hooks import record

METHODS = ("gradient_x_activation", "grad_cam", "conductance")


def small():
    model = gl.googlenet("torchvision", width=0.1, num_classes=5, seed=0, init="kaiming")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # without biases the gradient would be the same all along a path
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.double()


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 48, 48, generator=generator, dtype=torch.float64)


TARGETS = torch.tensor([4, 0, 2])


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def maps(images, method):
    return branch_attribution(small(), images, TARGETS, method=method)


def test_maps_equal_captums_layer_by_layer(maps, images, method):
    from captum.attr import LayerConductance, LayerGradCam, LayerGradientXActivation

    model, seen = small().eval(), 0
    for name in gl.branch_names(model):
        layer = model.get_submodule(name)
        if method == "grad_cam":
            expected = LayerGradCam(model, layer).attribute(images, TARGETS)[:, 0].clamp(min=0)
        elif method == "conductance":
            # Captum's default path, Gauss-Legendre's, leaves out both of its ends. It weighs a step
            # by the gradient at its start: along the path backwards, that is at its end.
            options = {"target": TARGETS, "n_steps": 20, "method": "riemann_trapezoid"}
            path, black = LayerConductance(model, layer), torch.zeros_like(images)
            forth = path.attribute(images, black, **options)
            back = path.attribute(black, images, **options)
            expected = (forth - back).sum(1) / 2
        else:
            expected = LayerGradientXActivation(model, layer).attribute(images, TARGETS).sum(1)
        expected = expected.detach()
        scale = float(expected.abs().max())
        np.testing.assert_allclose(maps[name], expected, rtol=1e-6, atol=1e-7 * scale)
        seen += scale > 0
    assert seen > 20  # Grad-CAM may cut a branch's whole map off


@pytest.mark.parametrize("name", ["inception3a.branch5x5", "inception4c.branch_pool"])
def test_maps_equal_autograds(maps, images, method, name):
    if method == "conductance":
        pytest.skip("no one pass gives it; Captum's is the oracle")
    model, kept = small().eval(), []
    model.get_submodule(name).register_forward_hook(lambda *call: kept.append(call[-1]))
    logits = model(images)[range(3), TARGETS]
    (gradient,) = torch.autograd.grad(logits.sum(), kept)
    if method == "grad_cam":
        expected = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1).relu()
    else:
        expected = (gradient * kept[0]).sum(1)
    expected = expected.detach()
    np.testing.assert_allclose(maps[name], expected, rtol=1e-6, atol=1e-7 * expected.abs().max())


def test_the_last_modules_attribution_is_the_logit(images):
    # After 5b only a mean and a linear layer follow, so that nothing is left over.
    model = small()
    names = [name for name in gl.branch_names(model) if name.startswith("inception5b")]
    maps = branch_attribution(model, images, TARGETS, names=names)
    logits = model.eval()(images)[range(3), TARGETS] - model.fc.bias[TARGETS]
    total = sum(values.sum((1, 2)) for values in maps.values())
    np.testing.assert_allclose(total, logits.detach(), rtol=1e-5)


def test_shapes_are_the_branches_own(maps, images):
    model = small().eval()
    names = gl.branch_names(model)
    with torch.no_grad(), record(model, names) as recorded:
        model(images)
    assert list(maps) == names
    for name, values in maps.items():
        assert values.shape == (3, *recorded[name].shape[2:])
        assert values.dtype == np.float32


def test_grad_cam_cuts_negative_parts_off(images):
    name = "inception4a.branch3x3"
    methods = METHODS[:2]
    signed, cut = (branch_attribution(small(), images, 0, names=[name], method=m) for m in methods)
    assert signed[name].min() < 0
    assert cut[name].min() == 0 < cut[name].max()


def test_the_predicted_class_is_the_default(images, method):
    model = small().eval()
    predicted = model(images).argmax(1)
    other = (predicted + 1) % 5
    name = "inception4b.branch1x1"
    default, same, another = (
        branch_attribution(model, images, targets, names=[name], method=method)[name]
        for targets in (None, predicted, other)
    )
    np.testing.assert_array_equal(default, same)
    assert np.abs(default - another).max() > 0.01 * np.abs(default).max()


def test_one_class_for_all_images(images, method):
    name = "inception4b.branch1x1"
    one, each = (
        branch_attribution(small(), images, targets, names=[name], method=method)[name]
        for targets in (3, torch.tensor([3, 3, 3]))
    )
    np.testing.assert_array_equal(one, each)


def test_names_choose_the_branches(maps, images, method):
    names = ["inception5a.branch_pool", "inception3b.branch1x1"]
    chosen = branch_attribution(small(), images, TARGETS, names=names, method=method)
    assert list(chosen) == names
    for name in names:
        np.testing.assert_allclose(chosen[name], maps[name], rtol=1e-6, atol=1e-12)


def test_an_unknown_name_is_an_error(images):
    with pytest.raises(ValueError, match=r"no module 'inception3a\.branch7x7'.*branch5x5"):
        branch_attribution(small(), images, names=["conv1", "inception3a.branch7x7"])


def test_an_unknown_method_is_an_error(images):
    model = small()
    with pytest.raises(ValueError, match="'saliency' asked; choose 'gradient_x_activation',"):
        branch_attribution(model, images, method="saliency")
    assert model.training


@pytest.mark.parametrize("mode", ["train", "eval", "frozen batch norm"])
def test_the_model_is_as_before(images, method, mode):
    model = small().train(mode != "eval")
    if mode == "frozen batch norm":
        model.conv1.eval()
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    own_images = images.clone()
    names = ["inception3a.branch1x1", "inception5b.branch5x5"]
    branch_attribution(model, own_images, names=names, method=method)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(own_images, images)
    assert not own_images.requires_grad
    assert own_images.grad is None
    assert [module.training for module in model.modules()] == modes


def test_neither_no_grad_nor_frozen_weights_matter(maps, images, method):
    model = small().requires_grad_(False)
    name = "inception3b.branch3x3"
    with torch.no_grad():
        frozen = branch_attribution(model, images, TARGETS, names=[name], method=method)
    np.testing.assert_allclose(frozen[name], maps[name], rtol=1e-6, atol=1e-12)


def test_shares_sum_to_one_in_absolute_value(maps):
    shares = attribution_shares(maps)
    columns = ["module", "stage", "branch", "attribution", "share"]
    if maps.difference is not None:
        columns.append("completeness")
    assert list(shares.columns) == columns
    assert shares.index.equals(pd.RangeIndex(36))
    assert shares.module.tolist() == list(maps)
    np.testing.assert_allclose(shares.share.abs().groupby(shares.stage).sum(), 1, rtol=1e-12)


def test_shares_by_hand():
    nothing = np.zeros((2, 1, 1), np.float32)
    maps = {
        "inception3a.branch1x1": np.float32([[[1, 2], [3, 4]], [[0, 0], [0, 2]]]),  # 10 and 2
        "inception3a.branch3x3": nothing,
        "inception3a.branch5x5": nothing,
        "inception3a.branch_pool": np.float32([[[-1, -1], [0, 0]], [[0, 0], [-1, -1]]]),  # -2, -2
        "inception3a": nothing + 5,
    }
    shares = attribution_shares(maps).drop(columns="module")
    assert shares.to_numpy().tolist() == [
        ["3a", "1x1", 6.0, 0.75],
        ["3a", "3x3", 0.0, 0.0],
        ["3a", "5x5", 0.0, 0.0],
        ["3a", "pool", -2.0, -0.25],
    ]


def test_each_copy_of_a_module_shares_out_the_difference(images):
    model = gl.googlenet("torchvision", width=0.1, num_classes=5, seed=0, init="kaiming",
                         extra_modules=2).double()  # fmt: skip
    maps = branch_attribution(model, images, method="conductance", steps=64)
    shares = attribution_shares(maps)
    assert shares.stage.unique().tolist()[4:8] == ["4c", "4c_2", "4c_3", "4d"]
    assert shares.completeness.between(0.95, 1.05).all()
    second = by_stage(maps, ["4c_2"])["4c_2"]
    assert (second["5x5"] == maps["inception4c_2.branch5x5"][0]).all()


def test_shares_need_all_branches_of_a_module():
    with pytest.raises(ValueError, match="shares of inception4a asked, but only its branches 5x5"):
        attribution_shares({"inception4a.branch5x5": np.ones((1, 2, 2))})


@pytest.mark.parametrize("targets", [5, -1, [0, 1], 1.5, torch.tensor([0, 1, 9]), "cat"])
@pytest.mark.parametrize("attribute", [branch_attribution, image_attribution])
def test_targets_that_are_no_classes_are_an_error(images, targets, attribute):
    expected = r"asked for 3 images; give one class|class \S+ asked as a target.* has 0 to 4"
    with pytest.raises(ValueError, match=expected):
        attribute(small(), images, targets)


def test_a_head_that_does_not_run_is_an_error(images):
    with pytest.raises(RuntimeError, match=r"'aux1' did not run.*training mode"):
        branch_attribution(small(), images, names="aux1")


def test_an_output_that_is_overwritten_in_place_is_an_error(method):
    nn = torch.nn
    layers = nn.Conv2d(3, 5, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, images = nn.Sequential(*layers), torch.randn(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"'0' is overwritten in place .* name that layer"):
        branch_attribution(model, images, 1, names="0", method=method)
    assert list(branch_attribution(model, images, 1, names="1", method=method)) == ["1"]


def test_inference_mode_does_not_matter(maps, images, method):
    name = "inception3b.branch3x3"
    model = small()
    with torch.inference_mode():
        found = branch_attribution(model, images, TARGETS, names=[name], method=method)
    np.testing.assert_allclose(found[name], maps[name], rtol=1e-6, atol=1e-12)


def test_half_precision_is_attributed(images, method):
    model = small().bfloat16()
    found = branch_attribution(model, images.bfloat16(), TARGETS, method=method)
    assert all(np.isfinite(values).all() for values in found.values())


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_inference_mode_does_not_matter_to_pixels(method):
    model, options = small().float(), {"method": method, "steps": 2, "window": 16}
    with torch.inference_mode():
        images = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        found = image_attribution(model, images, 1, **options)
    np.testing.assert_array_equal(found, image_attribution(model, images.clone(), 1, **options))


@pytest.mark.parametrize("options", [{"steps": 0}, {"window": 0}, {"window": 49}])
def test_steps_and_window_have_bounds(images, options):
    with pytest.raises(ValueError, match=r"steps=\d+, window=\d+ asked.* 1 to 48 px"):
        image_attribution(small(), images, method="occlusion", **options)


def test_by_stage_chooses_modules_and_an_image(maps):
    chosen = by_stage(maps, iter(("4c", "3a")), image=2)
    assert list(chosen) == ["4c", "3a"]
    assert list(chosen["4c"]) == ["1x1", "3x3", "5x5", "pool"]
    np.testing.assert_array_equal(chosen["4c"]["pool"], maps["inception4c.branch_pool"][2])
    first = by_stage(maps, ["3a"])["3a"]["1x1"]
    np.testing.assert_array_equal(first, maps["inception3a.branch1x1"][0])


def test_an_unknown_stage_is_an_error():
    maps = {
        "inception3a.branch1x1": np.zeros((1, 2, 2)),
        "inception4b.branch5x5": np.ones((1, 1, 1)),
    }
    with pytest.raises(ValueError, match="no module 4a, 6x; there are 3a, 4b"):
        by_stage(maps, ["3a", "4a", "6x"])


def test_one_name_or_none_at_all(images):
    name = "inception3a.branch1x1"
    assert list(branch_attribution(small(), images, names=name)) == [name]
    assert len(branch_attribution(small(), images, names=[])) == 36


def test_conductance_shares_out_the_logits_difference(images):
    model = small().eval()
    maps = branch_attribution(model, images, TARGETS, method="conductance", steps=200)
    logits = [model(x)[range(3), TARGETS] for x in (images, torch.zeros_like(images))]
    expected = (logits[0] - logits[1]).detach().numpy()
    np.testing.assert_allclose(maps.difference, expected, rtol=1e-9)
    np.testing.assert_array_equal(maps.targets, TARGETS)
    shares = attribution_shares(maps)
    np.testing.assert_allclose(shares.completeness, 1, atol=0.05)
    coarse = attribution_shares(
        branch_attribution(model, images, TARGETS, method="conductance", steps=3)
    )
    worst = [(frame.completeness - 1).abs().max() for frame in (shares, coarse)]
    assert worst[0] < worst[1]
    by_hand = sum(
        maps[f"inception4b.branch{b}"].sum((1, 2)) for b in ("1x1", "3x3", "5x5", "_pool")
    )
    assert shares[shares.stage == "4b"].completeness.iloc[0] == pytest.approx(
        by_hand.mean() / expected.mean()
    )


def test_a_path_needs_a_step(images):
    with pytest.raises(ValueError, match="steps=0 asked"):
        branch_attribution(small(), images, method="conductance", steps=0)


def test_integrated_gradients_add_up_to_the_logits_difference(images):
    model = small()
    found = image_attribution(model, images, TARGETS, steps=128)
    assert found.shape == (3, 48, 48)
    assert found.dtype == np.float32
    assert model.training
    model.eval()
    logits = [model(x)[range(3), TARGETS] for x in (images, torch.zeros_like(images))]
    expected = (logits[0] - logits[1]).detach().numpy()
    error = np.abs(found.sum((1, 2)) - expected).max()
    assert error < 0.05 * np.abs(expected).max()
    few = image_attribution(model, images, TARGETS, steps=2).sum((1, 2))
    assert np.abs(few - expected).max() > 2 * error


def test_occlusion_by_hand(images):
    model = small().eval()
    found = image_attribution(model, images[:1], 4, method="occlusion", window=24)
    hidden = images[:1].clone()
    hidden[..., :24, :24] = 0
    lost = (model(images[:1]) - model(hidden))[0, 4]
    # Only the window in the corner covers the outermost pixels there.
    assert found[0, 0, 0] == pytest.approx(lost.item(), rel=1e-5)


def test_an_unknown_image_method_is_an_error(images):
    with pytest.raises(ValueError, match="'saliency' asked; choose 'integrated_gradients' or"):
        image_attribution(small(), images, method="saliency")


def test_a_network_without_branches(images):
    with pytest.raises(ValueError, match=r"Identity has no Inception modules.*give names="):
        branch_attribution(torch.nn.Identity(), images)
