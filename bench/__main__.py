"""``python -m bench``."""

from bench.command import app

# The guard keeps the processes that the training part spawns from running the bench once more.
if __name__ == "__main__":
    app()
