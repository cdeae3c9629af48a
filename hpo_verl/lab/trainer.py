"""Train one cell: sample, score, weigh, update; one process, one thread or one GPU."""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from hpo_verl.core.statistics import batch_statistics, token_means
from hpo_verl.errors import DataError
from hpo_verl.lab import warm_start
from hpo_verl.lab.estimators import Batch
from hpo_verl.lab.objective import Objective, read_objective
from hpo_verl.lab.policy import Policy, Prompts
from hpo_verl.lab.questions import QuestionSource, Shuffled, SingleStream
from hpo_verl.lab.sampling import Responses, noise, sample
from hpo_verl.lab.settings import Cell

# Streams of random numbers that a seed has.
_ORDER, _SAMPLING, _EVALUATION = 1, 2, 3
Row = dict[str, float]


class Diverged(Exception):
    """A log-probability or a gradient is not finite any more."""


class Outcome(NamedTuple):
    """What a cell leaves.

    Attributes:
        rows: One per step, from 0 (the warm start); `success` is NaN where it was not measured.
        facts: `status` (`finished` or `diverged`), `seconds`, `warm_start_success`.
    """

    rows: list[Row]
    facts: dict[str, Any]


class Rollout(NamedTuple):
    """Responses of one step with their rewards; a prompt's responses stand in a row.

    Attributes:
        questions: Place of every prompt in the training set, `[prompts]`.
        prompts: The step's prompts.
        responses: `[prompts * group, time]` each.
        rewards: `[prompts * group]`.
        sampled: Responses sampled for it, those dropped included.
        solve_rate: Share of right answers among all of them.
    """

    questions: torch.Tensor
    prompts: Prompts
    responses: Responses
    rewards: torch.Tensor
    sampled: int
    solve_rate: float


def run_cell(cell: Cell, device: str = "cpu") -> Outcome:
    """Train and measure one cell; the same cell gives the same rows on one machine.

    Args:
        cell: What to run.
        device: `cpu` or a CUDA device.

    Raises:
        DataError: The warm start cannot be made.
    """
    warm_start_success = warm_start.make(cell.start)
    started = time.perf_counter()
    if device == "cpu":
        torch.set_num_threads(1)
    trainer = Trainer(cell, Policy.load(cell.start.folder, device))
    status = "finished"
    rows = [trainer.measured_row(0)]
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
    return Outcome(
        rows,
        {
            "status": status,
            "seconds": time.perf_counter() - started,
            "warm_start_success": warm_start_success,
        },
    )


class Trainer:
    """Policy, optimizer and questions of one cell.

    Args:
        cell: What to run.
        policy: The warm start; trained in place.
    """

    def __init__(self, cell: Cell, policy: Policy) -> None:
        self.cell = cell
        self.policy = policy
        self.task = cell.start.task
        self.objective: Objective = read_objective(
            cell.algorithm, self.task.max_response_length, cell.settings
        )
        settings = cell.training
        self.questions, self.held_out = self.task.questions(
            settings.questions, cell.evaluation.questions, cell.seed
        )
        self.parameters = list(policy.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=cell.learning_rate, weight_decay=0.0, fused=True
        )
        self.sampled = 0
        single_stream = self.objective.single_stream
        # Every algorithm has the same number of responses per step.
        self.group = 1 if single_stream else settings.responses_per_prompt
        self.prompts = settings.responses_per_step // self.group
        self.source: QuestionSource = (
            SingleStream(settings.questions, single_stream, cell.seed)
            if single_stream
            else Shuffled(settings.questions, (cell.seed, _ORDER))
        )

    def measured_row(self, step: int) -> Row:
        """The step's number and the success on held-out questions."""
        return {"step": float(step), "success": self._success(step)}

    def step(self, step: int) -> Row:
        """Sample, update, and describe the step; measure success where it is due.

        Raises:
            Diverged: A log-probability or the gradient is not finite.
        """
        started = time.perf_counter()
        rollout = self._rollout()
        row: Row = {"step": float(step), "success": math.nan}
        if len(rollout.rewards):
            row |= self._update(rollout, (step - 1) / max(self.cell.training.steps - 1, 1))
        row["solve_rate"] = rollout.solve_rate
        self.sampled += rollout.sampled
        row["responses_sampled"] = float(self.sampled)
        row["seconds"] = time.perf_counter() - started
        if self.is_measured(step):
            row["success"] = self._success(step)
        return row

    def is_measured(self, step: int) -> bool:
        """Whether success is measured after a step."""
        return step % self.cell.evaluation.every == 0 or step == self.cell.training.steps

    def _success(self, step: int) -> float:
        stream = (self.cell.seed, _EVALUATION, step)
        return warm_start.success_rate(self.policy, self.task, self.held_out, stream)

    def _rollout(self) -> Rollout:
        """Sample a step's batch; with `filter_groups`, until enough groups have a spread."""
        parts = [self._generate(0)]
        if self.objective.filter_groups:
            kept = [_with_spread(parts[0], self.group)]
            while (
                sum(len(part.prompts.lengths) for part in kept) < self.prompts
                and len(parts) < self.cell.training.max_generation_batches
            ):
                parts.append(self._generate(len(parts)))
                kept.append(_with_spread(parts[-1], self.group))
        else:
            kept = parts
        return _joined(kept, self.prompts, self.group)._replace(
            sampled=sum(part.sampled for part in parts),
            solve_rate=sum(part.solve_rate for part in parts) / len(parts),
        )

    def _generate(self, batch: int) -> Rollout:
        rows = self.source.draw(self.prompts)
        questions = [self.questions[row] for row in rows]
        prompts = self.policy.encode([question.messages for question in questions])
        count = len(questions) * self.group
        first = self.sampled + batch * count
        seeds = [(self.cell.seed, _SAMPLING, first + i) for i in range(count)]
        responses = sample(self.policy, prompts, noise(seeds, self.task.max_response_length))
        texts = self.policy.tokenizer.batch_decode(responses.tokens, skip_special_tokens=True)
        rewards = torch.tensor(
            [
                self.task.score(text, questions[i // self.group].ground_truth)
                for i, text in enumerate(texts)
            ]
        )
        return Rollout(
            torch.tensor(rows), prompts, responses, rewards, count, float(rewards.mean())
        )

    def _update(self, rollout: Rollout, progress: float) -> Row:
        """Take a step's optimizer steps; `progress` is 0 at the first step, 1 at the last."""
        groups = len(rollout.prompts.lengths)
        mask, entropy = rollout.responses.mask, rollout.responses.entropy
        batch = Batch(
            rewards=rollout.rewards,
            codes=torch.arange(groups).repeat_interleave(self.group),
            mask=mask.cpu(),
            entropy=entropy.cpu(),
            progress=progress,
            values=self.source.values(rollout.questions),
        )
        estimate = self.objective.estimate(batch)
        deviation = None
        if self.objective.deviation:
            deviation = self.objective.deviation(entropy, mask)
        self.source.observe(
            self.policy, rollout.questions, rollout.prompts, rollout.responses, rollout.rewards
        )
        result = estimate.responses
        lengths = batch.mask.sum(dim=-1)
        row = batch_statistics(
            alpha=result.alpha,
            positives=result.positives,
            negatives=result.negatives,
            zero_spread_groups=result.zero_spread_groups,
            groups=result.groups,
            rewards=rollout.rewards,
            live=torch.ones(len(rollout.rewards), dtype=torch.bool),
            lengths=lengths,
            advantages=result.values,
            unweighted=result.unweighted,
        )
        row["entropy"] = float(entropy.sum() / mask.sum())
        row["response_length"] = float(lengths.double().mean())
        row["response_length_std"] = float(lengths.double().std())
        advantages = estimate.advantages.to(mask.device)
        sums: dict[str, float] = {}
        norms = []
        for part in torch.arange(groups).chunk(self.cell.training.mini_batches):
            part_sums, norm = self._mini_batch(rollout, advantages, deviation, part)
            norms.append(norm)
            for key, value in part_sums.items():
                sums[key] = sums.get(key, 0.0) + value
        row["gradient_norm"] = sum(norms) / len(norms)
        return row | (token_means(sums) if sums else {})

    def _mini_batch(
        self,
        rollout: Rollout,
        advantages: torch.Tensor,
        deviation: torch.Tensor | None,
        prompts: torch.Tensor,
    ) -> tuple[dict[str, float], float]:
        """One optimizer step; returns sums over tokens and the gradient's norm before clipping."""
        rows = _rows_of(prompts, self.group)
        weights = self.objective.weights(rollout.responses.mask[rows])
        # Prompts without a spread add nothing to the gradient; their tokens count in `weights`.
        useful = (advantages[rows] != 0).view(len(prompts), -1).any(dim=-1).cpu()
        kept, kept_weights = prompts[useful], weights.view(len(prompts), self.group, -1)[useful]
        if not len(kept):
            # As in verl (`engine.step_guard`): Adam's momentum alone must not move the weights.
            return {}, 0.0
        self.optimizer.zero_grad()
        rows = _rows_of(kept, self.group)
        tokens, mask, old_log_prob, _ = (part[rows] for part in rollout.responses)
        width = int(mask.sum(dim=-1).max())
        tokens, mask, old_log_prob = (x[:, :width] for x in (tokens, mask, old_log_prob))
        chosen = Prompts(rollout.prompts.tokens[kept], rollout.prompts.lengths[kept])
        log_prob = self.policy.response_log_probs(chosen, tokens, mask)
        try:
            loss, sums = self.objective.loss(
                log_prob, old_log_prob, advantages[rows, :width], mask,
                kept_weights.flatten(0, 1)[:, :width],
                None if deviation is None else deviation[rows, :width],
            )  # fmt: skip
        except DataError as error:
            raise Diverged(str(error)) from error
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cell.training.max_grad_norm)
        if not bool(torch.isfinite(norm)):
            raise Diverged("the gradient is not finite")
        self.optimizer.step()
        return sums, float(norm)


def _rows_of(prompts: torch.Tensor, group: int) -> torch.Tensor:
    """Rows of the responses to some prompts."""
    return (prompts[:, None] * group + torch.arange(group)).flatten()


def _with_spread(rollout: Rollout, group: int) -> Rollout:
    """Keep the prompts whose responses do not all have one reward."""
    rewards = rollout.rewards.view(-1, group)
    return _chosen(rollout, (rewards != rewards[:, :1]).any(dim=-1).nonzero().squeeze(1), group)


def _joined(parts: list[Rollout], most: int, group: int) -> Rollout:
    """Put parts together and keep the first `most` prompts; padding widths may differ."""
    width = max(part.prompts.tokens.shape[1] for part in parts)
    prompts = Prompts(
        torch.cat(
            [
                torch.nn.functional.pad(
                    part.prompts.tokens, (0, width - part.prompts.tokens.shape[1])
                )
                for part in parts
            ]
        ),
        torch.cat([part.prompts.lengths for part in parts]),
    )
    responses = Responses(
        *(torch.cat(tensors) for tensors in zip(*(p.responses for p in parts), strict=True))
    )
    questions, rewards = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("questions", "rewards")
    )
    whole = Rollout(questions, prompts, responses, rewards, 0, 0.0)
    return _chosen(whole, torch.arange(min(most, len(prompts.lengths))), group)


def _chosen(rollout: Rollout, prompts: torch.Tensor, group: int) -> Rollout:
    rows = _rows_of(prompts, group)
    return rollout._replace(
        questions=rollout.questions[prompts],
        prompts=Prompts(rollout.prompts.tokens[prompts], rollout.prompts.lengths[prompts]),
        responses=Responses(*(tensor[rows] for tensor in rollout.responses)),
        rewards=rollout.rewards[rows],
    )
