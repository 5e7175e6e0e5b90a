"""A model of the time and the memory that a language model takes on a cluster, from published or measured rates."""

from .choice import Cluster, Job, best, predictions
from .links import Link, parse_link
from .machines import Machine, parse_machines
from .prediction import Arrangement, Prediction
from .shape import Attending, ModelShape

__all__ = [
    "Arrangement",
    "Attending",
    "Cluster",
    "Job",
    "Link",
    "Machine",
    "ModelShape",
    "Prediction",
    "best",
    "parse_link",
    "parse_machines",
    "predictions",
]
