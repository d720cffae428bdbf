"""What to train and how: the values behind the flags, and their rules."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fera_ext.training.errors import UsageError

if TYPE_CHECKING:
    from fera_ext.config import FeraConfig

BANDS = ("dog", "rings", "author")
PRECISIONS = ("no", "fp16", "bf16")
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "DiTPipeline",
    "DDPMPipeline",
    "DDIMPipeline",
)
"""The pipeline classes that :mod:`fera_ext.training.families` knows; here, so that --help needs no torch."""

TRACKERS = ("none", "tensorboard", "wandb", "comet_ml", "all")


@dataclass(frozen=True)
class Settings:
    """Every choice of a run. The names are those of diffusers' LoRA scripts where they have one.

    Raises:
        UsageError: a value outside its rule.
    """

    pretrained_model_name_or_path: str
    instance_data_dir: Path
    output_dir: Path = Path("fera-adapter")
    instance_prompt: str | None = None
    revision: str | None = None
    variant: str | None = None
    resolution: int = 512
    center_crop: bool = False
    random_flip: bool = False
    rank: int = 4
    lora_alpha: float = 1.0
    lora_dropout: float = 0.0
    num_experts: int = 3
    bands: str = "dog"
    num_bands: int = 3
    router_hidden: int = 64
    router_tau: float = 0.7
    fecl_weight: float = 0.1
    fecl_warmup_steps: int = 100
    fecl_every: int = 1
    fecl_share: float = 1.0
    target_modules: str | None = None
    learning_rate: float = 1e-4
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    snr_gamma: float | None = None
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    allow_tf32: bool = False
    compile: bool = False
    cuda_graph: bool = False
    seed: int = 0
    max_train_steps: int = 500
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None
    resume_from_checkpoint: str | None = None
    validation_prompt: str | None = None
    num_validation_images: int = 4
    validation_steps: int = 0
    validation_inference_steps: int = 25
    report_to: str = "none"
    logging_dir: str = "logs"
    dataloader_num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "resolution", "fecl_every"):
            self._rule(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "checkpointing_steps",
            "validation_steps",
            "num_validation_images",
            "lr_warmup_steps",
            "fecl_warmup_steps",
            "dataloader_num_workers",
            "seed",
            "adam_weight_decay",
        ):
            self._rule(name, getattr(self, name) >= 0, "0 or more")
        self._rule("seed", self.seed < 2**63, "less than 2**63")
        self._rule("validation_inference_steps", 1 <= self.validation_inference_steps <= 1000, "from 1 to 1000")
        for name in ("adam_beta1", "adam_beta2"):
            self._rule(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            self._rule(name, getattr(self, name) > 0, "positive")
        self._rule("fecl_share", 0 < self.fecl_share <= 1, "in (0, 1]")
        if self.checkpoints_total_limit is not None:
            self._rule("checkpoints_total_limit", self.checkpoints_total_limit >= 1, "at least 1")
        if self.snr_gamma is not None:
            self._rule("snr_gamma", self.snr_gamma > 0, "positive")
        for name, allowed in (
            ("bands", BANDS),
            ("mixed_precision", PRECISIONS),
            ("lr_scheduler", SCHEDULES),
            ("report_to", TRACKERS),
        ):
            self._rule(name, getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        if self.cuda_graph:
            self._rule("mixed_precision", self.mixed_precision != "fp16", "no or bf16 with cuda_graph")
            if self.gradient_checkpointing:
                # What is computed again would have to draw the same mask, and a graph's generator has no way back.
                self._rule("lora_dropout", self.lora_dropout == 0, "0 with cuda_graph and gradient_checkpointing")

    def _rule(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {rule}, got {getattr(self, name)!r}")

    def adapter_config(self) -> FeraConfig:
        """The adapter's configuration.

        Raises:
            UsageError: a value that the adapter does not take.
        """
        from fera_ext.bands import Bands
        from fera_ext.config import FeraConfig

        try:
            chosen: dict[str, Any] = {
                "rank": self.rank,
                "lora_alpha": self.lora_alpha,
                "lora_dropout": self.lora_dropout,
                "num_experts": self.num_experts,
                "bands": getattr(Bands, self.bands)(self.num_bands),
                "router_hidden": self.router_hidden,
                "router_tau": self.router_tau,
                "fecl_weight": self.fecl_weight,
            }
            if self.target_modules is not None and self.target_modules.startswith("re:"):
                chosen["target_modules"] = self.target_modules[len("re:") :]
            elif self.target_modules is not None:
                chosen["target_modules"] = [t.strip() for t in self.target_modules.split(",") if t.strip()]
            return FeraConfig(**chosen)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def plain(self) -> dict[str, str | int | float]:
        """The choices that were made, as trackers take them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v if isinstance(v, (int, float)) else str(v) for k, v in values.items() if v is not None}

    def pinned(self, processes: int, images: str, base: str) -> dict[str, Any]:
        """What a resumed run must share with the run it continues, for its losses to be the same.

        Args:
            processes: how many there are.
            images: fingerprint of the folder of images.
            base: fingerprint of the base model.
        """
        free = {
            "pretrained_model_name_or_path",
            "instance_data_dir",
            "output_dir",
            "revision",
            "variant",
            "max_train_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "resume_from_checkpoint",
            "report_to",
            "logging_dir",
            "dataloader_num_workers",
            "gradient_checkpointing",
            "allow_tf32",
            "cuda_graph",
        }
        if self.lora_dropout == 0:  # compiled graphs draw other masks
            free.add("compile")
        names = [f.name for f in fields(self) if f.name not in free and "validation" not in f.name]
        values = {name: getattr(self, name) for name in names}
        return {**values, "processes": processes, "images": images, "base_model": base}
