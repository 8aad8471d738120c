"""Averages that follow an optimizer in the training loop, and the guard of each averaged model."""
