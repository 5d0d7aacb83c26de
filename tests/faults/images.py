"""Images and data sets that are wrong, damaged, or much larger than they look."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from faults.cases import Case
from faults.recipes import CHECK
from faults.workspace import Change, arrays, both, cut, nothing, recipe, wrote

PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"
    b"(marked) (w) file closefile showpage\n%%EOF\n"
)


def _data(name: str, make: Change, says: str) -> Case:
    return Case(name, make, CHECK, 2, says)


def _npz(name: str, make: Change, says: str) -> Case:
    """The calibration images are new.npz, as ``make`` leaves it."""
    return _data(name, both(recipe('"photos"', '"new.npz"'), make), says)


def _photo(name: str, make: Change, says: str = "cannot be read", code: int = 2) -> Case:
    """All photographs are what ``make`` leaves in ant/0.png."""

    def change(folder: Path) -> None:
        photos = folder / "photos"
        shutil.rmtree(photos)
        for label in ("ant", "bee", "cat", "dog"):
            (photos / label).mkdir(parents=True)
        make(folder)
        made = photos / "ant" / "0.png"
        for label in ("bee", "cat", "dog"):
            if made.is_file() and not made.is_symlink():
                shutil.copyfile(made, photos / label / "0.png")

    return Case(name, change, CHECK, code, says)


def encoded(kind: str, pixels: np.ndarray = PIXELS) -> bytes:
    """An image file of a kind."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes = b"") -> bytes:
    """A PNG of this header, whatever its data are."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def _file(content: bytes) -> Change:
    return wrote("photos/ant/0.png", content)


def _link(target: str) -> Change:
    def change(folder: Path) -> None:
        for label in ("ant", "bee", "cat", "dog"):
            (folder / "photos" / label / "0.png").symlink_to(target)

    return change


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "photos" / "ant" / "0.png")


def _member(name: str, content: bytes, *, other: bytes | None = None) -> Change:
    """new.npz as an archive of one member, whose bytes are ``other`` than those of its checksum."""

    def change(folder: Path) -> None:
        path = folder / "new.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
        if other is not None:
            path.write_bytes(path.read_bytes().replace(content, other))

    return change


def npy(shape: str, content: bytes = b"", kind: str = "|u1") -> bytes:
    """An .npy of this header, whatever follows it."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def _images(shape: tuple[int, ...], kind: type = np.uint8) -> np.ndarray:
    return np.zeros(shape, dtype=kind)


def _labels(labels: object) -> Change:
    return arrays("new.npz", images=_images((4, 16, 16, 3)), labels=np.array(labels))


def _function(body: str) -> Change:
    return both(recipe('"photos"', '"mine:images"'), lambda folder: _append(folder / "mine.py", body))


def _append(path: Path, text: str) -> None:
    path.write_text(f"{path.read_text(encoding='utf-8')}\n\n{text}\n", encoding="utf-8")


def _renamed(old: str, new: str) -> Change:
    return lambda folder: (folder / old).rename(folder / new)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder / "photos")
    (folder / "photos").mkdir()


def _hidden(folder: Path) -> None:
    _emptied(folder)
    (folder / "photos" / ".0.png").write_bytes(encoded("PNG"))


def _nested(content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "photos" / "0.png").write_bytes(content)

    return change


CASES = (
    # where they are
    _data("images that are not there", recipe('"photos"', '"nowhere"'), "no such file or folder"),
    _data("a text for images", recipe('"photos"', '"mine.py"'), "is not supported"),
    _data("weights for images", recipe('"photos"', '"weights.pth"'), "is not supported"),
    _data("an empty name for images", recipe('"photos"', '"many.txt"'), "no such file or folder"),
    _data("a name for images with a NUL", recipe('"photos"', '"a\\u0000b"'), "data"),
    _data("a name for images of 5000 characters", recipe('"photos"', f'"{"d" * 5000}"'), "data"),
    _data("an empty folder", _emptied, "no images in this folder"),
    _data("a folder of hidden images", _hidden, "no images in this folder"),
    _data("images beside class folders", _nested(encoded("PNG")), "keep one of the two"),
    _data("a class too few", _renamed("photos/dog", "dog"), "3 class folders"),
    _data("a class too many", lambda folder: (folder / "photos" / "eel").mkdir(), "5 class folders"),
    _data(
        "a class with markup in its name",
        both(
            _renamed("photos/ant", "photos/<script>alert(1)<"),
            lambda folder: (folder / "photos" / "[red]").mkdir(),
        ),
        "5 class folders",
    ),
    _data(
        "two sizes and none to resize to",
        both(
            recipe("size = [16, 16]\n", ""),
            lambda folder: Image.fromarray(PIXELS).save(folder / "photos" / "dog" / "9.png"),
        ),
        "give a size to resize to",
    ),
    # files
    _photo("no photograph", nothing, "no images in this folder"),
    _photo("an empty photograph", _file(b"")),
    _photo("a text for a photograph", _file(b"a photograph of the sea")),
    _photo("a drawing for a photograph", _file(b'<svg xmlns="http://www.w3.org/2000/svg"/>')),
    _photo("half a PNG", both(_file(encoded("PNG")), cut("photos/ant/0.png", 0.5))),
    _photo("half a JPEG", both(_file(encoded("JPEG")), cut("photos/ant/0.png", 0.5))),
    _photo("half a WebP", both(_file(encoded("WEBP")), cut("photos/ant/0.png", 0.5))),
    _photo("half a BMP", both(_file(encoded("BMP")), cut("photos/ant/0.png", 0.5))),
    _photo("a PNG with a wrong checksum", _file(encoded("PNG").replace(b"IDAT", b"IDAT\x01", 1))),
    _photo("a PNG without its data", _file(png(16, 16))),
    _photo("a PNG of no width", _file(png(0, 16))),
    _photo("a PNG of 16 bits", _file(encoded("PNG", np.zeros((16, 16), np.uint16))), "8 bits"),
    _photo("a TIFF called PNG", _file(encoded("TIFF"))),
    _photo("a program for a printer called PNG", _file(EPS)),
    _photo("an icon called PNG", _file(encoded("ICO"))),
    # bombs
    _photo("a bomb of 4 * 10^18 pixels", _file(png(2**31 - 1, 2**31 - 1))),
    _photo("a bomb of 200 million pixels", _file(png(20_000, 10_000))),
    _photo("a bomb of 100 million pixels", _file(png(10_000, 10_000))),
    _photo(
        "a bomb in a BMP",
        _file(
            b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
        ),
    ),
    _photo("a bomb in a PPM", _file(b"P6 60000 60000 255\n")),
    _photo("a bomb in a text chunk", _file(encoded("PNG").replace(b"IDAT", b"zTXt", 1))),
    _photo(
        "a strip that a crop makes a bomb",
        both(
            recipe("size = [16, 16]", 'size = [224, 224]\nresize = "crop"'),
            _file(encoded("PNG", np.zeros((1, 60_000, 3), np.uint8))),
        ),
        "is too narrow",
    ),
    # links
    _photo("links to nowhere", _link("nowhere.png"), "no images in this folder"),
    _photo("links to endless zeros", _link("/dev/zero"), "no images in this folder"),
    _photo("links to a secret", _link("/etc/passwd")),
    _photo("a pipe for a photograph", _pipe, "no images in this folder"),
    # arrays
    _npz("an empty .npz", wrote("new.npz", b""), "not a readable .npz"),
    _npz("a text called .npz", wrote("new.npz", "images"), "not a readable .npz"),
    _npz(
        "half an .npz",
        both(arrays("new.npz", images=_images((4, 16, 16, 3))), cut("new.npz", 0.5)),
        "not a readable .npz",
    ),
    _npz("an .npy called .npz", wrote("new.npz", npy("(1,)", b"x")), "not a readable .npz"),
    _npz("a pickle called .npz", wrote("new.npz", b"\x80\x04K\x01."), "not a readable .npz"),
    _npz("an archive of nothing for images", wrote("new.npz", b"PK\5\6" + bytes(18)), "no key 'images'"),
    _npz(
        "an array of objects",
        arrays("new.npz", images=np.array([{"a": 1}, None], dtype=object)),
        "not a readable .npz",
    ),
    _npz(
        "an archive of images that climbs", _member("../../images.npy", npy("(1,)", b"x")), "no key 'images'"
    ),
    _npz("an archive of images that is no array", _member("images.npy", b"pixels"), "not a readable .npz"),
    _npz(
        "an array shorter than it says",
        _member("images.npy", npy("(4, 16, 16, 3)", b"xx")),
        "not a readable .npz",
    ),
    _npz("an array of 10^15 bytes", _member("images.npy", npy("(100000, 100000, 100000, 1)")), "new.npz"),
    _npz("an array of 10^30 bytes", _member("images.npy", npy(f"({10**30}, 1, 1, 3)")), "new.npz"),
    _npz("an array of less than nothing", _member("images.npy", npy("(-4, 16, 16, 3)")), "new.npz"),
    _npz(
        "an array whose shape is code",
        _member("images.npy", npy("__import__('os').getpid()")),
        "not a readable .npz",
    ),
    _npz(
        "an array nested deeply", _member("images.npy", npy("(" * 3000 + ")" * 3000)), "not a readable .npz"
    ),
    _npz(
        "an array with a wrong checksum",
        _member("images.npy", npy("(4, 16, 16, 3)", bytes(3072)), other=npy("(4, 16, 16, 3)", b"x" * 3072)),
        "Bad CRC",
    ),
    _npz("pictures, and no images", arrays("new.npz", pictures=_images((4, 16, 16, 3))), "no key 'images'"),
    _npz("none of the images", arrays("new.npz", images=_images((0, 16, 16, 3))), "no images (shape"),
    _npz("images of no height", arrays("new.npz", images=_images((4, 0, 16, 3))), "no images (shape"),
    _npz(
        "images in floating point",
        arrays("new.npz", images=_images((4, 16, 16, 3), np.float32)),
        "must be uint8",
    ),
    _npz("images that are no numbers", arrays("new.npz", images=np.full((4, 16, 16, 3), np.nan)), "hold NaN"),
    _npz("words for images", arrays("new.npz", images=np.array(["a"])), "must be uint8"),
    _npz("images of 16 bits", arrays("new.npz", images=_images((4, 16, 16, 3), np.uint16)), "must be uint8"),
    _npz("images in torch's order", arrays("new.npz", images=_images((4, 3, 16, 16))), "16 channels"),
    _npz("images without colours", arrays("new.npz", images=_images((4, 16, 16))), "1 channels"),
    _npz(
        "images of five dimensions", arrays("new.npz", images=_images((4, 1, 16, 16, 3))), "must be (N, H, W"
    ),
    _npz("one number for images", arrays("new.npz", images=np.uint8(3)), "must be (N, H, W"),
    _npz("labels too few", _labels([0, 1, 2]), "must be integers of shape (4,)"),
    _npz("labels of two dimensions", _labels([[0], [1], [2], [3]]), "must be integers of shape (4,)"),
    _npz("labels in floating point", _labels([0.0, 1.0, 2.0, 3.0]), "must be integers"),
    _npz("labels of words", _labels(["a", "b", "c", "d"]), "must be integers"),
    _npz("labels below 0", _labels([0, 1, 2, -1]), "labels go from -1 to 2"),
    _npz("labels beyond the classes", _labels([0, 1, 2, 4]), "labels go from 0 to 4"),
    _npz(
        "labels of 64 bits",
        arrays("new.npz", images=_images((4, 16, 16, 3)), labels=np.array([0, 1, 2, 2**64 - 1], np.uint64)),
        "labels",
    ),
    # functions
    _data(
        "a function for images that is not there", recipe('"photos"', '"mine:images"'), "no function 'images'"
    ),
    _data(
        "a function for images that fails", _function("def images():\n    raise KeyError('x')"), "KeyError"
    ),
    _data("a function for images that leaves", _function("def images():\n    exit()"), "SystemExit"),
    _data(
        "a function that returns one thing", _function("def images():\n    return 3"), "must return (images"
    ),
    _data("a function that returns words", _function("def images():\n    return 'a', 'b'"), "must be uint8"),
    _data(
        "a function that returns a ragged list",
        _function("def images():\n    return [[1], [2, 3]], None"),
        "mine:images",
    ),
)
