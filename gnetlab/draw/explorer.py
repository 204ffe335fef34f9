"""The explorer: every feature map of every branch in one page of HTML that needs nothing else.

`Picture`            what is shown of one picture: its maps, its attribution, its predictions
`Explorer`           the page, in a notebook, as a file, or as a still sheet
`explorer_figure()`  that sheet: of each branch the liveliest channel over the picture

The maps travel as uint8, each scaled to its own range, deflated and in base64; the page's script
(explorer.html beside this file) unpacks and draws them. A reader without scripts sees the sheet.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from gnetlab.draw import style

METHOD_LABELS = {
    "grad_cam": "Grad-CAM",
    "gradient_x_activation": "Gradient × activation",
    "conductance": "Conductance",
}
# What the page knows of a channel, in the order in which it is packed.
_STATISTICS = ("minimum", "maximum", "mean", "deviation", "zero_fraction", "energy")


class Picture(NamedTuple):
    """One picture and what the network makes of it.

    pixels        size x size x 3 uint8, as the network sees it
    predictions   class and probability, likeliest first; `target` is the class explained
    maps          "inception3a.branch1x1" -> channels x h x w, in forward order
    attribution   the same names -> h x w
    statistics    one row per channel, in the order of `maps`: `module`, `stage`, `branch`,
                  `channel`, `concat_index`, `minimum`, `maximum`, `mean`, `deviation`,
                  `zero_fraction`, `energy`
    channels      how many of each branch to keep, the liveliest (None: all)
    """

    name: str
    source: str
    pixels: np.ndarray
    predictions: Sequence[tuple[str, float]]
    target: str
    maps: Mapping[str, np.ndarray]
    attribution: Mapping[str, np.ndarray]
    statistics: pd.DataFrame
    channels: int | None = None


def quantize(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps (n x h x w) as uint8, each over its own range, with their minima and maxima.

    `low + codes / 255 * (high - low)` is within half a step of the map. Raises ValueError for
    values that are not finite.

    >>> codes, low, high = quantize(np.array([[[0.0, 1.0], [2.0, 4.0]]]))
    >>> codes.tolist(), low.tolist(), high.tolist()
    ([[[0, 64], [128, 255]]], [0.0], [4.0])
    """
    if not np.isfinite(maps).all():
        raise ValueError("a feature map has values that are not finite; check the weights")
    low, high = maps.min((1, 2)), maps.max((1, 2))
    scale = np.where(high > low, high - low, 1)[:, None, None]
    return np.rint((maps - low[:, None, None]) / scale * 255).astype(np.uint8), low, high


def _kept(picture: Picture, module: str) -> pd.DataFrame:
    """The statistics of the channels of a branch that are shown, by channel."""
    rows = picture.statistics[picture.statistics.module == module]
    if picture.channels is None or len(rows) <= picture.channels:
        return rows
    return rows.nlargest(picture.channels, "deviation").sort_values("channel")


def _stage(branch: str) -> str:
    """Of a branch's dotted name: "4c", "4c_2", of the inception stem "1" and "2"."""
    return branch.split(".")[-2].removeprefix("inception")


def pack(picture: Picture) -> tuple[dict[str, Any], str]:
    """What the page needs of a picture: a description for JSON, and the packed arrays.

    The arrays: codes (uint8) of all kept maps, then of the attributions; then, as little-endian
    float32, per statistic one value for each kept channel, then the attributions' minima and
    maxima. Deflated, in base64.
    """
    kept = {module: _kept(picture, module) for module in picture.maps}
    codes = [quantize(picture.maps[m][rows.channel])[0].tobytes() for m, rows in kept.items()]
    explained = [quantize(picture.attribution[m][None]) for m in picture.maps]
    shown = pd.concat(kept.values())
    numbers = [shown[column].to_numpy() for column in _STATISTICS]
    numbers += [np.concatenate([one[i] for one in explained]) for i in (1, 2)]
    packed = b"".join(codes + [one[0].tobytes() for one in explained])
    packed += np.concatenate(numbers).astype("<f4").tobytes()
    branches = [
        {
            "stage": _stage(module),
            "branch": rows.branch.iloc[0],
            "module": module,
            "start": int(rows.concat_index.iloc[0] - rows.channel.iloc[0]),
            "count": len(picture.maps[module]),
            "channels": None if len(rows) == len(picture.maps[module]) else rows.channel.tolist(),
            "side": picture.maps[module].shape[1:],
        }
        for module, rows in kept.items()
    ]
    about = {
        "name": picture.name,
        "source": picture.source,
        "photograph": "data:image/jpeg;base64," + _base64(_jpeg(picture.pixels)),
        "size": picture.pixels.shape[0],
        "predictions": [[label, round(p, 4)] for label, p in picture.predictions],
        "target": picture.target,
        "branches": branches,
    }
    return about, _base64(zlib.compress(packed, 9))


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


class Explorer:
    """A page to click through every channel of every branch.

    pictures   at least one `Picture`
    note       which weights; it stands in the page's head
    method     of the attribution
    session    pages with the same one remember what was chosen (empty: nothing is remembered)
    """

    def __init__(
        self, pictures: Sequence[Picture], *, note: str, method: str = "grad_cam", session: str = ""
    ) -> None:
        self.pictures, self.note, self.method, self.session = pictures, note, method, session

    @property
    def statistics(self) -> pd.DataFrame:
        """The pictures' statistics in one frame, a row per picture and channel."""
        return pd.concat([picture.statistics for picture in self.pictures], ignore_index=True)

    @property
    def title(self) -> str:
        names = ", ".join(picture.name for picture in self.pictures)
        return f"Inside the Inception branches: {names}"

    def html(self) -> str:
        """The page: one document, no request to anywhere."""
        packed = [pack(picture) for picture in self.pictures]
        data = {
            "note": self.note,
            "method": METHOD_LABELS.get(self.method, self.method),
            "session": self.session,
            "colors": {b: [round(255 * c) for c in to_rgb(style.BRANCH_COLORS[b])]
                       for b in style.BRANCH_COLORS},
            "for": [round(255 * c) for c in to_rgb(style.EMPHASIS)],
            "against": [round(255 * c) for c in to_rgb(style.BRANCH_COLORS["1x1"])],
            "pictures": [about for about, _ in packed],
        }  # fmt: skip
        maps = "\n".join(
            f'<script type="text/plain" id="maps{i}">{content}</script>'
            for i, (_, content) in enumerate(packed)
        )
        parts = {
            "title": html.escape(self.title),
            "emphasis": style.EMPHASIS,
            # No "<" leaves a JSON string: a name cannot end the element that it stands in.
            "data": json.dumps(data).replace("<", "\\u003c"),
            "maps": maps,
        }
        template = files("gnetlab.draw").joinpath("explorer.html").read_text(encoding="utf-8")
        return re.sub(r"\[\[(\w+)\]\]", lambda found: parts[found[1]], template)

    def save(self, path: str | Path) -> Path:
        """Write the page to `path`; its folder is made if needed."""
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def figure(self, picture: int = 0) -> Figure:
        """The still sheet of one picture."""
        return explorer_figure(self.pictures[picture], note=self.note)

    def _repr_png_(self) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        with style.context():
            self.figure().savefig(drawn, format="png", dpi=120)
        Image.open(drawn).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
        return small.getvalue()

    def _repr_html_(self, png: bytes | None = None) -> str:
        # A notebook that is not trusted loses the frame and keeps the image; so does a reader
        # without scripts. Where the script runs, it hides the image and fits the frame's height.
        still = _base64(png or self._repr_png_())
        alt = html.escape(_described(self.pictures[0], self.note))
        return (
            f'<div><iframe srcdoc="{html.escape(self.html())}" title="{html.escape(self.title)}" '
            'style="width:100%;max-width:932px;height:150px;border:0"></iframe>'
            f'<img src="data:image/png;base64,{still}" alt="{alt}" width="864"></div>'
        )

    def _repr_mimebundle_(self, **_options: Any) -> dict[str, Any]:
        png = self._repr_png_()
        return {
            "text/html": self._repr_html_(png),
            "image/png": _base64(png),
            "text/plain": repr(self),
        }

    def __repr__(self) -> str:
        return f"{self.title} ({self.note}); .save('explorer.html') writes it, .figure() draws it"


def explorer_figure(picture: Picture, *, note: str = "") -> Figure:
    """Of every branch the liveliest channel over the picture, a column per module.

    Over each panel the channel's index within the branch. Each map is scaled to its own range.
    """
    stages = list(dict.fromkeys(map(_stage, picture.maps)))
    branches = list(dict.fromkeys(picture.statistics.branch))
    liveliest = picture.statistics.groupby("module", sort=False).deviation.idxmax()
    chosen = picture.statistics.loc[liveliest]
    grey = picture.pixels.mean(axis=2) / 255 * 0.45 + 0.5
    side = picture.pixels.shape[0]
    step = 5.6 / len(stages)  # inches from panel to panel
    crowded = step < 0.45  # too narrow for the modules' names side by side
    head = 0.6 if crowded else 0.3
    pitch = max(step + 0.02, 0.36)  # and from row to row, whose names need room
    # At least as high as the picture and what is under it.
    width, height = style.WIDTHS["page"], max(pitch * len(branches) + head + 0.2, 2.2)
    with style.context():
        figure = Figure((width, height))
        figure.set_label(_described(picture, note))

        def panel(left: float, top: float, size: float) -> Axes:
            """Axes without frame, in inches from the left and the top."""
            place = (left / width, 1 - (top + size) / height, size / width, size / height)
            ax = figure.add_axes(place)
            ax.set_axis_off()
            return ax

        panel(0.05, 0.3, 1.2).imshow(picture.pixels)
        name = figure.text(0.05 / width, 1 - 0.25 / height, "", fontweight="bold")
        _shorten(name, picture.name, 1.35)
        for i, (label, p) in enumerate(picture.predictions[:3]):
            line = figure.text(0.05 / width, 1 - (1.6 + 0.13 * i) / height, "", va="top",
                               fontsize=6.5)  # fmt: skip
            _shorten(line, label, 1.3, f"  {p:.1%}")
        for row in chosen.itertuples():
            column = stages.index(_stage(row.module))
            left, top = 1.58 + column * step, head + branches.index(row.branch) * pitch
            ax = panel(left, top, step - 0.1)
            codes = quantize(picture.maps[row.module][[row.channel]])[0][0] / 255
            tint = np.empty((*codes.shape, 4))
            tint[..., :3], tint[..., 3] = to_rgb(style.BRANCH_COLORS[row.branch]), 0.9 * codes
            for layer, options in ((grey, {"cmap": "gray", "vmin": 0, "vmax": 1}), (tint, {})):
                ax.imshow(layer, extent=(0, side, side, 0), interpolation="nearest", **options)
            ax.set_title(row.channel, fontsize=5.5, loc="center", pad=1.5)
            if row.branch == branches[0]:
                figure.text((left + (step - 0.1) / 2) / width, 1 - (head - 0.15) / height,
                            style.plain(stages[column]), ha="center", fontweight="bold",
                            rotation=90 if crowded else 0)  # fmt: skip
            if column == 0:
                ax.text(-0.08, 0.5, row.branch, transform=ax.transAxes, rotation=90, ha="right",
                        va="center", fontweight="bold")  # fmt: skip
        figure.text(0.995, 0.02, style.plain(note), fontsize=5.5, color=style.QUIET, ha="right")
    return figure


def _shorten(text: Text, words: str, inches: float, end: str = "") -> None:
    """Write `words` and `end` there, of the words as many letters as there is room for."""
    room, kept = inches * text.figure.dpi, words
    text.set_text(style.plain(words + end))
    while kept and text.get_window_extent().width > room:
        kept = kept[:-1]
        text.set_text(style.plain(f"{kept.rstrip()}…{end}"))


def _described(picture: Picture, note: str) -> str:
    return f"{picture.name}: of every branch the channel that varies most over it. {note}"
