"""The report on small notebooks made here: planning, execution, failures, pages, publishing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import nbformat
import pytest

from gnetlab.report import executed, machine, page, runner
from gnetlab.report import manifest as manifests
from gnetlab.report import plan as planning

PARAMETERS = 'profile = "fast"\ndevice = "auto"\nseed = 0\nrate = 0.5\noutput_dir = "output"'
FIGURE = """
import pandas as pd
from matplotlib.figure import Figure
from gnetlab.draw.figures import save
figure = Figure((2, 2))
figure.subplots().plot([seed, 1])
figure.set_label("a <b>line</b>")
save(figure, "line", pd.DataFrame({"x": [seed]}), directory=output_dir)
"""


def write(path: Path, *cells: str, parameters: str | None = PARAMETERS) -> Path:
    notebook = nbformat.v4.new_notebook()
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "x", "language": "python"}
    if parameters is not None:
        cell = nbformat.v4.new_code_cell(parameters)
        cell.metadata["tags"] = ["parameters"]
        notebook.cells.append(cell)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, path)
    return path


def plan(paths, parameters=None):
    return planning.plan(paths, parameters or {}, {"profile": "fast", "device": "cpu"})


def test_parameters_are_checked_and_typed_before_anything_runs(tmp_path):
    a = write(tmp_path / "a.ipynb", "")
    b = write(tmp_path / "b.ipynb", "", parameters=PARAMETERS + "\nsteps = 3")
    one, two = plan([a, b], {"seed": "7", "rate": "2", "steps": "9"})
    assert one.parameters == {"profile": "fast", "device": "cpu", "seed": 7, "rate": 2.0}
    assert two.parameters["steps"] == 9


def test_files_are_found_from_where_the_command_was_given(tmp_path, monkeypatch):
    path = write(tmp_path / "a.ipynb", "", parameters=PARAMETERS + "\nimage = 'cat'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").touch()
    (tmp_path / "cat").mkdir()
    for given, expected in {
        "mine.png": str(tmp_path / "mine.png"),
        "folder:cat": f"folder:{tmp_path / 'cat'}",
        "./cat": str(tmp_path / "cat"),
        "cat": "cat",  # the photograph
        "nowhere.png": "nowhere.png",
        "imagenette:imagenet": "imagenette:imagenet",
    }.items():
        (job,) = plan([path], {"image": given})
        assert job.parameters["image"] == expected


@pytest.mark.parametrize(
    ("default", "given", "expected"),
    [
        ("0.5", "1e-3", 1e-3),
        ("0", "010", 10),
        ("[0.1, 0.2]", "[1e-3, 1]", [1e-3, 1.0]),
        ("[1, 2]", "[3, 0.5]", [3, 0.5]),
        ("(1, 2)", "(3, 4)", [3, 4]),
        ("(1, 2)", "[3, 4]", [3, 4]),
        ("'#ff0000'  # red", "#00ff00", "#00ff00"),
        ("None", "1e-3", 1e-3),
        ("None", "7", 7),
        ("1 / 2", "text", "text"),
    ],
)
def test_a_value_has_the_type_of_its_default(default, given, expected, tmp_path):
    for annotation in ("", ": int | None"):
        parameters = f"{PARAMETERS}\n%matplotlib inline\nx{annotation} = {default}"
        path = write(tmp_path / "a.ipynb", "", parameters=parameters)
        value = plan([path], {"x": given})[0].parameters["x"]
        assert (value, type(value)) == (expected, type(expected))


def test_a_default_that_is_no_literal_stands_as_it_is_written(tmp_path):
    path = write(tmp_path / "a.ipynb", "", parameters=PARAMETERS + "\nx = 1 / 2\ncolor = '#f00'")
    defaults = plan([path])[0].defaults
    assert (defaults["x"], defaults["color"]) == ("1 / 2", "#f00")


def test_a_file_is_found_for_a_default_of_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.png").touch()
    path = write(tmp_path / "a.ipynb", "", parameters=PARAMETERS + "\nimage = None")
    assert plan([path], {"image": "mine.png"})[0].parameters["image"] == str(tmp_path / "mine.png")


def test_the_whole_name_of_a_notebook_means_it_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    for name in ("mine", "mine_long"):
        write(tmp_path / "notebooks" / f"{name}.ipynb", "")
    assert [path.stem for path in planning.find_notebooks(["mine"])] == ["mine"]
    assert [path.stem for path in planning.find_notebooks(["min"])] == ["mine", "mine_long"]


def test_a_comment_in_a_block_of_code_is_no_title():
    text = nbformat.v4.new_markdown_cell("```python\n# not this\n```\n# This")
    assert planning.title_of(nbformat.v4.new_notebook(cells=[text])) == "This"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"sead": "1"}, "unknown parameter sead. Did you mean seed. Known: device, profile"),
        ({"output_dir": "x"}, "unknown parameter output_dir"),
        ({"seed": "one"}, "parameter seed takes int .default 0., but 'one' was given"),
        ({"seed": "1.5"}, "parameter seed takes int"),
        ({"seed": "0,1"}, "'0,1' was given; several values need --grid"),
        ({"rate": "true"}, "parameter rate takes float"),
    ],
)
def test_wrong_parameters(parameters, message, tmp_path):
    path = write(tmp_path / "a.ipynb", "")
    with pytest.raises(planning.ReportError, match=message):
        plan([path], parameters)


def test_all_problems_come_in_one_error(tmp_path):
    path = write(tmp_path / "a.ipynb", "")
    with pytest.raises(planning.ReportError) as caught:
        plan([path], {"sead": "1", "seed": "x"})
    assert "unknown parameter sead" in str(caught.value)
    assert "parameter seed takes int" in str(caught.value)


def test_notebooks_of_one_name_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    paths = [write(tmp_path / "n.ipynb", ""), write(tmp_path / "b" / "n.ipynb", "")]
    with pytest.raises(planning.ReportError, match="would share one folder"):
        plan(paths)


def two_parameter_cells(path):
    notebook = nbformat.read(write(path, "x = 1"), 4)
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)


def without_a_kernel(path):
    notebook = nbformat.read(write(path, "x = 1"), 4)
    del notebook.metadata["kernelspec"]
    nbformat.write(notebook, path)


def in_another_language(path):
    notebook = nbformat.read(write(path, "x <- 1"), 4)
    notebook.metadata["kernelspec"] = {"name": "ir", "display_name": "R", "language": "R"}
    nbformat.write(notebook, path)


def in_another_language_as_its_kernel_says(path):
    notebook = nbformat.read(write(path, "x <- 1"), 4)
    notebook.metadata["kernelspec"] = {"name": "ir", "display_name": "R"}
    notebook.metadata["language_info"] = {"name": "R"}
    nbformat.write(notebook, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_text("<<<<<<< ours"), "is not a notebook"),
        (lambda path: path.write_text(""), "is not a notebook"),
        (lambda path: write(path, "", parameters="seed = = 0"),
         "its parameters cell cannot be read as Python"),
        (lambda path: write(path, "", parameters=None), "has 0 cells tagged 'parameters'"),
        (two_parameter_cells, "has 2 cells tagged 'parameters'"),
        (lambda path: write(path, "", parameters="seed = 0"),
         "its parameters cell lacks profile, device, output_dir"),
        (without_a_kernel, "names no kernel; open it in JupyterLab and save it once"),
        (in_another_language, "is a notebook in R; only Python's can be run"),
        (in_another_language_as_its_kernel_says, "is a notebook in R; only Python's can be run"),
    ],
)  # fmt: skip
def test_what_is_not_a_notebook_of_ours_is_said_and_the_others_run(make, message, tmp_path):
    make(tmp_path / "odd.ipynb")
    good = write(tmp_path / "good.ipynb", "1")
    manifest = runner.run(plan([tmp_path / "odd.ipynb", good]), tmp_path / "out")
    assert [n["status"] for n in manifest["notebooks"]] == ["invalid", "done"]
    assert message in manifest["notebooks"][0]["error"]


def test_a_kernel_of_another_name_is_this_environment_s_python(tmp_path):
    path = write(tmp_path / "n.ipynb", "import sys; print(sys.prefix)")
    notebook = nbformat.read(path, 4)
    notebook.metadata["kernelspec"]["name"] = "somebody-s-environment"
    nbformat.write(notebook, path)
    manifest = runner.run(plan([path]), tmp_path / "out")
    assert manifest["notebooks"][0]["status"] == "done"
    outputs = nbformat.read(tmp_path / "out" / "n" / "n.ipynb", 4).cells[-1].outputs
    assert outputs[0].text.strip() == sys.prefix.replace(str(Path.home()), "~")


class TestGrid:
    def test_every_combination_runs_once(self, tmp_path):
        both = write(tmp_path / "both.ipynb", "print(seed, rate)")
        one = write(tmp_path / "one.ipynb", "", parameters=PARAMETERS.replace("rate = 0.5\n", ""))
        jobs = plan([both, one], {"seed": ["1", "2", "2"], "rate": ["0.1", "3"]})
        assert [job.name for job in jobs] == [
            "both@seed=1,rate=0.1", "both@seed=1,rate=3.0", "both@seed=2,rate=0.1",
            "both@seed=2,rate=3.0", "one@seed=1", "one@seed=2",
        ]  # fmt: skip
        assert jobs[1].parameters == {"profile": "fast", "device": "cpu", "seed": 1, "rate": 3.0}
        assert jobs[1].grid == {"seed": 1, "rate": 3.0}

    def test_one_value_is_no_grid(self, tmp_path):
        path = write(tmp_path / "n.ipynb", "")
        (job,) = plan([path], {"seed": ["1"], "rate": ["2"]})
        assert (job.name, job.grid) == ("n", {})

    def test_every_value_is_checked(self, tmp_path):
        path = write(tmp_path / "n.ipynb", "")
        with pytest.raises(planning.ReportError, match="but 'x' was given"):
            plan([path], {"seed": ["1", "x"]})

    def test_folders_can_be_named_after_any_value(self, tmp_path):
        path = write(tmp_path / "n.ipynb", "", parameters=PARAMETERS + '\nimage = "cat"')
        values = ["../x", "/etc/passwd", "a b", "<script>", "é" * 200]
        names = [job.name for job in plan([path], {"image": values})]
        assert len(set(names)) == len(values)
        assert all(re.fullmatch(r"n@[\w.=,+-]{1,80}", name) for name in names)

    def test_the_report_has_all_runs_and_their_claims(self, tmp_path):
        claim = (
            "from gnetlab.report import claims\n"
            "claims.check('aux-regularize', None, reason=f'seed {seed}', directory=output_dir)"
        )
        path = write(tmp_path / "03_auxiliary_heads.ipynb", claim)
        manifest = runner.run(plan([path], {"seed": ["4", "5"]}), tmp_path / "out")
        names = ["03_auxiliary_heads@seed=4", "03_auxiliary_heads@seed=5"]
        assert [n["name"] for n in manifest["notebooks"]] == names
        assert [n["grid"] for n in manifest["notebooks"]] == [{"seed": 4}, {"seed": 5}]
        rows = [c for c in manifest["claims"] if c["id"] == "aux-regularize"]
        assert [(row["run"], row["reason"]) for row in rows] == [
            (names[0], "seed 4"), (names[1], "seed 5"),
        ]  # fmt: skip
        others = [c["id"] for c in manifest["claims"] if c["run"] is None]
        assert len(others) == len(set(others))  # not measured here: once is enough
        for name in names:
            assert (tmp_path / "out" / name / "03_auxiliary_heads.ipynb").is_file()


def test_missing_notebook_lists_the_known():
    with pytest.raises(planning.ReportError, match=r"99 \(known: 01_compute_cost"):
        planning.find_notebooks(["99"])
    assert [path.stem for path in planning.find_notebooks(["02"])] == ["02_branch_activations"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One report over a good notebook, one that raises, and one that leaves with status 0."""
    root = tmp_path_factory.mktemp("report")
    paths = [
        write(root / "good.ipynb", FIGURE, "print(seed, rate)"),
        write(root / "raises.ipynb", "1 / 0", "x = 1"),
        write(root / "leaves.ipynb", "import sys; sys.exit(0)", "x = 1"),
    ]
    seen = []
    jobs = plan(paths, {"seed": "3"})

    def progress(job):
        seen.append((job.name, job.status, job.cell))

    manifest = runner.run(jobs, root / "out", command="gnetlab report", progress=progress)
    for job in jobs:
        page.write_notebook(job.folder / f"{job.name}.ipynb")
    page.write_index(manifest, root / "out")
    return root / "out", manifest, seen


def entry(manifest, name):
    return next(n for n in manifest["notebooks"] if n["name"] == name)


def test_each_notebook_gets_its_true_status(report):
    _, manifest, _ = report
    assert {n["name"]: n["status"] for n in manifest["notebooks"]} == {
        "good": "done",
        "raises": "failed",
        "leaves": "failed",
    }
    assert entry(manifest, "raises")["error"] == "ZeroDivisionError: division by zero"


def test_leaving_a_notebook_early_is_not_success(report):
    assert entry(report[1], "leaves")["error"].startswith("SystemExit: 0")


@pytest.mark.parametrize(
    ("count", "error"), [(None, "code cell 1 never ran (the kernel ended before it)"), (3, "")]
)
def test_a_cell_that_never_ran_is_noticed(count, error, tmp_path):
    path = write(tmp_path / "n.ipynb")
    notebook = nbformat.read(path, 4)
    notebook.cells[0].execution_count = count
    nbformat.write(notebook, path)
    assert executed.unfinished(path) == error


def test_parameters_reach_the_notebook(report):
    out, manifest, _ = report
    notebook = nbformat.read(out / "good" / "good.ipynb", 4)
    assert "3 0.5" in notebook.cells[-1].outputs[0].text
    assert entry(manifest, "good")["parameters"] == {
        "profile": "fast", "device": "cpu", "seed": 3, "rate": 0.5,
    }  # fmt: skip


def test_a_failed_notebook_is_kept_with_its_traceback(report):
    out, manifest, _ = report
    assert not (out / "raises").exists()
    notebook = nbformat.read(out / "failed" / "raises" / "raises.ipynb", 4)
    assert any(o.output_type == "error" for c in notebook.cells for o in c.get("outputs", []))
    assert entry(manifest, "raises")["folder"] == "failed/raises"
    assert not list(out.glob(".part-*"))


def test_progress_counts_cells(report):
    events = [event for event in report[2] if event[0] == "good"]
    assert events[0][1:] == ("running", 0)
    assert [cell for _, state, cell in events if state == "running"] == [0, 1, 2, 3, 4]
    assert events[-1][1] == "done"


def test_manifest_says_what_made_the_report(report):
    out, manifest, _ = report
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert {"torch", "papermill"} <= manifest["packages"].keys()
    figure = entry(manifest, "good")["figures"][0]
    assert figure["name"] == "line"
    assert figure["files"].keys() == {"png", "svg", "pdf", "csv"}
    assert len(figure["files"]["png"]["sha256"]) == 64
    assert str(out) not in (out / "manifest.json").read_text()


SCHEMA = json.loads((Path(runner.__file__).parent / "manifest.schema.json").read_text())


def test_manifests_keep_their_schema(report):
    manifest = report[1]
    checker = jsonschema.Draft202012Validator(SCHEMA)
    checker.validate(manifest)
    system = manifest["system"]
    assert system["cores"] == machine.available_cores()
    assert system["memory_bytes"] > 10**8
    assert entry(manifest, "good")["started"] >= manifest["started"]
    assert 0 < entry(manifest, "good")["seconds"] <= manifest["seconds"]
    assert not checker.is_valid({**manifest, "host": "x"})
    assert not checker.is_valid({k: v for k, v in manifest.items() if k != "system"})


def test_gpus_and_their_driver_stand_in_the_manifest(monkeypatch):
    listed = "NVIDIA H200, 570.1, GPU-aa\nNVIDIA H100, 570.1, GPU-bb\n"

    def nvidia_smi(*_args, **_options):
        return subprocess.CompletedProcess([], 0, stdout=listed)

    monkeypatch.setattr(machine.subprocess, "run", nvidia_smi)
    cases = {None: ["H200", "H100"], "1": ["H100"], "1,0": ["H100", "H200"],
             "GPU-aa": ["H200"], "": []}  # fmt: skip
    for visible, names in cases.items():
        machine.gpus.cache_clear()
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        described = machine.describe()["gpus"]
        assert described == [{"name": f"NVIDIA {name}", "driver": "570.1"} for name in names]
    machine.gpus.cache_clear()


@pytest.mark.parametrize(
    ("cpuinfo", "cpu", "simd"),
    [
        ("model name\t: Fast CPU\nflags\t\t: avx avx2 avx512f\n\nflags\t: avx",
         "Fast CPU", "avx512f"),
        ("model name\t: Fast CPU\nflags\t\t: avx2 avx", "Fast CPU", "avx2"),
        ("BogoMIPS\t: 50\nFeatures\t: fp asimd", None, "asimd"),
        (None, None, ""),
    ],
)  # fmt: skip
def test_cpus_of_one_name_differ_in_their_vector_instructions(
    cpuinfo, cpu, simd, tmp_path, monkeypatch
):
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(machine, "Path", lambda _path: tmp_path / "cpuinfo")
    system = machine.describe()
    assert system["simd"] == simd
    assert cpu in (system["cpu"], None)


@pytest.mark.skipif(machine.platform.machine() != "x86_64", reason="PyTorch says it for x86 only")
def test_the_vector_instructions_are_those_of_pytorch():
    import torch

    mine, theirs = machine.describe()["simd"], torch.backends.cpu.get_cpu_capability()
    assert {"avx512f": "AVX512", "avx2": "AVX2"}.get(mine, "DEFAULT") == theirs


def test_executed_notebook_says_nothing_of_this_machine(report):
    out = report[0]
    notebook = nbformat.read(out / "good" / "good.ipynb", 4)
    assert "papermill" not in notebook.metadata
    assert not any("papermill" in cell.metadata for cell in notebook.cells)
    assert str(out.parent) not in (out / "good" / "good.ipynb").read_text()


def test_index_shows_figures_failures_and_claims_and_escapes(report):
    html = (report[0] / "index.html").read_text()
    assert 'src="good/line.png"' in html
    assert 'href="good/line.pdf"' in html
    assert "ZeroDivisionError: division by zero" in html
    assert "22 layers deep" in html
    assert "a <b>line</b>" not in html
    assert "a &lt;b&gt;line&lt;/b&gt;" in html


@pytest.mark.parametrize("name", ["index.html", "good/good.html", "failed/raises/raises.html"])
def test_pages_ask_the_network_for_nothing(name, report):
    html = (report[0] / name).read_text()
    assert "<script" not in html
    for attribute in ('src="http', "src='http", '<link rel="stylesheet"', "@import", "url(http"):
        assert attribute not in html


def test_a_failure_leaves_the_last_good_result(tmp_path):
    path = write(tmp_path / "n.ipynb", "print('good')")
    runner.run(plan([path]), tmp_path / "out")
    before = (tmp_path / "out" / "n" / "n.ipynb").read_bytes()
    write(path, "raise ValueError('bad')")
    manifest = runner.run(plan([path]), tmp_path / "out")
    assert manifest["notebooks"][0]["error"] == "ValueError: bad"
    assert (tmp_path / "out" / "n" / "n.ipynb").read_bytes() == before


def test_an_interrupt_cancels_the_rest_and_still_writes_the_manifest(tmp_path, monkeypatch):
    def interrupted(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner._Run, "look_at", interrupted)
    paths = [write(tmp_path / f"{name}.ipynb", "") for name in "ab"]
    manifest = runner.run(plan(paths), tmp_path / "out")
    assert [n["status"] for n in manifest["notebooks"]] == ["cancelled", "cancelled"]
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert not list((tmp_path / "out").glob(".part-*"))


def test_pages_are_written_before_another_report_may_be(tmp_path):
    path, out, told = write(tmp_path / "n.ipynb", ""), tmp_path / "out", []

    def pages(manifest):
        told.append(manifest)
        with pytest.raises(planning.ReportError, match="another report is being written"):
            runner.run(plan([path]), out)

    made = [runner.run(plan([path]), out, pages=pages) for _ in range(2)]  # done, then cached
    assert told == made


def test_the_last_report_s_pdf_goes_with_its_manifest(tmp_path):
    path, out = write(tmp_path / "n.ipynb", ""), tmp_path / "out"
    runner.run(plan([path]), out)
    (out / "report.pdf").touch()
    runner.run(plan([path]), out)
    assert (out / "report.pdf").is_file()  # nothing has changed
    runner.run(plan([path]), out, force=True)
    assert not (out / "report.pdf").exists()


def test_output_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "n.ipynb", "")
    with pytest.raises(planning.ReportError, match="choose another --output"):
        runner.run(plan([path]), tmp_path / "file" / "out")


def test_publishing_replaces_the_folder_and_needs_everything(report, tmp_path, monkeypatch):
    out, manifest, _ = report
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    write(tmp_path / "notebooks" / "good.ipynb", "")
    target = tmp_path / "figures"
    target.mkdir()
    (target / "stale.png").write_text("")
    (target / "manifest.json").write_text("{}")  # the last report's
    manifests.publish(manifest, out, target)
    names = {path.name for path in target.iterdir()}
    assert names == {"line.png", "line.svg", "line.pdf", "line.csv", "manifest.json"}
    write(tmp_path / "notebooks" / "raises.ipynb", "")
    with pytest.raises(planning.ReportError, match="lacking: raises"):
        manifests.publish(manifest, out, target)
    assert {path.name for path in target.iterdir()} == names


def test_parameters_of_any_type_are_written(tmp_path):
    odd = "\nnames = {'b', 'a'}\npairs = {(1, 2): 3.0}\nlimit = 1e999"
    path = write(tmp_path / "n.ipynb", "", parameters=PARAMETERS + odd)
    (entry,) = runner.run(plan([path]), tmp_path / "out")["notebooks"]
    shown = {name: entry["parameters"][name] for name in ("names", "pairs", "limit")}
    assert shown == {"names": ["a", "b"], "pairs": {"(1, 2)": 3.0}, "limit": "Infinity"}
    assert runner.run(plan([path]), tmp_path / "out")["notebooks"] == [entry]  # nothing changed


def test_files_that_are_not_what_their_names_say_end_no_report(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10)
    cell = FIGURE + (
        "open('no.png', 'w').write('x'); open('facts.json', 'w').write('[1]')\n"
        "import os; os.mkdir('claims'); open('claims/depth-22.json', 'w').write('[]')"
    )
    manifest = runner.run(plan([write(tmp_path / "01_compute_cost.ipynb", cell)]), tmp_path / "out")
    (entry,) = manifest["notebooks"]
    assert (entry["status"], entry["facts"]) == ("done", {})
    assert [(f["name"], f["pixels"]) for f in entry["figures"]] == [("line", None), ("no", None)]
    assert manifest["claims"][0]["reason"] == "the verdict that it left cannot be read"
    jsonschema.validate(manifest, SCHEMA)
    page.write_index(manifest, tmp_path / "out")


def test_a_path_in_the_home_folder_is_not_told_and_no_other_is_touched(tmp_path, monkeypatch):
    real = tmp_path / "gpfs" / "alice"
    real.mkdir(parents=True)
    home = tmp_path / "alice"
    home.symlink_to(real)
    monkeypatch.setattr(Path, "home", lambda: home)
    for folder in (home, real):
        for begins in ("", "folder:", '"', "x\\n", "\x1b[32m", "-I", "file://"):
            assert manifests.without_home(f"{begins}{folder}/d") == f"{begins}~/d"
    for other in (f"https://zenodo.org{home}/d", f"/mnt{home}/d", f"{home}2/d", f"https:/{home}"):
        assert manifests.without_home(other) == other


def test_what_is_random_in_a_notebook_is_the_same_in_every_run(tmp_path):
    path = write(tmp_path / "n.ipynb", "import pandas as pd; pd.DataFrame([1]).style",
                 "print('T_25000 a')")  # fmt: skip
    old = json.loads(path.read_text()) | {"nbformat_minor": 4}
    for cell in old["cells"]:
        del cell["id"]
    path.write_text(json.dumps(old))
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        runner.run(plan([path]), out)
    one, two = ((out / "n" / "n.ipynb").read_text() for out in outs)
    assert one == two
    assert "T_25000 a" in one
    assert 'id=\\"T_00000\\"' in one


def test_a_cell_that_is_to_be_skipped_fails_no_notebook_and_a_long_error_is_cut(tmp_path):
    skips = write(tmp_path / "skips.ipynb", "1 / 0")
    notebook = nbformat.read(skips, 4)
    notebook.cells[1].metadata["tags"] = ["skip-execution"]
    nbformat.write(notebook, skips)
    long = write(tmp_path / "long.ipynb", "raise ValueError('x' * 3_000_000)")
    manifest = runner.run(plan([skips, long]), tmp_path / "out")
    assert entry(manifest, "skips")["status"] == "done"
    error = entry(manifest, "long")["error"]
    assert error.startswith("ValueError: xxx")
    assert len(error) < 20_000


def test_two_figures_of_one_name_are_not_published(report, tmp_path, monkeypatch):
    out, manifest, _ = report
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notebooks").mkdir()
    write(tmp_path / "notebooks" / "good.ipynb", "")
    other = {**entry(manifest, "good"), "name": "other"}
    both = {**manifest, "notebooks": [*manifest["notebooks"], other]}
    with pytest.raises(planning.ReportError, match="good and other both have a figure line"):
        manifests.publish(both, out, tmp_path / "figures")
