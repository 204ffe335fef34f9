"""Door two: every channel of every branch over pictures of yours, to look at and to pass on.

`explore()`       measures, and hands arrays to `gnetlab.draw.explorer`
`LiveExplorer`    the same with controls for what needs the network: pictures, classes, methods
"""

from __future__ import annotations

import html
import operator
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from gnetlab.draw.explorer import Explorer, Picture
from gnetlab.draw.sliders import BATCH
from gnetlab.measure.attribution import METHODS, branch_attribution
from gnetlab.measure.costs import locate
from gnetlab.measure.hooks import in_mode, record
from gnetlab.net.data import Photograph, crop, open_image, photographs, preprocess
from gnetlab.net.model import branch_names

Image = str | Path | Photograph
LARGEST = 64_000_000  # values in one explorer; a browser unpacks as many bytes


def explore(
    model: nn.Module,
    images: Image | Sequence[Image],
    *,
    size: int = 224,
    targets: int | str | Sequence[int | str] | None = None,
    classes: Sequence[str] | None = None,
    channels: int | None = None,
    method: str = "grad_cam",
) -> Explorer:
    """Every feature map of every branch over one or several pictures, as one page to click through.

    model      a network of `googlenet()`
    images     a photograph's name, a path, or a `Photograph`; or several of these
    size       side in pixels of the central square that the network sees
    targets    the class that is explained, by number or name, one or one per image (None: the
               predicted one)
    classes    names of the classes (None: `model.classes`, which pretrained networks have, or
               their numbers)
    channels   of every branch keep only so many, the liveliest (None: all of them)
    method     of `branch_attribution`: "grad_cam", "gradient_x_activation" or "conductance"

    The last expression of a cell shows it: with controls where a kernel listens, without them in a
    batch run. `save(path)` writes a page that opens anywhere, `figure(i)` draws a still sheet, and
    `statistics` has a row per picture and channel. One forward pass; the model's mode is restored.

    Raises FileNotFoundError for an unknown image and ValueError for one that cannot be read, no
    images, another network, a class that it does not have, or more maps than a browser can hold.

    >>> import gnetlab as gl
    >>> model = gl.googlenet("cifar", width=0.125, seed=0)
    >>> explorer = gl.explore(model, ["cat", "coffee"], size=32, channels=4)
    >>> explorer.save("explorer.html").name
    'explorer.html'
    >>> explorer.statistics.groupby("picture").module.nunique().to_dict()  # branches
    {'cat': 36, 'coffee': 36}
    """
    if classes is None:
        classes = getattr(model, "classes", None)
    asked = {"size": size, "targets": targets, "classes": classes, "channels": channels}
    pictures = _measure(model, images, method=method, **asked)
    options = {"note": getattr(model, "weights_note", ""), "method": method}
    if os.environ.get(BATCH) or not _kernel_listens():
        return Explorer(pictures, **options)
    return LiveExplorer(pictures, model=model, images=images, asked=asked, **options)


def _measure(
    model: nn.Module,
    images: Image | Sequence[Image],
    *,
    size: int,
    targets: int | str | Sequence[int | str] | None,
    classes: Sequence[str] | None,
    channels: int | None,
    method: str,
) -> list[Picture]:
    names = branch_names(model)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no Inception modules of gnetlab; explore takes "
            "gnetlab.googlenet(...), before gnetlab.fuse"
        )
    if size < 1:
        raise ValueError(f"size={size} asked; give the side of the picture in pixels, such as 224")
    if channels is not None and channels < 1:
        raise ValueError(f"channels={channels} asked; keep at least 1 per branch, or None for all")
    opened = _open(images)
    weight = next(model.parameters())
    pixels = torch.cat([preprocess(photograph.pixels, size) for photograph in opened]).to(weight)
    keeping = {"device": "cpu", "dtype": torch.float32}
    with in_mode(model, False), torch.no_grad(), record(model, names, **keeping) as maps:
        probabilities = model(pixels).float().softmax(1).cpu()
    count = probabilities.shape[1]
    if classes is not None and len(classes) != count:
        raise ValueError(
            f"{len(classes)} names in classes; this network has {count} classes: give one name for "
            "each, or set model.classes = None"
        )
    each = [targets] if np.ndim(targets) == 0 else list(targets)
    each = each * len(opened) if len(each) == 1 else each
    if len(each) != len(opened):
        raise ValueError(f"{len(each)} targets for {len(opened)} images; give one, or one for each")
    best = probabilities.argmax(1).tolist()
    labels = [
        predicted if target is None else _class(target, classes, count)
        for target, predicted in zip(each, best, strict=True)
    ]
    kept = min(channels or 10**6, max(values.shape[1] for values in maps.values()))
    total = sum(values[:, :kept].numel() for values in maps.values())
    if total > LARGEST:
        raise ValueError(
            f"{len(opened)} images of {size} px have {total / 1e6:.0f} million values to show; at "
            f"most {LARGEST / 1e6:.0f} million fit. Take fewer images, a smaller size (size=64), "
            "or the liveliest channels only (channels=16)"
        )
    explained = branch_attribution(
        model, pixels, torch.tensor(labels, device=pixels.device), method=method
    )

    def label(index: int) -> str:
        return f"class {index}" if classes is None else f"{classes[index]} ({index})"

    pictures = []
    for i, photograph in enumerate(opened):
        top = probabilities[i].topk(min(5, count))
        of_picture = {name: values[i].numpy() for name, values in maps.items()}
        pictures.append(
            Picture(
                photograph.name,
                photograph.source,
                crop(photograph.pixels, size),
                [(label(j), p) for p, j in zip(top[0].tolist(), top[1].tolist(), strict=True)],
                label(labels[i]),
                of_picture,
                {name: values[i] for name, values in explained.items()},
                _statistics(photograph.name, of_picture),
                channels,
            )
        )
    return pictures


def _open(images: Image | Sequence[Image]) -> list[Photograph]:
    single = isinstance(images, str | os.PathLike | Photograph)
    try:
        given = [images] if single else list(images)
    except TypeError:
        given = [images]
    if not given:
        raise ValueError(
            f"no images were given; try images='cat' (there are {', '.join(photographs())}) or "
            "the path of a picture"
        )
    opened = []
    for image in given:
        if isinstance(image, str | os.PathLike):
            image = open_image(image)
        shape = getattr(getattr(image, "pixels", None), "shape", None)
        if shape is None or len(shape) != 3 or shape[2] != 3 or image.pixels.dtype != np.uint8:
            raise ValueError(
                f"an image of type {type(image).__name__} was given; explore takes a photograph's "
                "name, a path, or gnetlab.net.data.Photograph(name, pixels, source) with pixels "
                "H x W x 3 uint8"
            )
        opened.append(image)
    return opened


def _class(target: int | str, classes: Sequence[str] | None, count: int) -> int:
    """The number of a class that was given as number or name."""
    if classes is not None and target in classes:
        return list(classes).index(target)
    try:
        index = int(target) if isinstance(target, str) else operator.index(target)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < count:
        named = "" if classes is None else f", or a name such as {classes[0]!r}"
        raise ValueError(
            f"class {target!r} asked; this network has {count} classes: give a number from 0 to "
            f"{count - 1}{named}"
        )
    return index


def _statistics(picture: str, maps: dict[str, np.ndarray]) -> pd.DataFrame:
    """Columns: `picture`, `module` (dotted name of the branch), `stage`, `branch`, `channel`.

    Then `concat_index` (in the module's output), `mean`, `minimum`, `maximum`, `deviation`,
    `zero_fraction` (share of exact zeros) and `energy` (mean square), over the map's positions.
    """
    frames, start = [], {}
    for name, values in maps.items():
        module, (stage, branch) = name.rpartition(".")[0], locate(name)
        index = np.arange(len(values))
        flat = values.reshape(len(values), -1).astype(np.float64)
        columns = {
            "picture": picture, "module": name, "stage": stage, "branch": branch, "channel": index,
            "concat_index": start.get(module, 0) + index, "mean": flat.mean(1),
            "minimum": flat.min(1), "maximum": flat.max(1), "deviation": flat.std(1),
            "zero_fraction": (flat == 0).mean(1), "energy": (flat**2).mean(1),
        }  # fmt: skip
        frames.append(pd.DataFrame(columns))
        start[module] = start.get(module, 0) + len(values)
    return pd.concat(frames, ignore_index=True)


def _kernel_listens() -> bool:
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    return hasattr(get_ipython(), "kernel")


class LiveExplorer(Explorer):
    """An explorer below controls that measure anew: picture, class, attribution.

    What cannot be measured (an unreadable path, a class that is not there) is said beside the
    controls, and the explorer stays as it was.
    """

    def __init__(self, pictures: Sequence[Picture], *, model: nn.Module, images: Any,
                 asked: dict[str, Any], **options: Any) -> None:  # fmt: skip
        super().__init__(pictures, session=uuid.uuid4().hex, **options)
        self._model, self._images, self._asked = model, images, asked

    def controls(self, changed: Any) -> Any:
        """The controls (an ipywidgets box); `changed()` is called after each new measurement."""
        import ipywidgets as widgets

        wide = {"style": {"description_width": "6em"}, "layout": widgets.Layout(width="34em")}
        classes = self._asked["classes"]
        picture = widgets.Combobox(
            description="picture", options=list(photographs()), continuous_update=False, **wide,
            placeholder="as called; or a photograph's name, or a path",
        )  # fmt: skip
        target = widgets.Combobox(
            description="class", options=list(map(str, classes or [])), continuous_update=False,
            placeholder="as called; or a class by number or name", **wide,
        )  # fmt: skip
        methods = [self.method, *(method for method in METHODS if method != self.method)]
        method = widgets.Dropdown(description="attribution", options=methods, **wide)
        status = widgets.HTML()

        def measure(_change: Any) -> None:
            status.value = "measuring …"
            asked = dict(self._asked)
            if target.value.strip():
                asked["targets"] = target.value.strip()
            elif picture.value.strip():
                asked["targets"] = None  # classes asked for other pictures say nothing of this one
            images = picture.value.strip() or self._images
            try:
                self.pictures = _measure(self._model, images, method=method.value, **asked)
            except (OSError, RuntimeError, ValueError) as error:
                status.value = f'<b style="color:#C4451C">{html.escape(str(error))}</b>'
                return
            self.method = method.value
            status.value = ""
            changed()

        for control in (picture, target, method):
            control.observe(measure, "value")
        return widgets.VBox([picture, target, method, status])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        shown: list[Any] = []
        display(self.controls(lambda: shown[0].update(self._repr_mimebundle_(), raw=True)))
        shown.append(display(self._repr_mimebundle_(), raw=True, display_id=True))
