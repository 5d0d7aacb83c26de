"""What the paper of PRACTISE reports in the tables that ``benchmarks.practise`` makes anew.

Wang and Wu, "Practical Network Acceleration with Tiny Sets": top-1 on ImageNet in percent, mean ± standard
deviation where the paper gives one. Its networks are ResNet-34, ResNet-50 and MobileNetV2, its latencies those of
a TITAN Xp.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PaperTable:
    """Some of the columns of one of the paper's tables, in its own digits."""

    number: int
    what: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def title(self) -> str:
        """For a heading."""
        return f"Table {self.number} of the paper: {self.what}"

    def cell(self, row: str, column: str) -> str:
        """What stands where a row and a column meet."""
        found = next(cells for cells in self.rows if cells[0] == row)
        return found[self.columns.index(column)]


_IMAGES = ("method", "latency (ms)", "50", "100", "500", "1000")
TABLE_2 = PaperTable(
    2,
    "ResNet-34 on ImageNet, top-1 by images, filters inside blocks (original 73.31, 41.7 ms)",
    _IMAGES,
    (
        ("BP (filter)", "35.1 (-15.8%)", "39.0 ± 1.41", "41.0 ± 0.33", "51.8 ± 0.30", "57.8 ± 0.30"),
        ("BP (block)", "34.9 (-16.3%)", "66.5 ± 0.81", "66.8 ± 0.23", "68.6 ± 0.18", "69.8 ± 0.12"),
        ("KD", "35.1 (-15.8%)", "44.5 ± 1.20", "46.4 ± 0.34", "54.7 ± 0.26", "57.9 ± 0.21"),
        ("FSKD", "35.1 (-15.8%)", "45.3 ± 0.77", "51.2 ± 0.30", "57.6 ± 0.21", "59.4 ± 0.13"),
        ("CD", "35.1 (-15.8%)", "56.2 ± 0.37", "59.1 ± 0.22", "63.7 ± 0.18", "64.4 ± 0.03"),
        ("MiR", "35.1 (-15.8%)", "64.1 ± 0.10", "65.1 ± 0.19", "67.0 ± 0.09", "67.8 ± 0.06"),
        ("PRACTISE", "34.9 (-16.3%)", "70.3 ± 0.16", "71.5 ± 0.74", "72.5 ± 0.04", "72.5 ± 0.05"),
    ),
)
TABLE_3 = PaperTable(
    3,
    "ResNet-34 on ImageNet, top-1 by images, filters inside and outside the residual connection (original 73.31)",
    _IMAGES,
    (
        ("BP (filter)", "33.8 (-18.9%)", "24.2 ± 0.92", "27.6 ± 0.41", "42.9 ± 0.28", "51.2 ± 0.32"),
        ("BP (block)", "32.5 (-22.1%)", "60.6 ± 0.62", "61.6 ± 0.31", "65.0 ± 0.19", "66.8 ± 0.18"),
        ("KD", "33.8 (-18.9%)", "30.1 ± 0.69", "33.1 ± 0.43", "45.7 ± 0.26", "50.5 ± 0.29"),
        ("FSKD", "33.8 (-18.9%)", "31.1 ± 0.90", "36.6 ± 0.44", "42.8 ± 0.49", "44.9 ± 0.20"),
        ("MiR", "33.8 (-18.9%)", "59.9 ± 0.30", "62.1 ± 0.22", "65.4 ± 0.07", "66.6 ± 0.05"),
        ("PRACTISE", "32.5 (-22.1%)", "68.0 ± 1.36", "70.4 ± 0.42", "71.8 ± 0.07", "71.9 ± 0.05"),
    ),
)
TABLE_4 = PaperTable(
    4,
    "ResNet-34 on ImageNet, top-1 by latency, 500 images (original 73.31, 41.7 ms)",
    ("latency (ms)", "BP (filter)", "KD", "FSKD", "CD", "MiR", "PRACTISE"),
    (
        (
            "32.5 (-22.1%)",
            "47.54 ± 0.41",
            "49.34 ± 0.25",
            "33.19 ± 0.60",
            "59.65 ± 0.12",
            "68.14 ± 0.04",
            "71.75 ± 0.07",
        ),
        (
            "34.9 (-16.3%)",
            "58.94 ± 0.36",
            "61.01 ± 0.24",
            "62.56 ± 0.13",
            "68.17 ± 0.07",
            "70.53 ± 0.10",
            "72.52 ± 0.04",
        ),
        (
            "38.3 (-8.2%)",
            "65.02 ± 0.30",
            "67.22 ± 0.18",
            "69.59 ± 0.09",
            "71.12 ± 0.06",
            "71.95 ± 0.07",
            "73.04 ± 0.06",
        ),
    ),
)
TABLE_6 = PaperTable(
    6,
    "images made from the network (originals: ResNet-50 83.8 ms and 76.1, MobileNetV2 37.6 ms and 71.9; "
    "ADI* as reimplemented by its authors)",
    ("network", "method", "pruning", "latency (ms)", "top-1"),
    (
        ("ResNet-50", "DI", "filter", "-", "72.0"),
        ("ResNet-50", "MixMix", "filter", "-", "69.8"),
        ("ResNet-50", "ADI", "filter", "-", "73.3"),
        ("ResNet-50", "ADI*", "filter", "79.9 (-4.7%)", "73.5"),
        ("ResNet-50", "PRACTISE", "block", "66.2 (-21.0%)", "74.8"),
        ("MobileNetV2", "DI", "filter", "-", "15.3"),
        ("MobileNetV2", "MixMix", "filter", "-", "42.5"),
        ("MobileNetV2", "ADI*", "filter", "30.8 (-18.1%)", "62.8"),
        ("MobileNetV2", "PRACTISE", "block", "30.4 (-19.1%)", "68.0"),
    ),
)
TABLE_7 = PaperTable(
    7,
    "ResNet-50 with 21% less latency, top-1 by images and where they are from",
    ("images of", "50", "500", "1000", "5000", "all"),
    (
        ("ImageNet", "74.22", "74.58", "74.58", "75.14", "75.24"),
        ("ADI", "69.85", "72.68", "73.01", "74.40", "74.79"),
        ("CUB", "72.49", "73.71", "73.94", "74.86", "74.92"),
        ("Place365", "72.80", "74.10", "74.18", "75.05", "75.21"),
    ),
)
TABLE_8 = PaperTable(
    8,
    "ResNet-34 on ImageNet, top-1 by number of dropped blocks, 500 images",
    ("criterion", "1", "2", "3", "4", "5"),
    (
        ("CURL", "72.33", "71.08", "69.14", "65.48", "64.97"),
        ("epsilon-ResNet", "72.51", "71.20", "69.00", "67.90", "64.75"),
        ("L2 distance", "72.51", "71.20", "69.00", "68.61", "64.93"),
        ("PRACTISE", "73.02", "72.52", "71.92", "70.86", "69.35"),
    ),
)


def of_margin(count: int, asked: float) -> float | None:
    """The paper's margin over MiR in Table 3 at so many images; None where it has no such latency or number."""
    if abs(asked - 0.22) > 0.005 or str(count) not in TABLE_3.columns:
        return None
    mine, theirs = (float(TABLE_3.cell(row, str(count)).split(" ")[0]) for row in ("PRACTISE", "MiR"))
    return mine - theirs


def lines_of(table: PaperTable) -> list[str]:
    """A section with the table as Markdown."""
    return [
        "",
        f"## {table.title}",
        "",
        f"| {' | '.join(table.columns)} |",
        f"|{'---|' * len(table.columns)}",
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]
