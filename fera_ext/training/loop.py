"""The training loop. Every random draw is a function of the seed and the step, so resuming is exact."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fera_ext.adapter import FeraAdapter, attach
from fera_ext.checkpoint import load_adapter
from fera_ext.training import checkpointing
from fera_ext.training.data import (
    DROPOUT,
    NOISE,
    VALIDATION,
    Batch,
    ImageFolder,
    Positions,
    batches,
    find_images,
    fingerprint,
    stream_seed,
    to_device,
)
from fera_ext.training.errors import TrainError, UsageError, first_line, saving_failed
from fera_ext.training.families import Family, load_family
from fera_ext.training.interrupt import Interruption
from fera_ext.training.journal import Journal
from fera_ext.training.noising import process_of
from fera_ext.training.settings import Settings
from fera_ext.training.step import Step, check_speed, checkpoint_blocks

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(settings: Settings, console: Console | None = None) -> int:
    """Train as ``settings`` say; the adapter ends in ``output_dir``.

    Returns:
        The exit status: 0, or 128 plus the number of the signal that ended the training early.

    Raises:
        TrainError: what a user can act on, in one line.
    """
    console = console or Console()
    config = settings.adapter_config()
    files = find_images(settings.instance_data_dir)
    resume = checkpointing.locate(settings.resume_from_checkpoint, settings.output_dir)
    accelerator = _accelerator(settings)
    check_speed(settings, accelerator.device, accelerator.num_processes)
    family = load_family(
        settings.pretrained_model_name_or_path,
        accelerator.device,
        DTYPES[settings.mixed_precision],
        revision=settings.revision,
        variant=settings.variant,
    )
    family.check_resolution(settings.resolution)
    if family.prompted and settings.instance_prompt is None:
        raise UsageError(f"instance_prompt must be given for a {type(family.pipe).__name__}, got none")
    pinned = settings.pinned(accelerator.num_processes, fingerprint(files), family.fingerprint())
    step = 0 if resume is None else _check_resume(resume, pinned, settings.max_train_steps)
    if accelerator.is_main_process:
        _prepare_output(settings.output_dir)
    adapter = _attach(family, config, settings, resume)
    trainer = Trainer(settings, accelerator, family, adapter, pinned, console)
    if resume is not None:
        trainer.restore(resume, step)
    if accelerator.is_main_process:
        console.print(trainer.adapter.report(), highlight=False, markup=False)
        console.print(f"{len(files)} images, {trainer.describe()}", highlight=False)
    return trainer.train(files)


def _accelerator(settings: Settings) -> Any:
    """The accelerator, with its trackers.

    Raises:
        UsageError: a precision or a tracker that this machine does not have.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    if settings.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UsageError("mixed_precision must be no or bf16 without a GPU, got 'fp16'")
    logs = settings.output_dir / settings.logging_dir
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            mixed_precision=settings.mixed_precision,
            log_with=None if settings.report_to == "none" else settings.report_to,
            project_config=ProjectConfiguration(str(settings.output_dir), logging_dir=str(logs)),
        )
        if settings.report_to != "none":
            accelerator.init_trackers("fera", config=settings.plain())
    except OSError as error:
        raise saving_failed("the tracker's log", logs, error) from error
    except Exception as error:  # trackers' errors have no common class
        raise UsageError(f"mixed_precision or report_to is not usable here: {first_line(error)}") from error
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def _prepare_output(output_dir: Path) -> None:
    """Make the output folder; remove what a crash left half-written in it.

    Raises:
        TrainError: it cannot be made.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise saving_failed("output_dir", output_dir, error) from error
    for half in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(half, ignore_errors=True)


def _check_resume(path: Path, pinned: dict[str, Any], last: int) -> int:
    """The step of a checkpoint that this run may continue.

    Raises:
        TrainError: it is damaged, of another run's settings, images or base model, or beyond the last step.
    """
    state = checkpointing.read_state(path)
    checkpointing.check_pinned(path, state["pinned"], pinned)
    if state["step"] >= last:
        raise UsageError(f"max_train_steps must be more than the {state['step']} steps of {path}, got {last}")
    return int(state["step"])


def _attach(family: Family, config: Any, settings: Settings, resume: Path | None) -> FeraAdapter:
    """A new adapter, or the checkpoint's."""
    torch.manual_seed(settings.seed)
    try:
        if resume is None:
            return attach(family.denoiser, config)
        return load_adapter(family.denoiser, resume)
    except (ValueError, TypeError, OSError) as error:
        raise TrainError(first_line(error)) from error


class Trainer:
    """One run: the adapter, its optimizer, and the step at hand.

    Args:
        settings: what to do.
        accelerator: device, precision, processes and trackers.
        family: the model.
        adapter: attached to the family's denoiser.
        pinned: what a run that continues this one must share with it.
        console: for messages.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Any,
        family: Family,
        adapter: FeraAdapter,
        pinned: dict[str, Any],
        console: Console,
    ) -> None:
        from diffusers.optimization import get_scheduler

        self.settings = settings
        self.accelerator = accelerator
        self.family = family
        self.adapter = adapter
        self.pinned = pinned
        self.console = console
        self.step = 0
        self.process = process_of(family.pipe.scheduler, settings.snr_gamma, family.multiple // family.vae_factor)
        # The base stays in evaluation mode: its own dropout would differ between the two passes of FECL.
        family.denoiser.eval()
        for layer in adapter.layers.values():
            layer.train()
        if settings.gradient_checkpointing:
            checkpoint_blocks(family.denoiser, random=settings.lora_dropout > 0)
        self.run_step = Step(settings, accelerator, family, adapter)
        self.schedule = get_scheduler(
            settings.lr_scheduler,
            self.run_step.optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.prompt = family.encode(settings.instance_prompt or "") if family.prompted else {}
        if not settings.validation_prompt:
            family.release_text_encoders()

    def describe(self) -> str:
        """The run in a few words."""
        s = self.settings
        total = s.train_batch_size * s.gradient_accumulation_steps * self.accelerator.num_processes
        start = f"from step {self.step} " if self.step else ""
        return (
            f"{start}to step {s.max_train_steps}, {total} images a step at {s.resolution} px, "
            f"{self.accelerator.device}, seed {s.seed}"
        )

    def restore(self, path: Path, step: int) -> None:
        """Continue from a checkpoint whose adapter is attached already.

        Raises:
            TrainError: it is damaged.
        """
        tensors = checkpointing.read_tensors(path)
        try:
            self.run_step.load_state_dict(tensors["optimizer"])
            self.schedule.load_state_dict(tensors["schedule"])
            if self.accelerator.scaler is not None and tensors["scaler"] is not None:
                self.accelerator.scaler.load_state_dict(tensors["scaler"])
        except (KeyError, ValueError) as error:
            raise TrainError(f"{path} must fit this run, got {first_line(error)}") from error
        self.step = step

    def train(self, files: list[Path]) -> int:
        """Run to the last step; the exit status."""
        s, accelerator = self.settings, self.accelerator
        folder = ImageFolder(
            files,
            s.resolution,
            s.seed,
            center_crop=s.center_crop,
            random_flip=s.random_flip,
            channels=self.family.channels,
        )
        micro = self.step * s.gradient_accumulation_steps
        positions = Positions(s.train_batch_size, micro, accelerator.process_index, accelerator.num_processes)
        main = accelerator.is_main_process
        journal = Journal(s.output_dir, self.step, s.max_train_steps, main, accelerator.log, self.console)
        # Reading the figures waits for the device, so that on a GPU they are read a few steps at a time.
        every = 1 if accelerator.device.type == "cpu" else 10
        pending: list[tuple[int, Tensor, float]] = []
        sums: list[Tensor] = []
        with Interruption() as interruption, journal:
            for batch in batches(folder, positions, s.dataloader_num_workers):
                with accelerator.accumulate(self.run_step.model):
                    sums.append(self.micro_step(micro, batch))
                micro += 1
                if not accelerator.sync_gradients:
                    continue
                self.step += 1
                rate = float(self.schedule.get_last_lr()[0])
                self.schedule.step()
                pending.append((self.step, torch.stack(sums).mean(0), rate))
                sums = []
                stopped = self._stopped(interruption)
                last = self.step >= s.max_train_steps or stopped
                saving = bool(s.checkpointing_steps) and self.step % s.checkpointing_steps == 0
                validating = bool(s.validation_steps) and self.step % s.validation_steps == 0
                if last or saving or validating or len(pending) >= every:
                    self._record(journal, pending)
                    pending = []
                if saving or stopped:
                    self.save_checkpoint()
                if last:
                    break
                if validating:
                    self.validate()
        if self.step < s.max_train_steps:
            if main:
                self.console.print(
                    f"stopped after step {self.step}; checkpoint-{self.step} is saved in {s.output_dir} "
                    "(resume_from_checkpoint=latest continues it)",
                    highlight=False,
                )
            self._end_tracking()
            return interruption.exit_code
        if main:
            try:
                saved = self.adapter.save(s.output_dir)
            except OSError as error:
                raise saving_failed("the adapter", s.output_dir, error) from error
            self.console.print(f"adapter saved to {saved}", highlight=False)
        if interruption.signal is None:
            self.validate()
        self._end_tracking()
        return 0

    def _end_tracking(self) -> None:
        # DDP's reducer holds the process group. It goes while every rank is there: freed later, it can wait for a rank
        # that has left. And all ranks leave together, because one may still be saving.
        self.run_step.release()
        self.accelerator.free_memory()
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.end_training()
        except Exception as error:  # trackers' errors have no common class
            warnings.warn(f"the trackers could not be closed: {first_line(error)}", stacklevel=2)

    def micro_step(self, micro: int, batch: Batch) -> Tensor:
        """One forward and backward, and the optimizer's step where gradients are complete.

        Returns:
            Loss, squared error, FECL and each expert's mean gate, (3 + E,), on the device.
        """
        s, family, accelerator = self.settings, self.family, self.accelerator
        draw = (micro, accelerator.process_index)
        generator = torch.Generator().manual_seed(stream_seed(s.seed, NOISE, *draw))
        clean = family.to_latents(batch.pixels, generator)
        noise = to_device(torch.randn(clean.shape, generator=generator), clean.device)
        return self.run_step(
            self.process(clean, noise, generator),
            family.condition(self.prompt, batch),
            self.step,
            stream_seed(s.seed, DROPOUT, *draw),
            first=micro % s.gradient_accumulation_steps == 0,
            last=accelerator.sync_gradients,
        )

    def _record(self, journal: Journal, pending: list[tuple[int, Tensor, float]]) -> None:
        figures = self.accelerator.reduce(torch.stack([values for _, values, _ in pending]), "mean")
        for (step, _, rate), row in zip(pending, figures.tolist()):
            gates = {f"gate_{m}": value for m, value in enumerate(row[3:])}
            journal.record(step, {"loss": row[0], "mse": row[1], "fecl": row[2], "lr": rate, **gates})

    def _stopped(self, interruption: Interruption) -> bool:
        """Whether any process got a signal; all must stop at the same step."""
        asked = interruption.signal is not None
        if self.accelerator.num_processes == 1:
            return asked
        flag = torch.tensor([int(asked)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def save_checkpoint(self) -> None:
        """Write ``checkpoint-<step>``.

        Raises:
            TrainError: it cannot be written.
        """
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpointing.save(
                self.settings.output_dir,
                self.step,
                self.adapter,
                {
                    "optimizer": self.run_step.state_dict(),
                    "schedule": self.schedule.state_dict(),
                    "scaler": scaler.state_dict() if scaler is not None else None,
                },
                self.pinned,
                self.settings.checkpoints_total_limit,
            )
        self.accelerator.wait_for_everyone()

    def validate(self) -> None:
        """Draw images with the current adapter, if asked for: files, and the trackers'.

        What goes wrong here is warned of: the training is worth more than a look at it.
        """
        s = self.settings
        asked = bool(s.validation_prompt) if self.family.prompted else s.validation_steps > 0
        if not asked or not s.num_validation_images or not self.accelerator.is_main_process:
            return
        try:
            self._track_images(self._draw_images())
        except Exception as error:  # out of memory, a full disk, a sampler's or a tracker's complaint
            warnings.warn(f"validation at step {self.step} failed: {first_line(error)}", stacklevel=2)
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    def _draw_images(self) -> list[Any]:
        """Images in the folder ``validation``, and as PIL images."""
        s = self.settings
        seeds = [stream_seed(s.seed, VALIDATION, i) for i in range(s.num_validation_images)]
        if self.family.packed:
            self.adapter.latent_size = None  # as the pipeline's ids say
        self.family.denoiser.eval()
        try:
            images = self.family.generate(
                s.validation_prompt, len(seeds), s.resolution, s.validation_inference_steps, seeds
            )
        finally:
            for layer in self.adapter.layers.values():
                layer.train()
        folder = s.output_dir / "validation"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(images):
            image.save(folder / f"step-{self.step:06d}-{i}.png")
        return images

    def _track_images(self, images: list[Any]) -> None:
        import numpy as np

        for tracker in self.accelerator.trackers:
            # Not every tracker takes images; each that does takes them as (N, H, W, 3) uint8.
            with contextlib.suppress(AttributeError, NotImplementedError):
                stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": stacked}, step=self.step, **options)
