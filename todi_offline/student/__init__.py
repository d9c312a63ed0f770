"""What becomes a student: a teacher cut by depth, a model with adapters.

- making.py: `todi student`; depth.py: a model of some layers, with layer_config.py (what its config says) and
  composed.py (whether it is these layers)
- lora.py: adapters
"""

from todi_offline.student.depth import prune_depth, spaced_layers
from todi_offline.student.lora import LoraSettings, add_lora
from todi_offline.student.making import make_student, save_pruned

__all__ = [
    "LoraSettings",
    "add_lora",
    "make_student",
    "prune_depth",
    "save_pruned",
    "spaced_layers",
]
