"""Noise keys: noise as a function of (seed, sample id, stream, element)."""

from diffcore.noise.collate import register
from diffcore.noise.key import Noise, PhiloxNoise, StepNoise, _rebuilt, draw

__all__ = ["Noise", "PhiloxNoise", "StepNoise", "_rebuilt", "draw"]

register()
