"""Averages made after training, from averages that were stored along it."""

from .snapshots import Snapshots

__all__ = ["Snapshots"]
