"""What holds for every record: recipe, test, page, slopes, aggregations, and no name elsewhere."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml

from hpo_verl.algorithms import base, registry
from hpo_verl.algorithms.base import Algorithm, Estimator, Loss, TokenBatch
from hpo_verl.algorithms.registry import ALGORITHMS, ESTIMATORS, LOSSES, MODULES, OUR_LOSSES
from hpo_verl.errors import EnvironmentCheckError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "algo"
PAGES = ROOT / "docs" / "pages"
FILES = {
    record.name: name
    for name in MODULES
    for record in importlib.import_module(f"hpo_verl.algorithms.{name}").ALGORITHMS
}
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda one: one.name)
WITH_LOSS = [one for one in ALGORITHMS.values() if one.loss.token_loss is not None]
PROPORTIONAL = [loss for loss in OUR_LOSSES.values() if loss.proportional]


def test_every_file_of_the_folder_holds_records():
    folder = ROOT / "hpo_verl" / "algorithms"
    others = {"__init__", "base", "registry"}
    assert {path.stem for path in folder.glob("*.py")} - others == set(MODULES)
    assert set(FILES) == set(ALGORITHMS)


# ---------------------------------------------------------------- recipe, test and page


def test_every_record_has_a_recipe_and_every_recipe_a_record():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(ALGORITHMS)


@EVERY
def test_the_recipe_selects_what_the_record_says(algorithm):
    text = (RECIPES / f"{algorithm.name}.yaml").read_text()
    recipe = yaml.safe_load(text)
    actor = recipe["actor_rollout_ref"]["actor"]
    assert recipe["algorithm"]["adv_estimator"] == algorithm.estimator.name
    assert actor["policy_loss"]["loss_mode"] == algorithm.loss.name
    assert actor["loss_agg_mode"] == algorithm.loss_agg_mode
    assert text.startswith("# @package _global_\n# ")
    assert algorithm.papers[0] in text or algorithm.name == "grpo_token_mean"
    assert algorithm.estimator.advantage is not None or "Relies on verl for" in text


@EVERY
def test_the_dual_clip_is_out_of_reach_wherever_there_is_one(algorithm):
    actor = yaml.safe_load((RECIPES / f"{algorithm.name}.yaml").read_text())["actor_rollout_ref"]
    clips = algorithm.loss.dual_clips or algorithm.loss.name == "vanilla"
    # YAML 1.1 takes 1.0e9 for a text; OmegaConf does not.
    expected = "1.0e9" if clips else "None"
    # No dual clip, the largest ratio that is a weight.
    expected = "10000.0" if algorithm.loss.name == "dppo_tv" else expected
    assert str(actor["actor"].get("clip_ratio_c")) == expected


@EVERY
def test_the_page_of_algorithms_lists_it(algorithm):
    index = (PAGES / "algorithms.md").read_text()
    row = next(line for line in index.splitlines() if line.startswith(f"| `{algorithm.name}` |"))
    assert f"arxiv.org/abs/{algorithm.papers[0]}" in row
    assert f"`{algorithm.estimator.name}`" in row
    assert f"`{algorithm.loss.name}`" in row
    assert f"`{algorithm.loss_agg_mode}`" in row


def test_the_readme_names_families_of_records():
    text = (ROOT / "README.md").read_text().split("## Algorithms")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", text))
    assert named <= set(ALGORITHMS)
    assert {FILES[name] for name in named} >= {"hpo", "mhpo", "verl_own"}


@EVERY
def test_a_record_with_functions_has_a_test_file_of_its_own(algorithm):
    if algorithm.estimator.advantage is not None or algorithm.loss.token_loss is not None:
        assert (Path(__file__).parent / f"test_{FILES[algorithm.name]}.py").is_file()


# ---------------------------------------------------------------- slopes


def token_batch(loss, settings):
    """256 tokens in float64, none at a kink, a fifth of them masked."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = 0.5 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    mask = torch.rand(16, 16, generator=generator) > 0.2
    sign = torch.where(torch.rand(16, 16, generator=generator) > 0.5, 1.0, -1.0).double()
    advantages = sign * (0.5 + torch.rand(16, 16, generator=generator, dtype=torch.float64))
    old = -torch.rand(16, 16, generator=generator, dtype=torch.float64)
    fields = {
        name: (2 * torch.rand(16, 16, generator=generator, dtype=torch.float64) - 1) * mask
        for name in loss.fields
    }
    batch = TokenBatch(log_ratio * mask, advantages * mask, mask, old * mask, (0.2, 0.3), fields)
    if loss.mini_batch_sums is not None:
        total = loss.mini_batch_sums.contributions(batch, settings).tolist()
        fields["mini_batch"] = loss.mini_batch_sums.result(total, settings)
    return batch


def test_file(algorithm):
    """The algorithm's own test file, as a module."""
    path = Path(__file__).parent / f"test_{FILES[algorithm.name]}.py"
    spec = importlib.util.spec_from_file_location(f"objective_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


test_file.__test__ = False


@pytest.mark.parametrize("algorithm", WITH_LOSS, ids=lambda one: one.name)
def test_values_and_slopes_are_those_of_the_equation_by_autograd(algorithm):
    loss = algorithm.loss
    settings = loss.settings() if loss.settings else None
    batch = token_batch(loss, settings)
    log_ratio = batch.log_ratio.clone().requires_grad_()
    values = test_file(algorithm).objective(batch._replace(log_ratio=log_ratio), settings)
    (slopes,) = torch.autograd.grad(values.sum(), log_ratio)
    before = [tensor.clone() for tensor in batch[:4]]
    result = loss.token_loss(batch, settings)
    torch.testing.assert_close(result.values, values.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.slopes, slopes, rtol=1e-9, atol=1e-12)
    assert (result.slopes != 0).any()
    # A token without an advantage adds nothing, and the batch stays as it was.
    assert (result.slopes[batch.advantages == 0] == 0).all()
    for tensor, kept in zip(batch[:4], before, strict=True):
        assert torch.equal(tensor, kept)


@pytest.mark.parametrize("loss", PROPORTIONAL, ids=lambda one: one.name)
@pytest.mark.parametrize("scale", [0.5, 20.0])
def test_t4_a_proportional_loss_is_weighted_by_weighting_the_negative_advantages(loss, scale):
    settings = loss.settings() if loss.settings else None
    batch = token_batch(loss, settings)
    batch = batch._replace(log_ratio=(scale * batch.log_ratio).clamp(-20, 20))
    weight = torch.where(batch.advantages < 0, 0.3, 1.0).double()
    plain = loss.token_loss(batch, settings).scaled(weight)
    weighted = loss.token_loss(batch._replace(advantages=weight * batch.advantages), settings)
    torch.testing.assert_close(weighted, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", OUR_LOSSES.values(), ids=lambda one: one.name)
def test_the_dual_clip_bounds_the_ratio_of_negative_tokens_where_a_loss_has_one(loss):
    settings = loss.settings() if loss.settings else None
    batch = token_batch(loss, settings)
    plain = loss.token_loss(batch, settings)
    result = loss.token_loss(batch._replace(clip_ratio_c=1.4), settings)
    ratio = batch.log_ratio.exp()
    beyond = (batch.advantages < 0) & (ratio > 1.4)
    assert beyond.any()
    if loss.dual_clips:
        values = torch.where(beyond, plain.values * 1.4 / ratio, plain.values)
        plain = plain._replace(values=values, slopes=plain.slopes.masked_fill(beyond, 0.0))
    torch.testing.assert_close(result, plain, rtol=1e-12, atol=0)


# ---------------------------------------------------------------- the records themselves


def test_our_losses_permit_what_their_recipes_set():
    for algorithm in WITH_LOSS:
        assert algorithm.loss_agg_mode in algorithm.loss.aggregations
    assert OUR_LOSSES["hpo"].aggregations == ("token-mean", "seq-mean-token-sum-norm")
    assert OUR_LOSSES["mhpo"].aggregations == ("seq-mean-token-mean", "token-mean")


def test_a_loss_is_proportional_or_says_what_it_does():
    for loss in LOSSES.values():
        assert loss.proportional or loss.caveat
        assert not (loss.proportional and loss.selects)
    assert {n for n, loss in LOSSES.items() if loss.selects} == {
        "bapo",
        "capo",
        "clip_cov",
        "kl_cov",
    }


def test_every_estimator_that_is_not_verls_has_a_section_of_settings():
    for estimator in ESTIMATORS.values():
        assert (estimator.advantage is None) == (not estimator.section)
    by_sign = ["a_hpo", "hpo", "psr", "nsr", "w_reinforce"]
    assert [n for n, one in ESTIMATORS.items() if one.weights_by_sign] == by_sign


@EVERY
def test_settings_default_to_what_the_recipe_sets(algorithm):
    recipe = yaml.safe_load((RECIPES / f"{algorithm.name}.yaml").read_text())
    loss, estimator = algorithm.loss, algorithm.estimator
    section = dict(recipe["actor_rollout_ref"]["actor"]["policy_loss"])
    del section["loss_mode"]
    section.pop("_target_", None)
    if loss.settings is not None:
        assert loss.settings(**section) == loss.settings()
    if estimator.settings is not None:
        assert estimator.settings(**recipe["algorithm"][estimator.section]) == estimator.settings()


# A combination of others' parts takes them from their records.
COMBINES = {"hysteretic_grpo": ["hpo_verl.algorithms.hpo.A_HPO"]}


def test_algorithms_import_no_other_algorithm_but_the_records_that_they_combine():
    folder, combined = ROOT / "hpo_verl" / "algorithms", {}
    for name in MODULES:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            names = [alias.name for alias in getattr(node, "names", ()) if alias.name]
            module = getattr(node, "module", None) or ""
            imported = [f"{module}.{one}" if module else one for one in names]
            ours = [one for one in imported if one.startswith("hpo_verl.algorithms")]
            others = [one for one in ours if not one.startswith("hpo_verl.algorithms.base")]
            if others:
                combined.setdefault(name, []).extend(others)
    assert combined == COMBINES


# The project's own name, and what is verl's, which others build on.
COMMON = {"hpo", "grpo", "vanilla", "gpg", "gspo"}


def words_of_code(path):
    """Identifiers and words of strings, docstrings left out."""
    tree = ast.parse(path.read_text())
    texts = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield from re.findall(r"\w+", node.value)
        elif isinstance(node, ast.Name | ast.Attribute | ast.alias | ast.keyword):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            name = name or getattr(node, "name", None) or getattr(node, "arg", None) or ""
            yield from re.findall(r"\w+", name)


def test_no_other_file_names_a_single_algorithm():
    names = {}
    for algorithm in ALGORITHMS.values():
        own = (algorithm.name, algorithm.estimator.name, algorithm.loss.name)
        for name in {*own, FILES[algorithm.name]} - COMMON:
            names.setdefault(name, set()).add(FILES[algorithm.name])
    found = {}
    for path in sorted((ROOT / "hpo_verl").rglob("*.py")):
        # The list of files; and the examples of the lab's command.
        if path.name in ("registry.py", "lab_cli.py"):
            continue
        own = path.stem if path.parent.name == "algorithms" else None
        words = {word for word in words_of_code(path) if own not in names.get(word, {own})}
        if words:
            found[str(path.relative_to(ROOT))] = words
    assert found == {}


# ---------------------------------------------------------------- entry points


class Point:
    name, value = "mine", "mine:ALGORITHM"

    def __init__(self, found):
        self.found = found

    def load(self):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (ModuleNotFoundError("No module named 'mine'"), "ModuleNotFoundError: No module named"),
        (3, "TypeError: 3 is no Algorithm"),
        (base, "AttributeError: .*has no attribute 'ALGORITHMS'"),
    ],
)
def test_a_broken_entry_point_is_named(monkeypatch, found, message):
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point(found)])
    expected = rf"^entry point 'mine' = 'mine:ALGORITHM' of hpo_verl\.algorithms: {message}"
    with pytest.raises(EnvironmentCheckError, match=expected):
        registry._collect()


@pytest.mark.parametrize(
    "record",
    [
        Algorithm("hpo", (), "", "token-mean"),
        Algorithm("mine", (), "", "token-mean", loss=Loss("hpo")),
        Algorithm("mine", (), "", "token-mean", loss=Loss("geo_mean")),
        Algorithm("mine", (), "", "token-mean", estimator=Estimator("spo")),
    ],
)
def test_a_name_that_is_taken_is_refused(monkeypatch, record):
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point(record)])
    with pytest.raises(EnvironmentCheckError, match=r"^entry point 'mine'.* is already there"):
        registry._collect()


# ---------------------------------------------------------------- the page on other systems


def test_the_page_on_other_systems_says_of_each_which_hook_it_needs():
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in (PAGES / "other-systems.md").read_text().splitlines()
        if "arxiv.org" in line
    ]
    papers = {paper[1:11] for _, paper, _, _ in rows}
    assert papers == {"2407.00617"}
    assert all(official.startswith(("yes", "no", "partly: ")) for *_, official in rows)
    assert "(other-systems.md)" in (PAGES / "algorithms.md").read_text()
