"""The notebooks as committed, and their results when run at the fast profile."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from filelock import FileLock

import gnetlab as gl
from gnetlab.net import data, weights

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMON = {"profile", "device", "weights", "data", "seed", "output_dir"}
FIGURES = {
    "01_compute_cost": {
        "cost_per_module", "counters", "reductions", "table_1", "implementations", "scaling",
        "accuracy_per_cost", "latency", "time_by_operation", "predicted_time", "early_inception",
    },
    "02_branch_activations": {
        "branch_maps", "receptive_fields", "branch_statistics", "branch_correlation",
        "branch_ablation", "conductance", "branch_attribution", "image_attribution",
        "visualized_channels", "selectivity", "published_counts", "kernel_or_width",
    },
    "03_auxiliary_heads": {
        "gradient_by_source", "heads_share", "ratio_pitfall", "agreement",
        "training_with_and_without_heads", "escape", "depth",
    },
    "04_sparse_vs_dense": {"sparse_vs_dense"},
}  # fmt: skip


def code_of(path: Path) -> list[str]:
    return [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def test_every_notebook_is_known_here():
    assert [path.stem for path in NOTEBOOKS] == list(FIGURES)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").rglob("*.ipynb")), ids=lambda path: path.stem
)
def test_committed_without_outputs(path):
    subprocess.run(
        [sys.executable, "-m", "nbstripout", "--verify", "--keep-id", str(path)], check=True
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_only_calls_the_package(path):
    source = "\n".join(code_of(path))
    assert not re.search(r"^\s*(def|class) |rcParams|register_\w*hook|plt\.", source, re.MULTILINE)
    statements = [
        line for line in source.splitlines() if line.strip() and line.strip() not in ")]}"
    ]
    assert len(statements) <= 150  # 01 has eleven figures, 02 thirteen


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_cell_has_the_common_names(path):
    cells = [c for c in nbformat.read(path, 4).cells if "parameters" in c.metadata.get("tags", [])]
    names: dict = {}
    exec(cells[0].source, names)
    assert len(cells) == 1
    assert names.keys() >= COMMON


@pytest.fixture(scope="session")
def report(tmp_path_factory, request):
    """The whole report at the fast profile, from a foreign working directory; made once for all."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # the workers of xdist share the folder above theirs
        folder = folder.parent
    folder, done = folder / "elsewhere", folder / "elsewhere" / "done"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not done.exists():
            command = [sys.executable, "-m", "gnetlab.cli", "report", "--output", folder / "out"]
            ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            done.write_text(f"{ran.returncode}\n{ran.stdout}{ran.stderr}")
    assert done.read_text().startswith("0\n"), done.read_text()
    return folder / "out", json.loads((folder / "out" / "manifest.json").read_text())


class TestReport:
    def test_every_notebook_is_done_with_its_figures(self, report):
        figures = {
            n["name"]: {figure["name"] for figure in n["figures"]} for n in report[1]["notebooks"]
        }
        assert figures == FIGURES

    def test_claims_have_their_verdicts(self, report):
        verdicts = {claim["id"]: claim["verdict"] for claim in report[1]["claims"]}
        assert verdicts["depth-22"] == "depends"  # Table 1 does not add up in three rows
        assert verdicts["vgg-cost"] in ("supported", "depends")  # hangs on the clock
        for claim in ("reduction", "quadratic", "higher-only"):
            assert verdicts[claim] == "supported"
        assert verdicts["aux-gradient"] == "depends"  # without batch norm only
        assert verdicts["aux-regularize"] == "not measured"  # takes the full profile
        assert verdicts["sparse-slow"] in ("supported", "depends", "not supported")  # the clock
        assert verdicts["dense-parts"] in ("supported", "depends")  # equal, sparse; and the clock
        assert verdicts["correlated"] == "supported"
        assert verdicts["locality"] != "supported"  # Table 1's own widths speak against it

    def test_claims_hold_the_numbers(self, report):
        claims = {claim["id"]: claim["measured"] for claim in report[1]["claims"]}
        assert claims["depth-22"] == {
            "layers": 22,
            "macs": 1_582_671_872,
            "rows_that_disagree": ["conv1", "4a", "5a"],
        }
        assert claims["vgg-cost"]["mac_ratio"] == pytest.approx(15_470_264_320 / 1_582_671_872)
        assert claims["vgg-cost"]["top1_gain"] == pytest.approx(71.592 - 69.778)
        assert claims["reduction"]["mac_ratio"] > 5
        assert claims["quadratic"]["module_exponent"] == pytest.approx(2)
        assert claims["higher-only"]["memory_ratio"] == pytest.approx(1.9, abs=0.05)
        assert claims["higher-only"]["time_ratio"] > 0  # a busy machine's may be anything
        assert claims["sparse-slow"]["ratios_99"].keys() == {"3a, batch 1", "4a, batch 1"}
        assert claims["dense-parts"]["difference"] <= 1e-5
        # 3b: 128 1x1, 192 3x3 and 96 5x5 filters have the smallest share of zeros
        assert claims["dense-parts"]["zero_share"] == pytest.approx(
            (128 * 24 + 192 * 16) / ((128 + 192 + 96) * 25)
        )

    def test_heads_rescue_the_network_without_norm_only(self, report):
        out, manifest = report
        measured = next(c for c in manifest["claims"] if c["id"] == "aux-gradient")["measured"]
        ratios = measured["ratios"]
        assert len(ratios) == 10
        bounds = {"Gaussian 0.01": 1000, "PyTorch default": 30, "gain 0.6": 5}
        for init, bound in bounds.items():
            assert ratios[f"no norm, {init}"] >= bound
        for name, ratio in ratios.items():
            assert name.startswith("no norm") or 0.8 <= ratio <= 1.4, name
        assert measured["escaped_with_heads"] == measured["seeds"] == 3
        assert measured["escaped_without_heads"] <= 1
        metrics = pd.read_csv(out / "03_auxiliary_heads" / "training_with_and_without_heads.csv")
        last = metrics[metrics.step > metrics.groupby("run").step.transform("max") - 10]
        loss = last.groupby(["norm", "heads"]).loss.mean()
        assert loss["none", "both"] + 0.2 < loss["none", "none"]
        assert abs(loss["batch", "both"] - loss["batch", "none"]) < 0.3

    def test_the_popular_ratio_stays_where_gradient_vanishes_with_depth(self, report):
        depth = pd.read_csv(report[0] / "03_auxiliary_heads" / "depth.csv")
        main = depth[depth.source == "main"].groupby("modules").mean(numeric_only=True)
        assert main.propagation.loc[17] < main.propagation.loc[9] / 100
        assert 0.1 < main.first_to_last.loc[17] / main.first_to_last.loc[9] < 10

    def test_one_head_is_told_from_the_other(self, report):
        escape = pd.read_csv(report[0] / "03_auxiliary_heads" / "escape.csv")
        steps = escape.set_index(["setting", "variant"]).mean_steps
        free = steps["no norm, gain 0.6"]
        assert free["lower head alone"] + 20 < free["upper head alone"]
        assert free["both heads"] + 20 < free["no heads"]

    def test_what_notebook_01_computes_of_its_own_text(self, report):
        executed = nbformat.read(report[0] / "01_compute_cost" / "01_compute_cost.ipynb", 4)
        texts = [
            output.data.get("text/markdown", "")
            for cell in executed.cells
            for output in cell.get("outputs", [])
            if output.output_type in ("execute_result", "display_data")
        ]
        everything = " ".join(texts)
        assert "Contradictory in themselves: **3b, 4c, 4d, 4e, 5b**" in everything
        assert "Same multiply-adds: True" in everything
        difference = float(re.search(r"difference of a logit: ([\d.e-]+)\.", everything)[1])
        assert difference < 1e-4
        assert re.search(r"costs \*\*9\.4x\*\* the GoogLeNet, paper stem", everything)
        assert re.search(r"\*\*0\.22x\*\* the GoogLeNet, cifar stem", everything)

    def test_a_report_shows_a_still_image_of_the_sliders(self, report):
        executed = nbformat.read(report[0] / "01_compute_cost" / "01_compute_cost.ipynb", 4)
        cell = next(c for c in executed.cells if "cost_sliders" in c.source)
        assert list(cell.outputs[0].data) == ["image/png", "text/plain"]

    def test_weights_and_device_stand_in_the_manifest(self, report):
        facts = {n["name"]: n["facts"] for n in report[1]["notebooks"]}
        assert all("device" in fact and "weights" in fact for fact in facts.values())
        of_branches = facts["02_branch_activations"]
        assert of_branches["weights"].startswith("bundled weights")
        bundled = gl.googlenet(weights="bundled")
        assert of_branches["weights_sha256"] == weights.fingerprint(bundled)
        for notebook in ("02_branch_activations", "03_auxiliary_heads"):
            assert facts[notebook]["data_sha256"] == data.fingerprint(data.PhotoCrops())

    def test_pages_exist_and_refer_to_existing_files(self, report):
        out = report[0]
        html = (out / "index.html").read_text()
        links = re.findall(r'(?:href|src)="([^"#:]+)"', html)
        assert len(links) > 40
        for link in links:
            assert (out / link).is_file(), link

    def test_executed_notebooks_show_no_warning(self, report):
        out, manifest = report
        for entry in manifest["notebooks"]:
            notebook = nbformat.read(out / entry["name"] / f"{entry['name']}.ipynb", 4)
            streams = [
                o.text
                for c in notebook.cells
                for o in c.get("outputs", [])
                if o.output_type == "stream" and o.name == "stderr"
            ]
            assert not streams, streams
