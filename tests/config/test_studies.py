"""Files of studies: how they are composed, and the regimes that they cross."""

import pytest

from hpo_verl.config.recipes import recipes_directory, require_study, study_names
from hpo_verl.config.studies import CROSSED, read_study_file, regime_of, regimes
from hpo_verl.errors import ConfigError


def study_of(**changes):
    """The keys that a study crosses, one value each, with changes."""
    scalars = {"task": "a", "warm_start": 0.1, "lacking": "use", "wrong_length": None}
    values = {**scalars, "max_response_length": None, "training": {"steps": 5, "lag": 0}}
    return values | changes


def test_the_first_key_varies_slowest():
    study = study_of(task=["a", "b"], warm_start=[0.1, 0.3], training={"steps": 5, "lag": [0, 2]})
    found = [(r["task"], r["warm_start"], r["training.lag"]) for r in regimes(study)]
    assert found == [
        ("a", 0.1, 0), ("a", 0.1, 2), ("a", 0.3, 0), ("a", 0.3, 2),
        ("b", 0.1, 0), ("b", 0.1, 2), ("b", 0.3, 0), ("b", 0.3, 2),
    ]  # fmt: skip
    assert all(regime["training.steps"] == 5 for regime in regimes(study))
    assert [*regimes(study)[0]] == [*CROSSED, "training.steps", "training.lag"]


def test_one_value_is_a_list_of_one():
    (regime,) = regimes(study_of())
    assert regimes(study_of(task=["a"], wrong_length=[None])) == [regime]
    assert regime_of(study_of()) == regime
    # Nothing is a value as any other.
    lengths = [regime["wrong_length"] for regime in regimes(study_of(wrong_length=[None, 2]))]
    assert lengths == [None, 2]


@pytest.mark.parametrize(
    ("changes", "key"), [({"task": []}, "task"), ({"training": {"lag": []}}, "training.lag")]
)
def test_an_empty_list_is_refused(changes, key):
    with pytest.raises(ConfigError, match=rf"^{key} = \[\]: must hold one value at least$"):
        regimes(study_of(**changes))


@pytest.mark.parametrize("name", study_names())
def test_every_file_is_composed_of_the_shared_keys_and_crosses_what_it_lists(name):
    base, values = read_study_file("rates"), read_study_file(name)
    assert set(values) == set(base)
    assert set(values["training"]) == set(base["training"])
    expected = 1
    for value in [*(values[key] for key in CROSSED), *values["training"].values()]:
        expected *= len(value) if isinstance(value, list) else 1
    found = regimes(values)
    assert len(found) == expected
    assert len({tuple(regime.items()) for regime in found}) == expected


def test_what_all_studies_share_is_no_study():
    assert "base" not in study_names()
    assert (recipes_directory() / "lab" / "base.yaml").is_file()
    with pytest.raises(ConfigError, match="unknown study 'base'"):
        require_study("base")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=3", "unknown setting 'sede' in 'sede=3': did you mean seeds"),
        ("training.stpes=3", "did you mean training.steps"),
        ("~seeds", "study rates: the setting seeds is missing"),
        ("~training.lag", "study rates: the setting training.lag is missing"),
        ("training=null", "the setting training.epochs is missing"),
        ("training.steps", "study rates: missing EQUAL"),
        ("task=${nothing}", "study rates: "),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(override, message):
    with pytest.raises(ConfigError) as caught:
        read_study_file("rates", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_takes_one_value_or_a_list():
    assert read_study_file("rates", ["warm_start=[0.1,0.2]"])["warm_start"] == [0.1, 0.2]
    assert read_study_file("rates", ["training.learning_rate=1"])["training"]["learning_rate"] == 1
    # A variant may be left out, or be added.
    without = read_study_file("rates", ["~variants.grpo", "+variants.mine.algorithm=gspo"])
    assert "grpo" not in without["variants"]
    assert without["variants"]["mine"] == {"algorithm": "gspo"}
