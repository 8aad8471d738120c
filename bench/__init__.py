"""How fast is an update? ``python -m bench`` measures it, beside every other installed way of averaging a model.

One run goes workload by workload: build the parameter list (``workloads``), make every provider (``providers``) prove
its averages against float64 (``gate``), time them in interleaved rounds (``timing``) and weigh what they allocate
(``profiling``). ``measure`` puts these together on a CPU, ``gpu_bench`` on a GPU. ``report`` holds what a run found,
``lookup`` finds it again, ``tables``, ``bars`` and ``plot`` show it, and ``pages`` puts it into README and docs.

``loop``, ``training``, ``sharded`` and ``accuracy`` measure other things and share all of that. ``gpu`` is a whole run
on a GPU. ``internals`` holds what the bench knows of swafast beside its public names.
"""
