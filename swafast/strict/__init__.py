"""Pickles in torch's files, and the lists of its distributed checkpoints, read strictly: nothing in them runs."""
