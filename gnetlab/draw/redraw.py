"""A report's figures drawn again from what was kept when they were saved; nothing is measured.

`stored()`  the files of a report's kept figures, by name
`redraw()`  draw one again, for a page's or a column's width, in some of the formats
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gnetlab.draw import calls, style
from gnetlab.draw.figures import KINDS, write


def stored(report: Path) -> dict[str, list[Path]]:
    """Files of kept figures in a report, or in a folder of figures, in order of their names.

    A name has several where notebooks of one report gave it to figures of their own.
    """
    found = [*report.glob(f"*{calls.SUFFIX}"), *report.glob(f"[!.]*/*{calls.SUFFIX}")]
    files: dict[str, list[Path]] = {}
    for path in sorted(found):
        files.setdefault(path.name.removesuffix(calls.SUFFIX), []).append(path)
    return files


def redraw(
    path: Path | list[Path],
    directory: Path,
    *,
    width: str | None = None,
    kinds: Iterable[str] = KINDS,
) -> list[Path]:
    """Draw the figure kept in `path` again and write it to `directory`; the files written.

    `path` may be what `stored()` has for a name. `width` is one of `style.WIDTHS` (none: what the
    figure is designed for, and the files are those that were saved, byte by byte). ValueError if
    the file is not a figure of gnetlab's, or if there are several.
    """
    path, *others = [path] if isinstance(path, Path) else path
    if others:  # their files would have one name, too
        name = path.name.removesuffix(calls.SUFFIX)
        folders = ", ".join(str(one.parent) for one in (path, *others))
        raise ValueError(
            f"several figures are called {name}: there is one in each of {folders}; "
            "give one of these folders as --report"
        )
    call = calls.load(path)
    try:
        with style.width(width):
            figure = call.function(*call.arguments, **call.options)
    except Exception as error:  # what is kept may be of another version, or of anyone's making
        raise ValueError(
            f"{path}: {call.function.__name__} cannot draw what is kept there "
            f"({type(error).__name__}: {error}); run `gnetlab report` again"
        ) from error
    name = path.name.removesuffix(calls.SUFFIX)
    return list(write(figure, name, directory, kinds=kinds, timing=call.timing).values())
