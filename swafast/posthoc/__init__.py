"""Averages made after training, from averages that were stored along it."""
