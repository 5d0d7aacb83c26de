"""All cases of the catalogue, by what is wrong."""

from __future__ import annotations

from faults import engines, images, networks, recipes, runs
from faults.cases import Case

CATALOGUE: dict[str, tuple[Case, ...]] = {
    "recipes and command lines": recipes.CASES,
    "networks and weights": networks.CASES,
    "images and data sets": images.CASES,
    "ONNX files": engines.CASES,
    "reports, bundles and engines": runs.CASES,
}
