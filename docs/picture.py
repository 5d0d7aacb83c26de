"""Make docs/images/report.png: the report of a run on the shipped digits, as a browser shows it.

``python -m docs.picture`` takes a minute on a quiet core and needs Chromium. ``--run RUN`` shows a finished
run instead.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import optpipe
from optpipe.console import EventConsole

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "report.png"
RECIPE = ROOT / "recipes" / "practise.toml"
OVERRIDES = ("target.threads=1",)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)
COLOURS = 128
"""As many as a flat page needs; a picture of them is a third as large."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the recipe unless a run is given, and take the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a finished run [recipes/practise.toml is run]")
    parser.add_argument("--out", type=Path, default=PICTURE)
    parser.add_argument("--size", default="1280,900", help="of the window [1280,900]")
    arguments = parser.parse_args(words)
    folder: Path | None = arguments.run
    if folder is None:
        with EventConsole() as console:
            result = optpipe.run(
                RECIPE, out=ROOT / "runs" / "picture", overrides=OVERRIDES, on_event=console.show
            )
        print(result)
        folder = result.folder
    take(folder / "report.html", arguments.out, arguments.size)
    print(f"{arguments.out}: {arguments.out.stat().st_size // 1000} KB")


def take(page: Path, picture: Path, size: str) -> None:
    """The upper part of a page as a PNG file."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "shot.png"
        subprocess.run(
            [
                browser,
                *QUIET,
                f"--user-data-dir={scratch}/profile",
                f"--window-size={size}",
                f"--screenshot={shot}",
                page.resolve().as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )
        picture.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    main()
