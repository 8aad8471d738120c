"""How fast is an update? ``python -m bench`` measures it, beside every other installed way of averaging a model.

``cases`` says what is measured: parameter lists (``workloads``) and who averages them (``providers``). ``measure`` runs
one case: every provider proves its averages against float64 (``gate``), and ``timing`` times those that are right.
``report`` holds what a run found, ``lookup`` finds it again, ``tables``, ``bars`` and ``plot`` show it, and ``pages``
puts it into README and docs. ``pictures`` draws the documents' other pictures, and all of them for phones. ``gpu`` is a
whole run on a GPU, in parts that are ``process``es of their own; it holds a model of the kernels, too, whose
predictions stand beside what a run measures.

``loop``, ``sharded`` and ``accuracy`` measure other things and share all of that. ``internals`` holds what the bench
knows of swafast beside its public names.
"""
