"""The CPU platform: chosen only where it is meant, and never in the way of CUDA."""

import subprocess
import sys

import pytest
import torch

from hpo_verl.errors import EnvironmentCheckError
from hpo_verl.verl_plugin.cpu import bridges, platform


@pytest.mark.parametrize(
    ("requested", "cuda_build", "smi", "chosen"),
    [
        ("cpu", True, True, True),
        ("nvidia", False, False, False),
        ("", False, False, True),
        ("", False, True, False),
        # A driver node without a device, with the cluster's CUDA build of torch.
        ("", True, False, False),
    ],
)
def test_when_the_cpu_is_chosen(monkeypatch, requested, cuda_build, smi, chosen):
    monkeypatch.setenv("VERL_PLATFORM", requested)
    monkeypatch.setattr(torch.version, "cuda", "12.8" if cuda_build else None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(platform.PlatformBase, "check_smi_command", staticmethod(lambda cmd: smi))
    assert platform.cpu_is_selected() is chosen
    assert platform.PlatformCpu().is_platform_available(use_smi_check=True) is chosen


def test_device_module_answers_what_verl_asks_of_torch_cuda():
    device = platform.PlatformCpu()
    module = device.device_module
    assert module.memory_allocated() > 0
    # The kernel updates its peak less often than the current size.
    assert module.max_memory_allocated() > 0.9 * module.memory_allocated()
    available, total = module.mem_get_info()
    assert 0 < available <= total
    device.manual_seed(3)
    state = module.get_rng_state()
    first = torch.rand(4)
    module.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    assert module.is_available()
    module.empty_cache()
    device.set_allocator_settings("expandable_segments:True")


def test_an_unchecked_verl_is_refused(monkeypatch):
    monkeypatch.setattr(bridges.verl, "__version__", "0.10.0")
    with pytest.raises(EnvironmentCheckError, match=r"verl 0\.10\.0: .* 0\.9\.1 only"):
        bridges.require_checked_verl()


def test_verl_log_probs_are_the_same_with_the_bridge():
    from verl.utils import torch_functional

    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.randint(0, 30, (50,), generator=torch.Generator().manual_seed(1))
    token_by_token = torch.stack(
        [row[label] - row.logsumexp(-1) for row, label in zip(logits, labels, strict=True)]
    )
    bridged = torch_functional.logprobs_from_logits(logits, labels)
    torch.testing.assert_close(bridged, token_by_token)
    weights = torch.arange(50.0)
    (expected,) = torch.autograd.grad((token_by_token * weights).sum(), logits)
    (found,) = torch.autograd.grad((bridged * weights).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_a_reference_policy_pins_no_memory():
    from verl.workers.engine.fsdp import transformer_impl

    assert not transformer_impl.CPUOffloadPolicy(pin_memory=True).pin_memory


def test_importing_verl_registers_everything_and_imports_no_trainer():
    code = (
        "import sys, verl; from verl.plugin.platform import get_platform, PlatformRegistry\n"
        "assert 'cpu' in PlatformRegistry.registered_names()\n"
        "assert get_platform().device_name == 'cpu'\n"
        "assert 'verl.trainer.ppo.core_algos' not in sys.modules\n"
        "from verl.workers.rollout.base import get_rollout_class\n"
        "from verl.workers.rollout.replica import RolloutReplicaRegistry\n"
        "assert get_rollout_class('hf').__name__ == 'HFServerAdapter'\n"
        "assert RolloutReplicaRegistry.get('hf').__name__ == 'HFReplica'\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        env={"VERL_PLATFORM": "cpu", "PATH": "/usr/bin"},
    )
