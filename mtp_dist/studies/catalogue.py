"""The experiments by name."""

from mtp_dist.studies import chaining, choice_points, heads, induction, path_star, polynomials, schedules
from mtp_dist.studies.experiment import Experiment

CATALOGUE: dict[str, Experiment] = {
    "choice_points": choice_points.EXPERIMENT,
    "path_star": path_star.EXPERIMENT,
    "induction": induction.EXPERIMENT,
    "polynomials": polynomials.EXPERIMENT,
    "heads": heads.EXPERIMENT,
    "schedules": schedules.EXPERIMENT,
    "chaining": chaining.EXPERIMENT,
}
