"""Adapters that learn a prompt: losses, log-probs and gradients of PEFT's own forward, in float64.

Their virtual tokens count everywhere where a model's log-probs are computed, or it is an error.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fused_prefopt as fp

peft = pytest.importorskip("peft")

from learned_prompts import (  # noqa: E402
    KINDS,
    VIRTUAL,
    adapter,
    base_model,
    loss_of,
    own_logits,
    own_loss,
    own_sums,
    prompted,
)
from model_families import assert_gradients, family, fused, gradients, pairs  # noqa: E402
from tiny_models import pair_features, point_features, tiny_llama  # noqa: E402
from torch.distributed import destroy_process_group, init_process_group  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from truth import largest_error  # noqa: E402

from fused_prefopt.data import PairCollator, PointCollator  # noqa: E402
from fused_prefopt.evaluation import score_pairs  # noqa: E402
from fused_prefopt.fingerprint import model_fingerprint  # noqa: E402
from fused_prefopt.integrations.causal_lm import last_hidden, unwrapped  # noqa: E402
from fused_prefopt.integrations.collated import completion_logps  # noqa: E402
from fused_prefopt.integrations.head_check import check_head  # noqa: E402
from fused_prefopt.integrations.reference_pass import Reference, logps_through  # noqa: E402
from fused_prefopt.integrations.transformers import (  # noqa: E402
    attach,
    past_wrappers,
    preference_outputs,
)
from fused_prefopt.reference import add_reference_logps, dataset_logps  # noqa: E402

FAMILIES = ["llama", "gpt2", "opt", "qwen2", "gemma2", "gpt-neox"]
WAYS = {"past the wrappers": past_wrappers, "plain": dict}


def close(got, wanted, tolerance=1e-9):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_of_the_prompt_are_those_of_pefts_own_logits(name, kind):
    model, batch = prompted(name, kind), pairs()
    loss_fn = fp.PreferenceLoss("simpo")
    truth = own_loss(model, batch, loss_fn)
    wanted = gradients(model, truth)
    assert wanted and all(key.startswith("prompt_encoder.default.") for key in wanted)
    loss, got, _ = fused(model, batch)
    close(loss, truth)
    assert_gradients(got, wanted)
    # The prompt matters.
    with model.disable_adapter():
        assert abs(own_loss(model, batch, loss_fn).item() - truth.item()) > 1e-3


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_everything_can_train_with_the_prompt(kind, way):
    model, batch = prompted("llama", kind).train(), pairs()
    model.requires_grad_(True)
    wanted = gradients(model, own_loss(model, batch, fp.PreferenceLoss("simpo")))
    assert len(wanted) == len(list(model.parameters()))
    attach(model, fp.PreferenceLoss("simpo"))
    arguments = WAYS[way](batch)
    assert_gradients(gradients(model, model(**arguments)["loss"]), wanted)


@pytest.mark.parametrize("kind", ["prompt", "encoder"])
def test_the_router_loss_counts_the_virtual_tokens(kind):
    model, batch = prompted("mixtral", kind), pairs()
    loss_fn = fp.PreferenceLoss("simpo")
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    truth = loss_of(outputs.logits[:, VIRTUAL:], batch, loss_fn) + 0.3 * outputs.aux_loss
    wanted = gradients(model, truth)
    loss, got, metrics = fused(model, batch)
    close(loss, truth)
    assert_gradients(got, wanted)
    assert metrics["aux_loss"] == pytest.approx(outputs.aux_loss.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_without_a_prompt_starts_unpredicted(kind):
    model = prompted("llama", kind)
    features = [{"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [8, 9]}]
    batch = PairCollator(0)(features)
    loss_fn = fp.PreferenceLoss("simpo", beta=2.0)
    result = preference_outputs(model, loss_fn, batch)
    logps = own_logits(model, batch).log_softmax(-1)
    sums = torch.stack([logps[0, 0, 6] + logps[0, 1, 7], logps[1, 0, 9]])
    truth = loss_fn.from_logps(fp.LogpBatch(sums, torch.tensor([2, 1])))
    close(result.loss, truth.loss)


def attached(model, batch, loss_fn, **options):
    """Loss, gradients and metrics of an attached loss, called without `past_wrappers`."""
    attachment = attach(model, loss_fn, **options)
    loss = model(**batch)["loss"]
    found = gradients(model, loss)
    attachment.detach()
    return loss, found, attachment.pop_metrics("eval")


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_as_reference_is_the_model_without_its_prompt(kind):
    model, base, batch = prompted("llama", kind), base_model("llama"), pairs()
    loss_fn = fp.PreferenceLoss("dpo", beta=0.4)
    reference = own_sums(base, batch).detach()
    truth = own_loss(model, batch, loss_fn, reference=reference)
    wanted = gradients(model, truth)
    loss, got, metrics = attached(model, batch, loss_fn, reference="adapter")
    close(loss, truth)
    assert_gradients(got, wanted)
    difference = (own_sums(model, batch) - reference)[:3].mean().item()
    assert metrics["kl/chosen"] == pytest.approx(difference, rel=1e-6)
    # The prompt is back.
    close(own_sums(model, batch), own_sums(prompted("llama", kind), batch), 1e-12)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("trained", ["policy", "reference", "both"])
def test_a_model_as_reference_keeps_its_own_prompt(kind, trained):
    batch, loss_fn = pairs(), fp.PreferenceLoss("dpo", beta=0.4)
    policy, other = base_model("llama"), base_model("llama")
    if trained != "reference":
        policy = prompted("llama", kind)
    if trained != "policy":
        torch.manual_seed(11)
        other = peft.get_peft_model(other, adapter(kind)).double().eval()
    truth = own_loss(policy, batch, loss_fn, reference=own_sums(other, batch).detach())
    wanted = gradients(policy, truth)
    loss, got, _ = attached(policy, batch, loss_fn, reference=other)
    close(loss, truth)
    assert_gradients(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_divergence_of_the_tokens_from_the_model_without_its_prompt(kind):
    model, batch = prompted("llama", kind), pairs()
    loss_fn = fp.PreferenceLoss("tdpo2", beta=0.4)
    reference = own_logits(base_model("llama"), batch).detach()[:, :-1].log_softmax(-1)
    policy = own_logits(model, batch)[:, :-1].log_softmax(-1)
    completion = batch["completion_mask"][:, 1:] != 0
    kl = (reference.exp() * (reference - policy)).sum(-1).where(completion, 0.0).sum(1)
    picked = reference.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    sums = picked.where(completion, 0.0).sum(1)
    truth = own_loss(model, batch, loss_fn, reference=sums, sequence_kl=kl)
    wanted = gradients(model, truth)
    loss, got, _ = attached(model, batch, loss_fn, reference="adapter")
    close(loss, truth)
    # The gradient of the exact divergence is summed in fp32.
    assert_gradients(got, wanted, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_points_have_their_prompts_log_ratio(kind):
    features = point_features(4)
    batch = PointCollator(0)(features)
    model, base = prompted("llama", kind), base_model("llama")
    fields = {
        "rewards": batch["rewards"],
        "prompt": own_sums(model, batch, "prompt"),
        "reference": own_sums(base, batch).detach(),
        "prompt_reference": own_sums(base, batch, "prompt").detach(),
    }
    loss_fn = fp.PreferenceLoss("dro", beta=0.5, log_z0=1.0)
    truth = own_loss(model, batch, loss_fn, **fields)
    wanted = gradients(model, truth)
    loss, got, _ = attached(model, batch, loss_fn, reference="adapter")
    close(loss, truth)
    assert_gradients(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_tokens_are_those_of_pefts_own_logits(kind):
    model, batch = prompted("llama", kind), pairs()
    _, _, found = attached(model, batch, fp.PreferenceLoss("simpo"), log_tokens=True)
    logits = own_logits(model, batch)[:, :-1].detach()
    targets, members = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:] != 0
    chosen, rejected = members.clone(), members.clone()
    chosen[3:], rejected[:3] = False, False
    truth = {
        "entropy": torch.distributions.Categorical(logits=logits).entropy()[members],
        "logits/chosen": logits.mean(-1)[chosen],
        "logits/rejected": logits.mean(-1)[rejected],
        "mean_token_accuracy": (logits.argmax(-1) == targets)[chosen].double(),
    }
    for name, values in truth.items():
        assert found[name] == pytest.approx(values.mean().item(), rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_outside_an_attached_forward(kind):
    model, batch = prompted("llama", kind), pairs()
    truth, prompt = own_sums(model, batch), own_sums(model, batch, "prompt")
    for run in (completion_logps, logps_through):
        found = run(model, batch, prompt=True)
        close(found["completion"].double(), truth.detach(), 1e-6)
        close(found["prompt"].double(), prompt.detach(), 1e-6)
    loss_fn = fp.PreferenceLoss("simpo")
    wanted = gradients(model, own_loss(model, batch, loss_fn))
    result = preference_outputs(model, loss_fn, batch)
    close(result.loss, own_loss(model, batch, loss_fn))
    assert_gradients(gradients(model, result.loss), wanted)
    head = fp.LMHead.of(model)
    assert head.weight is unwrapped(model).lm_head.weight
    close(head.logits(last_hidden(model, batch)), own_logits(model, batch))
    # A reference model without a prompt sees none.
    close(completion_logps(unwrapped(model), batch)["completion"], base_sums(batch), 1e-6)


def base_sums(batch):
    return own_sums(base_model("llama"), batch).detach()


@pytest.mark.parametrize("kind", KINDS)
def test_a_switched_off_prompt_counts_nowhere(kind):
    model, batch = prompted("llama", kind), pairs()
    # Each with a model of its own: a call leaves traces in the model inside.
    for run in (completion_logps, logps_through):
        fresh = copy.deepcopy(model)
        with fresh.disable_adapter():
            close(run(fresh, batch)["completion"], base_sums(batch), 1e-6)
            check_head(fresh)
        close(run(fresh, batch)["completion"], own_sums(model, batch).detach(), 1e-6)
    source = Reference(copy.deepcopy(model), "adapter")
    close(source.logps(batch, prompt=False)["reference"], base_sums(batch), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_sets_log_probs(kind, tmp_path):
    model, base = prompted("llama", kind), base_model("llama")
    features, collator = pair_features(6), PairCollator(0)
    batch = collator(features)

    def columns(rows):
        names = ("ref_chosen_logps", "ref_rejected_logps")
        return torch.tensor([row[name] for name in names for row in rows], dtype=torch.float64)

    def added(**options):
        rows = add_reference_logps(model, features, collator, progress=False, **options)
        return columns(rows)

    truth, before = own_sums(model, batch).detach(), own_sums(base, batch).detach()
    assert largest_error(truth, before) > 1e-2
    for options in ({}, {"cache_dir": tmp_path}, {"cache_dir": tmp_path}, {"batch_size": 2}):
        close(added(**options), truth, 1e-6)
        with model.disable_adapter():
            close(added(**options), before, 1e-6)
    assert len(list(tmp_path.iterdir())) == 2
    found = dataset_logps(model, features, collator, progress=False)
    close(torch.cat(list(found.values())).double(), truth, 1e-6)
    rows = Reference(model, "adapter").add_logps(features, collator, progress=False)
    close(columns(rows), before, 1e-6)
    assert "forward" not in vars(unwrapped(model))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_model_with_a_learned_prompt(kind):
    model, base = prompted("llama", kind), base_model("llama")
    features, collator = pair_features(5), PairCollator(0)
    features = add_reference_logps(base, features, collator, progress=False)
    scores = score_pairs(model, base, features, collator, progress=False)
    batch = collator(features)
    close(scores.batch.policy.double(), own_sums(model, batch).detach(), 1e-6)
    policy, other = (own_logits(each, batch)[:, :-1].log_softmax(-1) for each in (model, base))
    members = batch["completion_mask"][:5, 1:] != 0
    kl = (policy.exp() * (policy - other)).sum(-1)[:5][members].mean()
    assert scores.kl == pytest.approx(kl.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_prompt_is_part_of_the_fingerprint(kind):
    model = prompted("llama", kind)
    with_prompt, without = model_fingerprint(model), model_fingerprint(base_model("llama"))
    assert with_prompt == model_fingerprint(prompted("llama", kind)) != without
    with model.disable_adapter():
        assert model_fingerprint(model) == without
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight[0, 0] += 1e-3
    assert model_fingerprint(model) not in (with_prompt, without)


@pytest.mark.parametrize("kind", KINDS)
def test_check_head_compares_the_logits_behind_the_prompt(kind):
    model = prompted("gemma2", kind)
    check_head(model)
    model.base_model.lm_head.register_forward_hook(lambda *given: given[2] + 1e-3 * given[2] ** 2)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does more than `LMHead` describes"):
        check_head(model)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_copy_has_its_own_prompt(kind):
    model, batch, loss_fn = prompted("llama", kind), pairs(), fp.PreferenceLoss("simpo")
    attach(model, loss_fn)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.prompt_encoder["default"].embedding.weight.mul_(-1)
    close(twin(**batch)["loss"], own_loss(twin, batch, loss_fn))
    close(model(**batch)["loss"], own_loss(model, batch, loss_fn))
    assert abs(twin(**batch)["loss"].item() - model(**batch)["loss"].item()) > 1e-3


def test_another_of_its_prompts_can_be_made_active():
    model, batch, loss_fn = prompted(), pairs(), fp.PreferenceLoss("simpo")
    torch.manual_seed(8)
    model.add_adapter("other", adapter("prompt"))
    model.double().eval()
    attach(model, loss_fn)
    losses = []
    for name in ("default", "other"):
        model.set_adapter(name)
        losses.append(model(**batch)["loss"])
        close(losses[-1], own_loss(model, batch, loss_fn))
    assert abs(losses[0].item() - losses[1].item()) > 1e-3


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_other_batches_go_the_models_own_way_and_detach_restores_it(kind):
    model, batch = prompted("llama", kind), pairs()
    before = own_logits(model, batch)
    attachment = attach(model, fp.PreferenceLoss("simpo"))
    assert torch.equal(own_logits(model, batch), before)
    attachment.detach()
    assert not model._forward_pre_hooks and "forward" not in vars(unwrapped(model))
    assert torch.equal(model(**batch).logits[:, -batch["input_ids"].shape[1] :], before)


@pytest.fixture
def one_process(tmp_path):
    """A process group of one."""
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_behind_the_wrapper_of_distributed_data_parallel(kind, one_process):
    model, batch = prompted("llama", kind), pairs()
    loss_fn = fp.PreferenceLoss("dpo", beta=0.4)
    truth = own_loss(model, batch, loss_fn, reference=base_sums(batch))
    wanted = gradients(model, truth)
    attach(model, loss_fn, reference="adapter")
    wrapped = DistributedDataParallel(model)
    for way in WAYS.values():
        loss = wrapped(**way(batch))["loss"]
        close(loss, truth)
        assert_gradients(gradients(model, loss), wanted)
    close(completion_logps(wrapped, batch)["completion"], own_sums(model, batch).detach(), 1e-6)
    found = dataset_logps(wrapped, pair_features(3), PairCollator(0), progress=False)
    truth = own_sums(model, PairCollator(0)(pair_features(3)))
    close(torch.cat(list(found.values())).double(), truth.detach(), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_behind_fully_sharded_data_parallel(kind, one_process):
    model, batch = prompted("llama", kind), pairs()
    whole, loss_fn = copy.deepcopy(model), fp.PreferenceLoss("dpo", beta=0.4)
    truth = own_loss(whole, batch, loss_fn, reference=base_sums(batch))
    wanted = gradients(whole, truth)
    inner, mesh = unwrapped(model), init_device_mesh("cpu", (1,))
    for unit in (*inner.model.layers, inner.lm_head, model):
        fully_shard(unit, mesh=mesh)
    attach(model, loss_fn, reference="adapter")
    loss = model(**past_wrappers(batch))["loss"]
    close(loss, truth)
    found = gradients(model, loss)
    assert_gradients({name: value.full_tensor() for name, value in found.items()}, wanted)
    features, collator = pair_features(3), PairCollator(0)
    held_out = collator(features)
    sums = dataset_logps(model, features, collator, progress=False)
    close(torch.cat(list(sums.values())).double(), own_sums(whole, held_out).detach(), 1e-6)
    with model.disable_adapter():
        sums = dataset_logps(model, features, collator, progress=False)
    close(torch.cat(list(sums.values())).double(), base_sums(held_out), 1e-6)
    assert model_fingerprint(model) == model_fingerprint(whole)


def test_gradient_checkpointing_of_a_prompt_changes_nothing():
    model, batch = prompted().train(), pairs()
    wanted = gradients(model, own_loss(model, batch, fp.PreferenceLoss("simpo")))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    attach(model, fp.PreferenceLoss("simpo"))
    assert_gradients(gradients(model, model(**batch)["loss"]), wanted)


def test_gradient_checkpointing_of_a_prefix_is_an_error():
    model, batch = prompted("llama", "prefix"), pairs()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    attach(model, fp.PreferenceLoss("simpo"))
    # Only layers that train leave it out.
    close(model(**batch)["loss"], own_loss(model, batch, fp.PreferenceLoss("simpo")))
    model.train()
    with pytest.raises(ValueError, match="gradient_checkpointing: got True .* learns a prefix"):
        model(**batch)


REFUSED = {"padding_free": "padding_free: got packed", "shared_prompt": "shared_prompt: got pairs"}


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_layouts_without_a_row_for_each_sequence_are_an_error(kind, layout):
    model, loss_fn = prompted("llama", kind), fp.PreferenceLoss("simpo")
    features, collator = pair_features(2), PairCollator(0, **{layout: True})
    batch = collator(features)
    with pytest.raises(ValueError, match=REFUSED[layout]):
        preference_outputs(model, loss_fn, batch)
    with pytest.raises(ValueError, match=REFUSED[layout]):
        dataset_logps(model, features, collator, progress=False)
    with model.disable_adapter():
        found = dataset_logps(model, features, collator, progress=False)
    truth = base_sums(PairCollator(0)(features))
    close(torch.cat(list(found.values())).double(), truth, 1e-5)
    attach(model, loss_fn)
    with pytest.raises(ValueError, match=REFUSED[layout]):
        model(**batch)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
@pytest.mark.filterwarnings("ignore:.* are not supported for parameter efficient tuning")
def test_what_the_adapter_leaves_out_of_the_batch_is_an_error(name):
    model, batch = prompted("gpt2"), pairs()
    batch[name] = torch.zeros_like(batch["input_ids"])
    attach(model, fp.PreferenceLoss("simpo"))
    with pytest.raises(ValueError, match=f"{name}: got some with an adapter that learns a prompt"):
        model(**batch)
    with pytest.raises(ValueError, match=f"{name}: got some with an adapter that learns a prompt"):
        last_hidden(model, batch)


def test_positions_with_a_prefix_are_counted_behind_it():
    if not hasattr(peft.PeftModel, "_adjust_prompt_learning_kwargs"):
        pytest.skip("this PEFT leaves positions out, which is an error")
    model, batch = prompted("llama", "prefix"), pairs()
    ids = batch["input_ids"]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    given = {**batch, "position_ids": positions}
    close(last_hidden(model, given), last_hidden(model, batch))
    moved = {**batch, "position_ids": positions + 2 * (positions > 3)}
    inputs = {name: moved[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs).logits
    close(fp.LMHead.of(model).logits(last_hidden(model, moved)), logits)
    assert largest_error(logits, own_logits(model, batch)) > 1e-3


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_wrapper_put_around_an_attached_model_needs_the_tokens_beside(kind):
    base, batch, loss_fn = base_model("llama"), pairs(), fp.PreferenceLoss("simpo")
    attach(base, loss_fn)
    model = peft.get_peft_model(base, adapter(kind)).double().eval()
    with pytest.raises(ValueError, match=r"input_ids: got .* call `model\(\*\*past_wrappers"):
        model(**batch)
    close(model(**past_wrappers(batch))["loss"], own_loss(model, batch, loss_fn))


def test_a_prompt_around_low_rank_terms():
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    inner = peft.get_peft_model(base_model("llama"), lora)
    model = peft.get_peft_model(inner, adapter("prompt")).double().eval()
    model.requires_grad_(True)
    batch, loss_fn = pairs(), fp.PreferenceLoss("simpo")
    truth = own_loss(model, batch, loss_fn)
    wanted = gradients(model, truth)
    assert any("lora_A" in name for name in wanted) and any("prompt" in name for name in wanted)
    loss, got, _ = attached(model, batch, loss_fn)
    close(loss, truth)
    assert_gradients(got, wanted)
    check_head(model)


def test_half_precision_prompts_train():
    model = peft.get_peft_model(tiny_llama(), adapter("prompt")).to(torch.bfloat16)
    batch = PairCollator(0)(pair_features(3))
    attach(model, fp.PreferenceLoss("simpo"))
    loss = model(**past_wrappers(batch))["loss"]
    (found,) = gradients(model, loss).values()
    truth = own_loss(model.float(), batch, fp.PreferenceLoss("simpo"))
    (wanted,) = gradients(model, truth).values()
    assert loss.item() == pytest.approx(truth.item(), rel=2e-2)
    assert found.shape == (VIRTUAL, 16)
    assert (found.float() - wanted).norm() <= 0.1 * wanted.norm()


def test_a_family_without_a_prompt_is_what_it_was():
    model, batch = family("llama"), pairs()
    truth = own_loss(model, batch, fp.PreferenceLoss("simpo"))
    close(fused(model, batch)[0], truth)
