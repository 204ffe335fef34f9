"""What users install and read: pyproject, environment.yml, README, public names and their help."""

import ast
import builtins
import doctest
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import gnetlab
from gnetlab.draw import figures
from gnetlab.measure import gradients, sparsity
from gnetlab.report import claims

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}
NAMED_BY_THE_USER = {
    "torch", "torchvision", "jupyterlab", "matplotlib", "pandas", "fvcore", "captum", "papermill",
}  # fmt: skip


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_and_pyproject_ask_for_the_same():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = dict(
        line.split(" ", 1)
        for line in environment["dependencies"]
        if isinstance(line, str) and line != "pip"
    )
    asked = project()
    lines = [*asked["dependencies"], *asked["optional-dependencies"]["test"]]
    pip = {(r := Requirement(line)).name: r.specifier for line in lines}
    pip = {CONDA_NAMES.get(name, name): bound for name, bound in pip.items()}
    pip["python"] = SpecifierSet(asked["requires-python"])
    assert {name: SpecifierSet(bound) for name, bound in conda.items()} == pip


def test_the_constraints_pin_what_is_required_within_its_bounds():
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    asked = project()
    extras = asked["optional-dependencies"]
    for line in [*asked["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), line


def test_what_is_cited_is_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}
    assert cited["version"] == project()["version"]
    assert cited["license"] == project()["license"]
    assert f"## {cited['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_runs_the_test_command_on_supported_pythons():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test"]
    supported = SpecifierSet(project()["requires-python"])
    assert all(supported.contains(version) for version in job["strategy"]["matrix"]["python"])


def test_every_package_named_by_the_user_is_required_and_used():
    required = {Requirement(line).name for line in project()["dependencies"]}
    assert required >= NAMED_BY_THE_USER
    sources = "".join(p.read_text() for p in (ROOT / "gnetlab").rglob("*.py"))
    sources += "".join(p.read_text() for p in (ROOT / "notebooks").glob("*.ipynb"))
    for name in NAMED_BY_THE_USER - {"jupyterlab"}:
        assert re.search(rf"(import|from) {name}\b", sources), f"{name} is never imported"


def test_version_is_the_same_everywhere():
    assert gnetlab.__version__ == project()["version"] == importlib.metadata.version("gnetlab")


# The public names, and those that the README names in their modules.
DOCUMENTED = {name: getattr(gnetlab, name) for name in gnetlab.__all__} | {
    value.__name__: value
    for value in (
        gradients.output_flow, gradients.gradient_noise, gradients.GradientRecorder,
        sparsity.as_one_convolution, sparsity.output_difference, sparsity.structure,
        sparsity.sparse_speed, sparsity.break_even, claims.check, figures.save,
    )
}  # fmt: skip


def raises(function) -> bool:
    """Whether the code of a function has a `raise`, or that of gnetlab's functions it calls."""
    waiting, seen = [inspect.unwrap(function)], set()
    while waiting:
        seen.add(function := waiting.pop())
        nodes = list(ast.walk(ast.parse(inspect.getsource(function))))
        if any(isinstance(node, ast.Raise) for node in nodes):
            return True
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        known = [function.__globals__.get(name) for name in names]
        called = {inspect.unwrap(value) for value in known if inspect.isfunction(value)}
        waiting += {f for f in called - seen if f.__module__.startswith("gnetlab")}
    return False


@pytest.mark.parametrize("name", DOCUMENTED)
def test_help_has_a_summary_every_parameter_the_errors_and_an_example(name):
    value = DOCUMENTED[name]
    about, example, _ = inspect.getdoc(value).partition(">>>")
    assert example
    assert re.fullmatch(r"\S.{20,98}", about.splitlines()[0])  # the summary
    if not inspect.isroutine(value):
        return
    function = inspect.unwrap(value)
    parameters = inspect.signature(function).parameters
    assert [p for p in parameters if not re.search(rf"\b{p}\b", about)] == []
    assert "Raises" in about or not raises(function)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_an_example_can_be_copied_as_it_is(name):
    """Doctests see the names of their module; someone who copies an example does not."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(DOCUMENTED[name]))
    assert not any(doctest.SKIP in example.options for example in examples)
    known = set(dir(builtins))
    used = set()
    for node in ast.walk(ast.parse("".join(example.source for example in examples))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            known |= {node.name, *(argument.arg for argument in node.args.args)}
        elif isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
    assert used <= known


def test_help_of_the_package_names_every_public_name():
    assert set(dir(gnetlab)) == {*gnetlab.__all__, "__version__"}
    listed = re.findall(r"\b\w+\b", gnetlab.__doc__)
    assert set(gnetlab.__all__) <= set(listed)


def test_unknown_public_name_lists_the_known():
    with pytest.raises(AttributeError, match="layer_costs"):
        gnetlab.layer_cost  # noqa: B018


def test_importing_gnetlab_imports_nothing_heavy():
    code = "import sys, gnetlab; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "pandas", "matplotlib", "torchvision"} & set(loaded)


@pytest.mark.parametrize("name", ["README.md", "README.ja.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_and_figures_exist(name):
    text = (ROOT / name).read_text()
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        assert (ROOT / path).exists(), path
        if anchor:
            target = (ROOT / path).read_text() if path else text
            headings = re.findall(r"^#+ (.+)$", target, re.MULTILINE)
            assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_no_path_of_a_machine_in_tracked_text():
    suspicious = re.compile(r"/(?:home|root|work|tmp)/\w")
    for path in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n"):
        if path and Path(path).suffix in {".py", ".md", ".ipynb", ".json", ".toml", ".yml", ".csv"}:
            assert not suspicious.search((ROOT / path).read_text()), path


def test_make_clean_removes_caches_alone_whatever_folders_are_called(tmp_path):
    caches = ("a b/__pycache__", "b/.ipynb_checkpoints", "__pycache__")
    for folder in (*caches, "a", "b/kept"):
        (tmp_path / "gnetlab" / folder).mkdir(parents=True)
    for name in ("tests", "notebooks", "benchmarks"):
        (tmp_path / name).mkdir()
    subprocess.run(["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, check=True)
    left = {p.relative_to(tmp_path / "gnetlab").as_posix() for p in tmp_path.glob("gnetlab/**/*")}
    assert left == {"a", "a b", "b", "b/kept"}


def test_uv_keeps_to_the_constraints_that_pip_is_given(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    uv = tmp_path / "uv"
    uv.write_text('#!/bin/sh\n[ "$1" = venv ] && mkdir -p .venv || echo "$UV_CONSTRAINT" > asked\n')
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PIP_CONSTRAINT", "pinned.txt")
    monkeypatch.delenv("UV_CONSTRAINT", raising=False)
    make = ["make", "-f", ROOT / "Makefile", f"PYTHON={sys.executable}", ".venv/installed"]
    subprocess.run(make, cwd=tmp_path, check=True)
    assert (tmp_path / "asked").read_text().strip() == "pinned.txt"
