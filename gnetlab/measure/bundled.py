"""A recipe for weights that can be looked at without a download.

`train_bundled()`  trains them, and writes the weights with a card that says what they are
`RECIPE`           every number that decides the outcome

The paper's network with batch norm and its true 5x5 branch learns which of 16 photographs a crop
is from: first on small crops in any of four orientations, which it must tell too, since that needs
oriented filters (Gidaris, Singh and Komodakis 2018, arXiv 1803.07728); then on larger upright ones,
at last without augmentation.
Its lower layers learn what natural images have in common; its upper layers know these photographs,
and not the world.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gnetlab.measure.distributed import processes
from gnetlab.measure.loop import evaluate, train
from gnetlab.net.architecture import architecture
from gnetlab.net.augment import AugmentedCrops
from gnetlab.net.data import PhotoCrops
from gnetlab.net.model import GoogLeNet, build

RECIPE: dict[str, Any] = {
    # Crops, and what is told of them: 64 classes, photograph and quarter turn; 16, the photograph;
    # the same of crops as they are, whose colours say much. `size` is the crops' side in pixels.
    "phases": [
        {"crops": "turned", "steps": 5000, "size": 64, "learning_rate": 0.1},
        {"crops": "augmented", "steps": 1500, "size": 96, "learning_rate": 0.02},
        {"crops": "plain", "steps": 800, "size": 96, "learning_rate": 0.01},
    ],
    "batch_size": 64,
    "scale": [40, 180],  # side in the photographs, pixels
    "momentum": 0.9,
    # Strong decay lets conv1's unlearned noise fade; on everything it silences whole branches,
    # through batch norm's scales: 3x3 and 5x5 kept under a tenth of the energy of most modules.
    "conv1_weight_decay": 1e-2,
    "weight_decay": 5e-4,
    "conv1_deviation": 0.01,
    "seed": 0,
}


def start(seed: int) -> GoogLeNet:
    """The network before training: Kaiming's start, with a conv1 that begins near zero.

    What conv1 has not learned is then small, and fades under weight decay, instead of remaining as
    noise on the filters.
    """
    arch = architecture("paper", norm="batch", heads=(), num_classes=64)
    model = build(arch, init="kaiming", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        shape = model.conv1.conv.weight.shape
        noise = torch.randn(shape, generator=generator)
        model.conv1.conv.weight.copy_(RECIPE["conv1_deviation"] * noise)
    return model


def weight_decay(name: str) -> float:
    """Weight decay of a parameter: none for batch norm and biases, most for conv1."""
    if ".bn." in name or name.endswith("bias"):
        return 0.0
    return RECIPE["conv1_weight_decay" if name.startswith("conv1.") else "weight_decay"]


def train_bundled(
    path: str | Path, *, device: torch.device | str = "cpu", steps: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Train by the recipe; write `path` (safetensors, half precision) and, as .json, its card.

    An interrupted training goes on from the checkpoints beside `path`, which belong to one recipe
    and are removed at the end. `steps` shortens each phase. Returns the card: recipe, accuracy on
    held-out crops without augmentation, SHA-256, versions. Under torchrun its processes train
    together, as in `train`, and the first one writes.
    """
    from safetensors.torch import save

    path, device = Path(path), torch.device(device)
    phases = [phase | ({"steps": steps} if steps else {}) for phase in RECIPE["phases"]]
    recipe = RECIPE | {"phases": phases}
    mark = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    model = start(recipe["seed"]).to(device)
    for number, phase in enumerate(phases, start=1):
        data = _crops(phase["crops"], phase["size"], device)
        if len(data.classes) != model.fc.out_features:  # the photograph's 4 rows become 1
            _pool_classes(model.fc)
        train(
            model, data, steps=phase["steps"], batch_size=recipe["batch_size"],
            learning_rate=phase["learning_rate"], momentum=recipe["momentum"], nesterov=True,
            cosine=True, weight_decay=weight_decay, seed=recipe["seed"], mixed_precision=True,
            channels_last=True,
            checkpoint=path.with_suffix(f".{mark}-{number}.pt"), progress=progress,
        )  # fmt: skip
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in model.to("cpu", memory_format=torch.contiguous_format).eval()
        .state_dict().items()
    }  # fmt: skip
    model.load_state_dict(state)  # what is measured is what was written
    content = save(state)
    card = {
        "network": "paper preset with batch norm, true 5x5, no heads, 16 classes",
        "data": "crops of scikit-image's photographs, under gnetlab.net.augment",
        "recipe": recipe,
        "held_out_accuracy": held_out_accuracy(model.to(device)),
        "conv1_low_frequency": low_frequency_energy(model.conv1.conv),
        "sha256": hashlib.sha256(content).hexdigest(),
        "torch": torch.__version__,
        "device": device.type,
    }
    if processes(device).first:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
        for checkpoint in path.parent.glob(f"{path.stem}.{mark}-*.pt"):
            checkpoint.unlink()
    return card


def _crops(kind: str, size: int, device: torch.device) -> PhotoCrops:
    options: dict[str, Any] = {"size": size, "scale": tuple(RECIPE["scale"]), "device": device}
    if kind == "plain":
        return PhotoCrops(**options)
    return AugmentedCrops(quarters=kind == "turned", **options)


def _pool_classes(fc: nn.Linear) -> None:
    """Let the last layer tell photographs instead of photographs and quarter turns."""
    fc.weight = nn.Parameter(fc.weight.detach().unflatten(0, (-1, 4)).mean(1))
    fc.bias = nn.Parameter(fc.bias.detach().unflatten(0, (-1, 4)).mean(1))
    fc.out_features = len(fc.bias)


def held_out_accuracy(model: nn.Module) -> dict[str, float]:
    """Share of held-out crops, not augmented, whose photograph is told, by side in pixels."""
    device = next(model.parameters()).device
    return {
        str(side): evaluate(model, PhotoCrops(size=side, device=device))["accuracy"]
        for side in (64, 96, 128)
    }


def low_frequency_energy(conv: nn.Conv2d) -> float:
    """Share of the filters' energy in the lower half of their frequencies, their means left out.

    Noise has about a half; edges, centre-surround and colour blobs nearly all.
    """
    weight = conv.weight.detach().float().cpu()
    weight = weight - weight.mean((2, 3), keepdim=True)
    spectrum = torch.fft.fft2(weight).abs().square()
    frequency = torch.fft.fftfreq(weight.shape[-1]).abs()
    radius = (frequency[:, None] ** 2 + frequency[None, :] ** 2).sqrt()
    return float(spectrum[..., radius <= 0.35].sum() / spectrum.sum())
