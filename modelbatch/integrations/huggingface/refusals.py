"""What a bundle under Trainer cannot do, said before anything begins."""

from typing import Any

from transformers import TrainingArguments

from ...errors import ModelBatchError

__all__ = ["refuse"]

_ONE_BUNDLE = (
    "one process and one device train one bundle. With several devices start one bundle on each, "
    "with CUDA_VISIBLE_DEVICES=0, 1, ... or with modelbatch.integrations.ray"
)
_MEMORY = (
    "it computes parts of one model's forward again. To save memory lower "
    "per_device_train_batch_size and raise gradient_accumulation_steps, or train fewer models in "
    "a bundle"
)


def refuse(args: TrainingArguments) -> None:
    """Check the training arguments.

    Raises:
        ModelBatchError: naming what is not possible and what to do instead.
    """
    for wrapper, on in (
        ("DeepSpeed", args.deepspeed is not None),
        ("FSDP", bool(args.fsdp)),
        ("DistributedDataParallel", args.world_size > 1),
        ("DataParallel", args.n_gpu > 1),
    ):
        if on:
            raise ModelBatchError(f"{wrapper} does not go around a bundle: {_ONE_BUNDLE}")
    for name, instead in (
        ("torch_compile", "call trainer.model.enable_compile() for compiled forwards"),
        ("activation_checkpointing", _MEMORY),
        ("gradient_checkpointing", _MEMORY),
        ("neftune_noise_alpha", "its hooks see one model at a time; train without"),
        ("use_liger_kernel", "its kernels compute one model at a time; train without"),
        ("push_to_hub", "export_model(i, folder) gives a model that push_to_hub takes"),
        ("batch_eval_metrics", "compute_metrics is called once for each model; turn it off"),
        ("auto_find_batch_size", "set per_device_train_batch_size"),
    ):
        if getattr(args, name, None):
            raise ModelBatchError(f"{name} does not work on a bundle: {instead}")


def refuse_accelerator(accelerator: Any) -> None:
    """Check what `accelerate launch` may have set up.

    Raises:
        ModelBatchError: as `refuse`.
    """
    state = accelerator.state
    for wrapper, plugin in (("DeepSpeed", "deepspeed_plugin"), ("FSDP", "fsdp_plugin")):
        if getattr(state, plugin, None) is not None:
            raise ModelBatchError(f"{wrapper} does not go around a bundle: {_ONE_BUNDLE}")
