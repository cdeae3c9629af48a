"""The order of the checks, what they print, and that wrong input never starts Ray."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hpo_verl.checks import cluster, packages
from hpo_verl.checks.finding import Finding, error, ok, skipped, warning
from hpo_verl.checks.list import Check, run_checks
from hpo_verl.cli import EXIT_BAD_INPUT, app, main
from hpo_verl.errors import ConfigError
from hpo_verl.launch.doctor import as_json, as_text, has_error


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch):
    """Every test here ends before Ray, or says what it would answer."""

    def refuse(*given):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster, "ask", refuse)
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def doctor(places, tmp_path):
    """A function: arguments -> exit code and findings by name, from the command with --json."""

    def run(*arguments, recipe="countdown-tiny"):
        given = [recipe, *places, f"hydra.run.dir={tmp_path / 'run'}", *arguments]
        result = CliRunner().invoke(app, ["doctor", *given, "--json"])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        document = json.loads(result.stdout)
        return result.exit_code, document, {f["name"]: f for f in document["findings"]}

    return run


def test_a_sound_run_asks_ray_last_and_writes_nothing(doctor, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "ask", lambda planned: {"nodes": {"here": {"plugin": None}}})
    code, document, findings = doctor()
    assert code == 0, findings
    assert document["status"] == "ok"
    assert document["recipe"] == "countdown-tiny"
    assert document["address"] is None
    assert document["counts"]["error"] == 0
    assert sum(document["counts"].values()) == len(document["findings"])
    assert [f["name"] for f in document["findings"]][-1] == cluster.NAME
    assert {"name", "status", "detail", "fix"} == set(document["findings"][0])
    expected = {
        *("python", "verl", "torch", "ray", "transformers", "vllm", "trainer packages", "plugin"),
        *("recipe", "targets", "code", "settings", "names", "algorithm", "verl's checks"),
        *(
            "learning",
            "keys",
            "older keys",
            "records",
            "steps",
            "lengths",
            "model",
            "remote code",
            "positions",
            "tokenizer",
            "data files",
            "schema",
            "reward",
        ),
        *("prompts", "folders", "disk", "shared memory", "ports", "cpus", "host memory"),
        "modules",
        cluster.NAME,
    }
    assert set(findings) == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "arguments", "name", "detail"),
    [
        ("countdown-tny", [], "recipe", "unknown recipe 'countdown-tny': did you mean countdown-t"),
        ("countdown-tiny", ["hardware=9gpu"], "recipe", "no such hardware; did you mean"),
        (
            "countdown-tiny",
            ["algorithm.hpo.alpha_mim=0.2"],
            "recipe",
            "unknown setting 'algorithm.hpo.alpha_mim' in 'algorithm.hpo.alpha_mim=0.2': did you",
        ),
        ("countdown-tiny", ["--address", "autoo"], "address", "must be auto or HOST:PORT"),
        ("countdown-tiny", ["--address", "127.0.0.1:1"], "address", "nobody answers"),
    ],
)
def test_wrong_input_is_an_error_that_names_the_key_and_starts_nothing(
    doctor, recipe, arguments, name, detail
):
    code, document, findings = doctor(*arguments, recipe=recipe)
    assert code == EXIT_BAD_INPUT
    assert document["status"] == "error"
    assert findings[name]["status"] == "error"
    assert detail in findings[name]["detail"]
    assert findings[name]["fix"]
    last = document["findings"][-1]
    assert last["status"] == "skipped"


def test_code_of_others_is_found_before_it_runs(doctor, tmp_path):
    proof = tmp_path / "executed"
    target = ["+algorithm.evil._target_=pathlib.Path.touch", f"+algorithm.evil.self={proof}"]
    code, _, findings = doctor(*target)
    assert (code, findings["targets"]["status"]) == (EXIT_BAD_INPUT, "error")
    assert "verl's checks" not in findings
    assert not proof.exists()


def test_the_wrong_verl_ends_it(doctor, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda name: "0.8.0")
    code, document, findings = doctor()
    assert (code, findings["verl"]["status"]) == (EXIT_BAD_INPUT, "error")
    assert [f["name"] for f in document["findings"]] == ["python", "verl", "other checks"]
    result = CliRunner().invoke(app, ["doctor", "--quick"])
    assert (result.exit_code, "0.8.0; need >=0.9.1" in result.stdout) == (EXIT_BAD_INPUT, True)


def test_quick_needs_no_recipe():
    result = CliRunner().invoke(app, ["doctor", "--quick", "--json"])
    document = json.loads(result.stdout)
    assert result.exit_code == 0, document
    assert document["recipe"] is None
    assert [f["name"] for f in document["findings"]] == [
        *("python", "verl", "torch", "ray", "transformers", "vllm", "trainer packages", "plugin")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor"], "a recipe is missing; one of countdown-smol, .* or --quick"),
        (["doctor", "countdown-tiny", "--quick"], "--quick with countdown-tiny"),
        (["doctor", "--quick", "--address", "auto"], "--quick with auto"),
    ],
)
def test_a_command_that_cannot_be_meant(arguments, message, monkeypatch, capsys):
    with pytest.raises(ConfigError, match=message):
        app(arguments, standalone_mode=False)
    monkeypatch.setattr(sys, "argv", ["hpo-verl", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == EXIT_BAD_INPUT
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("error: ")


def test_nothing_but_the_document_on_stdout_of_a_real_process():
    finished = subprocess.run(
        [
            *(sys.executable, "-c", "from hpo_verl.cli import main; main()"),
            *("doctor", "countdown-tny", "--json"),
        ],
        capture_output=True,
        text=True,
    )
    assert finished.returncode == EXIT_BAD_INPUT
    assert json.loads(finished.stdout)["status"] == "error"
    assert "Traceback" not in finished.stderr


def test_lines_for_people():
    findings = [
        ok("fine", "one"),
        warning("odd", "do this", "longer name"),
        error("bad", "do that", "x"),
        error("bad", "and that", "y"),
        skipped("no card", "z"),
    ]
    assert as_text(findings).splitlines() == [
        "ok       one          fine",
        "warning  longer name  odd",
        "                      fix: do this",
        "error    x            bad",
        "                      fix: do that",
        "error    y            bad",
        "                      fix: and that",
        "skipped  z            no card",
        "2 error, 1 warning, 1 skipped, 1 ok",
    ]


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        ([ok("a"), skipped("b")], "ok"),
        ([ok("a"), warning("b", "c")], "warning"),
        ([warning("b", "c"), error("b", "c")], "error"),
    ],
)
def test_the_documents_status_is_the_worst(findings, status):
    assert json.loads(as_json(None, [], None, findings))["status"] == status
    assert has_error(findings) == (status == "error")


def test_a_check_that_raises_is_an_error_and_a_defect_is_not_hidden(planned):
    def bad(run):
        raise ConfigError("key=1: must be 2")

    (finding,) = run_checks(planned(), [Check("name", bad, fix="key=2")])
    assert finding == Finding("name", "error", "key=1: must be 2", "key=2")
    with pytest.raises(ZeroDivisionError):
        list(run_checks(planned(), [Check("name", lambda run: 1 / 0)]))
