"""Noise keys: noise as a function of (seed, sample id, stream, element)."""

from diffcore.noise.collate import register
from diffcore.noise.key import GroupNoise as GroupNoise
from diffcore.noise.key import Noise as Noise
from diffcore.noise.key import PhiloxNoise as PhiloxNoise
from diffcore.noise.key import ShardNoise as ShardNoise
from diffcore.noise.key import StepNoise as StepNoise
from diffcore.noise.key import _rebuilt as _rebuilt
from diffcore.noise.key import draw as draw

__all__ = ["PhiloxNoise"]

register()
