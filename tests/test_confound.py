"""Networks that differ in kernel or width alone, and the effects planted in a frame."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from gnetlab.measure import confound
from gnetlab.measure.specialization import channel_selectivity, outputs
from gnetlab.measure.sweeps import closed_form
from gnetlab.net.architecture import MODULES
from gnetlab.net.data import PhotoCrops
from gnetlab.net.weights import calibrate_batch_norm


def test_variants_differ_only_in_what_they_should():
    variants = {
        (kernel, layout): confound._variant(kernel, layout, 0.25, 16)
        for kernel, layout in itertools.product(confound.KERNELS, confound.LAYOUTS)
    }
    shapes = {}
    for key, arch in variants.items():
        with torch.device("meta"):
            model = confound.build(arch)
        shapes[key] = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert (
            sum(np.prod(s) for s in shapes[key].values()) == closed_form(arch, 32).parameters.sum()
        )
    for kernel, layout in variants:
        one, other = shapes[kernel, layout], shapes["3x3", layout]
        differing = {n for n in one.keys() | other.keys() if one.get(n) != other.get(n)}
        assert all(".branch5x5.conv" in name for name in differing)
        assert bool(differing) == (kernel != "3x3")
        old, new = variants[kernel, "paper"], variants[kernel, "equal"]
        for stage in MODULES:
            assert sum(outputs(old.module_widths(stage)).values()) == sum(
                outputs(new.module_widths(stage)).values()
            )
            assert len(set(outputs(new.module_widths(stage)).values())) == 1
        assert [r for r in shapes[kernel, "paper"].items() if "inception" not in r[0]] == [
            r for r in shapes[kernel, "equal"].items() if "inception" not in r[0]
        ]
    costs = [closed_form(variants["5x5", layout], 32).macs.sum() for layout in confound.LAYOUTS]
    assert costs[1] / costs[0] == pytest.approx(1, abs=0.02)
    full = [
        closed_form("paper", modules=modules).query("stage in @MODULES").groupby("stage").macs.sum()
        for modules in (None, confound.equal_widths())
    ]
    assert (full[1] / full[0] - 1).abs().max() < 0.01


def test_confound_frame():
    data = PhotoCrops(size=32, test_size=32)
    frame = confound.branch_confound(
        data, seeds=[3], steps=2, kernels=["5x5"], width=0.1, size=32, batch_size=8,
        progress=False,
    )  # fmt: skip
    assert list(frame.columns) == [
        "kernel", "layout", "seed", "trained", "property", "advantage", "accuracy", "parameters",
        "share",
    ]  # fmt: skip
    assert len(frame) == 2 * 2 * 3
    assert frame.accuracy.isna().equals(~frame.trained)
    assert frame.groupby("layout").share.first().to_dict() == pytest.approx(
        {"equal": 0.25, "paper": 0.14}, abs=0.02
    )
    before, after = (frame[frame.trained == trained].advantage for trained in (False, True))
    assert (before.to_numpy() != after.to_numpy()).all()


def test_before_training_batch_norm_is_set_from_a_batch():
    data = PhotoCrops(size=32, test_size=16)
    options = {"seeds": [1], "steps": 1, "kernels": ["3x3"], "layouts": ["paper"], "width": 0.1}
    frame = confound.branch_confound(data, size=32, batch_size=2, progress=False, **options)
    model = confound.build(confound._variant("3x3", "paper", 0.1, 16), init="kaiming", seed=1)
    calibrate_batch_norm(model, data.train_batch(0, 64, 1)[0])
    selectivity = channel_selectivity(model, size=32)
    expected = dict(confound._advantages(selectivity, ("3a", "3b", "4a")))
    before = frame[~frame.trained].set_index("property").advantage
    assert before.to_dict() == pytest.approx(expected)


def test_confound_asks_for_known_names():
    with pytest.raises(ValueError, match="kernels="):
        confound.branch_confound(None, seeds=[0], steps=1, kernels=["7x7"])
    with pytest.raises(ValueError, match="no seeds"):
        confound.branch_confound(None, seeds=[], steps=1)


def test_advantage_by_hand():
    values = {"1x1": [0.1, 0.3], "3x3": [0.4], "5x5": [0.7, 0.9], "pool": [0.0]}
    rows = [("3a", branch, v) for branch, each in values.items() for v in each]
    frame = pd.DataFrame(rows, columns=["stage", "branch", "orientation"])
    frame = frame.assign(scale=frame.orientation, colour=np.nan)
    found = dict(confound._advantages(frame, ["3a"]))
    assert found["orientation"] == pytest.approx(0.8 - (0.2 + 0.4 + 0.0) / 3)
    assert np.isnan(found["colour"])


def planted(seeds):
    """Trained, the 5x5 kernel adds 0.2 and the paper's widths 0.1; before, nothing does."""
    random = np.random.default_rng(0)
    keys = itertools.product(("5x5", "3x3"), confound.LAYOUTS, range(seeds), (False, True),
                             confound.PROPERTIES)  # fmt: skip
    rows = [
        (*key, key[3] * (0.2 * (key[0] == "5x5") + 0.1 * (key[1] == "paper"))
         + random.normal(scale=0.03))
        for key in keys
    ]  # fmt: skip
    return pd.DataFrame(
        rows, columns=["kernel", "layout", "seed", "trained", "property", "advantage"]
    )


def test_effects_are_those_planted_with_student_intervals():
    frame = planted(12)
    effects = confound.confound_effects(frame)
    assert list(effects.columns) == [
        "factor", "contrast", "at", "trained", "property", "effect", "low", "high", "seeds",
    ]  # fmt: skip
    trained = effects[effects.trained].groupby("factor").effect
    assert trained.min().kernel == pytest.approx(0.2, abs=0.04)
    assert trained.max().kernel == pytest.approx(0.2, abs=0.04)
    assert trained.mean().width == pytest.approx(0.1, abs=0.03)
    assert effects[~effects.trained].effect.abs().max() < 0.05
    assert effects.seeds.eq(12).all()
    row = effects[effects.trained & (effects["at"] == "equal widths")].iloc[0]
    part = frame[frame.trained & (frame.layout == "equal") & (frame.property == row.property)]
    one, other = (part[part.kernel == k].advantage.to_numpy() for k in ("5x5", "3x3"))
    interval = scipy.stats.ttest_rel(one, other).confidence_interval()
    assert (row.low, row.high) == pytest.approx(tuple(interval))


def test_effects_of_a_single_seed_have_no_interval_and_of_one_variant_none():
    effects = confound.confound_effects(planted(1))
    assert effects[["low", "high"]].isna().all(axis=None)
    assert effects.effect.notna().all()
    frame = planted(2)
    with pytest.raises(ValueError, match="run two kernels"):
        confound.confound_effects(frame[(frame.kernel == "5x5") & (frame.layout == "paper")])
