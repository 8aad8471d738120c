"""Averaged models in one process: `FusedAveragedModel` and `FusedAverages`."""
