"""``fera-ext demo``: FeRA and plain LoRA side by side, on a small diffusion model that ships here."""
