"""The two networks of the demo: a U-Net of 0.3 M parameters and a convolutional VAE."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed timesteps as cosines and sines of geometrically spaced frequencies.

    ``[cos(w_k t), sin(w_k t)]`` with ``w_k = max_period^(-k / (dim/2))``.

    Args:
        t: Timesteps ``[B]``, any real dtype.
        dim: Width of the embedding, even.
        max_period: Longest period divided by 2 pi.

    Returns:
        ``[B, dim]`` float32.

    Raises:
        ValueError: If ``dim`` is odd.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762) section 3.5; Ho et al. 2020 (arXiv 2006.11239).
    """
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    half = dim // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """Residual block: two 3x3 convolutions with a timestep scale and shift between them."""

    def __init__(self, channels: int, out_channels: int, embedding_dim: int) -> None:
        """Build the block.

        Args:
            channels: Input channels.
            out_channels: Output channels.
            embedding_dim: Width of the timestep embedding.
        """
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.embedding = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip: nn.Module = (
            nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map ``[B, channels, H, W]`` to ``[B, out_channels, H, W]``."""
        h = self.conv1(functional.silu(self.norm1(x)))
        scale, shift = self.embedding(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(functional.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.skip(x) + h
        return out


class SelfAttention(nn.Module):
    """Residual self-attention over all pixels."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        """Build the layer.

        Args:
            channels: Input and output channels.
            heads: Attention heads, a divisor of ``channels``.
        """
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, C, H, W]`` to the same shape."""
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, 3, self.heads, -1, height * width)
        q, k, v = qkv.transpose(-1, -2).unbind(1)
        h = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(h.transpose(-1, -2).reshape(batch, channels, height, width))
        return out


class UNet(nn.Module):
    """U-Net with two levels on ``pixel_unshuffle``d images: 28x28x1 becomes 14x14x4, then 7x7.

    Source:
        Ho et al. 2020 (arXiv 2006.11239), with fewer channels and levels; timestep conditioning by
        scale and shift from Dhariwal and Nichol 2021 (arXiv 2105.05233).
    """

    def __init__(
        self,
        *,
        channels: int = 1,
        width: int = 32,
        patch: int = 2,
        num_timesteps: int = 200,
        num_classes: int = 0,
    ) -> None:
        """Build the network. Its output is zero before training.

        Args:
            channels: Image channels.
            width: Channels of the upper level, a multiple of 8; the lower level has twice as many.
            patch: Block size of the ``pixel_unshuffle``; 1 for none.
            num_timesteps: T of the diffusion. Timesteps are embedded as if T were 1000.
            num_classes: Classes that it is told; 0 for a model of all images.
        """
        super().__init__()
        self.patch = patch
        self.width = width
        self.time_scale = 1000.0 / num_timesteps
        pixels, dim = channels * patch * patch, 3 * width
        self.time_mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        # One more for images of any class, with which guidance compares.
        self.classes = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.stem = nn.Conv2d(pixels, width, 3, padding=1)
        self.down1 = ResBlock(width, width, dim)
        self.downsample = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.down2 = ResBlock(2 * width, 2 * width, dim)
        self.attention1 = SelfAttention(2 * width)
        self.mid = ResBlock(2 * width, 2 * width, dim)
        self.attention2 = SelfAttention(2 * width)
        self.upsample = nn.Conv2d(2 * width, width, 3, padding=1)
        self.up1 = ResBlock(2 * width, width, dim)
        self.up2 = ResBlock(width, width, dim)
        self.norm = nn.GroupNorm(8, width)
        self.out = _zeroed(nn.Conv2d(width, pixels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predict the noise, or the velocity of a flow.

        Args:
            x: Noisy images ``[B, C, H, W]``.
            t: Timesteps ``[B]``.
            labels: Classes ``[B]``, ``num_classes`` for any; only for a model that has classes.

        Returns:
            ``[B, C, H, W]``.
        """
        embedding = self.time_mlp(timestep_embedding(t * self.time_scale, self.width))
        if self.classes is not None:
            embedding = embedding + self.classes(labels)
        embedding = functional.silu(embedding)
        h = self.stem(functional.pixel_unshuffle(x, self.patch))
        skip = self.down1(h, embedding)
        h = self.down2(self.downsample(skip), embedding)
        h = self.attention2(self.mid(self.attention1(h), embedding))
        h = self.upsample(functional.interpolate(h, scale_factor=2.0))
        h = self.up1(torch.cat([h, skip], dim=1), embedding)
        h = self.up2(h, embedding)
        h = self.out(functional.silu(self.norm(h)))
        return functional.pixel_shuffle(h, self.patch).contiguous()


class ConvVAE(nn.Module):
    """Convolutional VAE with a diagonal Gaussian posterior; sides are halved twice.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114).
    """

    def __init__(self, image_shape: tuple[int, int, int], *, width: int, latent_dim: int) -> None:
        """Build encoder and decoder.

        Args:
            image_shape: Channels, height and width; both sides are multiples of 4.
            width: Channels after the first convolution; twice as many after the second.
            latent_dim: Latent dimensions.

        Raises:
            ValueError: If a side is not a multiple of 4.
        """
        super().__init__()
        channels, height, side = image_shape
        if height % 4 or side % 4:
            raise ValueError(f"image_shape must have sides divisible by 4, got {image_shape}")
        self.latent_dim = latent_dim
        bottom = (2 * width, height // 4, side // 4)
        flat, hidden = math.prod(bottom), 8 * width
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(flat, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 2 * latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, hidden),
            nn.SiLU(),
            nn.Linear(hidden, flat),
            nn.SiLU(),
            nn.Unflatten(1, bottom),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),  # pixels lie in [-1, 1], so a mean outside is never better
        )

    def encode(self, x: Tensor) -> Tensor:
        """Return the posterior of z as ``[B, 2 latent_dim]``: mean, then log-variance."""
        parameters: Tensor = self.encoder(x)
        return parameters

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean image ``[B, C, H, W]`` of latents ``[B, latent_dim]``."""
        image: Tensor = self.decoder(z)
        return image.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct images from the mean of the posterior."""
        return self.decode(self.encode(x)[:, : self.latent_dim])
