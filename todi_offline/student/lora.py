"""A student in, a student with LoRA adapters out."""

from dataclasses import dataclass

from todi_offline.errors import ConfigError, ModelError
from todi_offline.models.loading import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """LoRA adapters on the student; none where `lora_r` is 0."""

    lora_r: int = 0
    """Rank of the adapters; 0 trains the whole student."""
    lora_alpha: int = 16
    """The adapters are scaled by alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the input of the adapters."""
    lora_target_modules: tuple[str, ...] = ()
    """Name of a module to adapt, or `all-linear` for all linear layers. May be repeated; by default peft chooses."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            ConfigError: there is one.
        """
        if self.lora_r < 0:
            raise ConfigError(f"lora_r is {self.lora_r}; expected 1 or more, or 0 to train the whole student")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is {self.lora_dropout}; expected 0 or more, and less than 1")


def add_lora(model: Model, settings: LoraSettings) -> Model:
    """Wrap a student in LoRA adapters; everything else is frozen.

    Raises:
        ModelError: peft is not installed, or finds no module to adapt.
    """
    if not settings.lora_r:
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("LoRA needs peft: pip install 'todi-offline[lora]'") from error
    names = settings.lora_target_modules
    config = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=names[0] if names == ("all-linear",) else list(names) or None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"LoRA finds no module to adapt: {error}; name some with --lora-target-modules") from error
