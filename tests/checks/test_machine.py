"""Cards, memory and CPUs that are fewer than a recipe needs, on machines that are faked."""

import subprocess
from types import SimpleNamespace

import pytest
from findings import only
from model_sizes import MODEL_SIZES

from hpo_verl.checks import machine
from hpo_verl.checks.list import CHECKS, run_checks
from hpo_verl.checks.machine import Card, Node, check_machines, find_cards
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.errors import EnvironmentCheckError

SIZE = MODEL_SIZES["Qwen/Qwen2.5-7B-Instruct"]
CARD = Card("NVIDIA H100 80GB HBM3", 79.6, 0.0)


def node(cards=8, card=CARD, cpus=64, memory=500.0):
    return Node((card,) * cards, cpus, memory)


@pytest.fixture
def examine(planned, monkeypatch):
    def run(*nodes, changes=None, hardware="8gpu", size=SIZE, address=None):
        monkeypatch.setattr(PlannedRun, "size", size)
        run = planned(changes, recipe="countdown4-7b", hardware=hardware, address=address)
        return check_machines(run, nodes)

    return run


def test_a_machine_with_eight_cards(examine):
    findings = examine(node())
    assert [(f.name, f.status) for f in findings] == [
        ("cards", "ok"),
        ("cpus", "ok"),
        ("card memory", "ok"),
        ("host memory", "ok"),
    ]
    text = only(findings, "card memory").detail
    assert text.startswith("update 33.2 GiB = weights 3.5 + gradients 3.5 + Adam 7.1 + 4 + ")
    # 2 x (24576 tokens x 270,336 + 1,323,052,672) and 2 x (24576 x 254,464 + 1,789,168,512) bytes;
    # 4 x 7,615,616,512 / 8; 2 x (24576 x 152,064 + 1,868,562,432).
    moments = "loss 14.8, layer 15.0, AdamW's step 3.5 and scoring, without gradients, 10.4"
    assert moments in text
    assert "the smallest card has 79.6" in text
    assert (
        only(findings, "cpus").detail == "3 x 8 + TransferQueue 8 + 1 + driver 1 = 34; there are 64"
    )


@pytest.mark.parametrize(
    ("nodes", "hardware", "shown"),
    [
        ((node(4),), "8gpu", "has 4"),
        ((node(0),), "1gpu", "has 0"),
        ((node(8),), "2x8gpu", "has 8"),
        ((node(8), node(4), node(4)), "2x8gpu", "has 8 + 4 + 4"),
    ],
)
def test_too_few_cards(examine, nodes, hardware, shown):
    finding = only(examine(*nodes, hardware=hardware, address="auto"), "cards")
    assert finding.status == "error"
    assert "trainer.n_gpus_per_node=" in finding.detail
    assert f"this cluster {shown}" in finding.detail
    assert "hardware=" in finding.fix


def test_cards_that_somebody_uses(examine):
    finding = only(examine(node(card=Card("x", 79.6, 30.0))), "cards")
    assert (finding.status, finding.detail) == ("warning", "8 cards are in use, up to 30.0 GiB")


def test_cards_that_are_too_small_for_the_update(examine):
    changes = {"actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 49152}
    finding = only(examine(node(card=Card("x", 40.0, 0.0)), changes=changes), "card memory")
    assert (finding.status, "the smallest card has 40.0" in finding.detail) == ("error", True)
    assert finding.fix == "halve actor_rollout_ref.actor.ppo_max_token_len_per_gpu"


def test_cards_that_are_too_small_for_sampling(examine):
    changes = {"actor_rollout_ref.rollout.gpu_memory_utilization": 0.9}
    finding = only(examine(node(), changes=changes), "card memory")
    assert (finding.status, finding.fix) == (
        "error",
        "lower actor_rollout_ref.rollout.gpu_memory_utilization",
    )


def test_a_share_without_room_for_a_response(examine):
    changes = {"actor_rollout_ref.rollout.gpu_memory_utilization": 0.2}
    finding = only(examine(node(), changes=changes), "card memory")
    assert (finding.status, "no room for one response of 1280" in finding.detail) == ("error", True)


def test_what_cannot_be_compared_is_skipped_with_its_arithmetic(examine):
    finding = only(examine(node(0)), "card memory")
    assert finding.status == "skipped"
    assert finding.detail.startswith("no card here to compare with; on one of 80 GiB: update 33.2")
    assert only(examine(node(), size=None), "card memory").status == "skipped"
    assert only(examine(node(), size=None), "host memory").status == "skipped"
    changes = {"actor_rollout_ref.rollout.name": "sglang"}
    assert only(examine(node(), changes=changes), "card memory").status == "skipped"


def test_too_few_cpus(examine):
    finding = only(examine(node(cpus=33)), "cpus")
    assert finding.status == "error"
    assert finding.detail.startswith("3 x 8 + TransferQueue 8 + 1 + driver 1 = 34; there are 33")
    assert only(examine(node(cpus=34)), "cpus").status == "ok"
    # Enough of them together do not help where no machine has enough for its cards.
    nodes = (node(cpus=23), node(0, cpus=64))
    assert "24 of them on each of 1 machines" in only(examine(*nodes), "cpus").detail
    changes = {"ray_kwargs.ray_init.num_cpus": 16}
    finding = only(examine(node(), changes=changes), "cpus")
    assert "ray_kwargs.ray_init.num_cpus 16" in finding.detail
    # A cluster has the CPUs that it has, whatever a local Ray would be told.
    assert only(examine(node(), changes=changes, address="auto"), "cpus").status == "ok"


@pytest.mark.parametrize(
    ("hardware", "shown"), [("1gpu", "= 13;"), ("8gpu", "= 34;"), ("2x8gpu", "= 58;")]
)
def test_cpus_of_the_readme(examine, hardware, shown):
    assert shown in only(examine(node(), hardware=hardware), "cpus").detail


def test_too_little_host_memory(examine):
    finding = only(examine(node(1, memory=100.0), hardware="1gpu"), "host memory")
    assert finding.status == "error"
    assert "keeping, 4 x 4 P; 4 P = 28.4" in finding.detail
    assert only(examine(node(1, memory=120.0), hardware="1gpu"), "host memory").status == "ok"


def test_a_large_model_without_a_gpu(examine):
    findings = examine(node(0, memory=64.0), hardware="cpu")
    assert [f.name for f in findings] == ["cpus", "host memory"]
    assert only(findings, "host memory").status == "error"


def smi(monkeypatch, **answer):
    def run(command, **options):
        assert command[0] == "/usr/bin/nvidia-smi"
        if "raises" in answer:
            raise answer["raises"]
        return SimpleNamespace(stdout=answer["stdout"])

    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(machine.subprocess, "run", run)


def test_cards_are_read_from_nvidia_smi(monkeypatch):
    smi(monkeypatch, stdout="NVIDIA H100, 80GB, 81920, 512\nNVIDIA L4, 24576, 0\n")
    assert find_cards() == [Card("NVIDIA H100, 80GB", 80.0, 0.5), Card("NVIDIA L4", 24.0, 0.0)]
    assert Node.here().cards[1] == Card("NVIDIA L4", 24.0, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        {"raises": subprocess.CalledProcessError(9, "nvidia-smi")},
        {"raises": subprocess.TimeoutExpired("nvidia-smi", 20)},
        {"stdout": "NVIDIA H100, [N/A], [N/A]\n"},
    ],
)
def test_a_driver_that_fails(monkeypatch, planned, answer):
    smi(monkeypatch, **answer)
    with pytest.raises(EnvironmentCheckError, match="nvidia-smi fails"):
        find_cards()
    run = planned(recipe="countdown4-7b", hardware="8gpu")
    (finding,) = run_checks(run, [check for check in CHECKS if check.name == "cards"])
    assert (finding.name, finding.status) == ("cards", "error")
    assert finding.fix


def test_no_driver_is_no_card(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert find_cards() == []
