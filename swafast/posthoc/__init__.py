"""Averages made after training, from averages that were stored during it."""
