"""The recipe's options under ``algorithm``, of type ``pi-rl``."""

from dataclasses import dataclass, field, fields
from typing import Any

from lerobot.rl.algorithms.configs import RLAlgorithmConfig

from lerobot_pirl import rules
from lerobot_pirl.rules import option

NAME = "pi-rl"

COUNT = rules.integer(1, 1_000_000)
_FRACTION = rules.number("a number in [0, 1]", lambda value: 0 <= value <= 1)
# below a micrometre, or its like, float32 no longer resolves the noise
LOWEST_NOISE = 1e-6
_NOISE = rules.between(LOWEST_NOISE, 10)
_DECAY = rules.number("a number in [0, 1)", lambda value: 0 <= value < 1)


# without a value function these do nothing
VALUE_OPTIONS = (
    *("gamma", "gae_lambda", "bootstrap_truncation", "normalize_advantage", "clip_range_vf", "huber_delta"),
    *("critic_warmup_iterations", "value_learning_rate", "value_hidden_dims"),
)
# which variant uses them; with the other they do nothing
VARIANT_OPTIONS = {
    "flow_sde": (
        *("noise_level", "last_step_std_position", "last_step_std_rotation", "last_step_prob"),
        "step_loss_weight",
    ),
    "flow_noise": ("noise_std_position", "noise_std_rotation", "noise_head_hidden_dims", "entropy_coef"),
}
_STD_RANGE = rules.many("a list of two numbers from 1e-06 to 10", _NOISE, 2, 2)
_COEFFICIENT = rules.number("a finite number >= 0", lambda value: value >= 0)
# why an address is refused that others reach
UNPROTECTED = (
    "is no loopback address, and whoever reaches it could read and steer the run; give learner and actor the same "
    "algorithm.wire.token_file, or algorithm.wire.tls_cert and algorithm.wire.tls_key, or use an SSH tunnel "
    "(docs/security.md)"
)
_WIDTHS = rules.many("a list of 1 to 16 integers from 1 to 16384", rules.integer(1, 16384), 1, 16)


@dataclass
class WireConfig:
    """Where the two processes meet; no field of it changes what is learned."""

    # Address the learner listens on and the actor connects to; one that is not loopback wants a token or TLS.
    host: str = option("127.0.0.1", rules.HOST)
    # TCP port of the learner; 0 lets it take a free one, which it logs.
    port: int = option(50051, rules.integer(0, 65535))
    # Seconds the actor tries to reach a learner before it gives up; first contact and every reconnection.
    connect_timeout_s: float = option(300.0, rules.POSITIVE)
    # Seconds the learner waits for a rollout before it gives up.
    rollout_timeout_s: float = option(3600.0, rules.POSITIVE)
    # Seconds without a rollout after which the learner hands an actor's episodes to others.
    share_timeout_s: float = option(1800.0, rules.POSITIVE)
    # Seconds, 3 to 3600, after which learner or actor take the other for gone when it does not answer at all.
    peer_timeout_s: float = option(30.0, rules.between(3, 3600))
    # File with a secret of at least 16 bytes that learner and actor share; the learner refuses who does not have it.
    token_file: str | None = option(None, rules.or_null(rules.FILE))
    # File in PEM: this process's certificate and, behind it, its issuer's, which the other's must have too; turns TLS on.
    tls_cert: str | None = option(None, rules.or_null(rules.FILE))
    # File in PEM: private key of the certificate in `tls_cert`.
    tls_key: str | None = option(None, rules.or_null(rules.FILE))

    def validate(self) -> None:
        """Check every value; raises ValueError with one sentence, also where a learner would listen to strangers."""
        rules.check(self, WIRE_RULES, "algorithm.wire.")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError(
                f"algorithm.wire.tls_cert={rules.shown(self.tls_cert)} and algorithm.wire.tls_key="
                f"{rules.shown(self.tls_key)} do nothing without each other; give both or none"
            )
        if not rules.is_loopback(self.host) and self.token_file is None and self.tls_cert is None:
            raise ValueError(f"algorithm.wire.host={rules.shown(self.host)} {UNPROTECTED}")


@RLAlgorithmConfig.register_subclass(NAME)
@dataclass
class PiRLConfig(RLAlgorithmConfig):
    """piRL: PPO over the denoising chain of a flow-matching policy."""

    # How the denoising chain explores. flow_sde: fixed noise in one step per chunk; flow_noise: learned noise in all.
    variant: str = option("flow_sde", rules.one_of("flow_sde", "flow_noise"))
    # Denoising steps K of rollout, update and the saved policy, at least 2.
    num_denoising_steps: int = option(5, rules.integer(2, 1000))
    # Executed rows of every predicted chunk.
    n_action_steps: int = option(10, rules.integer(1, 1000))
    # flow_sde: noise level `a` of the steps before the last (piRL 0.5; X-VLA's metre-scale actions want less), 1e-6 to 10.
    noise_level: float = option(0.3, _NOISE)
    # flow_sde: std of the last step on position channels, in metres, 1e-6 to 10.
    last_step_std_position: float = option(0.005, _NOISE)
    # flow_sde: std of the last step on 6-D rotation channels, 1e-6 to 10; or 0: the last step does not explore rotation.
    last_step_std_rotation: float = option(
        0.03, rules.number("0 or a number from 1e-06 to 10", lambda value: value == 0 or 1e-6 <= value <= 10)
    )
    # flow_sde: probability that the last step is the stochastic one, in (0, 1].
    last_step_prob: float = option(0.5, rules.number("a number in (0, 1]", lambda value: 0 < value <= 1))
    # flow_noise: lowest and highest std of every step on position channels, in metres, 1e-6 to 10.
    noise_std_position: tuple[float, float] = option((0.002, 0.008), _STD_RANGE)
    # flow_noise: lowest and highest std of every step on 6-D rotation channels, 1e-6 to 10.
    noise_std_rotation: tuple[float, float] = option((0.01, 0.05), _STD_RANGE)
    # flow_noise: widths of the hidden layers of the network that learns the noise.
    noise_head_hidden_dims: tuple[int, ...] = option((128, 64), _WIDTHS)
    # flow_noise: weight of the noise's mean entropy per explored number, a bonus, at least 0.
    entropy_coef: float = option(0.005, _COEFFICIENT)
    # Updates over which the noise of all steps shrinks linearly to `noise_anneal_to` of itself; 0 keeps it.
    noise_anneal_iterations: int = option(0, rules.integer(0, 1_000_000))
    # Share of the noise that is left then, in (0, 1]; refused without `noise_anneal_iterations`.
    noise_anneal_to: float | None = option(
        None, rules.or_null(rules.number("a number in (0, 1]", lambda value: 0 < value <= 1))
    )
    # Gripper: `exclude` thresholds its logit; `bernoulli_last` draws it when the last step is stochastic.
    gripper: str = option("exclude", rules.one_of("exclude", "bernoulli_last"))
    # Temperature of `bernoulli_last` (0.5 when not given), 0.01 to 100; refused with `exclude`.
    gripper_temperature: float | None = option(None, rules.or_null(rules.between(0.01, 100)))

    # Episodes of every iteration, over all environments and tasks.
    episodes_per_iteration: int = option(64, COUNT)
    # Updates, 0 to 8, by which the policy that collects may be behind the one that learns; 0: actors wait for every update.
    max_staleness: int = option(0, rules.integer(0, 8))
    # Environments that the actor steps side by side.
    n_envs: int = option(16, rules.integer(1, 1024))
    # Step the environments in worker processes instead of in the actor's own.
    async_envs: bool = option(False, rules.FLAG)
    # Seconds, 1 to 86400, that a worker may take to start its simulator, to reset or to step; refused without workers.
    env_timeout_s: float = option(600.0, rules.between(1, 86_400))
    # Step limit of an episode; not given: the environment's own.
    max_episode_steps: int | None = option(None, rules.or_null(COUNT))

    # Advantages: `gae` with a value function; `grpo` from groups of episodes that start alike, without one.
    advantage: str = option("gae", rules.one_of("gae", "grpo"))
    # Episodes per group of `grpo` (8 when not given); they share task and initial state. Refused with `gae`.
    group_size: int | None = option(None, rules.or_null(rules.integer(2, 1024)))
    # Range of success rates, ends included, of the groups that `grpo` learns from; null: all. Refused with `gae`.
    group_filter: tuple[float, float] | None = option(
        None, rules.or_null(rules.many("a list of two numbers in [0, 1]", _FRACTION, 2, 2))
    )

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
    # flow_sde: loss weight per denoising step: `inv_sensitivity` levels their gradients, `none` leaves them.
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
    minibatch_size: int = option(512, COUNT)
    # Samples per forward and backward pass; gradients accumulate up to minibatch_size.
    micro_batch_size: int = option(32, COUNT)
    # End the update when the mean k3 KL of a minibatch exceeds this, > 0; null turns it off.
    target_kl: float | None = option(0.02, rules.or_null(rules.POSITIVE))
    # Weight of the KL from the starting policy (summed over a chunk), at least 0; above 0 that policy is kept and saved.
    kl_coef: float = option(0.0, _COEFFICIENT)
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
    value_hidden_dims: tuple[int, ...] = option((512, 256, 128), _WIDTHS)

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

    @property
    def resolved_group_size(self) -> int:
        """Episodes that share task and initial state; 1 with `gae`."""
        if self.advantage == "gae":
            return 1
        return 8 if self.group_size is None else self.group_size

    def _refuse_idle(self, names: tuple[str, ...], beside: str) -> None:
        """Refuse options that do nothing beside the value of another one, unless they have their defaults."""
        for each in fields(self):
            # a list where a tuple stands is the same option
            given = getattr(self, each.name)
            if each.name in names and (tuple(given) if isinstance(given, list) else given) != each.default:
                raise ValueError(
                    f"algorithm.{each.name}={rules.shown(given)} does nothing with "
                    f"algorithm.{beside}={getattr(self, beside)!r}; remove it or change algorithm.{beside}"
                )

    def _check_variant(self) -> None:
        """Refuse what does nothing with the chosen variant, and ranges without room."""
        self._refuse_idle(
            VARIANT_OPTIONS["flow_noise" if self.variant == "flow_sde" else "flow_sde"], "variant"
        )
        for name in ("noise_std_position", "noise_std_rotation"):
            low, high = getattr(self, name)
            if low >= high:
                raise ValueError(
                    f"algorithm.{name}={[low, high]} leaves the noise nothing to learn; give the lowest std first, "
                    "and a higher one"
                )

    def _check_annealed_noise(self) -> None:
        """Refuse noise that shrinks to what float32 does not resolve."""
        stds = [name for name in VARIANT_OPTIONS[self.variant] if "_std_" in name]
        for name in stds if self.noise_anneal_to is not None else []:
            given = getattr(self, name)
            lowest = given if isinstance(given, float | int) else min(given)
            if 0 < lowest * self.noise_anneal_to < LOWEST_NOISE:
                raise ValueError(
                    f"algorithm.noise_anneal_to={self.noise_anneal_to} shrinks algorithm.{name}={rules.shown(given)} below "
                    f"{LOWEST_NOISE:g}, which float32 does not resolve; raise one of them"
                )

    def _check_advantage(self) -> None:
        """Refuse what does nothing with the chosen kind of advantages, and groups that do not fit."""
        self._refuse_idle(
            ("group_size", "group_filter") if self.advantage == "gae" else VALUE_OPTIONS, "advantage"
        )
        if self.episodes_per_iteration % self.resolved_group_size:
            raise ValueError(
                f"algorithm.episodes_per_iteration={self.episodes_per_iteration} is no multiple of the group size "
                f"{self.resolved_group_size}; change one of them"
            )
        if self.group_filter is not None and self.group_filter[0] > self.group_filter[1]:
            raise ValueError(
                f"algorithm.group_filter={list(self.group_filter)} is empty; give the lower rate first"
            )

    def noise_scale(self, policy_version: int) -> float:
        """Return the share of the noise that a policy version explores with; linear, as in RLinf's annealing."""
        if not self.noise_anneal_iterations:
            return 1.0
        done = min(1.0, policy_version / self.noise_anneal_iterations)
        return 1.0 + (self.noise_anneal_to - 1.0) * done

    def validate(self) -> None:
        """Check every value; write down the gripper's temperature where it was left to its default.

        Raises:
            ValueError: one sentence with the field's full name, its value and what it must be.
        """
        rules.check(self, ALGORITHM_RULES, "algorithm.")
        if not isinstance(self.wire, WireConfig):
            raise rules.refusal("algorithm.wire", self.wire, "options by name")
        self.wire.validate()
        if self.gripper_temperature is not None and self.gripper == "exclude":
            raise ValueError(
                f"algorithm.gripper_temperature={self.gripper_temperature} does nothing with "
                "algorithm.gripper='exclude'; remove it or set algorithm.gripper to 'bernoulli_last'"
            )
        self._check_variant()
        self._check_advantage()
        if not self.async_envs:
            self._refuse_idle(("env_timeout_s",), "async_envs")
        if (self.noise_anneal_to is None) == bool(self.noise_anneal_iterations):
            raise ValueError(
                f"algorithm.noise_anneal_iterations={self.noise_anneal_iterations} and algorithm.noise_anneal_to="
                f"{self.noise_anneal_to} do nothing without each other; give both or none"
            )
        self._check_annealed_noise()
        if self.micro_batch_size > self.minibatch_size:
            raise ValueError(
                f"algorithm.micro_batch_size={self.micro_batch_size} exceeds algorithm.minibatch_size="
                f"{self.minibatch_size}; lower algorithm.micro_batch_size"
            )
        # left out or written, the default is one config
        self.gripper_temperature = self.resolved_gripper_temperature
        self.group_size = None if self.advantage == "gae" else self.resolved_group_size


ALGORITHM_RULES = rules.of(PiRLConfig)
WIRE_RULES = rules.of(WireConfig)
