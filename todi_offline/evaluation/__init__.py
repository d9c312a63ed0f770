"""A student in; its distance to a cached teacher, and how what it writes compares with references, out.

distance    a held-out cache -> divergences, agreement, calibration; no teacher is needed
tally       the means and their standard errors
generation  instructions with references -> responses and their ROUGE-L
evaluating  the settings of both, and both as one call
"""

from todi_offline.evaluation.distance import Distance, evaluate_cache
from todi_offline.evaluation.evaluating import EvaluateConfig, EvaluateSummary, evaluate
from todi_offline.evaluation.generation import Generation, Prompt, Prompts, answer, evaluate_generation, load_prompts
from todi_offline.evaluation.tally import Estimate, Group

__all__ = [
    "Distance",
    "Estimate",
    "EvaluateConfig",
    "EvaluateSummary",
    "Generation",
    "Group",
    "Prompt",
    "Prompts",
    "answer",
    "evaluate",
    "evaluate_cache",
    "evaluate_generation",
    "load_prompts",
]
