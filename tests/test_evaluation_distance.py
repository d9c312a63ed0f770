"""The distance to a cached teacher, compared with each formula in float64 and with the teacher itself."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from support import reference
from support.tiny import tiny_tokenizer
from support.tiny_models import granite, llama
from support.tiny_runs import trainer_of

from todi_offline import tuning
from todi_offline.cache.reader import Cache, open_cache
from todi_offline.capturing import capture
from todi_offline.data import Examples
from todi_offline.errors import CacheMismatchError, ModelError, TargetsError
from todi_offline.evaluation import Distance, Group, distance, evaluate_cache
from todi_offline.evaluation.distance import position_in_response
from todi_offline.losses import DistillationConfig
from todi_offline.models.head import head_of
from todi_offline.targets.sparse import SparseTargets
from todi_offline.teacher.in_transformers import Teacher

SETTINGS = [(1.0, None), (1.0, 3), (2.0, None), (2.0, 5)]


@pytest.fixture(scope="module")
def student():
    return llama(seed=1)


def measured(model, cache: Cache, **settings) -> Distance:
    return evaluate_cache(model, tiny_tokenizer(), cache, **settings)


def logits_of(model, sequence) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(sequence.token_ids.astype(np.int64))[None]).logits[0]
    return logits.double().numpy()[sequence.target_mask]


def expected_target(logits, rows, row, label, temperature, k):
    """Return every measure of one target in float64, from the student's logits and the stored rows."""
    column = rows.temperatures.index(temperature)
    stored = rows.logprobs[row].astype(np.float64)
    tail = np.exp(np.float64(rows.tail_logsumexp[row, column]))
    partition = np.exp(stored / temperature).sum() + tail
    ids = [int(i) for i in rows.ids[row]]
    student = reference.log_softmax(logits, temperature)
    plain = reference.log_softmax(logits)
    q = np.exp(student)

    def entries(width):
        kept = np.exp(stored / temperature) / partition
        p = np.array([*kept[:width], kept[width:].sum() + tail / partition])
        return p, reference.with_bucket(q, ids[:width])

    p_k, q_k = entries(len(ids) if k is None else k)
    p_all, q_all = entries(len(ids))
    found = {"forward_kl": reference.forward_kl(p_k, q_k), "reverse_kl": reference.reverse_kl(p_k, q_k)}
    if rows.tail_ids is not None:
        inside = 0.0
        drawn_from = np.exp(np.float64(rows.tail_logsumexp[row, rows.temperatures.index(rows.tail_temperature)]))
        for j, logprob in zip(rows.tail_ids[row], rows.tail_logprobs[row].astype(np.float64), strict=True):
            p_j = np.exp(logprob / temperature) / partition
            chance = np.exp(logprob / rows.tail_temperature) / drawn_from
            inside += p_j / chance * np.log((p_j / p_all[-1]) / (q[j] / q_all[-1]))
        found["forward_kl_full"] = reference.forward_kl(p_all, q_all) + inside / len(rows.tail_ids[row])
    top = int(np.argmax(plain))
    return found | {
        "top1_agreement": float(top == ids[0]),
        "top1_accuracy": float(top == label),
        "cross_entropy": -plain[label],
        "teacher_cross_entropy": -float(rows.label_logprob[row]),
        "confidence": np.exp(plain[top]),
        "teacher_confidence": np.exp(stored[ids.index(top)]) if top in ids else 0.0,
        "entropy": -float((p_all[:-1] * np.log(p_all[:-1])).sum() + p_all[-1] * np.log(min(p_all))),
    }


def expected_targets(model, cache: Cache, temperature, k):
    targets = []
    for number, sequence in enumerate(cache):
        logits = logits_of(model, sequence)
        place, before = 0, None
        for row, position in enumerate(np.flatnonzero(sequence.target_mask)):
            place = place + 1 if before is not None and position == before + 1 else 0
            before = position
            label = int(sequence.token_ids[position + 1])
            target = expected_target(logits[row], sequence.targets, row, label, temperature, k)
            targets.append(target | {"sequence": number, "place": place})
    return targets


def mean_and_error(targets, name):
    mean = np.mean([target[name] for target in targets])
    by_sequence = defaultdict(list)
    for target in targets:
        by_sequence[target["sequence"]].append(target[name] - mean)
    spread = sum(sum(deviations) ** 2 for deviations in by_sequence.values())
    if len(by_sequence) < 2:
        return mean, None
    return mean, np.sqrt(spread * len(by_sequence) / (len(by_sequence) - 1)) / len(targets)


def calibration_error(targets, truth):
    bins = defaultdict(list)
    for target in targets:
        bins[min(int(target["confidence"] * 15), 14)].append(target["confidence"] - target[truth])
    return sum(abs(np.mean(errors)) * len(errors) for errors in bins.values()) / len(targets)


def assert_group(group: Group, targets) -> None:
    assert group.num_targets == len(targets)
    names = targets[0].keys() - {"entropy", "sequence", "place"}
    assert group.measures.keys() == names | {"perplexity", "calibration_error", "calibration_error_to_teacher"}
    for name in names:
        mean, error = mean_and_error(targets, name)
        assert group.measures[name].mean == pytest.approx(mean, rel=2e-4, abs=1e-6), name
        assert group.measures[name].standard_error == pytest.approx(error, rel=1e-3, abs=1e-6), name
    for name, truth in (("", "top1_accuracy"), ("_to_teacher", "teacher_confidence")):
        found = group.measures[f"calibration_error{name}"].mean
        assert found == pytest.approx(calibration_error(targets, truth), rel=1e-4)


@pytest.mark.parametrize(("temperature", "k"), SETTINGS)
def test_every_measure_equals_its_formula_over_all_targets_and_over_each_group(
    student, heldout, temperature, k, monkeypatch
):
    targets = expected_targets(student, heldout, temperature, k)
    edges = np.quantile([target["entropy"] for target in targets], [0.3, 0.8]).tolist()
    monkeypatch.setattr(distance, "ENTROPY_EDGES", edges)
    found = measured(student, heldout, temperature=temperature, k=k)
    assert (found.num_sequences, found.temperature, found.k) == (len(heldout), temperature, k or 16)
    assert_group(found.overall, targets)
    for groups, edges, key in (
        (found.by_position, distance.POSITION_EDGES, "place"),
        (found.by_teacher_entropy, distance.ENTROPY_EDGES, "entropy"),
    ):
        assert sum(group.num_targets for group in groups) == len(targets)
        assert len(groups) >= 3
        for group in groups:
            assert group.low is None or group.low in edges
            inside = [t for t in targets if (group.low or 0) <= t[key] and (group.high is None or t[key] < group.high)]
            assert_group(group, inside)


def test_a_student_equal_to_the_teacher_has_distance_zero(teacher: Teacher, heldout: Cache):
    for temperature in (1.0, 2.0):
        measures = measured(teacher.model, heldout, temperature=temperature).overall.measures
        for name in ("forward_kl", "reverse_kl"):
            assert 0 <= measures[name].mean < 1e-6, name  # the rounding of log-probs in half precision
        assert abs(measures["forward_kl_full"].mean) < 1e-4
        assert measures["top1_agreement"].mean == 1
        assert measures["teacher_confidence"].mean == pytest.approx(measures["confidence"].mean, abs=1e-4)
        assert measures["calibration_error_to_teacher"].mean < 2e-4
        assert measures["cross_entropy"].mean == pytest.approx(measures["teacher_cross_entropy"].mean, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_full_estimate_is_near_the_dense_forward_kl_and_the_bounds_are_below_it(
    student, teacher: Teacher, heldout: Cache, temperature
):
    found = measured(student, heldout, temperature=temperature, k=4).overall.measures
    forward, reverse = [], []
    for sequence in heldout:
        for mine, theirs in zip(logits_of(student, sequence), logits_of(teacher.model, sequence), strict=True):
            q, p = (np.exp(reference.log_softmax(logits, temperature)) for logits in (mine, theirs))
            forward.append(reference.forward_kl(p, q))
            reverse.append(reference.reverse_kl(p, q))
    full = found["forward_kl_full"]
    assert abs(full.mean - np.mean(forward)) < 2 * full.standard_error
    assert found["forward_kl"].mean < 0.9 * np.mean(forward)
    assert found["reverse_kl"].mean < 0.9 * np.mean(reverse)


def test_the_entropy_of_the_groups_is_a_lower_bound_of_the_teachers_and_correlates_with_it(
    teacher: Teacher, heldout: Cache
):
    bounds, own = [], []
    for sequence in heldout:
        targets = SparseTargets.from_numpy(sequence.targets)
        logits = logits_of(teacher.model, sequence)
        labels = torch.zeros(len(logits), dtype=torch.long)
        found = distance.measure_targets(torch.from_numpy(logits), labels, targets, 1.0, None)
        bounds += found["teacher_entropy"].tolist()
        own += [-(np.exp(p) * p).sum() for p in map(reference.log_softmax, logits)]
    assert (np.array(own) - bounds > -1e-3).all()
    assert np.corrcoef(own, bounds)[0, 1] > 0.8


def test_the_full_estimate_has_no_bias(student, teacher: Teacher, heldout_examples: Examples, tmp_path):
    """Over many draws, its mean is within three small standard errors of the dense divergence."""
    dense, drawn = [], []
    for seed in range(6):
        capture(
            teacher, heldout_examples, tmp_path / str(seed), k=8, tail_samples=16, tail_seed=seed, shard_tokens=4096
        )
        drawn.append(measured(student, open_cache(tmp_path / str(seed))).overall.measures["forward_kl_full"].mean)
    for sequence in open_cache(tmp_path / "0"):
        for mine, theirs in zip(logits_of(student, sequence), logits_of(teacher.model, sequence), strict=True):
            q, p = (np.exp(reference.log_softmax(logits)) for logits in (mine, theirs))
            dense.append(reference.forward_kl(p, q))
    spread = np.std(drawn, ddof=1) / np.sqrt(len(drawn))
    assert spread < 0.01 * np.mean(dense)
    assert abs(np.mean(drawn) - np.mean(dense)) < 3 * spread + 1e-4


def test_without_samples_there_is_no_full_estimate(student, teacher, heldout_examples, tmp_path):
    capture(teacher, heldout_examples, tmp_path, k=16, tail_samples=0, shard_tokens=4096)
    measures = measured(student, open_cache(tmp_path)).overall.measures
    assert "forward_kl_full" not in measures
    assert measures["forward_kl"].mean > 0


def test_a_cache_of_samples_alone_is_refused(student, teacher, heldout_examples, heldout, tmp_path):
    capture(teacher, heldout_examples, tmp_path / "cache", k=0, tail_samples=2)
    for cache, k in ((open_cache(tmp_path / "cache"), None), (heldout, 0)):
        with pytest.raises(TargetsError, match=r"is used with k = 0, .* evaluate on a held-out cache"):
            measured(student, cache, k=k)


def test_the_trainer_logs_the_same_bounds(heldout: Cache, tmp_path):
    for temperature, k in SETTINGS:
        distillation = DistillationConfig(temperature=temperature, k=k)
        logged = trainer_of(tmp_path, None, distillation=distillation, eval_dataset=heldout).evaluate()
        measures = measured(llama(seed=1), heldout, temperature=temperature, k=k).overall.measures
        for name in ("forward_kl", "reverse_kl", "cross_entropy"):
            assert measures[name].mean == pytest.approx(logged[f"eval_{name}"], rel=1e-4), name


def values(found: Distance):
    groups = [found.overall, *found.by_position, *found.by_teacher_entropy]
    return np.array([estimate.mean for group in groups for estimate in group.measures.values()])


@pytest.mark.parametrize("build", [llama, granite])
def test_the_results_do_not_depend_on_batches_chunks_or_the_kind_of_head(build, heldout, monkeypatch):
    model = build(seed=1)
    whole = values(measured(model, heldout, batch_size=3))
    np.testing.assert_allclose(values(measured(model, heldout, batch_size=1)), whole, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(tuning, "CPU_TARGET_BYTES", 4 * 512 * 16)
    np.testing.assert_allclose(values(measured(model, heldout, batch_size=3)), whole, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(distance, "tried_head", head_of)
    np.testing.assert_allclose(values(measured(model, heldout, batch_size=3)), whole, rtol=1e-4, atol=1e-6)


def test_limit_uses_the_first_sequences_and_progress_counts_them(student, heldout):
    seen = []
    found = measured(student, heldout, limit=3, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert found.num_sequences == 3
    assert found.overall.num_targets == heldout.num_targets[:3].sum()
    assert seen == [(2, 3), (3, 3)]
    assert measured(student, heldout, limit=100).num_sequences == len(heldout)


def test_the_model_keeps_its_mode_and_gets_no_gradients(student, heldout):
    student.train()
    measured(student, heldout, limit=1)
    assert student.training
    assert all(parameter.grad is None for parameter in student.parameters())
    student.eval()


def test_a_tokenizer_head_temperature_or_k_that_does_not_fit_is_refused(student, heldout):
    with pytest.raises(CacheMismatchError, match="special_ids"):
        evaluate_cache(student, tiny_tokenizer(chat=False), heldout)
    with pytest.raises(ModelError, match="head has 300 ids, but the cache's targets are over 512"):
        measured(llama(vocab_size=300), heldout)
    with pytest.raises(TargetsError, match="or capture 4 too"):
        measured(student, heldout, temperature=4.0)
    with pytest.raises(TargetsError, match="choose 1 to 16"):
        measured(student, heldout, k=17)


def test_a_student_whose_logits_are_nan_is_refused(heldout):
    broken = llama(seed=1)
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ModelError, match=r"logits are NaN at (\d+) of \1 targets of a batch; .*--dtype float32"):
        measured(broken, heldout)


def test_positions_count_from_the_beginning_of_the_response():
    positions = np.array([3, 4, 5, 9, 10, 40, 41, 42, 80])
    assert position_in_response(positions).tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 0]
    assert position_in_response(np.array([0, 1])).tolist() == [0, 1]


def test_ids_of_a_padded_embedding_are_ignored(teacher, heldout):
    """A wider head has distance zero too, though its extra rows would take all the mass."""
    wide = llama()
    wide.resize_token_embeddings(560, mean_resizing=False)
    with torch.no_grad():
        wide.lm_head.weight[512:] = 50.0
    measures = measured(wide, heldout).overall.measures
    assert measures["forward_kl"].mean < 1e-6
    assert measures["top1_agreement"].mean == 1
