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
from lerobot_pirl.objective import decision_distributions, policy_objective, value_objective
from lerobot_pirl.options import PiRLConfig
from lerobot_pirl.parallel import ALONE, World
from lerobot_pirl.policies.base import PolicyAdapter, noise_head
from lerobot_pirl.rollout import Rollout, derive_seed
from lerobot_pirl.targets import gae_targets, group_targets
from lerobot_pirl.value import make_value_head
from lerobot_pirl.weights import NOISE_HEAD, load_weights, replaced, trainable_parameters

VALUE_HEAD, START = "value_head.", "start."


class PiRLAlgorithm(RLAlgorithm):
    """Owns the value head and the optimiser; updates the policy and its noise head in place.

    Advantages from groups do without a value head. With ``kl_coef``, ``start`` holds the weights that the run began with.
    """

    config_class = PiRLConfig
    name = "pi-rl"

    def __init__(
        self,
        adapter: PolicyAdapter,
        config: PiRLConfig,
        seed: int = 0,
        schedule: LRSchedulerConfig | None = None,
        steps: int = 1,
        world: World = ALONE,
    ) -> None:
        """Build the value head, the optimiser and its scheduler.

        Args:
            adapter: the policy, already frozen where it does not train.
            config: validated options.
            seed: seed of the order of minibatches.
            schedule: of the learning rates over the updates, LeRobot's; None leaves them as they are.
            steps: number of updates that the schedule is made for.
            world: the processes that update together, all with the same rollout.
        """
        self.adapter = adapter
        self.policy = adapter.policy
        self.config = config
        self.noise_head = noise_head(adapter)
        self.device = adapter.noise_std.device
        self.value_head: nn.Module | None = None
        if config.advantage == "gae":
            head = make_value_head(adapter.value_input_dim, config.value_hidden_dims)
            self.value_head = head.to(self.device)
        # looked up for every minibatch
        self._trainable = trainable_parameters(self.policy, self.noise_head)
        compared = self._trainable if config.kl_coef else {}
        self.start = {name: p.detach().clone() for name, p in compared.items()}
        self.schedule, self.steps = schedule, steps
        self.optimizer, self.scheduler = self.build_optimizer()
        self.seed, self.world = seed, world
        self.step_weights = self._make_step_weights()
        self.skipped_steps = 0

    def _make_step_weights(self) -> Tensor:
        num_steps = self.config.num_denoising_steps
        if self.noise_head is not None or self.config.step_loss_weight == "none":
            return torch.ones(num_steps, device=self.device)
        step_prob = torch.full((num_steps,), (1 - self.config.last_step_prob) / (num_steps - 1))
        step_prob[-1] = self.config.last_step_prob
        return flow.inverse_sensitivity(self.adapter.noise_std.cpu(), step_prob).to(self.device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of policy and noise head that train, by name."""
        return self._trainable

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
        # fused: one pass over each parameter; on a CPU, a small policy's step takes a twentieth of the time
        options = {"betas": config.betas, "weight_decay": config.weight_decay, "fused": True}
        optimizer = torch.optim.AdamW(groups, **options)
        return optimizer, self.schedule.build(optimizer, self.steps) if self.schedule else None

    def make_optimizers_and_scheduler(self) -> dict[str, torch.optim.Optimizer]:
        """Make optimiser and scheduler anew and return the optimiser by its name."""
        self.optimizer, self.scheduler = self.build_optimizer()
        return self.get_optimizers()

    def get_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """Return the optimiser for checkpointing."""
        return {self.name: self.optimizer}

    def get_weights(self) -> dict[str, Any]:
        """Return the trainable weights of policy and noise head, as precise as an actor reads them."""
        names = getattr(self.adapter, "bfloat16_inputs", set)()
        weights = {name: p.detach() for name, p in self.trainable_parameters().items()}
        return {name: value.bfloat16() if name in names else value for name, value in weights.items()}

    def load_weights(self, weights: dict[str, Any], device: str | torch.device = "cpu") -> None:
        """Copy weights made by :meth:`get_weights` into the policy and its noise head."""
        load_weights(self.policy, weights, self.noise_head)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of value head and noise head, and the starting policy's."""
        heads = ((VALUE_HEAD, self.value_head), (NOISE_HEAD, self.noise_head))
        parts = [(prefix, head.state_dict()) for prefix, head in heads if head] + [(START, self.start)]
        return {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], device: str | torch.device = "cpu") -> None:
        """Copy tensors made by :meth:`state_dict` in place; raises RuntimeError when names or shapes differ."""
        mine = self.state_dict()
        if odd := sorted(set(mine) ^ set(state_dict)):
            raise RuntimeError(f"the algorithm's tensors differ in {len(odd)} names, the first is {odd[0]!r}")
        for name, value in mine.items():
            if value.shape != state_dict[name].shape:
                raise RuntimeError(
                    f"{name!r} has shape {tuple(state_dict[name].shape)} instead of {tuple(value.shape)}"
                )
            value.copy_(state_dict[name])

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
        if self.value_head is None:
            targets, extra = group_targets(rollout, config)
        else:
            values, final_values = (self.values(f) for f in (rollout.features, rollout.final_features))
            targets, extra = gae_targets(rollout, values, final_values, config)
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
        if self.start:
            data |= self._start_distributions(rollout.features, data, noise_scale)
        records = self._run_epochs(rollout.features, data, not warming_up, noise_scale)
        extra |= {"learning_rate": self.optimizer.param_groups[0]["lr"], "noise_scale": noise_scale}
        extra["skipped_steps"] = float(self.skipped_steps)
        self.optimization_step += 1
        if self.scheduler:
            self.scheduler.step()
        return training_stats(records, config.num_denoising_steps, extra)

    @torch.no_grad()
    def _start_distributions(
        self, features: dict[str, Tensor], data: dict[str, Tensor], noise_scale: float
    ) -> dict[str, Tensor]:
        """Return what the starting policy draws every row's decision from: once for all epochs."""
        parts = []
        num_rows = len(data["advantages"])
        share, _ = self.world.share(torch.arange(num_rows))
        with replaced(self.trainable_parameters(), self.start):
            for rows in share.split(self.config.micro_batch_size):
                batch = self._take(features, rows), self._take(data, rows)
                found = decision_distributions(self.adapter, *batch, noise_scale)
                parts.append({name: value.cpu() for name, value in found.items()})
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: self.world.join(value, num_rows) for name, value in found.items()}

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
        share, counts = self.world.share(rows)
        for micro in share.split(self.config.micro_batch_size):
            loss, sums, samples = self._losses(
                self._take(features, micro), self._take(data, micro), train_policy, noise_scale
            )
            (counts * loss / len(rows)).backward()
            for name, value in sums.items():
                total[name] += counts * value.item() / len(rows)
            for name, value in samples.items():
                per_sample[name].append(value.cpu())
        record: dict[str, Any] = self.world.add(dict(total))
        for name, parts in per_sample.items():
            record[name] = self.world.join(torch.cat(parts), len(rows))
        self.world.add_gradients(p for group in self.optimizer.param_groups for p in group["params"])
        record["approx_kl"] = float(record["kl"].mean())
        record |= self._step(record)
        return record

    def _losses(
        self, features: dict[str, Tensor], data: dict[str, Tensor], train_policy: bool, noise_scale: float
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the summed loss of a micro-batch, its parts (sums) and per-sample diagnostics."""
        with torch.set_grad_enabled(train_policy):
            policy_sum, sums, samples = policy_objective(
                self.adapter, self.config, self.step_weights, features, data, noise_scale
            )
        if self.value_head is None:
            return policy_sum, sums, samples
        value_sum, value_sums, value_samples = value_objective(self._value(features), self.config, data)
        loss = value_sum + policy_sum if train_policy else value_sum
        return loss, sums | value_sums, samples | value_samples

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
