"""One module for each family of diffusers' schedulers: its table, and its ``step``."""
