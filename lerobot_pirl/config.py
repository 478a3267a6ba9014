"""The recipe's options: ``algorithm`` of type ``pi-rl`` and the run config with the field ``recipe``."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.default import DatasetConfig
from lerobot.rl.algorithms.configs import RLAlgorithmConfig
from lerobot.rl.train_rl import TrainRLServerPipelineConfig

from lerobot_pirl.envs import tabletop  # noqa: F401  (registers the environment type `tabletop`)
from lerobot_pirl.registry import Recipe


@dataclass
class WireConfig:
    """Where the two processes meet; no field of it changes what is learned."""

    # Address the learner listens on and the actor connects to.
    host: str = "127.0.0.1"
    # TCP port of the learner, 1 to 65535.
    port: int = 50051
    # Seconds the actor tries to reach a learner before it gives up; first contact and every reconnection.
    connect_timeout_s: float = 300.0
    # Seconds the learner waits for a rollout before it gives up.
    rollout_timeout_s: float = 3600.0


@RLAlgorithmConfig.register_subclass("pi-rl")
@dataclass
class PiRLConfig(RLAlgorithmConfig):
    """piRL: PPO over the denoising chain of a flow-matching policy."""

    # How the denoising chain explores. flow_sde: one stochastic step per chunk.
    variant: str = "flow_sde"
    # Denoising steps K of rollout, update and the saved policy, at least 2.
    num_denoising_steps: int = 5
    # Executed rows of every predicted chunk.
    n_action_steps: int = 10
    # Noise level `a` of the steps before the last (piRL 0.5; X-VLA's metre-scale actions want less), > 0.
    noise_level: float = 0.3
    # Std of the last step on position channels, in metres, > 0.
    last_step_std_position: float = 0.005
    # Std of the last step on 6-D rotation channels, > 0.
    last_step_std_rotation: float = 0.03
    # Probability that the last step is the stochastic one, in (0, 1].
    last_step_prob: float = 0.5
    # Gripper: `exclude` thresholds its logit; `bernoulli_last` draws it when the last step is stochastic.
    gripper: str = "exclude"
    # Temperature of `bernoulli_last` (0.5 when not given), > 0; refused with `exclude`.
    gripper_temperature: float | None = None

    # Episodes of every iteration, over all environments and tasks.
    episodes_per_iteration: int = 64
    # Environments that the actor steps side by side.
    n_envs: int = 16
    # Step the environments in worker processes instead of in the actor's own.
    async_envs: bool = False
    # Step limit of an episode; not given: the environment's own.
    max_episode_steps: int | None = None

    # Discount per executed chunk, in [0, 1].
    gamma: float = 0.99
    # GAE's lambda per executed chunk, in [0, 1].
    gae_lambda: float = 0.95
    # Bootstrap the value of the last observation of an episode that ran out of time (RLinf: false).
    bootstrap_truncation: bool = True
    # `token`: every chunk weighs the same; `episode`: every episode does.
    loss_aggregation: str = "token"
    # Scale advantages of an iteration to mean 0 and std 1.
    normalize_advantage: bool = True
    # Loss weight per denoising step: `inv_sensitivity` levels their gradients, `none` leaves them.
    step_loss_weight: str = "inv_sensitivity"

    # PPO's clip range of the probability ratio, in (0, 1).
    clip_range: float = 0.2
    # Bound of the loss of negative advantages, > 1; null turns it off.
    dual_clip: float | None = 3.0
    # Clip range of the value function's change, > 0; null turns it off.
    clip_range_vf: float | None = 0.2
    # Where the value loss turns from quadratic to linear, > 0.
    huber_delta: float = 10.0
    # Passes over a rollout, at least 1.
    n_epochs: int = 1
    # Samples per optimiser step.
    minibatch_size: int = 512
    # Samples per forward and backward pass; gradients accumulate up to minibatch_size.
    micro_batch_size: int = 32
    # End the update when the mean k3 KL of a minibatch exceeds this, > 0; null turns it off.
    target_kl: float | None = 0.02
    # First iterations that train the value head alone.
    critic_warmup_iterations: int = 3

    # AdamW learning rate of the policy, >= 0.
    learning_rate: float = 2e-6
    # AdamW learning rate of the value head, >= 0.
    value_learning_rate: float = 1e-4
    # AdamW betas, each in [0, 1).
    betas: tuple[float, float] = (0.9, 0.95)
    # AdamW weight decay, >= 0; never on tables with a row per domain.
    weight_decay: float = 0.01
    # Gradient clipping by norm, per group (policy, value head), > 0.
    grad_clip_norm: float = 1.0
    # Hidden layers of the value head.
    value_hidden_dims: tuple[int, ...] = (512, 256, 128)

    # How learner and actor talk.
    wire: WireConfig = field(default_factory=WireConfig)

    @classmethod
    def from_policy_config(cls, policy_cfg: Any) -> "PiRLConfig":
        """Return the defaults; the policy's config holds nothing that changes them."""
        return cls()

    @property
    def resolved_gripper_temperature(self) -> float | None:
        """Temperature of the gripper's Bernoulli, None where it is thresholded."""
        if self.gripper == "exclude":
            return None
        return 0.5 if self.gripper_temperature is None else self.gripper_temperature

    def validate(self) -> None:
        """Check every value.

        Raises:
            ValueError: one sentence with the field's full name, its value and the allowed range.
        """
        _one_of(self, "variant", ("flow_sde",))
        _one_of(self, "gripper", ("exclude", "bernoulli_last"))
        _one_of(self, "loss_aggregation", ("token", "episode"))
        _one_of(self, "step_loss_weight", ("inv_sensitivity", "none"))
        _integers(self, 2, ["num_denoising_steps"])
        _integers(
            self,
            1,
            [
                *("n_action_steps", "episodes_per_iteration", "n_envs", "n_epochs"),
                *("minibatch_size", "micro_batch_size"),
            ],
        )
        _integers(self, 0, ["critic_warmup_iterations"])
        if self.max_episode_steps is not None:
            _integers(self, 1, ["max_episode_steps"])
        positive = ["noise_level", "last_step_std_position", "last_step_std_rotation", "huber_delta"]
        positive += ["grad_clip_norm"]
        optional = ("gripper_temperature", "clip_range_vf", "target_kl")
        positive += [name for name in optional if getattr(self, name) is not None]
        _numbers(self, positive, "a finite number > 0", lambda x: x > 0)
        at_least_zero = ["learning_rate", "value_learning_rate", "weight_decay"]
        _numbers(self, at_least_zero, "a finite number >= 0", lambda x: x >= 0)
        _numbers(self, ["gamma", "gae_lambda"], "in [0, 1]", lambda x: 0 <= x <= 1)
        _numbers(self, ["last_step_prob"], "in (0, 1]", lambda x: 0 < x <= 1)
        _numbers(self, ["clip_range"], "in (0, 1)", lambda x: 0 < x < 1)
        if self.dual_clip is not None:
            _numbers(self, ["dual_clip"], "a finite number > 1 or null", lambda x: x > 1)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            _refuse("betas", self.betas, "two numbers in [0, 1)")
        if not self.value_hidden_dims or min(self.value_hidden_dims) < 1:
            _refuse("value_hidden_dims", self.value_hidden_dims, "one or more integers >= 1")
        if self.gripper_temperature is not None and self.gripper == "exclude":
            raise ValueError(
                f"algorithm.gripper_temperature={self.gripper_temperature} does nothing with "
                "algorithm.gripper='exclude'; remove it or set algorithm.gripper to 'bernoulli_last'"
            )
        if self.micro_batch_size > self.minibatch_size:
            raise ValueError(
                f"algorithm.micro_batch_size={self.micro_batch_size} exceeds algorithm.minibatch_size="
                f"{self.minibatch_size}; lower algorithm.micro_batch_size"
            )
        if not 0 <= self.wire.port <= 65535:
            _refuse("wire.port", self.wire.port, "an integer from 0 (any free port) to 65535")
        for name in ("connect_timeout_s", "rollout_timeout_s"):
            if not 0 < getattr(self.wire, name) < math.inf:
                _refuse(f"wire.{name}", getattr(self.wire, name), "a finite number > 0")


def _refuse(name: str, value: Any, allowed: str) -> None:
    raise ValueError(f"algorithm.{name}={value!r} is not allowed; it must be {allowed}")


def _one_of(config: PiRLConfig, name: str, choices: Iterable[str]) -> None:
    if getattr(config, name) not in choices:
        _refuse(name, getattr(config, name), "one of " + ", ".join(map(repr, choices)))


def _integers(config: PiRLConfig, minimum: int, names: Iterable[str]) -> None:
    for name in names:
        if getattr(config, name) < minimum:
            _refuse(name, getattr(config, name), f"an integer >= {minimum}")


def _numbers(config: PiRLConfig, names: Iterable[str], allowed: str, test: Any) -> None:
    for name in names:
        value = getattr(config, name)
        if not (math.isfinite(value) and test(value)):
            _refuse(name, value, allowed)


@dataclass(kw_only=True)
class PiRLTrainConfig(TrainRLServerPipelineConfig):
    """LeRobot's RL run config with the recipe that runs it."""

    # Who runs learner and actor: the name of a recipe, here `pi-rl`.
    recipe: str | None = None

    def validate(self, check_output_dir: bool = True) -> None:
        """Check the whole config as LeRobot does, without asking for a dataset.

        Args:
            check_output_dir: refuse an existing output folder unless resuming; the actor writes nothing there.

        Raises:
            ValueError: one sentence that names the field, its value and what is allowed.
            FileExistsError: when the output folder exists and the run is not a resume.
        """
        if self.recipe != "pi-rl":
            raise ValueError(f"recipe={self.recipe!r} does not fit this config; it must be 'pi-rl'")
        if self.algorithm is None:
            self.algorithm = PiRLConfig()
        if not isinstance(self.algorithm, PiRLConfig):
            raise ValueError(
                f"recipe='pi-rl' and algorithm.type={self.algorithm.type!r} disagree; remove `algorithm.type` or "
                "set it to 'pi-rl'"
            )
        self.algorithm.validate()
        if self.env is None:
            raise ValueError(
                "env is missing; name the environment to train in, for example env.type 'libero'"
            )
        if self.dataset is not None:
            raise ValueError(
                f"dataset.repo_id={self.dataset.repo_id!r} does nothing in recipe 'pi-rl', which learns from "
                "its own rollouts; remove `dataset`"
            )
        if self.steps < 1:
            raise ValueError(
                f"steps={self.steps} is not allowed; it is the number of updates, an integer >= 1"
            )
        if self.seed is None or self.seed < 0:
            raise ValueError(f"seed={self.seed} is not allowed; it must be an integer >= 0")
        self._validate_upstream(check_output_dir)

    def _validate_upstream(self, check_output_dir: bool) -> None:
        output_dir = self.output_dir
        # TrainPipelineConfig.validate reads fields of the dataset although RL has none
        self.dataset = DatasetConfig(repo_id="none")
        if not check_output_dir:
            self.output_dir = None
        try:
            super(TrainRLServerPipelineConfig, self).validate()
        finally:
            self.dataset = None
            if output_dir is not None:
                self.output_dir = output_dir
        # the policy's supervised presets that upstream filled in are not what trains here
        self.optimizer = self.scheduler = None


RECIPE = Recipe(
    name="pi-rl",
    config_class=PiRLTrainConfig,
    learner="lerobot_pirl.learner:run",
    actor="lerobot_pirl.actor:run",
)
