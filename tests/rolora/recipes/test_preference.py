"""Preference tuning: TRL's loss, rewards and tokens, the two engines, and one line for what does not fit."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
import trl
from datasets import Dataset

from rolora.adapter.attach import LoRAConfig, adapted_layers, attach
from rolora.config import Config
from rolora.errors import BadInput
from rolora.recipes import choosing
from rolora.recipes.preference import PreferenceTuning
from tests.templates import FAMILIES, GEMMA3, LLAMA3, say, tokenizer, unmarked

ROWS = [
    {"prompt": "the ship", "chosen": " is old", "rejected": " on the hill"},
    {"prompt": "Where is the goat?", "chosen": " on the hill", "rejected": " a"},
    {"prompt": "the goat", "chosen": " is", "rejected": " Be brief. the ship is old"},
]
CHATS = [
    {
        "prompt": say("Where is the goat?"),
        "chosen": [{"role": "assistant", "content": "on the hill"}],
        "rejected": [{"role": "assistant", "content": "the ship is old"}],
    },
    {
        "prompt": say("the ship", "is old", "the goat"),
        "chosen": [{"role": "assistant", "content": "on"}],
        "rejected": [{"role": "assistant", "content": "Be brief."}],
    },
]


def model(words):
    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(words), **size)).eval()


def adapted(words):
    """A model with factors that are not zero, so that it differs from its base."""
    made = model(words)
    attach(made, LoRAConfig(rank=4, target_modules=["q_proj", "v_proj"]), seed=1)
    for number, (_, layer) in enumerate(adapted_layers(made)):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return made


def merged(words):
    """The same as one plain model, for TRL."""
    source, plain = adapted(words), model(words)
    for name, layer in adapted_layers(source):
        with torch.no_grad():
            plain.get_submodule(name).weight.add_(layer.delta())
    return plain


def trainer(words, rows, tmp_path, policy=None, **options):
    options = dict(max_length=256, report_to=[], use_cpu=True, bf16=False) | options
    return trl.DPOTrainer(
        policy or model(words),
        ref_model=model(words),
        args=trl.DPOConfig(str(tmp_path), **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
    )


def trl_loss(words, rows, tmp_path, **options):
    """TRL's mean loss over the rows, and what it logs of rewards."""
    made = trainer(words, rows, tmp_path, merged(words), **options)
    inputs = made.data_collator([made.train_dataset[i] for i in range(len(rows))])
    made.model.eval()
    loss = made.compute_loss(made.model, inputs)
    return loss.item(), {name: values[-1] for name, values in made._metrics["eval"].items()}


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["texts", "messages"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_the_loss_and_the_rewards_are_trls(rows, beta, tmp_path):
    words = tokenizer(LLAMA3)
    recipe = PreferenceTuning(words, 256, beta)
    examples = recipe.encode(rows)
    batch, policy = recipe.collate(examples), adapted(words)
    theirs, logged = trl_loss(words, rows, tmp_path, beta=beta)
    with torch.no_grad():
        ours = recipe.loss(policy, batch).item() / batch.weight
    assert ours == pytest.approx(theirs, rel=1e-4) and abs(theirs - 0.6931) > 1e-3
    metrics = recipe.evaluate(policy, examples, 2)
    assert metrics["loss"] == pytest.approx(theirs, rel=1e-4)
    for name, their in (
        ("reward_accuracy", "rewards/accuracies"),
        ("reward_margin", "rewards/margins"),
        ("chosen_reward", "rewards/chosen"),
        ("rejected_reward", "rewards/rejected"),
    ):
        assert metrics[name] == pytest.approx(logged[their], rel=1e-3, abs=1e-6), name


def test_label_smoothing_is_trls_for_a_pair(tmp_path):
    """TRL has this form in its loss of sorted ratios, and one pair is sorted."""
    words = tokenizer(LLAMA3)
    recipe = PreferenceTuning(words, 256, 0.5, smoothing=0.2)
    for row in ROWS[:2]:
        theirs, _ = trl_loss(words, [row], tmp_path, beta=0.5, loss_type="aot", label_smoothing=0.2)
        with torch.no_grad():
            ours = recipe.loss(adapted(words), recipe.collate(recipe.encode([row]))).item()
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("family", ["llama3", "mistral", "gpt-oss"])
def test_tokens_are_trls(family, tmp_path):
    words = tokenizer(FAMILIES[family])
    for rows in (ROWS, CHATS):
        ours = PreferenceTuning(words, 256).encode(rows)
        for pair, their in zip(ours, trainer(words, rows, tmp_path).train_dataset, strict=True):
            for name in ("chosen", "rejected"):
                answer = getattr(pair, name)
                assert answer.ids == their["prompt_ids"] + their[f"{name}_ids"]
                ((start, end),) = answer.spans
                assert (start, end) == (len(their["prompt_ids"]), len(answer.ids))


def test_the_gradient_reaches_the_factors_and_the_reference_has_none():
    words = tokenizer(LLAMA3)
    recipe, policy = PreferenceTuning(words, 64), adapted(words)
    for _, layer in adapted_layers(policy):
        layer.set_phase("B")
    recipe.loss(policy, recipe.collate(recipe.encode(ROWS))).backward()
    for _, layer in adapted_layers(policy):
        assert layer.lora_B.grad.abs().sum() > 0 and layer.lora_A.grad is None and layer.enabled


def test_the_reference_is_the_base_without_what_methods_add_to_it():
    """A term (FLoRA, FedEx) is in the policy alone: with zero factors it still earns a reward."""
    words = tokenizer(LLAMA3)
    recipe = PreferenceTuning(words, 64)
    policy = model(words)
    attach(policy, LoRAConfig(rank=4, target_modules=["q_proj"]), seed=1)
    examples = recipe.encode(ROWS)
    assert recipe.evaluate(policy, examples, 4)["reward_margin"] == 0
    for _, layer in adapted_layers(policy):
        term = torch.randn(layer.out_features, 2), torch.randn(2, layer.in_features)
        layer.set_call(replace(layer.call, term=term))
    assert abs(recipe.evaluate(policy, examples, 4)["reward_margin"]) > 1e-4
    assert recipe.evaluate(model(words), examples, 4)["reward_margin"] == 0, "a bare model"


def test_whole_conversations_share_their_beginning():
    recipe = PreferenceTuning(tokenizer(LLAMA3), 256)
    expected = recipe.encode(CHATS)
    whole = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in CHATS]
    assert recipe.encode(whole) == expected
    asked = CHATS[0]["prompt"][0]["content"]
    assert recipe.encode([whole[0] | {"prompt": asked}]) == expected[:1]
    assert recipe.encode([CHATS[0] | {"prompt": asked}]) == expected[:1]
    texts = {k: CHATS[0][k][0]["content"] for k in ("chosen", "rejected")}
    assert recipe.encode([CHATS[0] | texts]) == expected[:1]


def test_texts_without_a_prompt_share_what_trl_says():
    words = tokenizer(LLAMA3)
    row = {k: ROWS[0]["prompt"] + ROWS[0][k] for k in ("chosen", "rejected")}
    split = trl.extract_prompt(dict(row))
    pair = PreferenceTuning(words, 256).encode([row])[0]
    for name in ("chosen", "rejected"):
        answer = getattr(pair, name)
        ((start, end),) = answer.spans
        assert words.decode(answer.ids[:start]) == "<s>" + split["prompt"]
        assert words.decode(answer.ids[start:end]) == split[name] + "</s>"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "chosen": "b"}, "row 2: it has no value for column 'rejected'"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "row 2: .* for column 'chosen'"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            "row 2: chosen and rejected are the same",
        ),
        ({"chosen": say("a", "b"), "rejected": say("a", "b")}, "row 2: .* are the same"),
        ({"chosen": say("a", "b"), "rejected": say("c", "b")}, "row 2: .* share no message and"),
        ({"chosen": say("a", "b"), "rejected": "b"}, "row 2: chosen is list .*expected two texts"),
        ({"prompt": 5, "chosen": "b", "rejected": "c"}, "row 2: column 'prompt' is int 5"),
        ({"prompt": "a", "chosen": 5, "rejected": 6}, "row 2: column 'chosen' is int 5"),
        (
            {"prompt": say("a", "b"), "chosen": "c", "rejected": "d"},
            "row 2: the chat template refuses it: Roles must alternate",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_number_of_the_row(row, message):
    with pytest.raises(BadInput, match=message) as caught:
        PreferenceTuning(tokenizer(GEMMA3), 64).encode([CHATS[0], row])
    assert "\n" not in str(caught.value)


def test_other_columns_are_named():
    with pytest.raises(BadInput, match=r"columns are chosen and rejected, .* there are text"):
        PreferenceTuning(tokenizer(GEMMA3), 64).encode([{"text": "a"}])


def test_what_max_length_leaves_nothing_of_is_told():
    words = tokenizer(unmarked(LLAMA3))
    same = {"prompt": "a", "chosen": "on the hill is old", "rejected": "on the hill is the ship"}
    long = {"prompt": "the ship is old " * 4, "chosen": "a", "rejected": "b"}
    found = PreferenceTuning(words, 8).encode([ROWS[2], long])
    assert found[0].measure().lacks is None and found[0].measure().cut > 0
    assert found[1].measure().lacks == "its answer is cut away by --max-length"
    cut = PreferenceTuning(words, 6).encode([same])[0]
    assert cut.measure().lacks == "chosen and rejected are the same up to --max-length"
    silent = {"chosen": say("a", "b", "c"), "rejected": say("a", "b", "d")}
    lacks = PreferenceTuning(words, 64).encode([silent])[0].measure().lacks
    assert lacks == "an answer has no turn of the assistant's"


def test_the_recipe_is_built_from_the_options():
    settled = choosing.settle(Config().with_values(dpo_label_smoothing=0.1), ROWS[0])
    made = choosing.build(settled, tokenizer(LLAMA3), ROWS, torch.device("cpu"))
    assert isinstance(made, PreferenceTuning)
    assert (made.beta, made.smoothing) == (0.1, 0.1)
