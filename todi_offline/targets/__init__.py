"""A teacher's logits in, sparse targets out.

top_k    logits -> the largest of them
sparse   logits -> SparseTargets
rows     chunks of logits -> targets as a cache holds them, whatever runs the teacher
"""

from todi_offline.targets.sparse import SparseTargets, sparsify

__all__ = ["SparseTargets", "sparsify"]
