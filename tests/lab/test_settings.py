"""Studies: what the files say, and what is refused."""

import pytest
import torch

from hpo_verl.algorithms import catalog
from hpo_verl.algorithms.catalog import ALGORITHMS
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.lab import objective as objective_module
from hpo_verl.lab.objective import read_objective
from hpo_verl.lab.settings import Study, Variant, read_study, study_names

ACTOR = "actor_rollout_ref.actor"


def test_the_five_studies_exist_and_hold_what_the_specification_asks_for():
    assert study_names() == ["alpha", "length", "lr", "sparse", "telelogs"]
    sparse = read_study("sparse")
    assert sparse.tasks == ["countdown3", "countdown4"]
    assert sparse.warm_starts == [0.02, 0.05, 0.1, 0.3]
    assert sparse.seeds >= 10
    names = {variant.algorithm for variant in sparse.variants.values()}
    assert names == {
        "a_hpo", "hpo", "grpo", "grpo_token_mean", "gspo", "sapo", "mhpo", "dr_grpo", "dapo",
    }  # fmt: skip
    alpha = read_study("alpha").variants
    fixed = [v.settings["algorithm.hpo.alpha"] for v in alpha.values() if v.algorithm == "hpo"]
    assert fixed == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    choices = {v.settings.get("algorithm.hpo.zero_advantage") for v in alpha.values()}
    assert "negative" in choices
    lr = read_study("lr")
    assert len(lr.learning_rates) >= 3
    assert set(lr.variants) == set(sparse.variants)


@pytest.mark.parametrize("name", study_names())
def test_ratios_matter_and_seeds_are_paired_in_every_study(name):
    study = read_study(name)
    assert study.training.mini_batches > 1
    cells = study.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    first = cells[: len(cells) // study.seeds]
    assert {cell.seed for cell in first} == {study.first_seed}
    # All variants of a seed begin with the same policy and questions.
    starts = {(cell.task, cell.warm_start): cell.start.folder for cell in first}
    assert all(cell.start.folder == starts[cell.task, cell.warm_start] for cell in first)


def test_a_cell_keeps_its_name_when_others_are_added_and_changes_it_with_its_settings():
    def names(*overrides):
        return {cell.name for cell in read_study("sparse", overrides).cells()}

    assert names("seeds=2") < names("seeds=3")
    assert names("warm_starts=[0.05]") < names()
    assert not names("training.steps=7") & names()
    assert not names("variants.hpo.algorithm=mhpo") & {n for n in names() if "-hpo-" in n}


@pytest.mark.parametrize(
    ("study", "override", "message"),
    [
        ("sparce", None, "unknown study 'sparce': did you mean sparse"),
        ("base", None, "unknown study 'base'"),
        ("sparse", "sede=3", "unknown setting 'sede' in 'sede=3': did you mean seeds"),
        ("sparse", "training.stpes=3", "did you mean training.steps"),
        ("sparse", "+training.warmup=3", "training.warmup = 3: unknown setting"),
        ("sparse", "seeds=0", "seeds = 0: must be an integer of at least 1"),
        ("sparse", "seeds=many", "seeds = 'many'"),
        ("sparse", "training.steps=1.5", "training.steps = 1.5"),
        ("sparse", "training.learning_rate=0", "training.learning_rate = 0"),
        ("sparse", "training.responses_per_prompt=1", "training.responses_per_prompt = 1"),
        ("sparse", "training.mini_batches=3", "must divide training.prompts_per_step = 64"),
        ("sparse", "training.questions=10", "must be at least training.prompts_per_step"),
        ("sparse", "evaluation.every=0", "evaluation.every = 0"),
        ("sparse", "tasks=[countdown5]", "unknown task 'countdown5': did you mean countdown"),
        ("sparse", "tasks=[]", "tasks is empty"),
        ("sparse", "warm_starts=[1.5]", "warm_starts = 1.5"),
        ("lr", "learning_rates=[0]", "learning_rates = 0"),
        ("sparse", "variants.hpo.algorithm=hpoo", "unknown algorithm 'hpoo': did you mean hpo"),
        ("sparse", "training.steps", "override 'training.steps'"),
    ],
)
def test_what_is_wrong_is_refused_with_the_nearest_name(study, override, message):
    with pytest.raises(ConfigError) as caught:
        read_study(study, [override] if override else [])
    assert message in str(caught.value)


def test_a_variants_name_must_be_fit_for_a_file():
    with pytest.raises(ConfigError, match="fit for a file"):
        Study("x", "", ["countdown3"], [0.1], variants={"a/b": Variant("grpo")})


COMPARED = ("a_hpo", "hpo", "mhpo", "grpo", "grpo_token_mean", "dr_grpo", "dapo", "gspo", "sapo")


def refusal(name):
    try:
        read_objective(name, 24)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", COMPARED)
def test_an_algorithm_is_read_from_its_recipe(name):
    assert refusal(name) is None
    assert read_objective(name, 24).loss_agg_mode == ALGORITHMS[name].loss_agg_mode


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - set(COMPARED)))
def test_another_algorithm_works_or_is_refused_by_name(name):
    """Those that work are held to verl's gradient by the contract test."""
    message = refusal(name)
    assert message is None or (repr(name) in message and "the lab does not" in message)


def test_the_recipes_settings_arrive():
    assert read_objective("a_hpo", 24).hysteresis.alpha_min == 0.1
    assert read_objective("hpo", 24).hysteresis.alpha == 0.6
    assert read_objective("grpo", 24).hysteresis.alpha == 1.0
    assert read_objective("dapo", 24).filter_groups
    dr_grpo = read_objective("dr_grpo", 24)
    assert (dr_grpo.normalize_by_std, dr_grpo.loss_scale_factor) == (False, 24)
    changed = read_objective("hpo", 24, {"algorithm.hpo.alpha": 0.2})
    assert changed.hysteresis.alpha == 0.2


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hpo", {"algorithm.hpo.alfa": 0.2}, "did you mean algorithm.hpo.alpha"),
        ("grpo", {"algorithm.hpo.alpha": 0.2}, "setting 'algorithm.hpo.alpha' of grpo"),
        ("hpo", {"algorithm.hpo.alpha": 2.0}, "algorithm.hpo.alpha = 2.0"),
        ("hpo", {f"{ACTOR}.loss_agg_mode": "mean"}, "must be one of token-mean"),
        ("hpo", {f"{ACTOR}.clip_ratio_low": 2.0}, "clip_ratio_low = 2.0"),
        ("grpo", {f"{ACTOR}.clip_ratio_c": 3.0}, "clip_ratio_c = 3.0"),
        ("sapo", {f"{ACTOR}.tau_neg": 0.0}, "tau_neg = 0.0"),
        ("hpo", {f"{ACTOR}.loss_scale_factor": 0}, "loss_scale_factor = 0"),
        ("hpo", {f"{ACTOR}.policy_loss.loss_mode": "dro"}, "does not know its loss 'dro' yet"),
        ("hpo", {"algorithm.adv_estimator": "rloo"}, "does not know its estimator 'rloo' yet"),
    ],
)
def test_settings_of_an_algorithm_are_checked(name, changes, message):
    with pytest.raises(ConfigError) as caught:
        read_objective(name, 24, changes)
    assert message in str(caught.value)


def test_a_recipe_with_a_setting_that_the_lab_does_not_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "algo").mkdir()
    (tmp_path / "algo" / "new.yaml").write_text(
        "algorithm: {adv_estimator: grpo}\n"
        "actor_rollout_ref: {actor: {entropy_coeff: 0.1, loss_agg_mode: token-mean, "
        "clip_ratio_low: 0.2, clip_ratio_high: 0.2, policy_loss: {loss_mode: vanilla}}}\n"
    )
    entry = ALGORITHMS["grpo"]._replace(name="new")
    monkeypatch.setitem(catalog.ALGORITHMS, "new", entry)
    monkeypatch.setattr(objective_module, "recipes_directory", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"sets actor_rollout_ref\.actor\.entropy_coeff, which"):
        read_objective("new", 24)


def batch(rows=6, width=5):
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, width, generator=generator)
    log_prob = old + 0.2 * torch.randn(rows, width, generator=generator)
    mask = torch.arange(width) < torch.randint(1, width + 1, (rows, 1), generator=generator)
    advantages = torch.tensor([1.0, -0.5, 0.0, 0.0, 2.0, -1.0])
    return log_prob, old, advantages, mask


def gradient_of(objective, log_prob, old, advantages, mask, rows=None):
    chosen = torch.arange(len(mask)) if rows is None else torch.tensor(rows)
    leaf = log_prob.clone().requires_grad_()
    loss, sums = objective.loss(
        leaf[chosen], old[chosen], advantages[chosen], mask[chosen], objective.weights(mask)[chosen]
    )
    loss.backward()
    return loss.item(), leaf.grad, sums


@pytest.mark.parametrize("name", ["a_hpo", "mhpo", "grpo", "dr_grpo", "gspo", "sapo"])
def test_rows_without_advantage_may_be_left_out_and_masked_values_mean_nothing(name):
    objective = read_objective(name, 5)
    log_prob, old, advantages, mask = batch()
    expected = gradient_of(objective, log_prob, old, advantages, mask)
    found = gradient_of(objective, log_prob, old, advantages, mask, rows=[0, 1, 4, 5])
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    torch.testing.assert_close(found[1], expected[1])
    assert found[2] == pytest.approx(expected[2])
    spoilt = gradient_of(
        objective, log_prob.masked_fill(~mask, torch.nan), old.masked_fill(~mask, torch.inf),
        advantages, mask,
    )  # fmt: skip
    assert spoilt[0] == expected[0]
    assert torch.equal(spoilt[1], expected[1])


def test_a_live_value_that_is_not_finite_is_refused():
    log_prob, old, advantages, mask = batch()
    log_prob[0, 0] = torch.nan
    with pytest.raises(DataError, match="log_ratio"):
        gradient_of(read_objective("grpo", 5), log_prob, old, advantages, mask)


def test_the_gradient_stops_beyond_the_bound_of_the_log_ratio():
    log_prob, old, advantages, mask = batch()
    objective = read_objective("hpo", 5)
    for distance, stopped in ((19.0, False), (25.0, True)):
        old[1, 0] = log_prob[1, 0] - distance
        _, gradient, _ = gradient_of(objective, log_prob, old, advantages, mask)
        assert bool(gradient[1, 0] == 0) == stopped
