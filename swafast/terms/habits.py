"""Habits: the names that users of other packages write, and the line that they meant.

The tables know names of torch's `AveragedModel`, timm's `ModelEmaV3`, diffusers' `EMAModel`, torch_ema, ema_pytorch,
Lightning, Composer and torchcontrib, and of the SWAG of swa_gaussian and torch-uncertainty.
"""

from __future__ import annotations

from collections.abc import Mapping


def _each(table: Mapping[tuple[str, ...], str]) -> dict[str, str]:
    return {name: meant for names, meant in table.items() for name in names}


_UPDATE = "write averaged.update_parameters(model)"
_SWAP = "write `with averaged.swapped_into(model):`, which also puts the params back"

#: Names that the packages `swafast`, `swafast.optim` and `swafast.sharded` do not have.
NAMES = _each(
    {
        (
            *("EMA", "Ema", "ema", "ModelEMA", "LitEma", "ExponentialMovingAverage", "FusedEMA"),
        ): "write from swafast import ExponentialAverage, FusedAveragedModel, and "
        "FusedAveragedModel(model, rule=ExponentialAverage(0.999))",
        ("EMAModel",): "in place of diffusers' class, write from swafast.integrations.diffusers import EMAModel",
        ("ModelEma", "ModelEmaV2", "ModelEmaV3"): (
            "in place of timm's class, write from swafast.integrations.timm import ModelEma"
        ),
        ("EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"): (
            "in place of Lightning's callback, write from swafast.integrations.lightning import WeightAverage"
        ),
        ("WeightAverage", "WeightAverageCallback", "EMACallback"): (
            "write from swafast.integrations.lightning import WeightAverage, or from swafast.integrations.transformers "
            "or .accelerate"
        ),
        ("AveragedModel", "SWAModel"): "write from swafast import FusedAveragedModel",
        ("get_ema_avg_fn", "get_ema_multi_avg_fn"): "write rule=ExponentialAverage(decay)",
        ("get_swa_avg_fn", "get_swa_multi_avg_fn"): "write rule=EqualAverage(), which is the default",
        ("KarrasEMA", "PowerEMA", "PostHocEMA"): "write rule=PowerAverage.from_sigma_rel(0.1), and see Snapshots",
        ("SWAG", "SwagModel", "SWAGDiagonal", "MultiSWAG", "MultiSWA"): (
            "write FusedAveragedModel(model, deviations=20), and `with averaged.sampled_into(model, index):`"
        ),
        ("SWA", "SWALR", "ComposerSWA", "cyclical_lr"): "write from swafast.optim import {name}",
        ("LostPeerError", "PartTensor"): "write from swafast.sharded import {name}",
        ("bn_update", "update_batchnorm"): "write from swafast import update_bn",
        ("attach", "swapped_into", "update_parameters"): "it is a method: write averaged.{name}(...)",
        (
            *("FusedAveragedModel", "FusedAverages", "ShardedAveragedModel", "ShardedAverages", "Snapshots"),
            *("EqualAverage", "ExponentialAverage", "PowerAverage", "Rule", "Spread", "load", "save", "update_bn"),
        ): "write from swafast import {name}",
    }
)

#: Attributes that averaged models do not have.
_ATTRIBUTES = _each(
    {
        (
            *("update", "step", "update_average", "update_averages", "update_ema", "update_model", "update_params"),
            *("ema_step", "accumulate", "update_swa", "on_after_backward", "on_train_batch_end"),
        ): _UPDATE,
        (
            *("swap", "swap_params", "swap_parameters", "swap_swa_sgd", "average_parameters", "apply_ema", "ema_scope"),
            *("apply_shadow", "apply_averages", "store", "restore", "swap_model_weights", "swapped", "swap_into"),
        ): _SWAP,
        (
            *("decay", "decays", "beta", "momentum", "get_decay", "cur_decay_value", "current_decay", "ema_decay"),
        ): "read averaged.rule",
        ("set_decay", "update_decay", "set_rule"): "write averaged.rule = ExponentialAverage(decay)",
        (
            *("num_updates", "n_updates", "updates", "num_averaged", "n_average", "optimization_step"),
            *("num_averages", "step_count", "n_models", "num_models"),
        ): "read averaged.n_averaged",
        ("collect_model", "collect", "update_wrapper"): _UPDATE,
        (*("sample", "sample_params", "sample_swag", "sample_fullrank", "sample_blockwise", "draw", "sampled"),): (
            "write `with averaged.sampled_into(model, index, scale=scale):`, with another index for each sample, and "
            "averaged.swapped_into(model) for a scale of 0"
        ),
        ("generate_mean_var_covar", "export_numpy_params", "get_mean_and_variance"): (
            "read averaged.averaged_state_dict(), and variance.<name> and deviation.<k>.<name> of averaged.state_dict()"
        ),
        ("transfer_weights", "copy_params_to", "assign_to", "copy_into"): "write averaged.copy_to(model)",
        ("detach", "join"): "write attachment = averaged.attach(optimizer), and attachment.{name}()",
        ("reset", "reset_parameters"): "write averaged.n_averaged.zero_(), and the next update copies",
        ("bn_update", "update_bn", "update_batchnorm"): "write swafast.update_bn(loader, model) in a swap",
    }
)
#: Those of a :class:`~swafast.FusedAveragedModel` and of several.
OF_MODULES = _ATTRIBUTES | _each(
    {
        (
            *("shadow", "shadow_params", "ema", "ema_model", "model_ema", "model", "averaged_model", "avg_model"),
            *("averaged_params", "averages", "ema_weights", "get_model"),
        ): "read averaged.module",
        ("ema_state_dict", "get_ema_state_dict", "model_state_dict", "full_state_dict"): (
            "write averaged.averaged_state_dict() for an export, averaged.state_dict() to resume"
        ),
        ("save", "save_pretrained"): "write swafast.save(averaged, path), or save the model in a swap",
        ("load", "from_pretrained"): "write swafast.load(averaged, path)",
    }
)
_NO_MODULE = (
    "a sharded average is no module and holds no copy of one: run the model in `with averaged.swapped_into(model):`; "
    "its state is averaged.state_dict(), or gathered averaged.full_state_dict()"
)
#: Those of averages of shards.
OF_SHARDS = _ATTRIBUTES | _each(
    {
        (
            *("module", "modules", "named_modules", "children", "named_children", "forward", "train", "eval"),
            *("parameters", "named_parameters", "buffers", "named_buffers", "requires_grad_", "apply", "get_submodule"),
            *("shadow", "shadow_params", "ema", "ema_model", "model", "averaged_model", "avg_model", "averages"),
        ): _NO_MODULE,
        ("to", "cpu", "cuda", "float", "half", "bfloat16", "double"): (
            "averages stay where their params are: construct it after the model was moved or cast"
        ),
        ("save", "save_pretrained"): "write torch.distributed.checkpoint.save(averaged.state_dict(), ...)",
        ("load", "from_pretrained"): "write state = averaged.state_dict(), torch.distributed.checkpoint.load(state, "
        "...), averaged.load_state_dict(state)",
        ("ema_state_dict", "get_ema_state_dict", "model_state_dict"): "write averaged.full_state_dict()",
    }
)
OF_ATTACHMENTS = _each({("remove", "close", "stop", "unregister"): "write attachment.detach()"})
OF_SNAPSHOTS = _each(
    {
        ("load", "get", "average", "reconstruct"): "write snapshots.synthesize(rule)",
        ("add", "append", "store", "update", "write"): "write snapshots.save(averages)",
    }
)
#: Those of :class:`~swafast.optim.SWA`.
OF_SWA = _each(
    {
        (
            *("update", "update_average", "update_averages", "update_parameters", "update_swa_params"),
        ): "write optimizer.update_swa()",
        (
            *("swap", "swap_params", "swap_parameters", "swap_swa", "swapped_into", "average_parameters", "restore"),
        ): "write optimizer.swap_swa_sgd(), and again to swap back",
        ("update_bn", "update_batchnorm"): "write optimizer.bn_update(loader, model)",
        ("n_averaged", "n_avg", "num_updates", "num_averaged"): 'read optimizer.param_groups[0]["n_avg"]',
        ("module", "averaged_state_dict", "copy_to", "attach", "swa_model", "averaged_model"): (
            "write averaged = FusedAveragedModel(model), and averaged.attach(optimizer)"
        ),
    }
)

# Arguments

#: Arguments that stand for a rule, and what they are of it.
RULE_PARTS = _each(
    {
        (*("decay", "decays", "ema_decay", "beta", "smoothing", "model_ema_decay", "max_decay"),): "decay",
        ("momentum", "alpha", "tau"): "either",  # some packages mean the weight of the newest model
        ("use_warmup", "use_ema_warmup", "warmup", "ema_warmup"): "warmup",
        ("inv_gamma", "warmup_gamma"): "inv_gamma",
        ("power", "warmup_power"): "power",
        ("min_decay",): "min_decay",
        ("half_life",): "half_life",
        ("sigma", "sigma_rel", "sigma_rels", "std", "stds", "width"): "sigma_rel",
        ("gamma", "gammas"): "gamma",
        ("multi_avg_fn", "avg_fn", "averaging_fn"): "function",
    }
)
_START = (*("start_step", "swa_start", "ema_start", "swa_epoch_start", "warmup_steps", "begin", "start_iter", "after"),)
_AFTER = ("update_after_step", "update_starting_at_step")  # steps count from 0 there, and from 1 here
_EVERY = (
    *("update_every", "update_freq", "update_interval", "interval", "every_n_steps", "update_every_n_steps"),
    *("swa_freq", "freq"),
)
_END = ("stop", "until", "swa_end", "ema_end", "end_step", "stop_step")
_RANK0 = ("rank0", "rank_0_only", "rank0only", "only_rank0", "rank0_only")
_TO_CPU = ("offload_to_cpu", "cpu", "to_cpu", "cpu_offload")
_DTYPE = ("dtype", "precision", "ema_dtype")
_SWALR = "write SWALR(optimizer, ...), from swafast.optim"

#: What an argument about the spread of an average means, whatever its value.
SPREADS = "write deviations=20 for SWAG, or deviations=0 for the variance alone"

#: Other arguments: which a function must have, the arguments that somebody gives it, and what was meant.
ARGUMENTS: tuple[tuple[tuple[str, ...], tuple[str, ...], str], ...] = (
    (("deviations",), ("max_num_models", "num_deviations", "n_deviations", "max_cols", "num_columns", "rank", "K"), (
        "write deviations={value}"
    )),
    (("deviations",), ("swag", "no_cov_mat", "no_cov", "cov_mat", "cov", "full_cov", "variance", "diag_covariance"), (
        SPREADS
    )),
    (("deviations",), ("var_clamp",), "leave it out: the variance is never negative"),
    (("deviations",), ("num_models", "n_models", "max_models"), (
        "averaged.n_averaged counts the models; for how many deviations are kept, write deviations=20"
    )),
    (("deviations",), ("num_estimators", "num_samples", "n_samples", "samples", "scale"), (
        "write averaged.sampled_into(model, index, scale=...) once for each sample, with another index"
    )),
    (("backend",), ("cycle_start",), (
        'write averaged.attach(optimizer, start="{value}ep", every="1ep", steps_per_epoch=len(loader))'
    )),
    (("backend",), ("cycle_length",), (
        'write averaged.attach(optimizer, every="{value}ep", steps_per_epoch=len(loader))'
    )),
    (("index", "scale"), ("cov", "fullrank", "full_rank", "cov_mat"), (
        "a sample has the covariance of all deviations: leave it out, or construct the average with deviations=0"
    )),
    (("index", "scale"), ("block", "blockwise"), "leave it out: a sample is drawn for all parameters together"),
    (("index", "scale"), ("diag_noise", "diag"), (
        "leave it out: a sample has the noise of the variance; scale=0 has none"
    )),
    (("index", "scale"), ("generator", "random_state", "rng"), "write seed=, any int"),
    (("use_buffers",), (
        *("exclude_buffers", "include_buffers", "copy_buffers", "update_buffers", "average_buffers"),
    ), "buffers are copied by default, and use_buffers=True averages floating ones"),
    (("include",), ("exclude", "ignore", "filter", "param_filter", "skip", "ignore_names", "param_names", "only"), (
        "write include=lambda name, param: ..., which returns whether to average the parameter"
    )),
    (("anneal_steps",), (*_START, *_AFTER), 'write swa_start=, such as "0.7dur" or "10ep"'),
    (("anneal_steps",), _EVERY, 'write update_interval=, such as "1ep" or "100ba"'),
    (("anneal_steps",), _END, 'write swa_end=, such as "0.97dur" or "90ep"'),
    (("anneal_steps",), ("anneal_epochs",), "write anneal_steps={value}"),
    (("swa_freq",), (*_START, *_AFTER, "start"), "write swa_start={value}"),
    (("swa_freq",), (*_EVERY, "every"), "write swa_freq={value}"),
    (("swa_freq",), ("lr", "swa_lrs", "swa_learning_rate"), "write swa_lr={value}"),
    (("overlap",), _START, "write start={value}"),
    (("overlap",), _AFTER, "write start={next}, as steps are counted from 1"),
    (("overlap",), ("update_starting_at_epoch",), (
        'write start="{next}ep", every="1ep", as epochs are counted from 1'
    )),
    (("overlap",), _EVERY, "write every={value}"),
    (("overlap",), _END, "write end={value}"),
    (("overlap",), _TO_CPU, 'write offload="cpu"'),
    (("backend",), _AFTER, "write averaged.attach(optimizer, start={next})"),
    (("backend",), ("update_starting_at_epoch",), (
        'write averaged.attach(optimizer, start="{next}ep", every="1ep", steps_per_epoch=len(loader))'
    )),
    (("backend",), (*_START, "start"), "write averaged.attach(optimizer, start={value})"),
    (("backend",), (*_EVERY, "every"), "write averaged.attach(optimizer, every={value})"),
    (("backend",), (*_END, "end"), "write averaged.attach(optimizer, end={value})"),
    (("backend",), ("swa_lr", "swa_lrs", "anneal_epochs", "anneal_strategy"), _SWALR),
    (("swa_freq",), ("anneal_epochs", "anneal_strategy"), _SWALR),
    (("backend",), ("foreach", "fused", "use_foreach", "use_fused"), (
        "averages are always updated in one pass: leave it out"
    )),
    (("backend",), ("model_cls", "model_config"), "leave it out: a state holds values alone"),
    (("model",), ("params", "parameters", "module"), "write model: the module itself, not its parameters"),
    (("format",), _DTYPE, 'write format="float32", or leave it out: averages have that precision'),
    (("rule", "process_group"), ("rules",), "write ShardedAverages(model, rules=...)"),
    (("rule", "format"), ("rules",), "write FusedAverages(model, rules=...), or ShardedAverages of a sharded model"),
    (("process_group", "backend"), ("device", "cpu_device"), (
        "averages of shards are where their params are: leave it out"
    )),
    (("device", "rules"), ("process_group", "share_replicas", "mesh", "device_mesh"), (
        "write ShardedAverages(model, ...) for a sharded model"
    )),
    (("device",), ("process_group", "share_replicas", "mesh", "device_mesh"), (
        "write ShardedAveragedModel(model, ...) for a sharded model"
    )),
    (("device", "backend"), _TO_CPU, 'write device="cpu"'),
    (("rank0_only",), _DTYPE, "write averaged.averaged_state_dict({value})"),
    (("rank0_only",), _RANK0, "write rank0_only={value}"),
    (("cpu_offload",), _TO_CPU, "write cpu_offload={value}"),
    (("from_rank0",), (*_RANK0, "broadcast", "broadcast_from_rank0", "from_rank_0"), "write from_rank0={value}"),
    (("checksums",), _RANK0, "write averaged.full_state_dict(rank0_only={value})"),
    (("checksums",), _TO_CPU, "write averaged.full_state_dict(cpu_offload={value})"),
    (("checksums",), _DTYPE, "write averaged.averaged_state_dict({value})"),
)  # fmt: skip
