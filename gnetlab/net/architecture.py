"""GoogLeNet's architecture as data: the paper's Table 1, and the presets built on it.

`TABLE_1`        the rows of Table 1, with the numbers the paper prints
`Architecture`   everything that decides a network's shape; frozen, changed with `change()`
`PRESETS`        the named architectures: paper, torchvision, cifar, naive
`architecture()` a preset by name with some fields changed

Source: Szegedy et al. 2014, Going Deeper with Convolutions, arXiv 1409.4842, Table 1.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

HEAD_AFTER = {"aux1": "4a", "aux2": "4d"}  # section 5: on top of the output of 4a and 4d


class Widths(NamedTuple):
    """Output channels of an Inception module's six convolutions, in Table 1's column order."""

    conv1x1: int
    reduce3x3: int
    conv3x3: int
    reduce5x5: int
    conv5x5: int
    pool_proj: int


class Row(NamedTuple):
    """A row of Table 1 that has parameters.

    `printed_params` counts thousands (the paper's K, which fits 1024) and `printed_ops` millions
    of multiply-adds, both as printed; `size` is the side of the output in pixels at 224 x 224.
    """

    stage: str
    size: int
    depth: int
    widths: Widths | None
    printed_params: float
    printed_ops: int


class Table1(tuple[Row, ...]):
    """Table 1 of the paper (arXiv 1409.4842): a `Row` for each layer or module with parameters.

    Of a row: `stage` (conv1, conv2, 3a ... 5b, linear), `size` (side of the output in pixels, for
    an image of 224 x 224), `depth` (layers with parameters), `widths` (output channels of a
    module's six convolutions; None for plain layers), `printed_params` and `printed_ops` (as the
    paper prints them: thousands of parameters, millions of multiply-adds).

    >>> import gnetlab as gl
    >>> [row.stage for row in gl.TABLE_1]
    ['conv1', 'conv2', '3a', '3b', '4a', '4b', '4c', '4d', '4e', '5a', '5b', 'linear']
    >>> gl.TABLE_1[2].widths
    Widths(conv1x1=64, reduce3x3=96, conv3x3=128, reduce5x5=16, conv5x5=32, pool_proj=32)
    >>> sum(row.depth for row in gl.TABLE_1)  # the paper's 22 layers
    22
    >>> sum(row.printed_ops for row in gl.TABLE_1)  # the paper's 1.5 billion multiply-adds
    1502
    """


TABLE_1 = Table1(
    (
        Row("conv1", 112, 1, None, 2.7, 34),
        Row("conv2", 56, 2, None, 112, 360),
        Row("3a", 28, 2, Widths(64, 96, 128, 16, 32, 32), 159, 128),
        Row("3b", 28, 2, Widths(128, 128, 192, 32, 96, 64), 380, 304),
        Row("4a", 14, 2, Widths(192, 96, 208, 16, 48, 64), 364, 73),
        Row("4b", 14, 2, Widths(160, 112, 224, 24, 64, 64), 437, 88),
        Row("4c", 14, 2, Widths(128, 128, 256, 24, 64, 64), 463, 100),
        Row("4d", 14, 2, Widths(112, 144, 288, 32, 64, 64), 580, 119),
        Row("4e", 14, 2, Widths(256, 160, 320, 32, 128, 128), 840, 170),
        Row("5a", 7, 2, Widths(256, 160, 320, 32, 128, 128), 1072, 54),
        Row("5b", 7, 2, Widths(384, 192, 384, 48, 128, 128), 1388, 71),
        Row("linear", 1, 1, None, 1000, 1),
    )
)

MODULES: dict[str, Widths] = {row.stage: row.widths for row in TABLE_1 if row.widths}


STEMS = ("paper", "separable", "cifar", "compact", "inception")
# What Inception from the first layer on would be: 3a's shares of the widths of conv1 and conv2.
EARLY_MODULES = {
    "inception1": Widths(16, 24, 32, 4, 8, 8),
    "inception2": Widths(48, 72, 96, 12, 24, 24),
}


def _check_choice(field: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(
            f"{field} = {value!r} asked; choose one of {', '.join(map(repr, choices))}"
        )


def _unknown(what: str, name: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}"


@dataclass(frozen=True)
class Architecture:
    """What decides the shape of a network. Every field can be changed through `googlenet()`.

    norm            "batch" after every convolution; "lrn" after pool1 and conv2, as the paper (so
                    nowhere with the stem "cifar", which has neither); None
    stem            "paper" (7x7/2), "separable" (7x7 depthwise x8, then 1x1: the stem that fits
                    Table 1), "cifar" (one 3x3 of 192), "compact" (3x3/1, pool, 1x1, 3x3, pool),
                    "inception" (modules in place of conv1 and conv2, see `EARLY_MODULES`)
    branch5x5       "5x5", "3x3" (what torchvision has) or "3x3+3x3"
    reduce          1x1 reductions before 3x3 and 5x5 and after the pool; False is Figure 2(a)
    heads           which auxiliary heads exist, out of "aux1" (after 4a) and "aux2" (after 4d)
    head_pool       "5x5/3" as the paper, or "adaptive" to 4x4
    pool4_size      side of the max pool between 4e and 5a
    conv_bias       whether convolutions have a bias
    width           multiplies every channel count except the input's and the classes'
    extra_modules   this many copies of module 4c follow it, between the heads: a deeper network
    transform_input rescale from ImageNet's normalisation: True to Inception's, as torchvision does;
                    "caffe" to 0..255 less a mean, as BVLC's weights expect
    """

    name: str = "paper"
    norm: Literal["batch", "lrn"] | None = "lrn"
    stem: Literal["paper", "separable", "cifar", "compact", "inception"] = "paper"
    branch5x5: Literal["5x5", "3x3", "3x3+3x3"] = "5x5"
    reduce: bool = True
    heads: tuple[str, ...] = ("aux1", "aux2")
    head_pool: Literal["5x5/3", "adaptive"] = "5x5/3"
    pool4_size: Literal[2, 3] = 3
    conv_bias: bool = True
    batch_norm_eps: float = 1e-3
    dropout: float = 0.4
    head_dropout: float = 0.7
    in_channels: int = 3
    num_classes: int = 1000
    width: float = 1.0
    extra_modules: int = 0
    transform_input: bool | Literal["caffe"] = False

    def __post_init__(self) -> None:
        _check_choice("norm", self.norm, ("batch", "lrn", None))
        _check_choice("stem", self.stem, STEMS)
        _check_choice("branch5x5", self.branch5x5, ("5x5", "3x3", "3x3+3x3"))
        _check_choice("head_pool", self.head_pool, ("5x5/3", "adaptive"))
        _check_choice("pool4_size", self.pool4_size, (2, 3))
        _check_choice("transform_input", self.transform_input, (False, True, "caffe"))
        for field in ("reduce", "conv_bias"):  # "no" would count as yes
            _check_choice(field, getattr(self, field), (True, False))
        if isinstance(self.heads, str):
            raise ValueError(
                f"heads = {self.heads!r} asked; give a tuple of names, ({self.heads!r},)"
            )
        object.__setattr__(self, "heads", tuple(self.heads))  # a list would be another architecture
        for head in self.heads:
            _check_choice("a head", head, tuple(HEAD_AFTER))
        if len(set(self.heads)) < len(self.heads):
            raise ValueError(f"heads = {self.heads!r} asked; name each head once")
        for field, least in (("in_channels", 1), ("num_classes", 1), ("extra_modules", 0)):
            value = getattr(self, field)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(
                    f"{field} = {value!r} asked; give a whole number of at least {least}"
                )
            object.__setattr__(self, field, int(value))  # numpy's is not to be saved in a file
        if not 0 < self.width <= 16:
            raise ValueError(f"width = {self.width!r} asked; give a multiplier in (0, 16]")
        if not self.batch_norm_eps > 0:
            raise ValueError(f"batch_norm_eps = {self.batch_norm_eps!r} asked; give more than 0")
        if self.transform_input and self.in_channels != 3:
            raise ValueError(
                f"transform_input is defined for RGB, but in_channels = {self.in_channels}; "
                "set transform_input=False"
            )

    def change(self, **changes: Any) -> Architecture:
        """The same architecture with some fields replaced; an unknown field is a ValueError."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ValueError(_unknown("architecture field", name, known))
        # Batch norm has its own shift, so a bias would be a dead parameter.
        if changes.get("norm") == "batch" and self.norm != "batch":
            changes.setdefault("conv_bias", False)
        if changes.get("stem") in ("cifar", "compact"):
            changes.setdefault("head_pool", "adaptive")
        if "norm" in changes and changes["norm"] != "batch" and self.norm == "batch":
            changes.setdefault("conv_bias", True)
        return dataclasses.replace(self, **changes)

    def channels(self, count: int) -> int:
        """A channel count of Table 1 under this width; never fewer than 4."""
        return max(4, round(count * self.width))

    @property
    def stages(self) -> list[str]:
        """The Inception modules in order: "3a" ... "5b"; copies of 4c are "4c_2", "4c_3" ..."""
        after = list(MODULES).index("4c") + 1
        copies = [f"4c_{number}" for number in range(2, self.extra_modules + 2)]
        return [*list(MODULES)[:after], *copies, *list(MODULES)[after:]]

    def module_widths(self, stage: str) -> Widths:
        """The six widths of an Inception module ("3a" ... "5b") under this width."""
        stage = stage.partition("_")[0]
        widths = MODULES.get(stage) or EARLY_MODULES[stage]
        return Widths(*(self.channels(count) for count in widths))

    @property
    def smallest_input(self) -> int:
        """The smallest image side in pixels that survives every pool of the network."""
        return next(side for side in range(1, 1024) if self._survives(side))

    def _survives(self, side: int) -> bool:
        if self.stem in ("paper", "separable"):
            side = (side - 1) // 2 + 1  # conv1: 7x7, stride 2, padding 3
        pools = {"cifar": 0, "inception": 3}.get(self.stem, 2)
        for kernel in [*[3] * pools, 3, self.pool4_size]:
            if side + 1 < kernel:  # ceil mode lets a stride-2 window overhang by one pixel
                return False
            side = -(-(side - kernel) // 2) + 1
        return True


class Presets(dict[str, Architecture]):
    """The networks that `googlenet()` builds by name: a dict of name -> `Architecture`.

    paper        Table 1 as Caffe's BVLC GoogLeNet runs it: LRN, true 5x5, two heads
    torchvision  torchvision's GoogLeNet: batch norm, and a 3x3 where the paper has a 5x5
    cifar        the well-known variant for 32 x 32 pixels: one 3x3 as stem, 10 classes, no heads
    naive        Figure 2(a) of the paper: no 1x1 reductions

    `help(type(gl.PRESETS["paper"]))` explains the fields; `googlenet()` takes changes to them.
    Raises KeyError, with the nearest name, for a name that is not there.

    >>> import gnetlab as gl
    >>> list(gl.PRESETS)
    ['paper', 'torchvision', 'cifar', 'naive']
    >>> gl.PRESETS["torchvision"].branch5x5
    '3x3'
    >>> deeper = gl.PRESETS["paper"].change(norm="batch", extra_modules=2)
    >>> gl.googlenet(deeper, width=0.125).architecture.stages[4:7]
    ['4c', '4c_2', '4c_3']
    """

    def __missing__(self, name: object) -> Architecture:
        raise KeyError(_unknown("preset", name, list(self)))


PRESETS = Presets(
    {
        "paper": Architecture(),
        "torchvision": Architecture(
            name="torchvision",
            norm="batch",
            branch5x5="3x3",
            head_pool="adaptive",
            pool4_size=2,
            conv_bias=False,
            dropout=0.2,
        ),
        "cifar": Architecture(
            name="cifar",
            norm="batch",
            stem="cifar",
            branch5x5="3x3+3x3",
            heads=(),
            head_pool="adaptive",
            batch_norm_eps=1e-5,
            dropout=0.0,
            num_classes=10,
        ),
        "naive": Architecture(name="naive", reduce=False),
    }
)


def architecture(preset: str | Architecture = "paper", **changes: Any) -> Architecture:
    """A preset by name, with fields replaced. Unknown names: ValueError with the nearest.

    >>> architecture("paper", norm="batch").conv_bias
    False
    """
    if isinstance(preset, Architecture):
        return preset.change(**changes)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(_unknown("preset", preset, list(PRESETS)))
    return PRESETS[preset].change(**changes)
