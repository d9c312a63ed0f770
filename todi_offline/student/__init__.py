"""What becomes a student: a teacher cut by depth and width, a new model, one with adapters.

- making.py: `todi student`, with its settings in config.py
- depth.py: a model of some layers, compared in composed.py with these layers run one after another
- width.py: a model of some channels, heads and neurons: parts.py (which there are), importance.py (which do most),
  masked.py (what a model computes with some of them)
- fresh.py: a new model of a teacher's family
- configs.py, loading.py, comparing.py: a smaller model's config, its tensors, and whether it is what it should be
- lora.py: adapters
"""

from todi_offline.student.config import MadeStudent, MakingConfig
from todi_offline.student.depth import prune_depth, spaced_layers
from todi_offline.student.fresh import fresh_student
from todi_offline.student.lora import LoraSettings, add_lora
from todi_offline.student.making import make_student, save_pruned
from todi_offline.student.width import Widths, prune_width

__all__ = [
    "LoraSettings",
    "MadeStudent",
    "MakingConfig",
    "Widths",
    "add_lora",
    "fresh_student",
    "make_student",
    "prune_depth",
    "prune_width",
    "save_pruned",
    "spaced_layers",
]
