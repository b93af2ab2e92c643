"""The recipes of the fixture images: photographs that may be passed on, pages of our own, and edge cases.

`python -m vlmqual_adapters.pictures --sources DIR --output fixtures` makes them; DIR holds the unpacked wheels that
the photographs come from. The stored files are what counts: how letters and resized photographs come out depends on
the versions of Pillow and its libraries. `--check` makes the edge cases again, which depend on nothing, and compares
pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmqual_adapters import inventory
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, UsageError
from vlmqual_contract.target import Array


@dataclass(frozen=True)
class Photograph:
    """Where a photograph comes from.

    Attributes:
        name: file name of the fixture.
        source: path in the unpacked wheel.
        package: package and version of the wheel.
        size: width and height after cropping to that shape around the centre and resizing.
        shows: what is to be seen.
        author: who made it.
        licence: as stated in the package.
    """

    name: str
    source: str
    package: str
    size: tuple[int, int]
    shows: str
    author: str
    licence: str


_SKIMAGE = "scikit-image 0.26.0"
_SKLEARN = "scikit-learn 1.9.1"
PHOTOGRAPHS = (
    Photograph(
        "astronaut.png",
        "skimage/data/astronaut.png",
        _SKIMAGE,
        (320, 320),
        "the astronaut Eileen Collins",
        "NASA",
        "public domain",
    ),
    Photograph(
        "camera.png",
        "skimage/data/camera.png",
        _SKIMAGE,
        (256, 256),
        "a photographer, grayscale",
        "Lav Varshney",
        "CC0 1.0",
    ),
    Photograph(
        "chelsea.png",
        "skimage/data/chelsea.png",
        _SKIMAGE,
        (360, 240),
        "a cat",
        "Stefan van der Walt",
        "CC0 1.0",
    ),
    Photograph(
        "china.png",
        "sklearn/datasets/images/china.jpg",
        _SKLEARN,
        (240, 400),
        "a Chinese temple",
        "danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/",
        "CC-BY 2.0, https://creativecommons.org/licenses/by/2.0/",
    ),
    Photograph(
        "coffee.png",
        "skimage/data/coffee.png",
        _SKIMAGE,
        (420, 280),
        "a cup of coffee",
        "Rachel Michetti, courtesy of Pikolo Espresso Bar",
        "CC0 1.0",
    ),
    Photograph(
        "hubble.png",
        "skimage/data/hubble_deep_field.jpg",
        _SKIMAGE,
        (300, 260),
        "the Hubble eXtreme Deep Field",
        "NASA",
        "public domain",
    ),
    Photograph(
        "rocket.png",
        "skimage/data/rocket.jpg",
        _SKIMAGE,
        (400, 266),
        "launch of DSCOVR on a Falcon 9",
        "SpaceX",
        "public domain",
    ),
    Photograph(
        "text.png",
        "skimage/data/text.png",
        _SKIMAGE,
        (448, 172),
        "handwriting on squared paper, grayscale",
        "Wikipedia, Corner.png",
        "public domain",
    ),
)


def photograph(entry: Photograph, sources: Path) -> Image.Image:
    """Read a photograph from the unpacked wheels, crop it around its centre and resize it.

    Raises:
        UsageError: the source is not there.
    """
    found = sorted(sources.rglob(entry.source))
    if not found:
        raise UsageError(f"{entry.source} of {entry.package} is not below {sources}; unpack the wheel there")
    with Image.open(found[0]) as image:
        image.load()
    width, height = entry.size
    wide = min(image.width, image.height * width // height)
    high = min(image.height, image.width * height // width)
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    cropped = image.crop((left, top, left + wide, top + high))
    return cropped.resize(entry.size, Image.Resampling.LANCZOS)


def pattern(width: int, height: int, channels: int = 3, phase: int = 0) -> Array:
    """Uint8 (height, width, channels): slopes, stripes and blocks that differ in every channel and every direction."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.int64)
    slope = (columns * 255 // max(width - 1, 1) + rows * 97 // max(height - 1, 1)) % 256
    stripes = (columns * 3 + rows * 5 + phase) % 64 * 4
    blocks = ((columns // 9) * 37 + (rows // 7) * 59 + phase) % 256
    layers = (slope, (slope + stripes) // 2, (blocks + stripes) // 2, 255 - slope)
    return np.stack([layers[index % 4] for index in range(channels)], axis=-1).astype(np.uint8)


def _rgb(width: int, height: int) -> Image.Image:
    return Image.fromarray(pattern(width, height))


def _alpha(mode: str) -> Image.Image:
    colours = 3 if mode == "RGBA" else 1
    data = pattern(120, 90, colours + 1)
    rows, columns = np.mgrid[0:90, 0:120]
    data[..., -1] = np.where(columns < 40, 255, np.where(columns < 80, rows * 255 // 89, 0))
    return Image.fromarray(data, mode)


def _palette() -> Image.Image:
    rows, columns = np.mgrid[0:90, 0:120].astype(np.int64)
    image = Image.fromarray(((columns // 8 + rows // 6) % 30).astype(np.uint8))
    image = image.convert("P")
    image.putpalette([value for index in range(30) for value in (index * 8, 255 - index * 5, index * 73 % 256)])
    return image


def _gray16() -> Image.Image:
    rows, columns = np.mgrid[0:90, 0:120].astype(np.int64)
    return Image.fromarray((columns * 500 + rows * 60).astype(np.uint16))


def _plain(value: int) -> Image.Image:
    return Image.fromarray(np.full((90, 120, 3), value, np.uint8))


EDGE_CASES: dict[str, Callable[[], Image.Image]] = {
    **{
        f"edge-{w}x{h}.png": lambda w=w, h=h: _rgb(w, h)  # type: ignore[misc]
        for w, h in (
            *((1, 1), (1, 40), (40, 1), (3, 50), (50, 3), (3, 3), (2, 60)),
            *((5000, 40), (40, 5000)),
            *((112, 112), (224, 112), (448, 448), (364, 364), (728, 364), (113, 111)),
        )
    },
    "edge-rgba.png": lambda: _alpha("RGBA"),
    "edge-la.png": lambda: _alpha("LA"),
    "edge-gray.png": lambda: Image.fromarray(pattern(120, 90, 1)[..., 0]),
    "edge-palette.png": _palette,
    "edge-palette-transparent.png": _palette,
    "edge-gray16.png": _gray16,
    "edge-cmyk.tif": lambda: Image.fromarray(pattern(120, 90, 4), "CMYK"),
    "edge-exif-3.png": lambda: _rgb(120, 80),
    "edge-exif-6.png": lambda: _rgb(120, 80),
    "edge-black.png": lambda: _plain(0),
    "edge-white.png": lambda: _plain(255),
}


def save(name: str, image: Image.Image, path: Path) -> None:
    """Write a fixture image without loss; EXIF orientation and transparent palette entries go by the name."""
    options: dict[str, object] = {}
    if name.startswith("edge-exif-"):
        exif = Image.Exif()
        exif[0x0112] = int(name.removeprefix("edge-exif-").split(".")[0])
        options["exif"] = exif.tobytes()
    if name == "edge-palette-transparent.png":
        options["transparency"] = bytes(index * 8 for index in range(30))
    if path.suffix == ".png":
        image.save(path, "PNG", optimize=True, **options)
    else:
        image.save(path, "TIFF", compression="tiff_lzw")


def invoice() -> Image.Image:
    """A page with letterhead, table and total, black and blue on white."""
    image = Image.new("RGB", (496, 702), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 496, 62), fill=(28, 60, 120))
    draw.text((28, 16), "Harbour Lamp Works", font=_font(26), fill="white")
    draw.text((28, 86), "Invoice 2024-0117", font=_font(22), fill="black")
    for row, line in enumerate(("Date: 14 March 2024", "Customer: Mill Street Library", "Due: 13 April 2024")):
        draw.text((28, 122 + 20 * row), line, font=_font(14), fill=(50, 50, 50))
    items = (
        ("Item", "Count", "Price", "Sum"),
        ("Desk lamp, green shade", "6", "38.50", "231.00"),
        ("Reading light, clip", "24", "12.25", "294.00"),
        ("Replacement bulb, 7 W", "60", "3.10", "186.00"),
        ("Ceiling lamp, oak", "2", "145.00", "290.00"),
        ("Cable, 3 m, black", "15", "4.80", "72.00"),
        ("Fitting on site, hours", "5", "52.00", "260.00"),
    )
    for row, cells in enumerate(items):
        top = 210 + 34 * row
        if row == 0:
            draw.rectangle((24, top - 6, 472, top + 22), fill=(222, 230, 242))
        for column, cell in zip((32, 250, 320, 402), cells, strict=True):
            draw.text((column, top), cell, font=_font(14), fill="black")
        draw.line((24, top + 24, 472, top + 24), fill=(140, 140, 140))
    for row, (label, amount) in enumerate((("Net", "1333.00"), ("Tax 19 %", "253.27"), ("Total", "1586.27"))):
        draw.text((320, 472 + 24 * row), label, font=_font(15), fill="black")
        draw.text((402, 472 + 24 * row), amount, font=_font(15), fill="black")
    draw.line((314, 516, 472, 516), fill="black", width=2)
    draw.text((28, 600), "Please quote the number of the invoice with your payment.", font=_font(12), fill=(60, 60, 60))
    draw.ellipse((380, 590, 460, 670), outline=(180, 30, 30), width=3)
    draw.text((397, 622), "CHECKED", font=_font(11), fill=(180, 30, 30))
    return image


def report() -> Image.Image:
    """A page with a title, two columns of small text, a bar chart and a page number."""
    image = Image.new("RGB", (560, 420), (250, 248, 240))
    draw = ImageDraw.Draw(image)
    draw.text((30, 20), "Rainfall at the Northern Stations", font=_font(24), fill=(20, 20, 20))
    draw.line((30, 56, 530, 56), fill=(20, 20, 20), width=2)
    left = (
        "The three stations measured more rain",
        "than in any spring since records began.",
        "At the lake, 212 mm fell in April alone.",
        "The river rose to 3.4 m on the 19th and",
        "stayed above the mark for nine days.",
        "No damage was reported by the farms.",
        "",
        "Measurements are taken at 7 in the",
        "morning with a gauge of 200 square",
        "centimetres; snow is melted first.",
    )
    for row, line in enumerate(left):
        draw.text((30, 72 + 18 * row), line, font=_font(12), fill=(40, 40, 40))
    bars = (("Lake", 212, (60, 110, 170)), ("Ridge", 164, (90, 150, 90)), ("Valley", 98, (190, 130, 60)))
    for index, (label, amount, colour) in enumerate(bars):
        x = 320 + 70 * index
        draw.rectangle((x, 250 - amount // 2, x + 44, 250), fill=colour)
        draw.text((x + 4, 254), label, font=_font(12), fill="black")
        draw.text((x + 8, 234 - amount // 2), str(amount), font=_font(12), fill="black")
    draw.line((308, 250, 530, 250), fill="black")
    draw.text((330, 280), "April, millimetres", font=_font(12), fill=(60, 60, 60))
    for row in range(4):
        draw.line((30, 310 + 22 * row, 530, 310 + 22 * row), fill=(160, 160, 160))
    cells = ("Station", "April", "May", "June"), ("Lake", "212", "88", "61"), ("Ridge", "164", "70", "55")
    for row, texts in enumerate(cells):
        for column, cell in enumerate(texts):
            draw.text((40 + 125 * column, 313 + 22 * row), cell, font=_font(13), fill="black")
    draw.text((272, 396), "- 7 -", font=_font(12), fill="black")
    return image


PAGES: dict[str, Callable[[], Image.Image]] = {"page-invoice.png": invoice, "page-report.png": report}


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def licences() -> str:
    """Content of `LICENSES.md`."""
    lines = [
        "# Images: where they come from and under which licence",
        "",
        "Photographs were taken from the wheels of two Python packages, whose documentation states the licences below.",
        "Each was cropped around its centre and resized, and stored as PNG; that is the only change.",
        "",
        "| file | shows | source | author | licence |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{p.name}` | {p.shows} | `{p.source}` in {p.package} | {p.author} | {p.licence} |" for p in PHOTOGRAPHS
    ]
    lines += [
        "",
        "The pages " + ", ".join(f"`{name}`" for name in PAGES) + " are drawn by `vlmqual_adapters.pictures`",
        "with text of this project (names and figures are invented); they and all `edge-*` files, which the same",
        "module computes, are part of this project and under its licence (Apache-2.0). Letters on the pages are drawn",
        "with the font that Pillow brings along (Aileron, CC0 1.0).",
        "",
    ]
    return "\n".join(lines)


def _differences(folder: Path) -> list[str]:
    wrong = []
    for name, make in EDGE_CASES.items():
        made = make()
        if not (folder / name).is_file():
            wrong.append(f"{name}: missing")
            continue
        with Image.open(folder / name) as stored:
            if stored.mode != made.mode or stored.convert(made.mode).tobytes() != made.tobytes():
                wrong.append(f"{name}: pixels differ")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    """Make or check the fixture images; 0 when all is made or equal, 1 when an edge case differs."""
    parser = argparse.ArgumentParser(prog="python -m vlmqual_adapters.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fixtures"), help="the fixtures directory")
    parser.add_argument("--sources", type=Path, help="directory with the unpacked wheels; without it no photographs")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; compare the edge cases with what is stored"
    )
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.output / "images"
    if chosen.check:
        wrong = _differences(folder)
        print("\n".join(wrong) or f"{len(EDGE_CASES)} edge cases are the same")
        return EXIT_FAILED if wrong else EXIT_OK
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: make() for name, make in (*EDGE_CASES.items(), *PAGES.items())}
    if chosen.sources:
        made |= {entry.name: photograph(entry, chosen.sources) for entry in PHOTOGRAPHS}
    for name, image in made.items():
        save(name, image, folder / name)
        print(f"{(folder / name).stat().st_size:>9} bytes  {name}")
    (folder / "LICENSES.md").write_text(licences(), "utf-8")
    command = "python -m vlmqual_adapters.pictures --sources DIR --output fixtures"
    record = {"command": command, "software": [f"pillow {version('pillow')}"], "sources": [_SKIMAGE, _SKLEARN]}
    inventory.write(chosen.output, "images", record)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
