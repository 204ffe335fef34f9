"""What is recorded is what ran, and no hook outlives its block."""

import weakref

import pytest
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure.hooks import in_mode, observe, record
from gnetlab.net.model import Inception


def small(preset="torchvision", **changes):
    return gl.googlenet(preset, width=0.1, num_classes=5, seed=0, init="kaiming", **changes).eval()


@pytest.fixture
def model():
    return small()


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def recorded(model, names, *batches, **options):
    with torch.no_grad(), record(model, names, **options) as maps:
        for batch in batches:
            model(batch)
    return maps


class Twice(nn.Module):
    """Runs its one layer twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize("names", ["branches", "modules", "both"])
@pytest.mark.parametrize("preset", ["paper", "torchvision", "cifar", "naive"])
def test_maps_are_the_outputs_and_branches_slices_of_their_module(preset, images, names):
    model = small(preset)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, Inception)}
    branches = {f"{n}.{b}": s for n, m in modules.items() for b, s in m.branch_slices.items()}
    asked = {"branches": [*branches], "modules": [*modules], "both": [*branches, *modules]}[names]
    outputs = {}
    for name in [*branches, *modules]:
        model.get_submodule(name).register_forward_hook(
            lambda *call, name=name: outputs.update({name: call[-1].clone()})
        )
    maps = recorded(model, asked, images)
    assert set(maps) == set(asked)
    for name in asked:
        assert torch.equal(maps[name], outputs[name])
        assert maps[name].abs().sum() > 0
    assert len(branches) == 36
    for name, channels in branches.items():
        assert torch.equal(outputs[name], outputs[name.rpartition(".")[0]][:, channels])


@pytest.mark.parametrize("name", ["inception4b.branch3x3", "inception4b.branch3x3.conv.relu"])
def test_one_branch_alone(model, images, name):
    both = recorded(model, ["inception4b", name], images)
    alone = recorded(model, name, images)
    assert list(alone) == [name]
    channels = model.inception4b.branch_slices["branch3x3"]
    assert torch.equal(alone[name], both["inception4b"][:, channels])
    assert torch.equal(alone[name], both[name])


def test_recording_changes_neither_outputs_nor_gradients(model, images):
    plain = model(images)
    with record(model, gl.branch_names(model)):
        watched = model(images)
    assert torch.equal(plain, watched)
    weight = model.conv1.conv.weight
    by_route = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (plain, watched)]
    assert torch.equal(*by_route)


@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt])
def test_hooks_live_as_long_as_the_block(model, images, end):
    own = model.conv1.register_forward_hook(lambda *_: None)

    def block():
        with record(model, gl.branch_names(model)):
            model(images)
            assert hooks(model) > 9
            if end:
                raise end("from the block")

    if end:
        with pytest.raises(end, match="from the block"):
            block()
    else:
        block()
    assert hooks(model) == 1  # the caller's own, which is not ours to remove
    own.remove()


@pytest.mark.parametrize(
    ("names", "error"),
    [
        (["conv1", "inception3a", "inception3a.branch5x6"], ValueError),  # half-way in registration
        (["conv1", "aux1"], RuntimeError),  # when the block ends
    ],
)
def test_no_hook_is_left_by_our_own_errors(model, images, names, error):
    with pytest.raises(error):
        recorded(model, names, images)
    assert hooks(model) == 0


def test_no_hook_is_left_when_the_forward_pass_fails(model, images):
    with pytest.raises(ValueError, match="takes N x 3"):
        recorded(model, ["conv1"], images[:, :2])
    assert hooks(model) == 0


def test_unknown_name_is_an_error_with_the_nearest(model, images):
    with pytest.raises(ValueError, match=r"'inception3a\.branch5x6'.*Did you mean.*branch5x5'"):
        recorded(model, "inception3a.branch5x6", images)


def test_a_name_that_never_ran_is_an_error(model, images):
    with pytest.raises(RuntimeError, match=r"never ran.*aux1.*training mode"):
        recorded(model, ["conv1", "aux1"], images)
    again = recorded(model.train(), "aux1", images, training=True)
    assert again["aux1"].shape == (2, 5)


@pytest.mark.parametrize("reduce", [None, lambda _, maps: maps])
def test_a_module_used_twice_in_a_forward_pass_is_an_error(reduce):
    with pytest.raises(RuntimeError, match="'layer' ran twice"):
        recorded(Twice().eval(), "layer", torch.zeros(1, 3), reduce=reduce)


def test_two_forward_passes_need_reduce(model, images):
    with pytest.raises(RuntimeError, match="'conv1' ran twice"):
        recorded(model, "conv1", images, images)


@pytest.mark.parametrize("names", [["conv1", "inception5b"], ["conv1", ""]])
def test_reduce_runs_over_any_number_of_forward_passes(model, images, names):
    batches = [images, images[:1] + 1, images - 1]
    states = recorded(
        model, names, *batches, reduce=lambda state, maps: [*(state or []), maps.double().sum()]
    )
    for name in names:
        direct = [recorded(model, name, batch)[name].double().sum() for batch in batches]
        assert states[name] == direct
        assert len(set(direct)) == 3


def test_reduce_goes_on_from_a_recording_before(model, images):
    def count(state, maps):
        return (state or 0) + len(maps)

    with record(model, "conv1", reduce=count) as first:
        model(images)
    with record(model, ["conv1", "fc"], reduce=count, start=first) as second:
        model(images)
    assert dict(first) == {"conv1": len(images)}
    assert dict(second) == {"conv1": 2 * len(images), "fc": len(images)}


def test_reduce_keeps_no_maps(model, images):
    outputs, alive = [], []

    def remember(_module, _inputs, output):
        outputs.append(weakref.ref(output.untyped_storage()))  # however it is viewed

    def mean(state, maps):
        return (0 if state is None else state) + maps.mean((0, 2, 3))

    own = model.conv1.register_forward_hook(remember)
    with torch.no_grad(), record(model, "conv1", reduce=mean) as sums:
        for _ in range(3):
            model(images)
            alive.append(sum(ref() is not None for ref in outputs))
    own.remove()
    assert len(outputs) == 3
    assert alive == [0, 0, 0]
    assert sums["conv1"].shape == (6,)


def test_maps_are_detached(model, images):
    with record(model, "conv1") as maps:
        assert model(images).requires_grad
    assert not maps["conv1"].requires_grad
    assert maps["conv1"].grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_maps_are_cast(model, images, dtype):
    plain = recorded(model, "conv1", images)["conv1"]
    assert plain.dtype == torch.float32
    cast = recorded(model, "conv1", images, dtype=dtype)["conv1"]
    assert cast.dtype == dtype
    assert torch.equal(cast, plain.to(dtype))


def test_maps_are_moved(model, images):
    moved = recorded(model, "conv1", images, device="meta")["conv1"]
    assert moved.device.type == "meta"
    assert moved.shape == recorded(model, "conv1", images)["conv1"].shape


@pytest.mark.parametrize("clone", [False, True])
def test_maps_are_copied_only_on_request(model, images, clone):
    places = []
    own = model.conv1.register_forward_hook(lambda *call: places.append(call[-1].data_ptr()))
    maps = recorded(model, "conv1", images, clone=clone)
    own.remove()
    assert (maps["conv1"].data_ptr() == places[0]) is not clone


@pytest.fixture(scope="module")
def torchvision_network():
    from torchvision.models import googlenet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return googlenet(aux_logits=False, init_weights=False, num_classes=5).eval()


def test_maps_overwritten_in_place_are_noticed_when_read(torchvision_network, images):
    names = ["inception3a.branch1.bn", "inception3a.branch1.conv"]
    maps = recorded(torchvision_network, names, images)
    with pytest.raises(RuntimeError, match=r"overwritten in place.*clone=True"):
        maps["inception3a.branch1.bn"]
    with pytest.raises(RuntimeError, match="overwritten in place"):
        dict(maps)
    unit = torchvision_network.inception3a.branch1
    true = unit.bn(maps["inception3a.branch1.conv"]).detach()  # the convolution's was not touched
    copied = recorded(torchvision_network, names, images, clone=True)["inception3a.branch1.bn"]
    assert torch.equal(copied, true)
    assert copied.min() < 0


def test_a_cast_is_a_copy_already(torchvision_network, images):
    name = "inception3a.branch1.bn"
    cast = recorded(torchvision_network, name, images, dtype=torch.float64)[name]
    assert torch.equal(cast, recorded(torchvision_network, name, images, clone=True)[name].double())


def test_inference_mode_records_too(model, images):
    with torch.inference_mode(), record(model, "conv1") as maps:
        model(images)
    assert torch.equal(maps["conv1"], recorded(model, "conv1", images)["conv1"])


def test_a_compiled_model_is_refused(model, images):
    with pytest.raises(ValueError, match=r"compiled.*_orig_mod"):
        recorded(torch.compile(model), "conv1", images)
    assert hooks(model) == 0


def test_an_output_that_is_no_tensor_is_an_error(model, images):
    with pytest.raises(RuntimeError, match="GoogLeNetOutput, not one tensor"):
        recorded(model.train(), "", images, training=True)


def test_a_name_that_was_not_asked_for_is_an_error(model, images):
    maps = recorded(model, ["conv2", "conv1"], images)
    assert list(maps) == ["conv1", "conv2"]  # as they ran
    with pytest.raises(KeyError, match="'fc' was not recorded; recorded: conv1, conv2"):
        maps["fc"]


def test_observe_tells_every_call_in_the_order_of_execution():
    twice, calls = Twice(), []
    with observe(twice, ["", "layer"], lambda *call: calls.append(call)):
        result = twice(torch.ones(1, 3))
    assert [name for name, *_ in calls] == ["layer", "layer", ""]
    (_, module, inputs, first), (_, _, [second_input], second), (_, _, _, output) = calls
    assert module is twice.layer
    assert torch.equal(inputs[0], torch.ones(1, 3))
    assert second_input is first
    assert second is output is result


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_every_module_gets_its_own_mode_back(model, training, error):
    model.train()
    model.inception3a.eval()
    modes = [module.training for module in model.modules()]

    def block():
        with in_mode(model, training):
            assert {module.training for module in model.modules()} == {training}
            if error:
                raise error

    if error:
        with pytest.raises(error):
            block()
    else:
        block()
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_one_branch_does_not_keep_its_whole_module(model, images):
    name = "inception3a.branch5x5"
    with record(model, name) as maps:
        model(images)
    kept = maps[name]
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_a_model_compiled_in_place_is_refused(images):
    model = gl.googlenet(width=0.1).eval()
    model.compile()
    with pytest.raises(ValueError, match="compiled"), record(model, "conv1"):
        model(images)


@pytest.mark.parametrize("recorded", ["module", "branches"])
def test_a_channel_by_its_index_in_the_branch_or_in_the_module(recorded):
    model = gl.googlenet(width=0.1, seed=0).eval()
    names = ["inception3a"] if recorded == "module" else gl.branch_names(model)[:4]
    with torch.no_grad(), gl.record(model, names) as maps, gl.record(model, "inception3a") as whole:
        model(torch.randn(2, 3, 64, 64))
    for branch, channels in model.inception3a.branch_slices.items():
        for index in (0, channels.stop - channels.start - 1):
            expected = whole["inception3a"][:, channels.start + index]
            assert torch.equal(maps.channel(f"inception3a.{branch}", index), expected)
            assert torch.equal(maps.channel("inception3a", channels.start + index), expected)
    last = model.inception3a.out_channels - 1
    for name, count in (("inception3a", last), ("inception3a.branch5x5", 3)):
        for index in (count + 1, -1):
            with pytest.raises(
                IndexError, match=f"channel {index} of '{name}' asked.* 0 to {count}"
            ):
                maps.channel(name, index)


def test_a_channel_of_what_was_not_recorded():
    model = gl.googlenet(width=0.1, seed=0).eval()
    with gl.record(model, ["conv2", "inception3a.branch1x1"]) as maps:
        model(torch.randn(1, 3, 64, 64))
    assert torch.equal(maps.channel("conv2", 2), maps["conv2"][:, 2])
    for name, index in (("inception3a", 9), ("inception3a.branch3x3", 0), ("conv1", 0)):
        with pytest.raises(KeyError, match="was not recorded; recorded: conv2, inception3a"):
            maps.channel(name, index)


def test_training_mode_is_refused_unless_asked_for():
    model = gl.googlenet("torchvision", width=0.1, aux=False, seed=0)
    with pytest.raises(ValueError, match=r"in training mode.*model\.eval\(\)"):
        gl.record(model, "conv1").__enter__()
    before = model.conv1.bn.running_mean.clone()
    with gl.record(model, "conv1", training=True) as maps:
        model(torch.randn(2, 3, 64, 64))
    assert "conv1" in maps
    assert not torch.equal(model.conv1.bn.running_mean, before)


def test_channels_last_and_autocast_are_recorded_as_they_are():
    model = gl.googlenet(width=0.1, seed=0).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    name = "inception4a.branch5x5"
    with torch.no_grad(), gl.record(model, name) as plain:
        model(images)
    last = images.contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    with torch.no_grad(), gl.record(model, name) as maps:
        model(last)
    assert maps[name].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(maps[name], plain[name], rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), gl.record(model, name) as maps:
        model(last)
    assert maps[name].dtype == torch.bfloat16
    scale = float(plain[name].abs().max())
    torch.testing.assert_close(maps[name].float(), plain[name], rtol=0.1, atol=0.05 * scale)
