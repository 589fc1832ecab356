"""Pipelines of diffusers with tiny random networks: nothing is downloaded, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

SD = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
}
"""The schedule of Stable Diffusion."""
_CHANNELS = (4, 8)
_NORMS = {"norm_num_groups": 2}


class Case(NamedTuple):
    """A pipeline and a way to call it.

    Attributes:
        make: Makes it of a scheduler, by default of the one that it is published with.
        run: Images or frames of it as float arrays; keyword arguments go to the pipeline.
    """

    make: Callable[..., Any]
    run: Callable[..., Any]


def generator(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def embeddings(*shape: int, seed: int = 2) -> Tensor:
    """What a text encoder would give."""
    return torch.randn(*shape, generator=generator(seed))


def unet_2d() -> Any:
    """Of DDPMPipeline and DDIMPipeline."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=_CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **_NORMS,
    ).eval()


def unet_2d_condition(**config: Any) -> Any:
    """Of Stable Diffusion."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        **{**_NORMS, **config},
    ).eval()


def vae_2d(**config: Any) -> Any:
    """An AutoencoderKL that halves the size."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        sample_size=16,
        **{**_NORMS, **config},
    ).eval()


def vae_3d() -> Any:
    """An AutoencoderKLLTXVideo: latents ``[B, C, F, H, W]``."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    ).eval()


def _unconditional(kind: str, scheduler: str, **options: Any) -> Case:
    def make(given: Any = None) -> Any:
        pipe = getattr(diffusers, kind)(unet_2d(), given or getattr(diffusers, scheduler)())
        return _quiet(pipe)

    def run(pipe: Any, **more: Any) -> Any:
        given = {**options, "generator": generator(), **more}
        return pipe(batch_size=2, num_inference_steps=5, output_type="np", **given).images

    return Case(make, run)


def _stable_diffusion(kind: str, in_channels: int = 4, **options: Any) -> Case:
    def make(given: Any = None) -> Any:
        pipe = getattr(diffusers, kind)(
            vae=vae_2d(),
            text_encoder=None,
            tokenizer=None,
            unet=unet_2d_condition(in_channels=in_channels),
            scheduler=given or diffusers.DDIMScheduler(**SD),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return _quiet(pipe)

    def run(pipe: Any, **more: Any) -> Any:
        given = {**_prompts(2), **options, "generator": generator(), "guidance_scale": 3.0, **more}
        return pipe(num_inference_steps=10, output_type="np", **given).images

    return Case(make, run)


def _stable_diffusion_3() -> Case:
    def make(given: Any = None) -> Any:
        torch.manual_seed(0)
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            out_channels=4,
        ).eval()
        names = ("text_encoder", "tokenizer")
        encoders = {f"{name}{i}": None for name in names for i in ("", "_2", "_3")}
        return _quiet(
            diffusers.StableDiffusion3Pipeline(
                transformer=transformer,
                scheduler=given or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
                vae=vae_2d(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
                **encoders,
            )
        )

    def run(pipe: Any, **more: Any) -> Any:
        pooled = {
            "pooled_prompt_embeds": embeddings(2, 8),
            "negative_pooled_prompt_embeds": embeddings(2, 8, seed=3),
        }
        given = {**_prompts(2), **pooled, "generator": generator(), "guidance_scale": 3.0, **more}
        size = {"height": 16, "width": 16}
        return pipe(num_inference_steps=5, output_type="np", **size, **given).images

    return Case(make, run)


def _ltx() -> Case:
    def make(given: Any = None) -> Any:
        torch.manual_seed(0)
        transformer = diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=8,
        ).eval()
        return _quiet(
            diffusers.LTXPipeline(
                transformer=transformer,
                scheduler=given or diffusers.FlowMatchEulerDiscreteScheduler(),
                vae=vae_3d(),
                text_encoder=None,
                tokenizer=None,
            )
        )

    def run(pipe: Any, **more: Any) -> Any:
        masks = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"))
        given = {**_prompts(1), **{name: torch.ones(1, 4) for name in masks}}
        given |= {"generator": generator(), "guidance_scale": 3.0, **more}
        size = {"height": 32, "width": 32, "num_frames": 9}
        return pipe(num_inference_steps=4, output_type="np", **size, **given).frames

    return Case(make, run)


def _wan() -> Case:
    def make(given: Any = None) -> Any:
        torch.manual_seed(0)
        transformer = diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=8,
            freq_dim=32,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
        ).eval()
        vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1] * 4, num_res_blocks=1).eval()
        return _quiet(
            diffusers.WanPipeline(
                transformer=transformer,
                scheduler=given or diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
                vae=vae,
                text_encoder=None,
                tokenizer=None,
            )
        )

    def run(pipe: Any, **more: Any) -> Any:
        given = {**_prompts(1), "generator": generator(), "guidance_scale": 3.0, **more}
        size = {"height": 16, "width": 16, "num_frames": 9}
        return pipe(num_inference_steps=3, output_type="np", **size, **given).frames

    return Case(make, run)


def _prompts(count: int) -> dict[str, Tensor]:
    """The prompt and the negative prompt."""
    shape = count, 4, 8
    return {
        "prompt_embeds": embeddings(*shape),
        "negative_prompt_embeds": embeddings(*shape, seed=3),
    }


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


_PICTURE = torch.rand(2, 3, 16, 16, generator=generator(5))
_MASK = (torch.arange(16) < 8).float().expand(1, 1, 16, 16)
_SIZE = {"height": 16, "width": 16}

CASES = {
    "ddpm": _unconditional("DDPMPipeline", "DDPMScheduler"),
    "ddim": _unconditional("DDIMPipeline", "DDIMScheduler", eta=0.5),
    "txt2img": _stable_diffusion("StableDiffusionPipeline", **_SIZE, eta=0.3),
    "img2img": _stable_diffusion("StableDiffusionImg2ImgPipeline", image=_PICTURE, strength=0.6),
    "inpaint": _stable_diffusion(
        "StableDiffusionInpaintPipeline", image=_PICTURE, mask_image=_MASK, strength=0.8, **_SIZE
    ),
    "pix2pix": _stable_diffusion("StableDiffusionInstructPix2PixPipeline", 8, image=_PICTURE),
    "sd3": _stable_diffusion_3(),
    "ltx": _ltx(),
    "wan": _wan(),
}
