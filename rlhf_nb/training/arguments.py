"""Knobs as keyword arguments of transformers.TrainingArguments: the one place where their names meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_nb.methods.base import GradientMethod
from rlhf_nb.training import checkpoints

if TYPE_CHECKING:
    from rlhf_nb.training.context import Context

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd", "adafactor": "adafactor"}


def training_arguments(context: Context, *, reads_model: bool = True) -> dict[str, Any]:
    """What every trainer of transformers gets. A plain script with these arguments takes the very same steps.

    Args:
        reads_model: The trainer reads the model from its directory, so that it must be told in how many bits.
    """
    method = context.method
    assert isinstance(method, GradientMethod)
    model = {"model_init_kwargs": model_arguments(context)} if reads_model and quantization(context) != "none" else {}
    return model | {
        "output_dir": str(context.run_dir / "checkpoints" / checkpoints.SCRATCH),
        "max_steps": method.max_steps,
        "seed": method.seed,
        "per_device_train_batch_size": method.rows_per_device(context.world_size),
        "gradient_accumulation_steps": method.gradient_accumulation,
        "learning_rate": method.learning_rate,
        "lr_scheduler_type": method.lr_scheduler,
        "warmup_steps": method.warmup_steps,
        "weight_decay": method.weight_decay,
        "max_grad_norm": method.max_grad_norm,
        "optim": _OPTIMIZERS[method.optimizer],
        "activation_checkpointing": method.gradient_checkpointing,
        "bf16": method.precision == "bf16",
        "logging_steps": 1,
        # The filter would put the running mean in place of a loss that is NaN; a person should see the NaN.
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": context.use_cpu,
        "ddp_backend": "gloo" if context.use_cpu and context.world_size > 1 else None,
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": not context.use_cpu,
    }


def quantization(context: Context) -> str:
    """`none`, or how many bits the base of the run's adapter is held in."""
    return context.spec.adapter.quantize if context.spec.adapter is not None else "none"


def model_arguments(context: Context) -> dict[str, Any]:
    """What `models.load_model`, or a trainer that reads the model itself, is told beside its directory."""
    import torch

    from rlhf_nb.training.models import in_4_bit

    dtype = torch.bfloat16 if getattr(context.method, "precision", "fp32") == "bf16" else torch.float32
    return {"dtype": dtype, **in_4_bit(dtype)} if quantization(context) == "4bit" else {}


def lora_config(context: Context, task_type: str, **kwargs: Any) -> Any:
    """The spec's adapter as PEFT's configuration, or None for full-parameter training."""
    adapter = context.spec.adapter
    if adapter is None:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type=task_type,
        **kwargs,
    )
