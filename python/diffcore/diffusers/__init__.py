"""diffusers' schedulers with a step in one launch: ``fuse(pipe)``, and ``unfuse(pipe)`` back.

Needs the extra: ``pip install "diffcore[diffusers]"``.
"""

from diffcore.diffusers.switch import fuse, table_of, unfuse

__all__ = ["fuse", "table_of", "unfuse"]
