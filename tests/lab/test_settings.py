"""Studies: what the files say, and what is refused."""

import dataclasses

import pytest

from hpo_verl.algorithms.registry import ALGORITHMS
from hpo_verl.config.recipes import study_names
from hpo_verl.errors import ConfigError
from hpo_verl.lab.settings import Variant, read_study
from hpo_verl.lab.warm_start import policy_folder


def test_the_five_studies_exist_and_hold_what_the_specification_asks_for():
    assert study_names() == ["alpha", "length", "lr", "sparse", "telelogs"]
    sparse = read_study("sparse")
    assert sparse.tasks == ["countdown3", "countdown4"]
    assert sparse.warm_starts == [0.02, 0.05, 0.1, 0.3]
    assert sparse.seeds >= 10
    names = {variant.algorithm for variant in sparse.variants.values()}
    assert names == {name for name, one in ALGORITHMS.items() if one.loss.head_fields is None}
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
    starts = {(cell.task, cell.warm_start): policy_folder(cell) for cell in first}
    assert all(policy_folder(cell) == starts[cell.task, cell.warm_start] for cell in first)


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
        ("sparse", "~seeds", "study sparse: the setting seeds is missing"),
        ("sparse", "training=null", "the setting training.learning_rate is missing"),
        ("sparse", "~variants.hpo.algorithm", "unknown algorithm ''"),
        ("sparse", "seeds=0", "seeds = 0: must be an integer of at least 1"),
        ("sparse", "seeds=many", "seeds = 'many'"),
        ("sparse", "training.steps=1.5", "training.steps = 1.5"),
        ("sparse", "training.learning_rate=0", "training.learning_rate = 0"),
        ("sparse", "training.responses_per_prompt=1", "training.responses_per_prompt = 1"),
        ("sparse", "training.mini_batches=3", "must divide training.prompts_per_step = 64"),
        (
            "sparse",
            "training.questions=10",
            "training.questions = 10: must be an integer of at least 64",
        ),
        ("sparse", "evaluation.every=0", "evaluation.every = 0"),
        ("sparse", "tasks=[countdown5]", "unknown task 'countdown5': did you mean countdown"),
        ("sparse", "tasks=[]", "tasks is empty"),
        ("sparse", "variants=null", "variants is empty"),
        ("sparse", "warm_starts=[1.5]", "warm_starts = 1.5"),
        ("lr", "learning_rates=[0]", "learning_rates = 0"),
        ("sparse", "variants.hpo.algorithm=hpoo", "unknown algorithm 'hpoo': did you mean hpo"),
        ("sparse", "training.steps", "study sparse: missing EQUAL"),
    ],
)
def test_what_is_wrong_is_refused_with_the_nearest_name(study, override, message):
    with pytest.raises(ConfigError) as caught:
        read_study(study, [override] if override else [])
    assert message in str(caught.value)


def test_a_variants_name_must_be_fit_for_a_file():
    with pytest.raises(ConfigError, match="fit for a file"):
        dataclasses.replace(read_study("alpha"), variants={"a/b": Variant("grpo")})


def test_some_variants_may_be_chosen():
    study = read_study("sparse")
    chosen = read_study("sparse", only=["grpo", "a_hpo"])
    assert list(chosen.variants) == ["a_hpo", "grpo"]
    assert {cell.name for cell in chosen.cells()} < {cell.name for cell in study.cells()}
    with pytest.raises(ConfigError, match=r"--only a_hop: no variant of study sparse.*a_hpo"):
        read_study("sparse", only=["a_hop"])


def test_a_study_may_begin_with_a_policy_of_its_own(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    cell = read_study("alpha", [f"policy={tmp_path}"]).cells()[0]
    assert cell.policy == str(tmp_path)
    folder = policy_folder(cell)
    assert folder != policy_folder(read_study("alpha").cells()[0])
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert policy_folder(cell) != folder


def test_a_history_of_prompts_needs_as_many_questions_as_responses():
    study = ["tasks=[countdown3]", "warm_starts=[0.05]", "training.questions=511"]
    with pytest.raises(ConfigError, match=r"training\.questions = 511: spo .* at least 512"):
        read_study("sparse", study)
