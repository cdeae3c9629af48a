"""Train one cell: sample, score, weigh, update; one process and one thread."""

from __future__ import annotations

import copy
import math
import time
from typing import Any, NamedTuple

import torch

from hpo_verl.algorithms.base import REWARD
from hpo_verl.core.statistics import token_means
from hpo_verl.errors import DataError
from hpo_verl.lab import warm_start
from hpo_verl.lab.objective import read_objective
from hpo_verl.lab.policy import Policy, Prompt, Responses
from hpo_verl.lab.settings import Cell
from hpo_verl.lab.tasks import find_task

# Streams of random numbers that a seed has.
_SAMPLING, _EVALUATION = 1, 2
Row = dict[str, float]


class Diverged(Exception):
    """A log-probability or a gradient is not finite any more."""


class Outcome(NamedTuple):
    """What a cell leaves: a row per step from 0 on, and the facts of `report.studies.Result`."""

    rows: list[Row]
    facts: dict[str, Any]


class Rollout(NamedTuple):
    """Responses; those of a prompt are neighbours."""

    questions: torch.Tensor  # index of every response's question in the training set, `[batch]`
    prompts: list[Prompt]  # tokens of every response's prompt
    responses: Responses  # `[batch, time]` each
    numbers: dict[str, torch.Tensor]  # by name, as `Task.score` gives them, `[batch]` each

    @property
    def rewards(self) -> torch.Tensor:
        """`[batch]`."""
        return self.numbers["score"]

    def at(self, rows: torch.Tensor) -> Rollout:
        """Some of the rows."""
        return Rollout(
            self.questions[rows],
            [self.prompts[row] for row in rows.tolist()],
            Responses(*(tensor[rows] for tensor in self.responses)),
            {name: values[rows] for name, values in self.numbers.items()},
        )


def run_cell(cell: Cell) -> Outcome:
    """Train and measure one cell; the same cell gives the same rows on one machine."""
    warm_start_success = warm_start.make(cell)
    started = time.perf_counter()
    trainer = Trainer(cell, Policy.load(warm_start.policy_folder(cell)))
    status = "finished"
    rows: list[Row] = [{"step": 0.0, "success": trainer.success(0)}]
    try:
        for step in range(1, cell.training.steps + 1):
            rows.append(trainer.step(step))
    except Diverged:
        status = "diverged"
        # A run that is lost counts as one without success, to the end of its budget.
        rows += [
            {"step": float(step), "success": 0.0 if trainer.is_measured(step) else math.nan}
            for step in range(len(rows), cell.training.steps + 1)
        ]
    facts = {
        "status": status,
        "seconds": time.perf_counter() - started,
        "warm_start_success": warm_start_success,
    }
    return Outcome(rows, facts)


class Trainer:
    """Optimizer and questions of one cell, and the warm start's policy, trained in place."""

    def __init__(self, cell: Cell, policy: Policy) -> None:
        self.cell = cell
        self.policy = policy
        self.task = find_task(cell.task)
        self.objective = read_objective(self.task, cell.algorithm, cell.settings)
        settings = cell.training
        sizes = settings.questions, cell.evaluation.questions
        self.questions, self.held_out = self.task.questions(*sizes, cell.seed)
        self.parameters = list(policy.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=cell.learning_rate, weight_decay=0.0, fused=True
        )
        # The policy of the start, where the loss holds on to it.
        self.reference: Policy | None = None
        if self.objective.actor.use_kl_loss:
            self.reference = Policy(copy.deepcopy(policy.model), policy.tokenizer)
        self.sampled = 0
        self.history = self.objective.history(settings.questions)
        # Every algorithm has the same number of responses per step.
        self.group = settings.responses_per_prompt if self.history is None else 1
        self.memory: dict[str, Any] = {}
        self._left: list[int] = []
        self.generator = torch.Generator().manual_seed(cell.seed)
        self._last: dict[int, tuple[torch.Tensor, ...]] = {}

    def step(self, step: int) -> Row:
        """Sample, update, and describe the step; measure success where it is due.

        Raises:
            Diverged: A log-probability or the gradient is not finite.
        """
        started = time.perf_counter()
        batches = self._sample(step)
        rewards = torch.cat([batch.rewards for batch in batches])
        rollout = self._chosen(batches)
        row: Row = {"step": float(step), "success": math.nan}
        if len(rollout.rewards):
            row |= self._update(rollout, (step - 1) / max(self.cell.training.steps - 1, 1))
        self.sampled += len(rewards)
        row["solve_rate"] = float(rewards.mean())
        row["responses_sampled"] = float(self.sampled)
        row["seconds"] = time.perf_counter() - started
        if self.is_measured(step):
            row["success"] = self.success(step)
        return row

    def is_measured(self, step: int) -> bool:
        """Whether success is measured after a step."""
        return step % self.cell.evaluation.every == 0 or step == self.cell.training.steps

    def success(self, step: int) -> float:
        """Success on held-out questions; the estimator may learn from this validation."""
        stream = (self.cell.seed, _EVALUATION, step)
        means = warm_start.means(self.policy, self.task, self.held_out, stream)
        self.memory = self.objective.validated(self.memory, means)
        return means["score"]

    def draw(self, count: int) -> list[int]:
        """Take the next questions: as the history asks, or each once per epoch in a new order."""
        if self.history is not None:
            return self.history.draw(count, self.generator)
        while len(self._left) < count:
            self._left += torch.randperm(len(self.questions), generator=self.generator).tolist()
        drawn, self._left = self._left[:count], self._left[count:]
        return drawn

    def _sample(self, step: int) -> list[Rollout]:
        """Sample a step's batch; with `filter_groups`, until enough groups have a spread."""
        batches: list[Rollout] = []
        for attempt in range(self.cell.training.max_generation_batches):
            batches.append(self._generate((self.cell.seed, _SAMPLING, step, attempt)))
            if len(self._chosen(batches).rewards) == self.cell.training.responses_per_step:
                break
        return batches

    def _chosen(self, batches: list[Rollout]) -> Rollout:
        """What is trained on: with `filter_groups` only groups whose rewards differ."""
        whole = Rollout(
            torch.cat([batch.questions for batch in batches]),
            [prompt for batch in batches for prompt in batch.prompts],
            Responses(*map(torch.cat, zip(*(b.responses for b in batches), strict=True))),
            {name: torch.cat([b.numbers[name] for b in batches]) for name in batches[0].numbers},
        )
        if not self.objective.section.filter_groups.enable:
            return whole
        by_group = whole.rewards.view(-1, self.group)
        spread = (by_group != by_group[:, :1]).any(dim=-1).repeat_interleave(self.group)
        return whole.at(spread.nonzero().squeeze(1)[: self.cell.training.responses_per_step])

    def _generate(self, stream: tuple[int, ...]) -> Rollout:
        count = self.cell.training.responses_per_step // self.group
        drawn = self.draw(count)
        rows = torch.tensor(drawn).repeat_interleave(self.group)
        questions = [self.questions[row] for row in rows.tolist()]
        encoded = {row: self.policy.encode(self.questions[row].messages) for row in drawn}
        prompts = [encoded[row] for row in rows.tolist()]
        first = [*self.objective.temperatures(self.memory)][: self.group]
        temperatures = (first + [1.0] * (self.group - len(first))) * count
        responses, numbers = warm_start.answers(
            self.policy, self.task, questions, prompts, stream, temperatures
        )
        if first:
            # As verl's pass over the old policy does: all at temperature 1.
            with torch.no_grad():
                now = self.policy.log_probs(prompts, responses.tokens, responses.mask)
            responses = responses._replace(log_probs=now)
        return Rollout(rows, prompts, responses, numbers)

    def _update(self, rollout: Rollout, progress: float) -> Row:
        """Take a step's optimizer steps; `progress` is 0 at the first step, 1 at the last."""
        prompts, (tokens, mask, log_probs) = rollout.prompts, rollout.responses
        groups = torch.arange(len(mask)) // self.group
        known: dict[str, Any] = {
            "progress": progress,
            "memory": self.memory,
            "old_log_prob": log_probs,
            **{f"{REWARD}{name}": values for name, values in rollout.numbers.items()},
        }
        if self.history is not None:
            known["values"] = self.history.values()[rollout.questions]
        fields: dict[str, torch.Tensor] = {}
        if self.objective.needs_entropy:
            known["entropy"] = self.policy.entropy(prompts, tokens, mask)
        advantages, row, given = self.objective.advantages(rollout.rewards, groups, mask, known)
        if self.objective.loss.token_fields:
            fields = self.objective.token_fields(known["entropy"], mask, given)
        row |= self._learn(rollout)
        lengths = mask.sum(dim=-1).double()
        # Of the tokens that were drawn: an estimate of the entropy without another pass.
        row["entropy"] = -float(log_probs.sum() / mask.sum())
        row["response_length"] = float(lengths.mean())
        row["response_length_std"] = float(lengths.std())
        parts, norms = [], []
        for part in torch.arange(int(groups[-1]) + 1).chunk(self.cell.training.mini_batches):
            rows = torch.isin(groups, part).nonzero().squeeze(1)
            part_sums, norm = self._mini_batch(rollout, advantages, fields, rows)
            norms.append(norm)
            parts += [part_sums] if part_sums else []
        row["gradient_norm"] = sum(norms) / len(norms)
        if not parts:
            return row
        return row | token_means({key: sum(part[key] for part in parts) for key in parts[0]})

    def _learn(self, rollout: Rollout) -> Row:
        """Let the history of questions take in a batch; returns what it logs."""
        if self.history is None:
            return {}
        drift = torch.zeros(len(rollout.rewards), dtype=torch.float64)
        rows = rollout.questions.tolist()
        seen = [i for i, row in enumerate(rows) if row in self._last]
        if self.history.measures_drift:
            if seen:
                last = zip(*(self._last[rows[i]] for i in seen), strict=True)
                tokens, mask, log_probs = (torch.stack(part) for part in last)
                with torch.no_grad():
                    prompts = [rollout.prompts[i] for i in seen]
                    now = self.policy.log_probs(prompts, tokens, mask)
                moved = (now - log_probs).abs().double().masked_fill(~mask, 0.0)
                drift[seen] = moved.sum(dim=-1) / mask.sum(dim=-1)
            self._last |= zip(rows, zip(*rollout.responses, strict=True), strict=True)
        return self.history.learn(rollout.questions, rollout.rewards, drift, len(seen))

    def _mini_batch(
        self,
        rollout: Rollout,
        advantages: torch.Tensor,
        fields: dict[str, torch.Tensor],
        rows: torch.Tensor,
    ) -> tuple[dict[str, float], float]:
        """Take one optimizer step; return sums over tokens, and the norm before clipping."""
        whole = rollout.responses.mask[rows]
        useful = (advantages[rows] != 0).any(dim=-1)
        if self.objective.may_leave_out:
            rows = rows[useful]
        if not bool(useful.any()) and not self.objective.has_terms:
            # As in verl (`guarded_engine`): Adam's momentum alone must not move the weights.
            return {}, 0.0
        self.optimizer.zero_grad()
        _, prompts, (tokens, mask, old_log_prob), _ = rollout.at(rows)
        # Padding to the longest response of the mini-batch, as verl pads it.
        width = slice(int(whole.sum(dim=-1).max()))
        mask, counts = mask[:, width], (int(whole.sum()), len(whole))
        tokens, with_entropy = tokens[:, width], self.objective.has_entropy_term
        log_prob, entropy = self.policy.scored(prompts, tokens, mask, with_entropy)
        read = {name: field[rows, width] for name, field in fields.items()}
        try:
            slopes, sums = self.objective.gradient(
                log_prob, old_log_prob[:, width], advantages[rows, width], mask, read, counts
            )
            if self.reference is not None:
                with torch.no_grad():
                    before = self.reference.log_probs(prompts, tokens, mask)
                slopes = slopes + self.objective.kl_gradient(log_prob, before, mask, read, counts)
            if entropy is None:
                log_prob.backward(slopes)
            else:
                of_entropy = self.objective.entropy_gradient(entropy, mask, read, counts)
                torch.autograd.backward([log_prob, entropy], [slopes, of_entropy])
        except DataError as error:
            raise Diverged(str(error)) from error
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cell.training.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise Diverged("the gradient is not finite")
        self.optimizer.step()
        return sums, float(norm)
