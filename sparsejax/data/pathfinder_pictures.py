"""Pathfinder: do two circles mark the ends of one dashed path, or of two?

A picture holds two long dashed paths and shorter ones that distract, all of them apart from each
other. Two circles lie on ends of the long paths; the label is 1 when both are on the same path.

As in the published task that Long Range Arena takes over: 32 x 32 pixels, paths of 14 dashes that
turn by a bounded random angle from dash to dash, distractors a third as long, a margin around each
path, circles on ends of the long ones, as many pictures of either label, and 160,000 / 20,000 /
20,000 of them.

Ours, as the generator is:

- A dash is 2 pixels and a gap 1; dashes of 5 would leave no room for two such paths. From dash to
  dash a path turns by up to 60 degrees. There are 3 distractors, of 4 dashes.
- Paths are wider apart than the dashes of one path are, so that a picture has one right answer.
- All dashes are drawn before the label, and only where both labels have ends to circle that are
  equally far apart, within 1.5 pixels. So neither the number of lit pixels nor the distance of the
  circles tells the label.
- Pixels are 0 or 255; nothing is smoothed.

References:
  Linsley et al., "Learning long-range spatial dependencies with horizontal gated recurrent
  units", 2018.
  Tay et al., "Long Range Arena: A Benchmark for Efficient Transformers", 2020.
"""

import functools
import math
import random
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

SIZE = 32
"""Pixels along each side of a picture."""

_DASH, _GAP = 2, 1
_STEP = _DASH + _GAP
_CIRCLE_RADIUS = 1
# Two lit pixels of different paths are further apart than this, those of successive dashes are not.
_MARGIN = _GAP + 1
_MAX_TURN = 4
_MAX_DISTANCE_ERROR = 1.5
_MAX_DEAD_ENDS = 60
_MAX_PICTURES = 1_000

# Where a step can lead: the cells of a square ring, in order. Integers alone make the pictures, so
# that they are the same on every machine.
_RING = sorted(
    (
        (row, column)
        for row in range(-_STEP, _STEP + 1)
        for column in range(-_STEP, _STEP + 1)
        if max(abs(row), abs(column)) == _STEP
    ),
    key=lambda step: math.atan2(*step),
)
_NUM_DIRECTIONS = 8 * _STEP
# All turns, beginning with any of them; steps of 4 meet each of the 9 once.
_NUM_TURNS = 2 * _MAX_TURN + 1
_TURNS = [
    [(first + 4 * i) % _NUM_TURNS - _MAX_TURN for i in range(_NUM_TURNS)]
    for first in range(_NUM_TURNS)
]

type _Offset = tuple[int, int]


class _Dash(NamedTuple):
    cell: int
    direction: int
    # Where it may not lie: other paths with their margins, and its own up to the last but one.
    closed: int
    # What it closes in turn.
    zone: int


class _Canvas:
    """Pictures as integers with one bit per cell, and the shapes that are drawn in them.

    Shifting a shape by a cell's number draws it there; a frame of cells around the picture lets
    every shape be drawn wherever a step can lead.
    """

    _REACH = _STEP + _CIRCLE_RADIUS

    def __init__(self, size: int):
        self._size = size
        self._frame = _STEP + self._REACH
        self.width = size + 2 * self._frame
        inner = range(self._frame, self._frame + size)
        cells = {row * self.width + column for row in inner for column in inner}
        self.outside = sum(1 << cell for cell in range(self.width**2) if cell not in cells)
        self.cells = sorted(cell - self._draw_bit((0, 0)) for cell in cells)
        lines = [[_divide(step, i) for i in range(_DASH)] for step in _RING]
        self.steps = [row * self.width + column for row, column in _RING]
        self.last = [row * self.width + column for *_, (row, column) in lines]
        self.dashes = [self._draw(line, 0) for line in lines]
        self.dash_zones = [self._draw(line, _MARGIN) for line in lines]
        self.circle = self._draw([(0, 0)], _CIRCLE_RADIUS)
        self.circle_zone = self._draw([(0, 0)], _CIRCLE_RADIUS + _MARGIN)

    def measure(self, ends: tuple[int, int]) -> float:
        """Return how far apart two cells are, in pixels."""
        (row_a, column_a), (row_b, column_b) = (divmod(cell, self.width) for cell in ends)
        return math.hypot(row_a - row_b, column_a - column_b)

    def to_pixels(self, picture: int) -> np.ndarray:
        """Return uint8[size, size], 255 where a bit is set."""
        contents = picture.to_bytes(-(-(self.width**2) // 8), "little")
        bits = np.unpackbits(np.frombuffer(contents, np.uint8), bitorder="little")
        inner = slice(self._frame, self._frame + self._size)
        return bits[: self.width**2].reshape(self.width, self.width)[inner, inner] * np.uint8(255)

    def _draw_bit(self, offset: _Offset) -> int:
        return (offset[0] + self._REACH) * self.width + offset[1] + self._REACH

    def _draw(self, offsets: Iterable[_Offset], radius: int) -> int:
        around = range(-radius, radius + 1)
        bits = {
            self._draw_bit((row + down, column + right))
            for row, column in offsets
            for down in around
            for right in around
        }
        return sum(1 << bit for bit in bits)


def _divide(step: _Offset, part: int) -> _Offset:
    """Return the cell nearest to `part` / _STEP of the way."""
    row, column = ((2 * part * length + _STEP) // (2 * _STEP) for length in step)
    return row, column


_make_canvas = functools.cache(_Canvas)


def draw_pathfinder(
    rng: random.Random,
    *,
    size: int = SIZE,
    num_dashes: int = 14,
    num_distractors: int = 3,
    distractor_dashes: int = 4,
) -> tuple[np.ndarray, int]:
    """Draw one picture and its label.

    Args:
      rng: Source of randomness; only its `random()` is used, whose sequence Python promises to
        keep between versions.
      size: Side of the picture, in pixels.
      num_dashes: Dashes of each of the two long paths.
      num_distractors: Number of shorter paths.
      distractor_dashes: Dashes of each of them.

    Returns:
      uint8[size, size] with the values 0 and 255, and 1 if the circles mark both ends of one
      path, else 0; either with probability 1/2.

    Raises:
      ValueError: A number is out of range, or the paths find no room.

    Example:
      >>> pixels, label = draw_pathfinder(random.Random(0))
      >>> pixels.shape, label
      ((32, 32), 0)
    """
    least = {"size": 1, "num_dashes": 2, "num_distractors": 0, "distractor_dashes": 1}
    values = (size, num_dashes, num_distractors, distractor_dashes)
    for (name, low), value in zip(least.items(), values, strict=True):
        if value < low:
            raise ValueError(f"{name}={value}: expected at least {low}")
    canvas = _make_canvas(size)
    lengths = [num_dashes] * 2 + [distractor_dashes] * num_distractors
    for _ in range(_MAX_PICTURES):
        scene = _draw_paths(rng, canvas, lengths)
        if scene is None:
            continue
        picture, *pairs = scene
        label = int(rng.random() * 2)
        for cell in pairs[label]:
            picture |= canvas.circle << cell
        return canvas.to_pixels(picture), label
    raise ValueError(
        f"size={size}: 2 paths of {num_dashes} dashes and {num_distractors} of "
        f"{distractor_dashes} found no room in {_MAX_PICTURES} attempts; expected a larger picture "
        "or less in it"
    )


def _draw_paths(
    rng: random.Random, canvas: _Canvas, lengths: list[int]
) -> tuple[int, tuple[int, int], tuple[int, int]] | None:
    """Draw all dashes; return them with the ends to circle for label 0 and for label 1."""
    picture, closed, ends, choices = 0, canvas.outside, [], []
    for index, num_dashes in enumerate(lengths):
        is_long = index < 2
        path = _grow_path(rng, canvas, num_dashes, closed, has_circles=is_long)
        if path is None:
            return None
        for dash in path:
            picture |= canvas.dashes[dash.direction] << dash.cell
            closed |= dash.zone
        if is_long:
            ends.append((path[0].cell, path[-1].cell + canvas.last[path[-1].direction]))
            closed |= canvas.circle_zone << ends[-1][1]
        if index == 1:
            choices = [
                (apart, together)
                for apart in ((a, b) for a in ends[0] for b in ends[1])
                for together in ends
                if abs(canvas.measure(apart) - canvas.measure(together)) <= _MAX_DISTANCE_ERROR
            ]
            if not choices:
                return None
    return picture, *_choose(rng, choices)


def _grow_path(
    rng: random.Random, canvas: _Canvas, num_dashes: int, closed: int, *, has_circles: bool
) -> list[_Dash] | None:
    """Add dash after dash where there is room, going back two at a dead end."""
    path: list[_Dash] = []
    dead_ends = 0
    while len(path) < num_dashes:
        if path:
            has_circle = has_circles and len(path) == num_dashes - 1
            dash = _continue_path(rng, canvas, path, has_circle)
        else:
            dash = _start_path(rng, canvas, closed, has_circles)
        if dash is not None:
            path.append(dash)
            continue
        dead_ends += 1
        if dead_ends > _MAX_DEAD_ENDS:
            return None
        del path[-2:]
    return path


def _start_path(rng: random.Random, canvas: _Canvas, closed: int, has_circle: bool) -> _Dash | None:
    cell, direction = _choose(rng, canvas.cells), int(rng.random() * _NUM_DIRECTIONS)
    shape, zone = canvas.dashes[direction], canvas.dash_zones[direction]
    if has_circle:
        shape, zone = shape | canvas.circle, zone | canvas.circle_zone
    return None if shape << cell & closed else _Dash(cell, direction, closed, zone << cell)


def _continue_path(
    rng: random.Random, canvas: _Canvas, path: list[_Dash], has_circle: bool
) -> _Dash | None:
    last = path[-1]
    cell, closed = last.cell + canvas.steps[last.direction], last.closed
    if len(path) > 1:
        closed |= path[-2].zone
    # One shift of what is closed instead of one for each direction.
    here = closed >> cell
    for turn in _choose(rng, _TURNS):
        direction = (last.direction + turn) % _NUM_DIRECTIONS
        if canvas.dashes[direction] & here:
            continue
        if has_circle and canvas.circle << cell + canvas.last[direction] & closed:
            continue
        return _Dash(cell, direction, closed, canvas.dash_zones[direction] << cell)
    return None


def _choose[T](rng: random.Random, options: list[T]) -> T:
    return options[int(rng.random() * len(options))]
