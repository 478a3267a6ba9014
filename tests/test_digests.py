"""Digests of frozen weights, tokenizers and processors: what changes them and what does not."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lerobot.processor import TokenizerProcessorStep
from lerobot.processor.normalize_processor import NormalizerProcessorStep
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedTokenizerFast

from lerobot_pirl.digests import frozen_digest, processors_digest, tokenizer_digest
from lerobot_pirl.metadata import MetadataMismatch, judge
from tests.test_checkpoint import new_run, resumed_run
from tests.toy import read_json, tiny_adapter

pytestmark = pytest.mark.filterwarnings("ignore")


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(3, 3).bfloat16(), nn.Linear(3, 3)
        self.encoder.requires_grad_(False)
        self.logit_scale = nn.Parameter(torch.tensor(1.5), requires_grad=False)


def test_the_digest_changes_with_frozen_weights_only():
    module = Frozen()
    digest = frozen_digest(module)
    with torch.no_grad():
        module.head.weight.add_(1.0)
    assert frozen_digest(module) == digest
    with torch.no_grad():
        module.encoder.weight[0, 0] += 1.0
    assert frozen_digest(module) != digest


def test_a_frozen_scalar_and_the_name_of_a_weight_are_in_the_digest():
    module = Frozen()
    digest = frozen_digest(module)
    module.logit_scale.data += 1
    assert frozen_digest(module) != digest
    module.logit_scale.data -= 1
    assert frozen_digest(module) == digest
    module.renamed = module.encoder
    del module.encoder
    assert frozen_digest(module) != digest


def test_the_layout_in_memory_is_not_in_the_digest():
    module = Frozen()
    digest = frozen_digest(module)
    module.encoder.weight.data = module.encoder.weight.data.T.contiguous().T
    assert not module.encoder.weight.is_contiguous()
    assert frozen_digest(module) == digest


# tokenizers


def step(tokenizer, **options) -> TokenizerProcessorStep:
    return TokenizerProcessorStep(tokenizer=tokenizer, **options)


def bpe(merges: list[tuple[str, str]], **options) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["a", "b", "c", "ab", "bc", "[PAD]"])}
    model = BPE(vocab=vocabulary, merges=merges)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), pad_token="[PAD]", **options)


FIRST, SECOND = [("a", "b"), ("b", "c")], [("b", "c"), ("a", "b")]


def test_the_digest_of_a_slow_tokenizer_is_that_of_its_vocabulary():
    def slow(vocabulary: dict[str, int]) -> TokenizerProcessorStep:
        return step(SimpleNamespace(get_vocab=lambda: vocabulary))

    digest = tokenizer_digest([object(), slow({"a": 0, "b": 1})])
    assert digest == tokenizer_digest([slow({"b": 1, "a": 0})])
    assert digest != tokenizer_digest([slow({"a": 1, "b": 0})])
    assert digest != tokenizer_digest([])


def test_two_tokenizers_with_one_vocabulary_and_other_merges_differ():
    one, other = bpe(FIRST), bpe(SECOND)
    assert one.get_vocab() == other.get_vocab()
    assert one("abc")["input_ids"] != other("abc")["input_ids"]
    assert tokenizer_digest([step(one)]) == tokenizer_digest([step(bpe(FIRST))])
    assert tokenizer_digest([step(one)]) != tokenizer_digest([step(other)])


def test_the_token_that_fills_up_is_in_the_digest():
    other = bpe(FIRST)
    other.pad_token = "c"
    assert tokenizer_digest([step(bpe(FIRST))]) != tokenizer_digest([step(other)])


def test_using_a_tokenizer_does_not_change_its_digest():
    """A fast tokenizer remembers the length and the padding of its last call."""
    used = step(bpe(FIRST), max_length=2)
    before, remembered = tokenizer_digest([used]), used.input_tokenizer.backend_tokenizer.to_str()
    used._tokenize_text("abcabc")
    assert used.input_tokenizer.backend_tokenizer.to_str() != remembered
    assert tokenizer_digest([used]) == before


# processors


@pytest.fixture(scope="module")
def pipelines():
    processors = tiny_adapter().processors
    return processors.policy_pre, processors.policy_post


def steps_of(pipeline, kind: str) -> list:
    return [each for each in pipeline.steps if type(each).__name__ == kind]


OPTIONS = [
    ("TokenizerProcessorStep", "max_length", 6),
    ("TokenizerProcessorStep", "padding_side", "left"),
    ("XVLAAddDomainIdProcessorStep", "domain_id", 5),
    ("NormalizerProcessorStep", "eps", 0.5),
    ("DeviceProcessorStep", "float_dtype", "bfloat16"),
]


@pytest.mark.parametrize(("kind", "option", "value"), OPTIONS)
def test_every_option_of_a_processor_step_is_in_the_digest(pipelines, kind, option, value):
    changed = copy.deepcopy(pipelines)
    (target,) = steps_of(changed[0], kind)
    assert getattr(target, option) != value
    setattr(target, option, value)
    assert processors_digest(*changed) != processors_digest(*pipelines)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [("DeviceProcessorStep", "device", "cuda"), ("TokenizerProcessorStep", "tokenizer_name", "elsewhere")],
)
def test_where_a_step_runs_and_its_tokenizer_lies_is_not_in_the_digest(pipelines, kind, option, value):
    changed = copy.deepcopy(pipelines)
    (target,) = steps_of(changed[0], kind)
    assert getattr(target, option) != value
    setattr(target, option, value)
    assert processors_digest(*changed) == processors_digest(*pipelines)


def test_the_tensors_of_a_step_are_in_the_digest(pipelines):
    digests = {processors_digest(*pipelines)}
    for mean in ([0.0, 1.0], [0.0, 2.0], [[0.0], [2.0]]):
        changed = copy.deepcopy(pipelines)
        (target,) = steps_of(changed[0], "NormalizerProcessorStep")
        target.load_state_dict({"observation.state.mean": torch.tensor(mean)})
        assert isinstance(target, NormalizerProcessorStep)
        digests.add(processors_digest(*changed))
    assert len(digests) == 4


def test_a_step_that_is_missing_or_elsewhere_is_another_pipeline(pipelines):
    before, after = ([*pipeline.steps] for pipeline in pipelines)
    arranged = [
        (before, after),
        (before, after[:-1]),
        ([*before[1:], before[0]], after),
        (after, before),
        # in the same order, but after the policy
        (before[:-1], [before[-1], *after]),
    ]
    digests = {processors_digest(*(SimpleNamespace(steps=each) for each in pair)) for pair in arranged}
    assert len(digests) == len(arranged)


# built from scratch and loaded from a checkpoint


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A run from scratch, and its checkpoint."""
    run = new_run(tmp_path_factory.mktemp("scratch"))
    run.update(seed=0)
    return run, run.save()


def test_processors_from_scratch_and_those_of_a_checkpoint_have_one_digest(scratch, monkeypatch):
    run, folder = scratch
    actor = resumed_run(folder, monkeypatch)
    for name in ("tokenizer_digest", "processors_digest"):
        assert getattr(actor.metadata, name) == getattr(run.metadata, name)
    judge(actor.metadata.to_dict(), run.metadata.to_dict(), "actor", "learner")


def test_a_tokenizer_of_another_length_beside_the_weights_is_refused(scratch, monkeypatch):
    run, folder = scratch
    path: Path = folder / "pretrained_model" / "policy_preprocessor.json"
    saved = read_json(path)
    (tokenizer,) = [each for each in saved["steps"] if each.get("registry_name") == "tokenizer_processor"]
    tokenizer["config"]["max_length"] = 6
    monkeypatch.setattr("lerobot_pirl.checkpoint.verify", lambda *_: None)
    before = path.read_text()
    try:
        path.write_text(json.dumps(saved))
        actor = resumed_run(folder, monkeypatch)
    finally:
        path.write_text(before)
    with pytest.raises(MetadataMismatch) as caught:
        judge(actor.metadata.to_dict(), run.metadata.to_dict(), "actor", "learner")
    assert caught.value.names == ("processors_digest",)


def test_the_packaged_tokenizer_has_one_digest_by_its_name_and_by_its_path(scratch):
    import lerobot_pirl

    run, _ = scratch
    by_path = TokenizerProcessorStep(tokenizer_name=str(Path(lerobot_pirl.__file__).parent / "tokenizer"))
    assert tokenizer_digest([by_path]) == run.metadata.tokenizer_digest
