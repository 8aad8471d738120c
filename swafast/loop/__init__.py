"""The training loop: averages that follow an optimizer, and the guard of each averaged model."""
