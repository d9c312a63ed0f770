"""A student comes in; its distance to a cached teacher goes out, and ROUGE-L of its responses.

distance    a held-out cache -> divergences, agreement, calibration; no teacher is needed
tally       measures of targets -> means and standard errors
generation  instructions with references -> responses and their ROUGE-L
reading     sequences of a cache -> the student's predictions at every target, for a page
evaluating  the settings of both measurements, and one call for both
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
