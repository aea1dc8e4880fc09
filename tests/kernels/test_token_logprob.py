"""token_logprob against plain log_softmax and autograd, and what it never does: hold all logits, work for nothing."""

import weakref

import pytest
import torch
from fastlatent_kernels import token_logprob
from fastlatent_kernels.token_logprob import head_logits
from fastlatent_kernels.token_logprob.chunks import through_chunks
from watch import Watch


def plain(hidden_AD, weight_VD, target_A, temperature):
    logp_AV = ((hidden_AD @ weight_VD.t()) / temperature).log_softmax(dim=1)
    return logp_AV.gather(1, target_A[:, None])[:, 0], -(logp_AV.exp() * logp_AV).sum(dim=1)


def inputs(A, D, V, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    new = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return new(A, D), new(V, D), torch.randint(V, (A,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("wanted", [(1, 0), (0, 1), (1, 1)], ids=["logprob", "entropy", "both"])
def test_values_and_gradients_are_those_of_log_softmax(temperature, wanted):
    hidden, weight, target = inputs(150, 11, 70)
    direction = torch.randn(2, 150, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for f in (token_logprob, plain):
        outputs = f(hidden, weight, target, temperature)
        loss = sum((out * direction[i]).sum() for i, out in enumerate(outputs) if wanted[i])
        results.append((*outputs, *torch.autograd.grad(loss, (hidden, weight))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_float32_master_weights_serve_bfloat16_hidden_states():
    hidden, weight, target = inputs(200, 16, 90, torch.float32)
    rounded = hidden.detach().bfloat16().requires_grad_()
    logprob, entropy = token_logprob(rounded, weight, target)
    (logprob.sum() + 0.1 * entropy.sum()).backward()
    assert logprob.dtype == entropy.dtype == weight.grad.dtype == torch.float32
    assert rounded.grad.dtype == torch.bfloat16
    exact_hidden = rounded.detach().double().requires_grad_()
    exact_weight = weight.detach().bfloat16().double().requires_grad_()
    exact = plain(exact_hidden, exact_weight, target, 1.0)
    (exact[0].sum() + 0.1 * exact[1].sum()).backward()
    for got, want in ((logprob, exact[0]), (entropy, exact[1]), (rounded.grad, exact_hidden.grad),
                      (weight.grad, exact_weight.grad)):
        assert (got.double() - want).norm() < 0.01 * want.norm()


def test_frozen_weights_or_hidden_states_get_no_gradient():
    hidden, weight, target = inputs(70, 5, 30)
    want = torch.autograd.grad(plain(hidden, weight, target, 1.0)[0].sum(), (hidden, weight))
    (grad,) = torch.autograd.grad(token_logprob(hidden, weight.detach(), target)[0].sum(), hidden)
    torch.testing.assert_close(grad, want[0])
    (grad,) = torch.autograd.grad(token_logprob(hidden.detach(), weight, target)[0].sum(), weight)
    torch.testing.assert_close(grad, want[1])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_several_targets_a_row_are_each_on_its_own(backend):
    """Repeated ids included: their gradients add up."""
    hidden, weight, _ = inputs(9, 6, 40, torch.float32 if backend == "triton" else torch.float64)
    target_AK = torch.randint(40, (9, 3), generator=torch.Generator().manual_seed(2))
    target_AK[4] = target_AK[4, 0]
    direction_AK = torch.randn(9, 3, generator=torch.Generator().manual_seed(3))
    logprob_AK, entropy_A = token_logprob(hidden, weight, target_AK, 0.7, backend=backend)
    got = torch.autograd.grad((logprob_AK * direction_AK).sum() - 0.2 * entropy_A.sum(), (hidden, weight))
    double, double_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    each = [plain(double, double_weight, target_AK[:, k], 0.7) for k in range(3)]
    loss = sum((each[k][0] * direction_AK[:, k]).sum() for k in range(3)) - 0.2 * each[0][1].sum()
    want = torch.autograd.grad(loss, (double, double_weight))
    assert logprob_AK.shape == (9, 3) and entropy_A.shape == (9,)
    expected = (torch.stack([logprob for logprob, _ in each], dim=1), each[0][1], *want)
    for a, b in zip((logprob_AK, entropy_A, *got), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_every_row_has_its_own_temperature(backend, num_targets):
    """70 rows are two chunks."""
    hidden, weight, _ = inputs(70, 6, 40, torch.float32)
    generator = torch.Generator().manual_seed(2)
    target_AK = torch.randint(40, (70, num_targets), generator=generator)
    temperature_A = torch.tensor([1.0, 0.6, 2.5]).repeat(24)[:70].double()
    direction_AK, direction_A = torch.randn(70, num_targets, generator=generator), torch.randn(70, generator=generator)
    given = target_AK if num_targets > 1 else target_AK[:, 0]
    logprob_A, entropy_A = token_logprob(hidden, weight, given, temperature_A, backend=backend)
    loss = (logprob_A.view(70, -1) * direction_AK).sum() + (entropy_A * direction_A).sum()
    got = torch.autograd.grad(loss, (hidden, weight))
    double, double_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logp_AV = ((double @ double_weight.t()) / temperature_A[:, None]).log_softmax(dim=1)
    exact_AK, exact_A = logp_AV.gather(1, target_AK), -(logp_AV.exp() * logp_AV).sum(dim=1)
    want = torch.autograd.grad((exact_AK * direction_AK).sum() + (exact_A * direction_A).sum(), (double, double_weight))
    assert logprob_A.dtype == entropy_A.dtype == torch.float32
    for a, b in zip((logprob_A.view(70, -1), entropy_A, *got), (exact_AK, exact_A, *want), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=5e-5)


def test_one_temperature_for_each_row_compiles_whole():
    torch._dynamo.reset()
    hidden, weight, target = inputs(70, 6, 40)
    temperature = torch.rand(70, generator=torch.Generator().manual_seed(0)) + 0.3
    compiled = torch.compile(token_logprob, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, token_logprob):
        logprob, entropy = f(hidden, weight, target, temperature)
        results.append((logprob, entropy, *torch.autograd.grad((logprob - entropy).sum(), (hidden, weight))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("temperature", "message"), [
    (0.0, "temperature: expected a number above 0, got 0.0"),
    (torch.tensor([1.0, -0.5, 1.0]), "temperature: expected numbers above 0, got -0.5"),
    (torch.tensor([1.0, torch.nan, 1.0]), "temperature: expected numbers above 0, got nan"),
    (torch.ones(2), r"temperature: expected a float64 or float32 tensor of shape \[3\] on cpu, got float32 \[2\]"),
    (torch.ones(3, 1), r"temperature: expected .* of shape \[3\]"), (torch.tensor(1.0), r"temperature: .* got float32 \[\]"),
    (torch.ones(3).int(), "temperature: expected a float64 or float32 tensor")])
def test_wrong_temperatures_are_named(temperature, message):
    hidden, weight, target = inputs(3, 6, 40)
    with pytest.raises(ValueError, match=f"^{message}"):
        token_logprob(hidden, weight, target, temperature)


@pytest.mark.parametrize("bad", [-1, 40, 2**40])
def test_ids_outside_the_vocabulary_are_named(bad):
    hidden, weight, target = inputs(5, 6, 40)
    target[3] = bad
    with pytest.raises(ValueError, match=f"^target_A: expected ids from 0 to 39, got .*{bad}"):
        token_logprob(hidden, weight, target)
    with pytest.raises(ValueError, match="^target_A: expected ids from 0 to 39"):
        token_logprob(hidden, weight, target[:, None].repeat(1, 2))


def test_where_nothing_can_be_raised_a_bad_row_is_nan_and_no_other():
    """In a traced call, as on a GPU."""
    torch._dynamo.reset()
    hidden, weight, target = inputs(5, 6, 40)
    want, _ = token_logprob(hidden, weight, target, torch.ones(5))
    bad_target, temperature = target.clone(), torch.ones(5)
    bad_target[1], bad_target[2], temperature[4] = -1, 40, 0.0
    compiled = torch.compile(token_logprob, fullgraph=True, backend="aot_eager")
    logprob, entropy = compiled(hidden, weight, bad_target, temperature)
    assert logprob.isnan().tolist() == [False, True, True, False, True]
    assert entropy.isnan().tolist() == [False, False, False, False, True]
    torch.testing.assert_close(logprob[[0, 3]], want[[0, 3]])
    (logprob[0] + logprob[3]).backward()


@pytest.mark.parametrize("A", [512, 1500])
def test_nothing_of_a_quarter_of_the_logits_ever_exists(A):
    hidden, weight, target = inputs(A, 8, 1000, torch.float32)
    with Watch() as watch:
        logprob, entropy = token_logprob(hidden, weight, target)
        (logprob + entropy).sum().backward()
    assert 0 < watch.largest < A * 1000 / 4


def test_one_chunk_of_logits_is_alive_at_a_time():
    alive = []

    def each_chunk(rows, logits_RV):
        assert all(chunk() is None for chunk in alive)
        alive.append(weakref.ref(logits_RV))
        return logits_RV  # the gradient lies over the logits

    through_chunks(torch.randn(140, 8), torch.randn(40, 8), each_chunk, needs_hidden=True, needs_weight=True)
    assert len(alive) > 1


def test_products_nobody_asked_for_are_not_computed():
    hidden, weight, target = inputs(64, 8, 40, torch.float32)  # one chunk
    with Watch() as frozen:
        token_logprob(hidden, weight.detach(), target)[0].sum().backward()
    with Watch() as both:
        token_logprob(hidden, weight, target)[0].sum().backward()
    assert (frozen.products, both.products) == (3, 4)  # logits, logits again, d hidden (, d weight)


def test_no_rows_are_fine():
    hidden, weight, target = inputs(0, 8, 40)
    logprob, entropy = token_logprob(hidden, weight, target)
    (logprob.sum() + entropy.sum()).backward()
    assert logprob.shape == entropy.shape == (0,) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_head_logits_are_float32_without_gradient():
    hidden, weight, _ = inputs(5, 8, 40, torch.float32)
    logits = head_logits(hidden.bfloat16(), weight)
    assert logits.dtype == torch.float32 and not logits.requires_grad
    torch.testing.assert_close(logits, hidden @ weight.t(), rtol=0.05, atol=0.05)
    assert torch.equal(head_logits(hidden, weight), hidden @ weight.t())


def test_head_logits_take_a_prepacked_weight():
    hidden, weight, _ = inputs(5, 8, 40, torch.float32)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    torch.testing.assert_close(head_logits(hidden, packed), hidden @ weight.t())
