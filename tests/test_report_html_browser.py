"""report.html in headless Chromium: what it asks for, what it complains of, whether it fits the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from test_report_html import source

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]

# What the page's own script does is tried by another that comes after it, in a copy of the page.
PROBE = """
<script>
const table = document.querySelector("table.sortable");
const name = row => row.cells[0].textContent;
const order = () => [...table.tBodies[0].rows].map(name);
const head = [...table.tHead.rows[0].cells].find(cell => cell.textContent.startsWith("median ms"));
const orders = [order()];
for (let i = 0; i < 2; i++) { head.querySelector("button").click(); orders.push(order()); }
const room = document.documentElement.clientWidth;  // what the scroll bar leaves
const outside = [...document.querySelectorAll("body *")].filter(one =>
  !one.closest(".scroll, svg, .hidden") && one.getBoundingClientRect().right > room + 1);
const found = {
  orders,
  sorted: head.getAttribute("aria-sort"),
  width: innerWidth,
  overflow: document.documentElement.scrollWidth - room,
  outside: outside.map(one => one.outerHTML.slice(0, 80)),
  requests: performance.getEntriesByType("resource").map(one => one.name),
  back: getComputedStyle(document.body).backgroundColor,
};
const told = Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)});
document.body.append(told);
</script>
"""


@cache
def opened(folder: Path, width: int, *, dark: bool = False) -> tuple[dict[str, object], str]:
    """What the probe found in a window of ``width`` pixels, and what Chromium wrote of the page."""
    assert CHROMIUM is not None
    path = folder / "report.html"
    # A window below 500 pixels is a phone's to Chromium, so that a frame of that width holds the page.
    framed = folder / f"framed{width}.html"
    path.write_text(source().replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    framed.write_text(
        f'<iframe id="frame" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>'
        '<pre id="out"></pre><script>onload = () => { document.getElementById("out").textContent = '
        'document.getElementById("frame").contentDocument.getElementById("found").textContent; }</script>',
        encoding="utf-8",
    )
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={max(width, 500) + 100},1000",
        *(["--blink-settings=preferredColorScheme=0"] if dark else []),
        "--dump-dom",
        framed.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    match = re.search('<pre id="out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr
    shown = match.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    found: dict[str, object] = json.loads(shown)
    return found, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.mark.parametrize("width", [380, 1400])
def test_the_page_fits_its_window_and_asks_for_nothing(folder: Path, width: int) -> None:
    found, console = opened(folder, width)
    assert console == ""
    assert found["width"] == width
    assert found["overflow"] == 0
    assert found["outside"] == []
    assert found["requests"] == []


def test_a_click_on_a_heading_sorts_by_number_and_another_the_other_way(folder: Path) -> None:
    orders = opened(folder, 1400)[0]["orders"]
    assert isinstance(orders, list)
    before, rising, falling = orders
    assert sorted(before) == sorted(rising)
    assert rising[0] == "without layer2.2"
    assert rising[-1] == "ensemble of 3"
    assert falling[0] == "ensemble of 3"
    assert opened(folder, 1400)[0]["sorted"] == "descending"


def test_a_dark_screen_gets_a_dark_page(folder: Path) -> None:
    assert opened(folder, 1400)[0]["back"] == "rgb(244, 245, 247)"
    assert opened(folder, 1400, dark=True)[0]["back"] == "rgb(17, 20, 24)"
