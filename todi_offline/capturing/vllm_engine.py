"""A shard's examples in, the teacher's targets out: a teacher that vLLM serves."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from todi_offline.cache.format.fingerprint import tokenizer_fingerprint
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.cache.format.rows import TargetRows
from todi_offline.capturing.config import EngineConfig
from todi_offline.capturing.engines import TeacherDescription, recorded_versions
from todi_offline.data import Example
from todi_offline.errors import ConfigError, ModelError, first_line
from todi_offline.models.checkpoint import checkpoint_fingerprint
from todi_offline.models.loading import Tokenizer, load_tokenizer, real_vocab_size
from todi_offline.teacher.in_transformers import TeacherConfig, tokenizer_json
from todi_offline.teacher.in_vllm.client import Client
from todi_offline.teacher.in_vllm.runners import minor_version


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """A teacher that vLLM serves; it batches the sequences as it likes."""

    client: Client
    tokenizer: Tokenizer
    vocab_size: int
    fingerprint: dict[str, Any]

    @classmethod
    def start(cls, teacher: TeacherConfig, engine: EngineConfig) -> "VllmEngine":
        """Load the tokenizer, identify the teacher, and start vLLM.

        Raises:
            ConfigError: vLLM is missing, or has no use for a setting of the teacher.
            ModelError: the teacher cannot be loaded.
            EngineError: vLLM does not answer.
        """
        _require_usable(teacher)
        tokenizer = load_tokenizer(teacher.teacher, trust_remote_code=teacher.trust_remote_code)
        config = _config(teacher)
        vocab_size = real_vocab_size(tokenizer, config.get_text_config().vocab_size)
        options = {"dtype": _dtype(teacher, config), "trust_remote_code": teacher.trust_remote_code} | engine.engine_set
        fingerprint = checkpoint_fingerprint(teacher.teacher, trust_remote_code=teacher.trust_remote_code)
        client = Client(
            teacher.teacher,
            options,
            vocab_size=vocab_size,
            patience_seconds=engine.engine_timeout,
            is_tried=engine.engine_untested,
        )
        return cls(client, tokenizer, vocab_size, fingerprint)

    def describe(self) -> TeacherDescription:
        """Return what a cache records of the teacher; see `Engine`.

        A capture goes on with the minor version of vLLM that began it; `versions` has the exact one.
        """
        dtype, version = self.client.description["dtype"], self.client.version
        return TeacherDescription(
            vocab_size=self.vocab_size,
            teacher=self.fingerprint | {"dtype": dtype},
            tokenizer=tokenizer_fingerprint(self.tokenizer),
            tokenizer_json=tokenizer_json(self.tokenizer),
            versions=recorded_versions("torch", "transformers") | {"vllm": version},
            engine={"name": "vllm", "version": minor_version(version), "dtype": dtype},
        )

    def targets(
        self, examples: Sequence[Example], settings: CacheSettings, report: Callable[[int], None]
    ) -> list[TargetRows]:
        """Return the targets of each example, in order; see `Engine`."""
        return self.client.targets(examples, settings, report)

    def close(self) -> None:
        """End vLLM and its processes."""
        self.client.close()


def _require_usable(teacher: TeacherConfig) -> None:
    """Refuse what vLLM would ignore or do in another way.

    Raises:
        ConfigError: with what to do in its place.
    """
    remedies = {
        "device_map": "use --engine-set tensor_parallel_size=N, or pipeline_parallel_size=N",
        "attention": "use --engine-set attention_backend=NAME",
        "head_dtype": "use --engine transformers",
        "adapter": "merge the adapter into the teacher, and name the result",
    }
    for name, remedy in remedies.items():
        if getattr(teacher, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} does not work with --engine vllm; {remedy}")
    if teacher.device != "auto":
        raise ConfigError("--device does not work with --engine vllm, whose build decides the device; leave it out")
    if teacher.teacher.endswith(".gguf"):
        raise ConfigError(
            "--engine vllm does not read GGUF files; name a folder or hub id, or use --engine transformers"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--engine vllm starts its own workers, so start it without torchrun or accelerate; use --engine-set "
            "tensor_parallel_size=N for a teacher on several devices, or --ray-actors for several teachers"
        )


def _config(teacher: TeacherConfig) -> Any:
    """Return the teacher's config.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(teacher.teacher, trust_remote_code=teacher.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{teacher.teacher} has no config that can be read: {first_line(error)}") from error
    return config


def _dtype(teacher: TeacherConfig, config: Any) -> str:
    """Return the dtype to ask of vLLM; `auto` is the checkpoint's, where vLLM itself would halve float32.

    Raises:
        ModelError: the config names no dtype.
    """
    if teacher.dtype != "auto":
        return teacher.dtype
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if dtype is None:
        raise ModelError(f"the config of {teacher.teacher} names no dtype; choose one, such as --dtype bfloat16")
    return str(dtype).removeprefix("torch.")
