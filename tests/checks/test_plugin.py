"""The plugin is loaded by verl, or the reason why not is named."""

import sys

import pytest

from hpo_verl.checks import plugin
from hpo_verl.checks.plugin import check_here, judge, plugin_state

GOOD = {
    "installed": True,
    "permitted": True,
    "policy": "auto",
    "loaded": True,
    "absent": [],
    "failure": "",
}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")


def test_the_plugin_is_there():
    assert plugin_state() == GOOD
    assert check_here().status == "ok"


@pytest.mark.parametrize(
    ("change", "detail", "fix"),
    [
        ({"installed": False}, "no entry point of the group verl.plugins", "pip install hpo-verl"),
        (
            {"permitted": False, "policy": "none"},
            "VERL_USE_EXTERNAL_PLUGINS=none keeps verl from",
            "unset VERL_USE_EXTERNAL_PLUGINS",
        ),
        ({"failure": "ImportError: no x"}, "fails to load: ImportError: no x", "reinstall"),
        ({"loaded": False}, "`import verl` did not load the plugin", "reinstall"),
        ({"absent": ["policy loss 'mhpo': not registered"]}, "policy loss 'mhpo'", "other plugin"),
    ],
)
def test_each_way_to_be_without_it(change, detail, fix):
    finding = judge("plugin", {**GOOD, **change})
    assert finding.status == "error"
    assert detail in finding.detail
    assert fix in finding.fix


def test_no_entry_point(monkeypatch):
    monkeypatch.setattr(plugin, "entry_points", lambda group: ())
    assert not plugin_state()["installed"]
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "other,hpo_verl.verl_plugin")
    assert plugin_state()["installed"]


@pytest.mark.parametrize(
    ("policy", "permitted"), [("none", False), ("other", False), ("other, hpo_verl", True)]
)
def test_the_environment_decides_whether_verl_may(monkeypatch, policy, permitted):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    assert plugin_state()["permitted"] == permitted


def test_a_plugin_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "hpo_verl.verl_plugin", None)
    assert plugin_state()["failure"].startswith("ModuleNotFoundError: import of hpo_verl")


def test_a_name_that_is_missing_and_one_that_another_plugin_took(monkeypatch):
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    from hpo_verl.verl_plugin.registered import absent_names

    assert absent_names() == []
    monkeypatch.delitem(ADV_ESTIMATOR_REGISTRY, "a_hpo")
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "mhpo", pytest.approx)
    assert absent_names() == [
        "advantage estimator 'a_hpo': not registered",
        f"policy loss 'mhpo': registered by {pytest.approx.__module__}",
    ]
