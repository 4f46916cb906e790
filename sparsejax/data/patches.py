"""Images as sequences of square patches: cut, put together again, scaled, and varied at random."""

from typing import NamedTuple

import numpy as np

from sparsejax.data.config import DataConfig
from sparsejax.data.pipeline import Batch, Transform

# Of random crops: smallest share of the area, widest ratio of the sides, draws before giving up.
_MIN_AREA, _MAX_RATIO, _NUM_DRAWS = 0.08, 4 / 3, 10
_LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])


class PatchGrid(NamedTuple):
    """How the images of a set fall into patches; the same for all of them.

    Attributes:
      rows: Patches from top to bottom.
      columns: Patches from left to right.
      side: Pixels along each side of a patch.
      channels: Values of a pixel, 1 (grey) or 3 (red, green, blue).
    """

    rows: int
    columns: int
    side: int
    channels: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return height, width and channels of an image."""
        return self.rows * self.side, self.columns * self.side, self.channels

    @property
    def num_patches(self) -> int:
        """Return the number of patches of an image."""
        return self.rows * self.columns

    @property
    def patch_values(self) -> int:
        """Return the number of values of a patch."""
        return self.side**2 * self.channels


def find_grid(config: DataConfig, shape: tuple[int | None, int | None, int]) -> PatchGrid:
    """Say how images fall into patches, or why they do not.

    Args:
      config: Settings with a `patch_size`.
      shape: Height, width and channels of the images as they are stored; None where they differ.

    Returns:
      The grid of the images as they are read, `image_size` applied.

    Raises:
      ValueError: The images differ in size, are no multiple of the patch, or have other channels
        than asked for.
    """
    height, width, channels = shape
    if channels not in (1, 3) or config.image_channels not in (0, channels):
        expected = f"{config.image_channels}" if config.image_channels else "1 (grey) or 3 (RGB)"
        raise ValueError(
            f"image_channels={config.image_channels}: the images of {config.source} have "
            f"{channels} channels; expected {expected}"
        )
    if config.image_size:
        height = width = config.image_size
    if height is None or width is None:
        raise ValueError(
            f"image_size=0: the images of {config.source} differ in size; expected the side, in "
            "pixels, that they are scaled and cropped to"
        )
    side = config.patch_size
    if height % side or width % side:
        raise ValueError(
            f"patch_size={side}: the images of {config.source} have {height} x {width} pixels; "
            "expected a divisor of both"
        )
    return PatchGrid(height // side, width // side, side, channels)


def identify_patches(config: DataConfig) -> dict[str, object]:
    """Return what of the settings decides what is read of an image.

    Args:
      config: Settings of a set of images.

    Returns:
      JSON values for the identity of a source; none without patches.
    """
    return {"patches": [config.patch_size, config.image_size]} if config.patch_size else {}


def read_patches(image: np.ndarray, grid: PatchGrid, image_size: int) -> np.ndarray:
    """Turn one image into the values of its patches.

    Args:
      image: uint8[height, width, channels].
      grid: What it must fit.
      image_size: Side that the largest square in the middle is scaled to first; 0 = as it is.

    Returns:
      uint8[rows * columns * patch_values], patch after patch.

    Raises:
      ValueError: The image is no array of bytes, or has another shape.
    """
    if image.dtype != np.uint8:
        raise ValueError(f"an image has the type {image.dtype}; expected uint8")
    if image_size:
        image = scale_middle(image, image_size)
    if image.shape != grid.image_shape:
        raise ValueError(f"an image has the shape {image.shape}; expected {grid.image_shape}")
    return cut_patches(image, grid.side).reshape(-1)


def flatten_image(image: np.ndarray, image_size: int) -> np.ndarray:
    """Turn one image into grey levels, row by row.

    Args:
      image: uint8[height, width, 1 or 3].
      image_size: Side that the largest square in the middle is scaled to first; 0 = as it is.

    Returns:
      uint8[height * width], or uint8[image_size * image_size].
    """
    if image_size:
        image = scale_middle(image, image_size)
    grey = image[..., 0] if image.shape[-1] == 1 else image @ _LUMA_WEIGHTS
    return np.rint(grey).astype(image.dtype).reshape(-1)


def scale_middle(image: np.ndarray, size: int) -> np.ndarray:
    """Scale the largest square in the middle of an image.

    Args:
      image: uint8[height, width, 1 or 3].
      size: Side of the result, in pixels.

    Returns:
      uint8[size, size, channels], interpolated by cubics, averaged where it shrinks.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(image, (left, top, left + side, top + side), (size, size))


def cut_patches(image: np.ndarray, side: int) -> np.ndarray:
    """Cut an image into patches, row by row; the pixels of a patch are row by row too.

    Args:
      image: [height, width, channels], multiples of the side.
      side: Pixels along each side of a patch.

    Returns:
      [rows * columns, side * side * channels], the channels of a pixel beside each other.

    Example:
      >>> cut_patches(np.arange(8).reshape(2, 4, 1), 2).tolist()
      [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    height, width, channels = image.shape
    tiles = image.reshape(height // side, side, width // side, side, channels)
    return tiles.swapaxes(1, 2).reshape(-1, side * side * channels)


def join_patches(patches: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Undo `cut_patches`.

    Args:
      patches: [rows * columns, patch_values].
      grid: How they lie.

    Returns:
      [height, width, channels].
    """
    tiles = patches.reshape(grid.rows, grid.columns, grid.side, grid.side, grid.channels)
    return tiles.swapaxes(1, 2).reshape(grid.image_shape)


def make_augmentation(grid: PatchGrid, *, crop: bool, flip: bool) -> Transform:
    """Return the function that varies an image at random.

    Args:
      grid: How the images fall into patches.
      crop: Whether a random part, 8 to 100 % of the area with sides of a ratio of 3/4 to 4/3, is
        scaled to the whole.
      flip: Whether left and right are swapped, half of the time.

    Returns:
      Function of an example whose `inputs` are patches, those of the image first, and of a random
      generator; it returns the example with other `inputs`.

    References:
      Szegedy et al., Going deeper with convolutions, arXiv:1409.4842, section 6.
    """

    def vary(example: Batch, rng: np.random.Generator) -> Batch:
        inputs = example["inputs"].copy()
        image = join_patches(inputs[: grid.num_patches], grid)
        if crop:
            height, width, _ = image.shape
            image = _resize(image, _draw_box(height, width, rng), (width, height))
        if flip and rng.random() < 0.5:
            image = image[:, ::-1]
        inputs[: grid.num_patches] = cut_patches(image, grid.side)
        return example | {"inputs": inputs}

    return vary


def _draw_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of a random part; the whole if no draw fits."""
    for _ in range(_NUM_DRAWS):
        area = height * width * rng.uniform(_MIN_AREA, 1.0)
        ratio = _MAX_RATIO ** rng.uniform(-1.0, 1.0)
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 1 <= h <= height and 1 <= w <= width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    return 0, 0, width, height


def _resize(
    image: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
    """Return a box of an image (left, top, right, bottom) scaled to width and height."""
    from PIL import Image

    grey = image.shape[-1] == 1
    picture = Image.fromarray(image[..., 0] if grey else np.ascontiguousarray(image))
    scaled = np.asarray(picture.resize(size, Image.Resampling.BICUBIC, box=box))
    return scaled[..., None] if grey else scaled
