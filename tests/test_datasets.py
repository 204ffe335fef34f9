"""CIFAR-10 and Imagenette, from files of their form that are made here; nothing is fetched."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from gnetlab.measure.loop import evaluate
from gnetlab.net import data, datasets
from gnetlab.net.data import DEVIATION, MEAN, load
from gnetlab.net.datasets import CIFAR10, IMAGENET_CLASSES, Imagenette

CIFAR_CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
WNIDS = {
    "n01440764": ("tench", 0), "n02102040": ("English springer", 217),
    "n02979186": ("cassette player", 482), "n03000684": ("chain saw", 491),
    "n03028079": ("church", 497), "n03394916": ("French horn", 566),
    "n03417042": ("garbage truck", 569), "n03425413": ("gas pump", 571),
    "n03445777": ("golf ball", 574), "n03888257": ("parachute", 701),
}  # fmt: skip


def denormalize(images):
    """Back to 0..255."""
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return (images * deviation + mean) * 255


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A cache of the test's own, and a network that fails the test if used."""

    def used(*_args, **_options):
        pytest.fail("the network was used")

    for module in ("cifar", "imagenette"):
        place = f"torchvision.datasets.{module}.download_and_extract_archive"
        monkeypatch.setattr(place, used)
    monkeypatch.setattr(datasets, "ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_cifar(root, monkeypatch, per_batch=4):
    """Six batches of numbered images, with their checksums told to torchvision."""
    place = root / "cifar-10-batches-py"
    place.mkdir(parents=True)

    def write(name, content):
        written = pickle.dumps(content)
        (place / name).write_bytes(written)
        return hashlib.md5(written).hexdigest()

    def batch(number):
        pixels = np.random.default_rng(number).integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        return {"data": pixels, "labels": [(number + i) % 10 for i in range(per_batch)]}

    kind = torchvision.datasets.CIFAR10
    train = [[f"data_batch_{n}", write(f"data_batch_{n}", batch(n))] for n in range(1, 6)]
    monkeypatch.setattr(kind, "train_list", train)
    test = write("test_batch", batch(6))
    monkeypatch.setattr(kind, "test_list", [["test_batch", test]])
    meta = write("batches.meta", {"label_names": CIFAR_CLASSES})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta})
    return [batch(n) for n in range(1, 7)]


def write_imagenette(root, per_class=2):
    """Plain images whose red is the class's number times 20, and green the image's."""
    for split in ("train", "val"):
        for label, wnid in enumerate(WNIDS):
            place = root / "imagenette2-160" / split / wnid
            place.mkdir(parents=True)
            for i in range(per_class):
                pixels = np.full((160, 200 + i, 3), (20 * label, 50 * i, 9), np.uint8)
                Image.fromarray(pixels).save(place / f"{wnid}_{i}.JPEG", quality=100, subsampling=0)


# --- CIFAR-10 -----------------------------------------------------------------------------------


def test_cifar_test_images_come_in_order_normalized(home, monkeypatch):
    *_, expected = write_cifar(home, monkeypatch)
    found = CIFAR10()
    assert found.classes == tuple(CIFAR_CLASSES)
    assert (found.in_channels, found.size) == (3, 32)
    (images, labels), *rest = found.test_batches()
    assert rest == []
    assert images.dtype == torch.float32
    assert labels.tolist() == expected["labels"]
    pixels = torch.from_numpy(expected["data"]).view(-1, 3, 32, 32).float()
    torch.testing.assert_close(denormalize(images), pixels, rtol=0, atol=1e-3)


def test_cifar_trains_on_all_five_batches(home, monkeypatch):
    *train, _ = write_cifar(home, monkeypatch)
    images, labels = CIFAR10().train_batch(0, 20, seed=1)
    everything = np.concatenate([batch["data"] for batch in train])
    expected = np.concatenate([batch["labels"] for batch in train])
    pixels = denormalize(images).round().byte().flatten(1).numpy()
    where = [int((everything == image).all(1).argmax()) for image in pixels]
    assert sorted(where) == list(range(20))
    assert where != list(range(20))
    assert labels.tolist() == expected[where].tolist()


def test_cifar_is_held_as_bytes_on_the_device(home, monkeypatch):
    write_cifar(home, monkeypatch)
    found = CIFAR10()
    assert {images.dtype for images in found._images.values()} == {torch.uint8}
    assert found._images["train"].shape == (20, 3, 32, 32)


@pytest.mark.parametrize("size", [16, 48])
def test_cifar_resizes(home, monkeypatch, size):
    write_cifar(home, monkeypatch)
    images, _ = CIFAR10(size=size).train_batch(0, 4)
    assert images.shape == (4, 3, size, size)


def test_cifar_in_a_folder(tmp_path, monkeypatch):
    write_cifar(tmp_path / "mine", monkeypatch)
    assert len(next(CIFAR10(tmp_path / "mine").test_batches())[1]) == 4


def test_a_damaged_cifar_is_noticed_by_its_checksum(home, monkeypatch):
    write_cifar(home, monkeypatch)
    path = home / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(FileNotFoundError, match="CIFAR-10 not found, or damaged, in") as caught:
        CIFAR10()
    assert str(home) in str(caught.value)


# --- Imagenette ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "imagenets"), [("imagenette", 0), ("imagenette:imagenet", 1)])
def test_imagenette_labels(home, name, imagenets):
    write_imagenette(home)
    found = load(name, size=32)
    assert found.classes == tuple(name for name, _ in WNIDS.values())
    assert found.imagenet_classes == tuple(number for _, number in WNIDS.values())
    numbers = found.imagenet_classes if imagenets else range(10)
    (images, labels), *rest = found.test_batches()
    assert rest == []
    assert images.shape == (20, 3, 32, 32)
    assert labels.tolist() == [number for number in numbers for _ in range(2)]
    red, green, _ = denormalize(images).mean((2, 3)).T
    expected = torch.arange(10.0).repeat_interleave(2) * 20
    torch.testing.assert_close(red, expected, rtol=0, atol=3)
    torch.testing.assert_close(green, torch.tensor([0.0, 50.0] * 10), rtol=0, atol=3)


def test_imagenette_trains_on_its_training_images(home):
    write_imagenette(home)
    (home / "imagenette2-160" / "val" / "n01440764" / "n01440764_1.JPEG").unlink()
    found = Imagenette(size=16)
    images, labels = found.train_batch(0, 20)
    assert torch.equal((denormalize(images)[:, 0].mean((1, 2)) / 20).round().long(), labels)
    assert labels.bincount().tolist() == [2] * 10
    assert sum(len(labels) for _, labels in found.test_batches(6)) == 19


def test_numbers_are_imagenets_by_torchvisions_own_names():
    from torchvision.models import GoogLeNet_Weights

    names = GoogLeNet_Weights.IMAGENET1K_V1.meta["categories"]
    assert {name: names[number] for name, number in IMAGENET_CLASSES.items()} == {
        name: name for name in IMAGENET_CLASSES
    }


def test_accuracy_among_imagenets_classes(home):
    """A network that reads the class off the red channel is right among all 1000."""
    write_imagenette(home)
    numbers = torch.tensor(tuple(IMAGENET_CLASSES.values()))

    class Reader(torch.nn.Module):
        def forward(self, x):
            own = (denormalize(x)[:, 0].mean((1, 2)) / 20).round().long()
            return 9.0 * torch.nn.functional.one_hot(numbers[own], 1000)

    assert evaluate(Reader(), load("imagenette:imagenet", size=16))["accuracy"] == 1


def test_imagenette_with_other_labels():
    with pytest.raises(ValueError, match="labels='wordnet' asked; choose 'own' or 'imagenet'"):
        Imagenette(labels="wordnet")


# --- fetching, and by name ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_nothing_is_fetched_offline(home, name):
    with pytest.raises(FileNotFoundError, match="GNETLAB_OFFLINE is set") as caught:
        load(name)
    for part in (str(home), "Connect to the internet once", "'photocrops'"):
        assert part in str(caught.value)
    assert not home.exists()


@pytest.mark.parametrize("kind", [CIFAR10, Imagenette])
def test_a_folder_of_ones_own_is_never_filled(tmp_path, monkeypatch, kind):
    monkeypatch.delenv("GNETLAB_OFFLINE")
    with pytest.raises(FileNotFoundError, match=r"not found, or damaged, in .*elsewhere: Data"):
        kind(tmp_path / "elsewhere")


@pytest.mark.parametrize("kind", [CIFAR10, Imagenette])
def test_fetched_once_into_the_cache(home, monkeypatch, kind):
    fetched = []

    def fetch(url, _root, **checks):
        fetched.append((url.rsplit("/", 1)[-1], checks.get("md5", "")[:4]))
        write_cifar(home, monkeypatch) if kind is CIFAR10 else write_imagenette(home)

    monkeypatch.delenv("GNETLAB_OFFLINE")
    for module in ("cifar", "imagenette"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fetch)
    for _ in range(2):
        next(kind().test_batches())
    archive = (
        ("cifar-10-python.tar.gz", "c58f") if kind is CIFAR10 else ("imagenette2-160.tgz", "e793")
    )
    assert fetched == [archive]


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_fetching_that_fails_says_what_to_do(home, monkeypatch, name):
    def unreachable(*_args, **_options):
        raise OSError("no route")

    monkeypatch.delenv("GNETLAB_OFFLINE")
    for module in ("cifar", "imagenette"):
        place = f"torchvision.datasets.{module}.download_and_extract_archive"
        monkeypatch.setattr(place, unreachable)
    with pytest.raises(FileNotFoundError, match=r"fetching it failed \(no route\)") as caught:
        load(name)
    assert str(home) in str(caught.value)


@pytest.mark.parametrize(("size", "sides"), [(None, (32, 128)), (20, (20, 20))])
def test_load_by_name(home, monkeypatch, size, sides):
    write_cifar(home, monkeypatch)
    write_imagenette(home)
    for name, kind, side in zip(
        ("cifar10", "imagenette"), (CIFAR10, Imagenette), sides, strict=True
    ):
        found = load(name, size=size)
        assert isinstance(found, kind)
        assert found.train_batch(0, 4)[0].shape == (4, 3, side, side)


def test_an_unknown_name_lists_the_fetched_ones_too():
    with pytest.raises(ValueError, match=r"'cifar10', 'imagenette', 'imagenette:imagenet'"):
        data.load("cifar-10")
