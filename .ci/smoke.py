"""A folder in; a tiny teacher captured and a student trained from its cache in there, with whatever is installed."""

import sys
from pathlib import Path

from support.tiny_models import save_llama

from todi_offline import capture, open_cache, train


def main(folder: Path) -> None:
    """Go through both stages."""
    teacher = save_llama(folder / "teacher")
    student = save_llama(folder / "student", seed=1)
    for name, limit in (("cache", 24), ("heldout", 6)):
        options = {"limit": limit, "max_length": 128, "max_prompt_length": 64, "k": 16, "tail_samples": 4}
        capture(str(teacher), "stdlib", folder / name, split="train" if limit > 6 else "heldout", **options)
    assert len(open_cache(folder / "cache")) == 24
    settings = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True}
    for name, more in (("run", {}), ("lora", {"lora_r": 4, "report_to": "tensorboard"})):
        summary = train(
            str(student), folder / "cache", folder / name, eval_cache=folder / "heldout", **settings, **more
        )
        assert summary.num_steps == 6
        if name == "run":
            assert summary.after["forward_kl"] < summary.before["forward_kl"], summary
    print("both stages run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
