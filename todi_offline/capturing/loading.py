"""The settings of a capture in, the engine that runs its teacher out: in whichever process does the work."""

from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import Engine, TransformersEngine
from todi_offline.teacher import Teacher, load_teacher


def load_engine(config: CaptureConfig, teacher: Teacher | None = None) -> Engine:
    """Return what runs the teacher, which may be loaded already.

    Raises:
        ModelError: the teacher cannot be loaded.
    """
    return TransformersEngine(teacher or load_teacher(config.teacher), config.teacher.batch_tokens)
