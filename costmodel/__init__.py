"""What a policy costs, and the linear program that finds the best one. Never imports torch.

``costmodel.optimum.search`` finds a policy and ``costmodel.price.estimate`` prices any; the
modules ``search`` and ``estimate`` are their commands.
"""

# First, because it tells of libraries that cannot be imported.
import profiles  # noqa: F401
from costmodel.model_spec import ModelSpec, load_model_spec, preset_names
from costmodel.policy import Placement, Policy, Prediction
from costmodel.workload import Workload

__all__ = [
    "ModelSpec",
    "Placement",
    "Policy",
    "Prediction",
    "Workload",
    "load_model_spec",
    "preset_names",
]
