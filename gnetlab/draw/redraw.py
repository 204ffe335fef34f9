"""A report's figures drawn again from what was kept when they were saved; nothing is measured.

`stored()`  the kept figures of a report, by name
`redraw()`  draw one again, for a page's or a column's width, in some of the formats
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gnetlab.draw import calls, style
from gnetlab.draw.figures import KINDS, write


def stored(report: Path) -> dict[str, Path]:
    """Files of kept figures in a report, or in a folder of figures, in order of their names."""
    found = [*report.glob(f"*{calls.SUFFIX}"), *report.glob(f"[!.]*/*{calls.SUFFIX}")]
    return {path.name.removesuffix(calls.SUFFIX): path for path in sorted(found)}


def redraw(
    path: Path, directory: Path, *, width: str | None = None, kinds: Iterable[str] = KINDS
) -> list[Path]:
    """Draw the figure kept in `path` again and write it to `directory`; the files written.

    `width` is one of `style.WIDTHS` (none: what the figure is designed for, and the files are those
    that were saved, byte by byte). ValueError if the file is not a figure of gnetlab's.
    """
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
