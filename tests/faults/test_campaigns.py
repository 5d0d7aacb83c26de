"""Inputs of a generator: a few of each in the quick suite, thousands in the slow one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faults import campaigns, cases
from faults.campaigns import CAMPAIGNS, RECIPES, Campaign
from faults.workspace import Change, wrote


def test_recipes_of_a_generator_end_in_one_clear_line(good: Path, tmp_path: Path) -> None:
    assert campaigns.recipes(good, tmp_path / "case", RECIPES[0]) == []


@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda campaign: campaign.name)
def test_mutated_files_end_in_one_clear_line(campaign: Campaign, good: Path, tmp_path: Path) -> None:
    assert campaigns.run(campaign, good, tmp_path / "case", campaign.quick) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_recipes_of_a_generator_end_in_one_clear_line(good: Path, tmp_path: Path) -> None:
    assert campaigns.recipes(good, tmp_path / "case", RECIPES[1] // 10) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("campaign", CAMPAIGNS, ids=lambda campaign: campaign.name)
def test_many_mutated_files_end_in_one_clear_line(campaign: Campaign, good: Path, tmp_path: Path) -> None:
    assert campaigns.run(campaign, good, tmp_path / "case", campaign.whole // 10) == []


def test_a_campaign_finds_what_is_wrong(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaigns, "strange", lambda found: [f"exit code {found.code}"])

    def spoil(folder: Path, rng: np.random.Generator) -> tuple[str, ...]:
        change: Change = wrote("small.toml", "x")
        change(folder)
        return ("run", "small.toml")

    found = campaigns.run(Campaign("one", 1, 1, ("small.toml",), spoil), good, tmp_path / "case", 2)
    assert found == ["one, input 0: exit code 2", "one, input 1: exit code 2"]
    assert campaigns.recipes(good, tmp_path / "recipes", 3)[0].startswith("recipes: {'model'")
    assert cases.LONGEST > 1000
