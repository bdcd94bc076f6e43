"""A small captioned dataset with planted noise, drawn from nothing: toy aerial scenes whose truth is known.

A scene is one kind of ground, one kind of thing on it, its colour and number, and perhaps a band (a river, a road)
across. Every kind has its own colours and texture, so that features learnt without labels and word counts tell them
apart. The captions state what was drawn, in varied words. A share of the pairs then exchange captions in such a way
that each new caption names a thing that is not in the image; those carry `known_noise`. A few broken rows show what
becomes of rows that cannot be audited.
"""

from __future__ import annotations

import csv
import io
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from nc_audit.errors import DatasetError
from nc_audit.run import writing

SIDE = 128
MIN_IMAGES = 16
MAX_NOISE = 0.8

Colour = tuple[int, int, int]

_NUMBERS = {
    1: ["a", "one"],
    2: ["two", "a pair of"],
    3: ["three"],
    4: ["four"],
    6: ["several", "many", "a group of"],
}

_COLOURS: dict[str, Colour] = {
    "red": (208, 40, 44),
    "blue": (38, 74, 214),
    "yellow": (244, 212, 40),
    "white": (248, 248, 248),
    "orange": (242, 132, 26),
    "purple": (136, 50, 176),
}


@dataclass(frozen=True)
class _Ground:
    """Phrases for a ground, its two colours and how they alternate."""

    phrases: list[str]
    dark: Colour
    light: Colour
    texture: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class _Thing:
    """Words for one and for many of a thing, its colours, and how it is drawn within a radius."""

    one: list[str]
    many: list[str]
    colours: list[str]
    draw: Callable[[ImageDraw.ImageDraw, float, float, float, Colour], None]


@dataclass(frozen=True)
class _Scene:
    ground: str
    thing: str
    colour: str
    number: int
    band: str


def _rows(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (np.sin(y * 0.9 + rng.uniform(0, 6)) > 0).astype(float)


def _waves(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (np.sin(y * 0.45 + 1.6 * np.sin(x * 0.12 + rng.uniform(0, 6))) > 0.6).astype(float)


def _dunes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + 0.5 * np.sin((x + y) * 0.13 + rng.uniform(0, 6))


def _blobs(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    cells = rng.random((SIDE // 4, SIDE // 4))
    return np.kron((cells > 0.5).astype(float), np.ones((4, 4)))


def _grid(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shift = rng.integers(0, 16)
    return (((x + shift) % 16 < 2) | ((y + shift) % 16 < 2)).astype(float)


def _speckle(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (rng.random(x.shape) > 0.12).astype(float)


_GROUNDS = {
    "farmland": _Ground(
        ["green farmland", "striped fields", "green crop fields"], (70, 140, 44), (120, 190, 66), _rows
    ),
    "sea": _Ground(
        ["the blue sea", "open water", "dark blue sea water"], (16, 62, 130), (60, 120, 190), _waves
    ),
    "desert": _Ground(
        ["a sandy desert", "yellow sand", "dry desert sand"], (206, 170, 104), (236, 210, 150), _dunes
    ),
    "forest": _Ground(
        ["a dense forest", "dark green woods", "thick forest"], (14, 52, 24), (38, 92, 40), _blobs
    ),
    "pavement": _Ground(
        ["grey pavement", "a concrete square", "paved ground"], (134, 134, 138), (92, 92, 98), _grid
    ),
    "snow": _Ground(
        ["white snow", "a snowy plain", "snow covered ground"], (190, 204, 222), (236, 242, 250), _speckle
    ),
}


def _house(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    dark = tuple(value * 6 // 10 for value in colour)
    draw.rectangle([x - r, y - r, x + r, y], fill=colour, outline=(30, 30, 30))
    draw.rectangle([x - r, y, x + r, y + r], fill=dark, outline=(30, 30, 30))


def _plane(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    dark = (40, 40, 44)
    draw.line([x - 1.3 * r, y, x + 1.3 * r, y], fill=dark, width=7)
    draw.line([x, y - 1.3 * r, x, y + 1.3 * r], fill=dark, width=9)
    draw.line([x - 1.3 * r, y, x + 1.3 * r, y], fill=colour, width=5)
    draw.line([x, y - 1.3 * r, x, y + 1.3 * r], fill=colour, width=7)
    draw.line([x - 0.6 * r, y + 1.1 * r, x + 0.6 * r, y + 1.1 * r], fill=colour, width=4)


def _tank(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.ellipse([x - r, y - r, x + r, y + r], fill=(60, 60, 64))
    draw.ellipse([x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r], fill=colour)
    draw.ellipse([x - 0.3 * r, y - 0.3 * r, x + 0.3 * r, y + 0.3 * r], fill=(60, 60, 64))


def _boat(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    hull = [(x - 1.4 * r, y - 0.5 * r), (x + 0.7 * r, y - 0.5 * r), (x + 1.5 * r, y)]
    hull += [(x + 0.7 * r, y + 0.5 * r), (x - 1.4 * r, y + 0.5 * r)]
    draw.polygon(hull, fill=(122, 72, 30))
    draw.rectangle([x - 0.8 * r, y - 0.3 * r, x + 0.4 * r, y + 0.3 * r], fill=colour)


def _court(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    box = [x - 0.8 * r, y - 1.3 * r, x + 0.8 * r, y + 1.3 * r]
    draw.rectangle(box, fill=(20, 150, 140), outline=colour, width=2)
    draw.line([x - 0.8 * r, y, x + 0.8 * r, y], fill=colour, width=2)
    draw.line([x, y - 1.3 * r, x, y + 1.3 * r], fill=colour, width=2)


def _tent(draw: ImageDraw.ImageDraw, x: float, y: float, r: float, colour: Colour) -> None:
    draw.polygon(
        [(x, y - 1.2 * r), (x - 1.2 * r, y + r), (x + 1.2 * r, y + r)], fill=colour, outline=(20, 20, 20)
    )
    draw.polygon([(x, y - 0.2 * r), (x - 0.4 * r, y + r), (x + 0.4 * r, y + r)], fill=(20, 20, 20))


_THINGS = {
    "house": _Thing(["house", "building"], ["houses", "buildings"], ["red", "orange", "purple"], _house),
    "plane": _Thing(["plane", "airplane"], ["planes", "airplanes"], ["white", "yellow", "red"], _plane),
    "tank": _Thing(
        ["storage tank", "round tank"], ["storage tanks", "round tanks"], ["white", "orange", "blue"], _tank
    ),
    "boat": _Thing(["boat", "ship"], ["boats", "ships"], ["white", "yellow", "purple"], _boat),
    "court": _Thing(["tennis court"], ["tennis courts"], ["white", "yellow", "blue"], _court),
    "tent": _Thing(["tent", "camping tent"], ["tents", "camping tents"], ["blue", "yellow", "purple"], _tent),
}

_BANDS: dict[str, tuple[list[str], Colour, Colour]] = {
    "": ([], (0, 0, 0), (0, 0, 0)),
    "river": (
        ["beside a winding river", "near a river", "next to a turquoise river"],
        (30, 150, 190),
        (90, 200, 220),
    ),
    "road": (
        ["beside a black road", "next to a road", "near a road with white marks"],
        (34, 34, 38),
        (240, 240, 240),
    ),
}

_WITH_GROUND = [
    "{number} {colour} {thing} on {ground}{band}",
    "an aerial view of {number} {colour} {thing} on {ground}{band}",
    "there {is_} {number} {colour} {thing} on {ground}{band}",
    "{ground} with {number} {colour} {thing}{band}",
    "{number} {thing} that {is_} {colour} {is_seen} on {ground}",
    "on {ground} there {is_} {number} {colour} {thing}",
]
_WITHOUT_GROUND = ["{number} {colour} {thing}{band}", "the {thing} {is_} {colour}{band}"]


def _draw_scene(scene: _Scene, rng: np.random.Generator) -> Image.Image:
    ground, thing = _GROUNDS[scene.ground], _THINGS[scene.thing]
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    mix = ground.texture(x, y, rng)[..., None]
    pixels = mix * np.array(ground.light) + (1 - mix) * np.array(ground.dark)
    if scene.band:
        _, fill, mark = _BANDS[scene.band]
        bend = 8.0 if scene.band == "river" else 0.0
        centre = SIDE * 0.84 + bend * np.sin(x * 0.08 + rng.uniform(0, 6))
        pixels[np.abs(y - centre) < 11] = fill
        pixels[(np.abs(y - centre) < 1.5) & (x % 16 < 9)] = mark
    pixels += rng.normal(0, 5, pixels.shape) + rng.normal(0, 6)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    # Places on a 3 by 2 grid above the band, so that things never overlap.
    places = [(column * 40 + 24, row * 44 + 30) for row in range(2) for column in range(3)]
    radius = 13.0
    for place in rng.permutation(len(places))[: scene.number]:
        shift_x, shift_y = rng.uniform(-3, 3, 2)
        left, top = places[place]
        thing.draw(draw, left + shift_x, top + shift_y, radius + rng.uniform(-1, 2), _COLOURS[scene.colour])
    return image


def _captions(scene: _Scene, number: int, pick: random.Random) -> list[str]:
    """Distinct captions of a scene; every one names the thing."""
    thing = _THINGS[scene.thing]
    captions: list[str] = []
    while len(captions) < number:
        template = pick.choice(_WITH_GROUND if pick.random() < 0.85 else _WITHOUT_GROUND)
        bands = _BANDS[scene.band][0]
        words = {
            "number": pick.choice(_NUMBERS[scene.number]),
            "colour": scene.colour,
            "thing": pick.choice(thing.one if scene.number == 1 else thing.many),
            "ground": pick.choice(_GROUNDS[scene.ground].phrases),
            "band": f" {pick.choice(bands)}" if bands else "",
            "is_": "is" if scene.number == 1 else "are",
            "is_seen": "is seen" if scene.number == 1 else "are seen",
        }
        caption = template.format(**words)
        # "an orange house", and the full stop that some captions have and some have not.
        caption = caption.replace("a orange", "an orange") + pick.choice(["", ".", " ."])
        if caption.rstrip(" .") not in {other.rstrip(" .") for other in captions}:
            captions.append(caption)
    return captions


def _scenes(number: int, pick: random.Random) -> list[_Scene]:
    """Scenes in which every kind of thing is equally frequent."""
    kinds = [list(_THINGS)[i % len(_THINGS)] for i in range(number)]
    pick.shuffle(kinds)
    return [
        _Scene(
            ground=pick.choice(list(_GROUNDS)),
            thing=kind,
            colour=pick.choice(_THINGS[kind].colours),
            number=pick.choice(list(_NUMBERS)),
            band=pick.choice(list(_BANDS)),
        )
        for kind in kinds
    ]


def _derangement(kinds: list[str], pick: random.Random) -> list[int] | None:
    """A permutation in which no place gets a member of its own kind; None when this draw finds none."""
    order = list(range(len(kinds)))
    pick.shuffle(order)
    for place in range(len(kinds)):
        if kinds[order[place]] != kinds[place]:
            continue
        others = [
            other
            for other in range(len(kinds))
            if kinds[order[other]] != kinds[place] and kinds[order[place]] != kinds[other]
        ]
        if not others:
            return None
        other = pick.choice(others)
        order[place], order[other] = order[other], order[place]
    return order


def _plant(
    pairs: list[tuple[int, str]], scenes: list[_Scene], noise: float, pick: random.Random
) -> dict[int, str]:
    """New captions by row: a share of the pairs exchange theirs, so that each names a thing its image does not show."""
    number = round(noise * len(pairs))
    number = max(number, 2) if number else 0
    while True:
        rows = sorted(pick.sample(range(len(pairs)), number))
        order = _derangement([scenes[pairs[row][0]].thing for row in rows], pick)
        if order is not None:
            return {row: pairs[rows[order[place]]][1] for place, row in enumerate(rows)}


def _encoded(image: Image.Image, suffix: str) -> bytes:
    out = io.BytesIO()
    if suffix == "png":
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=92)
    return out.getvalue()


def draw_demo(folder: Path, *, num_images: int = 600, noise: float = 0.2, seed: int = 0) -> dict[str, Any]:
    """Draw a captioned dataset into an empty or new folder.

    The layout is ImageFolder: `metadata.csv` with file_name, caption and known_noise (true or false), and `images/`.
    Each image has 3 to 5 captions. Two images and one caption are broken on purpose: a file cut in half, a file that
    is not there, and an empty caption. The same arguments give the same bytes.

    Args:
        folder: where to draw.
        num_images: 16.., those of the broken rows not counted.
        noise: share of the pairs whose caption is exchanged, 0..0.8.
        seed: of everything that is drawn by lot.

    Returns:
        `folder`, `images` (drawn), `rows`, `noisy` (rows with an exchanged caption), `broken` (rows by the status they
        will have), `noise` (noisy / rows) and `seed`.

    Raises:
        DatasetError: the folder is not empty or cannot be made, or a number is out of range.
    """
    if num_images < MIN_IMAGES:
        raise DatasetError(
            f"a demo needs at least {MIN_IMAGES} images, got {num_images}", "a few hundred are good"
        )
    if not 0 <= noise <= MAX_NOISE:
        raise DatasetError(
            f"noise must lie between 0 and {MAX_NOISE}, got {noise}", "0.2 exchanges one caption in five"
        )
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as problem:
        raise DatasetError(f"{folder} cannot be made: {problem.strerror}", "name another folder") from problem
    if not is_empty:
        raise DatasetError(f"{folder} is not empty", "name a new folder; nothing is ever overwritten")

    pick, rng = random.Random(seed), np.random.default_rng(seed)
    scenes = _scenes(num_images, pick)
    names = [f"images/scene_{i:04d}.{'jpg' if i % 2 else 'png'}" for i in range(num_images)]
    pairs = [
        (i, caption)
        for i, scene in enumerate(scenes)
        for caption in _captions(scene, pick.randint(3, 5), pick)
    ]
    # Lots of its own: the same seed draws the same scenes whatever the noise.
    planted = _plant(pairs, scenes, noise, random.Random(f"noise {seed}"))
    lines = [(names[i], planted.get(row, caption), row in planted) for row, (i, caption) in enumerate(pairs)]

    try:
        with writing(folder):
            _draw(folder, names, scenes, lines, pick, rng)
    except BaseException:
        # Half a demo would stand in the way of the next.
        shutil.rmtree(folder / "images", ignore_errors=True)
        (folder / "metadata.csv").unlink(missing_ok=True)
        raise
    return {
        "folder": str(folder),
        "images": num_images,
        "rows": len(lines),
        "noisy": len(planted),
        "broken": {"corrupt_image": 1, "missing_image": 1, "empty_caption": 1},
        "noise": len(planted) / len(lines),
        "seed": seed,
    }


def _draw(
    folder: Path,
    names: list[str],
    scenes: list[_Scene],
    lines: list[tuple[str, str, bool]],
    pick: random.Random,
    rng: np.random.Generator,
) -> None:
    """Write the images and the table; the broken rows join `lines`."""
    (folder / "images").mkdir()
    for name, scene in zip(names, scenes, strict=True):
        (folder / name).write_bytes(_encoded(_draw_scene(scene, rng), name[-3:]))

    cut, gone = _scenes(2, pick)
    whole = _encoded(_draw_scene(cut, rng), "png")
    (folder / "images" / "cut_in_half.png").write_bytes(whole[: len(whole) // 2])
    lines.append(("images/cut_in_half.png", _captions(cut, 1, pick)[0], False))
    lines.append(("images/never_there.png", _captions(gone, 1, pick)[0], False))
    lines.append((names[0], "", False))
    # Last, so that a folder without it is seen to be unfinished.
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["file_name", "caption", "known_noise"])
        writer.writerows((name, caption, str(is_noisy).lower()) for name, caption, is_noisy in lines)
