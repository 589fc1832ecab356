"""Train a UNet2DModel of diffusers on 8x8 digits with Accelerate, and sample it with DDIMPipeline.

    pip install 'diffcore[diffusers]' accelerate scikit-learn
    python examples/train_with_diffusers.py --ema --out digits-pipeline
    accelerate launch examples/train_with_diffusers.py

The script is one of diffusers' own, shortened. What is diffcore's: ``fuse``, which lets the
scheduler add noise and take its steps in one launch each; the weighted loss, which makes no target;
and the weights. What is saved is a stock pipeline.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm

import diffcore
from diffcore.diffusers import fuse
from diffcore.diffusers.training import min_snr_weights


def digits() -> Tensor:
    """1,797 digits of 8x8 pixels in [-1, 1], ``[N, 1, 8, 8]``."""
    return torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1


def network() -> UNet2DModel:
    """A U-Net with two levels, small enough for a CPU."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def main(steps: int, out: Path | None = None, *, ema: bool = False) -> tuple[list[float], Tensor]:
    """Train and sample; return the loss of each step, and 16 samples in [0, 1]."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    scheduler = fuse(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    loader = torch.utils.data.DataLoader(digits(), batch_size=64, shuffle=True, drop_last=True)
    model, optimizer, loader, decay = accelerator.prepare(model, optimizer, loader, decay)
    average = EMAModel(model.parameters(), decay=0.98) if ema else None

    losses: list[float] = []
    bar = tqdm(total=steps, disable=not accelerator.is_local_main_process)
    while len(losses) < steps:
        for x0 in loader:
            noise = torch.randn_like(x0)
            t = torch.randint(len(scheduler), (len(x0),), device=x0.device)
            output = model(scheduler.add_noise(x0, noise, t), t).sample
            weight = min_snr_weights(scheduler, t, snr_gamma=5.0)
            loss = diffcore.denoising_loss(output, x0, noise, weight=weight).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay.step()
            optimizer.zero_grad()
            if average is not None:
                average.step(model.parameters())
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if len(losses) == steps:
                break
    bar.close()

    if average is not None:
        average.copy_to(model.parameters())
    # The pipeline makes a DDIMScheduler of its own from the configuration, so fuse comes after it.
    pipe = fuse(DDIMPipeline(unet=accelerator.unwrap_model(model), scheduler=scheduler))
    pipe.set_progress_bar_config(disable=not accelerator.is_local_main_process)
    generator = torch.Generator().manual_seed(0)
    images = pipe(16, generator, num_inference_steps=20, output_type="np").images
    if accelerator.is_main_process:
        print(f"calls that diffusers took over: {sum(pipe.scheduler.fallbacks.values())}")
        if out is not None:
            pipe.save_pretrained(out)
            print(f"saved {out}, which loads without diffcore")
    return losses, torch.from_numpy(images)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ema", action="store_true", help="sample from averaged weights")
    parser.add_argument("--out", type=Path, help="folder for the pipeline")
    arguments = parser.parse_args()
    main(arguments.steps, arguments.out, ema=arguments.ema)
