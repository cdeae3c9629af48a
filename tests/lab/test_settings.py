"""Studies: what the files say, and what is refused."""

import dataclasses
import json

import pytest
from lab_policies import IN_LAB

from hpo_verl.config.recipes import study_names
from hpo_verl.config.studies import read_study_file, regime_of, regimes
from hpo_verl.errors import ConfigError
from hpo_verl.lab.settings import Variant, read_study
from hpo_verl.lab.warm_start import policy_folder


def test_the_studies_exist_and_hold_what_their_names_say():
    assert study_names() == [
        "budget", "lag", "length", "negatives", "neighbours", "rates", "skill", "sparsity",
        "staleness", "tasks", "tuned",
    ]  # fmt: skip
    everything = read_study_file("neighbours")["variants"]
    assert {variant["algorithm"] for variant in everything.values()} == set(IN_LAB)
    negatives = read_study_file("negatives")["variants"].values()
    fixed = [v["settings"]["algorithm.hpo.alpha"] for v in negatives if v["algorithm"] == "hpo"]
    assert fixed == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    crossed = [("sparsity", "warm_start"), ("length", "wrong_length"), ("tasks", "task")]
    crossed += [("budget", "max_response_length"), ("lag", "training.lag")]
    crossed += [("staleness", "training.epochs"), ("rates", "training.learning_rate")]
    for name, key in crossed:
        assert len({regime[key] for regime in regimes(read_study_file(name))}) >= 2, name


# One of them holds every algorithm, which test_objective.py reads too.
STUDIES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "neighbours" else name
    for name in study_names()
]


@pytest.mark.parametrize("name", STUDIES)
def test_seeds_are_paired_and_every_cell_differs_in_every_study(name):
    study = read_study(name)
    cells = study.cells()
    assert study.baseline in study.variants
    assert study.seeds >= 10
    assert len({cell.name for cell in cells}) == len(cells)
    first = cells[: len(cells) // (study.tuning_seeds or study.seeds)]
    assert {cell.seed for cell in first} == {study.first_seed}
    assert {cell.seed for cell in cells[len(first) : 2 * len(first)]} == {study.first_seed + 1}
    # All variants of a regime begin with the same policy and questions.
    begins = {}
    for cell in first:
        regime = json.dumps(regime_of(dataclasses.asdict(cell)))
        assert begins.setdefault(regime, policy_folder(cell)) == policy_folder(cell)
    assert len(begins) == len(study.regimes)


def test_the_regime_of_a_cell_is_the_one_that_it_came_from():
    study = read_study("staleness", ["warm_start=[0.01,0.05]", "wrong_length=[null,2]"])
    cells = study.cells()[: len(study.regimes) * len(study.variants)]
    found = [regime_of(dataclasses.asdict(cell)) for cell in cells]
    assert found == [regime for regime in study.regimes for _ in study.variants]


def test_a_cell_keeps_its_name_when_others_are_added_and_changes_it_with_its_settings():
    def names(*overrides):
        return {cell.name for cell in read_study("sparsity", overrides).cells()}

    assert names("seeds=2") < names("seeds=3")
    assert names("warm_start=0.05") < names()
    assert names("wrong_length=4") == names("wrong_length=4.0") < names()
    for change in ("training.steps=7", "evaluation.every=2", "training.lag=1", "lacking=skill"):
        changes = [change, "wrong_length=null"]
        assert not names(*changes) & names(), change
    changed = names("variants.a_hpo.algorithm=mhpo")
    assert {n for n in names() if "-a_hpo-" not in n} < changed
    assert not {n for n in changed if "-a_hpo-" in n} & names()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+training.warmup=3"], "training.warmup = 3: unknown setting"),
        (["~variants.grpo.algorithm"], "unknown algorithm ''"),
        (["seeds=0"], "seeds = 0: must be an integer of at least 1"),
        (["seeds=many"], "seeds = 'many'"),
        (["tuning_seeds=-1"], "tuning_seeds = -1"),
        (["training.steps=1.5"], "training.steps = 1.5"),
        (["training.epochs=0"], "training.epochs = 0"),
        (["training.lag=[0,-1]"], "training.lag = -1"),
        (["training.learning_rate=[1e-3,0]"], "training.learning_rate = 0"),
        (["training.responses_per_prompt=1"], "training.responses_per_prompt = 1"),
        (["training.mini_batches=[4,3]"], "must divide training.prompts_per_step = 64"),
        (["training.questions=10"], "training.questions = 10: must be an integer of at least 64"),
        (["evaluation.every=0"], "evaluation.every = 0"),
        (["evaluation.samples=-1"], "evaluation.samples = -1"),
        (["evaluation.questions=100"], "evaluation.sampled_questions = 128: must be at most"),
        (["evaluation.dissect_every=0.5"], "evaluation.dissect_every = 0.5"),
        (["task=countdown5"], "unknown task 'countdown5': did you mean countdown"),
        (["task=[]"], "task = []: must hold one value at least"),
        (["variants=null"], "variants is empty"),
        (["warm_start=[0.1,1.5]"], "warm_start = 1.5"),
        (["warm_start=0"], "warm_start = 0"),
        (["wrong_length=0"], "wrong_length = 0"),
        (["max_response_length=1"], "max_response_length = 1"),
        (["lacking=knowledge"], "lacking = 'knowledge'"),
        (["lacking=skill", "wrong_length=2"], "wrong_length = 2: must be null with lacking"),
        (["lacking=skill", "policy=/x"], "policy = '/x': must be null with lacking"),
        (["variants.grpo.algorithm=hpoo"], "unknown algorithm 'hpoo': did you mean hpo"),
    ],
)
def test_what_is_wrong_is_refused_with_what_is_permitted(overrides, message):
    with pytest.raises(ConfigError) as caught:
        read_study("rates", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["bapo", "clip_cov", "kl_cov", "epo", "ares"])
def test_a_loss_that_is_no_sum_over_responses_is_not_dissected(name):
    read_study("neighbours", only=[name])
    message = rf"^variants\.{name}: .* evaluation\.dissect_every .*must be 0 for it$"
    with pytest.raises(ConfigError, match=message):
        read_study("neighbours", ["evaluation.dissect_every=1"], only=[name])


def test_a_variants_name_must_be_fit_for_a_file():
    with pytest.raises(ConfigError, match="fit for a file"):
        dataclasses.replace(read_study("rates"), variants={"a/b": Variant("grpo")})


def test_some_variants_may_be_chosen():
    study = read_study("rates")
    chosen = read_study("rates", only=["grpo", "a_hpo"])
    assert list(chosen.variants) == ["grpo", "a_hpo"]
    assert {cell.name for cell in chosen.cells()} < {cell.name for cell in study.cells()}
    with pytest.raises(ConfigError, match=r"--only a_hop: no variant of study rates.*a_hpo"):
        read_study("rates", only=["a_hop"])


def test_a_history_of_prompts_needs_as_many_questions_as_responses():
    with pytest.raises(ConfigError, match=r"training\.questions = 511: spo .* at least 512"):
        read_study("neighbours", ["training.questions=511"], only=["spo"])
