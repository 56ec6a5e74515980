"""Decodes images into one uint8 tensor."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.Image import DecompressionBombWarning
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile
from torch import Tensor

from blocklocal.arguments import first_line
from blocklocal.lab.errors import UserError

# Named, so that Pillow tries only these decoders: for WebP three times as fast as its search through all.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes of at most 8 bits per channel


def decode(encoded: Iterable[tuple[str, bytes]]) -> Tensor:
    """Decode (name, bytes) pairs into uint8 (N, C, H, W), with one channel if all images are grey, else three.

    Of 16 bits per channel the upper 8 are kept, as Pillow itself does for colours, and EXIF orientation is applied.
    Threads do not help: for small images they would wait for the interpreter's lock, not the decoder.

    UserError, which names the image: no images, bytes that are not an image, images of different sizes, with several
    frames, transparent pixels or values of unknown range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damage that Pillow can read past, such as in EXIF data
        warnings.simplefilter("error", DecompressionBombWarning)
        pictures = list(_arrays(encoded))
    if not pictures:
        raise UserError("no images")
    if len({picture.ndim for picture in pictures}) > 1:
        pictures = [picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2) for picture in pictures]
    images = torch.from_numpy(np.stack(pictures))
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def _arrays(encoded: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
    """The pixels: (H, W) of a grey image, (H, W, 3) of others."""
    first = None
    for name, content in encoded:
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                picture = _pixels(image)
        except UnidentifiedImageError as error:
            raise UserError(f"{name} is not an image ({', '.join(FORMATS)} can be read)") from error
        except _Unfit as error:
            raise UserError(f"{name} {error}") from None
        except Exception as error:  # on damaged files Pillow's decoders raise errors of any kind
            raise UserError(f"{name} is not a readable image ({first_line(error)})") from error
        first = first or picture.shape[:2]
        if picture.shape[:2] != first:
            height, width = picture.shape[:2]
            raise UserError(
                f"{name} is {width}x{height} pixels, the images before it are {first[1]}x{first[0]}: "
                "bring all images to one size"
            )
        yield picture


class _Unfit(Exception):
    """What is in an image that this module cannot turn into pixels."""


def _pixels(image: Image.Image) -> np.ndarray:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a JPEG with previews behind the picture
        raise _Unfit(f"holds {frames} frames: keep each in a file of its own")
    if image.has_transparency_data and not _opaque(image):
        raise _Unfit(f"has transparent pixels (mode {image.mode}): put it on a background")
    ImageOps.exif_transpose(image, in_place=True)
    if _has_16_bits(image):
        return (np.asarray(image) >> 8).astype(np.uint8)
    if image.mode not in GREY + COLOUR:
        raise _Unfit(
            f"is a {image.format} of mode {image.mode}, whose values have no known range or no one colour: "
            "convert it to 8 or 16 bits per channel, grey or RGB"
        )
    return np.asarray(image.convert("L" if image.mode in GREY else "RGB"))


def _has_16_bits(image: Image.Image) -> bool:
    """Whether a grey image has black at 0 and white at 65535, which Pillow's mode alone does not tell."""
    if image.format == "PPM":
        return image.mode == "I"  # scaled to that range
    if isinstance(image, TiffImageFile):  # the same mode for 12 bits, and for white at 0
        bits, black_is_zero = image.tag_v2.get(BITSPERSAMPLE), image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 1
        return image.mode.startswith("I;16") and bits == (16,) and black_is_zero
    return image.mode.startswith("I;16")


def _opaque(image: Image.Image) -> bool:
    whole = image if image.getbands()[-1] == "A" else image.convert("RGBA")
    return whole.getchannel("A").getextrema()[0] == 255
