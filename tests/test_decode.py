"""What becomes of every kind of image: the pixels that it shows, or one line that names it."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from data_folders import encode, picture
from PIL import Image, ImageOps

from blocklocal.lab.data.decode import decode
from blocklocal.lab.errors import UserError

GREY, COLOUR = picture(channels=1), picture()
DEEP = (GREY.astype(np.uint16) << 8) + picture(channels=1)  # 16 bits whose higher 8 are GREY


def save(image: Image.Image | np.ndarray, form: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def png(rows: bytes, *, bits: int, kind: int, width: int = 8, height: int = 8) -> bytes:
    """A PNG file from its rows without their filter bytes, of samples that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    stride = len(rows) // height if height else 0
    filtered = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = zlib.compress(filtered)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, **tags: int) -> bytes:
    """A TIFF file of a grey image, with tags that say something else of it."""
    numbers = {"bits": 258, "photometric": 262}
    content = save(pixels, "TIFF")
    for name, value in tags.items():
        entry = struct.pack("<HHI", numbers[name], 3, 1)
        place = content.index(entry) + len(entry)
        content = content[:place] + struct.pack("<H", value) + content[place + 2 :]
    return content


def with_alpha(pixels: np.ndarray, *, alpha: int) -> np.ndarray:
    return np.dstack([pixels, np.full(pixels.shape[:2], alpha, np.uint8)])


COLOURED_DEEP = np.dstack([DEEP, DEEP, DEEP])


@pytest.mark.parametrize(
    ("content", "pixels"),
    [
        pytest.param(save(DEEP, "PNG"), GREY, id="png-16"),
        pytest.param(
            png(COLOURED_DEEP.astype(">u2").tobytes(), bits=16, kind=2), np.dstack([GREY] * 3), id="png-rgb-16"
        ),
        pytest.param(save(DEEP, "TIFF"), GREY, id="tiff-16"),
        pytest.param(save(DEEP.astype(">u2"), "TIFF"), GREY, id="tiff-16-big-endian"),
        pytest.param(b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes(), GREY, id="pgm-16"),
        pytest.param(b"P5 8 8 255\n" + GREY.tobytes(), GREY, id="pgm"),
        pytest.param(
            png(bytes([0b00011011] * 16), bits=2, kind=0),
            np.tile(np.array([0, 85, 170, 255], np.uint8), (8, 2)),
            id="png-2",
        ),
        pytest.param(save(Image.fromarray(GREY > 127), "PNG"), (GREY > 127) * np.uint8(255), id="png-1"),
        pytest.param(save(GREY, "TIFF"), GREY, id="tiff"),
        pytest.param(save(with_alpha(GREY, alpha=255), "PNG"), GREY, id="opaque-grey"),
        pytest.param(save(with_alpha(COLOUR, alpha=255), "PNG"), COLOUR, id="opaque-colour"),
        pytest.param(save(Image.fromarray(COLOUR).convert("CMYK"), "TIFF"), COLOUR, id="cmyk"),
        pytest.param(save(Image.fromarray(GREY).convert("P"), "PNG"), np.dstack([GREY] * 3), id="palette"),
    ],
)
def test_an_image_gives_the_pixels_that_it_shows(content, pixels):
    found = decode([("it", content)])[0]
    expected = torch.tensor(pixels)
    assert torch.equal(found, expected[None] if expected.dim() == 2 else expected.permute(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("form", "pixels"), [("PNG", COLOUR[:5]), ("PNG", DEEP[:5]), ("TIFF", COLOUR[:5])])
def test_an_image_stands_as_its_exif_data_say(form, pixels, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    content = save(pixels, form, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert shown is not None
    array = np.asarray(shown)
    expected = torch.tensor((array >> 8).astype(np.uint8)[None] if array.ndim == 2 else array.transpose(2, 0, 1))
    assert torch.equal(decode([("it", content)])[0], expected)
    assert (expected.shape[1] == 8) == (orientation > 4)


def test_of_a_jpeg_with_previews_the_picture_is_taken():
    image = Image.fromarray(COLOUR)
    content = save(image, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert torch.equal(decode([("it", content)]), decode([("it", save(image, "JPEG"))]))


def frames(form: str) -> bytes:
    return save(Image.fromarray(COLOUR), form, save_all=True, append_images=[Image.new("RGB", (8, 8))], lossless=True)


PALETTED = Image.fromarray(GREY).convert("P")
FLOATS = GREY.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(save(FLOATS, "TIFF"), "mode F", id="floats"),
        pytest.param(save(GREY.astype(np.int32), "TIFF"), "mode I,", id="integers"),
        pytest.param(b"Pf\n8 8\n-1.0\n" + FLOATS.tobytes(), "mode F", id="pfm"),
        pytest.param(tiff(DEEP, bits=12), "mode I;16", id="12-bits"),
        pytest.param(tiff(DEEP, photometric=0), "mode I;16", id="16-bits-white-is-0"),
        pytest.param(save(Image.new("LAB", (8, 8)), "TIFF"), "mode LAB", id="lab"),
        pytest.param(save(with_alpha(GREY, alpha=254), "PNG"), "transparent pixels (mode LA)", id="grey-alpha"),
        pytest.param(save(with_alpha(COLOUR, alpha=0), "PNG"), "transparent pixels (mode RGBA)", id="alpha"),
        pytest.param(save(with_alpha(COLOUR, alpha=9), "WEBP", lossless=True), "transparent", id="webp-alpha"),
        pytest.param(save(PALETTED, "PNG", transparency=int(GREY[0, 0])), "transparent pixels (mode P)", id="palette"),
        pytest.param(save(Image.new("P", (8, 8), 3), "GIF", transparency=3), "transparent pixels (mode P)", id="gif"),
        pytest.param(
            save(Image.new("L", (8, 8), 3), "PNG", transparency=3), "transparent pixels (mode L)", id="grey-key"
        ),
        pytest.param(save(Image.new("RGB", (8, 8)), "PNG", transparency=(0, 0, 0)), "transparent", id="colour-key"),
        *(pytest.param(frames(form), "holds 2 frames", id=f"{form}-frames") for form in ("GIF", "TIFF", "PNG", "WEBP")),
        pytest.param(b"", "not an image", id="empty"),
        pytest.param(b"<svg></svg>", "not an image", id="svg"),
        pytest.param(save(COLOUR, "ICO"), "not an image", id="ico"),
        pytest.param(b"P6 0 8 255\n", "not an image", id="no-columns"),
        pytest.param(png(b"", bits=8, kind=0, height=0), "not a", id="no-rows"),
        pytest.param(png(b"", bits=8, kind=0, width=20_000, height=20_000), "decompression bomb", id="bomb"),
        pytest.param(png(b"", bits=8, kind=0, width=10_000, height=10_000), "decompression bomb", id="small-bomb"),
        *(
            pytest.param(save(COLOUR, form)[: len(save(COLOUR, form)) * 2 // 3], "not a", id=f"{form}-truncated")
            for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
        ),
    ],
)
def test_an_image_that_has_no_pixels_to_show_is_named(content, words):
    good = encode(COLOUR)
    with pytest.raises(UserError) as error:
        decode([("the good one", good), ("dir/it.png", content)])
    assert str(error.value).startswith("dir/it.png ")
    assert words in str(error.value)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_damaged_images_are_read_or_refused(form):
    draws, whole, complaints = np.random.default_rng(0), save(COLOUR, form), []
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[draws.integers(min(len(whole), 90))] = draws.integers(256)
        try:
            decode([("it", bytes(damaged))])
        except UserError as error:  # any other error fails the test
            complaints.append(str(error))
    assert complaints
    assert all(complaint.startswith("it ") for complaint in complaints)
