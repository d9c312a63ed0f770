"""The name of a command in, the headings of its help out, each with the options that stand below it.

Options are named by their fields. Those that no heading names follow under "Rarely needed".
"""

from collections.abc import Mapping

_TEACHER = "teacher device dtype batch_tokens device_map adapter"
_DATA = "data split limit max_length max_prompt_length supervise chat_template"
_GENERAL = "config as_json help"

_CAPTURE = {
    "Teacher": _TEACHER,
    "Data": _DATA,
    "Targets": "k tail_samples temperatures tail_temperature",
    "Storage": "out encoding codec reuse",
}

HEADINGS: Mapping[str, Mapping[str, str]] = {
    "capture": {**_CAPTURE, "General": _GENERAL},
    "plan": {"Plan": "probe rate student epochs batch_size", **_CAPTURE, "General": _GENERAL},
    "student": {
        "Student": "source out layers keep hidden heads kv_heads mlp fresh",
        "Importance of channels, heads and neurons": "importance_data importance_rows importance_length",
        "General": _GENERAL,
    },
    "train": {
        "Student and cache": "student cache out eval_cache resume",
        "Training": (
            "num_train_epochs max_steps learning_rate per_device_train_batch_size gradient_accumulation_steps bf16 "
            "warmup_steps seed logging_steps save_steps report_to arguments"
        ),
        "Objective": "kd_weight divergence beta temperature k tail recipe",
        "LoRA": "lora_r lora_alpha lora_dropout lora_target_modules",
        "Data": "data split limit",
        "General": _GENERAL,
    },
    "evaluate": {
        "What is measured": "student cache data split limit out",
        "Model": "device dtype batch_size",
        "Distance": "temperature k",
        "Responses": "greedy seeds max_new_tokens max_prompt_length",
        "General": _GENERAL,
    },
    "view": {"Page": "out student cache run scores budget", "General": _GENERAL},
    "keys": {"Data": f"tokenizer {_DATA}", "General": "out help"},
}
