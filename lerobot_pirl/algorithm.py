"""piRL's update: PPO over the stochastic denoising steps of a rollout."""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from lerobot.optim import LRSchedulerConfig
from lerobot.rl.algorithms.base import RLAlgorithm
from lerobot.rl.algorithms.configs import TrainingStats
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lerobot_pirl import flow, ppo
from lerobot_pirl.diagnostics import LOSSES, POLICY, VALUE, training_stats
from lerobot_pirl.options import PiRLConfig
from lerobot_pirl.policies.base import PolicyAdapter, chain_log_prob
from lerobot_pirl.rollout import Rollout, compute_returns, derive_seed, group_returns
from lerobot_pirl.value import make_value_head
from lerobot_pirl.weights import load_weights, trainable_parameters


class PiRLAlgorithm(RLAlgorithm):
    """Owns the value head, which advantages from groups do without, and the optimiser; updates the policy in place."""

    config_class = PiRLConfig
    name = "pi-rl"

    def __init__(
        self,
        adapter: PolicyAdapter,
        config: PiRLConfig,
        seed: int = 0,
        schedule: LRSchedulerConfig | None = None,
        steps: int = 1,
    ) -> None:
        """Build the value head, the optimiser and its scheduler.

        Args:
            adapter: the policy, already frozen where it does not train.
            config: validated options.
            seed: seed of the order of minibatches.
            schedule: of the learning rates over the updates, LeRobot's; None leaves them as they are.
            steps: number of updates that the schedule is made for.
        """
        self.adapter = adapter
        self.policy = adapter.policy
        self.config = config
        self.device = adapter.noise_std.device
        self.value_head: nn.Module | None = None
        if config.advantage == "gae":
            head = make_value_head(adapter.value_input_dim, config.value_hidden_dims)
            self.value_head = head.to(self.device)
        self.schedule, self.steps = schedule, steps
        self.optimizer, self.scheduler = self.build_optimizer()
        self.seed = seed
        self.step_weights = self._make_step_weights()
        self.skipped_steps = 0

    def _make_step_weights(self) -> Tensor:
        num_steps = self.config.num_denoising_steps
        if self.config.step_loss_weight == "none":
            return torch.ones(num_steps, device=self.device)
        step_prob = torch.full((num_steps,), (1 - self.config.last_step_prob) / (num_steps - 1))
        step_prob[-1] = self.config.last_step_prob
        return flow.inverse_sensitivity(self.adapter.noise_std.cpu(), step_prob).to(self.device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the policy parameters that train, by name."""
        return trainable_parameters(self.policy)

    def build_optimizer(self) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """Return a new AdamW over policy weights with decay, without decay, and the value head; and its scheduler."""
        config = self.config
        spared = self.adapter.no_decay()
        trainable = self.trainable_parameters()
        groups = [
            {"params": [p for n, p in trainable.items() if n not in spared], "lr": config.learning_rate},
            {
                "params": [p for n, p in trainable.items() if n in spared],
                "lr": config.learning_rate,
                "weight_decay": 0.0,
            },
        ]
        if self.value_head:
            groups.append({"params": list(self.value_head.parameters()), "lr": config.value_learning_rate})
        optimizer = torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)
        return optimizer, self.schedule.build(optimizer, self.steps) if self.schedule else None

    def make_optimizers_and_scheduler(self) -> dict[str, torch.optim.Optimizer]:
        """Make optimiser and scheduler anew and return the optimiser by its name."""
        self.optimizer, self.scheduler = self.build_optimizer()
        return self.get_optimizers()

    def get_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimiser for checkpointing."""
        return {self.name: self.optimizer}

    def get_weights(self) -> dict[str, Any]:
        """Return the trainable policy weights, which is all an actor needs."""
        return {name: p.detach() for name, p in self.trainable_parameters().items()}

    def load_weights(self, weights: dict[str, Any], device: str | torch.device = "cpu") -> None:
        """Copy weights made by :meth:`get_weights` into the policy."""
        load_weights(self.policy, weights)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the value head's tensors."""
        state = self.value_head.state_dict() if self.value_head else {}
        return {f"value_head.{name}": value for name, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Copy tensors made by :meth:`state_dict` in place; raises RuntimeError when names or shapes differ."""
        if self.value_head:
            prefix = "value_head."
            self.value_head.load_state_dict({k.removeprefix(prefix): v for k, v in state_dict.items()})

    @torch.no_grad()
    def values(self, features: dict[str, Tensor]) -> Tensor:
        """Return the value of every observation, float32 ``[N]`` on the CPU."""
        num_rows = len(next(iter(features.values())))
        parts = [torch.zeros(0)]
        for start in range(0, num_rows, self.config.minibatch_size):
            rows = slice(start, start + self.config.minibatch_size)
            parts.append(self._value(self._take(features, rows)).cpu())
        return torch.cat(parts)

    def _value(self, features: dict[str, Tensor]) -> Tensor:
        return self.value_head(self.adapter.value_input(features)).squeeze(1)

    def _take(self, tensors: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
        return {name: value[rows].to(self.device) for name, value in tensors.items()}

    def update(self, batch_iterator: Iterator[Rollout]) -> TrainingStats:
        """Run one iteration: advantages, then epochs over minibatches of one rollout.

        Args:
            batch_iterator: yields the rollout to learn from.

        Returns:
            Losses, gradient norms and diagnostics; per denoising step under ``approx_kl_step<i>`` and
            ``clip_fraction_step<i>``.
        """
        rollout = next(batch_iterator)
        config = self.config
        targets, extra = (
            self._group_targets(rollout) if self.value_head is None else self._gae_targets(rollout)
        )
        weights = ppo.sample_weights(rollout.episode_lengths, config.loss_aggregation)
        if "kept" in targets:
            weights = weights / weights[targets["kept"]].mean()
        data = targets | {
            "chain": rollout.chain,
            "step_index": rollout.step_index,
            "gripper": rollout.gripper,
            "old_log_prob": rollout.log_prob,
            "weights": weights,
        }
        warming_up = self.value_head is not None and self.optimization_step < config.critic_warmup_iterations
        noise_scale = config.noise_scale(rollout.policy_version)
        records = self._run_epochs(rollout.features, data, not warming_up, noise_scale)
        extra |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "noise_scale": noise_scale}
        extra["skipped_steps"] = float(self.skipped_steps)
        self.optimization_step += 1
        if self.scheduler:
            self.scheduler.step()
        return training_stats(records, config.num_denoising_steps, extra)

    def _gae_targets(self, rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return what the losses need of every row, by generalised advantages, and what to log about it."""
        config = self.config
        old_values = self.values(rollout.features)
        advantages, returns = compute_returns(
            rollout,
            old_values,
            self.values(rollout.final_features),
            config.gamma,
            config.gae_lambda,
            config.bootstrap_truncation,
        )
        extra = {
            "explained_variance": ppo.explained_variance(old_values, returns),
            "value_mean": float(old_values.mean()),
            "return_mean": float(returns.mean()),
            "advantage_std": float(advantages.std(unbiased=False)),
        }
        if config.normalize_advantage:
            advantages = ppo.normalize_advantages(advantages)
        return {"old_values": old_values, "returns": returns, "advantages": advantages}, extra

    def _group_targets(self, rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the same by comparison within groups; ``kept`` tells the rows of groups that are learned from.

        Raises:
            ValueError: when the episodes do not come in groups that share task and initial state.
        """
        config = self.config
        size = config.resolved_group_size
        returns, kept = (
            group_returns(rollout, size),
            torch.ones(len(rollout.success) // size, dtype=torch.bool),
        )
        if config.group_filter is not None:
            kept = ppo.groups_in_range(rollout.success, size, *config.group_filter)
        lengths = rollout.episode_lengths
        advantages = ppo.group_advantages(returns, size).repeat_interleave(lengths)
        extra = {
            "groups_kept": float(kept.float().mean()),
            "return_mean": float(returns.mean()),
            "advantage_std": float(advantages.std(unbiased=False)),
        }
        rows = kept.repeat_interleave(size).repeat_interleave(lengths)
        return {"advantages": advantages, "kept": rows}, extra

    def _run_epochs(
        self, features: dict[str, Tensor], data: dict[str, Tensor], train_policy: bool, noise_scale: float
    ) -> list[dict[str, Any]]:
        """Step the optimiser over all minibatches of all epochs; one record per minibatch, none without a row."""
        records: list[dict[str, Any]] = []
        # a function of seed and step, so that a resumed run draws the same order without saved state
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.optimization_step))
        num_rows = len(data["advantages"])
        for _ in range(self.config.n_epochs):
            order = torch.randperm(num_rows, generator=generator)
            if "kept" in data:
                order = order[data["kept"][order]]
            if len(order) == 0:
                return records
            # of nearly equal size, lest a rest of a few samples moves the weights as far as a whole minibatch
            for rows in order.tensor_split(math.ceil(len(order) / self.config.minibatch_size)):
                records.append(self._minibatch(features, data, rows, train_policy, noise_scale))
                target = self.config.target_kl
                if target is not None and records[-1]["approx_kl"] > target:
                    records[-1]["kl_stop"] = True
                    return records
        return records

    def _minibatch(
        self,
        features: dict[str, Tensor],
        data: dict[str, Tensor],
        rows: Tensor,
        train_policy: bool,
        noise_scale: float,
    ) -> dict[str, Any]:
        """Accumulate the gradient of one minibatch in micro-batches and step the optimiser."""
        self.optimizer.zero_grad(set_to_none=True)
        total = defaultdict(float)
        per_sample: dict[str, list[Tensor]] = defaultdict(list)
        for micro in rows.split(self.config.micro_batch_size):
            loss, sums, samples = self._losses(
                self._take(features, micro), self._take(data, micro), train_policy, noise_scale
            )
            (loss / len(rows)).backward()
            for name, value in sums.items():
                total[name] += value.item() / len(rows)
            for name, value in samples.items():
                per_sample[name].append(value.cpu())
        record = dict(total) | {name: torch.cat(parts) for name, parts in per_sample.items()}
        record["approx_kl"] = float(record["kl"].mean())
        record |= self._step(record)
        return record

    def _losses(
        self, features: dict[str, Tensor], data: dict[str, Tensor], train_policy: bool, noise_scale: float
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the summed loss of a micro-batch, its parts (sums) and per-sample diagnostics."""
        config = self.config
        with torch.set_grad_enabled(train_policy):
            log_prob, _ = chain_log_prob(
                self.adapter, features, data["chain"], data["step_index"], data["gripper"], noise_scale
            )
            log_ratio = log_prob - data["old_log_prob"]
            ratio = log_ratio.exp()
            step_weight = self.step_weights[data["step_index"]].mean(dim=1)
            surrogate = ppo.policy_loss(ratio, data["advantages"], config.clip_range, config.dual_clip)
            policy_sum = (surrogate * step_weight * data["weights"]).sum()
        samples = {
            "kl": ppo.approx_kl(log_ratio.detach()),
            "kl_k1": -log_ratio.detach(),
            "clipped": ppo.clip_fraction(ratio.detach(), config.clip_range),
            "ratio": ratio.detach(),
            "step_index": data["step_index"][:, 0],
        }
        sums = {"policy_loss": policy_sum.detach()}
        if self.value_head is None:
            return policy_sum, sums, samples
        values = self._value(features)
        value = ppo.value_loss(
            values, data["old_values"], data["returns"], config.clip_range_vf, config.huber_delta
        )
        value_sum = (value * data["weights"]).sum()
        change = (values.detach() - data["old_values"]).abs()
        vf_clipped = change > (math.inf if config.clip_range_vf is None else config.clip_range_vf)
        loss = value_sum + policy_sum if train_policy else value_sum
        sums["value_loss"] = value_sum.detach()
        return loss, sums, samples | {"vf_clipped": vf_clipped.float()}

    def _step(self, record: dict[str, Any]) -> dict[str, float]:
        """Clip gradients per group and step; a minibatch with a number that is not finite changes nothing."""
        limit = self.config.grad_clip_norm
        groups = {POLICY: list(self.trainable_parameters().values())}
        if self.value_head:
            groups[VALUE] = list(self.value_head.parameters())
        norms = {name: float(nn.utils.clip_grad_norm_(group, limit)) for name, group in groups.items()}
        losses = [value for name, value in record.items() if name in LOSSES]
        if all(math.isfinite(number) for number in (*norms.values(), *losses)):
            self.optimizer.step()
        else:
            self.skipped_steps += 1
        return {f"{name}_grad_norm": norm for name, norm in norms.items()}
