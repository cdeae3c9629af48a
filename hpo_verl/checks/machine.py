"""Whether cards, their memory, CPUs and host memory suffice."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from hpo_verl.checks.finding import Finding, error, ok, skipped, warning
from hpo_verl.checks.memory import (
    GIB,
    OVERHEAD_GIB,
    RECIPE_CARD_GIB,
    adapter_parameters,
    card_memory,
    host_memory,
)
from hpo_verl.checks.planned_run import PlannedRun
from hpo_verl.config.settings import ACTOR, MODEL, ROLLOUT
from hpo_verl.errors import EnvironmentCheckError

UNKNOWN_SIZE = "the policy's folder does not tell its dimensions"
SMI = "nvidia-smi"
SMI_SECONDS = 20
# What verl reserves of Ray's CPUs for a rank (max_colocate_count).
CPUS_PER_RANK = 3
# What the processes of a run on the CPU take beside the model.
PROCESSES_GIB = 3.0
# A card on which more is taken belongs to somebody else just now.
IDLE_GIB = 2.0


@dataclass(frozen=True)
class Card:
    """One GPU, its memory in GiB."""

    name: str
    total: float
    used: float


@dataclass(frozen=True)
class Node:
    """What one machine offers: GPUs, CPUs as Ray counts them, available memory of the host, GiB."""

    cards: tuple[Card, ...]
    cpus: float
    memory: float

    @classmethod
    def here(cls) -> Node:
        """This machine."""
        available = psutil.virtual_memory().available / GIB
        return cls(tuple(find_cards()), os.cpu_count() or 1, available)


def find_cards() -> list[Card]:
    """NVIDIA's GPUs on this machine, whatever this process may use of them."""
    cards = []
    # Lines such as `NVIDIA H100 80GB HBM3, 81559, 4`, memory in MiB.
    for line in _query("name,memory.total,memory.used"):
        name, *memory = (part.strip() for part in line.rsplit(",", 2))
        try:
            cards.append(Card(name, *(float(mib) / 1024 for mib in memory)))
        except (TypeError, ValueError) as problem:
            raise EnvironmentCheckError(f"{SMI} fails: {problem}") from problem
    return cards


def driver_version() -> str | None:
    """Version of NVIDIA's driver on this machine; None without one."""
    return next(iter(_query("driver_version")), None)


def _query(fields: str) -> list[str]:
    """What nvidia-smi says of each card, one line a card; nothing where it is not installed.

    Raises:
        EnvironmentCheckError: it is installed, and fails.
    """
    program = shutil.which(SMI)
    if program is None:
        return []
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(  # noqa: S603
            command, check=True, capture_output=True, text=True, timeout=SMI_SECONDS
        ).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        raise EnvironmentCheckError(f"{SMI} fails: {problem}") from problem
    return [line.strip() for line in printed.splitlines() if line.strip()]


def check_here(run: PlannedRun) -> list[Finding]:
    """All checks of what this machine has, which a Ray of the run's own would offer."""
    return check_machines(run, [Node.here()])


def check_machines(run: PlannedRun, nodes: Sequence[Node]) -> list[Finding]:
    """All checks of what the machines of a run have."""
    if run.on_cpu:
        return [check_cpus(run, nodes), check_host_memory(run, nodes)]
    cards = [check_cards(run, nodes), check_cpus(run, nodes)]
    return [*cards, check_card_memory(run, nodes), check_host_memory(run, nodes)]


def check_cards(run: PlannedRun, nodes: Sequence[Node]) -> Finding:
    """Whether as many machines as the recipe wants have as many GPUs as it wants."""
    machines, each = run.get("trainer.nnodes"), run.get("trainer.n_gpus_per_node")
    fitting = [node for node in nodes if len(node.cards) >= each]
    shown = " + ".join(str(len(node.cards)) for node in nodes) or "none"
    wanted = f"trainer.nnodes={machines} trainer.n_gpus_per_node={each}"
    if len(fitting) < machines:
        return error(
            f"{wanted}: this {'cluster' if run.address else 'machine'} has {shown}",
            "hardware=1gpu24, 1gpu, 8gpu, 2x8gpu or cpu, as there are; --address for a cluster",
            "cards",
        )
    busy = [card.used for node in fitting for card in node.cards if card.used > IDLE_GIB]
    if busy:
        text = f"{len(busy)} cards are in use, up to {max(busy):.1f} GiB"
        return warning(text, "wait, or end the other programs; see nvidia-smi", "cards")
    return ok(f"{wanted}; there are {shown}: {fitting[0].cards[0].name}", "cards")


def check_card_memory(run: PlannedRun, nodes: Sequence[Node]) -> Finding:
    """Compare the estimate of each phase with the smallest card."""
    name = "card memory"
    if run.size is None:
        return skipped(UNKNOWN_SIZE, name)
    if not run.needs_vllm:
        return skipped(f"no arithmetic for {ROLLOUT}.name other than vllm", name)
    there = [card.total for node in nodes for card in node.cards]
    card = min(there, default=RECIPE_CARD_GIB)
    memory = card_memory(run.size, run.config, card)
    text, adapter = memory.arithmetic, adapter_parameters(run.size, run.config)
    if adapter:
        text += f"; {adapter:,} parameters of an adapter are trained, the others frozen"
    if not there:
        return skipped(f"no card here to compare with; on one of {card:g} GiB: {text}", name)
    text += f"; the smallest card has {card:.1f}"
    if memory.cache_tokens < run.longest:
        return error(
            f"vLLM's share leaves no room for one response of {run.longest} tokens; {text}",
            f"a larger {ROLLOUT}.gpu_memory_utilization or tensor_model_parallel_size",
            name,
        )
    if memory.update > card:
        states = memory.weights + memory.gradients + memory.adam + OVERHEAD_GIB
        fix = f"halve {ACTOR}.ppo_max_token_len_per_gpu"
        return error(text, f"{MODEL}.lora_rank=16" if states > card and not adapter else fix, name)
    if memory.sampling > card:
        return error(text, f"lower {ROLLOUT}.gpu_memory_utilization", name)
    return ok(text, name)


def check_cpus(run: PlannedRun, nodes: Sequence[Node]) -> Finding:
    """Whether Ray has as many CPUs as verl reserves, on each machine and together.

    With fewer it waits without a word. Read in verl 0.9.1: three a card, one for each of
    TransferQueue's storage units and one for its controller, one for the driver.
    """
    ranks, machines = run.get("trainer.n_gpus_per_node"), run.get("trainer.nnodes")
    units = run.get("transfer_queue.backend.SimpleStorage.num_data_storage_units")
    slots, key = CPUS_PER_RANK * ranks * machines + units + 2, "ray_kwargs.ray_init.num_cpus"
    nominal = None if run.address else run.get(key)
    each = [node.cpus for node in nodes] if nominal is None else [float(nominal)]
    with_cards = [node.cpus for node in nodes if len(node.cards) >= ranks]
    placed = with_cards if nominal is None and with_cards else each
    text = (
        f"{CPUS_PER_RANK} x {ranks * machines} + TransferQueue {units} + 1 + driver 1 = {slots}; "
        f"{'there are' if nominal is None else key} "
        f"{' + '.join(f'{cpus:g}' for cpus in each) or 'none'}"
    )
    large = [cpus for cpus in placed if cpus >= CPUS_PER_RANK * ranks]
    if sum(each) < slots or len(large) < machines:
        on_each = f"{CPUS_PER_RANK * ranks} of them on each of {machines} machines"
        return error(
            f"{text}, with which Ray waits without a word; {on_each}",
            "more CPUs, or transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
            "cpus",
        )
    return ok(text, "cpus")


def check_host_memory(run: PlannedRun, nodes: Sequence[Node]) -> Finding:
    """Compare the estimate for a machine's own memory with what is available."""
    name, least = "host memory", min((node.memory for node in nodes), default=0.0)
    if run.size is None:
        return skipped(UNKNOWN_SIZE, name)
    needed, text = host_memory(run.size, run.config)
    if run.on_cpu:
        needed, text = needed + PROCESSES_GIB, f"{text}; processes {PROCESSES_GIB:g}"
    text = f"{needed:.1f} GiB: {text}; {least:.1f} available"
    if needed > least:
        return error(text, "a machine with more memory, a smaller model, or no offloading", name)
    return ok(text, name)
