"""Writing an adapted tiny model as a folder, and loading it."""

import torch
from transformers import AutoConfig

from scaleup.backbone.loading import empty_model
from scaleup.export import fold
from scaleup.export.folder import FolderWriter
from scaleup.unipelt.sites import find_sites
from tests.utils.tiny import auto_class, backbone, implementation


def exported(model, family, tmp_path, gates, dropped=frozenset()):
    """Write the adapted model as a folder and load it."""
    backbone(family).save_pretrained(tmp_path / "base")
    model.save_pretrained(str(tmp_path / "adapter"))
    auto, attention = auto_class(family), implementation(family)
    config = AutoConfig.from_pretrained(tmp_path / "base")
    empty = empty_model(config, attention, torch.float32, auto)
    method, tensors = fold.read_checkpoint(tmp_path / "adapter")
    folded = fold.fold(method, tensors, *find_sites(empty), gates, dropped)
    out, dtype = tmp_path / "out", torch.float32
    out.mkdir()
    writer = FolderWriter(empty, folded, dtype, out)
    writer.write_config(auto.__name__)
    writer.write_weights(tmp_path / "base", 10**9)
    code = folded.specification is not None
    loaded, info = auto.from_pretrained(
        out, trust_remote_code=code, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info.values()), info
    return loaded.eval()
