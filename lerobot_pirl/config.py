"""The recipe's options: ``algorithm`` of type ``pi-rl`` and the run config with the field ``recipe``."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import draccus
from draccus.parsers.decoding import decode_dataclass
from draccus.utils import ParsingError
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from lerobot.configs import parser
from lerobot.rl.algorithms.configs import RLAlgorithmConfig
from lerobot.rl.train_rl import TrainRLServerPipelineConfig

from lerobot_pirl import parsing, rules
from lerobot_pirl.envs import tabletop  # noqa: F401  (registers the environment type `tabletop`)
from lerobot_pirl.envs.chunk import SUPPORTED_TYPES
from lerobot_pirl.inert import refuse_inert
from lerobot_pirl.registry import Recipe
from lerobot_pirl.rules import Rule, option

NAME = "pi-rl"

_COUNT = rules.integer(1, 1_000_000)
_FRACTION = rules.number("a number in [0, 1]", lambda value: 0 <= value <= 1)
# below a micrometre, or its like, float32 no longer resolves the noise
_NOISE = rules.between(1e-6, 10)
_DECAY = rules.number("a number in [0, 1)", lambda value: 0 <= value < 1)


@dataclass
class WireConfig:
    """Where the two processes meet; no field of it changes what is learned."""

    # Address the learner listens on and the actor connects to; loopback, since nothing is encrypted.
    host: str = option("127.0.0.1", rules.LOOPBACK)
    # TCP port of the learner; 0 lets it take a free one, which it logs.
    port: int = option(50051, rules.integer(0, 65535))
    # Seconds the actor tries to reach a learner before it gives up; first contact and every reconnection.
    connect_timeout_s: float = option(300.0, rules.POSITIVE)
    # Seconds the learner waits for a rollout before it gives up.
    rollout_timeout_s: float = option(3600.0, rules.POSITIVE)


@RLAlgorithmConfig.register_subclass(NAME)
@dataclass
class PiRLConfig(RLAlgorithmConfig):
    """piRL: PPO over the denoising chain of a flow-matching policy."""

    # How the denoising chain explores. flow_sde: one stochastic step per chunk.
    variant: str = option("flow_sde", rules.one_of("flow_sde"))
    # Denoising steps K of rollout, update and the saved policy, at least 2.
    num_denoising_steps: int = option(5, rules.integer(2, 1000))
    # Executed rows of every predicted chunk.
    n_action_steps: int = option(10, rules.integer(1, 1000))
    # Noise level `a` of the steps before the last (piRL 0.5; X-VLA's metre-scale actions want less), 1e-6 to 10.
    noise_level: float = option(0.3, _NOISE)
    # Std of the last step on position channels, in metres, 1e-6 to 10.
    last_step_std_position: float = option(0.005, _NOISE)
    # Std of the last step on 6-D rotation channels, 1e-6 to 10.
    last_step_std_rotation: float = option(0.03, _NOISE)
    # Probability that the last step is the stochastic one, in (0, 1].
    last_step_prob: float = option(0.5, rules.number("a number in (0, 1]", lambda value: 0 < value <= 1))
    # Gripper: `exclude` thresholds its logit; `bernoulli_last` draws it when the last step is stochastic.
    gripper: str = option("exclude", rules.one_of("exclude", "bernoulli_last"))
    # Temperature of `bernoulli_last` (0.5 when not given), 0.01 to 100; refused with `exclude`.
    gripper_temperature: float | None = option(None, rules.or_null(rules.between(0.01, 100)))

    # Episodes of every iteration, over all environments and tasks.
    episodes_per_iteration: int = option(64, _COUNT)
    # Environments that the actor steps side by side.
    n_envs: int = option(16, rules.integer(1, 1024))
    # Step the environments in worker processes instead of in the actor's own.
    async_envs: bool = option(False, rules.FLAG)
    # Step limit of an episode; not given: the environment's own.
    max_episode_steps: int | None = option(None, rules.or_null(_COUNT))

    # Discount per executed chunk, in [0, 1].
    gamma: float = option(0.99, _FRACTION)
    # GAE's lambda per executed chunk, in [0, 1].
    gae_lambda: float = option(0.95, _FRACTION)
    # Bootstrap the value of the last observation of an episode that ran out of time (RLinf: false).
    bootstrap_truncation: bool = option(True, rules.FLAG)
    # `token`: every chunk weighs the same; `episode`: every episode does.
    loss_aggregation: str = option("token", rules.one_of("token", "episode"))
    # Scale advantages of an iteration to mean 0 and std 1.
    normalize_advantage: bool = option(True, rules.FLAG)
    # Loss weight per denoising step: `inv_sensitivity` levels their gradients, `none` leaves them.
    step_loss_weight: str = option("inv_sensitivity", rules.one_of("inv_sensitivity", "none"))

    # PPO's clip range of the probability ratio, in (0, 1).
    clip_range: float = option(0.2, rules.number("a number in (0, 1)", lambda value: 0 < value < 1))
    # Bound of the loss of negative advantages, > 1; null turns it off.
    dual_clip: float | None = option(
        3.0, rules.or_null(rules.number("a finite number > 1", lambda value: value > 1))
    )
    # Clip range of the value function's change, > 0; null turns it off.
    clip_range_vf: float | None = option(0.2, rules.or_null(rules.POSITIVE))
    # Where the value loss turns from quadratic to linear, > 0.
    huber_delta: float = option(10.0, rules.POSITIVE)
    # Passes over a rollout, at least 1.
    n_epochs: int = option(1, rules.integer(1, 1000))
    # Samples per optimiser step.
    minibatch_size: int = option(512, _COUNT)
    # Samples per forward and backward pass; gradients accumulate up to minibatch_size.
    micro_batch_size: int = option(32, _COUNT)
    # End the update when the mean k3 KL of a minibatch exceeds this, > 0; null turns it off.
    target_kl: float | None = option(0.02, rules.or_null(rules.POSITIVE))
    # First iterations that train the value head alone.
    critic_warmup_iterations: int = option(3, rules.integer(0, 1_000_000))

    # AdamW learning rate of the policy, in [0, 1].
    learning_rate: float = option(2e-6, _FRACTION)
    # AdamW learning rate of the value head, in [0, 1].
    value_learning_rate: float = option(1e-4, _FRACTION)
    # AdamW betas, each in [0, 1).
    betas: tuple[float, float] = option(
        (0.9, 0.95), rules.many("a list of two numbers in [0, 1)", _DECAY, 2, 2)
    )
    # AdamW weight decay, in [0, 1]; never on tables with a row per domain.
    weight_decay: float = option(0.01, _FRACTION)
    # Gradient clipping by norm, per group (policy, value head), > 0.
    grad_clip_norm: float = option(1.0, rules.POSITIVE)
    # Widths of the value head's hidden layers.
    value_hidden_dims: tuple[int, ...] = option(
        (512, 256, 128),
        rules.many("a list of 1 to 16 integers from 1 to 16384", rules.integer(1, 16384), 1, 16),
    )

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
        """Check every value; write down the gripper's temperature where it was left to its default.

        Raises:
            ValueError: one sentence with the field's full name, its value and what it must be.
        """
        rules.check(self, ALGORITHM_RULES, "algorithm.")
        if not isinstance(self.wire, WireConfig):
            raise rules.refusal("algorithm.wire", self.wire, "options by name")
        rules.check(self.wire, WIRE_RULES, "algorithm.wire.")
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
        # left out or written, the default is one config
        self.gripper_temperature = self.resolved_gripper_temperature


ALGORITHM_RULES = rules.of(PiRLConfig)
WIRE_RULES = rules.of(WireConfig)
RUN_RULES: Mapping[str, Rule] = {
    "steps": rules.integer(1, 1_000_000_000),
    "seed": rules.integer(0, 2**32 - 1),
    "save_freq": rules.integer(-1_000_000_000, 1_000_000_000),
    "log_freq": rules.integer(-1_000_000_000, 1_000_000_000),
}
ALLOWED = {
    f"{prefix}{name}": rule.allowed
    for prefix, group in (("algorithm.", ALGORITHM_RULES), ("algorithm.wire.", WIRE_RULES), ("", RUN_RULES))
    for name, rule in group.items()
}


@dataclass(kw_only=True)
class PiRLTrainConfig(TrainRLServerPipelineConfig):
    """LeRobot's RL run config with the recipe that runs it."""

    # what `--help` needs besides, to list the options of the one algorithm there is
    HELP_ARGUMENTS: ClassVar[tuple[str, ...]] = (f"--algorithm.type={NAME}",)

    # Who runs learner and actor: the name of a recipe, here `pi-rl`.
    recipe: str | None = None
    # Refused, since the recipe learns from its own rollouts; LeRobot's type would look for video decoders.
    dataset: dict[str, Any] | None = None

    def validate(self, check_output_dir: bool = True) -> None:
        """Check the whole config and fill in what follows from it: the policy's config, names and folders.

        LeRobot's own ``validate`` is not called: it asks for a dataset and installs the policy's supervised
        optimiser presets.

        Args:
            check_output_dir: refuse an existing output folder unless resuming; the actor writes nothing there.

        Raises:
            ValueError: one sentence that names the field, its value and what is allowed.
            FileExistsError: when the output folder exists and the run is not a resume.
        """
        if self.recipe != NAME:
            raise ValueError(f"recipe={self.recipe!r} does not fit this config; it must be {NAME!r}")
        if self.algorithm is None:
            self.algorithm = PiRLConfig()
        if not isinstance(self.algorithm, PiRLConfig):
            raise _disagreement(self.algorithm.type)
        self.algorithm.validate()
        rules.check(self, RUN_RULES)
        refuse_inert(self, NAME)
        # 0 stands for a number that follows from this machine's cores, which a checkpoint must not carry away
        self.eval.batch_size = 0
        if self.env is None:
            raise ValueError(
                "env is missing; name the environment to train in, for example env.type 'libero'"
            )
        if self.env.type not in SUPPORTED_TYPES:
            raise rules.refusal("env.type", self.env.type, "one of " + ", ".join(map(repr, SUPPORTED_TYPES)))
        if not self.env.task:
            raise rules.refusal("env.task", self.env.task, "the name of a task or suite")
        self._resolve_pretrained_from_cli()
        self._check_policy()
        self._name_outputs(check_output_dir)

    def _resolve_pretrained_from_cli(self) -> None:
        """Read the config of the policy at ``policy.path``, or find the checkpoint to resume."""
        path = parser.get_path_arg("policy")
        if path and self.resume:
            raise ValueError(
                f"policy.path={path} and resume=true contradict each other, since a resume takes the policy from "
                "its checkpoint; remove one of them"
            )
        if path:
            self.policy = parsing.read_policy_config(path)
        elif self.resume:
            self._resolve_resume_checkpoint()
            weights = Path(self.policy.pretrained_path if self.policy else "") / SAFETENSORS_SINGLE_FILE
            if not weights.is_file():
                raise ValueError(
                    f"config_path={parser.parse_arg('config_path')} is no checkpoint to resume, {weights} is "
                    "missing; name the train_config.json in a checkpoint's pretrained_model folder"
                )

    def _check_policy(self) -> None:
        if self.policy is None:
            raise ValueError(
                "policy is missing; name a saved one in policy.path or describe a new one from policy.type on"
            )
        if self.policy.push_to_hub:
            raise ValueError(
                f"policy.push_to_hub=True does nothing under recipe {NAME!r}; set it to false and upload a "
                "checkpoint's pretrained_model folder with `hf upload`"
            )

    def _name_outputs(self, check_output_dir: bool) -> None:
        if not self.job_name:
            self.job_name = f"{self.env.type}_{self.policy.type}"
        if not self.output_dir:
            started = f"{datetime.datetime.now():%Y-%m-%d/%H-%M-%S}"
            self.output_dir = Path(f"outputs/train/{started}_{self.job_name}")
        elif check_output_dir and not self.resume and Path(self.output_dir).exists():
            raise FileExistsError(
                f"output_dir={self.output_dir} exists already; choose another one, or resume its run with "
                f"--resume=true --config_path={self.output_dir}/checkpoints/last/pretrained_model/train_config.json"
            )


def _disagreement(algorithm_type: Any) -> ValueError:
    return ValueError(
        f"recipe={NAME!r} and algorithm.type={algorithm_type!r} disagree; remove `algorithm.type` or set it to "
        f"{NAME!r}"
    )


@draccus.decode.register(PiRLTrainConfig)
def _decode(raw: dict[str, Any], path: tuple[str, ...] = ()) -> PiRLTrainConfig:
    """Decode a run config; draccus calls this for config files and command lines.

    Raises:
        ValueError: one sentence on the first option that is unknown or of the wrong type.
    """
    algorithm = raw.get("algorithm")
    parsing.check_types(PiRLTrainConfig, raw, ALLOWED)
    if algorithm is not None:
        raw = raw | {"algorithm": {"type": NAME} | algorithm}
        if raw["algorithm"]["type"] != NAME:
            raise _disagreement(raw["algorithm"]["type"])
        parsing.check_types(PiRLConfig, algorithm, ALLOWED, "algorithm.")
    try:
        return decode_dataclass(PiRLTrainConfig, raw, path)
    except ParsingError as error:
        raise ValueError(parsing.sentence(error, raw, ALLOWED)) from error


RECIPE = Recipe(
    name=NAME,
    config_class=PiRLTrainConfig,
    learner="lerobot_pirl.learner:run",
    actor="lerobot_pirl.actor:run",
)
