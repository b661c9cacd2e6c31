"""`save_pretrained` of an attached model: what it writes is what was trained. transformers' own
`from_pretrained` judges, with PEFT inside.
"""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from rolora import LoRAConfig, attach, detach, merge, set_phase, unmerge
from rolora.adapter.model import adapted_layers
from tests.models import build, inputs
from tests.quantised import saved_quantised

TARGETS = ["q_proj", "k_proj", "v_proj"]


def filled(files, **config):
    model = hf.AutoModelForCausalLM.from_pretrained(files["llama"]).eval()
    attach(model, LoRAConfig(rank=4, target_modules=TARGETS, **config), seed=0)
    fill(model, 1)
    return model


def fill(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.3, generator=generator)


def logits(model):
    batch = inputs("llama")
    return model(input_ids=batch["input_ids"]).logits


def read(folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_folder_of_an_attached_model_is_read_as_the_trained_model(files, tmp_path):
    model, base = filled(files), logits(read(files["llama"]))
    model.save_pretrained(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = logits(read(tmp_path / "out"))
    close(again, logits(model))
    assert (again - base).abs().max() > 0.1, "the adapter must do something, or nothing is judged"


def test_a_trained_head_is_read_with_it(files, tmp_path):
    options = {"num_labels": 3}
    model = hf.AutoModelForSequenceClassification.from_pretrained(files["roberta"], **options)
    config = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"])
    attach(model.eval(), config, seed=0)
    fill(model, 1)
    nn.init.normal_(model.classifier.out_proj.weight)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, **options).eval()
    ids = inputs("roberta")["input_ids"]
    close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_merged_model_is_saved_plain(files, tmp_path):
    model = filled(files)
    trained = logits(model)
    merge(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == set(load_file(f"{files['llama']}/model.safetensors"))
    close(logits(read(tmp_path)), trained)
    unmerge(model)
    close(logits(model), trained)


def test_a_model_that_is_merged_in_part_is_refused(files, tmp_path):
    model = filled(files)
    next(adapted_layers(model))[1].merge()
    with pytest.raises(ValueError, match=r"is merged .*unmerge\(model\) first"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_quantised_base_is_refused_with_the_way_out(files, tmp_path):
    model = saved_quantised(tmp_path, files, "nf4")
    attach(model, LoRAConfig(rank=4, target_modules=TARGETS), seed=0)
    merge(model)
    with pytest.raises(ValueError, match=r"quantised.*rolora\.export --to merged"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_saves_its_own_factors(copied, files, tmp_path):
    model = filled(files)
    twin = copied(model)
    fill(twin, 2)
    twin.save_pretrained(tmp_path)
    close(logits(read(tmp_path)), logits(twin))
    assert (logits(twin) - logits(model)).abs().max() > 0.1


def test_detaching_gives_the_models_own_method_back(files, tmp_path):
    model = detach(filled(files), merge=True)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    close(logits(read(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", ["tied", "nf4", "int8"])
def test_a_checkpoint_of_the_trainer_holds_no_weight_of_the_base(kind, files, tmp_path):
    model = build("gpt2") if kind == "tied" else saved_quantised(tmp_path, files, kind)
    targets = ["c_attn"] if kind == "tied" else TARGETS
    attach(model, LoRAConfig(rank=2, target_modules=targets), seed=0)
    set_phase(model, "A")  # a factor that rests goes with it
    model.save_pretrained(tmp_path / "checkpoint-7")
    stored = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    added = {f"{name}.lora_{factor}" for name, _ in adapted_layers(model) for factor in "AB"}
    scales = {key for key in stored if key.endswith(("SCB", "weight_format"))}
    assert set(stored) - scales == added and (scales == set() or kind == "int8")


def test_what_trains_beside_the_adapter_is_named(files, tmp_path):
    model = filled(files)
    model.model.norm.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"model\.norm\.weight trains .*modules_to_save"):
        model.save_pretrained(tmp_path)


def test_the_hub_is_not_written_to_by_the_way(files, tmp_path):
    model = filled(files)
    with pytest.raises(ValueError, match="upload_folder"):
        model.save_pretrained(tmp_path / "out", push_to_hub=True)


def test_the_method_does_not_keep_a_model_alive(files):
    model = filled(files)
    method, gone = model.save_pretrained, weakref.ref(model)
    gc.disable()
    del model
    gc.enable()
    assert gone() is None
    with pytest.raises(RuntimeError, match="keep it in a variable"):
        method("nowhere")


def test_only_the_main_process_writes(files, tmp_path):
    model = filled(files)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_the_base_is_named(files, tmp_path):
    model = filled(files)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(files["llama"])
