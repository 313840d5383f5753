"""Check and fit the lengths of inputs and outputs to the positions of a model."""

from transformers import PretrainedConfig

from scaleup.errors import ConfigError
from scaleup.settings.data import DataSettings
from scaleup.settings.schema import ModelSettings, Settings

# Model types that count the positions of a text from their padding index + 1.
FROM_PADDING = (
    *("camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke"),
    *("markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
    "xmod",
)


def position_limit(config: PretrainedConfig) -> int | None:
    """Return the number of tokens that learned positions allow; None without such a table."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in FROM_PADDING:
        # The padding index of MPNet is 1, whatever its config says.
        return positions - (1 if config.model_type == "mpnet" else config.pad_token_id) - 1
    return positions


def _has_relative_positions(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "relative_attention_num_buckets", None))


def _continues_prompt(data: DataSettings) -> bool:
    """Return whether text is generated after the prompt, in the same positions."""
    return data.task == "causal_lm" and data.metric not in (None, "loss")


def length_problems(
    data: DataSettings, model: ModelSettings, config: PretrainedConfig, *, defaults: bool
) -> list[str]:
    """Return which lengths exceed the model's positions, which would end a run by an index error.

    A default data.max_length, which `fit_length` may still reduce, counts only with `defaults`.
    """
    limit, length, target = position_limit(config), data.max_length, data.max_target_length
    if limit is None:
        return []
    problems, positions = [], f"but {model.name} has {limit} positions"
    chosen = data.model_fields_set
    if length > limit and (defaults or "max_length" in chosen):
        problems.append(f"data.max_length: {length} tokens, {positions}")
    if _has_relative_positions(config):
        return problems
    decodes = data.task == "seq2seq" and config.is_encoder_decoder
    if decodes and "max_target_length" in chosen and target > limit:
        problems.append(f"data.max_target_length: {target} tokens, {positions}")
    elif _continues_prompt(data) and "max_length" in chosen and length + target > limit:
        use = f"prompts of up to {length} tokens and data.max_target_length {target} written"
        problems.append(f"data.max_length: {use} after them, {positions}")
    return problems


def fit_length(settings: Settings, config: PretrainedConfig) -> Settings:
    """Reduce default lengths to what the model allows; refuse chosen lengths that are too long."""
    limit, data = position_limit(config), settings.data
    most = {}
    if limit is not None:
        most["max_length"] = limit - data.max_target_length * _continues_prompt(data)
        if data.task == "seq2seq" and not _has_relative_positions(config):
            most["max_target_length"] = limit
    fitted = {
        key: value
        for key, value in most.items()
        if key not in data.model_fields_set and 0 < value < getattr(data, key)
    }
    data = data.model_copy(update=fitted)
    if problems := length_problems(data, settings.model, config, defaults=True):
        raise ConfigError(problems)
    return settings.model_copy(update={"data": data})
