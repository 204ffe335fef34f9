"""One look for every figure: colours, sizes, fonts, and a context manager that applies them.

One thing has one colour everywhere. The colours differ in lightness too, so that the figures
survive a grey printer and colour-blind readers (a test holds the distances).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

BRANCH_COLORS = {
    "1x1": "#22316C",
    "3x3": "#C4451C",
    "5x5": "#3BA99C",
    "pool": "#EBB94B",
    "": "#9A9A9A",  # outside the branches: stem, head, plain networks
}
SOURCE_COLORS = {"main": "#1A1A1A", "aux1": "#B0307A", "aux2": "#5B9BD5", "total": "#C6C6C6"}
SOURCE_LABELS = {
    "main": "main loss",
    "aux1": "aux1 (after 4a)",
    "aux2": "aux2 (after 4d)",
    "total": "total",
}
# What a layer does, where time is shared out; pooling has the colour of the pool branch.
OPERATION_COLORS = {
    "convolution": "#3A3A3A",
    "max pooling": "#EBB94B",
    "normalization": "#B0307A",
    "ReLU": "#5B9BD5",
    "concatenation": "#9A9A9A",
    "linear": "#22316C",
    "other": "#DDDDDD",
}
EMPHASIS, QUIET = "#C4451C", "#8A8A8A"
# For variants without a colour of their own (networks, heads on or off), in order of use.
SERIES = ("#1A1A1A", "#B0307A", "#5B9BD5", "#C9A227", "#4B5A1E", "#9FD8C8")
# And what tells two of one colour apart, where there are more variants than colours.
LINES = ("-", (0, (3, 2)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D")
_HATCHES = ("", "////", "....", "xxxx")

STAGES = ("stem", "3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b", "head")
WIDTHS = {"column": 3.5, "page": 7.2}  # inches
_asked: ContextVar[str | None] = ContextVar("width", default=None)

_SETTINGS = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same everywhere
    "font.size": 7.5,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,  # TrueType, embedded: editable and accepted by publishers
    "svg.fonttype": "path",
    "svg.hashsalt": "gnetlab",  # the same figure gives the same file
}


class Look(NamedTuple):
    """How one of several variants is drawn; two have nothing but the colour in common."""

    color: str
    line: str | tuple
    marker: str
    hatch: str


def look(i: int) -> Look:
    """The look of variant number `i`: the colours again and again, each time in another style.

    >>> look(0)
    Look(color='#1A1A1A', line='-', marker='o', hatch='')
    >>> look(6)
    Look(color='#1A1A1A', line=(0, (3, 2)), marker='s', hatch='////')
    """
    again, color = divmod(i, len(SERIES))
    again %= len(LINES)
    return Look(SERIES[color], LINES[again], _MARKERS[again], _HATCHES[again])


@contextlib.contextmanager
def context() -> Iterator[None]:
    """Figures made or saved inside have gnetlab's look; global settings are as before after it."""
    with matplotlib.rc_context(_SETTINGS):
        yield


@contextlib.contextmanager
def width(name: str | None) -> Iterator[None]:
    """Figures made inside have this one of `WIDTHS`, whichever they are designed for."""
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> str | None:
    """What `width()` asks for, if anything."""
    return _asked.get()


def is_narrow(figure: Figure) -> bool:
    """Whether a figure is as wide as one column of text."""
    return figure.get_figwidth() == WIDTHS["column"]


_UNSEEN = "\N{ZERO WIDTH SPACE}"


def plain(text: str) -> str:
    """A user's name for matplotlib: "$" begins no formula, and "_" hides it from no legend."""
    return (_UNSEEN if text.startswith("_") else "") + text.replace("$", r"\$")


def as_given(text: str) -> str:
    """What `plain()` was given, wherever in `text` it stands.

    >>> as_given(plain("_under_$5"))
    '_under_$5'
    """
    return text.replace(_UNSEEN, "").replace(r"\$", "$")


def stage_order(stages: list[str]) -> list[str]:
    """Stages in forward order: GoogLeNet's known ones first, others as they come.

    >>> stage_order(["head", "4d", "4c_10", "4c_2", "4c", "stem"])
    ['stem', '4c', '4c_2', '4c_10', '4d', 'head']
    """

    def place(stage: str) -> tuple[float, int]:
        known, _, copy = stage.partition("_")
        if known not in STAGES or (copy and not copy.isdecimal()):
            return STAGES.index("head") - 0.5, 0
        return STAGES.index(known), int(copy or 1)

    return sorted(dict.fromkeys(stages), key=place)
