"""How fast is an update? ``python -m bench`` measures it, beside every other installed way of averaging a model.

One run goes workload by workload: build the parameter list (``workloads``), make every provider prove its averages
against float64 (``gate``), time them in interleaved rounds (``timing``), weigh what an update allocates (``memory``);
then our own passes beside each other (``passes``), and the share of real training steps (``training``). ``report`` is
what all of it is written down in. ``accuracy`` follows the error of every format instead of its time.
"""
