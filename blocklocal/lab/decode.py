"""Encoded images into one uint8 tensor."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from blocklocal.lab.errors import UserError

# Named, so that Pillow looks at these decoders only: three times as fast for WebP as its search through all.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")


def decode(encoded: Iterable[tuple[str, bytes]]) -> Tensor:
    """uint8 (N, C, H, W) from (name, bytes) pairs: one channel where all images are grey, else three.

    Threads do not help: for small images the interpreter's lock, not the decoder, is what they would wait for.
    UserError: no image, bytes that are no image, images of more than one size; it gives the image's name.
    """
    pictures = list(_arrays(encoded))
    if not pictures:
        raise UserError("no images")
    if len({picture.ndim for picture in pictures}) > 1:
        pictures = [picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2) for picture in pictures]
    images = torch.from_numpy(np.stack(pictures))
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def _arrays(encoded: Iterable[tuple[str, bytes]]) -> Iterator[np.ndarray]:
    """(H, W) of grey images, (H, W, 3) of others."""
    first = None
    for name, content in encoded:
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                grey = image.mode in ("1", "L", "LA")
                picture = np.asarray(image.convert("L" if grey else "RGB"))
        except UnidentifiedImageError as error:
            raise UserError(f"{name} is not an image ({', '.join(FORMATS)} can be read)") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{name} is not a readable image ({error})") from error
        first = first or picture.shape[:2]
        if picture.shape[:2] != first:
            height, width = picture.shape[:2]
            raise UserError(
                f"{name} is {width}x{height} pixels, the images before it are {first[1]}x{first[0]}: "
                "bring all images to one size"
            )
        yield picture
