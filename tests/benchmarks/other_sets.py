"""Writes captioned sets of drawn pictures, far from photographs and from English, for `nc-audit bench`.

    python tests/benchmarks/other_sets.py OUT [--sets emoji_en,emoji_ja,clipart]
    nc-audit bench OUT/emoji_ja --recipe mobilenet_tfidf --image-weights FILE --recipes self_paced,similarity,lemon

Each set is a folder of `captions.csv` and `images/`. `emoji_LANGUAGE` (en, de, ja, ar, ...): Google's emoji of 64 px
with two captions each, their name and their keywords in the Unicode CLDR, skin tones included. `clipart`: the Open Clip
Art Library as Debian ships it, one caption each of title, description and keywords; hundreds share the same words.

Fetches the packages emoji-datasource-google, cldr-annotations-full and cldr-annotations-derived-full with npm, and
openclipart-png and openclipart-svg with apt-get and dpkg-deb, 300 MB in all; which versions, it prints.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image

SIDE = 224
LARGEST = 30_000_000  # pixels; a few drawings have hundreds of millions
PURL = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


def npm(package: str, room: Path) -> Path:
    """The unpacked folder of an npm package."""
    found = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=room, check=True, capture_output=True, text=True
    )
    archive = room / found.stdout.split()[-1]
    print(archive.name, file=sys.stderr)
    with tarfile.open(archive) as tar:
        tar.extractall(room / package, filter="data")
    return room / package / "package"


def debian(package: str, room: Path) -> Path:
    """The unpacked root of a Debian package."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=room, check=True, stdout=subprocess.DEVNULL)
    archive = next(room.glob(f"{package}_*.deb"))
    print(archive.name, file=sys.stderr)
    subprocess.run(["dpkg-deb", "-x", str(archive), str(room / package)], check=True)
    return room / package


def emoji(language: str, room: Path, out: Path) -> Iterator[tuple[str, str]]:
    """Image and caption of each pair; writes the images."""
    source = npm("emoji-datasource-google", room)
    words: dict[str, dict[str, list[str]]] = {}
    for name in ("annotations", "annotationsDerived"):
        package = "cldr-annotations-full" if name == "annotations" else "cldr-annotations-derived-full"
        file = npm(package, room) / name / language / "annotations.json"
        words |= json.loads(file.read_text("utf-8"))[name]["annotations"]
    for entry in json.loads((source / "emoji.json").read_text("utf-8")):
        for one in (entry, *entry.get("skin_variations", {}).values()):
            text = "".join(chr(int(code, 16)) for code in one["unified"].split("-"))
            about = words.get(text) or words.get(text.replace("\ufe0f", "")) or {}
            picture = source / "img" / "google" / "64" / one["image"]
            name, keywords = about.get("tts", [""])[0], ", ".join(about.get("default", []))
            if not (name and keywords and name != keywords and picture.is_file()):
                continue
            (out / one["image"]).write_bytes(picture.read_bytes())
            yield one["image"], name
            yield one["image"], keywords


def clipart(room: Path, out: Path) -> Iterator[tuple[str, str]]:
    """Image and caption of each pair; writes the images, smaller and on white."""
    Image.MAX_IMAGE_PIXELS = None
    pictures = debian("openclipart-png", room) / "usr/share/openclipart/png"
    drawings = debian("openclipart-svg", room) / "usr/share/openclipart/svg"
    for number, picture in enumerate(sorted(pictures.rglob("*.png"))):
        try:
            about = ElementTree.parse(drawings / picture.relative_to(pictures).with_suffix(".svg"))
            with Image.open(picture) as image:
                if image.width * image.height > LARGEST:
                    continue
                drawn = image.convert("RGBA")
        except (OSError, ElementTree.ParseError):
            continue
        parts = [next((e.text or "" for e in about.iter(PURL + tag)), "") for tag in ("title", "description")]
        subjects = (
            e.text or "" for subject in about.iter(PURL + "subject") for e in subject.iter(RDF + "li")
        )
        caption = " ".join(" ".join([*parts, ", ".join(subjects)]).split())
        if len(caption) < 6:
            continue
        white = Image.new("RGBA", drawn.size, "white")
        white.alpha_composite(drawn)
        white.thumbnail((SIDE, SIDE))
        white.convert("RGB").save(out / f"{number:05d}.png")
        yield f"{number:05d}.png", caption


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", default="emoji_en,emoji_ja,clipart")
    given = parser.parse_args()
    for name in given.sets.split(","):
        folder = given.out / name
        (folder / "images").mkdir(parents=True)
        with (
            tempfile.TemporaryDirectory() as tmp,
            (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file,
        ):
            room, images = Path(tmp), folder / "images"
            kind, _, language = name.partition("_")
            pairs = list(clipart(room, images) if kind == "clipart" else emoji(language, room, images))
            table = csv.writer(file)
            table.writerow(["image", "caption"])
            table.writerows((f"images/{image}", caption) for image, caption in pairs)
        print(f"{folder}: {len(pairs):,} pairs", file=sys.stderr)


if __name__ == "__main__":
    main()
