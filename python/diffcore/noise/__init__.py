"""Noise keys: noise as a function of (seed, sample id, stream, element)."""

from diffcore.noise.collate import register
from diffcore.noise.colored import offset_noise as offset_noise
from diffcore.noise.colored import perturbation_key as perturbation_key
from diffcore.noise.colored import pyramid_noise as pyramid_noise
from diffcore.noise.key import GroupNoise as GroupNoise
from diffcore.noise.key import Noise as Noise
from diffcore.noise.key import PhiloxNoise as PhiloxNoise
from diffcore.noise.key import ShardNoise as ShardNoise
from diffcore.noise.key import StepNoise as StepNoise
from diffcore.noise.key import _rebuilt as _rebuilt
from diffcore.noise.key import draw as draw

__all__ = ["PhiloxNoise", "offset_noise", "perturbation_key", "pyramid_noise"]

register()
