"""An Inception module as one convolution, counted and computed by second routes; never how fast."""

import math
import warnings

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gnetlab as gl
from gnetlab.measure import sparsity
from gnetlab.measure.sparsity import (
    as_one_convolution,
    break_even,
    csr_ratios,
    output_difference,
    sparse_speed,
    structure,
    two_of_four,
)  # fmt: skip

COLUMNS = [
    "form", "stage", "zeros", "sparsity", "dtype", "macs", "seconds", "iqr", "runs", "device",
    "threads", "batch_size", "ratio",
]  # fmt: skip


def naive(**changes):
    return gl.googlenet("naive", aux=False, width=0.1, seed=0, **changes)


@pytest.fixture(scope="module")
def meta():
    with torch.device("meta"):
        return gl.googlenet("naive", aux=False)


@pytest.mark.parametrize("stage", ["3a", "4c", "5b"])
def test_one_convolution_equals_the_branches(stage):
    module = getattr(naive(), f"inception{stage}").double().eval()
    one = as_one_convolution(module)
    images = torch.rand(2, one.in_channels, 9, 7, dtype=torch.float64)
    apart = [module.branch1x1(images), module.branch3x3(images), module.branch5x5(images)]
    torch.testing.assert_close(F.relu(one(images)), torch.cat(apart, dim=1), rtol=0, atol=1e-12)
    assert output_difference(module.float()) <= 1e-5


def test_batch_norm_is_folded_and_left_as_it_was():
    module = naive(norm="batch").inception3a.double()
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3)
            layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    one = as_one_convolution(module)
    assert output_difference(module) <= 1e-12
    assert module.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    images = torch.rand(1, one.in_channels, 8, 8, dtype=torch.float64)
    apart = module.eval()(images)[:, : one.out_channels]
    torch.testing.assert_close(F.relu(one(images)), apart, rtol=0, atol=1e-12)


def test_zeros_lie_around_the_smaller_kernels():
    module = naive().inception3a
    weight = as_one_convolution(module).weight
    n1, n3 = module.branch1x1.conv.out_channels, module.branch3x3.conv.conv.out_channels
    assert torch.equal(weight[:n1, :, 2:3, 2:3], module.branch1x1.conv.weight)
    assert torch.equal(weight[n1 : n1 + n3, :, 1:4, 1:4], module.branch3x3.conv.conv.weight)
    assert torch.equal(weight[n1 + n3 :], module.branch5x5.conv.conv.weight)
    own = sum(p.numel() for name, p in module.named_parameters() if name.endswith("weight"))
    assert weight.count_nonzero() == own


def test_output_difference_sees_a_misplaced_branch(monkeypatch):
    right = sparsity.as_one_convolution

    def swapped(module):
        one = right(module)
        one.weight.data = one.weight.data.roll(1, dims=0)
        return one

    monkeypatch.setattr(sparsity, "as_one_convolution", swapped)
    assert output_difference(naive().inception3a) > 0.1


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (lambda: gl.googlenet("paper", width=0.1).inception3a, "a 1x1; a 1x1, then 3x3; a 1x1"),
        (lambda: naive(branch5x5="3x3").inception3a, "a 1x1; a 3x3; a 3x3"),
        (lambda: naive(branch5x5="3x3+3x3").inception3a, "a 1x1; a 3x3; a 3x3, then 3x3"),
        (lambda: nn.Conv2d(1, 1, 1), "Conv2d with no branches"),
    ],
)
def test_other_modules_are_refused_by_name(module, found):
    with pytest.raises(ValueError, match=r"googlenet\('naive'\)") as error:
        as_one_convolution(module())
    assert found in str(error.value)


def test_structure_of_a_reduced_network_is_refused():
    with pytest.raises(ValueError, match="Inception with a 1x1; a 1x1, then 3x3"):
        structure(gl.googlenet("paper", aux=False, width=0.1))


def test_structure_is_as_counted_by_hand(meta):
    frame = structure(meta)
    assert list(frame.columns) == [
        "module", "stage", "branch", "nonzero", "weights", "sparsity", "macs_branch", "macs_dense",
    ]  # fmt: skip
    assert frame.index.equals(pd.RangeIndex(27))
    assert frame.stage.unique().tolist() == ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    # 3a: 192 channels in, 64 1x1, 128 3x3 and 32 5x5 filters, 28 x 28 positions
    first = frame[:3].set_index("branch")
    assert first.nonzero.to_dict() == {
        "1x1": 192 * 64, "3x3": 192 * 128 * 9, "5x5": 192 * 32 * 25,
    }  # fmt: skip
    assert first.weights.to_dict() == {name: 192 * n * 25 for name, n in
                                       (("1x1", 64), ("3x3", 128), ("5x5", 32))}  # fmt: skip
    assert first.sparsity.to_dict() == pytest.approx({"1x1": 24 / 25, "3x3": 16 / 25, "5x5": 0})
    assert first.macs_branch.tolist() == [28 * 28 * n for n in first.nonzero]


def test_structure_agrees_with_other_counters(meta):
    frame = structure(meta).groupby("stage")[["macs_branch", "macs_dense"]].sum()
    costs = gl.layer_costs(meta)
    branches = costs[costs.branch.isin(["1x1", "3x3", "5x5"])].groupby("stage").macs.sum()
    assert frame.macs_branch.to_dict() == branches.to_dict()
    one = nn.Conv2d(3344, 256 + 320 + 128, 5, padding=2, bias=False, device="meta")  # 5a
    with FlopCounterMode(display=False) as counter:
        one(torch.empty(1, 3344, 7, 7, device="meta"))
    assert frame.macs_dense["5a"] == counter.get_total_flops() // 2


@pytest.fixture(scope="module")
def speed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return sparse_speed(
            naive(), ["3a", "5a"], sparsities=[0.9, 0.5], batch_sizes=[1, 3], rounds=2
        )


def test_speed_frame_is_as_documented(speed):
    assert list(speed.columns) == COLUMNS
    assert speed.index.equals(pd.RangeIndex(32))
    one = speed[(speed.stage == "5a") & (speed.batch_size == 3)]
    assert [*zip(one.form, one.zeros, strict=True)] == [
        ("dense 5x5", "none"), ("dense (im2col)", "none"), ("Inception branches", "structural"),
        *[("CSR (im2col)", "random"), ("CSR (matmul only)", "random")] * 2,
        ("CSR (im2col)", "structural"),
    ]  # fmt: skip
    assert one.sparsity[3:7].tolist() == [0.9, 0.9, 0.5, 0.5]
    assert (speed.seconds > 0).all()
    assert (speed.iqr >= 0).all()
    assert (speed.runs >= 2).all()
    assert (speed.device == "cpu").all()
    assert (speed.dtype == "float32").all()  # 2:4 needs CUDA
    assert (speed.threads == torch.get_num_threads()).all()
    for _, rows in speed.groupby(["stage", "batch_size"]):
        dense = rows.seconds[rows.form == "dense 5x5"].item()
        assert rows.ratio.tolist() == pytest.approx([s / dense for s in rows.seconds])


def test_speed_counts_the_operations_that_are_needed(speed):
    counted = structure(naive()).groupby("stage")[["macs_branch", "macs_dense"]].sum()
    for (stage, batch), rows in speed.groupby(["stage", "batch_size"]):
        macs = rows.groupby(["form", "zeros"]).macs.min()
        branch, dense = counted.loc[stage] * batch
        assert macs["dense 5x5", "none"] == macs["dense (im2col)", "none"] == dense
        assert macs["Inception branches", "structural"] == branch
        assert macs["CSR (im2col)", "structural"] == branch
        random = rows[rows.zeros == "random"]
        assert (random.macs / dense).tolist() == pytest.approx((1 - random.sparsity).tolist(), 0.1)


def test_csr_and_im2col_give_the_convolution():
    weight = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.8] = 0
    csr = sparsity._csr(weight)
    assert csr.layout == torch.sparse_csr
    assert csr.values().numel() == weight.count_nonzero()
    images = torch.rand(2, 3, 8, 6, dtype=torch.float64)
    output = (csr @ sparsity._columns(images)).view(6, 2, 8, 6).transpose(0, 1)
    torch.testing.assert_close(output, F.conv2d(images, weight, padding=2), rtol=0, atol=1e-12)


def test_the_same_seed_gives_the_same_zeros():
    weights = [sparsity._weights(naive().inception3a, [0.9], seed) for seed in (0, 0, 1)]
    first, again, other = (matrices["random", 0.9].to_dense() for _, matrices in weights)
    assert torch.equal(first, again)
    assert not torch.equal(first != 0, other != 0)


def test_measuring_leaves_the_model_and_the_random_state_alone():
    model, before = naive().double(), torch.get_rng_state()
    weight = model.inception3a.branch1x1.conv.weight.clone()
    sparse_speed(model, ["3a"], sparsities=[0.99], rounds=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.inception3a.branch1x1.conv.weight, weight)  # double still
    assert model.inception3a.training


def test_a_form_with_another_output_is_not_timed(monkeypatch):
    right = sparsity._columns
    monkeypatch.setattr(sparsity, "_columns", lambda images: right(images).roll(1, dims=0))
    with pytest.raises(RuntimeError, match=r"dense \(im2col\) at 0% zeros differs .* try another"):
        sparse_speed(naive(), ["3a"], rounds=1)


def test_a_form_that_is_not_a_number_is_not_timed():
    form = sparsity._Form("broken", "none", 0.0, 1, lambda: torch.full((1, 1, 2, 2), math.nan))
    with pytest.raises(RuntimeError, match="broken"):
        sparsity._checked(form, torch.ones(1, 1, 2, 2))


def test_meta_modules_get_weights_from_the_seed():
    with torch.device("meta"):
        module = gl.googlenet("naive", aux=False, width=0.1).inception3a
    filled = [sparsity._filled(module, seed).branch1x1.conv.weight for seed in (0, 0, 1)]
    assert torch.equal(filled[0], filled[1])
    assert not torch.equal(filled[0], filled[2])
    assert module.branch1x1.conv.weight.is_meta
    assert output_difference(module) <= 1e-5


def test_unknown_stage_lists_the_known():
    with pytest.raises(ValueError, match=r"'2a' asked; choose from 3a, 3b"):
        sparse_speed(naive(), ["2a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": []}, "no stage asked; choose from 3a, 3b"),
        ({"sparsities": [0.5, 1.5]}, r"sparsities=\[0.5, 1.5\] asked; give shares of zeros"),
        ({"sparsities": [math.nan]}, r"sparsities=\[nan\] asked"),
        ({"rounds": 0}, "rounds=0, .* asked; give at least 1 round"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes=\[1, 0\] asked; .* batch sizes of at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_speed(naive(), **({"stages": ["3a"]} | options))


def test_nothing_but_zeros_is_a_form_too():
    frame = sparse_speed(naive(), ["5a"], sparsities=[1.0], rounds=1)
    assert frame[frame.zeros == "random"].macs.tolist() == [0, 0]
    form = sparsity._Form("not zero", "random", 1.0, 0, lambda: torch.ones(1, 1, 2, 2))
    with pytest.raises(RuntimeError, match="not zero at 100% zeros differs"):
        sparsity._checked(form, torch.zeros(1, 1, 2, 2))


def test_two_of_four_keeps_the_larger_two():
    matrix = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    pruned = two_of_four(matrix).view(-1, 4)
    for kept, all_four in zip(pruned, matrix.view(-1, 4), strict=True):
        larger = sorted(all_four.abs().tolist())[2:]
        assert sorted(kept.abs().tolist()) == pytest.approx([0, 0, *larger])
        assert set(kept.tolist()) <= {0.0, *all_four.tolist()}


@pytest.mark.gpu
def test_two_to_four_on_sparse_tensor_cores():
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs compute capability 8.0")
    with torch.device("meta"):
        model = gl.googlenet("naive", aux=False)
    frame = sparse_speed(model, ["3a"], sparsities=[0.9], device="cuda", rounds=2)
    half = frame[frame.dtype == "float16"].set_index("form")
    assert list(half.index) == ["dense 5x5", "2:4 (im2col)"]
    assert half.macs["2:4 (im2col)"] * 2 == half.macs["dense 5x5"]
    assert half.ratio["dense 5x5"] == 1


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({0.5: 3.0, 0.9: 1.2, 0.99: 0.4}, 0.99),
        ({0.99: 0.4, 0.9: 0.9, 0.5: 3.0}, 0.9),
        ({0.5: 0.9, 0.9: 1.2, 0.99: 0.4}, 0.99),  # faster at 50% by chance: not from there on
        ({0.5: 0.5, 0.9: 0.4, 0.99: 0.1}, 0.5),
        ({0.5: 3.0, 0.9: 2.0, 0.99: 1.0}, None),
    ],
)
def test_break_even_is_where_csr_stays_faster(ratios, expected):
    rows = [("CSR (im2col)", "4a", 8, "random", s, 2 * ratio) for s, ratio in ratios.items()]
    rows += [("CSR (im2col)", "4a", 8, "structural", 0.01, 0.1)]
    rows += [("CSR (matmul only)", "4a", 8, "random", 0.02, 0.1)]
    rows += [
        (form, "4a", 8, "none", 0.0, s) for form, s in (("dense 5x5", 9), ("dense (im2col)", 2))
    ]
    columns = ["form", "stage", "batch_size", "zeros", "sparsity", "seconds"]
    frame = pd.DataFrame(rows, columns=columns).assign(dtype="float32")
    half = frame[frame.zeros == "none"].assign(dtype="float16", seconds=0.1)  # another arithmetic
    frame = pd.concat([frame, half])
    assert break_even(frame) == {("4a", 8): expected}
    found = csr_ratios(frame)
    assert dict(zip(found.sparsity, found.ratio, strict=True)) == pytest.approx(ratios)
