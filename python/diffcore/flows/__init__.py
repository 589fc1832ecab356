"""Flow matching: training losses, noise levels and sampling of a velocity model."""

from diffcore.flows.flow_matching import FlowMatching
from diffcore.flows.shifts import ResolutionShift

__all__ = ["FlowMatching", "ResolutionShift"]
