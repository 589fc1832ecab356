"""Train, sample and evaluate on any number of processes: the results of one.

    torchrun --nproc-per-node 4 examples/many_gpus.py

One process for each GPU, or, without GPUs, for some CPU cores. Noise and timesteps of a sample come
from a key: they do not depend on the process that has the sample. So every number of processes
trains the same network, up to the rounding of sums, and samples the same images.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import diffcore
from diffcore import PhiloxNoise

BATCH, IMAGES, EPOCHS = 32, 256, 40  # BATCH: of all processes together


class Network(nn.Module):
    """Predicts v for "images" of 8 pixels, one wave each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 8))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Map x_t [B, 1, 8] and t [B] to v."""
        time = (t.to(x) / 100).unsqueeze(1)
        return self.layers(torch.cat([x.flatten(1), time], 1)).view_as(x)


def pixels() -> Tensor:
    """Waves of any phase, as 8-bit pixels in [-1, 1]: [IMAGES, 1, 8]."""
    phase = torch.arange(IMAGES).reshape(-1, 1, 1) * (6.28 / IMAGES)
    wave = torch.sin(phase + torch.arange(8) * 0.785)
    return (wave * 127.5 + 127.5).round() / 127.5 - 1


def train(
    diffusion: diffcore.GaussianDiffusion, data: TensorDataset, device: torch.device
) -> nn.Module:
    """Train with DDP. Each step is a function of the sample ids and the epoch alone."""
    torch.manual_seed(0)
    network = Network().to(device)
    model: nn.Module = DistributedDataParallel(network) if dist.is_initialized() else network
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rank, size = rank_and_size()
    for epoch in range(EPOCHS):
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(BATCH):
            index = batch.tensor_split(size)[rank]
            x = data.tensors[0][index].to(device)
            key = PhiloxNoise(0, sample_ids=index.to(device), stream=epoch)
            t = key.timesteps(diffusion.num_timesteps, len(index))
            losses = diffusion.training_losses(model, x, t, noise=key)["loss"]
            optimizer.zero_grad()
            # DDP takes the mean over the processes, whose shares of a batch may differ by one.
            (losses.sum() * size / BATCH).backward()
            optimizer.step()
    return network.eval()


def main() -> tuple[Tensor, diffcore.BitsPerDim]:
    """Train, sample 10 images and measure the bound of the data, on all processes."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    diffusion = diffcore.GaussianDiffusion(
        diffcore.make_betas("squaredcos_cap_v2", 100), "v_prediction"
    )
    data = TensorDataset(pixels(), torch.arange(IMAGES))
    network = train(diffusion, data, device)
    rank, size = rank_and_size()

    # Sampling: each process takes some of the sample ids; 10 need not be a multiple of ``size``.
    ids = torch.arange(10).tensor_split(size)[rank].to(device)
    shape = (len(ids), 1, 8)
    images = diffusion.p_sample_loop(network, shape, noise=PhiloxNoise(1, ids), device=device)

    # Evaluation: the sampler repeats samples to fill the last batches; their ids say so.
    sampler = DistributedSampler(data, size, rank, shuffle=False)
    bits = diffcore.bits_per_dim(
        *(diffusion, network, DataLoader(data, batch_size=16, sampler=sampler)),
        timesteps=16,
        noise=PhiloxNoise(2),
        sample_ids=lambda batch: batch[1],
        process_group=dist.group.WORLD if dist.is_initialized() else None,
    )
    return gather(images), bits


def rank_and_size() -> tuple[int, int]:
    """The rank of this process and their number."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(images: Tensor) -> Tensor:
    """The images of all processes, in the order of their ids."""
    found = [images.cpu()]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, images.cpu())
    return torch.cat(found)


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    images, bits = main()
    if rank_and_size()[0] == 0:
        print(f"processes: {rank_and_size()[1]}")
        print(f"bits: {bits}")
        print("first image:", " ".join(f"{v:.3f}" for v in images[0].flatten().tolist()))
    if dist.is_initialized():
        # Gloo's threads drop the tensors of the last gather when they get the interpreter lock. If
        # Python ends before that, torch aborts; destroy_process_group does not wait for them.
        time.sleep(0.2)
        dist.destroy_process_group()
