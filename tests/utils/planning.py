"""Configs and adapted models for tests of `scaleup.memory`."""

import pathlib
import random

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from scaleup.backbone.method import apply_method
from scaleup.settings import schema as config
from scaleup.training.preflight import CHECKS

SIZES = {
    "bert": dict(hidden_size=128, num_hidden_layers=4, intermediate_size=512),
    "bart": dict(
        d_model=128, encoder_layers=3, decoder_layers=2, encoder_ffn_dim=512, decoder_ffn_dim=512
    ),
}


def overrides(workspace: pathlib.Path, *more: str, family: str = "bert") -> list[str]:
    return [
        f"model.name={workspace / family}",
        f"data.train_file={workspace / 'train.csv'}",
        f"data.test_file={workspace / 'test.csv'}",
        "data.k=64",
        "data.dev_size=4",
        "data.max_length=64",
        "data.pad_to_max_length=true",
        "method.prefix_hidden_size=256",
        f"train.output_dir={workspace / 'out' / str(random.random())}",
        "train.per_device_train_batch_size=8",
        *more,
    ]


def settings(workspace: pathlib.Path, *more: str, family: str = "bert") -> config.Settings:
    return config.load(None, overrides(workspace, *more, family=family), checks=CHECKS)


def adapted(
    workspace: pathlib.Path, family: str, device: str, shape=None, more: tuple[str, ...] = ()
) -> nn.Module:
    chosen = settings(workspace, *more, family=family)
    shape = shape or AutoConfig.from_pretrained(workspace / family)
    with torch.device(device):
        model = AutoModelForSequenceClassification.from_config(shape, attn_implementation="sdpa")
    return apply_method(model, chosen.method)
