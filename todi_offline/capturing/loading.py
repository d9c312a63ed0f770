"""The settings of a capture in, the engine that runs its teacher out: in whichever process does the work."""

from todi_offline.capturing.config import CaptureConfig
from todi_offline.capturing.engines import Engine, TransformersEngine
from todi_offline.errors import ConfigError
from todi_offline.teacher.in_transformers import Teacher, load_teacher


def load_engine(config: CaptureConfig, teacher: Teacher | None = None) -> Engine:
    """Return what runs the teacher, which may be loaded already.

    Raises:
        ModelError: the teacher cannot be loaded.
        ConfigError: the engine is not installed, or has no use for one of the settings.
        EngineError: the engine does not answer.
    """
    if config.engine.engine == "vllm":
        if teacher is not None:
            raise ConfigError("vLLM loads the teacher itself; name the teacher instead of giving a loaded one")
        from todi_offline.capturing.vllm_engine import VllmEngine

        return VllmEngine.start(config.teacher, config.engine)
    return TransformersEngine(teacher or load_teacher(config.teacher), config.teacher.batch_tokens)
