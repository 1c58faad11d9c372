"""Coloured shapes as polygons, and how they are painted: four times too large, then averaged for smooth edges."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]
Pairing = tuple[str, str]  # names of a colour and a shape

SUPERSAMPLING = 4
COLOURS: dict[str, Colour] = {
    "red": (229, 42, 48),
    "orange": (250, 128, 14),
    "yellow": (255, 212, 20),
    "green": (34, 166, 72),
    "cyan": (38, 200, 226),
    "blue": (40, 92, 240),
    "purple": (136, 52, 218),
    "pink": (255, 112, 178),
}


def _circle(radius: float = 1.0, start: float = 0.0, stop: float = 360.0, steps: int = 48) -> list[Point]:
    angles = (math.radians(start + (stop - start) * i / steps) for i in range(steps + 1))
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _heart(steps: int = 48) -> list[Point]:
    angles = [2 * math.pi * i / steps for i in range(steps)]
    ys = (-13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t) for t in angles)
    return [(math.sin(t) ** 3, (y - 2.5) / 15.5) for t, y in zip(angles, ys, strict=True)]


def _crescent() -> list[Point]:
    horn = math.radians(51)  # the outer arc's ends, where the inner one, around (0.5, 0), meets it
    inner = math.hypot(math.cos(horn) - 0.5, math.sin(horn))
    turn = math.degrees(math.atan2(math.sin(horn), math.cos(horn) - 0.5))
    bite = [(0.5 + x, y) for x, y in _circle(inner, turn, 360 - turn)]
    return [(x + 0.22, y) for x, y in _circle(1.0, 51, 309) + bite[::-1]]


def _star(points: int = 5, inner: float = 0.41) -> list[Point]:
    radii = [1.0 if i % 2 == 0 else inner for i in range(2 * points)]
    return [(r * math.sin(math.pi * i / points), -r * math.cos(math.pi * i / points) + 0.08) for i, r in enumerate(radii)]


def _cross(arm: float = 0.3) -> list[Point]:
    a, b = arm, 0.95
    return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]


# Outlines in the unit circle, y down. A ring is one polygon: once around outside, once back around inside.
SHAPES: dict[str, list[Point]] = {
    "circle": _circle(0.94),
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0.0, -0.92), (0.98, 0.78), (-0.98, 0.78)],
    "star": _star(),
    "ring": _circle(1.0, 90, 450) + _circle(0.62, 90, 450)[::-1],
    "cross": _cross(),
    "heart": _heart(),
    "crescent": _crescent(),
}


@dataclass(frozen=True)
class Placed:
    """One shape in a picture: centre and radius as parts of the side, angle in degrees."""

    pairing: Pairing
    x: float
    y: float
    radius: float
    angle: float


def draw(objects: Sequence[Placed], background: Colour, size: int) -> Image.Image:
    """An RGB picture of size x size: a softly lit ground, and under every object a faint shadow."""
    side = size * SUPERSAMPLING
    picture = Image.new("RGB", (side, side), background)
    picture.paste((0, 0, 0), mask=_shade(side))
    pen = ImageDraw.Draw(picture)
    shadow = tuple(int(0.80 * c) for c in background)
    for thing in objects:
        turn = math.radians(thing.angle)
        cos, sin = thing.radius * side * math.cos(turn), thing.radius * side * math.sin(turn)
        outline = [
            (thing.x * side + cos * x - sin * y, thing.y * side + sin * x + cos * y) for x, y in SHAPES[thing.pairing[1]]
        ]
        drop = 0.022 * side
        pen.polygon([(x + drop / 2, y + drop) for x, y in outline], fill=shadow)
        pen.polygon(outline, fill=COLOURS[thing.pairing[0]])
    return picture.reduce(SUPERSAMPLING)


@cache
def _shade(side: int) -> Image.Image:
    return Image.linear_gradient("L").point(lambda v: v * 28 // 255).resize((side, side))
