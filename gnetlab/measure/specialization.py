"""What single channels select for, and whether the branches of a module differ in it.

`channel_selectivity()`  orientation, scale and colour of every channel, from gratings, no labels
`specialization()`       do a module's branches differ in them, against permuted branches
`PUBLISHED`, `published_counts()`  Distill's counts of labelled units, with chance recomputed
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gnetlab.measure.costs import locate
from gnetlab.measure.devices import float64
from gnetlab.measure.hooks import in_mode, record
from gnetlab.net.architecture import MODULES, Widths
from gnetlab.net.data import DEVIATION, MEAN
from gnetlab.net.model import GoogLeNet, branch_names

PROPERTIES = ("orientation", "scale", "colour")
ORIENTATIONS = tuple(22.5 * i for i in range(8))  # of the bars: degrees, 0 lying, 90 upright
FREQUENCIES = tuple(2.0 ** (-5 + i / 2) for i in range(7))  # 1/32 ... 1/4 cycles per pixel
HUES = (0.0, 60.0, 120.0)  # axes of colour: degrees, each from a hue to its opposite
# Positions that a stride apart see one phase alias: of what rectifying adds, the mean over three
# phases lets only the sixth harmonic through, over four already the fourth, which is larger.
PHASES = 3
GREY, CONTRAST = 0.45, 0.45  # mean pixel, and length of the RGB vector that is added at a crest
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: what makes the grey copy of a picture


class _Grating(NamedTuple):
    orientation: int  # indices into the lists above; hue -1 is black and white
    frequency: int
    hue: int


def _gratings() -> list[_Grating]:
    """Black and white at every orientation and frequency; coloured at half, a third of them."""
    grey = [_Grating(o, f, -1) for o, f in product(range(len(ORIENTATIONS)), range(7))]
    coloured = product(range(0, len(ORIENTATIONS), 2), range(0, 7, 3), range(len(HUES)))
    return grey + [_Grating(*one) for one in coloured]


@functools.cache
def _axes() -> Tensor:
    """Unit vectors of RGB: one per hue, all of luma 0, and last the grey one: (hues + 1) x 3."""
    grey = torch.ones(3, dtype=torch.float64) / 3**0.5
    luma = torch.tensor(LUMA, dtype=torch.float64)
    first = torch.linalg.cross(luma, grey)
    first = first / first.norm()  # any pair that spans the plane of equal luma
    second = torch.linalg.cross(luma, first)
    angles = torch.deg2rad(torch.tensor(HUES, dtype=torch.float64))[:, None]
    return torch.cat([angles.cos() * first + angles.sin() * second / second.norm(), grey[None]])


def _draw(gratings: Sequence[_Grating], size: int) -> Tensor:
    """Normalized images, phases innermost: (gratings * PHASES) x 3 x size x size."""
    angle = torch.deg2rad(torch.tensor([ORIENTATIONS[g.orientation] for g in gratings]))
    frequency = torch.tensor([FREQUENCIES[g.frequency] for g in gratings])
    place = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    # The bars lie along (cos, -sin) of the angle, as rows count downwards: across is (sin, cos).
    across = torch.einsum("g,x->gx", angle.sin(), place)[:, None, None, :]
    across = across + torch.einsum("g,y->gy", angle.cos(), place)[:, None, :, None]
    phase = torch.arange(PHASES).view(1, PHASES, 1, 1) * (2 * torch.pi / PHASES)
    wave = torch.cos(2 * torch.pi * frequency.view(-1, 1, 1, 1) * across + phase)
    colour = _axes()[[g.hue for g in gratings]].float()
    pixels = GREY + CONTRAST * torch.einsum("gphw,gc->gpchw", wave, colour).flatten(0, 1)
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    return (pixels - mean) / deviation


def _respond(state: list[Tensor] | None, maps: Tensor) -> list[Tensor]:
    """Mean over the central region and the phases: gratings x channels, one tensor per batch."""
    top, left = (side // 4 for side in maps.shape[2:])
    middle = maps[:, :, top : maps.shape[2] - top, left : maps.shape[3] - left]
    response = middle.float().mean((2, 3)).unflatten(0, (-1, PHASES)).mean(1)
    return [*(state or []), float64(response).cpu()]


def channel_selectivity(model: GoogLeNet, *, size: int = 128, batch_size: int = 60) -> pd.DataFrame:
    """What every channel of every branch prefers among gratings, one row per channel.

    model        gnetlab's, for RGB images
    size         side of the gratings in pixels. At 128 no position that counts in 3a of the paper's
                 network sees the border; higher up all do. 64 takes a fifth of the time
    batch_size   images at a time, in whole gratings; memory does not grow with their number

    Black-and-white gratings of 8 orientations and 7 frequencies, and gratings that go from a hue
    to its opposite at equal luma (3 such axes, 4 orientations, 3 frequencies), of equal RMS
    contrast in RGB, all in 3 phases: 276 images. A response is the channel's mean after ReLU over
    phases and the central half of its map (the whole map where that is under 4 wide).

    Columns: `module` (dotted name of the branch), `stage`, `branch`, `channel` (in the branch),
    `concat_index` (in the module's output), `responds` (to any grating at all; where not, the
    rest is NA, and where only to coloured ones, all but `colour`), and
    `orientation`            |sum r exp(2i angle)| / sum r at the preferred frequency: 1 - circular
                             variance; 0 for none and for two at right angles, 1 for a single one
    `preferred_orientation`  of the bars, degrees counter-clockwise, 0 lying, 90 upright
    `scale`                  (1 - mean(r)^2 / mean(r^2)) / (1 - 1/7) of the response per frequency:
                             0 equal to all, 1 a single one
    `preferred_frequency`    cycles per pixel, the best of the 7
    `colour`                 (c - g) / (c + g), c the mean response to the coloured gratings, g to
                             the same in black and white: -1 grey only, 1 colour only; NA where
                             neither evokes a response

    What a channel puts out for plain grey counts as response, and lowers all three. The model
    runs in eval mode. Raises ValueError for another network, or one for grey images.

    Sources: Ringach, Shapley and Hawken 2002, J. Neurosci. 22:5639 (circular variance); Vinje and
    Gallant 2000, Science 287:1273 (sparseness, used here over frequencies).

    >>> import gnetlab as gl
    >>> model = gl.googlenet("cifar", width=0.125, seed=0)
    >>> frame = gl.channel_selectivity(model, size=16)
    >>> frame.shape, frame.branch.unique().tolist()
    ((686, 11), ['1x1', '3x3', '5x5', 'pool'])
    >>> bool(frame.orientation.dropna().between(0, 1).all())
    True
    >>> from gnetlab.measure.specialization import specialization
    >>> specialization(frame, permutations=20).columns.tolist()  # do branches differ?
    ['stage', 'property', 'eta_squared', 'p', 'p_adjusted', 'highest', 'lowest', 'channels']
    """
    if not isinstance(model, GoogLeNet) or model.architecture.in_channels != 3:
        found = "for grey images" if isinstance(model, GoogLeNet) else type(model).__name__
        raise ValueError(
            f"selectivity of a network {found} asked; gratings have colours: give a gnetlab "
            "network of in_channels=3 (torchvision's weights fit gnetlab.googlenet('torchvision'))"
        )
    names, gratings, step = branch_names(model), _gratings(), max(1, batch_size // PHASES)
    parameter = next(model.parameters())
    evaluating = in_mode(model, training=False)
    with evaluating, torch.no_grad(), record(model, names, reduce=_respond) as responses:
        for i in range(0, len(gratings), step):
            model(_draw(gratings[i : i + step], size).to(parameter))
    frames = []
    for name in names:
        stage, branch = locate(name)
        tuning = _tuning(torch.cat(responses[name]).numpy(), gratings)
        place = {"module": name, "stage": stage, "branch": branch, "channel": tuning.index}
        frames.append(tuning.assign(**place))
    frame = pd.concat(frames, ignore_index=True)
    modules = frame.module.str.rpartition(".")[0]
    frame = frame.assign(concat_index=frame.groupby(modules, sort=False).cumcount())
    return frame[
        [
            "module", "stage", "branch", "channel", "concat_index", "responds", "orientation",
            "preferred_orientation", "scale", "preferred_frequency", "colour",
        ]
    ]  # fmt: skip


def _tuning(responses: np.ndarray, gratings: list[_Grating]) -> pd.DataFrame:
    """From gratings x channels to one row of selectivities per channel."""
    count = len(ORIENTATIONS) * len(FREQUENCIES)
    grey = responses[:count].reshape(len(ORIENTATIONS), len(FREQUENCIES), -1)
    same = [g.orientation * len(FREQUENCIES) + g.frequency for g in gratings[count:]]
    coloured, copies = responses[count:].mean(0), responses[same].mean(0)
    by_frequency = grey.mean(0)  # frequencies x channels
    best = by_frequency.argmax(0)
    curve = grey[:, best, np.arange(grey.shape[2])]  # orientations x channels
    turns = np.exp(2j * np.deg2rad(ORIENTATIONS))
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is NA, which is what is meant
        vector = (turns[:, None] * curve).sum(0) / curve.sum(0)
        flatness = by_frequency.mean(0) ** 2 / (by_frequency**2).mean(0)
        colour = (coloured - copies) / (coloured + copies)
    answers = by_frequency.sum(0) > 0  # to anything in black and white
    return pd.DataFrame(
        {
            "responds": responses.max(0) > 0,
            "orientation": np.abs(vector),
            "preferred_orientation": np.rad2deg(np.angle(vector)) / 2 % 180,
            "scale": (1 - flatness) / (1 - 1 / len(FREQUENCIES)),
            "preferred_frequency": np.where(answers, np.array(FREQUENCIES)[best], np.nan),
            "colour": colour,
        }
    )


def specialization(
    selectivity: pd.DataFrame, *, permutations: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Do a module's branches differ in selectivity? One row per module and property.

    selectivity    as `channel_selectivity` gives it; channels with NA do not count
    permutations   of the channels among the branches of their module, for what chance would give

    Columns: `stage`, `property` (orientation, scale, colour), `eta_squared` (share of the
    channels' variance that lies between branches, 0 to 1), `p` (share of permutations, itself
    included, that reach it), `p_adjusted` (Holm 1979, over all rows), `highest`, `lowest` (branch
    by mean), `channels` (that count). With fewer than 2 branches that have any, all is NA.

    It tests this one network: whether the same branch wins in another training is another matter.
    An untrained network passes too, since kernels and pooling filter: compare with one.
    """
    if permutations < 1:
        raise ValueError(f"permutations={permutations} asked; p needs some, 2000 by default")
    random = np.random.default_rng(seed)
    rows = []
    for (stage, group), name in product(selectivity.groupby("stage", sort=False), PROPERTIES):
        known = group[group[name].notna()]
        means = known.groupby("branch", sort=False)[name].mean()
        row: dict[str, Any] = {"stage": stage, "property": name, "channels": len(known)}
        if len(means) > 1:
            code = pd.factorize(known.branch)[0]
            row["eta_squared"], row["p"] = _variance_test(
                known[name].to_numpy(float), code, permutations, random
            )
            row |= {"highest": means.idxmax(), "lowest": means.idxmin()}
        rows.append(row)
    columns = ["stage", "property", "eta_squared", "p", "highest", "lowest", "channels"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.insert(4, "p_adjusted", _holm(frame.p.to_numpy(float)))
    return frame


def _variance_test(
    values: np.ndarray, branch: np.ndarray, permutations: int, random: np.random.Generator
) -> tuple[float, float]:
    """Eta squared of the branches, and the share of permutations that reach it."""
    values = values - values.mean()
    total = float(values @ values)
    if total <= 1e-24 * len(values):
        return 0.0, 1.0
    members = np.eye(branch.max() + 1)[branch]
    members = members / np.sqrt(members.sum(0))

    def between(rows: np.ndarray) -> np.ndarray:
        return np.square(rows @ members).sum(-1) / total

    found = float(between(values))
    chance = between(np.stack([random.permutation(values) for _ in range(permutations)]))
    return found, float((1 + (chance >= found * (1 - 1e-9)).sum()) / (1 + permutations))


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment; NA stays and does not count.

    >>> _holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    adjusted, known = np.full(len(p), np.nan), np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


class Count(NamedTuple):
    """`inside` of the `units` that people gave one label lie in one branch of a module."""

    stage: str
    label: str
    branch: str
    inside: int
    units: int
    bound: float | None  # what the article says p is below, where it says so
    source: str  # the article's text, or units counted by the labels that Distill published


# Voss et al. 2021, Branch Specialization, https://distill.pub/2020/circuits/branch-specialization
# and, for the labels, https://distill.pub/2020/circuits/early-vision (InceptionV1, ImageNet).
PUBLISHED: tuple[Count, ...] = (
    Count("3a", "black-white against colour", "5x5", 9, 9, 1e-8, "text"),
    Count("3a", "high-low frequency", "3x3", 15, 15, None, "labels"),
    Count("3a", "curves", "3x3", 11, 11, None, "labels"),
    Count("3b", "curve-related", "5x5", 30, 30, 1e-20, "text"),
    Count("4a", "boundary", "3x3", 49, 52, None, "labels"),
    Count("4a", "colour centre-surround", "1x1", 23, 23, None, "labels"),
    # 24 of 28 is quoted too; the conclusion is the same.
    Count("4a", "complex shapes", "5x5", 29, 38, None, "labels"),
)


def published_counts() -> pd.DataFrame:
    """`PUBLISHED` beside what chance would give, one row per label.

    Columns: `stage`, `label`, `branch`, `inside`, `units` (counts as published), `branch_width`,
    `width` (channels of branch and module; Inception5h, which Distill took, has 204 in 4a's 3x3),
    `expected` (inside, if labels fell on channels at random), `p` (hypergeometric, of as many
    inside or more), `published_bound` (NA where none), `source` ("text", "labels").

    People chose labels and units knowing the branches, and p is not corrected for the labels that
    were not reported: it says what was found is no accident, not what causes it.

    >>> [f"{p:.1e}" for p in published_counts().p[[0, 3]]]
    ['2.5e-09', '1.7e-23']
    """
    from scipy.stats import hypergeom

    rows = []
    for count in PUBLISHED:
        widths = MODULES[count.stage]
        if count.stage == "4a":
            widths = widths._replace(conv3x3=204)
        by_branch = outputs(widths)
        width, whole = by_branch[count.branch], sum(by_branch.values())
        rows.append(
            {
                **{k: getattr(count, k) for k in ("stage", "label", "branch", "inside", "units")},
                "branch_width": width,
                "width": whole,
                "expected": count.units * width / whole,
                "p": hypergeom.sf(count.inside - 1, whole, width, count.units),
                "published_bound": count.bound,
                "source": count.source,
            }
        )
    return pd.DataFrame(rows).astype({"published_bound": float})


def outputs(widths: Widths) -> dict[str, int]:
    """Output channels of each branch."""
    counts = (widths.conv1x1, widths.conv3x3, widths.conv5x5, widths.pool_proj)
    return dict(zip(("1x1", "3x3", "5x5", "pool"), counts, strict=True))
