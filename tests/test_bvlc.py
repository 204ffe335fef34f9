"""BVLC's weights, from ONNX files that are made here with the model zoo's names."""

import dataclasses
import sys

import numpy as np
import pytest
import torch

from gnetlab.measure.costs import layer_costs
from gnetlab.net import bvlc
from gnetlab.net.architecture import PRESETS
from gnetlab.net.data import normalize, open_image, preprocess
from gnetlab.net.fuse import fuse
from gnetlab.net.model import InputTransform, googlenet
from gnetlab.net.weights import find, read_checkpoint, saved_architecture

BGR_MEAN = torch.tensor([104.0, 117.0, 123.0]).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def onnx():
    return pytest.importorskip("onnx", reason="needs the extra gnetlab[onnx]")


def zoo_layers(model):
    """The file's names -> our layers, written out rather than computed as the reader does."""
    layers = {
        "conv1/7x7_s2": model.conv1,
        "conv2/3x3_reduce": model.conv2_reduce,
        "conv2/3x3": model.conv2,
    }
    for stage in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"):
        module = getattr(model, f"inception{stage}")
        layers |= {
            f"inception_{stage}/1x1": module.branch1x1,
            f"inception_{stage}/3x3_reduce": module.branch3x3.reduce,
            f"inception_{stage}/3x3": module.branch3x3.conv,
            f"inception_{stage}/5x5_reduce": module.branch5x5.reduce,
            f"inception_{stage}/5x5": module.branch5x5.conv,
            f"inception_{stage}/pool_proj": module.branch_pool.proj,
        }
    return {name: unit.conv for name, unit in layers.items()} | {"loss3/classifier": model.fc}


def zoo_arrays(model):
    arrays = {"OC2_DUMMY_1": np.array([0, 1024])}  # the zoo's shape for Reshape
    for name, layer in zoo_layers(model).items():
        arrays[f"{name}_w_0"] = layer.weight.detach().numpy()
        arrays[f"{name}_b_0"] = layer.bias.detach().numpy()
    return arrays


def write(onnx, path, arrays, nodes=(), inputs=(), outputs=()):
    initializers = [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph(list(nodes), "made here", inputs, outputs, initializers)
    opset = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def caffes(model, pixels):
    """Logits as Caffe has them: BGR, 0..255, mean subtracted, conv1's kernels in BGR."""
    with torch.no_grad():
        return model(pixels.float()[:, [2, 1, 0]] - BGR_MEAN)


def random_network(**options):
    """The paper's network of random weights and biases whose logits are of order 1."""
    model = googlenet("paper", aux=False, init="kaiming", seed=0, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # Inputs reach 255 and so do maps: LRN counts, as in the trained network.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def original():
    return random_network()


@pytest.fixture(scope="module")
def file(onnx, original, tmp_path_factory):
    path = tmp_path_factory.mktemp("zoo") / "googlenet-12.onnx"
    return write(onnx, path, zoo_arrays(original))


def pixels(side, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


# --- what is loaded ---------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["path", "string", "prefix"])
def test_logits_are_those_of_caffe_for_the_images_that_every_network_takes(original, file, route):
    given = {"path": file, "string": str(file), "prefix": f"bvlc:{file}"}[route]
    model = googlenet(weights=given).eval()
    x = pixels(96)
    expected = caffes(original, x)
    assert expected.std() > 0.1
    with torch.no_grad():
        found = model(normalize(x))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_network_is_the_papers_and_says_whose_weights_it_has(file):
    model = googlenet(weights=file)
    expected = PRESETS["paper"].change(heads=(), transform_input="caffe")
    assert model.architecture == expected
    assert model.weights_note == "BVLC GoogLeNet weights (the paper's network, true 5x5)"
    assert (len(model.classes), model.classes[281]) == (1000, "tabby")
    assert sum(p.numel() for p in model.parameters()) == 6_998_552
    assert saved_architecture(dataclasses.asdict(expected), "run.pt") == expected


def test_every_weight_is_at_its_place_and_conv1_sees_rgb(original, file):
    state = read_checkpoint(file).state
    assert state.keys() == original.state_dict().keys()
    for name, value in original.state_dict().items():
        expected = value[:, [2, 1, 0]] if name == "conv1.conv.weight" else value
        assert torch.equal(state[name], expected), name


def test_caffes_input_is_0_to_255_less_the_mean():
    colours = torch.tensor([[255.0, 0.0, 10.0], [123.0, 117.0, 104.0]])[..., None, None]
    seen = InputTransform("caffe")(normalize(colours)).flatten(1)
    expected = torch.tensor([[132.0, -117.0, -94.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-3)
    torchvisions = InputTransform(True)(normalize(torch.full((1, 3, 1, 1), 255.0)))
    torch.testing.assert_close(torchvisions.flatten(), torch.ones(3))
    with pytest.raises(ValueError, match=r"transform_input='coffee' asked; choose.*'caffe'"):
        InputTransform("coffee")


def test_the_rest_of_the_package_takes_the_network(file):
    model = googlenet(weights=file).eval()
    x = preprocess(open_image("cat").pixels, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fuse(model)(x), expected, rtol=1e-3, atol=1e-3)
    assert layer_costs(model).macs.sum() == 1_582_671_872


# --- the conventions of its layers, against ONNX's own evaluator ------------------------------


def zoo_graph(onnx, model):
    """BVLC's layers up to inception_3a's output, as the zoo's file has them."""
    node, nodes = onnx.helper.make_node, []

    def add(kind, inputs, output, **attributes):
        nodes.append(node(kind, inputs, [output], **attributes))
        return output

    def conv(x, name):
        kernel, stride = model[name].kernel_size[0], model[name].stride[0]
        inputs = [x, f"{name}_w_0", f"{name}_b_0"]
        options = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
        x = add("Conv", inputs, f"{name}_1", pads=[kernel // 2] * 4, **options)
        return add("Relu", [x], f"{name}_2")

    def pool(x, output, stride, pads):  # Caffe's ceil mode is a pad at the end
        options = {"kernel_shape": [3, 3], "strides": [stride] * 2}
        return add("MaxPool", [x], output, pads=pads, **options)

    def lrn(x, output):
        return add("LRN", [x], output, alpha=1e-4, beta=0.75, bias=1.0, size=5)

    x = lrn(
        pool(conv("data_0", "conv1/7x7_s2"), "pool1/3x3_s2_1", 2, [0, 0, 1, 1]), "pool1/norm1_1"
    )
    x = lrn(conv(conv(x, "conv2/3x3_reduce"), "conv2/3x3"), "conv2/norm2_1")
    x = pool(x, "pool2/3x3_s2_1", 2, [0, 0, 1, 1])
    branches = [
        conv(x, "inception_3a/1x1"),
        conv(conv(x, "inception_3a/3x3_reduce"), "inception_3a/3x3"),
        conv(conv(x, "inception_3a/5x5_reduce"), "inception_3a/5x5"),
        conv(pool(x, "inception_3a/pool_1", 1, [1] * 4), "inception_3a/pool_proj"),
    ]
    add("Concat", branches, "inception_3a/output_1", axis=1)
    return nodes


def caffes_lrn():
    """LRN after Caffe's and ONNX's definition; the evaluator's own sums only the first channels."""
    from onnx.reference.op_run import OpRun

    class LRN(OpRun):
        def _run(self, x, alpha=None, beta=None, bias=None, size=None):
            squares, channels = x.astype(np.float64) ** 2, range(x.shape[1])
            sums = [squares[:, max(0, c - size // 2) : c + size // 2 + 1].sum(1) for c in channels]
            scale = bias + alpha / size * np.stack(sums, axis=1)
            return ((x / scale**beta).astype(x.dtype),)

    return LRN


def test_the_first_layers_are_those_that_onnx_evaluates(onnx, original, file, tmp_path):
    from onnx.reference import ReferenceEvaluator

    info = onnx.helper.make_tensor_value_info
    image = info("data_0", onnx.TensorProto.FLOAT, [1, 3, 64, 64])
    output = info("inception_3a/output_1", onnx.TensorProto.FLOAT, None)
    nodes = zoo_graph(onnx, zoo_layers(original))
    used = {name for node in nodes for name in node.input}
    arrays = {k: v for k, v in zoo_arrays(original).items() if k in used}
    graph = write(onnx, tmp_path / "part.onnx", arrays, nodes, [image], [output])
    x = pixels(64, 1)
    bgr = (x.float()[:, [2, 1, 0]] - BGR_MEAN).numpy()
    evaluator = ReferenceEvaluator(str(graph), new_ops=[caffes_lrn()])
    (expected,) = evaluator.run(None, {"data_0": bgr})

    y = normalize(x)
    with torch.no_grad():
        for name, step in googlenet(weights=file).eval().named_children():
            y = step(y)
            if name == "inception3a":
                break
    expected = torch.from_numpy(expected)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4 * expected.max().item())


# --- what is refused --------------------------------------------------------------------------


def test_bvlc_without_a_file_says_where_it_comes_from():
    for asked in ("bvlc", "bvlc:", "bvlc:googlenet.pth"):
        with pytest.raises(ValueError, match=f"weights='{asked}' asked; give the path") as caught:
            googlenet(weights=asked)
        assert "https://github.com/onnx/models" in str(caught.value)
        assert "weights='bvlc:googlenet-12.onnx'" in str(caught.value)


@pytest.mark.parametrize("asked", ["bvlc:nowhere.onnx", "nowhere.onnx"])
def test_a_file_that_is_not_there(asked):
    with pytest.raises(FileNotFoundError, match=f"weights='{asked}' asked: no such file"):
        find(asked)


def test_weights_of_other_kinds_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bvlc").touch()  # a checkpoint that happens to be called so
    for name in ("imagenet", "auto", "run.pth", "bvlc", "bvlcish:x.pth"):
        assert bvlc.locate(name) is None


def test_without_the_package_onnx_the_error_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"a\.onnx is an ONNX file.*pip install onnx"):
        googlenet(weights=tmp_path / "a.onnx")


def test_missing_foreign_and_misshapen_initializers_are_named(onnx, original, tmp_path):
    arrays = zoo_arrays(original)
    del arrays["inception_4c/5x5_w_0"]
    arrays["loss1/fc_w_0"] = np.zeros((2, 3), np.float32)
    arrays["inception_9z/1x1_w_0"] = arrays["3x3_w_0"] = np.zeros(1, np.float32)
    arrays["loss3/classifier_b_0"] = np.zeros(10, np.float32)
    with pytest.raises(ValueError, match=r"other\.onnx does not fit this network") as caught:
        googlenet(weights=write(onnx, tmp_path / "other.onnx", arrays))
    text = str(caught.value)
    assert "missing (1): inception4c.branch5x5.conv.conv.weight" in text
    assert "unexpected (3): 3x3_w_0; inception_9z/1x1_w_0; loss1/fc_w_0" in text
    assert "different shape (1): fc.bias: file (10,), network (1000,)" in text


def test_another_preset_is_refused(file):
    with pytest.raises(ValueError, match="belong to preset 'paper', but 'cifar' was asked"):
        googlenet("cifar", weights=file)


def test_a_changed_network_is_refused_with_its_shapes(file):
    with pytest.raises(ValueError, match=r"conv1.conv.bias: file \(64,\), network \(32,\)"):
        googlenet(weights=file, width=0.5)


@pytest.mark.parametrize("spoil", [lambda c: c[: len(c) // 2], lambda _: b"version https://git"])
def test_a_damaged_file_is_refused(onnx, tmp_path, spoil):
    path = write(onnx, tmp_path / "cut.onnx", {"conv1/7x7_s2_w_0": np.zeros(9, np.float32)})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"cut\.onnx cannot be read.*Fetch it again from https"):
        googlenet(weights=path)
