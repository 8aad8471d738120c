"""swafast in the frameworks that have a training loop of their own. Each module imports its framework on use.

``lightning``, ``transformers``, ``accelerate``, ``deepspeed``, ``torchtitan`` and ``composer`` have a class
``WeightAverage`` each, with one contract (:class:`~.weight_average.Contract`). ``diffusers.EMAModel`` and
``timm.ModelEma`` replace the classes of these packages.
"""
