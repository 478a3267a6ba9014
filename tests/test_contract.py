"""What the package takes from LeRobot and draccus: a new version that drops or changes it fails here, by name."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
from pathlib import Path

import draccus
import gymnasium as gym
import pytest
from draccus.utils import DecodingError
from lerobot.configs import PreTrainedConfig
from lerobot.configs.default import EvalConfig, WandBConfig
from lerobot.envs.configs import EnvConfig
from lerobot.envs.configs import LiberoEnv as LiberoEnvConfig
from lerobot.policies.xvla.configuration_xvla import XVLAConfig
from lerobot.processor import ProcessorStepRegistry
from lerobot.rl.algorithms.base import RLAlgorithm
from lerobot.rl.algorithms.configs import RLAlgorithmConfig, TrainingStats
from lerobot.rl.train_rl import TrainRLServerPipelineConfig
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.utils import constants

from lerobot_pirl.config import PiRLTrainConfig
from lerobot_pirl.envs.chunk import make_chunk_envs
from lerobot_pirl.registry import check_lerobot_version
from tests.test_layers import package_sources
from tests.toy import CONFIGS, read_json, tiny_adapter

UPSTREAM = ("lerobot", "draccus", "huggingface_hub")
# their import starts hf-libero, which asks questions and takes seconds; they are read as text
NOT_IMPORTED = ("lerobot.envs.libero",)


def imported_names() -> dict[str, set[str]]:
    """Return, by module of ours, the upstream names that it imports and the attributes of upstream modules."""
    found = {}
    for module, source in package_sources().items():
        tree = ast.parse(source)
        aliases = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in UPSTREAM:
                aliases |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                aliases |= {
                    a.asname or a.name: a.name for a in node.names if a.name.partition(".")[0] in UPSTREAM
                }
        names = set(aliases.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in aliases:
                names.add(f"{aliases[ast.unparse(node.value)]}.{node.attr}")
        found[module] = names
    return found


def find(dotted: str) -> object:
    """Return the module or attribute of a dotted name."""
    module, attributes = dotted, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
            if not module:
                raise AttributeError(f"no module of {dotted}") from error
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


NAMES = sorted({name for names in imported_names().values() for name in names})


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(NOT_IMPORTED)])
def test_a_name_that_we_use_is_there(name):
    assert find(name) is not None


def test_the_names_are_found_in_our_source():
    assert len(NAMES) > 50
    assert {
        "lerobot.configs.parser.wrap",
        "lerobot.transport.services_pb2_grpc.LearnerServiceStub",
        "lerobot.policies.xvla.modeling_xvla.XVLAPolicy",
        "lerobot.envs.libero.LiberoEnv",
        "draccus.decode",
        "lerobot.common.train_utils.save_checkpoint",
    } <= set(NAMES)


def test_an_installed_lerobot_is_one_that_we_know():
    check_lerobot_version()


# function -> (number of positional arguments, names of keyword arguments) that we call it with
XVLA = "lerobot.policies.xvla"
CALLS = {
    "lerobot.configs.parser.wrap": (0, ()),
    "lerobot.configs.parser.parse_arg": (1, ()),
    "lerobot.configs.parser.get_path_arg": (1, ()),
    "lerobot.configs.parser.get_cli_overrides": (1, ()),
    "lerobot.configs.parser.get_yaml_overrides": (1, ()),
    "lerobot.configs.PreTrainedConfig.from_pretrained": (1, ("cli_overrides",)),
    "lerobot.rl.train_rl.TrainRLServerPipelineConfig.from_pretrained": (1, ("cli_args",)),
    "lerobot.rl.train_rl.TrainRLServerPipelineConfig._resolve_resume_checkpoint": (1, ()),
    "lerobot.rl.train_rl.TrainRLServerPipelineConfig.save_pretrained": (2, ()),
    "lerobot.common.train_utils.get_step_checkpoint_dir": (3, ()),
    "lerobot.common.train_utils.should_save_checkpoint": (3, ()),
    "lerobot.common.train_utils.save_checkpoint": (5, ("preprocessor", "postprocessor")),
    "lerobot.common.wandb_utils.WandBLogger.__init__": (2, ()),
    "lerobot.common.wandb_utils.WandBLogger.log_dict": (2, ("step",)),
    "lerobot.optim.load_optimizer_state": (2, ()),
    "lerobot.utils.random_utils.set_seed": (1, ()),
    "lerobot.utils.random_utils.get_rng_state": (0, ()),
    "lerobot.utils.random_utils.set_rng_state": (1, ()),
    "lerobot.utils.random_utils.load_rng_state": (1, ()),
    "lerobot.utils.utils.format_big_number": (1, ()),
    "lerobot.policies.factory.make_policy": (1, ("env_cfg",)),
    "lerobot.policies.factory.make_pre_post_processors": (1, ("pretrained_path", "preprocessor_overrides")),
    "lerobot.envs.factory.make_env_pre_post_processors": (2, ()),
    "lerobot.envs.utils.preprocess_observation": (1, ()),
    "lerobot.envs.utils.freeze_after_episode_end": (1, ()),
    f"{XVLA}.processor_xvla.make_xvla_pre_post_processors": (1, ()),
    f"{XVLA}.modeling_xvla.XVLAPolicy.reset": (1, ()),
    f"{XVLA}.modeling_xvla.XVLAPolicy._build_model_inputs": (2, ()),
    f"{XVLA}.modeling_xvla.XVLAModel._get_target_dtype": (1, ()),
    f"{XVLA}.modeling_xvla.XVLAModel.forward_vlm": (4, ()),
    f"{XVLA}.configuration_xvla.XVLAConfig.get_florence_config": (1, ()),
    f"{XVLA}.action_hub.EE6DActionSpace.preprocess": (3, ()),
    f"{XVLA}.action_hub.EE6DActionSpace.postprocess": (2, ()),
    f"{XVLA}.soft_transformer.DomainAwareLinear.forward": (3, ()),
    f"{XVLA}.soft_transformer.SoftPromptedTransformer.forward": (
        1,
        ("domain_id", "vlm_features", "aux_visual_inputs", "action_with_noise", "proprio", "t"),
    ),
    "lerobot.processor.pipeline.DataProcessorPipeline.__init__": (1, ("steps",)),
    "lerobot.processor.pipeline.DataProcessorPipeline.__call__": (2, ()),
    "lerobot.processor.pipeline.DataProcessorPipeline.save_pretrained": (2, ()),
    "draccus.decode.register": (2, ()),
    "draccus.encode": (1, ()),
    "draccus.cfgparsing.load_config": (1, ("file",)),
    "draccus.parsers.decoding.decode_dataclass": (3, ()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_takes_the_arguments_that_we_give(name):
    positional, keywords = CALLS[name]
    inspect.signature(find(name)).bind(*[None] * positional, **dict.fromkeys(keywords))


# --- classes that we extend ----------------------------------------------------------------------


def test_an_algorithm_needs_no_method_that_ours_lacks():
    assert RLAlgorithm.__abstractmethods__ == {
        *("update", "make_optimizers_and_scheduler", "load_weights", "state_dict", "load_state_dict"),
    }
    assert isinstance(RLAlgorithm.optimization_step, property)
    inspect.signature(RLAlgorithm._save_pretrained).bind(None, None)
    assert [each.name for each in dataclasses.fields(TrainingStats)] == ["losses", "grad_norms", "extra"]
    stats = TrainingStats(losses={"a": 1.0}, grad_norms={"b": 2.0}, extra={"c": 3.0})
    assert stats.to_log_dict() == {"a": 1.0, "b_grad_norm": 2.0, "c": 3.0}


def test_an_algorithm_config_is_registered_by_name_and_has_no_options_of_its_own():
    assert RLAlgorithmConfig.__abstractmethods__ == {"from_policy_config"}
    assert dataclasses.fields(RLAlgorithmConfig) == ()
    assert "pi-rl" in RLAlgorithmConfig.get_known_choices()


def test_an_environment_config_needs_no_method_that_ours_lacks():
    assert EnvConfig.__abstractmethods__ == {"gym_kwargs"}
    names = {each.name for each in dataclasses.fields(EnvConfig)}
    assert names == {"task", "fps", "features", "features_map", "max_parallel_tasks", "disable_env_checker"}
    inspect.signature(EnvConfig.create_envs).bind(None, 2, use_async_envs=False)
    inspect.signature(EnvConfig.get_env_processors).bind(None)


# options of LeRobot's configs that we read or write
FIELDS = {
    TrainRLServerPipelineConfig: {
        *("dataset", "env", "policy", "output_dir", "job_name", "resume", "seed", "steps", "log_freq"),
        *(
            "save_checkpoint",
            "save_freq",
            "eval",
            "wandb",
            "checkpoint_path",
            "algorithm",
            "optimizer",
            "scheduler",
        ),
    },
    EvalConfig: {"batch_size", "n_episodes"},
    WandBConfig: {"enable", "project"},
    PreTrainedConfig: {
        *("device", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path"),
        *("pretrained_revision", "use_peft", "input_features", "output_features"),
    },
    XVLAConfig: {
        *("action_mode", "chunk_size", "num_domains", "num_denoising_steps", "n_action_steps", "dtype"),
        *("tokenizer_name", "use_hetero_proj", "florence_config"),
    },
    LiberoEnvConfig: {
        *("task", "task_ids", "episode_length", "camera_name", "init_states", "control_mode"),
        *("camera_name_mapping", "is_libero_plus", "observation_height", "observation_width"),
    },
}


@pytest.mark.parametrize("cls", FIELDS)
def test_a_config_has_the_options_that_we_read(cls):
    assert FIELDS[cls] <= {each.name for each in dataclasses.fields(cls)}


def test_a_run_config_loads_a_policy_by_path():
    assert "policy" in TrainRLServerPipelineConfig.__get_path_fields__()


def test_wandb_describes_a_run_without_a_dataset():
    cfg_to_group = find("lerobot.common.wandb_utils.cfg_to_group")
    cfg = draccus.decode(PiRLTrainConfig, read_json(CONFIGS / "pirl_tabletop.json"))
    cfg.validate(check_output_dir=False)
    assert "env:tabletop" in cfg_to_group(cfg, return_list=True)


def test_a_decoding_error_names_the_option_and_the_reason():
    error = DecodingError(("algorithm", "gamma"), "Couldn't parse 'abc' into a float")
    assert (error.key_path, error.message) == (("algorithm", "gamma"), "Couldn't parse 'abc' into a float")


# --- folders, steps, messages --------------------------------------------------------------------


def test_a_checkpoint_has_the_layout_that_users_know():
    assert constants.CHECKPOINTS_DIR == "checkpoints"
    assert constants.LAST_CHECKPOINT_LINK == "last"
    assert constants.PRETRAINED_MODEL_DIR == "pretrained_model"
    assert constants.TRAINING_STATE_DIR == "training_state"
    assert constants.TRAINING_STEP == "training_step.json"
    step_dir = find("lerobot.common.train_utils.get_step_checkpoint_dir")(Path("run"), 100, 3)
    assert step_dir == Path("run/checkpoints/000003")


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("xvla_imagenet_normalize", None),
        ("xvla_image_scale", None),
        ("xvla_image_to_float", None),
        ("xvla_rotation_6d_to_axis_angle", None),
        ("xvla_add_domain_id", "domain_id"),
        ("tokenizer_processor", "tokenizer_name"),
        ("device_processor", "device"),
        ("libero_processor", None),
    ],
)
def test_a_processor_step_has_the_name_that_our_messages_and_overrides_use(name, attribute):
    step = ProcessorStepRegistry.get(name)
    assert attribute is None or attribute in {each.name for each in dataclasses.fields(step)}


def test_the_learner_service_has_the_methods_and_messages_that_we_speak():
    service = services_pb2.DESCRIPTOR.services_by_name["LearnerService"]
    methods = {
        each.name: (each.input_type.name, each.output_type.name, each.client_streaming, each.server_streaming)
        for each in service.methods
    }
    assert methods == {
        "StreamParameters": ("Empty", "Parameters", False, True),
        "SendTransitions": ("Transition", "Empty", True, False),
        "SendInteractions": ("InteractionMessage", "Empty", True, False),
        "Ready": ("Empty", "Empty", False, False),
    }
    for message in ("Parameters", "Transition", "InteractionMessage"):
        fields = services_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name
        assert {"transfer_state", "data"} == set(fields)
    assert set(methods) <= set(dir(services_pb2_grpc.LearnerServiceServicer))
    assert services_pb2.TransferState.keys() == [
        *("TRANSFER_UNKNOWN", "TRANSFER_BEGIN", "TRANSFER_MIDDLE", "TRANSFER_END"),
    ]


# --- X-VLA ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter():
    return tiny_adapter()


def test_the_model_has_the_parts_that_we_freeze_train_and_spare(adapter):
    model = adapter.policy.model
    assert {"vlm", "transformer", "action_space"} == {name for name, _ in model.named_children()}
    parts = {name for name, _ in model.transformer.named_children()}
    assert {"soft_prompt_hub", "action_encoder", "action_decoder", "vlm_proj", "aux_visual_proj"} <= parts
    assert model.dim_action == 20
    assert model.dim_proprio == adapter.policy.config.max_state_dim
    assert model.chunk_size == adapter.policy.config.chunk_size
    assert model.action_space.gripper_idx == (9, 19)


def test_the_model_takes_and_gives_what_we_pass_on(adapter):
    envs = make_chunk_envs(adapter.run_config.env, n_envs=2, n_action_steps=4)
    assert isinstance(envs, gym.vector.VectorEnv)
    observation, _ = envs.reset(seed=[0, 1])
    batch = adapter.prepare_observation(observation, ["reach", "reach"])
    inputs = adapter.policy._build_model_inputs(batch)
    assert set(inputs) == {"input_ids", "image_input", "image_mask", "domain_id", "proprio"}
    features = adapter.model.forward_vlm(inputs["input_ids"], inputs["image_input"], inputs["image_mask"])
    assert set(features) == {"vlm_features", "aux_visual_inputs"}


# --- what is read as text: importing it starts a simulator or a run ------------------------------


def tree_of(module: str) -> ast.Module:
    return ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8"))


def definition(body: list[ast.stmt], name: str) -> ast.ClassDef | ast.FunctionDef:
    return next(node for node in body if getattr(node, "name", None) == name)


def parameters(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)]


def test_the_libero_environment_has_what_ours_builds_on():
    module = tree_of("lerobot.envs.libero")
    environment = definition(module.body, "LiberoEnv")
    assert {"_ensure_env", "reset", "step", "render", "close"} <= {
        node.name for node in environment.body if isinstance(node, ast.FunctionDef)
    }
    assigned = {
        node.attr
        for node in ast.walk(environment)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }
    assert {
        *("_env", "_init_states", "_max_episode_steps", "camera_name", "init_state_id", "num_steps_wait"),
        *("task_description", "observation_space", "action_space", "render_mode"),
    } <= assigned
    given = {
        *("task_suite", "task_id", "task_suite_name", "episode_length", "camera_name", "init_states"),
        *("control_mode", "camera_name_mapping", "is_libero_plus"),
    }
    beside = set(LiberoEnvConfig().gym_kwargs) - {"task_ids"}
    assert not given & beside
    assert given | beside <= set(parameters(definition(environment.body, "__init__")))


def test_the_initial_states_of_a_libero_task_are_read_by_number():
    function = definition(tree_of("lerobot.envs.libero").body, "get_task_init_states")
    assert parameters(function) == ["task_suite", "i", "is_libero_plus"]


@pytest.mark.parametrize(
    "module", ["lerobot.rl.learner", "lerobot.rl.actor", "lerobot.scripts.lerobot_train"]
)
def test_a_command_that_a_recipe_takes_over_is_still_run_by_its_module(module):
    tree = tree_of(module)
    guards = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    assert len(guards) == 1
