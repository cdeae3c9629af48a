"""`hpo-verl list`, `prepare`, help and exit codes."""

import os
import sys

import pytest
from typer.testing import CliRunner

from hpo_verl.algorithms.registry import ALGORITHMS
from hpo_verl.checks import list as checklist
from hpo_verl.cli import EXIT_BAD_INPUT, EXIT_INTERRUPTED, app, main
from hpo_verl.config.recipes import GROUPS, group_options, recipe_names, study_names
from hpo_verl.launch import resume, train

SMALL = (
    "prepare.data.arguments.train_size=64",
    "prepare.data.arguments.val_size=8",
)


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_list_names_every_recipe_algorithm_paper_equation_and_option():
    result = invoke("list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"recipes: {', '.join(recipe_names())}"
    for algorithm in ALGORITHMS.values():
        (line,) = [text for text in lines if text.split()[:1] == [algorithm.name]]
        assert line.split()[1] == f"arXiv:{algorithm.papers[0]}"
        assert line.endswith(algorithm.equation)
    for group in GROUPS:
        assert f"{group}=: {', '.join(group_options(group))}" in lines


@pytest.mark.parametrize("columns", [40, 60])
def test_a_terminal_gets_lines_that_fit_and_no_word_less(columns, monkeypatch):
    whole = invoke("list").stdout
    monkeypatch.setenv("COLUMNS", str(columns))
    folded = invoke("list").stdout
    assert max(map(len, whole.splitlines())) > 60
    assert max(map(len, folded.splitlines())) <= columns
    assert folded.split() == whole.split()
    # What is folded stands deeper than what begins there.
    assert [line for line in folded.splitlines() if line.startswith("  a_hpo ")]
    assert [line for line in folded.splitlines() if line.startswith("    countdown")]


def test_the_version_and_the_studies_are_told():
    from hpo_verl import __version__

    assert invoke("--version").stdout == f"hpo-verl {__version__}\n"
    assert invoke("lab", "list").stdout.splitlines() == study_names()


def test_an_unknown_study_is_refused_before_verl_is_imported(monkeypatch, capsys):
    # None in the table of modules makes an import fail.
    monkeypatch.setitem(sys.modules, "hpo_verl.lab.settings", None)
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "lab", "run", "spars"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: unknown study 'spars': did you mean sparsity?\n"


@pytest.mark.parametrize("command", ["train", "submit"])
@pytest.mark.parametrize("option", ["-halgo=x", "-hx", "-x", "--hel"])
def test_an_unknown_option_is_refused(command, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hpo-verl", command, "countdown-tiny", option])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    assert f"{option}: a setting is written KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_shown(option):
    result = invoke("train", "countdown-tiny", option)
    assert (result.exit_code, "Hydra overrides" in result.stdout) == (0, True)


@pytest.mark.parametrize("name", ["HPO_VERL_CACHE", "HPO_VERL_CHECKPOINTS"])
@pytest.mark.parametrize(
    ("given", "taken"), [("", None), ("~/x", "/home/me/x"), ("x", "{here}/x"), ("/a b", "/a b")]
)
def test_folders_of_the_environment(name, given, taken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv(name, given)
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ.get(name) == (taken and taken.format(here=tmp_path))


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("/data/${x}", "must name a folder, without ${ in its path"),
        ("~no-such-user/x", "there is no such user"),
    ],
)
def test_a_folder_of_the_environment_that_cannot_be_used(monkeypatch, capsys, folder, problem):
    monkeypatch.setenv("HPO_VERL_CACHE", folder)
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "list"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: HPO_VERL_CACHE={folder}: {problem}\n"


def test_a_missing_home_is_that_of_the_user(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["HOME"] == os.path.expanduser("~")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A production recipe's data, small: overrides and folder."""
    monkeypatch.setenv("HPO_VERL_CACHE", str(tmp_path / "cache"))
    batch = ("data.train_batch_size=64", "seed=3")
    # A policy of one's own is not fetched from the hub.
    policy = f"actor_rollout_ref.model.path={tmp_path / 'policy'}"
    folder = tmp_path / "cache" / "countdown4-3"
    return (*SMALL, *batch, policy), folder


def test_prepare_makes_the_data_of_a_production_recipe_once(data):
    overrides, folder = data
    result = invoke("prepare", "countdown4-7b", *overrides)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"data: {folder}"
    assert "making data: python -m data_prep.countdown" in result.stdout
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name for path in files} == {"prepared.json", "train.parquet", "val.parquet"}
    again = invoke("prepare", "countdown4-7b", *overrides)
    assert (again.exit_code, again.stdout) == (0, f"data: {folder}\n")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files


def test_prepare_writes_over_nothing_that_it_did_not_make(data, tmp_path, monkeypatch, capsys):
    overrides, folder = data
    # Not even before it fetches the policy.
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    overrides = overrides[:-1]
    folder.mkdir(parents=True)
    (folder / "train.parquet").write_bytes(b"PAR1 and no more")
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "prepare", "countdown4-7b", *overrides])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"{folder / 'train.parquet'} was not made by hpo-verl prepare" in error
    assert (folder / "train.parquet").read_bytes() == b"PAR1 and no more"


def test_prepare_checks_a_policy_that_it_would_make(tmp_path, monkeypatch, capsys):
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "mine.txt").write_text("x")
    given = [*SMALL, f"prepare.data.output={tmp_path / 'data'}", f"prepare.policy.output={policy}"]
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "prepare", "countdown-tiny", *given])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"{policy} holds no config.json; " in error
    assert f"move {policy} away, then hpo-verl prepare" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["countdown5-7b"], "unknown recipe 'countdown5-7b': did you mean countdown4-7b"),
        (["countdown4-7b", "model=qwen2.5-77b"], "no such model; did you mean qwen2.5-7b"),
        (["countdown4-7b", "data.train_size=3"], "unknown setting 'data.train_size'"),
        (["countdown4-7b", "data.train_batch_size=0"], "data.train_batch_size=0: must be"),
        (["countdown4-7b", "seed=${nothing}"], "nothing"),
        (["countdown4-7b", "prepare.data.module=os"], "prepare.data.module=os: only modules below"),
    ],
)
def test_prepare_refuses_wrong_input_before_it_makes_anything(
    arguments, message, data, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "prepare", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert message in error
    assert not data[1].parent.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume: no run in "),
        (["hydra.run.dir=run"], "holds a run: --resume goes on with it"),
        (["hydra.run.dir=run", "--resume", "trainer.resume_mode=disable"], "leave out trainer.res"),
        (["hydra.run.dir=run", "--resume"], "run/checkpoints holds no checkpoint to go on from"),
    ],
)
def test_train_never_begins_anew_where_it_was_to_go_on_and_never_overwrites_a_run(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "make_and_check", lambda *given: [])
    monkeypatch.setattr(resume, "checked_manifest", lambda *given: ("", {}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step":0,"data":{}}\n')
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "train", "countdown-tiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"metrics.jsonl", ".lock"}


def test_ctrl_c_has_its_own_exit_code(monkeypatch, capsys):
    def interrupt(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(checklist, "prepare_recipe", interrupt)
    monkeypatch.setattr(sys, "argv", ["hpo-verl", "prepare", "countdown-tiny"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("command", ["train", "list", "prepare", "doctor"])
def test_every_command_helps_with_examples(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"hpo-verl {command}" in result.stdout.split("Examples:")[1]


def test_the_exit_codes_are_documented():
    text = " ".join(invoke("--help").stdout.replace("│", " ").split())
    assert "Exit codes: 0 success, 1 the training failed, 2 wrong input" in text
    assert "130 interrupted" in text
    assert "Exit code 2 if any finding is an error" in invoke("doctor", "--help").stdout


@pytest.mark.parametrize("arguments", [["doctr"], ["doctor", "--jsn"], ["prepare"]])
def test_a_command_line_that_does_not_parse(arguments):
    assert invoke(*arguments).exit_code == EXIT_BAD_INPUT
