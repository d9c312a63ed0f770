"""The teacher's targets: complete, at the right positions, and independent of the rest of the batch."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.made_examples import assert_same_targets, some_examples
from support.tiny import tiny_tokenizer
from support.tiny_models import VOCAB, gemma2, gpt2, llama, save
from torch import Tensor, nn

import todi_offline.models.checkpoint
import todi_offline.teacher.in_transformers
import todi_offline.tuning
from todi_offline.cache.format.encoding import encode_rows
from todi_offline.cache.format.layout import CacheSettings
from todi_offline.capturing import capture
from todi_offline.errors import CacheMismatchError, ConfigError, ModelError, TeacherOutputError
from todi_offline.models.checkpoint import checkpoint_fingerprint
from todi_offline.models.head import in_dtype, output_module
from todi_offline.models.loading import load_model, load_tokenizer
from todi_offline.teacher.in_transformers import (
    Teacher,
    TeacherConfig,
    as_teacher,
    length_batches,
    load_teacher,
    padded_length,
    targets_of,
    teacher_fingerprint,
)

SETTINGS = CacheSettings(k=8, tail_samples=4)


def test_a_padded_length_is_a_step_at_or_above_and_little_of_it_is_padding() -> None:
    for number in range(1, 3000):
        padded = padded_length(number)
        assert padded % 8 == 0
        assert number <= padded <= max(16, number * 9 // 8 + 8)
        assert padded_length(padded) == padded
    assert [padded_length(number) for number in (1, 16, 17, 128, 129, 257, 1000)] == [16, 16, 24, 128, 144, 288, 1024]
    assert [padded_length(number, 1000) for number in (990, 1000, 1001)] == [1000, 1000, 1001]


def test_padding_is_less_than_a_twentieth_of_the_instructions() -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(200), 0.8, 2000).astype(int) + 8
    assert sum(map(padded_length, lengths.tolist())) < lengths.sum() / 0.95


def test_length_batches_hold_every_sequence_once_within_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 900, 200).tolist()
    batches = length_batches(lengths, 4096)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        (padded,) = {padded_length(lengths[index]) for index in batch}
        assert len(batch) * padded <= 4096
    assert batches == length_batches(lengths, 4096)


def test_length_batches_begin_with_the_longest() -> None:
    lengths = np.random.default_rng(0).integers(1, 900, 200).tolist()
    longest = [padded_length(lengths[batch[0]]) for batch in length_batches(lengths, 4096)]
    assert longest == sorted(longest, reverse=True)


def test_a_sequence_longer_than_a_batch_is_one_by_itself() -> None:
    assert length_batches([5, 5000, 5], 4096) == [[1], [0, 2]]


@pytest.mark.parametrize("model", [llama, gpt2, gemma2])
def test_targets_do_not_depend_on_the_rest_of_the_batch_to_the_bit(model: Any) -> None:
    teacher = as_teacher(model(), tiny_tokenizer())
    examples = some_examples(*range(60, 90), 3, 5, 200, 500)
    lengths = [len(example.token_ids) for example in examples]
    alone = [targets_of(teacher, [example], SETTINGS)[0].arrays() for example in examples]
    for batch in [*length_batches(lengths, 300, 512), *length_batches(lengths, 4096, 512)]:
        together = targets_of(teacher, [examples[index] for index in batch], SETTINGS)
        for index, found in zip(batch, together, strict=True):
            for name, values in alone[index].items():
                np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)


def test_a_model_of_few_positions_is_not_asked_for_more() -> None:
    (example,) = some_examples(60)
    (found,) = targets_of(as_teacher(gpt2(n_positions=60), tiny_tokenizer()), [example], SETTINGS)
    assert len(found) == example.target_mask.sum()


def test_logits_of_padding_ids_are_dropped_before_the_softmax() -> None:
    (example,) = some_examples(30)
    model = llama(vocab_size=VOCAB + 64)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 5  # who kept them would see them win
        logits = model(input_ids=torch.from_numpy(example.token_ids.astype(np.int64))[None]).logits[0]
    assert logits[:, VOCAB:].exp().sum() > logits[:, :VOCAB].exp().sum()
    logprobs = logits[torch.from_numpy(example.target_mask), :VOCAB].log_softmax(-1)
    (rows,) = targets_of(as_teacher(model, tiny_tokenizer()), [example], SETTINGS)
    np.testing.assert_array_equal(rows.ids, logprobs.topk(8).indices)
    np.testing.assert_allclose(rows.logprobs, logprobs.topk(8).values, atol=1e-5)
    total = np.logaddexp(np.logaddexp.reduce(rows.logprobs, axis=1), rows.tail_logsumexp[:, 0])
    np.testing.assert_allclose(total, 0, atol=1e-5)


def test_the_fallback_of_an_unknown_head_gives_the_same_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    members = some_examples(40, 25, 33)
    known = as_teacher(gemma2(), tiny_tokenizer())
    unknown = dataclasses.replace(known, head=dataclasses.replace(known.head, runs_apart=False))
    monkeypatch.setattr(todi_offline.tuning, "CPU_TARGET_BYTES", 5 * 4 * VOCAB)  # five rows a chunk
    for found, expected in zip(
        targets_of(unknown, members, SETTINGS), targets_of(known, members, SETTINGS), strict=True
    ):
        assert_same_targets(found, expected)


@pytest.mark.parametrize("chunk_rows", [1, 16, 20, 1000])
def test_the_head_runs_only_at_the_targets_and_in_chunks(
    teacher: Teacher, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = some_examples(40, 25, 33)
    num_targets = sum(int(example.target_mask.sum()) for example in members)
    sizes: list[int] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        sizes.append(output.numel() // VOCAB)

    monkeypatch.setattr(todi_offline.tuning, "CPU_TARGET_BYTES", chunk_rows * 4 * VOCAB)
    handle = output_module(teacher.model).register_forward_hook(note)
    try:
        targets_of(teacher, members, SETTINGS)
    finally:
        handle.remove()
    assert sum(sizes) == -(-num_targets // 16) * 16
    assert all(size % 16 == 0 and size <= max(16, chunk_rows) for size in sizes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_a_broken_logit_is_located_by_example_and_position(
    teacher: Teacher, value: float, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = some_examples(40, 25, 33)
    broken = int(members[0].target_mask.sum()) + 2  # of example 1 the third target, which lies at position 7
    seen = 0

    def breaking(_: nn.Module, __: Any, output: Tensor) -> None:
        nonlocal seen
        rows = output.flatten(0, -2)
        if 0 <= broken - seen < len(rows):
            rows[broken - seen, 5] = value
        seen += len(rows)

    monkeypatch.setattr(todi_offline.tuning, "CPU_TARGET_BYTES", chunk_rows * 4 * VOCAB)
    handle = output_module(teacher.model).register_forward_hook(breaking)
    try:
        with pytest.raises(TeacherOutputError, match=r"example '1' at position 7 hold NaN or \+inf"):
            targets_of(teacher, members, SETTINGS)
    finally:
        handle.remove()


def test_a_teacher_has_the_same_fingerprint_wherever_its_files_lie(tmp_path: Path) -> None:
    folders = [save(llama(), tmp_path / name) for name in "ab"]
    first, second = (load_teacher(TeacherConfig(teacher=str(folder), device="cpu")) for folder in folders)
    assert teacher_fingerprint(first) == teacher_fingerprint(second)
    assert teacher_fingerprint(first) == {**checkpoint_fingerprint(str(folders[0])), "dtype": "float32"}


def test_a_teacher_handed_over_in_memory_is_identified_there(teacher: Teacher) -> None:
    found = teacher_fingerprint(teacher)
    assert found == teacher_fingerprint(as_teacher(llama(), tiny_tokenizer()))
    assert "identified_by" not in found


def test_an_offloaded_teacher_is_identified_by_its_files_alone(tmp_path: Path) -> None:
    """Weights on no device stand for those that accelerate keeps on the disk."""
    loaded = load_teacher(TeacherConfig(teacher=str(save(llama(), tmp_path)), device="cpu"))
    expected = teacher_fingerprint(loaded)
    loaded.model.model.layers[1].to("meta")
    assert teacher_fingerprint(loaded) == expected
    with pytest.raises(ModelError, match="some weights of the teacher are offloaded"):
        teacher_fingerprint(dataclasses.replace(loaded, checkpoint=None))


def test_a_cache_whose_teacher_was_identified_in_memory_is_appended_to_from_memory_alone(tmp_path: Path) -> None:
    folder, cache = save(llama(), tmp_path / "model"), tmp_path / "cache"
    in_memory = as_teacher(load_model(str(folder), device="cpu"), load_tokenizer(str(folder)))
    settings = {"max_length": 64, "max_prompt_length": 32, "k": 8}
    capture(in_memory, "stdlib", cache, limit=2, **settings)
    with pytest.raises(CacheMismatchError) as raised:
        capture(str(folder), "stdlib", cache, limit=3, device="cpu", **settings)
    assert "its weights in memory identify it in the cache" in str(raised.value)
    assert "the files of its checkpoint identify it now" in str(raised.value)
    assert "weights:" not in str(raised.value)
    assert capture(in_memory, "stdlib", cache, limit=3, **settings).num_sequences == 3


def test_one_changed_weight_is_another_teacher(teacher: Teacher) -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    found = teacher_fingerprint(as_teacher(model, tiny_tokenizer()))
    expected = teacher_fingerprint(teacher)
    assert found["weights"] != expected["weights"]
    assert found | {"weights": 0} == expected | {"weights": 0}


def test_a_setting_that_changes_the_logits_is_another_teacher(teacher: Teacher) -> None:
    model = llama(rope_theta=500.0)
    assert teacher_fingerprint(as_teacher(model, tiny_tokenizer()))["config"] != teacher_fingerprint(teacher)["config"]
    halved = teacher_fingerprint(as_teacher(llama().bfloat16(), tiny_tokenizer()))
    assert halved["dtype"] == "bfloat16"
    assert halved["weights"] != teacher_fingerprint(teacher)["weights"]


def test_an_adapter_is_worn_and_belongs_to_the_fingerprint(teacher: Teacher, tmp_path: Path) -> None:
    folder = save(llama(), tmp_path / "base")
    torch.manual_seed(0)
    adapted = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    config = TeacherConfig(teacher=str(folder), adapter=str(tmp_path / "adapter"), device="cpu")
    worn = load_teacher(config)
    (example,) = some_examples(30)
    (rows,), (plain,) = targets_of(worn, [example], SETTINGS), targets_of(teacher, [example], SETTINGS)
    (expected,) = targets_of(as_teacher(adapted, tiny_tokenizer()), [example], SETTINGS)
    assert_same_targets(rows, expected)
    assert not np.allclose(rows.logprobs, plain.logprobs, atol=1e-3)
    assert teacher_fingerprint(worn)["adapters"]
    assert teacher_fingerprint(as_teacher(adapted, tiny_tokenizer()))["adapters"]
    moved = dataclasses.replace(
        config,
        teacher=str(shutil.copytree(folder, tmp_path / "copy")),
        adapter=str(shutil.copytree(tmp_path / "adapter", tmp_path / "copy of the adapter")),
    )
    assert teacher_fingerprint(worn) == teacher_fingerprint(load_teacher(moved))
    with pytest.raises(ModelError, match="cannot be loaded as an adapter"):
        load_teacher(dataclasses.replace(config, adapter=str(tmp_path / "none")))


def test_large_tensors_are_sampled_and_said_to_be(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    assert teacher_fingerprint(teacher)["sampled_tensors"] == []
    monkeypatch.setattr(todi_offline.teacher.in_transformers, "SAMPLED_TENSOR_BYTES", 16_384)
    monkeypatch.setattr(todi_offline.models.checkpoint, "SAMPLED_TENSOR_BYTES", 16_384)
    monkeypatch.setattr(todi_offline.models.checkpoint, "BLOCK_BYTES", 512)
    sampled = teacher_fingerprint(teacher)
    assert sampled["sampled_tensors"] == ["lm_head.weight", "model.embed_tokens.weight"]
    for row in (0, -1):
        model = llama()
        with torch.no_grad():
            model.lm_head.weight[row, row] += 1
        assert teacher_fingerprint(as_teacher(model, tiny_tokenizer()))["weights"] != sampled["weights"]


def test_the_log_partition_gives_the_logits_of_a_bfloat16_head_back() -> None:
    model, settings = llama().to(torch.bfloat16), dataclasses.replace(SETTINGS, encoding="bf16_logit")
    (example,) = some_examples(32)  # no padding: kernels round a longer sequence in another way
    (rows,) = targets_of(as_teacher(model, tiny_tokenizer()), [example], settings)
    assert rows.log_partition is not None
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(example.token_ids.astype(np.int64))[None]).logits[0]
    positions = np.flatnonzero(example.target_mask)
    raw = logits[torch.from_numpy(positions)].float().numpy()
    kept = np.take_along_axis(raw, rows.ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(rows.logprobs + rows.log_partition[:, None], kept, atol=2e-6)
    by_id = np.take_along_axis(kept, np.argsort(rows.ids), axis=1)
    bits = encode_rows(rows, "bf16_logit")["topk_logprobs"].astype(np.uint32) << 16
    np.testing.assert_array_equal(bits.view(np.float32), by_id)


def test_a_head_in_float32_brings_targets_nearer_to_those_of_the_float32_model(tmp_path: Path) -> None:
    """The weights are bfloat16 in each: what differs is how they are computed with. Layers add little, as yet."""
    model = llama(tie_word_embeddings=True, initializer_range=1.0)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 1e-3
        layer.mlp.down_proj.weight.data *= 1e-3
    folder, examples = save(model.bfloat16(), tmp_path), some_examples(40, 25, 33)

    def logprobs(**settings: str) -> Any:
        loaded = load_teacher(TeacherConfig(teacher=str(folder), device="cpu", **settings))
        rows = targets_of(loaded, examples, dataclasses.replace(SETTINGS, k=VOCAB, tail_samples=0))
        return np.concatenate([np.take_along_axis(row.logprobs, np.argsort(row.ids), 1) for row in rows]), loaded

    (plain, _), (exact, loaded), (expected, _) = logprobs(), logprobs(head_dtype="float32"), logprobs(dtype="float32")
    rounding, left = (np.abs(found - expected).mean() for found in (plain, exact))
    assert left < 0.6 * rounding
    assert loaded.model.dtype == loaded.model.lm_head.weight.dtype == torch.bfloat16
    found = teacher_fingerprint(loaded)
    assert (found["dtype"], found["head_dtype"]) == ("bfloat16", "float32")


def test_a_head_that_has_no_dtype_of_its_own_is_refused() -> None:
    head = as_teacher(llama(), tiny_tokenizer()).head
    with pytest.raises(ModelError, match="not a plain linear layer on a device"):
        in_dtype(dataclasses.replace(head, runs_apart=False), torch.float32)
    model = llama().bfloat16()
    model.lm_head.register_forward_hook(lambda _, __, output: 2 * output)
    with pytest.raises(ModelError, match="more than its weight and bias"):
        in_dtype(as_teacher(model, tiny_tokenizer()).head, torch.float32)
    with pytest.raises(ConfigError, match="head_dtype is 'int8'"):
        TeacherConfig(teacher="x", head_dtype="int8")


def test_a_batch_holds_at_least_a_token() -> None:
    with pytest.raises(ConfigError, match="batch_tokens is 0"):
        TeacherConfig(teacher="x", batch_tokens=0)
