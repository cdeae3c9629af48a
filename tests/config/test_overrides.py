"""Arguments of the command line become overrides that Hydra reads as they were meant."""

import shlex
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpo_verl.config.overrides import (
    RUN_FOLDER_KEY,
    names_run_folder,
    nearest,
    setting,
    without_run_folder,
)
from hpo_verl.config.recipes import compose_recipe, read_overrides, run_folder
from hpo_verl.errors import ConfigError

ODD_LETTERS = "&('!=,{#ü;[\"~`]$%*|<:@漢? "


def composed(*overrides):
    return compose_recipe("countdown-tiny", overrides)


@pytest.mark.parametrize("letter", list(ODD_LETTERS))
def test_a_path_may_hold_any_letter(letter):
    path = f"/runs/{letter}x{letter}y"
    config = composed(f"{RUN_FOLDER_KEY}={path}", f"data.train_files={path}")
    assert (run_folder(config), config.data.train_files) == (Path(path), path)
    # What the launcher gives to its child, and prints for the user to paste.
    passed_on = setting(RUN_FOLDER_KEY, path)
    assert run_folder(composed(passed_on)) == Path(path)
    assert shlex.split(shlex.join([passed_on])) == [passed_on]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], min_codepoint=32), min_size=1))
@example("\\${a}")
@example("tail\\")
@example("a\\'b")
@example("null")
@example("1e3")
def test_a_text_is_read_back_as_it_was(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    value = OverridesParser.create().parse_override(setting("key", text)).value()
    assert OmegaConf.create({"key": str(value)}).key == text


def test_what_hydra_reads_as_it_is_stays_readable():
    assert setting("a.b", "/runs/mine") == "a.b=/runs/mine"


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["hydra.run.dir=x-${trainer.experiment_name}"], "x-countdown-tiny"),
        (["hydra.run.dir=x-${seed}", "seed=3"], "x-3"),
        (["hydra.run.dir=lr\\=2"], "lr=2"),
        (["hydra.run.dir=a\\,b"], "a,b"),
        (["hydra.run.dir='it\\'s'"], "it's"),
        (["hydra.run.dir=true"], "True"),
        (["hydra.run.dir=a", "hydra.run.dir=b"], "b"),
        (["hydra.run={dir:zz}"], "zz"),
        (["trainer.experiment_name='a[b]'", "hydra.run.dir=${trainer.experiment_name}"], "a[b]"),
    ],
)
def test_the_folder_is_the_one_that_hydra_resolves(overrides, folder):
    assert run_folder(composed(*overrides)) == Path(folder).absolute()


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert run_folder(composed("hydra.run.dir=~/r")) == Path("/home/someone/r")
    assert run_folder(composed("hydra.run.dir='~/r'")) == Path("/home/someone/r")


def test_without_a_name_the_folder_is_of_the_experiment_and_the_time():
    folder = run_folder(composed("trainer.experiment_name='x[1]'"))
    assert folder.parent == Path("runs/x[1]").absolute()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.run.dir=", "hydra.run.dir=: must name a folder"),
        ("hydra.run.dir=${nope}", "hydra.run.dir: Interpolation key 'nope' not found"),
        ("hydra.run.dir='a\\${b}'", "must name a folder, without"),
        ("hydra.run.dir=null", "hydra.run.dir=null"),
    ],
)
def test_a_folder_without_a_usable_name_is_refused(override, message):
    with pytest.raises(ConfigError, match=message.replace("$", "\\$").replace("{", "\\{")):
        run_folder(composed(override))


def test_overrides_that_say_where_the_run_is():
    assert names_run_folder(["seed=1", "++hydra.run.dir=a"])
    assert names_run_folder(["hydra.run={dir:a}"])
    assert not names_run_folder(["seed=1", "hydra.job.name=a", "~algo"])
    assert without_run_folder(["seed=1", "+hydra.run.dir='a b'"]) == ["seed=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algo", "grpo"], "--algo: a setting is written KEY=VALUE, as in algo=grpo"),
        (["seed=1", "--lr=1e-4"], "as in lr=1e-4"),
        (["--algo"], "as in algo=VALUE"),
        (["--multirun"], "--multirun: one command is one run"),
        (["seed=0,1"], "one command is one run.*\"seed='0,1'\""),
        (["seed=range(0,3)"], "one command is one run"),
        (["algo=grpo,gspo"], "one command is one run; start one command for each value$"),
        (["algo=null"], "algo=null: no such algo; available: a3po, a_hpo"),
        (["algo=[grpo,gspo]"], "no such algo"),
        (["algo=grppo"], "did you mean grpo"),
        (["grpo"], "'grpo': write algo=grpo"),
        (["trainer.nnodes", "=", "1"], "write KEY=VALUE, without blanks"),
        ([""], "write KEY=VALUE"),
        (["=5"], "'=5': write KEY=VALUE"),
        (["'seed=5'"], "write KEY=VALUE"),
        (["algo=GSPO"], "algo=GSPO: no such algo; did you mean gspo"),
        (["algo=größe"], "no such algo; "),
        (["algo="], "no such algo; available: a3po, a_hpo"),
        (["+algo=hpo"], "the recipe has algo already; write algo=hpo"),
        (["trainer.experiment_name=a[b]"], "to give it as a text: \"trainer.experiment_name='a"),
    ],
)
def test_a_wrong_argument_is_told_what_to_write(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_overrides(arguments)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr=1e-4"], "did you mean actor_rollout_ref.actor.optim.lr or critic.optim.lr"),
        (["actor.optim.lr=1"], "did you mean actor_rollout_ref.actor.optim.lr"),
        (["zzqq=1"], "nothing looks like it"),
        (["algorithm=grpo"], "algorithm is a section; set one of its keys, such as algorithm"),
        (["run=null"], "Config group override must be a string"),
        (["~algo=spo"], "recipe countdown-tiny: Could not delete"),
    ],
)
def test_a_wrong_key_is_told_the_nearest(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        composed(*overrides)
    assert len(str(caught.value)) < 300


def test_the_nearest_names_are_few():
    assert nearest("zz", ["one", "two"]) == "available: one, two"
    assert nearest("zz", [f"name_{i}" for i in range(51)]) == "nothing looks like it"
