"""The names by which tables, bars and pictures look rows up."""

# Provider names that tables, bars and pictures look rows up by.
TORCH_CLASS = "torch AveragedModel"
TORCH_EMA = "torch AveragedModel, EMA fn"
FOREACH, COMPILED = "_foreach_lerp_", "compiled foreach"
MUL_ADD, LERP_FLOAT = "mul_().add_()", "lerp_(p.float())"
OURS, OURS_EXACT, OURS_FLOAT32 = "swafast", "swafast exact", "swafast float32"
# Our update by other ways or in part, beside the whole one.
OURS_IN_PYTHON, C_CALL = f"{OURS}, checks in Python", f"{OURS}'s C call alone"
PASS, TELLS, TORCH_TELLS = "native pass", "telling autograd", "torch's increment_version"
FOREACH_PARAMS = f"{FOREACH}, params alone"
ALL_OURS = (OURS, OURS_EXACT, OURS_FLOAT32)
# Ceilings: one ``lerp_`` over the same bytes in one tensor; on a GPU a copy of as many bytes.
FLAT_LERP = "one flat lerp_"
COPY = "device copy"
CEILINGS = (FLAT_LERP, COPY)
# Of the tables that compare our own passes with each other.
ONE, TWO, THREE = "1 average", "2 averages in one pass", "3 averages in one pass"
THREE_APART = "3 averages in three passes"
# The groups of a run on a CPU. On a GPU a group is named by the format and the number of averages.
UPDATES, FORMATS, SEVERAL = "updates", "formats", "several"
# Of the cost of checks: with the default threads and with one.
CHECKED, CHECKED_ALONE = "checks", "checks, 1 thread"
# Of the host's time: alone, and after other memory was touched.
HOST, HOST_COLD = "host", "host, cold"
# Of a GPU run, behind the format: updates in other grids and with other chunks; updates of averages with a spread, and
# their draws.
SWEPT, COLLECT, DRAW = " swept", ", collect", ", draw"
SPREADS = (COLLECT, DRAW)
# By device: our backends on a GPU run, the preferred one first. A dry run puts those of the CPU in their places.
OUR_BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "reference")}
