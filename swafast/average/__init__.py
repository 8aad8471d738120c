"""The averaged models of one process: `FusedAveragedModel`, and several averages in one pass."""
