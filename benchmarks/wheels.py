"""For a machine without a network: wheels collected elsewhere, and an environment made of them.

`download()`     wheels of what gnetlab requires, but for what the machine has already
`environment()`  a Python that finds them, and beside them all that the machine's own Python finds

Only the standard library and pip are used.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
THERE = ("torch", "torchvision", "pandas", "matplotlib", "pytest")
FROM_SOURCE = ("fvcore", "iopath")  # on PyPI as source only; pure Python
_STUB = "9999"  # a version that no package has


def requirements() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def _pip(*arguments: object, python: object = sys.executable, **variables: str) -> None:
    command = [str(part) for part in (python, "-m", "pip", *arguments, "-qq")]
    if subprocess.run(command, env={**os.environ, **variables}).returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n(what pip says is above)")


def download(folder: Path, python: str, there: list[str]) -> None:
    """Collect wheels in `folder` for machines like this one that run this version of Python.

    there   packages that the machine has, and that are left out
    """
    folder.mkdir(parents=True, exist_ok=True)
    _pip("wheel", "--no-deps", "--wheel-dir", folder, *FROM_SOURCE)
    with tempfile.TemporaryDirectory() as stubs:
        for name in there:
            _stub(Path(stubs), re.sub(r"[-_.]+", "_", name.lower()))
        _pip(
            "download",
            "--dest",
            folder,
            "--find-links",
            folder,
            "--find-links",
            stubs,
            "--only-binary=:all:",
            "--python-version",
            python,
            *requirements(),
            PIP_CONSTRAINT=os.devnull,
        )  # fmt: skip  (this machine's may not hold for the other)
    for stub in folder.glob(f"*-{_STUB}-*.whl"):
        stub.unlink()
    found = list(folder.glob("*.whl"))
    size = sum(path.stat().st_size for path in found) / 1e6
    print(f"{len(found)} wheels for Python {python}, {size:.0f} MB, in {folder}")


def _stub(folder: Path, name: str) -> None:
    """An empty wheel that needs nothing: pip takes its high version, and asks for nothing more."""
    about = f"{name}-{_STUB}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{_STUB}-py3-none-any.whl", "w") as wheel:
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {_STUB}\n"
        wheel.writestr(f"{about}/METADATA", text)
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


def environment(folder: Path) -> Path:
    """The Python of an environment under reports/, made at the first call.

    It sees the packages of the Python that runs this, be that a virtual environment itself, and
    has of its own what gnetlab requires and is not there, installed from `folder` alone.
    """
    wheels = sorted(path.name for path in folder.glob("*.whl"))
    if not wheels:
        raise SystemExit(f"--wheels {folder} asked, but no wheel is there; --download-wheels, on "
                         "a machine with a network, collects them")  # fmt: skip
    made_of = "\n".join([sys.version, sys.base_prefix, *wheels, *requirements()])
    place = ROOT / "reports" / f".python-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    python, done = place / "bin" / "python", place / "done"
    if not done.is_file():
        venv.create(place, clear=True, symlinks=True)  # without pip: there is one outside
        own = next((place / "lib").glob("python*/site-packages"))
        # Those of a virtual environment are not seen with --system-site-packages.
        outside = [
            path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")
        ]
        (own / "outside.pth").write_text("\n".join(outside) + "\n")
        _pip("install", "--no-index", "--find-links", folder.resolve(), *requirements(),
             python=python, PIP_CONSTRAINT=os.devnull)  # fmt: skip
        done.touch()
    return python


def enter(folder: Path, arguments: list[str]) -> None:
    """Run this script again, with the same arguments, in the environment made of the wheels."""
    python = environment(folder)
    if Path(sys.prefix).resolve() == python.parent.parent.resolve():
        return
    # Jupyter's templates lie beside a Python, not among its packages.
    shared = [str(Path(sys.prefix) / "share" / "jupyter"), os.environ.get("JUPYTER_PATH", "")]
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, shared))
    sys.stdout.flush()
    os.execv(python, [str(python), sys.argv[0], *arguments])
