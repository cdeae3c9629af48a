from pathlib import Path

import pytest
import yaml

from hpo_verl.algorithms.catalog import (
    ALGORITHMS,
    AVERAGING_LOSSES,
    ESTIMATOR_SECTIONS,
    HOMOGENEOUS_LOSSES,
    HYSTERETIC_ESTIMATORS,
    LOSS_AGG_MODES,
    PENALISED_LOSSES,
    SELECTING_LOSSES,
)

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "algo"
PAGES = ROOT / "docs" / "pages"


def test_every_entry_has_a_recipe_and_every_recipe_an_entry():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_recipe_selects_what_the_catalogue_says(name):
    algorithm = ALGORITHMS[name]
    text = (RECIPES / f"{name}.yaml").read_text()
    recipe = yaml.safe_load(text)
    actor = recipe["actor_rollout_ref"]["actor"]
    assert algorithm.name == name
    assert recipe["algorithm"]["adv_estimator"] == algorithm.estimator
    assert actor["policy_loss"]["loss_mode"] == algorithm.loss
    assert actor["loss_agg_mode"] == algorithm.loss_agg_mode
    assert text.startswith("# @package _global_\n# ")
    assert algorithm.paper in text or name == "grpo_token_mean"
    assert ("Relies on verl for" in text) == (algorithm.estimator == "grpo")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_paper_index_lists_it(name):
    algorithm = ALGORITHMS[name]
    index = (PAGES / "algorithms.md").read_text()
    row = next(line for line in index.splitlines() if line.startswith(f"| `{name}` |"))
    assert f"arxiv.org/abs/{algorithm.paper}" in row
    assert f"`{algorithm.loss}`" in row
    assert f"`{algorithm.loss_agg_mode}`" in row


def test_our_losses_permit_what_their_recipes_set():
    for algorithm in ALGORITHMS.values():
        ours = algorithm.loss in LOSS_AGG_MODES
        assert ours == (algorithm.origin == "hpo_verl")
        if ours:
            assert algorithm.loss_agg_mode in LOSS_AGG_MODES[algorithm.loss]


def test_hpo_and_mhpo_permit_nothing_else():
    assert LOSS_AGG_MODES["hpo"] == ("token-mean",)
    assert LOSS_AGG_MODES["mhpo"] == ("seq-mean-token-mean", "token-mean")


def test_a_loss_is_in_one_class_of_composition_only():
    classes = [set(HOMOGENEOUS_LOSSES), set(SELECTING_LOSSES), set(PENALISED_LOSSES)]
    assert sum(map(len, classes)) == len(set.union(*classes))
    assert {a.loss for a in ALGORITHMS.values()} <= classes[0] | {"bapo"}
    assert set(AVERAGING_LOSSES) <= classes[0]
    assert set(HYSTERETIC_ESTIMATORS) == {"hpo", "a_hpo"}


def test_every_estimator_that_is_not_verls_has_a_section_of_settings():
    assert set(ESTIMATOR_SECTIONS) == {a.estimator for a in ALGORITHMS.values()} - {"grpo"}


def test_the_page_on_other_systems_says_of_each_which_hook_it_needs():
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (PAGES / "other-systems.md").read_text().splitlines()
        if "arxiv.org" in line
    ]
    papers = {paper[1:11] for _, paper, _, _ in rows}
    assert papers == {
        "2510.08141", "2510.14545", "2510.00819", "2509.22576", "2507.10628", "2509.25849",
        "2510.08540", "2510.08457", "2511.07327", "2510.12838", "2509.11452", "2310.04373",
        "2407.00617",
    }  # fmt: skip
    assert all(official.startswith(("yes", "no", "partly: ")) for *_, official in rows)
    assert "(other-systems.md)" in (PAGES / "algorithms.md").read_text()
