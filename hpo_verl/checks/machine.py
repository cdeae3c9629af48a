"""Whether cards, their memory, CPUs and host memory suffice."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil

from hpo_verl.checks.finding import Finding, error, ok, skipped, warning
from hpo_verl.checks.memory import (
    ACTOR,
    CPUS_PER_RANK,
    GIB,
    RECIPE_CARD_GIB,
    ROLLOUT,
    arithmetic,
    card_memory,
    cpu_slots,
    host_memory,
)
from hpo_verl.checks.subject import Subject
from hpo_verl.errors import EnvironmentCheckError

SMI = "nvidia-smi"
SMI_SECONDS = 20
# What the processes of a run on the CPU take beside the model.
FREE_MEMORY_BYTES = 3 << 30
# A card on which more is taken belongs to somebody else just now.
IDLE_GIB = 2.0


@dataclass(frozen=True)
class Card:
    """One GPU: its name and its memory in GiB."""

    name: str
    total: float
    used: float


@dataclass(frozen=True)
class Node:
    """What one machine offers a run.

    Attributes:
        cards: its GPUs.
        cpus: CPUs that Ray would count.
        memory: of the host, GiB, as far as it is available.
    """

    cards: tuple[Card, ...]
    cpus: float
    memory: float

    @classmethod
    def here(cls) -> Node:
        """This machine.

        Raises:
            EnvironmentCheckError: nvidia-smi fails.
        """
        available = psutil.virtual_memory().available / GIB
        return cls(tuple(find_cards()), os.cpu_count() or 1, available)

    def plain(self) -> dict[str, object]:
        """The same as plain values, to be sent between processes."""
        return asdict(self)


def find_cards() -> list[Card]:
    """NVIDIA's GPUs on this machine, whatever this process may use of them.

    Raises:
        EnvironmentCheckError: nvidia-smi is there and fails.
    """
    try:
        return [_card(line) for line in _query("name,memory.total,memory.used")]
    except ValueError as problem:
        raise EnvironmentCheckError(f"{SMI} fails: {problem}") from problem


def driver_version() -> str | None:
    """Version of NVIDIA's driver on this machine; None without one.

    Raises:
        EnvironmentCheckError: nvidia-smi is there and fails.
    """
    return next(iter(_query("driver_version")), "").strip() or None


def _query(fields: str) -> list[str]:
    """What nvidia-smi says of each card, one line a card; nothing where it is not installed."""
    program = shutil.which(SMI)
    if program is None:
        return []
    try:
        printed = subprocess.run(  # noqa: S603
            [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            check=True,
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError) as problem:
        raise EnvironmentCheckError(f"{SMI} fails: {problem}") from problem
    return [line for line in printed.splitlines() if line.strip()]


def _card(line: str) -> Card:
    """Read a line such as `NVIDIA H100 80GB HBM3, 81559, 4`, memory in MiB."""
    name, total, used = (part.strip() for part in line.rsplit(",", 2))
    return Card(name, float(total) / 1024, float(used) / 1024)


def check_here(subject: Subject) -> list[Finding]:
    """All checks of what this machine has, which a Ray of the run's own would offer."""
    try:
        nodes = [Node.here()]
    except EnvironmentCheckError as problem:
        return [error("cards", str(problem), "repair the driver, or ask the machine's owner")]
    return check_machines(subject, nodes)


def check_machines(subject: Subject, nodes: Sequence[Node]) -> list[Finding]:
    """All checks of what machines have.

    Args:
        subject: what is examined.
        nodes: the machines.
    """
    cards = [] if subject.on_cpu else [check_cards(subject, nodes)]
    memory = [] if subject.on_cpu else [check_card_memory(subject, nodes)]
    return [*cards, check_cpus(subject, nodes), *memory, check_host_memory(subject, nodes)]


def check_cards(subject: Subject, nodes: Sequence[Node]) -> Finding:
    """Whether as many machines as the recipe wants have as many GPUs as it wants."""
    machines, each = subject.get("trainer.nnodes"), subject.get("trainer.n_gpus_per_node")
    fitting = [node for node in nodes if len(node.cards) >= each]
    shown = " + ".join(str(len(node.cards)) for node in nodes) or "none"
    wanted = f"trainer.nnodes={machines} trainer.n_gpus_per_node={each}"
    if len(fitting) < machines:
        return error(
            "cards",
            f"{wanted}: this {'cluster' if subject.address else 'machine'} has {shown}",
            "hardware=1gpu, 8gpu, 2x8gpu or cpu, as there are; --address for a cluster",
        )
    busy = [c for node in fitting for c in node.cards if c.used > IDLE_GIB]
    if busy:
        return warning(
            "cards",
            f"{len(busy)} cards are in use, up to {max(c.used for c in busy):.1f} GiB",
            "wait, or end the other programs; see nvidia-smi",
        )
    return ok("cards", f"{wanted}; there are {shown}: {fitting[0].cards[0].name}")


def check_card_memory(subject: Subject, nodes: Sequence[Node]) -> Finding:
    """Compare the estimate of each phase with the smallest card."""
    size = subject.size
    if size is None:
        return skipped("card memory", "the dimensions of the policy are unknown")
    if not subject.needs_vllm:
        return skipped("card memory", f"no arithmetic for {ROLLOUT}.name other than vllm")
    there = [card.total for node in nodes for card in node.cards]
    card = min(there, default=RECIPE_CARD_GIB)
    memory = card_memory(size, subject.config, card)
    text = arithmetic(memory, size, subject.config)
    if not there:
        return skipped(
            "card memory", f"no card here to compare with; on one of {card:g} GiB: {text}"
        )
    text += f"; the smallest card has {card:.1f}"
    longest = subject.get("data.max_prompt_length") + subject.get("data.max_response_length")
    if memory.cache_tokens < longest:
        return error(
            "card memory",
            f"vLLM's share leaves no room for one response of {longest} tokens; {text}",
            f"a larger {ROLLOUT}.gpu_memory_utilization or tensor_model_parallel_size",
        )
    if memory.update > card:
        return error("card memory", text, f"halve {ACTOR}.ppo_max_token_len_per_gpu")
    if memory.sampling > card:
        return error("card memory", text, f"lower {ROLLOUT}.gpu_memory_utilization")
    return ok("card memory", text)


def check_cpus(subject: Subject, nodes: Sequence[Node]) -> Finding:
    """Whether Ray has as many CPUs as verl reserves, on each machine and together."""
    slots, text = cpu_slots(subject.config)
    ranks, machines = subject.get("trainer.n_gpus_per_node"), subject.get("trainer.nnodes")
    nominal = None if subject.address else subject.get("ray_kwargs.ray_init.num_cpus")
    each = [float(nominal)] if nominal is not None else [node.cpus for node in nodes]
    with_cards = [node.cpus for node in nodes if len(node.cards) >= ranks]
    source = "ray_kwargs.ray_init.num_cpus" if nominal is not None else "there are"
    shown = f"{text}; {source} {' + '.join(f'{cpus:g}' for cpus in each) or 'none'}"
    placed = each if nominal is not None or not with_cards else with_cards
    large = [cpus for cpus in placed if cpus >= CPUS_PER_RANK * ranks]
    if sum(each) < slots or len(large) < machines:
        on_each = f"{CPUS_PER_RANK * ranks} of them on each of {machines} machines"
        return error(
            "cpus",
            f"{shown}, with which Ray waits without a word; {on_each}",
            "more CPUs, or transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        )
    return ok("cpus", shown)


def check_host_memory(subject: Subject, nodes: Sequence[Node]) -> Finding:
    """Compare the estimate for a machine's own memory with what is available."""
    least, size = min((node.memory for node in nodes), default=0.0), subject.size
    if size is None:
        return skipped("host memory", "the dimensions of the policy are unknown")
    needed, text = host_memory(size, subject.config)
    if subject.on_cpu:
        base = FREE_MEMORY_BYTES / GIB
        needed, text = needed + base, f"{text}; processes {base:.1f}"
    text = f"{needed:.1f} GiB: {text}; {least:.1f} available"
    if needed > least:
        return error(
            "host memory", text, "a machine with more memory, a smaller model, or no offloading"
        )
    return ok("host memory", text)
