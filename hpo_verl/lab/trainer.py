"""Train one cell: sample, score, weigh, update; one process and one thread."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from hpo_verl.algorithms.base import REWARD
from hpo_verl.lab import warm_start
from hpo_verl.lab.coverage import coverage
from hpo_verl.lab.dissection import dissect
from hpo_verl.lab.learner import Diverged, Learner
from hpo_verl.lab.past import Past
from hpo_verl.lab.policy import Policy
from hpo_verl.lab.recipes import read_objective
from hpo_verl.lab.rollout import COVERAGE, EVALUATION, SAMPLING, Rollout, answers, join, means
from hpo_verl.lab.settings import Cell

Row = dict[str, float]


class Outcome(NamedTuple):
    """What a cell leaves: a row per step from 0 on, and the facts of `report.studies.Result`."""

    rows: list[Row]
    facts: dict[str, Any]


def run_cell(cell: Cell) -> Outcome:
    """Train and measure one cell; the same cell gives the same rows on one machine."""
    warm_start_success = warm_start.make(cell)
    folder = warm_start.policy_folder(cell)
    began_with = warm_start.weights_digest(folder)
    started = time.perf_counter()
    trainer = Trainer(cell, Policy.load(folder))
    status = "finished"
    rows: list[Row] = [{"step": 0.0, "success": trainer.success(0), **trainer.coverage(0)}]
    try:
        for step in range(1, cell.training.steps + 1):
            rows.append(trainer.step(step))
        rows[-1] |= trainer.coverage(cell.training.steps)
    except Diverged:
        status = "diverged"
        # A run that is lost counts as one without success, to the end of its budget.
        rows += [
            {"step": float(step), "success": 0.0 if trainer.is_measured(step) else math.nan}
            for step in range(len(rows), cell.training.steps + 1)
        ]
        rows[-1] |= dict.fromkeys((name for name in rows[0] if name.startswith("pass@")), 0.0)
    facts = {
        "status": status,
        "seconds": time.perf_counter() - started,
        "warm_start_success": warm_start_success,
        "began_with": began_with,
    }
    return Outcome(rows, facts)


class Trainer:
    """Questions and learner of one cell, and the warm start's policy, trained in place."""

    def __init__(self, cell: Cell, policy: Policy) -> None:
        self.cell = cell
        self.policy = policy
        self.task = cell.setting
        self.objective = read_objective(self.task, cell.algorithm, cell.settings, cell.longest)
        settings = cell.training
        sizes = settings.questions, cell.evaluation.questions
        self.questions, self.held_out = self.task.questions(*sizes, cell.seed)
        self.learner = Learner(policy, self.objective, settings)
        self.past = Past(policy, settings.lag)
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
        self.past.advance()
        batches = self._sample(step)
        rewards = torch.cat([batch.rewards for batch in batches])
        rollout = self._chosen(batches)
        row: Row = {"step": float(step), "success": math.nan}
        if len(rollout.rewards):
            row |= self._update(rollout, step)
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
        stream = (self.cell.seed, EVALUATION, step)
        found = means(self.policy, self.task, self.held_out, stream, self.cell.longest)
        self.memory = self.objective.validated(self.memory, found)
        return found["score"]

    def coverage(self, step: int) -> Row:
        """pass@k on held-out questions, where the study asks for it."""
        settings, stream = self.cell.evaluation, (self.cell.seed, COVERAGE, step)
        if not settings.samples:
            return {}
        questions = self.held_out[: settings.sampled_questions]
        return coverage(
            self.policy, self.task, questions, stream, self.cell.longest, settings.samples
        )

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
            batches.append(self._generate((self.cell.seed, SAMPLING, step, attempt)))
            if len(self._chosen(batches).rewards) == self.cell.training.responses_per_step:
                break
        return batches

    def _chosen(self, batches: list[Rollout]) -> Rollout:
        """What is trained on: with `filter_groups` only groups whose rewards differ."""
        whole = join(batches)
        if not self.objective.section.filter_groups.enable:
            return whole
        by_group = whole.rewards.view(-1, self.group)
        spread = (by_group != by_group[:, :1]).any(dim=-1).repeat_interleave(self.group)
        return whole.at(spread.nonzero().squeeze(1)[: self.cell.training.responses_per_step])

    def _generate(self, stream: tuple[int, ...]) -> Rollout:
        count = self.cell.training.responses_per_step // self.group
        rows = torch.tensor(self.draw(count)).repeat_interleave(self.group)
        questions = [self.questions[row] for row in rows.tolist()]
        first = [*self.objective.temperatures(self.memory)][: self.group]
        temperatures = (first + [1.0] * (self.group - len(first))) * count
        sampler, longest = self.past.sampler, self.cell.longest
        found = answers(sampler, self.task, questions, stream, longest, temperatures)
        responses = found.responses
        if first:
            # As verl's pass over the old policy does: all at temperature 1.
            with torch.no_grad():
                now = sampler.log_probs(found.prompts, responses.tokens, responses.mask)
            responses = responses._replace(log_probs=now)
        return found._replace(questions=rows, responses=responses)

    def _update(self, rollout: Rollout, step: int) -> Row:
        """Take a step's optimizer steps, and describe its batch."""
        prompts, (tokens, mask, log_probs) = rollout.prompts, rollout.responses
        groups = torch.arange(len(mask)) // self.group
        known: dict[str, Any] = {
            "progress": (step - 1) / max(self.cell.training.steps - 1, 1),
            "memory": self.memory,
            "old_log_prob": log_probs,
            **{f"{REWARD}{name}": values for name, values in rollout.numbers.items()},
        }
        if self.history is not None:
            known["values"] = self.history.values()[rollout.questions]
        if self.objective.needs_entropy:
            known["entropy"] = self.policy.entropy(prompts, tokens, mask)
        advantages, row, given = self.objective.advantages(rollout.rewards, groups, mask, known)
        fields: dict[str, torch.Tensor] = {}
        if self.objective.loss.token_fields:
            fields = self.objective.token_fields(known["entropy"], mask, given)
        row |= self._learn(rollout)
        row |= rollout.described(self.policy.ends)
        every = self.cell.evaluation.dissect_every
        if every and (step - 1) % every == 0:
            row |= dissect(self.learner, rollout, advantages, fields)
        return row | self.learner.update(rollout, advantages, fields, self.group)

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
