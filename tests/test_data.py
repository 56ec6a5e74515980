"""Data sets against the images they were made from, batches against one image at a time."""

import numpy as np
import pytest
import torch
from data_folders import encode, picture, table, write
from torch.nn import functional as F

from blocklocal.lab.data.batches import Augmentation, Normalisation, training_batches
from blocklocal.lab.data.dataset import Dataset, Split
from blocklocal.lab.data.load import load
from blocklocal.lab.errors import UserError
from blocklocal.lab.settings import Settings
from blocklocal.lab.tasks.images import Images


def test_digits_are_split_by_class_and_complete():
    from sklearn.datasets import load_digits  # which takes a second to import

    data = load("digits")
    assert (data.channels, data.size, len(data.classes)) == (1, (8, 8), 10)
    assert len(data.train) + len(data.test) == 1797
    counts = torch.stack([split.labels.bincount() for split in (data.train, data.test)])
    assert torch.equal(counts[1], counts.sum(0) // 5)
    assert data.train.inputs.max() == 240
    pixels, labels = load_digits(return_X_y=True)
    of_five = torch.as_tensor(pixels[labels == 5])
    five = torch.cat([split.inputs[split.labels == 5] for split in (data.train, data.test)]).flatten(1) / 15
    assert sorted(five.double().tolist()) == sorted(of_five.tolist())


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label")])
def test_parquet_gives_the_pixels_that_were_written(tmp_path, form, image, label):
    pixels = [picture() for _ in range(9)]
    labels = [0, 1, 2] * 3
    contents = [encode(p, form) for p in pixels]
    data = load(write(tmp_path, table(contents, labels, image=image, label=label, names=["a", "b", "c"])))
    assert data.classes == ("a", "b", "c")
    assert torch.equal(data.train.inputs, torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2))
    assert data.train.labels.tolist() == labels


def test_classes_without_names_are_numbers(tmp_path):
    data = load(write(tmp_path, table([encode(picture())] * 4, [0, 3, 1, 2])))
    assert data.classes == ("0", "1", "2", "3")


def test_image_folders_give_the_pixels_that_were_written(tmp_path):
    pixels = {(part, name): picture(channels=1) for part in ("train", "test") for name in ("cat", "dog")}
    for (part, name), image in pixels.items():
        (tmp_path / part / name).mkdir(parents=True)
        (tmp_path / part / name / "0.png").write_bytes(encode(image))
    data = load(str(tmp_path))
    assert data.classes == ("cat", "dog")
    assert torch.equal(data.test.inputs[1, 0], torch.tensor(pixels["test", "dog"]))
    (tmp_path / "train" / "cat" / "1.png").write_bytes(encode(picture(channels=3)))
    (tmp_path / "test" / "dog" / "1.png").write_bytes(encode(picture(channels=3)))
    mixed = load(str(tmp_path))
    assert mixed.channels == 3
    assert torch.equal(mixed.test.inputs[1], data.test.inputs[1].expand(3, -1, -1))


def test_a_sample_is_always_the_same_part_of_the_whole():
    whole, part = load("digits"), load("digits", train_size=100)
    again = load("digits", train_size=100)
    assert torch.equal(part.train.inputs, again.train.inputs)
    assert len(part.train) == 100
    assert len(part.test) == len(whole.test)
    rows = {image.numpy().tobytes() for image in whole.train.inputs}
    assert all(image.numpy().tobytes() in rows for image in part.train.inputs)


GOOD = encode(picture())


@pytest.mark.parametrize(
    ("contents", "labels", "options", "words"),
    [
        ([GOOD, GOOD], [0, 2], {"names": ["a", "b"]}, ["label 2", "out of range", "0 to 1"]),
        ([GOOD, GOOD], [0, -1], {}, ["label -1", "out of range"]),
        ([GOOD, GOOD], ["0", "1"], {}, ["train-00000", "label", "integer"]),
        ([GOOD, GOOD], [0, 1], {"label": "kind"}, ["train-00000", "label", "kind"]),
        ([GOOD, GOOD], [0, 1], {"image": "pixels"}, ["train-00000", "image", "pixels"]),
        ([GOOD, encode(picture(9, 8))], [0, 1], {}, ["train-00001", "8x9", "8x8"]),
        ([GOOD, b"no image"], [0, 1], {}, ["train-00001", "row 0", "not an image"]),
        ([GOOD, GOOD[:80]], [0, 1], {}, ["train-00001", "row 0", "readable"]),
        ([GOOD, None], [0, 1], {}, ["train-00001", "row 0", "no image bytes"]),
    ],
)
def test_a_bad_table_is_named(tmp_path, contents, labels, options, words):
    folder = write(tmp_path, table(contents, labels, **options))
    with pytest.raises(UserError) as error:
        load(folder)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_broken_files_are_named(tmp_path):
    contents = [encode(picture(32, 32)) for _ in range(20)]
    folder = write(tmp_path, table(contents, [0, 1] * 10))
    file = tmp_path / "train-00001-of-00002.parquet"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:3000] + b"?" * 300 + whole[3300:]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match="train-00001"):
            load(folder)


def test_places_without_data_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "file.parquet").write_bytes(b"")
    write(tmp_path / "shapes", table([GOOD] * 2, [0, 1]), table([encode(picture(4, 4))], [0]))
    for name, words in {
        "nonsense": "digits, fashion_mnist, cifar10, cifar100",
        str(tmp_path / "nowhere"): "existing folder",
        str(tmp_path / "empty"): "train-\\*.parquet",
        str(tmp_path / "images"): "test",
        str(tmp_path / "file.parquet"): "is a file",
        str(tmp_path / "shapes"): r"\(3, 8, 8\).*\(3, 4, 4\)",
    }.items():
        with pytest.raises(UserError, match=words):
            load(name)


def numbered(n: int, *, channels: int = 3, height: int = 8, width: int = 10) -> Split:
    images = torch.randint(0, 256, (n, channels, height, width), generator=torch.Generator().manual_seed(0))
    return Split(images.to(torch.uint8), torch.arange(n))


UNTOUCHED = Normalisation(torch.zeros(1), torch.ones(1))


def test_normalisation_is_that_of_the_pixels():
    images = numbered(7).inputs
    got = Normalisation.of(images)
    std, mean = torch.std_mean(images.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(got.mean.flatten(), mean.float())
    torch.testing.assert_close(got.std.flatten(), std.float())
    grey = Normalisation.of(torch.full((2, 1, 4, 4), 9, dtype=torch.uint8))
    assert torch.equal(grey(torch.full((1, 1, 1, 1), 9.0)), torch.zeros(1, 1, 1, 1))


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    split = numbered(24)
    orders = []
    for seed, epoch in [(0, 1), (0, 2), (1, 1)]:
        batches = list(training_batches(split, normalisation=UNTOUCHED, size=8, seed=seed, epoch=epoch))
        labels = torch.cat([y for _, y in batches])
        assert sorted(labels.tolist()) == list(range(24))
        assert torch.equal(torch.cat([x for x, _ in batches]), split.inputs[labels].float())
        orders.append(labels.tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_batches_depend_on_seed_and_epoch_alone():
    split, everything = numbered(20), Augmentation(flip=True, crop=2, cutout=3)

    def draw():
        return list(training_batches(split, normalisation=UNTOUCHED, size=8, seed=3, epoch=5, augmentation=everything))

    torch.manual_seed(0)
    first, state = draw(), torch.get_rng_state()
    torch.manual_seed(1)
    second = draw()
    assert len(first) == 2
    assert all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_images_are_flips_and_crops_of_the_reflected_image():
    split, crop = numbered(400, height=5, width=6), 2
    batches = training_batches(
        split, normalisation=UNTOUCHED, size=400, seed=0, epoch=1, augmentation=Augmentation(flip=True, crop=crop)
    )
    seen = set()
    for x, label in zip(*next(batches), strict=True):
        padded = F.pad(split.inputs[label].float(), (crop,) * 4, mode="reflect")
        variants = {
            (down, right, flipped): window.flip(-1) if flipped else window
            for down in range(2 * crop + 1)
            for right in range(2 * crop + 1)
            for window in [padded[:, down : down + 5, right : right + 6]]
            for flipped in (False, True)
        }
        matches = [place for place, variant in variants.items() if torch.equal(variant, x)]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 2 * (2 * crop + 1) ** 2


def test_cutout_blanks_one_square():
    split = Split(torch.full((50, 2, 9, 9), 7, dtype=torch.uint8), torch.arange(50))
    batches = training_batches(
        split, normalisation=UNTOUCHED, size=50, seed=0, epoch=1, augmentation=Augmentation(cutout=3)
    )
    x, _ = next(batches)
    areas = set()
    for blank in (x == 0).all(1):
        rows, columns = blank.any(1).sum().item(), blank.any(0).sum().item()
        assert blank.sum() == rows * columns
        areas.add((rows, columns))
    assert max(areas) == (3, 3)
    assert torch.equal((x == 0).all(1), (x == 0).any(1))


def test_testing_goes_through_all_images_in_their_order():
    split = numbered(1010)
    task = Images(Dataset("numbers", ("a", "b"), split, split), Settings(), normalisation=UNTOUCHED)
    batches = list(task.ordered_batches(split))
    assert [len(y) for _, y in batches] == [500, 500, 10]
    assert torch.equal(torch.cat([x for x, _ in batches]), split.inputs.float())
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)


def test_validation_images_are_held_out_of_the_training_images() -> None:
    whole, held = load("digits"), load("digits", validation=200)
    assert held.validation is not None
    assert (len(held.train), len(held.validation)) == (len(whole.train) - 200, 200)
    rows = [split.inputs.flatten(1).unique(dim=0) for split in (whole.train, held.train, held.validation)]
    assert len(rows[0]) == len(torch.cat(rows[1:]).unique(dim=0))
    assert torch.equal(held.test.inputs, whole.test.inputs)
    again = load("digits", validation=200).validation
    assert again is not None
    assert torch.equal(again.inputs, held.validation.inputs)
    assert Images(held, Settings(), normalisation=UNTOUCHED).facts["validation_images"] == 200
    with pytest.raises(UserError, match="--validation 1441"):
        load("digits", validation=len(whole.train) - 1)
