"""Claims: fixed criteria, verdicts that follow from numbers, and what the report reads back."""

import json

import numpy as np
import pytest

from gnetlab.report import claims

DEPTH = {"layers": 22, "macs": 1.5e9, "rows_that_disagree": []}
VGG = {"top1_gain": 1.8, "mac_ratio": 9.8, "parameter_ratio": 19.8, "time_ratio": 6.0}
REDUCTION = {"mac_ratio": 10.0, "final_width_ratio": 4.8, "width_grows": True}
QUADRATIC = {"exponent": 1.94, "module_exponent": 2.0}
EARLY = {"memory_ratio": 1.9, "time_ratio": 1.5, "mac_ratio": 1.1}
LOCAL = {"channel_trend": 0.6, "energy_trend": 0.5}
STAGES = ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
CORRELATED = {"p": dict.fromkeys(STAGES, 0.002), "z": dict.fromkeys(STAGES, 9.0),
              "z_random": dict.fromkeys(STAGES, 1.0), "rand_index": 0.1}  # fmt: skip
SPARSE = {"ratios_90": {"3a": 1.5, "4a": 2.0}, "ratios_99": {"3a": 1.0, "4a": 1.1}}
PARTS = {"difference": 3e-7, "zero_share": 0.59, "speedup": 2.4}


def difference(low, high):
    return {"mean": (low + high) / 2, "low": low, "high": high, "seeds": 5}


REGULAR = {"gap": difference(-0.03, -0.01), "test": difference(-0.01, 0.02), "steps": 2000}


@pytest.mark.parametrize(
    ("claim", "measured", "verdict"),
    [
        ("depth-22", DEPTH, "supported"),
        ("depth-22", DEPTH | {"rows_that_disagree": ["5a"]}, "depends"),
        ("depth-22", DEPTH | {"layers": 21}, "not supported"),
        ("depth-22", DEPTH | {"macs": 1.7e9}, "not supported"),
        ("vgg-cost", VGG, "supported"),
        ("vgg-cost", VGG | {"time_ratio": 4.0}, "depends"),
        ("vgg-cost", VGG | {"mac_ratio": 4.0}, "not supported"),
        ("vgg-cost", VGG | {"top1_gain": 4.0}, "not supported"),
        ("reduction", REDUCTION, "supported"),
        ("reduction", REDUCTION | {"width_grows": False}, "depends"),
        ("reduction", REDUCTION | {"width_grows": False, "mac_ratio": 1.5}, "not supported"),
        ("quadratic", QUADRATIC, "supported"),
        ("quadratic", QUADRATIC | {"exponent": 1.7}, "depends"),
        ("quadratic", QUADRATIC | {"module_exponent": 1.8}, "not supported"),
        ("quadratic", QUADRATIC | {"module_exponent": 2.2}, "not supported"),
        ("higher-only", EARLY, "supported"),
        ("higher-only", EARLY | {"memory_ratio": 1.2}, "depends"),
        ("higher-only", EARLY | {"memory_ratio": 1.0}, "not supported"),
        ("locality", LOCAL, "supported"),
        ("locality", LOCAL | {"channel_trend": 0.4}, "depends"),
        ("locality", LOCAL | {"channel_trend": -0.4, "energy_trend": 0.4}, "not supported"),
        ("correlated", CORRELATED, "supported"),
        (
            "correlated",
            CORRELATED | {"p": CORRELATED["p"] | dict.fromkeys(STAGES[:3], 0.02)},
            "depends",
        ),
        (
            "correlated",
            CORRELATED | {"z_random": dict.fromkeys(STAGES, 10.0)},
            "not supported",
        ),
        ("aux-regularize", REGULAR, "supported"),
        ("aux-regularize", REGULAR | {"test": difference(-0.02, -0.01)}, "depends"),
        ("aux-regularize", REGULAR | {"gap": difference(-0.02, 0.01)}, "not supported"),
        (
            "aux-regularize",
            REGULAR | {"gap": difference(-0.02, 0.01), "test": difference(0.01, 0.02)},
            "depends",
        ),
        (
            "aux-regularize",
            REGULAR | {"gap": difference(0.01, 0.02), "test": difference(-0.02, 0.01)},
            "not supported",
        ),
        ("aux-gradient", {"ratios": {"a": 12.0, "b": 2.0}}, "supported"),
        ("aux-gradient", {"ratios": {"a": 12.0, "b": 1.0}}, "depends"),
        ("aux-gradient", {"ratios": {"a": 1.2, "b": 1.0}}, "not supported"),
        ("sparse-slow", SPARSE, "supported"),
        ("sparse-slow", SPARSE | {"ratios_99": {"3a": 0.6, "4a": 1.1}}, "depends"),
        ("sparse-slow", SPARSE | {"ratios_99": {"3a": 0.6, "4a": 0.3}}, "depends"),
        (
            "sparse-slow",
            {"ratios_90": {"3a": 0.9, "4a": 1.0}, "ratios_99": {"3a": 0.1, "4a": 0.1}},
            "depends",
        ),
        (
            "sparse-slow",
            {"ratios_90": {"3a": 0.9, "4a": 0.8}, "ratios_99": {"3a": 0.1, "4a": 0.1}},
            "not supported",
        ),
        ("dense-parts", PARTS, "supported"),
        ("dense-parts", PARTS | {"speedup": 1.4}, "depends"),
        ("dense-parts", PARTS | {"zero_share": 0.49}, "not supported"),
        ("dense-parts", PARTS | {"difference": 2e-5}, "not supported"),
    ],
)
def test_verdict_follows_from_the_numbers(claim, measured, verdict, tmp_path):
    judged = claims.check(claim, measured, directory=tmp_path)
    assert judged.verdict == verdict
    assert judged.reason


def test_depends_names_the_condition(tmp_path):
    judged = claims.check("depth-22", DEPTH | {"rows_that_disagree": ["5a"]}, directory=tmp_path)
    assert "5a" in judged.reason
    some = SPARSE | {"ratios_99": {"3a": 0.6, "4a": 1.1}}
    judged = claims.check("sparse-slow", some, directory=tmp_path)
    assert judged.reason.startswith("CSR is faster at 99% for (3a); ")
    judged = claims.check("dense-parts", PARTS | {"speedup": 1.4}, directory=tmp_path)
    assert "hardly faster on this device" in judged.reason


def test_what_heads_do_to_the_gradient_is_said_in_few_words(tmp_path):
    ratios = {"a": 12.0, "b": 2.0, "c": 1.25, "d": 0.5}
    escaped = {"escaped_with_heads": 3, "escaped_without_heads": 0, "seeds": 3, "steps": 240}
    judged = claims.check("aux-gradient", {"ratios": ratios, **escaped}, directory=tmp_path)
    assert judged.verdict == "depends"
    assert judged.reason == (
        "in 2 of 4 configurations; 3 of 3 seeds left the plateau in 240 steps with heads, 0 of 3 "
        "without; gradient at conv1 with heads over without, at initialization: (a) 12x; (b) 2x; "
        "in 2 other configurations 0.5x to 1.25x"
    )


def test_intervals_are_in_percentage_points(tmp_path):
    reason = claims.check("aux-regularize", REGULAR, directory=tmp_path).reason
    assert "gap -2.0 [-3.0, -1.0], test accuracy +0.5 [-1.0, +2.0], 5 seeds, 2000 steps" in reason


def test_ratios_that_are_not_finite_are_left_out_and_counted(tmp_path):
    ratios = {"a": 12.0, "b": 1.0, "c": float("nan"), "d": float("inf")}
    judged = claims.check("aux-gradient", {"ratios": ratios}, directory=tmp_path)
    assert judged.verdict == "depends"
    assert judged.reason.startswith("in 1 of 2 configurations")
    assert judged.reason.endswith("not finite in 2 configurations, left out")
    nothing = claims.check("aux-gradient", {"ratios": {"c": float("nan")}}, directory=tmp_path)
    assert nothing.verdict == "not supported"


def test_every_claim_says_where_from_and_by_what():
    for name, claim in claims.CLAIMS.items():
        assert name == claim.id
        assert all([claim.text, claim.source, claim.notebook, claim.criterion, claim.needs])


def test_check_keeps_the_numbers_for_the_report(tmp_path):
    measured = VGG | {"mac_ratio": np.float64(9.8), "extra": np.arange(2)}
    claims.check("vgg-cost", measured, directory=tmp_path, figure="latency")
    folders = {"01_compute_cost": tmp_path, "03_auxiliary_heads": None}
    rows = {row["id"]: row for row in claims.collect(folders)}
    assert list(rows) == list(claims.CLAIMS)
    assert rows["vgg-cost"]["measured"] == VGG | {"mac_ratio": 9.8, "extra": [0, 1]}
    assert rows["vgg-cost"]["figure"] == "latency"
    assert rows["depth-22"]["verdict"] == "not measured"
    assert rows["depth-22"]["reason"] == "the notebook did not get there"
    assert rows["aux-gradient"]["reason"] == "03_auxiliary_heads failed"
    assert rows["sparse-slow"]["reason"] == "04_sparse_vs_dense was not run"


def test_not_measured_needs_a_reason(tmp_path):
    assert claims.check("vgg-cost", None, directory=tmp_path, reason="no GPU").verdict == (
        "not measured"
    )
    with pytest.raises(ValueError, match="reason"):
        claims.check("vgg-cost", None, directory=tmp_path)


def test_unknown_claim_and_missing_numbers(tmp_path):
    with pytest.raises(ValueError, match="Known: depth-22"):
        claims.check("depth-23", DEPTH, directory=tmp_path)
    with pytest.raises(ValueError, match=r"needs macs \(multiply-adds"):
        claims.check("depth-22", {"layers": 22, "rows_that_disagree": []}, directory=tmp_path)
    with pytest.raises(TypeError, match="cannot be kept"):
        claims.check("depth-22", DEPTH | {"extra": object()}, directory=tmp_path)


def test_verdict_is_escaped_in_the_notebook(tmp_path):
    judged = claims.check(
        "depth-22", DEPTH | {"rows_that_disagree": ["<script>"]}, directory=tmp_path
    )
    assert "<script>" not in judged._repr_html_()
    assert "&lt;script&gt;" in judged._repr_html_()


def test_facts_are_kept_as_json(tmp_path):
    claims.facts(directory=tmp_path, weights="random", seeds=np.int64(3))
    assert json.loads((tmp_path / "facts.json").read_text()) == {"weights": "random", "seeds": 3}
    claims.facts(directory=tmp_path, data="crops", seeds=4)
    kept = json.loads((tmp_path / "facts.json").read_text())
    assert kept == {"weights": "random", "seeds": 4, "data": "crops"}


@pytest.mark.parametrize(
    ("claim", "measured", "reason"),
    [
        ("vgg-cost", VGG | {"time_ratio": np.float64("nan")}, "VGG-16 over GoogLeNet) is NaN"),
        ("vgg-cost", VGG | {"mac_ratio": np.float32("nan")}, "mac_ratio (multiply-adds"),
        ("sparse-slow", SPARSE | {"ratios_99": {"3a": 1.2, "4a": float("nan")}}, "is NaN for 4a"),
        ("correlated", {"p": {}, "z": {}, "z_random": {}, "rand_index": 0.1}, "is empty; z ("),
        ("aux-gradient", {"ratios": {}}, "ratios (configuration -> gradient RMS at conv1, total"),
    ],
)
def test_what_is_nan_or_empty_was_not_measured(claim, measured, reason, tmp_path):
    judged = claims.check(claim, measured, directory=tmp_path)
    assert judged.verdict == "not measured"
    assert reason in judged.reason


def test_nan_and_infinity_are_text_in_what_is_kept(tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    ratios = {"a": 12.0, "b": float("nan"), "c": np.float32("inf")}
    claims.check("aux-gradient", {"ratios": ratios}, directory=tmp_path)
    claims.facts(directory=tmp_path, loss=float("-inf"))
    kept = (tmp_path / "claims" / "aux-gradient.json").read_text()
    measured = json.loads(kept, parse_constant=refuse)["measured"]
    assert measured == {"ratios": {"a": 12.0, "b": "NaN", "c": "Infinity"}}
    assert json.loads((tmp_path / "facts.json").read_text()) == {"loss": "-Infinity"}


def test_a_copy_of_a_notebook_and_an_interrupt_are_told_of(tmp_path):
    claims.check("depth-22", DEPTH, directory=tmp_path)
    folders = {"my_cost": tmp_path, "02_branch_activations": None}
    rows = {row["id"]: row for row in claims.collect(folders, ["02_branch_activations"])}
    assert rows["depth-22"]["verdict"] == "not measured"
    assert rows["depth-22"]["reason"] == (
        "01_compute_cost was not run; judged in my_cost, which is not its notebook"
    )
    assert rows["locality"]["reason"] == "02_branch_activations was cancelled"
