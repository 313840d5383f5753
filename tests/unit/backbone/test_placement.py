"""Computing on one device with weights that wait in files."""

import pytest
import torch
from peft import PeftModel

from scaleup.backbone.loading import load_config
from scaleup.backbone.method import load_run_model
from scaleup.backbone.placement import Offload
from scaleup.settings.schema import Settings
from tests.utils.tiny import adapt, auto_class, backbone, implementation, logits, same

CPU = torch.device("cpu")
SIZES = {"adapter_size": 6, "prefix_length": 3, "prefix_hidden_size": 8, "r": 4}  # as in `adapt`


def settings(folder, attention) -> Settings:
    return Settings.model_validate(
        {
            "model": {"name": str(folder), "dtype": "float32", "attention": attention},
            "method": SIZES,
            "data": {"train_file": "train.csv"},
            "train": {"output_dir": "unused"},
        }
    )


def load(folder, family, **source):
    chosen = settings(folder, implementation(family))
    config = load_config(chosen.model)
    labels = ["a", "b", "c"]
    return load_run_model(chosen, config, auto_class(family), labels, CPU, **source).eval()


@pytest.mark.parametrize("family", ["bert", "bart", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("with_peft", [False, True], ids=["as trained", "with PEFT"])
def test_a_model_larger_than_the_memory_gives_the_same_logits(family, with_peft, tmp_path):
    backbone(family).save_pretrained(tmp_path / "backbone", max_shard_size="20KB")
    trained = adapt(backbone(family)).eval()
    trained.save_pretrained(tmp_path / "best")
    source = {"adapter" if with_peft else "weights": tmp_path / "best"}
    offload = Offload(tmp_path / "offload", memory=30_000)
    model = load(tmp_path / "backbone", family, offload=offload, **source)
    assert isinstance(model, PeftModel)
    kept = {name for name, p in model.named_parameters() if p.device.type != "meta"}
    assert {name for name, p in trained.named_parameters() if p.requires_grad} <= kept
    frozen = [n for n, p in trained.named_parameters() if not p.requires_grad and n not in kept]
    assert frozen, "nothing waits in files"
    assert same(logits(model), logits(trained))


def test_a_model_that_fits_is_loaded_as_always(tmp_path):
    backbone("bert").save_pretrained(tmp_path / "backbone")
    adapt(backbone("bert")).save_pretrained(tmp_path / "best")
    offload = Offload(tmp_path / "offload")
    model = load(tmp_path / "backbone", "bert", offload=offload, weights=tmp_path / "best")
    assert not hasattr(model, "hf_device_map")
    assert all(p.device == CPU for p in model.parameters())
