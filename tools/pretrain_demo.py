"""Train the demo's base model from scratch on everyday photographs.

    python tools/pretrain_demo.py --output fera_ext/demo/model

The photographs come out of installed wheels (scikit-image, scikit-learn, matplotlib): nothing is
downloaded. The model is an unconditional pixel-space UNet with attention, predicting v under a
cosine schedule; its exponential moving average is saved in float16, as a diffusers pipeline.
With ``--minutes`` the learning rate follows the clock, so the result depends on the machine.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "fera_ext" / "demo"))
from photos import PATCH, Photo, random_patches

PHOTOS = (
    Photo("astronaut", "skimage.data", "astronaut.png", 1.0),
    Photo("coffee", "skimage.data", "coffee.png", 1.0),
    Photo("cat", "skimage.data", "chelsea.png", 1.0),
    Photo("rocket", "skimage.data", "rocket.jpg", 1.0),
    Photo("motorcycle", "skimage.data", "motorcycle_left.png", 1.0),
    Photo("temple", "sklearn.datasets", "images/china.jpg", 1.0),
    Photo("flower", "sklearn.datasets", "images/flower.jpg", 1.0),
    Photo("portrait", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", 1.0),
)


def build_model() -> UNet2DModel:
    """2.8 million parameters, attention at 16x16 and 8x8."""
    return UNet2DModel(
        sample_size=PATCH,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The schedule that the demo trains and samples with."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def save(model: UNet2DModel, average: dict[str, torch.Tensor], output: Path) -> None:
    """Write the averaged weights as a float16 pipeline, whole or not at all."""
    half = build_model()
    half.load_state_dict(average)
    pipeline = DDPMPipeline(unet=half.half(), scheduler=build_scheduler())
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary, safe_serialization=True)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by the clock")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = [photo.load() for photo in PHOTOS]
    model = build_model().to(device)
    scheduler = build_scheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-2)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start, progress, running, step = time.monotonic(), 0.0, 0.0, 0
    while progress < 1.0:
        rate = args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * math.cos(progress * math.pi / 2))
        for group in optimizer.param_groups:
            group["lr"] = rate
        clean = torch.from_numpy(random_patches(images, args.batch, rng, scales=(0.25, 1.0)))
        # One draw per stratum of the schedule: the loss is less noisy than with free draws.
        t = (torch.arange(args.batch) + torch.rand(args.batch)) * (1000 / args.batch)
        t = t.long().clamp_(0, 999)
        noise = torch.randn_like(clean)
        noisy = scheduler.add_noise(clean, noise, t).to(device)
        target = scheduler.get_velocity(clean, noise, t).to(device)
        with torch.autocast(device, dtype=torch.bfloat16):
            predicted = model(noisy, t.to(device)).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                average[key].lerp_(value, 1.0 - decay)
        running += loss.item()
        elapsed = (time.monotonic() - start) / 60
        progress = max(step / args.steps, elapsed / args.minutes)
        if step % 100 == 0:
            print(f"step {step}  {elapsed:.1f} min  loss {running / 100:.4f}", flush=True)
            running = 0.0
        if step % 500 == 0:
            save(model, average, args.output)
    save(model, average, args.output)


if __name__ == "__main__":
    main()
