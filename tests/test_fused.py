"""The fused loss equals the readable objective, in value and gradient."""

import itertools

import pytest
import torch
from support.fused import NUM_TARGETS, VOCAB, WIDTH, K, assert_equal, case, fused

import todi_offline.losses.fused
import todi_offline.losses.fused_rows
import todi_offline.tuning
from todi_offline.errors import TargetsError
from todi_offline.losses import DIVERGENCES
from todi_offline.targets.sparse import sparsify


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail", ["bucket", "sampled", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_sums_and_gradients_are_the_readable_ones(divergence, tail, temperature, k):
    for dtype in (torch.float32, torch.float64):
        options = {"divergence": divergence, "tail": tail, "temperature": temperature, "k": k, "beta": 1.5}
        assert_equal(case(dtype=dtype), **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_targets", [None, 1, 3, NUM_TARGETS, 100])
def test_the_size_of_the_chunks_does_not_matter(chunk_targets, temperature):
    assert_equal(case(), chunk_targets, temperature=temperature)


@pytest.mark.parametrize("positions", ["student-entropy:0.4", "tip:0.5", "tip:1"])
@pytest.mark.parametrize(("kd_weight", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.5, 2.0), (1.0, 1.0), (1.0, 2.0)])
def test_kd_can_be_limited_to_selected_positions(kd_weight, temperature, positions):
    options = {"kd_weight": kd_weight, "temperature": temperature, "positions": positions}
    for softcap in (None, 4.0):
        assert_equal(case(), softcap=softcap, **options)
    hidden, weight, bias, labels, targets = case()
    assert_equal((hidden, weight.detach(), None, labels, targets), **options)
    assert_equal((hidden.detach(), weight, bias, labels, targets), **options)
    loss, sums = fused(*case(num_targets=0), **options)
    assert (loss.item(), sums["kd"].item()) == (0, 0)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_alone_may_be_the_targets(temperature, k):
    hidden, weight, bias, labels, _ = case()
    teacher = torch.randn(NUM_TARGETS, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = sparsify(teacher, k, num_tail_samples=3, generator=torch.Generator().manual_seed(4))
    assert_equal((hidden, weight, bias, labels, targets), temperature=temperature)
    assert_equal(case(), temperature=temperature, k=0)


def test_the_parts_of_a_divergence_may_be_weighted():
    assert_equal(case(), head_weight=0.4, mass_weight=2.0, tail_weight=0.7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
def test_either_part_of_the_loss_may_have_no_weight(kd_weight, temperature):
    assert_equal(case(), kd_weight=kd_weight, temperature=temperature)


def test_a_custom_divergence_works():
    def squares(teacher, student):
        return (student.exp() - teacher.exp()).square().sum(-1)

    assert_equal(case(), divergence=squares, tail_weight=0.3)


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_without_weight_the_divergence_builds_no_graph(kd_weight):
    seen = []

    def watched(teacher, student):
        seen.append(torch.is_grad_enabled())
        return (student.exp() - teacher.exp()).square().sum(-1)

    fused(*case(), divergence=watched, kd_weight=kd_weight)
    assert set(seen) == {kd_weight != 0}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scale_and_soft_cap_are_the_models(scale, softcap, temperature):
    assert_equal(case(), scale=scale, softcap=softcap, temperature=temperature)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3)))
def test_only_tensors_that_require_a_gradient_get_one(frozen):
    inputs = case()
    for tensor, no_gradient in zip(inputs, frozen, strict=False):
        tensor.requires_grad_(not no_gradient)
    loss, _ = fused(*inputs)
    assert loss.requires_grad == (not all(frozen))
    if not all(frozen):
        assert_equal(inputs)
        loss.backward()
    assert [tensor.grad is None for tensor in inputs[:3]] == list(frozen)


def test_a_head_may_have_no_bias():
    hidden, weight, _, labels, targets = case()
    assert_equal((hidden, weight, None, labels, targets))


def test_padding_ids_have_no_probability_and_no_gradient():
    hidden, weight, bias, labels, targets = case()
    padded_weight = torch.cat([weight, torch.full((3, WIDTH), 50.0)]).detach().requires_grad_()
    padded_bias = torch.cat([bias, torch.full((3,), 50.0)]).detach().requires_grad_()
    assert_equal((hidden, padded_weight, padded_bias, labels, targets), vocab_size=VOCAB)
    loss, _ = fused(hidden, padded_weight, padded_bias, labels, targets, vocab_size=VOCAB)
    loss.backward()
    assert not padded_weight.grad[VOCAB:].any()
    assert not padded_bias.grad[VOCAB:].any()
    without_padding, _ = fused(hidden, weight, bias, labels, targets)
    torch.testing.assert_close(loss, without_padding)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["todi", "forward_kl", "js"])
def test_an_id_that_cannot_occur_gets_no_gradient(divergence, temperature):
    hidden, weight, bias, _, targets = case()
    impossible = {targets.ids[0, 0].item(), targets.tail_ids[1, 0].item()}
    with torch.no_grad():
        bias[list(impossible)] = -torch.inf
    possible = next(i for i in range(VOCAB) if i not in impossible)
    labels = torch.full((NUM_TARGETS,), possible)
    assert_equal((hidden, weight, bias, labels, targets), divergence=divergence, temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nats", [200.0, 800.0, 2000.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_tail_far_below_the_kept_ids_keeps_its_mass(temperature, nats, dtype):
    hidden, weight, bias, labels, targets = case(num_targets=1, dtype=dtype)
    with torch.no_grad():
        hidden.mul_(0.1)
        bias[targets.ids[0]] += nats
    assert_equal((hidden, weight, bias, labels, targets), divergence="forward_kl", temperature=temperature)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.5, 4.0, 10.0])
def test_any_temperature_will_do(temperature):
    hidden, weight, bias, labels, _ = case()
    with torch.no_grad():
        bias.mul_(8)  # far enough apart for exp(logit / T) to be 0 where exp(logit) is not
    teacher = 2 * torch.randn(NUM_TARGETS, VOCAB, generator=torch.Generator().manual_seed(1)).double()
    targets = sparsify(teacher, K, (1.0, temperature), 3, torch.Generator().manual_seed(2))
    assert_equal((hidden, weight, bias, labels, targets), temperature=temperature)


def test_every_id_may_be_kept():
    hidden, weight, bias, labels, _ = case()
    targets = sparsify(torch.randn(NUM_TARGETS, VOCAB, generator=torch.Generator().manual_seed(1)).double(), VOCAB)
    for temperature in (1.0, 2.0):
        assert_equal((hidden, weight, bias, labels, targets), temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "jeffreys", "alpha_beta"])
def test_gradients_equal_finite_differences(divergence, temperature):
    *inputs, labels, targets = case(num_targets=2, width=2, vocab=9)

    def loss(*inputs):
        options = {"divergence": divergence, "temperature": temperature, "k": 3, "softcap": 5.0, "chunk_targets": 2}
        return fused(*inputs, labels, targets, **options)[0]

    assert torch.autograd.gradcheck(loss, inputs)


def test_bfloat16_products_are_added_up_in_float32():
    inputs = case(num_targets=40, width=16, vocab=300, dtype=torch.bfloat16)
    assert_equal(inputs, chunk_targets=8)
    loss, _ = fused(*inputs, chunk_targets=8)
    loss.backward()
    assert loss.dtype == torch.float32
    assert {tensor.grad.dtype for tensor in inputs[:3]} == {torch.bfloat16}


def test_autocast_gives_the_dtype_of_the_products_and_the_parameters_that_of_the_gradients():
    inputs = case(num_targets=20, width=16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = fused(*inputs)
    loss.backward()
    halves = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs[:3]]
    expected, _ = fused(*halves, *inputs[3:])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for tensor, half in zip(inputs, halves, strict=False):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, half.grad.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_float16_holds_the_gradients_although_it_could_not_hold_those_of_the_mean(as_tensor):
    hidden, weight, _, labels, targets = case(num_targets=8, width=16, vocab=300, dtype=torch.float32)
    many = torch.tensor(10**7) if as_tensor else 10**7
    expected, _ = fused(hidden, weight, None, labels, targets, num_targets=many)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    with torch.autocast("cpu", torch.float16):
        loss, _ = fused(hidden.half(), weight, None, labels, targets, num_targets=many)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    scale = 10.0**6  # as a scaler of gradients has it
    found = torch.autograd.grad(scale * loss, (hidden, weight))
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient / scale, right, rtol=0, atol=2e-2 * right.abs().max().item())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_gradients_of_micro_batches_add_up_to_those_of_one_batch(as_tensor):
    hidden, weight, bias, labels, targets = case()
    given = (hidden, weight, bias)
    whole, _ = fused(*given, labels, targets)
    num_targets = torch.tensor(NUM_TARGETS) if as_tensor else NUM_TARGETS
    parts = [
        fused(hidden[rows], weight, bias, labels[rows], targets[rows], num_targets=num_targets)[0]
        for rows in (slice(0, 4), slice(4, 4), slice(4, NUM_TARGETS))
    ]
    torch.testing.assert_close(sum(parts), whole)
    expected = torch.autograd.grad(whole, given)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), given), expected)


def test_no_rows_give_no_loss_and_no_gradient():
    inputs = case(num_targets=0)
    for temperature in (1.0, 2.0):
        loss, sums = fused(*inputs, temperature=temperature)
        assert loss.item() == 0
        assert all(value.item() == 0 for value in sums.values())
        assert not any(gradient.any() for gradient in torch.autograd.grad(loss, inputs[:3]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_loss_is_had_without_gradients_too(temperature):
    inputs = case()
    with torch.no_grad():
        quiet, quiet_sums = fused(*inputs, temperature=temperature)
    loss, sums = fused(*inputs, temperature=temperature)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, loss.detach())
    torch.testing.assert_close(quiet_sums, sums)


def test_backward_may_run_twice_where_the_graph_is_kept():
    inputs = case()
    loss, _ = fused(*inputs)
    once = torch.autograd.grad(loss, inputs[:3], torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    twice = torch.autograd.grad(loss, inputs[:3])
    torch.testing.assert_close([gradient / 2 for gradient in once], list(twice))


def test_the_gradient_of_the_head_is_handed_over_and_not_copied(monkeypatch):
    """Whatever the gradient of the loss is, as under DDP, where it is the number of ranks."""
    places = []
    empty = todi_offline.losses.fused._empty_where_needed

    def watched(tensor):
        buffer = empty(tensor)
        places.append(None if buffer is None else buffer.data_ptr())
        return buffer

    monkeypatch.setattr(todi_offline.losses.fused, "_empty_where_needed", watched)
    hidden, weight, bias, labels, targets = case()
    expected = torch.autograd.grad(fused(hidden, weight, bias, labels, targets)[0], weight)[0]
    loss, _ = fused(hidden, weight, bias, labels, targets)
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, 3 * expected)
    assert weight.grad.data_ptr() == places[-2]


@pytest.mark.parametrize("settings", [{"k": K + 1}, {"temperature": 3.0}])
@pytest.mark.parametrize("num_targets", [0, NUM_TARGETS])
def test_settings_that_the_targets_lack_are_refused_even_without_rows(num_targets, settings):
    with pytest.raises(TargetsError):
        fused(*case(num_targets=num_targets), **settings)
