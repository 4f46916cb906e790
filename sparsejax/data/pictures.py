"""Image files, decoded with Pillow and made documents of pixels or of patches."""

import functools
import io
import warnings
from typing import Any

import numpy as np

from sparsejax.data.config import DataConfig
from sparsejax.data.patches import PatchGrid, find_grid, flatten_image, read_patches
from sparsejax.data.rows import Documents

# Modes of Pillow that become grey or RGB as they look: one bit, grey, palette, RGB, print, JPEG's.
_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "CMYK": 3, "YCbCr": 3}


def decode_image(content: bytes, channels: int = 0) -> np.ndarray:
    """Decode an image file.

    Args:
      content: Of the file: JPEG, PNG or whatever else Pillow reads.
      channels: 1 makes it grey and 3 RGB; 0 leaves it what it is.

    Returns:
      uint8[height, width, 1 or 3].

    Raises:
      ValueError: It is no image, damaged, absurdly large, transparent, or of other than 8 bits; the
        message says what the image is.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # A picture that could be a bomb is no warning to be overlooked.
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            image = Image.open(io.BytesIO(content))
        found = _CHANNELS.get(image.mode)
        if found is None or image.has_transparency_data:
            raise ValueError(
                f"is an image of mode {image.mode!r}"
                f"{' with transparency' if image.has_transparency_data else ''}; expected 8 bits "
                "of grey or colour, without transparency"
            )
        mode = "L" if (channels or found) == 1 else "RGB"
        pixels = np.asarray(image.convert(mode))
    except UnidentifiedImageError as error:
        raise ValueError("is no image; expected one that Pillow reads") from error
    except (
        *(Image.DecompressionBombWarning, Image.DecompressionBombError),
        *(OSError, SyntaxError, EOFError),
    ) as error:
        raise ValueError(f"is a damaged image ({error}); expected a whole one") from error
    return pixels[..., None] if mode == "L" else pixels


def prepare_images(config: DataConfig, first: Any, place: str) -> Documents:
    """Say how images become documents: grey pixels, or patches if a `patch_size` is set.

    Args:
      config: Settings of a set of images.
      first: One of its files, whose size and channels all must have unless settings change them.
      place: Where it stands, for messages.

    Returns:
      The function of an image file, and what it makes.

    Raises:
      ValueError: It is no image, or does not fit the patches.
    """
    if not config.patch_size:
        make = functools.partial(_read_pixels, image_size=config.image_size)
        return Documents(check_bytes, make, num_values=256)
    try:
        height, width, channels = decode_image(check_bytes(first), config.image_channels).shape
    except ValueError as error:
        raise ValueError(f"{place} {error}") from error
    grid = find_grid(config, (height, width, channels))
    make = functools.partial(
        _read_patches, grid=grid, image_size=config.image_size, channels=config.image_channels
    )
    return Documents(check_bytes, make, num_values=256, grid=grid)


def identify_images(config: DataConfig) -> dict[str, object]:
    """Return what of the settings decides what is read of an image file.

    Args:
      config: Settings of a set of images.

    Returns:
      JSON values for the identity of a source.
    """
    return {"image": [config.patch_size, config.image_size, config.image_channels]}


def check_bytes(value: Any) -> bytes:
    """Return the contents of an image file.

    Args:
      value: What a row holds.

    Returns:
      The same.

    Raises:
      ValueError: It is something else.
    """
    if not isinstance(value, bytes) or not value:
        raise ValueError("has no image; expected the contents of an image file")
    return value


def _read_pixels(content: bytes, image_size: int) -> np.ndarray:
    return flatten_image(decode_image(content), image_size)


def _read_patches(content: bytes, grid: PatchGrid, image_size: int, channels: int) -> np.ndarray:
    image = decode_image(content, channels)
    if image.shape[-1] != grid.channels:
        raise ValueError(
            f"has {image.shape[-1]} channels where the first image has {grid.channels}; expected "
            "the same, or image_channels to make them so"
        )
    if not image_size and image.shape != grid.image_shape:
        raise ValueError(
            f"is {image.shape[0]} x {image.shape[1]} pixels where the first image is "
            f"{grid.image_shape[0]} x {grid.image_shape[1]}; expected the same, or image_size to "
            "scale them"
        )
    return read_patches(image, grid, image_size)
