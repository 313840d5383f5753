"""Make the entry points of transformers handle UNIPELT adapters.

    AutoModel….from_pretrained(folder)     model.load_adapter(folder)     model.add_adapter(config)
    model.delete_adapter(name)             model.enable_adapters()        pipeline(model=folder)

transformers injects an adapter without a `PeftModel` around the model, and reads its weights by
rules of its own. Whatever the method is, these rules insert the adapter's name only after `lora_A`
and `lora_B`, and they leave out a trained head.

This is the only file that replaces functions of PEFT and transformers. For methods other than
UNIPELT, the replaced functions do what they did before.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import peft.functional
import peft.utils.transformers_weight_conversion as conversion
from peft import PeftType
from peft.utils import AuxiliaryTrainingWrapper
from transformers.core_model_loading import WeightRenaming
from transformers.integrations import PeftAdapterMixin

# The last component of a name that begins with unipelt_. The adapter's name follows it.
CONTAINER = r"(unipelt_\w+)(?=\.(?!.*unipelt_))"


def extend(peft_type: PeftType, prefix: str, head: type[AuxiliaryTrainingWrapper]) -> None:
    """Let the entry points of transformers load, enable and delete adapters of a method.

    Args:
        peft_type: the method.
        prefix: part of the names of modules inside tuner layers, as PEFT's `BaseTuner.prefix`.
        head: the class of the wrappers of trained heads.
    """
    named: Any = conversion.build_peft_weight_mapping
    conversion.build_peft_weight_mapping = _with_names(named, peft_type)
    # transformers passes the name of the method as the prefix, which names of layers contain too.
    delete: Any = peft.functional.delete_adapter
    peft.functional.delete_adapter = _with_prefix(delete, f"{peft_type.value.lower()}_", prefix)
    # transformers disables heads with the adapters and leaves them disabled.
    PeftAdapterMixin.enable_adapters = _with_heads(PeftAdapterMixin.enable_adapters, head)
    PeftAdapterMixin.load_adapter = _with_advice(PeftAdapterMixin.load_adapter, head)


def _with_names(mapping: Callable[..., list[Any]], peft_type: PeftType) -> Callable[..., list[Any]]:
    @functools.wraps(mapping)
    def build_peft_weight_mapping(
        weight_conversions: Any, adapter_name: str, peft_config: Any = None
    ) -> list[Any]:
        built = mapping(weight_conversions, adapter_name, peft_config=peft_config)
        if getattr(peft_config, "peft_type", None) != peft_type:
            return built
        if not built:  # PEFT leaves out its own rules for a model without conversions
            built = [
                WeightRenaming("base_model.model.", ""),
                WeightRenaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"),
            ]
        built.append(WeightRenaming(CONTAINER, rf"\1.{adapter_name}"))
        for name in peft_config.modules_to_save or []:
            saved = rf"^((?:.*\.)?{re.escape(name)})\.(?!modules_to_save\.|original_module\.)"
            built.append(WeightRenaming(saved, rf"\1.modules_to_save.{adapter_name}."))
        return built

    return build_peft_weight_mapping


def _with_prefix(delete: Callable[..., Any], wrong: str, right: str) -> Callable[..., Any]:
    @functools.wraps(delete)
    def delete_adapter(model: Any, adapter_name: str, prefix: str, **kwargs: Any) -> Any:
        return delete(model, adapter_name, prefix=right if prefix == wrong else prefix, **kwargs)

    return delete_adapter


def _with_heads(
    enable: Callable[[Any], None], head: type[AuxiliaryTrainingWrapper]
) -> Callable[[Any], None]:
    @functools.wraps(enable)
    def enable_adapters(self: Any) -> None:
        enable(self)
        for module in self.modules():
            if isinstance(module, head):
                module.enable_adapters(True)

    return enable_adapters


def _with_advice(
    load: Callable[..., Any], head: type[AuxiliaryTrainingWrapper]
) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        except RuntimeError as error:
            has_head = any(isinstance(module, head) for module in self.modules())
            if "ignore_mismatched_sizes" not in str(error) or not has_head:
                raise
            raise ValueError(
                "the adapter's head has a different number of classes than the model; load the "
                "model with num_labels=…, the first number under `ckpt` in the report above"
            ) from error

    return load_adapter
