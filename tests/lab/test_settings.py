"""Studies: what the files say, and what is refused."""

import pytest
import torch

from hpo_verl.algorithms import catalog
from hpo_verl.algorithms.catalog import ALGORITHMS
from hpo_verl.algorithms.spo import SPOSettings
from hpo_verl.errors import ConfigError, DataError
from hpo_verl.lab import objective as objective_module
from hpo_verl.lab.estimators import Batch
from hpo_verl.lab.objective import read_objective
from hpo_verl.lab.settings import Study, Variant, read_study, study_names, with_variants

ACTOR = "actor_rollout_ref.actor"


def test_the_five_studies_exist_and_hold_what_the_specification_asks_for():
    assert study_names() == ["alpha", "length", "lr", "sparse", "telelogs"]
    sparse = read_study("sparse")
    assert sparse.tasks == ["countdown3", "countdown4"]
    assert sparse.warm_starts == [0.02, 0.05, 0.1, 0.3]
    assert sparse.seeds >= 10
    names = {variant.algorithm for variant in sparse.variants.values()}
    assert names == set(ALGORITHMS)
    alpha = read_study("alpha").variants
    fixed = [v.settings["algorithm.hpo.alpha"] for v in alpha.values() if v.algorithm == "hpo"]
    assert fixed == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    choices = {v.settings.get("algorithm.hpo.zero_advantage") for v in alpha.values()}
    assert "negative" in choices
    lr = read_study("lr")
    assert len(lr.learning_rates) >= 3
    assert set(lr.variants) == {
        "a_hpo", "hpo", "grpo", "grpo_token_mean", "gspo", "sapo", "mhpo", "dr_grpo", "dapo",
    }  # fmt: skip


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


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_of_the_catalogue_is_read_from_its_recipe(name):
    assert read_objective(name, 24).loss_agg_mode == ALGORITHMS[name].loss_agg_mode


def test_some_variants_may_be_chosen():
    study = read_study("sparse")
    chosen = with_variants(study, ["grpo", "a_hpo"])
    assert list(chosen.variants) == ["a_hpo", "grpo"]
    assert {cell.name for cell in chosen.cells()} < {cell.name for cell in study.cells()}
    assert with_variants(study, []) == study
    with pytest.raises(ConfigError, match=r"--only a_hop: no variant of study sparse.*a_hpo"):
        with_variants(study, ["a_hop"])


def alpha_of(name, changes=None):
    """A group with one success in four: A-HPO's alpha is 1/3 where its lower bound permits."""
    rewards, codes = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    batch = Batch(rewards, codes, mask, torch.ones(4, 2))
    return read_objective(name, 24, changes).estimate(batch).responses.alpha


def test_the_recipes_settings_arrive():
    assert alpha_of("a_hpo") == pytest.approx(1 / 3)
    assert alpha_of("a_hpo", {"algorithm.hpo.alpha_min": 0.5}) == 0.5
    assert alpha_of("hpo") == 0.6
    assert alpha_of("hpo", {"algorithm.hpo.alpha": 0.2}) == 0.2
    assert alpha_of("grpo") == 1.0
    assert read_objective("dapo", 24).filter_groups
    assert read_objective("dr_grpo", 24).loss_scale_factor == 24
    assert read_objective("spo", 24).single_stream == SPOSettings()
    assert read_objective("grpo", 24).single_stream is None


def test_dr_grpo_does_not_divide_by_the_deviation():
    batch = Batch(
        torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.int64),
        torch.ones(4, 1, dtype=torch.bool), torch.ones(4, 1),
    )  # fmt: skip
    advantages = read_objective("dr_grpo", 24).estimate(batch).advantages
    torch.testing.assert_close(advantages.flatten(), torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_hapo_reads_the_entropies_of_the_whole_batch():
    objective = read_objective("hapo", 24, {f"{ACTOR}.policy_loss.entropy_pivot": 0.5})
    mask = torch.ones(1, 3, dtype=torch.bool)
    deviation = objective.deviation(torch.tensor([[0.5, 1.0, 2.0]]), mask)
    torch.testing.assert_close(deviation, torch.tensor([[-1.0, 0.0, 1.0]]))
    assert read_objective("grpo", 24).deviation is None


def test_a_single_stream_needs_as_many_questions_as_responses():
    study = ["tasks=[countdown3]", "warm_starts=[0.05]", "training.questions=511"]
    with pytest.raises(ConfigError, match=r"training\.questions = 511: spo .* at least 512"):
        read_study("sparse", study)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("hpo", {"algorithm.hpo.alfa": 0.2}, "did you mean algorithm.hpo.alpha"),
        ("grpo", {"algorithm.hpo.alpha": 0.2}, "setting 'algorithm.hpo.alpha' of grpo"),
        ("hpo", {"algorithm.hpo.alpha": 2.0}, "algorithm.hpo.alpha = 2.0"),
        ("hpo", {f"{ACTOR}.loss_agg_mode": "mean"}, "must be one of token-mean"),
        ("hpo", {f"{ACTOR}.clip_ratio_low": 2.0}, "clip_ratio_low = 2.0"),
        ("grpo", {f"{ACTOR}.clip_ratio_c": 1.0}, "clip_ratio_c = 1.0"),
        ("hapo", {"algorithm.hapo.advantage_limit": 0.0}, "advantage_limit = 0.0"),
        ("hapo", {f"{ACTOR}.policy_loss.adv_beta": 2.0}, "adv_beta = 2.0"),
        ("bapo", {f"{ACTOR}.policy_loss.positive_share": 2.0}, "positive_share = 2.0"),
        ("d3s", {"algorithm.d3s.token_share_end": 0.0}, "token_share_end = 0.0"),
        ("spo", {"algorithm.spo.rho_min": 1.0}, "rho_min = 1.0"),
        ("aepo_advantage", {"algorithm.aepo_advantage.entropy_scale": -1.0}, "entropy_scale"),
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
    return log_prob, old, advantages[:, None] * mask, mask


def gradient_of(objective, log_prob, old, advantages, mask, rows=None):
    chosen = torch.arange(len(mask)) if rows is None else torch.tensor(rows)
    leaf = log_prob.clone().requires_grad_()
    deviation = None
    if objective.deviation:
        entropy = torch.linspace(0.1, 2.0, mask.numel()).view_as(mask)
        deviation = objective.deviation(entropy, mask)[chosen]
    loss, sums = objective.loss(
        leaf[chosen], old[chosen], advantages[chosen], mask[chosen],
        objective.weights(mask)[chosen], deviation,
    )  # fmt: skip
    loss.backward()
    return loss.item(), leaf.grad, sums


@pytest.mark.parametrize("name", ALGORITHMS)
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
    torch.testing.assert_close(spoilt[1], expected[1], rtol=0, atol=0)


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
