import gzip
import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from gnetlab.net import data
from gnetlab.net.augment import AugmentedCrops
from gnetlab.net.data import (
    DEVIATION,
    FASHION_MNIST_FOLDERS,
    MEAN,
    FashionMNIST,
    ImageFolder,
    PhotoCrops,
    Photograph,
    crop,
    load,
    normalize,
    open_image,
    photographs,
    preprocess,
)

DEBIAN = Path(FASHION_MNIST_FOLDERS[0])


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def denormalize(images):
    """Back to 0..255."""
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return (images * deviation + mean) * 255


# --- photographs and files ----------------------------------------------------------------------


def test_sixteen_photographs_in_alphabetical_order():
    found = photographs()
    assert len(found) == 16
    assert list(found) == sorted(found)
    for name, photograph in found.items():
        assert photograph.name == name
        assert photograph.source.strip().endswith("(scikit-image)")
        assert photograph.pixels.dtype == np.uint8
        assert photograph.pixels.ndim == 3
        assert photograph.pixels.shape[2] == 3
        assert min(photograph.pixels.shape[:2]) >= 160
        assert photograph.pixels.std() > 5
        with pytest.raises(ValueError, match="read-only"):
            photograph.pixels[0, 0, 0] = 0


def test_photographs_are_the_ones_they_are_called():
    import skimage.data

    assert np.array_equal(open_image("cat").pixels, skimage.data.chelsea())
    assert np.array_equal(open_image("motorcycle").pixels, skimage.data.stereo_motorcycle()[0])
    grey = open_image("camera").pixels
    assert np.array_equal(grey, np.dstack([skimage.data.camera()] * 3))
    assert open_image("cat") is photographs()["cat"]


@pytest.mark.parametrize("given", [str, Path])
def test_open_image_by_path(tmp_path, given):
    pixels = noise(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "mine.png")
    photograph = open_image(given(tmp_path / "mine.png"))
    assert (photograph.name, photograph.source) == ("mine", "mine.png")
    assert np.array_equal(photograph.pixels, pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_open_image_makes_rgb_of_every_mode(tmp_path, mode):
    path = tmp_path / "mine.tiff"
    Image.fromarray(noise(20, 30, 3)).convert(mode).save(path)
    pixels = open_image(path).pixels
    assert (pixels.shape, pixels.dtype) == ((20, 30, 3), np.uint8)


def test_open_image_scales_16_bits(tmp_path):
    deep = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").pixels[0, :, 1].tolist() == [0, 1, 128, 255]


def test_open_image_scales_floats(tmp_path):
    Image.fromarray(np.array([[0, 0.2, 0.5, 1]], np.float32)).save(tmp_path / "floats.tif")
    assert open_image(tmp_path / "floats.tif").pixels[0, :, 2].tolist() == [0, 51, 128, 255]


@pytest.mark.parametrize("value", [-0.1, 200, np.nan])
def test_open_image_of_floats_that_may_mean_anything(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(tmp_path / "floats.tif")
    with pytest.raises(
        ValueError, match=r"floats\.tif cannot be read \(floats from .*: scale them"
    ):
        open_image(tmp_path / "floats.tif")


def test_open_image_turns_a_photograph_upright(tmp_path):
    pixels, exif = noise(20, 30, 3), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was held turned: rotate 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "turned.png").pixels, np.rot90(pixels, -1))


def test_open_image_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.png': no such file.*astronaut.*tissue"):
        open_image("nowhere.png")


def png():
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def wrong_chunk_length(content):
    at = content.index(b"IDAT") - 1
    return content[:at] + b"\0" + content[at + 1 :]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda _: b"not an image",
        lambda _: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:40],
        wrong_chunk_length,
    ],
    ids=["text", "empty", "half", "header", "chunk length"],
)
def test_open_image_that_cannot_be_read(tmp_path, spoil):
    path = tmp_path / "broken.png"
    path.write_bytes(spoil(png()))
    with pytest.raises(ValueError, match=r"broken\.png cannot be read.*PNG, JPEG"):
        open_image(path)


def test_open_image_far_too_large(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"huge\.png cannot be read"):
        open_image(path)


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 99, 224])
@pytest.mark.parametrize("shape", [(300, 451), (451, 300), (40, 40), (30, 600)])
def test_crop_and_preprocess_shapes_and_normalization(shape, size):
    pixels = noise(*shape, 3)
    square, batch = crop(pixels, size), preprocess(pixels, size)
    assert (square.shape, square.dtype) == ((size, size, 3), np.uint8)
    assert (batch.shape, batch.dtype) == ((1, 3, size, size), torch.float32)
    back = denormalize(batch)[0].permute(1, 2, 0)
    torch.testing.assert_close(back, torch.from_numpy(square).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(256, 320), (320, 256)])
def test_crop_is_the_central_square_after_resizing_to_256(shape):
    pixels = noise(*shape, 3)  # the short side is 256 already: nothing to interpolate
    top, left = (shape[0] - 224) // 2, (shape[1] - 224) // 2
    assert np.array_equal(crop(pixels), pixels[top : top + 224, left : left + 224])


def test_crop_scales_the_short_side_with_antialiasing():
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None], (256, 512, 3))
    square = crop(ramp, 112)  # reduced by two, then 8 of 128 rows cut on each side
    assert np.abs(square[:, 50, 0] - (2 * np.arange(8, 120) + 0.5)).max() <= 1
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[1::4] = stripes[2::4] = 255  # the rows that reducing by four reads without antialiasing
    assert np.abs(crop(stripes, 56).astype(int) - 127).max() < 20


def test_normalize_uses_imagenets_numbers():
    white = normalize(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)).flatten()
    expected = [(1 - m) / d for m, d in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=1)]
    torch.testing.assert_close(white, torch.tensor(expected))


# --- PhotoCrops -----------------------------------------------------------------------------------


@pytest.mark.parametrize("photograph", range(16))
def test_the_middle_fifth_of_the_longer_side_is_held_out_with_gaps(photograph):
    crops = PhotoCrops()
    pixels = photographs()[crops.classes[photograph]].pixels
    shrink = max(1, max(pixels.shape) / 512)
    shape = [round(side / shrink) for side in pixels.shape[:2]]
    along = 0 if shape[0] >= shape[1] else 1
    spans = []
    for top, left, height, width in crops.regions("train", photograph) + crops.regions(
        "test", photograph
    ):
        span = ((top, top + height), (left, left + width))
        assert span[1 - along] == (0, shape[1 - along])
        spans.append(span[along])
    first, second, test = spans
    assert (first[0], second[1]) == (0, shape[along])
    assert test[1] - test[0] == pytest.approx(0.2 * shape[along], abs=1)
    assert test[0] - first[1] == second[0] - test[1] == 8
    assert first[1] - first[0] == pytest.approx(second[1] - second[0], abs=1)


def with_coordinates(**options):
    """PhotoCrops whose atlas holds, instead of colours: photograph, row and column in pixels."""
    crops = PhotoCrops(**options)
    atlas = torch.full_like(crops._atlas, 1e6)
    for number, levels in enumerate(crops._places):
        for level, (at, height, width) in enumerate(levels):
            block = atlas[0, :, at - 1 : at + height + 1, : width + 2]  # with its border
            block[0] = number
            block[1] = ((torch.arange(-1, height + 1) + 0.5) * 2**level)[:, None]
            block[2] = (torch.arange(-1, width + 1) + 0.5) * 2**level
    crops._atlas = atlas
    return crops


def crops_of(crops, split, count):
    if split == "train":
        return crops.train_batch(step=0, batch_size=count, seed=1)
    crops.test_size = count
    return next(iter(crops.test_batches(count)))


@pytest.fixture(scope="module", params=list(itertools.product(("train", "test"), (16, 32, 64))))
def measured(request):
    """2000 crops, measured in their photographs' pixels: what they show, and where from.

    The outermost pixels, which may reach over an edge, are left to a test of their own.
    """
    split, size = request.param
    crops = with_coordinates(size=size)
    images, labels = crops_of(crops, split, 2000)
    first, last = images[:, 1:, 1, 1], images[:, 1:, -2, -2]  # row and column at two corners
    step = (last - first) / (size - 3)
    return SimpleNamespace(
        labels=labels,
        number=images[:, 0, 1:-1, 1:-1],
        step=step,
        sides=step.abs() * size,
        low=torch.minimum(first, last) - 1.5 * step.abs(),  # the crop's own edges
        high=torch.maximum(first, last) + 1.5 * step.abs(),
        # Photograph x part x (top, left, height, width)
        regions=torch.tensor([crops.regions(split, i) for i in range(16)]),
    )


def test_crops_show_their_own_photograph_and_all_classes_occur(measured):
    expected = measured.labels[:, None, None].expand_as(measured.number).float()
    assert torch.equal(measured.number.round(), expected)
    assert measured.labels.bincount(minlength=16).min() > 80  # of 125


def test_crops_have_sides_of_48_to_160_pixels_where_the_region_has_them(measured):
    sides = measured.sides
    torch.testing.assert_close(sides[:, 0], sides[:, 1], rtol=0.01, atol=0.1)  # squares
    largest = measured.regions[:, 0, 2:].amin(1).clamp(max=160)[measured.labels]
    assert sides.min() > 48 - 0.2
    assert sides.min() < 52
    assert (sides[:, 0] < largest + 1.2).all()  # of two parts, one may be a pixel wider
    assert sides.max() > largest.max() - 4


def test_crops_lie_in_their_region_and_use_all_of_it(measured):
    start, extent = measured.regions[..., :2], measured.regions[..., 2:]
    end, labels = start + extent, measured.labels
    inside = (measured.low[:, None] > start[labels] - 0.2) & (
        measured.high[:, None] < end[labels] + 0.2
    )
    inside = inside.all(2)  # crop x part
    assert (inside.sum(1) == 1).all()
    for i in range(16):
        for part in range(start.shape[1]):
            here = (labels == i) & inside[:, part]
            room = 0.15 * extent[i, part]
            assert (measured.low[here].amin(0) < start[i, part] + room).all()
            assert (measured.high[here].amax(0) > end[i, part] - room).all()


def test_half_of_the_crops_are_mirrored_and_none_is_upside_down(measured):
    assert (measured.step[:, 0] > 0).all()
    assert (measured.step[:, 1] < 0).float().mean().item() == pytest.approx(0.5, abs=0.06)


@pytest.fixture
def painted(monkeypatch):
    """Sixteen small pictures: red says which, green and blue are row and column in pixels."""
    pictures = {}
    for i, name in enumerate(photographs()):
        height, width = (252, 180) if i % 2 else (180, 252)
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[..., 0] = 15 * i
        pixels[..., 1] = np.arange(height)[:, None]
        pixels[..., 2] = np.arange(width)
        pictures[name] = Photograph(name, pixels, "painted")
    monkeypatch.setattr(data, "photographs", lambda: pictures)
    monkeypatch.setattr(data, "_atlas", data._atlas.__wrapped__)


@pytest.mark.parametrize(("size", "tolerance"), [(8, 1), (32, 0.5), (120, 0.05)])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.usefixtures("painted")
def test_atlas_holds_the_photographs_at_every_level(split, size, tolerance):
    """Sizes that read from quarter, half and full resolution; tolerances are below one row."""
    images, labels = crops_of(PhotoCrops(size=size), split, 300)
    where, _ = crops_of(with_coordinates(size=size), split, 300)
    inner, expected = denormalize(images)[:, :, 1:-1, 1:-1], where[:, :, 1:-1, 1:-1] - 0.5
    expected[:, 0] = 15 * labels[:, None, None]
    torch.testing.assert_close(inner, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize(("split", "hidden"), [("train", "test"), ("test", "train")])
def test_crops_of_one_split_see_nothing_of_the_other(monkeypatch, split, hidden, size):
    pictures, crops = {}, PhotoCrops()
    for i, photograph in enumerate(photographs().values()):
        pixels = np.zeros_like(photograph.pixels)
        scale = max(1, max(pixels.shape) / PhotoCrops.LARGEST)
        for part in crops.regions(hidden, i):
            top, left, height, width = (round(side * scale) for side in part)
            pixels[top : top + height, left : left + width] = 255
        pictures[photograph.name] = photograph._replace(pixels=pixels)
    monkeypatch.setattr(data, "photographs", lambda: pictures)
    monkeypatch.setattr(data, "_atlas", data._atlas.__wrapped__)
    images, _ = crops_of(PhotoCrops(size=size), split, 3000)
    assert denormalize(images).max() < 0.01 * 255


@pytest.mark.usefixtures("painted")
def test_crops_at_a_photographs_edge_mix_in_nothing_foreign():
    crops = PhotoCrops(size=256, scale=(10_000, 10_000))  # as large as the region allows
    images, labels = crops.train_batch(0, 64)
    red = denormalize(images)[:, 0]
    torch.testing.assert_close(red, 15.0 * labels[:, None, None].expand_as(red), rtol=0, atol=0.1)


def test_training_batches_depend_on_step_and_seed_only():
    crops, other = PhotoCrops(), PhotoCrops()
    images, labels = crops.train_batch(5, 16, seed=2)
    crops.train_batch(6, 16, seed=2)
    next(crops.test_batches())
    torch.rand(3)
    for again in (crops, other):
        for got, expected in zip(again.train_batch(5, 16, seed=2), (images, labels), strict=True):
            assert torch.equal(got, expected)
    for step, seed in ((6, 2), (5, 3), (0, 0)):
        assert not torch.equal(crops.train_batch(step, 16, seed=seed)[0], images)


def test_training_batches_leave_the_global_random_state_untouched():
    before = torch.get_rng_state()
    PhotoCrops().train_batch(0, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 30, 100, 256])
def test_the_test_set_is_the_same_in_batches_of_any_size(batch_size):
    crops = PhotoCrops(test_size=100)
    expected = next(crops.test_batches(100))
    batches = list(crops.test_batches(batch_size))
    assert [len(labels) for _, labels in batches[:-1]] == [batch_size] * (len(batches) - 1)
    for i, whole in enumerate(expected):
        assert torch.equal(torch.cat([batch[i] for batch in batches]), whole)


def test_test_crops_are_fixed_and_as_many_as_asked():
    first, again = (list(PhotoCrops(test_size=70).test_batches(32)) for _ in range(2))
    assert [images.shape for images, _ in first] == [(n, 3, 32, 32) for n in (32, 32, 6)]
    assert all(
        torch.equal(a, b)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert not torch.equal(first[0][0], first[1][0])


@pytest.mark.parametrize("size", [1, 7, 33, 224])
def test_crops_of_any_size_look_like_photographs(size):
    crops = PhotoCrops(size=size)
    images, labels = crops.train_batch(0, 12)
    assert (images.shape, images.dtype) == ((12, 3, size, size), torch.float32)
    assert (labels.shape, labels.dtype) == ((12,), torch.int64)
    pixels = denormalize(images)
    assert pixels.min() > -1
    assert pixels.max() < 256
    assert pixels.flatten(1).mean(1).std() > 10
    assert (crops.size, crops.in_channels, len(crops.classes)) == (size, 3, 16)


# --- numbered data sets ---------------------------------------------------------------------------


COUNTS = {"train": 24, "test": 10}


class Numbered(data._Indexed):
    """Its batches show which numbers of which split were asked for."""

    def _count(self, split):
        return COUNTS[split]

    def _fetch(self, split, indices):
        return indices, split


def epoch(numbered, number, batch_size=6, seed=0):
    steps = range(number * (24 // batch_size), (number + 1) * (24 // batch_size))
    return torch.cat([numbered.train_batch(step, batch_size, seed)[0] for step in steps]).tolist()


@pytest.mark.parametrize("batch_size", [1, 6, 8, 24])
def test_every_training_image_comes_once_per_epoch(batch_size):
    orders = [epoch(Numbered(), number, batch_size) for number in range(3)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != list(range(24))


def test_no_training_image_comes_twice_where_batches_do_not_divide_the_set():
    numbers = epoch(Numbered(), 0, batch_size=7)
    assert len(numbers) == len(set(numbers)) == 21
    assert epoch(Numbered(), 1, batch_size=7) != numbers


def test_shuffling_is_reproducible_and_depends_on_the_seed():
    numbered = Numbered()
    first = epoch(numbered, 0)
    for number, seed in itertools.product(range(3), range(2)):  # more than the cache holds
        epoch(numbered, number, seed=seed)
    assert epoch(numbered, 0) == epoch(Numbered(), 0) == first
    assert epoch(numbered, 0, seed=1) != first


def test_test_images_come_in_order_and_complete():
    batches = list(Numbered().test_batches(4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.cat([images for images, _ in batches]).tolist() == list(range(10))
    assert {split for _, split in batches} == {"test"}
    assert Numbered().train_batch(0, 4)[1] == "train"


# --- Fashion-MNIST --------------------------------------------------------------------------------

IDX_NAMES = {"train": "train", "test": "t10k"}


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def fashion_images(split):
    images = noise(COUNTS[split], 28, 28, seed=len(split))
    images[:, 14:] = 7  # half of it compresses
    return images


def fashion_labels(split):
    return (np.arange(COUNTS[split]) % 10).astype(np.uint8)


@pytest.fixture(params=[".gz", ""], ids=["gz", "plain"])
def fashion(request, tmp_path):
    """A folder of Fashion-MNIST's form."""
    for split, prefix in IDX_NAMES.items():
        for name, array in (
            (f"{prefix}-images-idx3-ubyte", fashion_images(split)),
            (f"{prefix}-labels-idx1-ubyte", fashion_labels(split)),
        ):
            content = gzip.compress(idx(array)) if request.param else idx(array)
            (tmp_path / f"{name}{request.param}").write_bytes(content)
    return tmp_path


def test_fashion_mnist_pads_to_32_and_normalizes(fashion):
    found = FashionMNIST(fashion)
    (images, labels), *rest = found.test_batches(64)
    assert rest == []
    assert images.shape == (10, 1, 32, 32)
    assert (found.in_channels, found.size, len(found.classes)) == (1, 32, 10)
    assert labels.tolist() == fashion_labels("test").tolist()
    pixels = (images * 0.3530 + 0.2860) * 255
    expected = np.pad(fashion_images("test"), ((0, 0), (2, 2), (2, 2)))
    torch.testing.assert_close(pixels[:, 0], torch.from_numpy(expected).float(), rtol=0, atol=1e-3)


def test_fashion_mnist_trains_on_the_training_images(fashion):
    found = FashionMNIST(fashion)
    images, labels = found.train_batch(1, 8, seed=4)
    everything = torch.from_numpy(fashion_images("train")).float() / 255
    for image, label in zip(images[:, 0, 2:-2, 2:-2] * 0.3530 + 0.2860, labels, strict=True):
        index = (everything - image).abs().amax((1, 2)).argmin()
        torch.testing.assert_close(image, everything[index], rtol=0, atol=1e-5)
        assert label == fashion_labels("train")[index]


@pytest.mark.parametrize("size", [16, 48])
def test_fashion_mnist_resizes_to_another_size(fashion, size):
    images, _ = FashionMNIST(fashion, size=size).train_batch(0, 4)
    assert images.shape == (4, 1, size, size)


@pytest.mark.parametrize("left", [-1, 12, 6, 0])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_fashion_mnist_truncated(fashion, name, left):
    (path,) = fashion.glob(f"{name}*")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{name} is not a whole IDX file"):
        FashionMNIST(fashion)


def test_fashion_mnist_lacking_a_file(fashion):
    (path,) = fashion.glob("t10k-images*")
    path.unlink()
    with pytest.raises(ValueError, match=f"{fashion}/t10k-images-idx3-ubyte is not a whole IDX"):
        FashionMNIST(fashion)


@pytest.mark.parametrize("fashion", [".gz"], indirect=True)
@pytest.mark.parametrize("at", [10, -4])  # the compressed data, and their checksum
def test_fashion_mnist_damaged_gzip(fashion, at):
    path = fashion / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a whole IDX file"):
        FashionMNIST(fashion)


def test_fashion_mnist_in_a_folder_without_it(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist") as caught:
            FashionMNIST(folder)
        assert str(folder) in str(caught.value)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No Fashion-MNIST at the known places."""
    place = tmp_path / "cache" / "FashionMNIST" / "raw"
    monkeypatch.setattr(data, "FASHION_MNIST_FOLDERS", (str(tmp_path / "debian"), str(place)))
    return place


def test_fashion_mnist_is_not_fetched_offline(nowhere, monkeypatch):
    import torchvision.datasets

    fetched = []
    monkeypatch.setattr(
        torchvision.datasets, "FashionMNIST", lambda *args, **_options: fetched.append(args)
    )
    with pytest.raises((FileNotFoundError, ValueError)) as caught:
        FashionMNIST()
    assert fetched == []
    assert caught.type is FileNotFoundError
    assert str(nowhere) in str(caught.value)


def test_fashion_mnist_that_cannot_be_fetched_says_what_to_do(nowhere, monkeypatch):
    import torchvision.datasets

    def unreachable(*_args, **_options):
        raise RuntimeError("no mirror answers")

    monkeypatch.delenv("GNETLAB_OFFLINE")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", unreachable)
    with pytest.raises(FileNotFoundError, match="no mirror answers") as caught:
        load("fashion-mnist")
    assert str(nowhere) in str(caught.value)
    assert "'photocrops'" in str(caught.value)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian():
    found = FashionMNIST(DEBIAN)
    labels = torch.cat([labels for _, labels in found.test_batches(5000)])
    assert labels.bincount().tolist() == [1000] * 10
    images, labels = found.train_batch(0, 10_000)
    assert images.shape == (10_000, 1, 32, 32)
    assert labels.bincount().min() > 900
    inner = images[:, :, 2:-2, 2:-2]
    assert inner.mean().item() == pytest.approx(0, abs=0.01)
    assert inner.std().item() == pytest.approx(1, abs=0.01)


# --- image folders --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two classes of plain images: dark (0 to 90) and light (160 to 250), of different shapes."""
    for split, count in (("train", 6), ("test", 3)):
        for name, start in (("dark", 0), ("light", 160)):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((20 + i, 40 - i, 3), start + 15 * i, np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder(folder, held_out):
    (folder / "test").rename(folder / held_out)
    found = ImageFolder(folder, size=24)
    assert (found.classes, found.in_channels, found.size) == (("dark", "light"), 3, 24)
    images, labels = found.train_batch(0, 12)
    assert images.shape == (12, 3, 24, 24)
    grey = denormalize(images).mean((1, 2, 3)).round()
    assert torch.equal(labels, (grey > 125).long())
    assert sorted(grey.tolist()) == [start + 15 * i for start in (0, 160) for i in range(6)]
    (images, labels), *rest = found.test_batches()
    assert rest == []
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    grey = denormalize(images).mean((1, 2, 3)).round()
    assert grey.tolist() == [0, 15, 30, 160, 175, 190]


def test_a_part_of_the_test_set_has_as_many_images_of_each_class(folder):
    """A folder's come class by class: the first of them would be of one class."""
    (folder / "test" / "light" / "2.png").unlink()
    labels = [labels.tolist() for _, labels in ImageFolder(folder).test_batches(2, count=4)]
    assert labels == [[0, 1], [0, 1]]
    (labels,) = (labels.tolist() for _, labels in ImageFolder(folder).test_batches(count=9))
    assert labels == [0, 1, 0, 1, 0]
    crops = PhotoCrops(test_size=200)
    parts = list(crops.test_batches(20, count=48))
    images, labels = (torch.cat(values) for values in zip(*parts, strict=True))
    assert [len(part[1]) for part in parts] == [20, 20, 8]
    assert labels.tolist() == 3 * list(range(16))
    whole, known = next(crops.test_batches(200))
    first = torch.tensor([(known == label).nonzero()[0, 0] for label in range(16)])
    assert torch.equal(images[:16], whole[first])
    turned = AugmentedCrops(size=32, quarters=True).test_batches(count=16)
    assert next(turned)[1].tolist() == list(range(0, 64, 4))


@pytest.mark.parametrize("missing", ["train", "test", "everything"])
def test_image_folder_without_a_split(folder, missing):
    root = folder / "elsewhere" if missing == "everything" else folder
    if missing != "everything":
        (folder / missing).rename(folder / "kept")
    lacking = {"train": "train", "test": "val", "everything": "train"}[missing]
    with pytest.raises(FileNotFoundError, match=f"{root / lacking} is not a folder.*CLASS"):
        ImageFolder(root)


def test_image_folder_with_different_classes(folder):
    (folder / "test" / "dark").rename(folder / "test" / "dim")
    with pytest.raises(ValueError, match="train and test have different classes: dark, dim"):
        ImageFolder(folder)


def test_image_folder_with_a_broken_image(folder):
    (folder / "test" / "light" / "0.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"light/0\.png cannot be read"):
        list(ImageFolder(folder).test_batches())


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "side"), [(None, 32), (20, 20)])
def test_load_by_name(fashion, folder, monkeypatch, size, side):
    monkeypatch.setattr(data, "FASHION_MNIST_FOLDERS", (str(fashion),))
    kinds = {
        "photocrops": PhotoCrops, "fashion-mnist": FashionMNIST, f"folder:{folder}": ImageFolder
    }  # fmt: skip
    for name, kind in kinds.items():
        found = load(name, size=size)
        assert isinstance(found, kind)
        images, labels = found.train_batch(0, 4)
        assert images.shape == (4, found.in_channels, side, side)
        assert (labels.min() >= 0) & (labels.max() < len(found.classes))


@pytest.mark.parametrize("name", ["imagenet", "cifar-10", "", "folder"])
def test_load_of_an_unknown_name_lists_the_known(name):
    with pytest.raises(ValueError, match=f"unknown data set '{name}'") as caught:
        load(name)
    for known in ("'photocrops'", "'fashion-mnist'", "'folder:PATH'"):
        assert known in str(caught.value)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(ValueError, match="there are 24 images"):
        Numbered().train_batch(0, 25)


class TestFingerprint:
    def test_it_hangs_on_the_images_alone(self):
        one, other = data.PhotoCrops(size=32), data.PhotoCrops(size=64, test_size=3)
        assert data.fingerprint(one) == data.fingerprint(other)
        other._atlas = other._atlas + 1
        assert data.fingerprint(one) != data.fingerprint(other)

    def test_files_are_read(self, tmp_path):
        for split in ("train", "test"):
            (tmp_path / split / "a").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "1.png")
        before = data.fingerprint(data.ImageFolder(tmp_path))
        assert before == data.fingerprint(data.ImageFolder(tmp_path, size=64))
        Image.new("RGB", (8, 8), "red").save(tmp_path / "test" / "a" / "1.png")
        assert data.fingerprint(data.ImageFolder(tmp_path)) != before


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_images(folder, batch_size):
    for found in (ImageFolder(folder), PhotoCrops(), AugmentedCrops()):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} asked.*give at least 1"):
            found.train_batch(0, batch_size)


def test_image_folder_without_images(folder):
    for path in (folder / "train" / "dark").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"dark.*at least one image per class: PATH/train"):
        ImageFolder(folder)


@pytest.mark.parametrize("start", [b"\0\0\x0d\3", b"\0\0\x08\1", b"\1\0\x08\3"])
@pytest.mark.parametrize("fashion", [""], indirect=True)
def test_fashion_mnist_of_another_type_or_shape(fashion, start):
    path = fashion / "t10k-images-idx3-ubyte"
    path.write_bytes(start + path.read_bytes()[4:])
    with pytest.raises(ValueError, match=f"not a whole IDX file .*{start.hex()}.*install it again"):
        FashionMNIST(fashion)


@pytest.mark.parametrize("fashion", [""], indirect=True)
def test_fashion_mnist_with_labels_of_another_set(fashion):
    (fashion / "t10k-labels-idx1-ubyte").write_bytes(idx(fashion_labels("train")))
    with pytest.raises(ValueError, match=r"has 10 test images and \d+ labels, .* install it again"):
        FashionMNIST(fashion)
