"""What a policy costs, and the linear program that finds the best one. Never imports torch.

Modules here are commands; folders hold what they do, in the order of the flow: ``families``,
``model``, ``plan``, ``pricing``, ``optimizer``, ``schedule``, ``calibration``, ``cli``.
``optimizer.optimum.search`` finds a policy, ``pricing.price.estimate`` prices any.
"""

# First, because it tells of libraries that cannot be imported.
import profiles  # noqa: F401
from costmodel.families import preset_names
from costmodel.model.loading import load_model_spec
from costmodel.model.spec import ModelSpec
from costmodel.plan.policy import Placement, Policy, Prediction
from costmodel.plan.workload import Workload

__all__ = [
    "ModelSpec",
    "Placement",
    "Policy",
    "Prediction",
    "Workload",
    "load_model_spec",
    "preset_names",
]
