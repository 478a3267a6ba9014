"""The recipe's run config: LeRobot's with the field ``recipe`` and ``algorithm`` of type ``pi-rl``."""

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import draccus
import torch
from draccus.parsers.decoding import decode_dataclass
from draccus.utils import ParsingError
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from lerobot.configs import PreTrainedConfig, parser
from lerobot.configs.default import EvalConfig
from lerobot.envs.configs import EnvConfig
from lerobot.rl.train_rl import TrainRLServerPipelineConfig
from lerobot.utils.constants import CHECKPOINTS_DIR

from lerobot_pirl import folders, parsing, rules
from lerobot_pirl.envs import tabletop  # noqa: F401  (registers the environment type `tabletop`)
from lerobot_pirl.envs.chunk import SUPPORTED_TYPES
from lerobot_pirl.inert import refuse_inert
from lerobot_pirl.options import ALGORITHM_RULES, COUNT, NAME, WIRE_RULES, PiRLConfig
from lerobot_pirl.registry import Recipe
from lerobot_pirl.rules import Rule

RUN_RULES: Mapping[str, Rule] = {
    "steps": rules.integer(1, 1_000_000_000),
    "seed": rules.integer(0, 2**32 - 1),
    "save_freq": rules.integer(-1_000_000_000, 1_000_000_000),
    "log_freq": rules.integer(-1_000_000_000, 1_000_000_000),
    "env_eval_freq": rules.integer(-1_000_000_000, 1_000_000_000),
    "env_eval_videos": rules.FLAG,
    "early_stop_patience": rules.or_null(COUNT),
    "allow_zero_baseline": rules.FLAG,
    "keep_last_n": rules.or_null(COUNT),
    "tensorboard": rules.FLAG,
    "job_name": rules.or_null(rules.Rule("a text that can name a folder", rules.names_folder)),
    "accept_changes": rules.Rule("names with commas between them", lambda value: isinstance(value, str)),
}
EVAL_RULES: Mapping[str, Rule] = {"n_episodes": COUNT}
ALLOWED = {
    f"{prefix}{name}": rule.allowed
    for prefix, group in (
        ("algorithm.", ALGORITHM_RULES),
        ("algorithm.wire.", WIRE_RULES),
        ("eval.", EVAL_RULES),
        ("", RUN_RULES),
    )
    for name, rule in group.items()
}


@dataclass(kw_only=True)
class PiRLTrainConfig(TrainRLServerPipelineConfig):
    """LeRobot's RL run config with the recipe that runs it."""

    # what `--help` needs besides, to list the options of the one algorithm there is
    HELP_ARGUMENTS: ClassVar[tuple[str, ...]] = (f"--algorithm.type={NAME}",)

    # Who runs learner and actor: the name of a recipe, here `pi-rl`.
    recipe: str | None = None
    # Updates between two lines in the learner's terminal; 0 or less: none.
    log_freq: int = 1
    # Refused, since the recipe learns from its own rollouts; LeRobot's type would look for video decoders.
    dataset: dict[str, Any] | None = None
    # Updates between two noise-free evaluations of `eval.n_episodes` episodes; 0 or less: none.
    env_eval_freq: int = 0
    # Videos of their first success and failure of every task, in `videos` in the actor's output folder.
    env_eval_videos: bool = True
    # End the run when the best policy is so many evaluations old; not given: never.
    early_stop_patience: int | None = None
    # Train on although the evaluation of the starting policy counted no success.
    allow_zero_baseline: bool = False
    # Checkpoints to keep besides the best one; not given: all.
    keep_last_n: int | None = None
    # Write all numbers for TensorBoard too, into the folder `tensorboard` of the run.
    tensorboard: bool = False
    # On resume: metadata fields and options, by full name and with commas between them, that may differ.
    accept_changes: str = ""

    @property
    def accepted_changes(self) -> list[str]:
        """The names in ``accept_changes``."""
        return [name.strip() for name in self.accept_changes.split(",") if name.strip()]

    def validate(self, check_output_dir: bool = True) -> None:
        """Check the whole config and fill in what follows from it: the policy's config, names and folders.

        LeRobot's own ``validate`` is not called: it asks for a dataset and installs the policy's supervised
        optimiser presets.

        Args:
            check_output_dir: refuse an existing output folder unless resuming; the actor adds videos to its learner's.

        Raises:
            ValueError: one sentence that names the field, its value and what is allowed.
            FileExistsError: when the output folder exists and the run is not a resume.
        """
        if self.recipe != NAME:
            raise ValueError(
                f"recipe={rules.shown(self.recipe)} does not fit this config; it must be {NAME!r}"
            )
        if self.algorithm is None:
            self.algorithm = PiRLConfig()
        if not isinstance(self.algorithm, PiRLConfig):
            raise _disagreement(self.algorithm.type)
        self.algorithm.validate()
        rules.check(self, RUN_RULES)
        rules.check(self.eval, EVAL_RULES, "eval.")
        if self.early_stop_patience is not None and self.env_eval_freq <= 0:
            raise ValueError(
                f"early_stop_patience={self.early_stop_patience} does nothing without evaluations; set env_eval_freq"
            )
        self._resolve_pretrained_from_cli()
        # what LeRobot makes of this machine's cores is no choice of the user's, and no checkpoint shall carry it away
        if self.eval.batch_size == EvalConfig(n_episodes=self.eval.n_episodes).batch_size:
            self.eval.batch_size = 0
        refuse_inert(self, NAME)
        self._check_scheduler()
        if self.env is None:
            raise ValueError(
                "env is missing; name the environment to train in, for example env.type 'libero'"
            )
        if self.env.type not in SUPPORTED_TYPES:
            raise rules.refusal("env.type", self.env.type, "one of " + ", ".join(map(repr, SUPPORTED_TYPES)))
        if not self.env.task:
            raise rules.refusal("env.task", self.env.task, "the name of a task or suite")
        if self.algorithm.advantage == "grpo" and not getattr(self.env, "init_states", True):
            raise ValueError(
                "env.init_states=False lets every episode of a group begin elsewhere, which algorithm.advantage='grpo' "
                "cannot compare; set env.init_states to true or algorithm.advantage to 'gae'"
            )
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
            if parser.parse_arg("config_path") is None:
                raise ValueError(
                    "resume=True needs a config_path; name the train_config.json in a checkpoint's pretrained_model folder"
                )
            self._resolve_resume_checkpoint()
            self._check_resume_checkpoint()
        elif self.accept_changes:
            raise ValueError(
                f"accept_changes={self.accept_changes!r} does nothing without resume=true; remove it"
            )

    def _check_resume_checkpoint(self) -> None:
        if self.policy is None or self.checkpoint_path is None:
            raise ValueError(
                f"config_path={parser.parse_arg('config_path')} holds no policy to resume; name the "
                "train_config.json in a checkpoint's pretrained_model folder"
            )
        given = Path(os.path.abspath(self.policy.pretrained_path))
        # one folder for the whole of a resume, wherever the link leads meanwhile
        self.policy.pretrained_path = given.resolve()
        self.checkpoint_path = self.policy.pretrained_path.parent
        named = f"config_path={parser.parse_arg('config_path')} is no checkpoint to resume"
        weights = self.policy.pretrained_path / SAFETENSORS_SINGLE_FILE
        if not weights.is_file():
            raise ValueError(
                f"{named}, {weights} is missing; name the train_config.json in a checkpoint's pretrained_model folder"
            )
        metadata = self.checkpoint_path / folders.METADATA_FILE
        if not metadata.is_file():
            raise ValueError(
                f"{named} of recipe {self.recipe!r}, {metadata} is missing; start a new run from its weights with "
                f"--policy.path={weights.parent} instead of --resume=true"
            )
        if parser.parse_arg("output_dir"):
            return
        # the run goes on where it lies, also after a move
        if given.parent.parent.name != CHECKPOINTS_DIR:
            raise ValueError(
                f"{given.parent} does not lie in the folder {CHECKPOINTS_DIR!r} of a run; say with --output_dir where "
                "the run shall go on"
            )
        run = given.parent.parent.parent
        if self.output_dir is None or Path(os.path.abspath(self.output_dir)) != run:
            self.output_dir = run

    def _check_scheduler(self) -> None:
        if self.scheduler is None:
            return
        try:
            scheduler = self.scheduler.build(torch.optim.SGD([torch.zeros(1)]), self.steps)
            for step in (1, self.steps // 2, self.steps):
                scheduler.lr_lambdas[0](step)
        except (ImportError, ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(
                f"scheduler of type {self.scheduler.type!r} cannot be built ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); correct its options"
            ) from error

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
        elif not rules.names_folder(str(self.output_dir)):
            raise rules.refusal("output_dir", str(self.output_dir), "the name of a folder, of usual length")
        elif check_output_dir and not self.resume and Path(self.output_dir).exists():
            raise FileExistsError(
                f"output_dir={self.output_dir} exists already; choose another one, or resume its run with "
                f"--resume=true --config_path={self.output_dir}/checkpoints/last/pretrained_model/train_config.json"
            )
        elif check_output_dir and self.resume:
            self._check_other_run()

    def _check_other_run(self) -> None:
        """Refuse to resume into a folder where another run lies."""
        folder, ours = Path(self.output_dir), self.checkpoint_path.parent
        theirs = folder / CHECKPOINTS_DIR
        if theirs.resolve() != ours.resolve() and folders.complete(theirs):
            raise FileExistsError(
                f"output_dir={folder} holds another run than {ours.parent}, with which it would mix; choose another one, or go on "
                f"with that run with --config_path={folder}/checkpoints/last/pretrained_model/train_config.json and without "
                "--output_dir"
            )


def _disagreement(algorithm_type: Any) -> ValueError:
    return ValueError(
        f"recipe={NAME!r} and algorithm.type={rules.shown(algorithm_type)} disagree; remove `algorithm.type` or set it to "
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
    for name, family in (("policy", PreTrainedConfig), ("env", EnvConfig)):
        group = raw.get(name)
        kind = group.get("type") if isinstance(group, dict) else None
        if isinstance(kind, str) and kind in family.get_known_choices():
            parsing.check_types(family.get_choice_class(kind), group, ALLOWED, f"{name}.")
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
