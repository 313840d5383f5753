"""configs/sweeps/paper.yaml follows the authors' training script."""

import pathlib

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from scaleup.experiments import grid
from scaleup.settings.schema import load
from scaleup.training import run
from scaleup.training.preflight import CHECKS
from scaleup.training.trainer import RunTrainer
from tests.utils.workspace import ROOT, make_workspace

SWEEP = str(ROOT / "configs" / "sweeps" / "paper.yaml")
RATES = {"full": 2e-5, "bitfit": 1e-4, "adapter": 1e-4, "prefix": 2e-4, "lora": 5e-4}
RATES |= dict.fromkeys(("ap", "apl", "ap_nogate"), 5e-4)
GATED = ("adapter_gated", "prefix_gated", "lora_gated", "ap", "apl")
FROZEN = ("bitfit", "prefix", "prefix_gated", "lora", "lora_gated")


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> list[grid.Trial]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))  # its runs/… must not meet the checkout's
        return grid.load(SWEEP).trials


def test_the_sweep_is_table_1_with_the_data_seeds_of_the_authors(trials):
    assert {trial.k for trial in trials} == {"100", "500", "1000"}
    assert {trial.settings.data.k for trial in trials} == {100, 500, 1000}
    assert {(t.seed, t.settings.data.seed) for t in trials} == {
        (str(seed), seed) for seed in (111, 222, 333, 444, 555)
    }
    assert len({trial.settings.data.name for trial in trials}) == 8
    assert {trial.method for trial in trials} == {*RATES, *GATED}


def test_every_trial_has_the_settings_of_the_authors_script(trials):
    for trial in trials:
        settings, train = trial.settings, trial.settings.train
        base = trial.method.removesuffix("_gated")
        assert settings.model.name == "google-bert/bert-base-uncased"
        assert settings.learning_rate == RATES[base]
        assert (train.warmup_steps, train.seed, train.bf16, train.fp16) == (0, 42, False, False)
        assert (train.num_train_epochs, train.early_stopping_patience) == (50, 10)
        assert (train.per_device_train_batch_size, train.weight_decay) == (16, 0)
        assert (settings.data.dev_size, settings.data.max_length) == (1000, 128)
        assert settings.data.pad_to_max_length
        assert settings.method.head == ("frozen" if trial.method in FROZEN else "trained")
        if settings.method.name == "unipelt":
            learned = trial.method in GATED
            assert settings.method.resolved_gates == ("learned" if learned else "none")
            assert settings.method.gate_pooling == ("paper" if learned else "auto")


@pytest.fixture(scope="module")
def glue(tmp_path_factory) -> pathlib.Path:
    """Tiny BERT, and RTE in miniature: as many pairs as the protocol needs at K = 100."""
    folder = make_workspace(tmp_path_factory.mktemp("glue"))
    texts = pd.read_csv(folder / "train.csv")
    (folder / "rte").mkdir()
    for split, count in (("train", 1100), ("validation", 20)):
        rows = texts.sample(count, replace=True, random_state=count).reset_index(drop=True)
        table = pd.DataFrame(
            {
                "sentence1": rows["text"] + [f" film {'plot ' * (i % 7)}" for i in rows.index],
                "sentence2": rows["text"],
                "label": (rows["label"] == "good").astype(int),
            }
        )
        table.to_parquet(folder / "rte" / f"{split}.parquet")
    return folder


def test_a_trial_trains_padded_batches_in_random_order_under_a_frozen_head(
    trials, glue, tmp_path, monkeypatch
):
    (trial,) = grid.select(trials, ["rte-100-lora_gated-111"])
    tiny = [f"model.name={glue / 'bert'}", f"data.path={glue}", "data.max_length=32"]
    words = [*trial.arguments, *tiny, "train.max_steps=7", f"train.output_dir={tmp_path / 'run'}"]
    widths, rates, strategies, lengths = set(), [], set(), []
    compute_loss = RunTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        if model.training:
            widths.add(inputs["input_ids"].shape[1])
            lengths.append(inputs["attention_mask"].sum(1).tolist())
            rates.append(self.lr_scheduler.get_last_lr()[0])
            strategies.add(self.args.train_sampling_strategy)
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "compute_loss", record)
    results = run.run(load(None, words, checks=CHECKS))
    assert results["seeds"] == {"data": 111, "train": 42}
    assert results["examples"] == {"train": 100, "dev": 1000, "test": 20}
    assert widths == {32} and strategies == {"random"} and len(lengths) == 7
    assert all(len(set(batch)) > 3 for batch in lengths[:-1])  # similar lengths are not grouped
    assert rates == pytest.approx([5e-4 * (7 - step) / 7 for step in range(7)])
    weights = load_file(tmp_path / "run" / "best" / "adapter_model.safetensors")
    head = {name: tensor for name, tensor in weights.items() if "classifier" in name}
    assert len(head) == 2
    monkeypatch.setattr(RunTrainer, "compute_loss", compute_loss)
    still = ("train.learning_rate=1e-60", f"train.output_dir={tmp_path / 'still'}")
    run.run(load(None, [*words, *still], checks=CHECKS))
    initial = load_file(tmp_path / "still" / "best" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, initial[name]) for name, tensor in head.items())
    assert any(not torch.equal(tensor, initial[name]) for name, tensor in weights.items())
