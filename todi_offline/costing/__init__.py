"""The settings of a capture in, what it will cost out, before anything is spent.

sizes       a model's files -> parameters, bytes and FLOPs, from the headers alone
probing     some sequences -> the teacher's targets for them, and how long that took
storage     targets -> the bytes that each shape and encoding takes on disk
studied     a shape -> how much of dense ToDi's gain the studies measured for it
choices     all of these -> the table of shapes and encodings, one of them suggested
results     what a plan says
planning    all of it: `plan`
"""

from todi_offline.costing.planning import PlanOptions, plan
from todi_offline.costing.results import Plan

__all__ = ["Plan", "PlanOptions", "plan"]
