"""What a rank holds of a model, which part of it is its own, and what ranks tell each other."""
