"""Averages in files."""
