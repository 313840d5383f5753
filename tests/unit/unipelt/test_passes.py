"""What a forward pass knows belongs to that pass: not to a later one, not to another thread."""

import contextlib
import copy
import functools
import gc
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint

from scaleup.training.callbacks import GateStatistics
from scaleup.unipelt.forward_pass import ForwardPass
from scaleup.unipelt.kernels import planned_for, target_device
from scaleup.unipelt.passes import Passes
from scaleup.unipelt.sites import find_sites
from tests.utils.threads import run_together
from tests.utils.tiny import LABELS, PAD, TARGETS, adapt, backbone, batch, task_type

FAMILIES = ("bert", "bart", "t5", "llama", "gpt2", "deberta-v2", "modernbert")
SUBMODULES = {
    "adapter": ["adapter"],
    "prefix": ["prefix"],
    "lora": ["lora"],
    "parallel": ["parallel_adapter"],
    "all": ["adapter", "prefix", "lora"],
}


def trained(family: str, submodules: list[str], checkpointing: bool):
    """Return a model in training mode without dropout."""
    chances = [
        name
        for name, value in backbone(family).config.to_dict().items()
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name)
    ]
    bare = backbone(family, **dict.fromkeys(chances, 0.0))
    model = adapt(bare, submodules=submodules, gates="learned").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def examples(model, lengths: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    given = batch(lengths, seed=seed)
    kind = task_type(model.get_base_model())
    if kind == "SEQ_CLS":
        return given | {"labels": LABELS}
    if kind == "SEQ_2_SEQ_LM":
        return given | {"labels": TARGETS[:, : max(lengths) - 5]}
    return given | {"labels": given["input_ids"].masked_fill(given["input_ids"] == PAD, -100)}


def gradients(model, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(losses).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the greatest difference of any gradient, relative to its largest value."""
    assert found.keys() == expected.keys()
    return max(
        ((found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-3)).item()
        for name, grad in expected.items()
    )


def without_gradients(model, given) -> None:
    with torch.no_grad():
        model(**given)


def with_disabled_adapter(model, given) -> None:
    with model.disable_adapter(), torch.no_grad():
        model(**given)


def with_disabled_adapter_and_gradients(model, given) -> None:
    with model.disable_adapter():
        model(**given)


def evaluation(model, given) -> None:
    model.eval()
    without_gradients(model, given)
    model.train()


def generation(model, given) -> None:
    if task_type(model.get_base_model()) == "SEQ_CLS":
        return
    model.eval()
    given = {name: given[name] for name in ("input_ids", "attention_mask")}
    model.generate(**given, max_new_tokens=3, num_beams=2, pad_token_id=PAD)
    model.train()


BETWEEN = (
    without_gradients,
    with_disabled_adapter,
    with_disabled_adapter_and_gradients,
    evaluation,
    generation,
)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("submodules", SUBMODULES)
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_before_a_backward_pass_do_not_disturb_each_other(family, submodules, checkpointing):
    model = trained(family, SUBMODULES[submodules], checkpointing)
    first, second = examples(model, (11, 7, 9), 3), examples(model, (6, 13, 8), 8)
    alone = gradients(model, model(**first).loss), gradients(model, model(**second).loss)
    both = {name: alone[0][name] + alone[1][name] for name in alone[0]}
    assert worst(gradients(model, model(**first).loss, model(**second).loss), both) < 1e-5
    for disturb in BETWEEN:
        loss = model(**first).loss
        disturb(model, second)
        assert worst(gradients(model, loss), alone[0]) < 1e-5, disturb.__name__


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_dpo_without_a_reference_model(family):
    """Policy passes, then reference passes with disabled adapters, then one backward pass."""

    def loss(model, policy_first: bool):
        chosen, rejected = examples(model, (11, 7, 9), 3), examples(model, (6, 13, 8), 8)

        def reference():
            with torch.no_grad(), model.disable_adapter():
                return [model(**given).loss for given in (chosen, rejected)]

        before = None if policy_first else reference()
        policy = [model(**given).loss for given in (chosen, rejected)]
        margin = policy[0] - policy[1]
        kept = before or reference()
        return -torch.nn.functional.logsigmoid(margin - (kept[0] - kept[1]))

    plain = trained(family, ["adapter", "prefix", "lora"], checkpointing=False)
    recomputed = trained(family, ["adapter", "prefix", "lora"], checkpointing=True)
    expected = gradients(plain, loss(plain, policy_first=False))
    assert worst(gradients(recomputed, loss(recomputed, policy_first=True)), expected) < 1e-5


@pytest.mark.parametrize("order", ["before", "again", "offload", "every second"])
def test_it_does_not_matter_how_checkpointing_was_switched_on(order):
    expected, model = (trained("llama", ["prefix", "lora"], False) for _ in range(2))
    if order == "before":
        bare = backbone("llama")
        bare.gradient_checkpointing_enable()
        model = adapt(bare, submodules=["prefix", "lora"], gates="learned").train()
    elif order == "again":
        for _ in range(2):
            model.gradient_checkpointing_enable()
            model(**examples(model, (11, 7, 9), 3))
            model.gradient_checkpointing_disable()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        every = 2 if order == "every second" else 1
        model.get_base_model().gradient_checkpointing_enable(every_n_layers=every)
    # As with offload=True, a block is recomputed from other tensor objects than it was called with.
    offload = torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor)

    def both(model):
        with offload if order == "offload" else contextlib.nullcontext():
            losses = [
                model(**examples(model, lengths, 3)).loss for lengths in ((11, 7, 9), (6, 13, 8))
            ]
        return gradients(model, *losses)

    assert worst(both(model), both(expected)) < 1e-5


def test_a_backward_pass_with_other_adapters_than_the_forward_pass_is_refused():
    """Plain PEFT would recompute the blocks with the adapters that are active now."""
    model = trained("bert", ["prefix", "lora"], checkpointing=True)
    given = examples(model, (11, 7, 9), 3)
    loss = model(**given).loss
    with model.disable_adapter(), pytest.raises(RuntimeError, match="adapters of its forward pass"):
        loss.backward()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    loss = model(**given).loss
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match="adapters of its forward pass"):
        loss.backward()
    model.set_adapter("default")
    model(**given).loss.backward()


def test_a_block_that_runs_outside_of_its_model_is_refused():
    """As in a checkpoint that was put around a block by hand; it would miss the padding mask."""
    model = trained("bert", ["adapter", "prefix", "lora"], checkpointing=False)
    block = model.get_base_model().bert.encoder.layer[0]
    model(**examples(model, (11, 7, 9), 3))
    with pytest.raises(RuntimeError, match="outside of a forward pass"):
        block(torch.zeros(3, 4, 32))
    forward = block.forward
    block.forward = lambda *args, **kw: checkpoint(forward, *args, use_reentrant=False, **kw)
    loss = model(**examples(model, (11, 7, 9), 3)).loss
    with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
        loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
@pytest.mark.parametrize("inner", [without_gradients, with_disabled_adapter_and_gradients])
def test_a_hook_may_run_the_model_inside_a_pass_of_the_model(family, inner, checkpointing):
    model = trained(family, ["adapter", "prefix", "lora"], checkpointing)
    first, second = examples(model, (11, 7, 9), 3), examples(model, (6, 13, 8), 8)
    expected, depth = gradients(model, model(**first).loss), []

    def interrupt(*_):
        if not depth:
            depth.append(1)
            inner(model, second)
            depth.clear()

    blocks, _ = find_sites(model.get_base_model())
    model.get_base_model().get_submodule(blocks[-1].name).register_forward_hook(interrupt)
    assert worst(gradients(model, model(**first).loss), expected) < 1e-5


def test_nothing_of_a_pass_stays_after_it():
    """Blocks to be recomputed keep their pass, which must not keep the blocks' tensors in turn."""

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is ForwardPass for thing in gc.get_objects())

    model = trained("bert", ["adapter", "prefix", "lora", "parallel_adapter"], checkpointing=True)
    given, before = examples(model, (11, 7, 9), 3), alive()
    passes = next(module for module in model.modules() if isinstance(module, Passes))
    loss = model(**given).loss
    assert passes.find() is None and alive() == before + 1
    loss.backward()
    del loss
    assert alive() == before

    def fail(*_):
        raise MemoryError

    model.get_base_model().bert.encoder.layer[1].output.dense.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(**given)
    assert passes.find() is None and alive() == before


def test_gates_of_recomputed_blocks_are_counted_once():
    model = trained("bert", ["adapter", "prefix", "lora"], checkpointing=True)
    log = GateStatistics(model)
    model(**examples(model, (11, 7, 9), 3)).loss.backward()
    assert {int(gate.statistics.sums_3N[0, 0]) for _, gate in log.gates} == {3}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["bert", "bart", "llama", "deberta-v2"])
def test_threads_that_train_one_model_do_not_disturb_each_other(family, checkpointing):
    model = trained(family, ["adapter", "prefix", "lora", "parallel_adapter"], checkpointing)
    weights = [p for p in model.parameters() if p.requires_grad]

    def step(given):
        out = model(**given)
        return out.logits, torch.autograd.grad(out.loss, weights, allow_unused=True)

    def repeat(given):
        logits, grads = expected[id(given)]
        for _ in range(6):
            found, found_grads = step(given)
            assert (found - logits).abs().max() < 1e-5
            for grad, wanted in zip(found_grads, grads, strict=True):
                assert (grad is None) == (wanted is None)
                assert grad is None or torch.allclose(grad, wanted, rtol=1e-4, atol=1e-5)

    batches = examples(model, (11, 7, 9), 3), examples(model, (6, 13, 8), 8)
    expected = {id(given): step(given) for given in batches}
    run_together(*[functools.partial(repeat, given) for given in batches])


def test_a_backward_pass_may_run_in_another_thread_than_its_forward_pass():
    """As on a GPU, where autograd has a thread of its own for each device."""
    model = trained("bart", ["adapter", "prefix", "lora"], checkpointing=True)
    first, second = examples(model, (11, 7, 9), 3), examples(model, (6, 13, 8), 8)
    expected = gradients(model, model(**first).loss)
    loss, found = model(**first).loss, {}
    without_gradients(model, second)
    run_together(lambda: found.update(gradients(model, loss)))
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_threads_that_generate_with_one_model_do_not_disturb_each_other(family):
    model = trained(family, ["adapter", "prefix", "lora"], checkpointing=False).eval()

    def write(given):
        return model.generate(**given, max_new_tokens=6, num_beams=2, pad_token_id=PAD).tolist()

    def repeat(given):
        assert [write(given) for _ in range(4)] == [expected[id(given)]] * 4

    batches = batch((11, 7, 9), seed=3), batch((6, 13, 8), seed=8)
    expected = {id(given): write(given) for given in batches}
    run_together(*[functools.partial(repeat, given) for given in batches])


def test_threads_that_load_models_do_not_disturb_each_other():
    expected = {family: find_sites(backbone(family)) for family in ("bert", "llama")}
    models = {family: backbone(family) for family in expected}

    def search(family):
        for _ in range(5):
            assert find_sites(models[family]) == expected[family]

    run_together(*[functools.partial(search, family) for family in expected])


def test_a_memory_plan_does_not_change_the_kernels_of_another_thread():
    seen = []
    with planned_for("cuda"):
        run_together(lambda: seen.append(target_device(torch.zeros(1))))
        assert target_device(torch.zeros(1)) == "cuda"
    assert seen == ["cpu"]


def test_adapters_that_another_thread_switches_during_a_pass_are_noticed():
    model = trained("bert", ["adapter", "prefix", "lora"], checkpointing=False)
    inside, switched = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        switched.wait(20)

    model.get_base_model().bert.encoder.layer[1].register_forward_pre_hook(wait)

    def switch():
        inside.wait(20)
        with model.disable_adapter():
            switched.set()
            worker.join(20)

    def run():
        try:
            model(**examples(model, (11, 7, 9), 3))
        except RuntimeError as error:
            messages.append(str(error))

    messages: list[str] = []
    worker = threading.Thread(target=run)
    worker.start()
    switch()
    assert len(messages) == 1 and "adapters of its forward pass" in messages[0]


def test_plain_lora_through_peft_is_no_better_with_other_adapters():
    """What the refusal above is compared with: plain PEFT is wrong or fails in other words."""
    model = get_peft_model(
        backbone("bert"), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    ).train()
    model.gradient_checkpointing_enable()
    loss = model(**examples(model, (11, 7, 9), 3)).loss
    with model.disable_adapter(), pytest.raises(Exception, match="checkpoint"):
        loss.backward()
