"""One module for each family of diffusers' schedulers: its table, and what it leaves to them."""
