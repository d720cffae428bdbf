"""The `fera-ext train` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from fera_ext.training.settings import PIPELINES

CONTEXT: dict[str, Any] = {"token_normalize_func": lambda name: name.replace("-", "_")}
"""Context settings for registering :func:`train`: options may be spelled with dashes too."""


def _flag(name: str, text: str, panel: str) -> Any:
    """An option spelled as diffusers' scripts spell it."""
    return typer.Option(f"--{name}", help=text, rich_help_panel=panel)


MODEL, DATA, ADAPTER = "Model", "Data", "Adapter"
OPTIMIZER, RUN, VALIDATION = "Optimizer", "Run", "Validation"


def train(
    pretrained_model_name_or_path: Annotated[
        str,
        _flag(
            "pretrained_model_name_or_path",
            f"A diffusers pipeline: a folder or a hub name. Of class {', '.join(PIPELINES)}.",
            MODEL,
        ),
    ],
    instance_data_dir: Annotated[Path, _flag("instance_data_dir", "The folder of images.", DATA)],
    instance_prompt: Annotated[
        Optional[str],  # noqa: UP045 (typer evaluates it)
        _flag("instance_prompt", "The prompt of all images; a class for DiT.", DATA),
    ] = None,
    output_dir: Annotated[Path, _flag("output_dir", "Where the adapter, the checkpoints and the log go.", RUN)] = Path(
        "fera-adapter"
    ),
    revision: Annotated[Optional[str], _flag("revision", "Revision on the hub.", MODEL)] = None,  # noqa: UP045
    variant: Annotated[
        Optional[str], _flag("variant", "Variant of the weight files, such as fp16.", MODEL)  # noqa: UP045
    ] = None,
    resolution: Annotated[int, _flag("resolution", "Side of the square crops in pixels.", DATA)] = 512,
    center_crop: Annotated[bool, _flag("center_crop", "Crop the middle, not at random.", DATA)] = False,
    random_flip: Annotated[bool, _flag("random_flip", "Mirror half of the crops.", DATA)] = False,
    dataloader_num_workers: Annotated[
        int, _flag("dataloader_num_workers", "Processes that read images; 0: none.", DATA)
    ] = 0,
    rank: Annotated[int, _flag("rank", "Rank of each expert.", ADAPTER)] = 4,
    num_experts: Annotated[int, _flag("num_experts", "Experts per adapted layer.", ADAPTER)] = 3,
    lora_alpha: Annotated[float, _flag("lora_alpha", "Scale of the update times the rank.", ADAPTER)] = 1.0,
    lora_dropout: Annotated[float, _flag("lora_dropout", "Dropout on the experts' input.", ADAPTER)] = 0.0,
    bands: Annotated[str, _flag("bands", "Definition of the bands: dog, rings or author.", ADAPTER)] = "dog",
    num_bands: Annotated[int, _flag("num_bands", "Number of frequency bands.", ADAPTER)] = 3,
    router_hidden: Annotated[int, _flag("router_hidden", "Width of the router.", ADAPTER)] = 64,
    router_tau: Annotated[float, _flag("router_tau", "Temperature of the router.", ADAPTER)] = 0.7,
    fecl_weight: Annotated[
        float, _flag("fecl_weight", "Weight of the consistency loss; 0 saves its base pass.", ADAPTER)
    ] = 0.1,
    fecl_warmup_steps: Annotated[
        int, _flag("fecl_warmup_steps", "Steps over which that weight rises from zero.", ADAPTER)
    ] = 100,
    fecl_every: Annotated[
        int,
        _flag("fecl_every", "That loss and its base pass only once in so many steps, from the first on.", ADAPTER),
    ] = 1,
    fecl_share: Annotated[
        float, _flag("fecl_share", "Share of the batch they take, in (0, 1], rounded up; its mean.", ADAPTER)
    ] = 1.0,
    target_modules: Annotated[
        Optional[str],  # noqa: UP045
        _flag(
            "target_modules",
            "Comma-separated path suffixes, or re: and a regular expression that must match whole paths, such as "
            r"re:mid_block\..*\.to_(q|k|v); to_q,to_k,to_v,to_out.0 by default.",
            ADAPTER,
        ),
    ] = None,
    learning_rate: Annotated[float, _flag("learning_rate", "Peak learning rate.", OPTIMIZER)] = 1e-4,
    lr_scheduler: Annotated[
        str,
        _flag(
            "lr_scheduler",
            "constant, constant_with_warmup, linear, cosine, cosine_with_restarts or polynomial.",
            OPTIMIZER,
        ),
    ] = "constant",
    lr_warmup_steps: Annotated[int, _flag("lr_warmup_steps", "Steps of warm-up.", OPTIMIZER)] = 0,
    adam_beta1: Annotated[float, _flag("adam_beta1", "AdamW's beta 1.", OPTIMIZER)] = 0.9,
    adam_beta2: Annotated[float, _flag("adam_beta2", "AdamW's beta 2.", OPTIMIZER)] = 0.999,
    adam_weight_decay: Annotated[float, _flag("adam_weight_decay", "AdamW's decay.", OPTIMIZER)] = 1e-2,
    adam_epsilon: Annotated[float, _flag("adam_epsilon", "AdamW's epsilon.", OPTIMIZER)] = 1e-8,
    max_grad_norm: Annotated[float, _flag("max_grad_norm", "Clip of the gradient's norm.", OPTIMIZER)] = 1.0,
    snr_gamma: Annotated[
        Optional[float],  # noqa: UP045
        _flag("snr_gamma", "Min-SNR weighting (5.0 is usual); diffusion models only.", OPTIMIZER),
    ] = None,
    train_batch_size: Annotated[int, _flag("train_batch_size", "Images per process.", RUN)] = 1,
    gradient_accumulation_steps: Annotated[
        int, _flag("gradient_accumulation_steps", "Batches per optimizer step.", RUN)
    ] = 1,
    gradient_checkpointing: Annotated[bool, _flag("gradient_checkpointing", "Less memory, more time.", RUN)] = False,
    mixed_precision: Annotated[
        str, _flag("mixed_precision", "no, fp16 or bf16; the adapter stays float32.", RUN)
    ] = "no",
    allow_tf32: Annotated[bool, _flag("allow_tf32", "TF32 products on Ampere and newer.", RUN)] = False,
    compile: Annotated[
        bool, _flag("compile", "torch.compile the denoiser; takes minutes at first. One process.", RUN)
    ] = False,
    cuda_graph: Annotated[
        bool,
        _flag("cuda_graph", "Replay the whole step as one CUDA graph. One process with a GPU, not with fp16.", RUN),
    ] = False,
    seed: Annotated[int, _flag("seed", "Of all random draws.", RUN)] = 0,
    max_train_steps: Annotated[int, _flag("max_train_steps", "Optimizer steps.", RUN)] = 500,
    checkpointing_steps: Annotated[int, _flag("checkpointing_steps", "Steps between checkpoints; 0: none.", RUN)] = 500,
    checkpoints_total_limit: Annotated[
        Optional[int],  # noqa: UP045
        _flag("checkpoints_total_limit", "Keep only the newest so many.", RUN),
    ] = None,
    resume_from_checkpoint: Annotated[
        Optional[str],  # noqa: UP045
        _flag("resume_from_checkpoint", "A checkpoint's folder, or latest.", RUN),
    ] = None,
    report_to: Annotated[str, _flag("report_to", "none, tensorboard, wandb, comet_ml or all.", RUN)] = "none",
    logging_dir: Annotated[str, _flag("logging_dir", "The trackers' folder in output_dir.", RUN)] = "logs",
    validation_prompt: Annotated[
        Optional[str],  # noqa: UP045
        _flag("validation_prompt", "Prompt of the images drawn on the way and at the end.", VALIDATION),
    ] = None,
    num_validation_images: Annotated[int, _flag("num_validation_images", "Images drawn each time.", VALIDATION)] = 4,
    validation_steps: Annotated[
        int, _flag("validation_steps", "Steps between validations; 0: at the end only.", VALIDATION)
    ] = 0,
    validation_inference_steps: Annotated[
        int, _flag("validation_inference_steps", "Denoising steps of each image.", VALIDATION)
    ] = 25,
) -> None:
    """Fine-tune a diffusers model on a folder of images.

    Ctrl-C saves a checkpoint and exits with status 130; --resume_from_checkpoint latest goes on exactly where
    the run stopped. Exit status 2: a wrong argument; 1: anything else that went wrong. The environment variable
    FERA_TRACEBACK=1 adds the full trace to an error's one line.
    """
    arguments = dict(locals())

    from fera_ext.training.errors import TrainError, first_line

    try:
        code = _run(arguments)
    except TrainError as error:
        code = _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        typer.echo("fera-ext train: stopped", err=True)
        code = 130
    except (OSError, ValueError, RuntimeError) as error:
        # From a library, and foreseen nowhere: a line is more use than a trace, which is there for the asking.
        code = _fail(f"{type(error).__name__}: {first_line(error)} (FERA_TRACEBACK=1 shows where)", 1)
    raise typer.Exit(code)


def _fail(message: str, code: int) -> int:
    """Say what the exception being handled comes to; the exit status again."""
    import os
    import traceback

    if os.environ.get("FERA_TRACEBACK") == "1":
        traceback.print_exc()
    typer.echo(f"fera-ext train: {message}", err=True)
    return code


def _run(arguments: dict[str, Any]) -> int:
    """The training; what the environment lacks becomes a line as well."""
    from fera_ext.training.errors import TrainError, first_line
    from fera_ext.training.settings import Settings

    settings = Settings(**arguments)
    try:
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise TrainError(
            f"diffusers, transformers and accelerate must be installed, got {first_line(error)} "
            "(pip install 'fera-ext[train]')"
        ) from error
    import torch

    from fera_ext.training.loop import run

    try:
        return run(settings)
    except torch.cuda.OutOfMemoryError as error:
        raise TrainError(
            "the GPU's memory is full; gradient_checkpointing, mixed_precision=bf16, a smaller "
            "train_batch_size or resolution need less"
        ) from error
