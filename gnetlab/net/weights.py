"""Weights: find them, read them safely, and fit them into a network.

`find()`                  what a `weights=` argument stands for
`read_checkpoint()`       a .pth, .pt, .safetensors or .onnx file as a state dict with our names
`implied()`, `assumed()`  what a state dict tells about its network, and what it does not
`fill()`                  copy a state dict into a network, or say which keys and shapes differ
`calibrate_batch_norm()`  running statistics for a random network, so that it can be looked at

Reading never runs code from a file: `weights_only=True`, safetensors or ONNX initializers.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gnetlab.net import bvlc, data
from gnetlab.net.architecture import Architecture

IMAGENET_SHA256 = "1378be20"  # the first digits, as in the file's name (torch.hub's convention)

# What `gnetlab train bundled` made; bundled.json beside it says how, and how good it is.
BUNDLED = Path(__file__).with_name("bundled.safetensors")
BUNDLED_SHA256 = "a16fc66f8f6b2756f91871a15b3af2b5ba272bd7840f9c7cbd70c84b407f6326"

_TORCHVISION_NAMES = {
    "conv2.": "conv2_reduce.",
    "conv3.": "conv2.",
    ".branch1.": ".branch1x1.",
    ".branch2.0.": ".branch3x3.reduce.",
    ".branch2.1.": ".branch3x3.conv.",
    ".branch3.0.": ".branch5x5.reduce.",
    ".branch3.1.": ".branch5x5.conv.",
    ".branch4.1.": ".branch_pool.proj.",
}


class Found(NamedTuple):
    """What a `weights=` argument stands for.

    `path` is None for a random start; `preset` is the one the weights belong to (None: any);
    `changes` are architecture fields they imply; `note` is the sentence that figures print;
    `classes` are the names of what the network tells apart, where they are known.
    """

    path: Path | None
    note: str
    preset: str | None = None
    changes: dict[str, Any] = {}  # noqa: RUF012  (never written to)
    classes: tuple[str, ...] | None = None


class Checkpoint(NamedTuple):
    """A state dict with our names, and the saved architecture's fields where the file has them."""

    state: dict[str, Tensor]
    architecture: dict[str, Any] | None


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, by name: which weights these are."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        # As bytes: numpy has no bfloat16.
        values = value.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find(weights: str | Path) -> Found:
    """Locate weights: "imagenet", "bundled", "auto", "bvlc:PATH" or a path.

    ImageNet's are fetched into torch.hub's cache, and are known by their digest elsewhere too; the
    bundled ones came with gnetlab; BVLC's come from a file (see `gnetlab.net.bvlc`).

    "auto" takes ImageNet's where they are in the cache or can be fetched, else the bundled ones; a
    damaged file is an error, not a reason to fall back. Raises RuntimeError without a network for
    "imagenet", ValueError for "bvlc" without a path, FileNotFoundError for a path that is not
    there.
    """
    if weights == "bundled":
        return _bundled()
    if weights == "imagenet":
        try:
            return _imagenet()
        except OSError as error:
            raise RuntimeError(
                f"weights='imagenet' asked, but they could not be fetched ({error}). Connect to "
                f"the internet, or place the file at {imagenet_path()[1]}, or use weights='auto'"
            ) from error
    if weights == "auto":
        try:
            return _imagenet()
        except OSError:
            return _bundled()
    original = bvlc.locate(weights)
    path = original or Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights={str(weights)!r} asked: no such file. Give 'imagenet', 'bundled', 'auto', "
            "'random', 'bvlc:PATH', None or the path of a .pth, .pt, .safetensors or .onnx file"
        )
    if original:
        changes = {"transform_input": "caffe"}
        return Found(path, bvlc.NOTE, "paper", changes, _imagenet_classes())
    if _sha256(path).startswith(IMAGENET_SHA256):  # which need their input transform here too
        return _imagenet_at(path)
    return Found(path, f"weights from {path.name}")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _bundled() -> Found:
    digest = _sha256(BUNDLED) if BUNDLED.is_file() else "missing"
    if digest != BUNDLED_SHA256:
        raise ValueError(
            f"{BUNDLED} is damaged: its SHA-256 is {digest}, expected {BUNDLED_SHA256}. Install "
            "gnetlab again"
        )
    note = "bundled weights (trained on crops of 16 photographs, not on ImageNet)"
    changes = {"norm": "batch", "heads": (), "num_classes": 16}
    return Found(BUNDLED, note, "paper", changes, data.PhotoCrops.classes)


def random_start(seed: int) -> Found:
    """Seeded random weights with calibrated batch norm, on which activations can be looked at."""
    note = f"random weights (seed {seed}), batch norm calibrated on photographs"
    return Found(None, note, changes={"norm": "batch"})


def imagenet_path() -> tuple[str, Path]:
    """Where torchvision's GoogLeNet is fetched from, and its place in torch.hub's cache."""
    from torchvision.models import GoogLeNet_Weights

    url = GoogLeNet_Weights.IMAGENET1K_V1.url
    return url, Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def _imagenet() -> Found:
    url, path = imagenet_path()
    if not path.exists():
        if os.environ.get(data.OFFLINE):
            raise OSError(f"{data.OFFLINE} is set")
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5):
            pass  # torch.hub waits for ever where nothing answers; this does not
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=IMAGENET_SHA256)
    digest = _sha256(path)
    if not digest.startswith(IMAGENET_SHA256):
        raise ValueError(
            f"{path} is not torchvision's GoogLeNet: its SHA-256 starts with {digest[:8]}, "
            f"expected {IMAGENET_SHA256}. Delete the file and try again"
        )
    return _imagenet_at(path)


def _imagenet_at(path: Path) -> Found:
    note = "ImageNet weights (torchvision IMAGENET1K_V1; its '5x5' branch is a 3x3)"
    changes = {"transform_input": True, "heads": ()}  # the checkpoint's heads are untrained
    return Found(path, note, "torchvision", changes, _imagenet_classes())


def _imagenet_classes() -> tuple[str, ...]:
    from torchvision.models import GoogLeNet_Weights

    return tuple(GoogLeNet_Weights.IMAGENET1K_V1.meta["categories"])


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint without running code from it; torchvision's names become ours.

    Accepts a bare state dict, a training checkpoint (its "model" entry) or BVLC GoogLeNet's .onnx.
    Raises ValueError for a truncated, foreign or hostile file.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        return Checkpoint(bvlc.read(path), None)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} was refused: it is not a checkpoint, or holds objects other than tensors, "
            f"which could run code when read ({str(error).splitlines()[0][:120]}). Save a plain "
            "state dict (torch.save(model.state_dict(), ...)) or use .safetensors"
        ) from error
    except Exception as error:  # safetensors and torch.load raise many kinds for a damaged file
        raise ValueError(
            f"{path} cannot be read: damaged, truncated or not a checkpoint "
            f"({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}). "
            "Fetch or save it again"
        ) from error
    saved = None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        saved, content = content.get("architecture"), content["model"]
    if not isinstance(content, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise ValueError(f"{path} holds no state dict (names and tensors); save model.state_dict()")
    return Checkpoint(from_torchvision(content), saved)


def saved_architecture(fields: dict[str, Any], source: str | Path) -> Architecture:
    """The `Architecture` that a checkpoint was saved with. Raises ValueError if it is not one."""
    try:
        heads = tuple(fields.get("heads", ()))
        return Architecture().change(**(fields | {"heads": heads}))
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{source} holds an architecture that cannot be read: {error}. Save its 'model' alone, "
            "a plain state dict, and give googlenet() the fields"
        ) from error


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's GoogLeNet keys to ours; a state dict with our names passes through.

    >>> list(from_torchvision({"inception3a.branch1.conv.weight": torch.zeros(1)}))
    ['inception3a.branch1x1.conv.weight']
    """
    if not any(".branch1." in key for key in state):
        return state
    pattern = re.compile(r"^conv[23]\.|\.branch[1-4]\.(?:(?<!branch1\.)[01]\.)?")
    return {
        pattern.sub(lambda match: _TORCHVISION_NAMES.get(match[0], match[0]), key): value
        for key, value in state.items()
    }


def implied(state: dict[str, Tensor]) -> dict[str, Any]:
    """Fields of the architecture that names and shapes in a state dict tell.

    >>> implied({"fc.weight": torch.zeros(5, 512), "conv1.conv.weight": torch.zeros(32, 3, 7, 7)})
    {'num_classes': 5, 'width': 0.5}
    """
    fields: dict[str, Any] = {}
    if "fc.weight" in state and state["fc.weight"].dim() == 2:
        fields["num_classes"] = len(state["fc.weight"])
    if any(".bn." in key for key in state):
        fields["norm"] = "batch"
    first = state.get("conv1.conv.weight")
    if first is not None and first.shape[-1] == 7:  # the paper's stem
        fields["width"] = len(first) / 64
    kernel = state.get("inception3a.branch5x5.conv.conv.weight")
    if kernel is not None and kernel.shape[-1] == 3:
        twice = "inception3a.branch5x5.conv2.conv.weight" in state
        fields["branch5x5"] = "3x3+3x3" if twice else "3x3"
    return fields


def assumed(arch: Architecture, known: Iterable[str]) -> str:
    """In words, what outputs depend on and a state dict does not tell, but for what is `known`."""
    fields = ["pool4_size", "transform_input"]
    fields += ["batch_norm_eps"] if arch.norm == "batch" else ["norm"]
    return ", ".join(f"{name}={getattr(arch, name)!r}" for name in fields if name not in known)


def fill(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy `state` into `model`; heads that the model lacks are left out.

    Raises ValueError that says which keys are missing or unexpected and which shapes differ.
    Nothing is changed then.
    """
    own = model.state_dict()
    built = {name for name, _ in model.named_children()}
    state = {k: v for k, v in state.items() if not k.startswith("aux") or k.split(".")[0] in built}
    optional = {key for key in own if key.endswith("num_batches_tracked")}
    missing = sorted(own.keys() - state.keys() - optional)
    unexpected = sorted(state.keys() - own.keys())
    shapes = [
        f"{key}: file {tuple(state[key].shape)}, network {tuple(own[key].shape)}"
        for key in own.keys() & state.keys()
        if state[key].shape != own[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "different shape": sorted(shapes)}
    if any(problems.values()):
        lines = [
            f"  {what} ({len(keys)}): {'; '.join(keys[:4])}{'; ...' if len(keys) > 4 else ''}"
            for what, keys in problems.items()
            if keys
        ]
        raise ValueError(
            f"{source} does not fit this network:\n" + "\n".join(lines) + "\n"
            "Choose the preset, num_classes, width or norm that the weights were made with"
        )
    model.load_state_dict(state, strict=False)


@torch.no_grad()
def calibrate_batch_norm(model: nn.Module, images: Tensor, *, passes: int = 1) -> None:
    """Set batch norm's running mean and variance from `images` (N x C x H x W), nothing else.

    Without it, a random network in eval mode collapses: its activations shrink by orders of
    magnitude from module to module.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        for _ in range(passes):
            model(images)
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def calibration_images(size: int, channels: int, device: torch.device | str = "cpu") -> Tensor:
    """Every photograph once, preprocessed: 16 x channels x size x size."""
    images = torch.cat([data.preprocess(p.pixels, size) for p in data.photographs().values()])
    if channels != 3:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return images.to(device)
