"""Trainings under FSDP and DeepSpeed by a trainer, in two processes on the CPU and in one."""

from __future__ import annotations

import copy
import gc
import os
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import pair_features, tiny_llama
from torch import nn
from trainers import DATA, OF_TRL, TIMES, build, in_order, lora, spawned, spoil_losses
from transformers import PrinterCallback


def _fsdp(version: int, **more: Any) -> dict[str, Any]:
    """Options of a trainer under FSDP, whose decoder layers are units of their own."""
    config = {"version": version, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    if version == 1:
        # From rank 0 it is sent by way of an accelerator.
        config["sync_module_states"] = False
    return {"fsdp": True, "fsdp_config": config | more}


def _zero(stage: int, its_adam: bool = False, **more: Any) -> dict[str, Any]:
    """Options of a trainer under DeepSpeed's ZeRO, with all else as the trainer's own say."""
    zero: dict[str, Any] = {"stage": stage} | more
    if stage == 3:
        # No parameter is too small to be partitioned.
        zero |= {"stage3_param_persistence_threshold": 0}
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = dict.fromkeys(names, "auto") | {"zero_allow_untested_optimizer": True}
    config["zero_force_ds_cpu_optimizer"] = its_adam
    return {"deepspeed": config | {"zero_optimization": zero}}


# Units of at least so many parameters: the head and the embedding are among them.
_BY_SIZE = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 500}
_OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
# DeepSpeed's own Adam, in place of torch's: its bias corrections are products from step to step,
# and powers once a training is resumed.
ITS_ADAM = "zero2, offloaded, its Adam"
ENGINES: dict[str, dict[str, Any]] = {
    "fsdp1": _fsdp(1),
    "fsdp1, units by size": _fsdp(1, **_BY_SIZE),
    "fsdp1, flat parameters": _fsdp(1, use_orig_params=False),
    "fsdp1, its checkpointing": _fsdp(1, activation_checkpointing=True),
    "fsdp2": _fsdp(2),
    "fsdp2, tied": _fsdp(2),
    "fsdp2, sharded checkpoints": _fsdp(2, state_dict_type="SHARDED_STATE_DICT"),
    "fsdp2, its checkpointing": _fsdp(2, activation_checkpointing=True),
    "fsdp2, offloaded": _fsdp(2, cpu_offload=True),
    "zero2": _zero(2),
    "zero2, tied": _zero(2),
    "zero2, offloaded": _zero(2, **_OFFLOADED),
    ITS_ADAM: _zero(2, its_adam=True, **_OFFLOADED),
    "zero3": _zero(3),
    "zero3, tied": _zero(3),
    # Policy and reference are partitioned from the beginning.
    "zero3, loaded so": _zero(3),
}


@dataclass(frozen=True)
class Case:
    """A training.

    Args:
        engine: of `ENGINES`.
        kind: of trainer, as in `trainers.build`.
        tuned: "full", "lora" or "head", an adapter on the head too.
        reference: "model", "adapter" or "cache".
        checkpoints: the layers' activations are computed again in the backward pass.
        spoilt: micro-batches, from 1, that are NaN; their steps are skipped.
        half: in bf16.
        device: "cpu", or "cuda" for a GPU a process.
    """

    engine: str
    kind: str
    tuned: str
    reference: str
    checkpoints: bool = False
    spoilt: tuple[int, ...] = ()
    half: bool = False
    device: str = "cpu"

    def __str__(self) -> str:
        more = ["checkpoints"] * self.checkpoints + [f"spoilt {each}" for each in self.spoilt]
        more += ["half"] * self.half
        return ", ".join([self.engine, self.kind, self.tuned, self.reference, *more])

    @property
    def dtype(self) -> torch.dtype:
        """DeepSpeed computes nothing in float64, and FSDP1 clips none of its gradients."""
        exact = self.engine.startswith("fsdp2") and not self.half
        return torch.float64 if exact else torch.float32

    @property
    def loss(self) -> str:
        """One with statistics, but where at first the policy is its reference: of rounding."""
        if self.kind == "kto":
            # KTO's own compares completions with those of other rows of a process's batch.
            return "apo-zero-unpaired"
        return "dpo" if self.is_of_trl and self.tuned != "full" else "alpha-dpo"

    @property
    def is_of_trl(self) -> bool:
        return self.kind in OF_TRL


# Two epochs of sixteen pairs, with two micro-batches a step; a checkpoint is kept of the middle.
STEPS, BATCH = 4, 4


def trainer_of(case: Case, folder: Path, world: int) -> Any:
    """The trainer of a case, on one process with the batches of all.

    Its statistics take part in the loss. Adam's ε is large beside rounding: a step is then as
    smooth a function of the gradients as SGD's is.
    """
    options: dict[str, Any] = {"max_steps": STEPS, "gradient_accumulation_steps": 2}
    options |= {f"per_device_{each}_batch_size": BATCH // world for each in ("train", "eval")}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    options |= {"save_steps": STEPS // 2, "learning_rate": 1e-2, "adam_epsilon": 1e-2}
    options |= {"loss": case.loss, "gradient_checkpointing": case.checkpoints}
    options |= {"use_cpu": case.device == "cpu", "bf16": case.half}
    if world > 1:
        options |= copy.deepcopy(ENGINES[case.engine])
        options |= {"ddp_backend": "gloo" if case.device == "cpu" else "nccl"}
        if case.half and "deepspeed" in options:
            options["deepspeed"]["bf16"] = {"enabled": True}
    if case.spoilt:
        options["on_nonfinite"] = "skip"
    data = DATA.get(case.kind, pair_features)
    given: dict[str, Any] = {"eval_dataset": data(8)}
    reference: Any = None
    if case.reference != "adapter":
        reference = tiny_llama(5).to(case.dtype)
    elif not case.is_of_trl:
        reference = "adapter"
    model = _model(case)
    if case.engine == "zero3, loaded so" and world > 1:
        model, reference = _partitioned(folder, case.engine, model, reference)
    if case.reference == "cache":
        if case.is_of_trl:
            options["precompute_ref_log_probs"] = True
            # TRL takes none beside an adapter.
            reference = reference if case.tuned == "full" else None
        else:
            given["reference_cache"] = str(folder / "cache")
    own = {"model": model, "reference": reference, "given": given}
    run = in_order(build(case.kind, folder / "out", data(16), **own, **options))
    run.remove_callback(PrinterCallback)
    return run


def _partitioned(folder: Path, engine: str, *models: Any) -> list[nn.Module]:
    """Models as `from_pretrained` gives them once there is a configuration of ZeRO-3."""
    from transformers.integrations import HfDeepSpeedConfig

    where = [folder / name for name in ("policy", "reference")]
    for each, model in zip(where, models, strict=True):
        # The first rank saves.
        model.save_pretrained(each)
    dist.barrier()
    config = copy.deepcopy(ENGINES[engine]["deepspeed"])
    decided = {name: value for name, value in config.items() if value != "auto"}
    # It counts as long as it lives.
    _alive = HfDeepSpeedConfig(decided | {"train_micro_batch_size_per_gpu": 1})
    return [transformers.AutoModelForCausalLM.from_pretrained(each) for each in where]


def _model(case: Case) -> nn.Module:
    if case.tuned == "full":
        return tiny_llama(tie_word_embeddings="tied" in case.engine).to(case.dtype)
    targets = ["q_proj", "lm_head"] if case.tuned == "head" else ["q_proj"]
    return lora(3, target_modules=targets, lora_dropout=0.0).to(case.dtype)


def _take_the_cpu_for_an_accelerator(patch: pytest.MonkeyPatch) -> None:
    """Let accelerate shard by FSDP, which it does on accelerators alone.

    What FSDP1 moves to the CPU of a state there is a view of memory that it frees.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from torch.distributed.fsdp import FullyShardedDataParallel

    of_state, of_wrapper = AcceleratorState.__init__, FullyShardedDataParallel.__init__
    of_states = FullyShardedDataParallel.state_dict_type

    def state(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("fsdp_plugin") is not None:
            PartialState()
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        of_state(self, *args, **kwargs)

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        of_wrapper(self, *args, **kwargs | {"device_id": torch.device("cpu")})

    def states(model: Any, kind: Any, *configs: Any) -> Any:
        for config in filter(None, configs):
            config.offload_to_cpu = False
        return of_states(model, kind, *configs)

    patch.setattr(AcceleratorState, "__init__", state)
    patch.setattr(FullyShardedDataParallel, "__init__", wrapper)
    patch.setattr(FullyShardedDataParallel, "state_dict_type", staticmethod(states))


class _Passes:
    """Forward passes of backbones without a gradient: those of references."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.count += type(module).__name__ == "LlamaModel" and not torch.is_grad_enabled()

    def pop(self) -> int:
        found, self.count = self.count, 0
        return found


def _plain(name: str) -> str:
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    """All of a trained model's weights, whole, by their names without wrappers."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = run.model

    def found() -> dict[str, torch.Tensor]:
        values = ((_plain(name), value.detach()) for name, value in model.named_parameters())
        return {name: _full(value).cpu().clone() for name, value in values}

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return found()
    if any(hasattr(value, "ds_id") for value in model.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            return found()
    return found()


def _full(value: Any) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _here(value: Any) -> torch.Tensor:
    return torch.as_tensor(value.to_local() if hasattr(value, "to_local") else value).cpu().clone()


def state_here(run: Any) -> dict[str, torch.Tensor]:
    """What this process has of the trained weights, as the optimizer holds them, and its state."""
    optimizer = run.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    held = [each for group in optimizer.param_groups for each in group["params"]]
    state = {f"weight {number}": _here(value.detach()) for number, value in enumerate(held)}
    # ZeRO-3's parameters are no longer those that the state is of, and FSDP1's may be empty here.
    order = [each for each in held if each in optimizer.state] or list(optimizer.state)
    for number, each in enumerate(order):
        state |= {f"{number} {name}": _here(value) for name, value in optimizer.state[each].items()}
    return state


def outcome(run: Any) -> dict[str, Any]:
    """What a trained trainer has learnt and logged."""
    held = list(run.model.parameters())
    parts = [each for each in held if hasattr(each, "full_tensor") or hasattr(each, "ds_id")]
    return {
        "log": [
            {name: value for name, value in row.items() if name not in TIMES - {"train_loss"}}
            for row in run.state.log_history
        ],
        "is parted": bool(parts) or type(run.model).__name__ == "FullyShardedDataParallel",
        "engine": type(run.model_wrapped).__name__,
        "here": state_here(run),
        "statistics": {k: v.cpu() for k, v in run.attachment.loss_fn.state_dict().items()},
        "weights": weights_of(run),
    }


def trained(case: Case, folder: Path, world: int = 1, resume: bool = False) -> dict[str, Any]:
    """The outcome of a case, and how often references were run, ahead and in training."""
    passes = _Passes()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(passes)
    try:
        run = trainer_of(case, folder, world)
        if case.spoilt and not resume:
            # They are in the first half.
            spoil_losses(run, set(case.spoilt))
        ahead = passes.pop()
        checkpoint = str(folder / "out" / f"checkpoint-{STEPS // 2}") if resume else None
        run.train(resume_from_checkpoint=checkpoint)
        found = outcome(run) | {"ahead": ahead, "in training": passes.pop()}
        run.save_model(str(folder / "model"))
        return found
    finally:
        hook.remove()


def _work(rank: int, port: int, folder: str, cases: tuple[Case, ...], resume: bool) -> None:
    torch.set_num_threads(1)
    device = cases[0].device
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "DS_ACCELERATOR": device}
    os.environ |= where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    transformers.utils.logging.set_verbosity_error()
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, timeout=timedelta(minutes=2))
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        if device == "cpu":
            _take_the_cpu_for_an_accelerator(patch)
        for case in cases:
            # accelerate's, by which it knows the engine of the last training.
            for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
                del os.environ[name]
            try:
                found[str(case)] = trained(case, Path(folder) / str(case), 2, resume)
                gc.collect()
                dist.barrier()
            except Exception:
                found[str(case)] = traceback.format_exc()
                # The other process may wait in a collective of this training: it ends here.
                torch.save(found, f"{folder}/{rank}.pt")
                return
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def on_two_processes(
    cases: Iterable[Case], folder: Path, *, resume: bool = False
) -> Callable[[Case], list[dict[str, Any]]]:
    """Each rank's `trained` of a case; all of them in one pair of new processes.

    Args:
        cases: of which one after another is trained.
        folder: of what they write.
        resume: from the checkpoints that an earlier call has left there.
    """
    work = partial(_work, cases=tuple(cases), resume=resume)
    ranks = spawned(work, folder)

    def of(case: Case) -> list[dict[str, Any]]:
        found = [each.get(str(case), "was not reached") for each in ranks]
        failed = [each for each in found if isinstance(each, str)]
        assert not failed, "\n".join(failed)
        return found

    return of


def saved(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a case that `save_model` has left, whole, by their names."""
    model = folder / str(case) / "model"
    if case.tuned == "full":
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    else:
        import peft

        loaded = peft.PeftModel.from_pretrained(tiny_llama().to(case.dtype), model)
    return dict(loaded.named_parameters())
