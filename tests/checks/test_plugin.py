"""verl has loaded the plugin, or the doctor says why not."""

import sys

import pytest
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

from hpo_verl.checks import packages
from hpo_verl.checks.finding import Finding
from hpo_verl.verl_plugin import registered


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("VERL_PLATFORM", "cpu")


@pytest.mark.usefixtures("on_the_cpu")
def test_the_plugin_is_there():
    assert packages.plugin_fault() is None
    assert packages.check_plugin().status == "ok"


def test_a_fault_is_an_error_with_its_fix():
    finding = packages.plugin_finding(("text", "fix"), "plugin", "node a: ")
    assert finding == Finding("plugin", "error", "node a: text", "fix")


@pytest.mark.usefixtures("on_the_cpu")
def test_no_entry_point(monkeypatch):
    monkeypatch.setattr(packages, "entry_points", lambda group: ())
    detail, fix = packages.plugin_fault()
    assert detail == "no entry point of the group verl.plugins names hpo_verl.verl_plugin"
    assert "pip install hpo-verl" in fix
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "other,hpo_verl.verl_plugin")
    assert packages.plugin_fault() is None


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize(
    ("policy", "permitted"), [("none", False), ("other", False), ("other, hpo_verl", True)]
)
def test_the_environment_decides_whether_verl_may(monkeypatch, policy, permitted):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    fault = packages.plugin_fault()
    assert (fault is None) == permitted
    if fault:
        assert fault[0] == f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading the plugin"


@pytest.mark.usefixtures("on_the_cpu")
def test_a_plugin_that_does_not_import(monkeypatch):
    monkeypatch.setitem(sys.modules, "hpo_verl.verl_plugin", None)
    detail, _ = packages.plugin_fault()
    assert detail.startswith("the plugin fails to load: ModuleNotFoundError: import of hpo_verl")


@pytest.mark.usefixtures("on_the_cpu")
def test_a_plugin_that_verl_did_not_load(monkeypatch):
    monkeypatch.delitem(sys.modules, "hpo_verl.verl_plugin")
    monkeypatch.setattr(packages, "import_module", lambda name: registered)
    assert packages.plugin_fault() == ("`import verl` did not load the plugin", packages.REINSTALL)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_name_that_is_missing_and_one_that_another_plugin_took(monkeypatch):
    monkeypatch.delitem(ADV_ESTIMATOR_REGISTRY, "a_hpo")
    monkeypatch.setitem(POLICY_LOSS_REGISTRY, "mhpo", pytest.approx)
    detail, _ = packages.plugin_fault()
    taken = f"policy loss 'mhpo': registered by {pytest.approx.__module__}"
    assert detail == f"advantage estimator 'a_hpo': not registered; {taken}"
