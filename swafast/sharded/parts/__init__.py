"""What a rank holds of a model, which part of it the rank averages, and how ranks communicate."""
