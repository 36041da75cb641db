"""The specification of sam_at.py, as properties. `pytest` runs all of it on a CPU; hypothesis draws the cases."""
import argparse
import io
import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the specification is of the CPU's bits, wherever it runs

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import sam_at

settings.register_profile("repeatable", deadline=None, max_examples=25, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much])
settings.load_profile("repeatable")



@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    """Each test in an empty folder of its own: that is where runs/ goes."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


seeds = st.integers(0, 10_000)
norms = st.sampled_from(["linf", "l2"])
radii = st.floats(0.001, 0.3)


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(*shape, seed, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(n, size=8, classes=3, seed=0, dtype=torch.float32):
    return pixels(n, 3, size, size, seed=seed, dtype=dtype), torch.arange(n) % classes


def tiny_net(seed=0, classes=3, dtype=torch.float32, batchnorm=True):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if batchnorm else nn.Identity(), nn.Tanh(),
                        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes))
    return sam_at.Classifier(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)).to(dtype)


def linear_net(w, b=0.0):
    """Two classes with logits (0, <w, x> + b)."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(w.numel(), 2)).to(w.dtype)
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.zeros_like(w), w]))
        net[1].bias.copy_(torch.tensor([0.0, b]))
    return net


def weights_of(model):
    return [w.detach().clone() for w in model.parameters()]


def same_bits(a, b):
    def as_bytes(t):
        return t.contiguous().flatten().view(torch.uint8)

    return all(x.dtype == y.dtype and as_bytes(x).equal(as_bytes(y)) for x, y in zip(a, b, strict=True))


def sgd(model, lr=0.1, **settings):
    return torch.optim.SGD(model.parameters(), lr=lr, **settings)


def length(tensors):
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))


def cli(*argv):
    """main() in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = sam_at.main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Input space
# ---------------------------------------------------------------------------------------------------------------


@given(seeds, norms, radii, st.integers(0, 12), st.booleans(), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_pgd_stays_in_the_ball_and_in_the_image(seed, norm, eps, steps, random_start, n, dtype):
    x, y = batch(n, seed=seed, dtype=dtype)
    x = (3 * x - 1).clamp(0, 1)  # many pixels on the border of [0,1]
    x_adv = sam_at.pgd(tiny_net(seed, dtype=dtype).eval(), x, y, eps, steps=steps, norm=norm, random_start=random_start)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= eps + 1e-6).all()


@given(seeds, norms, st.booleans(), st.integers(0, 3))
def test_pgd_with_eps_zero_returns_the_image(seed, norm, random_start, steps):
    x, y = batch(4, seed=seed)
    assert sam_at.pgd(tiny_net(seed).eval(), x, y, 0.0, steps=steps, norm=norm, random_start=random_start).equal(x)


@given(seeds, norms, st.floats(0.001, 0.2), st.integers(2, 20))
def test_pgd_finds_the_optimum_of_a_linear_model(seed, norm, eps, d):
    """On <w, x> the worst delta is eps * sign(g) for l-inf and eps * g/|g| for l2, where g = -w at label 1, w at 0."""
    w = normal(d, seed=seed, dtype=torch.float64)
    assume(w.abs().min() > 1e-3)
    x = 0.3 + 0.4 * pixels(6, d, seed=seed + 1, dtype=torch.float64)  # no pixel reaches the border
    y = torch.arange(6) % 2
    g = torch.where(y == 1, -1.0, 1.0).double()[:, None] * w
    best = x + eps * (g.sign() if norm == "linf" else g / g.norm(dim=1, keepdim=True))
    assert torch.allclose(sam_at.pgd(linear_net(w), x, y, eps, norm=norm, random_start=False), best, atol=1e-9)
    if norm == "linf":  # ten steps of eps/4 cross the whole ball, wherever they start
        assert torch.allclose(sam_at.pgd(linear_net(w), x, y, eps, norm=norm), best, atol=1e-9)


@given(seeds, norms, st.floats(0.02, 0.2), st.integers(2, 12))
def test_pgd_meets_the_border_of_the_image(seed, norm, eps, d):
    """With pixels on the border the l-inf optimum of a linear model is the clipped one; l2 loses no other pixel for it."""
    w = normal(d, seed=seed, dtype=torch.float64)
    x, y = pixels(6, d, seed=seed, dtype=torch.float64).round(), torch.ones(6, dtype=torch.int64)
    x_adv = sam_at.pgd(linear_net(w), x, y, eps, norm=norm, random_start=False)
    if norm == "linf":
        assert torch.allclose(x_adv, (x - eps * w.sign()).clamp(0, 1), atol=1e-9)
    assert ((x_adv - x) * w <= 1e-12).all()  # no pixel moves the wrong way


@given(seeds, radii)
def test_fgsm_is_one_step_of_pgd(seed, eps):
    model, (x, y) = tiny_net(seed).eval(), batch(5, seed=seed)
    x_adv = sam_at.fgsm(model, x, y, eps)
    assert x_adv.equal(sam_at.pgd(model, x, y, eps, steps=1, step_size=eps, random_start=False))
    x.requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert torch.allclose(x_adv, (x.detach() + eps * g.sign()).clamp(0, 1), atol=1e-6)


@given(seeds, norms, st.floats(0.01, 0.2), st.integers(1, 12))
def test_pgd_default_step_is_a_quarter_of_eps(seed, norm, eps, steps):
    model, (x, y) = tiny_net(seed).eval(), batch(3, seed=seed)
    one = sam_at.pgd(model, x, y, eps, steps=steps, norm=norm, random_start=False)
    assert one.equal(sam_at.pgd(model, x, y, eps, steps=steps, step_size=eps / 4, norm=norm, random_start=False))


@given(seeds, norms, radii, st.booleans())
def test_pgd_is_repeatable_and_its_start_is_random(seed, norm, eps, own_generator):
    model, (x, y) = tiny_net(seed).eval(), batch(4, seed=seed)

    def attack(seed, steps):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        return sam_at.pgd(model, x, y, eps, steps=steps, norm=norm, generator=generator)

    assert attack(seed, 3).equal(attack(seed, 3))
    assert not attack(seed, 0).equal(attack(seed + 1, 0))


@given(seeds, norms)
def test_random_starts_fill_the_ball(seed, norm):
    x = torch.full((400, 3, 4, 4), 0.5)
    delta = sam_at.random_delta(x, 0.1, norm, torch.Generator().manual_seed(seed)).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert size.max() <= 0.1 + 1e-6 and size.max() > 0.095
    assert delta.mean().abs() < 0.005
    if norm == "l2":
        assert size.min() < 0.01 and 0.04 < size.mean() < 0.06  # lengths uniform in [0, eps]
    else:
        assert abs(delta.std() - 0.1 / math.sqrt(3)) < 0.002     # each pixel uniform in [-eps, eps]


@given(seeds, norms, st.booleans(), st.booleans())
def test_pgd_leaves_the_model_as_it_was(seed, norm, training, some_frozen):
    model, (x, y) = tiny_net(seed), batch(4, seed=seed)
    F.cross_entropy(model(x), y).backward()  # gradients lie on the weights, statistics have moved
    model.train(training)
    first = next(model.parameters())
    first.requires_grad_(not some_frozen)
    first.grad = None
    state, grads = {k: v.clone() for k, v in model.state_dict().items()}, [w.grad for w in model.parameters()]
    kept = [None if g is None else g.clone() for g in grads]
    x_before = x.clone()
    sam_at.pgd(model, x, y, 0.1, steps=3, norm=norm)
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    for w, g, k in zip(model.parameters(), grads, kept):
        assert w.grad is g and (g is None or g.equal(k))
    assert [w.requires_grad for w in model.parameters()] == [not some_frozen] + [True] * (len(grads) - 1)
    assert model.training == training and all(m.training == training for m in model.modules())
    assert all(m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert x.equal(x_before)


@given(seeds, st.integers(1, 4), norms)
def test_pgd_computes_no_weight_gradients(seed, steps, norm):
    """A step costs a forward pass and the input's half of a backward pass: twice the forward's operations, not thrice."""
    model, (x, y) = tiny_net(seed).eval(), batch(2, seed=seed)
    with FlopCounterMode(display=False) as forward:
        model(x)
    seen = []
    model.register_forward_hook(lambda *_: seen.extend(w.requires_grad for w in model.parameters()))
    with FlopCounterMode(display=False) as attack:
        sam_at.pgd(model, x, y, 0.1, steps=steps, norm=norm)
    assert seen and not any(seen)  # so that no activation is kept for them either
    assert attack.get_total_flops() == 2 * steps * forward.get_total_flops()


@given(seeds, norms)
def test_pgd_works_where_gradients_are_off_and_puts_things_back_after_an_error(seed, norm):
    model, (x, y) = tiny_net(seed).eval(), batch(3, seed=seed)
    inside = partial(sam_at.pgd, model, x, y, 0.1, norm=norm, random_start=False)
    with torch.no_grad():
        x_adv = inside()
    assert x_adv.equal(inside()) and not x_adv.equal(x)
    with pytest.raises(ValueError):
        sam_at.pgd(model, x[:2], y, 0.1, norm=norm)
    assert all(w.requires_grad for w in model.parameters())
    assert model.net[1].track_running_stats


class Hostile(nn.Module):
    """Logits that no longer depend on the image, are NaN, or have infinite gradients."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        z = x.flatten(1)[:, :2]
        return {"constant": 0 * z, "nan": z * math.nan, "infinite": (z - z.detach()).sqrt(), "detached": 0 * z.detach() + z * 0,
                "huge": z * 1e30}[self.kind]


@given(seeds, norms, radii, st.sampled_from(["constant", "nan", "infinite", "huge"]), st.integers(1, 4))
def test_a_hostile_model_never_makes_a_broken_image(seed, norm, eps, kind, steps):
    x, y = batch(3, classes=2, seed=seed)
    still = sam_at.pgd(Hostile(kind), x, y, eps, steps=steps, norm=norm, random_start=False)
    moved = sam_at.pgd(Hostile(kind), x, y, eps, steps=steps, norm=norm)
    for x_adv in still, moved:
        assert x_adv.isfinite().all() and x_adv.min() >= 0 and x_adv.max() <= 1
        delta = (x_adv - x).flatten(1)
        assert ((delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)) <= eps + 1e-6).all()
    if kind in ("constant", "nan"):
        assert still.equal(x)


@given(seeds, st.floats(1e-30, 1e30), norms)
def test_the_attack_does_not_depend_on_the_scale_of_the_loss(seed, scale, norm):
    g = normal(4, 3, 5, 5, seed=seed)
    g = torch.where(g.abs() < 1e-3, torch.ones_like(g), g)
    step = sam_at.steepest(g * scale, norm)
    assert torch.allclose(step, sam_at.steepest(g, norm), rtol=1e-4)
    assert torch.allclose(step.flatten(1).norm(dim=1) if norm == "l2" else step.abs().amax(), torch.ones(()), rtol=1e-4)


@given(seeds, norms, st.floats(0.01, 2), st.floats(0.01, 2))
def test_project_is_the_nearest_point_of_the_ball(seed, norm, eps, scale):
    delta = scale * normal(5, 3, 4, seed=seed)
    nearest = sam_at.project(delta, eps, norm)
    size = nearest.flatten(1).abs().amax(1) if norm == "linf" else nearest.flatten(1).norm(dim=1)
    assert (size <= eps * (1 + 1e-5)).all()
    assert sam_at.project(nearest, eps, norm).allclose(nearest)
    assert sam_at.project(0.5 * nearest, eps, norm).equal(0.5 * nearest)  # inside the ball nothing moves
    other = sam_at.random_delta(delta, eps, norm, torch.Generator().manual_seed(seed))
    assert ((delta - nearest).flatten(1).norm(dim=1) <= (delta - other).flatten(1).norm(dim=1) + 1e-5).all()


@pytest.mark.parametrize("wrong", [{"norm": "l1"}, {"eps": -0.1}, {"eps": math.nan}, {"steps": -1}])
def test_pgd_refuses(wrong):
    x, y = batch(2)
    with pytest.raises(ValueError):
        sam_at.pgd(tiny_net().eval(), x, y, **{"eps": 0.1} | wrong)
    with pytest.raises(TypeError):
        sam_at.pgd(tiny_net().eval(), (x * 255).byte(), y, 0.1)


# ---------------------------------------------------------------------------------------------------------------
# Weight space
# ---------------------------------------------------------------------------------------------------------------


@given(seeds, st.floats(0, 10), st.booleans(), st.booleans())
def test_perturbed_puts_back_the_exact_bits(seed, rho, fail, as_parameters):
    model, (x, y) = tiny_net(seed), batch(4, seed=seed)
    F.cross_entropy(model(x), y).backward()
    before, grads = weights_of(model), [w.grad.clone() for w in model.parameters()]
    with pytest.raises(KeyError) if fail else io.StringIO():
        with sam_at.perturbed(model.parameters() if as_parameters else model, rho):
            if fail:
                raise KeyError
    assert same_bits(before, weights_of(model))
    assert same_bits(grads, [w.grad for w in model.parameters()])


@given(seeds, st.floats(1e-4, 10), st.floats(1e-3, 1e3))
def test_the_ascent_has_norm_rho_and_the_gradients_direction(seed, rho, scale):
    model, (x, y) = tiny_net(seed, dtype=torch.float64), batch(4, seed=seed, dtype=torch.float64)
    (scale * F.cross_entropy(model(x), y)).backward()
    before, grads = weights_of(model), [w.grad.clone() for w in model.parameters()]
    with sam_at.perturbed(model, rho):
        v = [w.detach() - b for w, b in zip(model.parameters(), before)]
    assert math.isclose(length(v), rho, rel_tol=1e-6)
    for a, g in zip(v, grads):  # one factor for every weight: one norm over all of them, not one a layer
        assert torch.allclose(a, g * rho / length(grads), rtol=1e-5, atol=1e-9 * rho)


@given(seeds, st.floats(0.001, 1))
def test_the_ascent_never_lowers_a_convex_loss(seed, rho):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
    x, y = batch(6, seed=seed, dtype=torch.float64)
    loss, _ = sam_at.backward(model, x, y)
    g_norm = length(w.grad for w in model.parameters())
    with sam_at.perturbed(model, rho), torch.no_grad():
        assert F.cross_entropy(model(x), y) >= loss + rho * g_norm - 1e-9  # convex: above its tangent


@given(seeds, st.floats(0, 5))
def test_zero_and_missing_gradients_are_harmless(seed, rho):
    model = tiny_net(seed)
    before = weights_of(model)
    with sam_at.perturbed(model, rho):  # no gradient at all
        assert same_bits(before, weights_of(model))
    for w in model.parameters():
        w.grad = torch.zeros_like(w)
    with sam_at.perturbed(model, rho):  # all zero
        assert all(a.equal(b) for a, b in zip(before, weights_of(model)))
    last = model.net[-1].bias
    for w in model.parameters():
        w.grad = torch.ones_like(w) if w is last else None
    with sam_at.perturbed(model, rho):  # one weight alone has a gradient
        assert math.isclose(length([last.detach() - before[-1]]), rho, rel_tol=1e-3, abs_tol=1e-6)
        assert same_bits(before[:-1], weights_of(model)[:-1])
    for w in model.parameters():
        w.grad = torch.full_like(w, 1e-30)
    with sam_at.perturbed(model, rho):  # squares underflow: a short ascent, never a long one
        assert length(a - b for a, b in zip(before, weights_of(model))) <= rho * 1.001 + 1e-6
    assert same_bits(before, weights_of(model))


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_perturbed_refuses(rho):
    with pytest.raises(ValueError):
        with sam_at.perturbed(tiny_net(), rho):
            pass


# ---------------------------------------------------------------------------------------------------------------
# The three steps
# ---------------------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """A model whose cross-entropy at label 0 is exactly q = 1 + w'Aw/2: its logits are (0, log(e^q - 1))."""

    def __init__(self, A, w):
        super().__init__()
        self.A, self.w = A, nn.Parameter(w.clone())

    def forward(self, x):
        q = 1 + self.w @ self.A @ self.w / 2
        return torch.stack([torch.zeros_like(q), q.expm1().log()])[None]


@given(seeds, st.integers(1, 5), st.floats(0.01, 0.5), st.floats(0, 0.5))
def test_on_a_quadratic_the_sam_step_is_the_closed_form(seed, d, lr, rho):
    root = normal(d, d, seed=seed, dtype=torch.float64)
    A, w = root @ root.T + torch.eye(d), normal(d, seed=seed + 1, dtype=torch.float64)
    model = Quadratic(A, w)
    loss, logits = sam_at.sam_step(model, torch.zeros(1, 1), torch.tensor([0]), sgd(model, lr), rho)
    expected = w - lr * A @ (w + rho * A @ w / (A @ w).norm())
    assert torch.allclose(model.w, expected, rtol=1e-6)
    assert math.isclose(loss, 1 + w @ A @ w / 2, rel_tol=1e-9)


@given(seeds, st.floats(0.01, 0.5), st.sampled_from([0.0, 0.9]))
def test_sam_with_rho_zero_is_the_sgd_step(seed, lr, momentum):
    results = []
    for step in sam_at.sgd_step, partial(sam_at.sam_step, rho=0.0):
        model, (x, y) = tiny_net(seed), batch(6, seed=seed)
        optimizer = sgd(model, lr, momentum=momentum, weight_decay=5e-4)
        for _ in range(3):
            loss, logits = step(model, x, y, optimizer)
        results.append([loss, logits, *weights_of(model), *(b.clone() for b in model.buffers())])
    assert same_bits(*results)


@given(seeds, st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_the_sam_step_applies_the_gradient_at_the_perturbed_weights(seed, lr, rho):
    model, (x, y) = tiny_net(seed, dtype=torch.float64), batch(6, seed=seed, dtype=torch.float64)
    twin = tiny_net(seed, dtype=torch.float64)
    before = weights_of(model)
    F.cross_entropy(twin(x), y).backward()
    g = [w.grad.clone() for w in twin.parameters()]
    with torch.no_grad():
        for w, gi in zip(twin.parameters(), g):
            w += rho * gi / length(g)
    twin.zero_grad()
    F.cross_entropy(twin(x), y).backward()
    sam_at.sam_step(model, x, y, sgd(model, lr), rho)
    for w, b, t in zip(model.parameters(), before, twin.parameters()):
        assert torch.allclose(w, b - lr * t.grad, atol=1e-10)


@given(seeds, norms, st.floats(0.01, 0.2), st.integers(1, 5))
def test_the_at_step_is_the_sgd_step_on_attacked_images(seed, norm, eps, steps):
    results = []
    for attack_inside in True, False:
        model, (x, y) = tiny_net(seed), batch(6, seed=seed)
        torch.manual_seed(seed)
        if attack_inside:
            loss, logits = sam_at.at_step(model, x, y, sgd(model), eps, steps=steps, norm=norm)
        else:
            x_adv = sam_at.pgd(model, x, y, eps, steps=steps, norm=norm)
            loss, logits = sam_at.sgd_step(model, x_adv, y, sgd(model))
        results.append([loss, logits, *weights_of(model), *(b.clone() for b in model.buffers())])
    assert same_bits(*results)
    assert not results[0][0].equal(sam_at.backward(tiny_net(seed), x, y)[0])  # the attack did something


steps_of_each = st.sampled_from([
    sam_at.sgd_step, partial(sam_at.sam_step, rho=0.01), partial(sam_at.at_step, eps=0.001),
    partial(sam_at.sam_step, rho=0.01, ascend=sam_at.adaptive_ascent), partial(sam_at.esam_step, rho=0.01),
    partial(sam_at.at_step, eps=0.001, step=partial(sam_at.sam_step, rho=0.005, ascend=sam_at.layerwise_ascent))])


@given(seeds, steps_of_each)
def test_a_step_forgets_gradients_that_lay_around(seed, step):
    """An attack, or a caller, may leave gradients on the weights: no step may add them to its own."""
    results = []
    for junk in False, True:
        model, (x, y) = tiny_net(seed), batch(6, seed=seed)
        for w in model.parameters():
            w.grad = torch.randn_like(w) if junk else None
        torch.manual_seed(seed)
        step(model, x, y, sgd(model))
        results.append(weights_of(model))
    assert same_bits(*results)


@given(seeds, st.floats(0.01, 0.1))
def test_sam_on_an_attacked_batch_is_clean_of_the_attack(seed, eps):
    results = []
    for attack in True, False:
        model, (x, y) = tiny_net(seed), batch(6, seed=seed)
        torch.manual_seed(seed)
        x_adv = sam_at.pgd(model, x, y, eps)
        if not attack:
            model = tiny_net(seed)  # one that the attack never touched
        sam_at.sam_step(model, x_adv, y, sgd(model), 0.1)
        results.append(weights_of(model))
    assert same_bits(*results)


@given(seeds, steps_of_each)
def test_a_step_returns_loss_and_logits_detached_and_lowers_the_loss(seed, step):
    model, (x, y) = tiny_net(seed, dtype=torch.float64, batchnorm=False), batch(6, seed=seed, dtype=torch.float64)
    before = F.cross_entropy(model(x), y)
    loss, logits = step(model, x, y, sgd(model, 0.01))
    assert not loss.requires_grad and not logits.requires_grad and loss.shape == () and logits.shape == (6, 3)
    assert torch.allclose(loss, F.cross_entropy(logits, y))
    assert torch.allclose(loss, before, rtol=0.02)
    assert F.cross_entropy(model(x), y) < before


@given(seeds, steps_of_each)
def test_running_statistics_move_once_a_step(seed, step):
    model, (x, y) = tiny_net(seed), batch(6, seed=seed)
    mean = model.net[1].running_mean.clone()
    step(model, x, y, sgd(model))
    assert model.net[1].num_batches_tracked == 1 and not model.net[1].running_mean.equal(mean)
    assert model.training and model.net[1].track_running_stats


@given(seeds, st.integers(1, 8))
def test_duality_on_a_linear_score(seed, d):
    """(w + v).x = w.(x + (v.x) w/|w|^2): on a linear score, moving the weights is moving the input."""
    w, v, x = (normal(d, seed=seed + k, dtype=torch.float64) for k in range(3))
    assume(w.norm() > 1e-3)
    model = linear_net(w)
    model[1].weight.grad = torch.stack([torch.zeros_like(v), v])
    with sam_at.perturbed(model, float(v.norm())), torch.no_grad():
        moved_weights = model(x[None])[0, 1]
    moved_input = model((x + (v @ x) * w / w.norm() ** 2)[None])[0, 1]
    assert torch.allclose(moved_weights, moved_input, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------


def test_prn18_is_the_papers_network():
    model = sam_at.make_model("prn18", 10)
    assert sum(w.numel() for w in model.parameters()) == 11_172_170
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20 and sum(m.kernel_size == (1, 1) for m in convolutions) == 3
    assert not any(m.bias is not None for m in convolutions)
    assert [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1] == 512


NARROW = {"prn18": 4, "small": 4, "wrn28_10": 1, "deit_ti": 6}


def narrow(name, classes, *mean_std):
    model = sam_at.make_model(name, classes, *mean_std, width=NARROW[name])
    if name == "deit_ti":
        nn.init.normal_(model.net.heads.head.weight)  # it starts at zero, where nothing can be seen
    return model


@pytest.mark.parametrize("name, parameters", [("wrn28_10", 36_479_194), ("deit_ti", 5_392_714)])
def test_the_larger_networks_have_their_papers_size(name, parameters):
    """DeiT-Ti: 12 layers of 444,864, patches 2,496, class token 192, 257 positions 49,344, last norm 384, head 1,930."""
    with torch.device("meta"):
        model = sam_at.MODELS[name](10)
    assert sum(w.numel() for w in model.parameters()) == parameters


@settings(max_examples=8)
@given(st.sampled_from(list(sam_at.MODELS)), st.integers(2, 20), st.integers(1, 4), st.booleans())
def test_logits_have_one_column_a_class_for_any_batch(name, classes, n, training):
    model = narrow(name, classes).train(training)
    assert model(pixels(n, 3, 32, 32, seed=n)).shape == (n, classes)


@settings(max_examples=8)
@given(seeds, st.sampled_from(list(sam_at.MODELS)), st.integers(2, 5))
def test_in_eval_mode_an_images_logits_do_not_depend_on_its_batch(seed, name, n):
    torch.manual_seed(seed)
    model, x = narrow(name, 3).eval(), pixels(n, 3, 32, 32, seed=seed)
    with torch.no_grad():
        assert model(x).abs().sum() > 0 and torch.allclose(model(x), torch.cat([model(image[None]) for image in x]), atol=1e-4)


@given(seeds)
def test_normalisation_is_inside(seed):
    mean, std = pixels(3, seed=seed).tolist(), (0.1 + pixels(3, seed=seed + 1)).tolist()
    torch.manual_seed(seed)
    model, x = sam_at.make_model("small", 3, (mean, std), width=4).eval(), pixels(2, 3, 32, 32, seed=seed)
    normalised = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    with torch.no_grad():
        assert torch.allclose(model(x), model.net(normalised), atol=1e-4)
    assert torch.equal(sam_at.make_model("prn18", 10).mean.flatten(), torch.tensor([0.4914, 0.4822, 0.4465]))


def test_a_preactivation_block_is_its_formula():
    block = sam_at.PreActBlock(3, 5, 2).eval()
    x = normal(2, 3, 8, 8, seed=0)
    h = F.relu(block.bn1(x))
    out = F.conv2d(F.relu(block.bn2(F.conv2d(h, block.conv1.weight, stride=2, padding=1))), block.conv2.weight, padding=1)
    assert torch.allclose(block(x), out + F.conv2d(h, block.shortcut.weight, stride=2), atol=1e-5)
    same = sam_at.PreActBlock(3, 3, 1)
    nn.init.zeros_(same.conv2.weight)
    assert same.shortcut is None and same(x).equal(x)  # the identity path is untouched


class Strays(TorchDispatchMode):
    """Names the operations that give images or activations in another layout than channels_last."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **kwargs or {})
        self.names += [str(operation) for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.ndim == 4
                       and not t.is_contiguous(memory_format=torch.channels_last)]
        return out


@pytest.mark.parametrize("shape", [(4, 4, 1), (4, 8, 1), (4, 8, 2)])
def test_a_block_keeps_the_layout_that_convolutions_are_fastest_in_forward_and_backward(shape):
    block = sam_at.PreActBlock(*shape).to(memory_format=torch.channels_last)
    x = normal(2, 4, 8, 8, seed=0).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Strays() as strays:
        strays.names = []
        block(x).backward(torch.ones_like(block(x)))
        assert strays.names == []
        h = x[:, :, ::2, ::2]
        h.backward(torch.ones_like(h))
        assert strays.names  # slicing, the obvious way to halve an image, would not keep it


def test_make_model_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="prn18"):
        sam_at.make_model("resnet", 10)


# ---------------------------------------------------------------------------------------------------------------
# Data and recipe
# ---------------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 6), st.integers(5, 9), st.integers(5, 9), st.integers(0, 3))
def test_crop_and_flip_makes_crops_of_the_reflected_image(seed, n, h, w, pad):
    x = (pixels(n, 3, h, w, seed=seed) * 256).byte()
    torch.manual_seed(seed)
    out = sam_at.crop_and_flip(x, pad)
    assert out.shape == x.shape and out.dtype == torch.uint8
    padded = F.pad(x.float(), (pad,) * 4, mode="reflect").byte()
    for image, result in zip(padded, out):  # in place: the i-th result is a crop of the i-th image
        crops = [image[:, i:i + h, j:j + w] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
        assert any(result.equal(c) or result.equal(c.flip(2)) for c in crops)


def test_crop_and_flip_uses_every_crop_equally():
    """162 outcomes (81 shifts, mirrored or not), 20,000 draws: chi-squared with 161 degrees of freedom is below 240."""
    torch.manual_seed(0)
    image = torch.arange(3 * 11 * 11).view(1, 3, 11, 11)
    out = sam_at.crop_and_flip(image.expand(20_000, -1, -1, -1)).flatten(1)
    _, counts = out.unique(dim=0, return_counts=True)
    assert len(counts) == 162
    expected = 20_000 / 162
    assert ((counts - expected) ** 2 / expected).sum() < 240


def test_the_learning_rate_of_the_papers_recipe():
    optimizer, schedule = sam_at.make_optimizer(tiny_net(), 0.1, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1] * 75 + [0.01] * 15 + [0.001] * 10)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"], group["dampening"]) == (0.9, 5e-4, False, 0)


def test_adam_and_adamw_by_name():
    for name, kind, decay in ("adam", torch.optim.Adam, 5e-4), ("adamw", torch.optim.AdamW, 0.05):
        optimizer, _ = sam_at.make_optimizer(tiny_net(), 1e-3, 10, name)
        assert type(optimizer) is kind and optimizer.param_groups[0]["weight_decay"] == decay


@given(st.integers(1, 40), st.floats(1e-3, 1))
def test_the_learning_rate_of_any_number_of_epochs(epochs, lr):
    optimizer, schedule = sam_at.make_optimizer(nn.Linear(1, 1), lr, epochs)
    for done in range(epochs):
        drops = (done >= 0.75 * epochs) + (done >= 0.9 * epochs)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr * 0.1 ** drops)
        optimizer.step()
        schedule.step()


@settings(max_examples=5)
@given(seeds, st.floats(0.5, 0.7))
def test_the_demo_data_is_the_simplified_model(seed, p):
    """With the class means known: the coarse pattern names the class with probability p, the texture always."""
    data = sam_at.demo_data(3000, 300, p=p, seed=seed)
    assert data.x.dtype == torch.uint8 and data.x.shape == (3000, 3, 32, 32) and data.x_test.shape == (300, 3, 32, 32)
    assert set(data.y.tolist()) == set(range(10)) and data.y_test.dtype == torch.int64

    def coarse_and_fine(x):
        blocks = F.avg_pool2d(x, 4)
        return blocks.flatten(1), (x - F.interpolate(blocks, size=32, mode="bilinear")).flatten(1)

    means = torch.stack([sam_at.to_pixels(data.x[data.y == c]).mean(0) for c in range(10)])
    seen = coarse_and_fine(sam_at.to_pixels(data.x_test) - means.mean(0))
    known = coarse_and_fine(means - means.mean(0))
    by_coarse, by_fine = ((torch.cdist(a, b).argmin(1) == data.y_test).float().mean() for a, b in zip(seen, known))
    assert abs(by_coarse - p) < 0.1 and by_fine > 0.8
    assert 2 / 255 < coarse_and_fine(means)[1].abs().mean() < 4 / 255
    again = sam_at.demo_data(3000, 300, p=p, seed=seed)
    assert again.x.equal(data.x) and again.y.equal(data.y)


@given(seeds, st.integers(2, 9))
def test_statistics_are_those_of_the_pixels(seed, n):
    x = (pixels(n, 3, 6, 5, seed=seed) * 256).byte()
    mean, std = sam_at.mean_std_of(x)
    flat = (x.double() / 255).permute(1, 0, 2, 3).flatten(1)
    assert torch.allclose(torch.tensor(mean).double(), flat.mean(1), atol=1e-5)
    assert torch.allclose(torch.tensor(std).double(), flat.std(1), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------


def tiny_data(n=24, classes=3, seed=0, size=8):
    x, y = (pixels(n, 3, size, size, seed=seed) * 256).byte(), torch.arange(n) % classes
    return sam_at.Data(x, y, x, y, classes, sam_at.mean_std_of(x), False, "noise")


@pytest.mark.parametrize("step", [sam_at.sgd_step, partial(sam_at.sam_step, rho=0.02), partial(sam_at.at_step, eps=0.002)])
def test_every_method_learns_a_tiny_set_by_heart(step):
    torch.manual_seed(0)
    data = tiny_data(24, size=32)
    model = sam_at.make_model("small", 3, data.mean_std, width=8)
    rows = list(sam_at.train(model, data, step, *sam_at.make_optimizer(model, 0.05, 25), epochs=25, batch_size=8))
    assert [r["epoch"] for r in rows] == list(range(1, 26)) and rows[-1]["accuracy"] == 100
    assert rows[-1]["loss"] < rows[0]["loss"] / 5
    assert sam_at.evaluate(model, (data.x, data.y), ())["clean"] == 100


@settings(max_examples=6)
@given(seeds, st.integers(1, 30), st.integers(1, 9))
def test_an_epoch_meets_every_image_once_and_averages_over_all(seed, n, batch_size):
    torch.manual_seed(seed)
    data, met = tiny_data(n, seed=seed), []

    def step(model, x, y, optimizer):
        met.extend(x)
        assert len(x) <= batch_size and x.dtype == torch.float32
        optimizer.step()
        return torch.tensor(float(len(y))), F.one_hot(torch.zeros_like(y), 3).float()

    row, = sam_at.train(tiny_net(), data, step, *sam_at.make_optimizer(tiny_net(), 0.1, 1), epochs=1, batch_size=batch_size)
    key = sorted(tuple(image.flatten().tolist()) for image in met)
    assert key == sorted(tuple(image.flatten().tolist()) for image in sam_at.to_pixels(data.x))
    sizes = [min(batch_size, n - i) for i in range(0, n, batch_size)]
    assert row["loss"] == pytest.approx(sum(s * s for s in sizes) / n)
    assert row["accuracy"] == pytest.approx(100 * int((data.y == 0).sum()) / n)


@settings(max_examples=6)
@given(seeds, steps_of_each, st.booleans())
def test_same_seed_same_weights(seed, step, augment):
    results = []
    for s in seed, seed, seed + 1:
        torch.manual_seed(s)
        model = tiny_net(0)
        torch.manual_seed(s)
        list(sam_at.train(model, tiny_data()._replace(augment=augment), step, *sam_at.make_optimizer(model, 0.1, 2),
                          epochs=2, batch_size=7))
        results.append(weights_of(model))
    assert same_bits(results[0], results[1]) and not same_bits(results[0], results[2])


@pytest.mark.parametrize("lr", [1e20, math.inf])
def test_divergence_names_the_epoch(lr):
    with pytest.raises(sam_at.Diverged, match="epoch 1"):
        model = tiny_net()
        list(sam_at.train(model, tiny_data(), sam_at.sgd_step, *sam_at.make_optimizer(model, lr, 3), epochs=3, batch_size=8))


# ---------------------------------------------------------------------------------------------------------------
# Speed: what each choice must not change
# ---------------------------------------------------------------------------------------------------------------


@given(seeds, steps_of_each)
def test_bf16_is_for_training_alone_and_weights_stay_float32(seed, step):
    model, twin, (x, y) = tiny_net(seed), tiny_net(seed), batch(6, seed=seed)
    model.bf16 = True
    model.eval(), twin.eval()
    assert model(x).equal(twin(x)) and sam_at.pgd(model, x, y, 0.1, random_start=False).equal(
        sam_at.pgd(twin, x, y, 0.1, random_start=False))
    model.train(), twin.train()
    assert not model(x).equal(twin(x)) and torch.allclose(model(x), twin(x), atol=0.05)
    losses = [step(m, x, y, sgd(m))[0] for m in (model, twin)]
    assert losses[0].dtype == torch.float32 and torch.allclose(*losses, atol=0.02)
    assert all(w.dtype == torch.float32 and w.grad.dtype == torch.float32 for w in model.parameters())


@given(seeds, st.floats(0.1, 0.5))
def test_in_bf16_the_second_sam_pass_sees_the_perturbed_weights(seed, rho):
    """Autocast keeps casts of the weights while it lasts: one that spanned both passes would turn SAM into SGD."""
    model, twin, (x, y) = tiny_net(seed), tiny_net(seed), batch(6, seed=seed)
    model.bf16 = twin.bf16 = True
    sam_at.backward(twin, x, y)
    with sam_at.perturbed(twin, rho), torch.autocast("cpu", enabled=False):
        moved = [w.detach().clone() for w in twin.parameters()]
    twin.load_state_dict(dict(zip(dict(twin.named_parameters()), moved)), strict=False)
    sam_at.backward(twin, x, y)
    sam_at.sam_step(model, x, y, sgd(model), rho)
    assert all(a.grad.equal(b.grad) for a, b in zip(model.parameters(), twin.parameters()))


class Watch(TorchDispatchMode):
    """Counts the operations that make the host wait for the device, and the bytes of new tensors."""

    def __init__(self):
        super().__init__()
        self.waits = self.new_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.waits += function.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "masked_select")
        if not function._schema.is_mutable and not function.is_view:
            self.new_bytes += sum(t.nbytes for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        return out


@settings(max_examples=5)
@given(steps_of_each, st.booleans())
def test_an_epoch_waits_for_the_device_only_at_its_end(step, augment):
    waits = []
    for batch_size in 24, 4:
        model, data = tiny_net(), tiny_data()._replace(augment=augment)
        with Watch() as watch:
            list(sam_at.train(model, data, step, *sam_at.make_optimizer(model, 0.1, 1), epochs=1, batch_size=batch_size))
        waits.append(watch.waits)
    assert waits[0] == waits[1]


def test_sam_keeps_one_extra_copy_of_the_weights():
    model, (x, y) = tiny_net(), batch(6)
    sam_at.backward(model, x, y)
    with Watch() as watch, sam_at.perturbed(model, 0.1):
        pass
    copy = sum(w.nbytes for w in model.parameters())
    assert copy <= watch.new_bytes < 1.1 * copy  # and the norms, a number for each weight


@given(seeds, st.integers(1, 4))
def test_the_cost_of_a_step_in_passes(seed, steps):
    """SGD 3 F less the first layer's input gradient; SAM twice that; AT-K 2 K F more."""
    model, (x, y) = tiny_net(seed), batch(4, seed=seed)

    def flops(call, *args, **kwargs):
        with FlopCounterMode(display=False) as counter:
            call(*args, **kwargs)
        return counter.get_total_flops()

    forward, first = flops(model, x), flops(model.net[0], x)
    one = flops(sam_at.sgd_step, model, x, y, sgd(model))
    assert one == 3 * forward - first
    assert flops(sam_at.sam_step, model, x, y, sgd(model), 0.1) == 2 * one
    assert flops(sam_at.at_step, model, x, y, sgd(model), 0.1, steps=steps) == one + 2 * steps * forward


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_training_is_the_same_up_to_rounding():
    results = []
    for compiled in False, True:
        model, (x, y) = tiny_net(), batch(6)
        fast, optimizer = torch.compile(model, dynamic=False) if compiled else model, sgd(model)
        torch.manual_seed(0)
        for step in sam_at.sgd_step, partial(sam_at.sam_step, rho=0.5), partial(sam_at.at_step, eps=0.1, norm="l2"):
            step(fast, x, y, optimizer)
        results.append(list(model.state_dict().values()))
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_only_where_triton_can_build_is_compiling_the_default(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    for include, compiler, can in (tmp_path, "/bin/gcc", True), (tmp_path, None, False), (tmp_path / "no", "/bin/gcc", False):
        monkeypatch.setattr("sysconfig.get_path", lambda name, include=include: str(include))
        monkeypatch.setattr("shutil.which", lambda name, compiler=compiler: compiler)
        assert sam_at.can_compile() is can
    monkeypatch.setenv("CC", "mycc")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert sam_at.can_compile()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_new_pages():
    faults = [int(subprocess.check_output([sys.executable, "-c", f"""
import resource, torch, sam_at
{call}
def count():
    return [torch.ones(2 ** 23) for _ in range(2)] and resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = [count() for _ in range(5)][-1]
print([count() for _ in range(9)][-1] - first)"""], cwd=HERE)) for call in ("pass", "sam_at.keep_freed_memory()")]
    assert faults[1] * 3 < faults[0]


def test_esam_is_never_compiled():
    s = argparse.Namespace(compile=True)
    assert [method for method in sam_at.METHODS if not sam_at.compiles(method, s)] == ["esam"]


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory"), True), (MemoryError(), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_only_a_lack_of_memory_is_called_one(monkeypatch, error, line):
    def fail(s):
        raise error

    monkeypatch.setattr(sam_at, "run_training", fail)
    if not line:
        with pytest.raises(RuntimeError, match="illegal"):
            cli("--preset", "demo")
    else:
        code, _, err = cli("--preset", "demo")
        assert code == 2 and err.count("\n") == 1 and "--batch-size" in err


def test_the_benchmark_prints_what_it_writes(tmp_path):
    code, out, err = cli("--preset", "demo", "--benchmark", "--batch-size", 16, "--attack-steps", 2, "--json", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())
    assert code == 0 and err == "" and [r["method"] for r in rows] == ["sgd", "sam", "at"]
    for row in rows:
        assert list(row) == ["method", "step_s", "images_per_s", "ratio_to_sgd", "peak_mb", "share_of_matmul_rate"]
        assert row["images_per_s"] == pytest.approx(16 / row["step_s"]) and row["peak_mb"] > 1
        assert 0 < row["share_of_matmul_rate"] < 1.5
        assert row["ratio_to_sgd"] == pytest.approx(row["step_s"] / rows[0]["step_s"])
        assert re.search(rf"^{row['method']} +\d+ F .*{row['images_per_s']:.0f}", out, re.M)


# ---------------------------------------------------------------------------------------------------------------
# Why it works: the simplified model, and the duality measured
# ---------------------------------------------------------------------------------------------------------------

models = {"p": st.floats(0.6, 0.97), "eta": st.floats(0.2, 0.8), "n": st.integers(5, 40)}


def root(f, low, high):
    """Where a function that falls crosses zero."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return low


def sam_optimum(p, eta, n, rho):
    """A(w - rho) = A(w + rho), by bisection: an independent way to the maximiser of the smaller one."""
    A = partial(sam_at.simple_accuracy, p=p, eta=eta, n=n)
    return root(lambda w: A(w + rho) - A(w - rho), 0, 100)


@given(**models, w=st.floats(-5, 10))
def test_the_accuracy_of_the_simplified_model_is_that_of_its_samples(p, eta, n, w):
    rng = torch.Generator().manual_seed(n)
    robust = torch.where(torch.rand(40_000, generator=rng) < p, 1.0, -1.0)  # y = 1
    score = w * robust + eta * n + math.sqrt(n) * torch.randn(40_000, generator=rng)
    accuracy = sam_at.simple_accuracy(w, p, eta, n)
    assert abs(float((score > 0).float().mean()) - accuracy) <= 5 * math.sqrt(accuracy * (1 - accuracy) / 40_000) + 1e-4


@given(**models, eps=st.floats(0, 0.15), rho=st.floats(0.1, 2))
def test_the_closed_forms_maximise_what_they_claim_to(p, eta, n, eps, rho):
    """Nowhere on a fine grid is there more, up to the flatness of the top; the grid's best is next to the optimum."""
    A = partial(sam_at.simple_accuracy, p=p, n=n)
    for gain, best in (partial(A, eta=eta), sam_at.w_standard(p, eta)), (
            partial(A, eta=eta - eps), sam_at.w_standard(p, eta - eps)), (
            lambda w: min(A(w - rho, eta=eta), A(w + rho, eta=eta)), sam_optimum(p, eta, n, rho)):
        grid = [k * 4 * best / 4000 for k in range(4001)]
        top = max(grid, key=gain)
        assert gain(best) >= gain(top) - 1e-12
        assert abs(top - best) < 0.02 * best or gain(top) - gain(best) < 1e-12
        assert sam_at.maximiser(gain, 0, 4 * best) == pytest.approx(best, rel=0.01, abs=1e-3) or (
            gain(best) - gain(sam_at.maximiser(gain, 0, 4 * best)) < 1e-12)


@given(**models, a=st.floats(0.01, 0.9), b=st.floats(0.01, 0.9))
def test_at_and_sam_lean_on_the_robust_feature_the_more_the_larger_their_radius(p, eta, n, a, b):
    assume(abs(a - b) > 0.05)
    a, b = min(a, b), max(a, b)
    st_ = sam_at.w_standard(p, eta)
    assert st_ < sam_at.w_standard(p, eta - a * eta) < sam_at.w_standard(p, eta - b * eta)
    assert st_ < sam_at.w_sam(p, eta, n, a) < sam_at.w_sam(p, eta, n, b)
    rho = math.sqrt(n) / 2
    if eta * math.sqrt(n) < 3:  # beyond it A is flat to the last bit, and there is no optimum to find
        assert st_ < sam_optimum(p, eta, n, a * rho) < sam_optimum(p, eta, n, b * rho)


@settings(max_examples=60)
@given(p=st.floats(0.6, 0.9), eta=st.floats(0.3, 0.6), n=st.integers(4, 12))
def test_the_expansions_are_right_to_their_order(p, eta, n):
    """Halving the radius divides what is left by 2^4 (SAM, fourth order) and 2^2 (AT, second order)."""
    rho, eps = 0.5 * math.sqrt(n), 0.02 * eta
    st_ = sam_at.w_standard(p, eta)
    left = [sam_optimum(p, eta, n, r) - sam_at.w_sam(p, eta, n, r) for r in (rho, rho / 2)]
    assert abs(left[0]) < 0.1 * st_ * (rho ** 2 / n) ** 2
    if abs(left[1]) > 0.02 * st_ * (rho ** 2 / 4 / n) ** 2:  # else the fourth order vanishes, too
        assert 13 < left[0] / left[1] < 18
    left = [sam_at.w_standard(p, eta - e) - st_ * (1 + e / eta) for e in (eps, eps / 2)]
    assert left[0] / left[1] == pytest.approx(4, rel=0.05)


@given(**models, rho=st.floats(0.1, 1))
def test_sam_and_at_agree_at_the_radius_of_the_rule(p, eta, n, rho):
    """eta/eps = 1 + 3n/rho^2: the same optimum, and eps is of second order in rho."""
    eps = sam_at.eps_like(rho, eta, n)
    assert eta / eps == pytest.approx(1 + 3 * n / rho ** 2) and eps < eta
    assert sam_at.w_standard(p, eta - eps) == pytest.approx(sam_at.w_sam(p, eta, n, rho), rel=1e-9)


@given(seeds, st.floats(0.3, 3), st.floats(0.2, 0.6))
def test_one_weight_is_the_simplified_model_as_a_network(seed, w, eta):
    """Its cross-entropy is 1 + the share of errors, its worst end the larger loss, and PGD moves all but x_1."""
    n = 6
    model, x = sam_at.OneWeight(n), eta + math.sqrt(0.5) * normal(4000, n + 1, seed=seed)
    x[:, 0] = torch.where(torch.arange(4000) % 10 > 0, 1.0, -1.0)
    x, y = x / 40 + 0.5, torch.zeros(4000, dtype=torch.int64)
    model.w.data.fill_(w)
    loss = float(F.cross_entropy(model(x), y).detach())
    assert loss == pytest.approx(2 - sam_at.simple_accuracy(w, 0.9, eta, n), abs=0.03)
    delta = sam_at.pgd(model, x, y, 0.1 / 40, steps=10, random_start=False) - x
    assert not delta[:, 0].any() and torch.allclose(delta[:, 1:], torch.full((), -0.1 / 40), atol=1e-6)
    sam_at.backward(model, x, y)
    with sam_at.perturbed(model, 1.0, model.worst(x, y)), torch.no_grad():
        worst = float(F.cross_entropy(model(x), y))
        assert abs(abs(float(model.w) - w) - 1) < 1e-5
    losses = []
    for end in w - 1, w + 1:
        model.w.data.fill_(end)
        losses.append(float(F.cross_entropy(model(x), y).detach()))
    assert worst == pytest.approx(max(losses), abs=1e-6)


def test_theory_prints_and_draws_what_it_says():
    start = time.time()
    code, out, err = cli("--theory", "--json", "t.json")
    seconds, rows = time.time() - start, json.loads(Path("t.json").read_text())
    assert code == 0 and err == "" and seconds < 120
    assert all(list(r) == ["training", "radius", "closed_form", "numerical", "trained"] for r in rows)
    for r in rows:
        assert r["numerical"] == pytest.approx(r["closed_form"], rel=0.005)
        assert r["trained"] == pytest.approx(r["numerical"], rel=0.03)
        assert re.search(rf"^{re.escape(r['training'])} +{r['radius']:.3f} +{r['closed_form']:.3f} .*{r['trained']:.3f}$", out, re.M)
    assert [r["training"] for r in rows] == ["sgd", *["at"] * 3, *["sam (worst)"] * 3, "sam", "sam, batches of 8"]
    trained = [r["trained"] for r in rows]
    assert trained[0] < trained[1] < trained[2] < trained[3] and trained[0] < trained[4] < trained[5] < trained[6]
    assert Path("results/theory.png").exists() == ("results/theory.png" in out)


@given(seeds, st.floats(0.01, 0.5), st.floats(0.001, 0.05), norms)
def test_loss_rises_are_those_of_the_worst_and_of_random_moves(seed, rho, eps, norm):
    model, (x, y) = tiny_net(seed, dtype=torch.float64).eval(), batch(9, seed=seed, dtype=torch.float64)
    before = weights_of(model)
    torch.manual_seed(seed)
    ascent, random = sam_at.rise_in_weights(model, x, y, rho)
    attacked, noise = sam_at.rise_in_inputs(model, x, y, eps, norm)
    assert same_bits(before, weights_of(model)) and all(w.grad is None for w in model.parameters())
    twin = tiny_net(seed, dtype=torch.float64).eval()
    base, _ = sam_at.backward(twin, x, y)
    g = [w.grad.clone() for w in twin.parameters()]
    with torch.no_grad():
        for w, gi in zip(twin.parameters(), g):
            w += rho * gi / length(g)
        assert ascent == pytest.approx(float(F.cross_entropy(twin(x), y) - base), rel=1e-5, abs=1e-9)
    assert attacked >= noise - 1e-6 and attacked > 0
    if rho < 0.05:
        assert ascent >= random - 1e-6  # no direction is worse to first order


@given(seeds, st.floats(0.01, 0.3), st.floats(0.001, 0.05))
def test_feature_shifts_by_layer(seed, rho, eps):
    """Without a move there is no shift; the first layer's, a convolution, can be had by hand."""
    model, (x, y) = tiny_net(seed).eval(), batch(5, seed=seed)
    rows = sam_at.feature_shifts(model, x, y, rho, eps, "linf")
    assert [r["layer"].split()[1] for r in rows] == [type(layer).__name__ for layer in model.net]
    assert all(r["weights"] > 0 and r["inputs"] > 0 for r in rows)
    assert all(r["weights"] == 0 for r in sam_at.feature_shifts(model, x, y, 0.0, eps, "linf"))
    sam_at.backward(model, x, y)
    normalised = (x - model.mean) / model.std
    with torch.no_grad():
        h = model.net[0](normalised)
        with sam_at.perturbed(model, rho):
            moved = model.net[0](normalised)
    by_hand = ((moved - h).flatten(1).norm(dim=1) / h.flatten(1).norm(dim=1)).mean()
    assert rows[0]["weights"] == pytest.approx(float(by_hand), rel=1e-3)


def test_sharpness_of_saved_models(tiny_demo):
    for method in "sgd", "sam":
        cli(*RUN, "--method", method)
    checkpoints = sorted(Path("runs").glob("*/checkpoint.pt"))
    code, out, err = cli("--sharpness", *checkpoints, "--json", "s.json", "--norm", "l2")
    rows = json.loads(Path("s.json").read_text())
    assert code == 0 and err == "" and {r["model"] for r in rows} == {"sgd", "sam rho 0.2"}
    for r in rows:
        assert f"{r['weights'][0][0]:.2f} ({r['weights'][0][1]:.2f})" in out and len(r["inputs"]) == len(r["weights"]) == 4
        rises = [a for a, _ in r["inputs"]]
        assert rises == sorted(rises)
    assert Path("results/sharpness.png").exists() == ("results/sharpness.png" in out)
    code, _, err = cli("--sharpness", checkpoints[0], "no.pt")
    assert code == 2 and err.count("\n") == 1 and "no.pt" in err


def test_without_matplotlib_tables_come_without_pictures(tiny_demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli(*RUN)
    code, out, err = cli("--sharpness", only_run() / "checkpoint.pt")
    assert code == 0 and err == "" and "pip install matplotlib" in out and not Path("results").exists()


# ---------------------------------------------------------------------------------------------------------------
# Variants
# ---------------------------------------------------------------------------------------------------------------


def ascended(model, rho, ascend):
    """w + v - w, weight by weight."""
    before = weights_of(model)
    with sam_at.perturbed(model, rho, ascend):
        return [w.detach() - b for w, b in zip(model.parameters(), before)]


@given(seeds, st.floats(0.01, 1), st.floats(0.05, 20))
def test_asam_does_not_see_a_rescaling_that_leaves_the_function(seed, rho, scale):
    """relu(x W1' s) W2'/s is the same function for every s > 0: ASAM's v is rescaled with the weights, SAM's is not."""
    x, y = batch(6, seed=seed, dtype=torch.float64)
    ascents, losses = [], []
    for s in 1.0, scale:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False)).double()
        with torch.no_grad():
            model[1].weight *= s
            model[3].weight /= s
        sam_at.backward(model, x, y)
        v = ascended(model, rho, partial(sam_at.adaptive_ascent, eta=0.0))
        ascents.append([v[0] / s, v[1] * s])
        with sam_at.perturbed(model, rho, partial(sam_at.adaptive_ascent, eta=0.0)), torch.no_grad():
            losses.append(F.cross_entropy(model(x), y))
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(*ascents))
    assert torch.allclose(*losses, rtol=1e-8)


@given(seeds, st.floats(0.01, 5), st.floats(0, 0.1))
def test_asams_ascent_is_its_formula(seed, rho, eta):
    """On the ellipsoid |v/T|_2 = rho, and the highest point of it to first order: v/T is parallel to T g."""
    model = tiny_net(seed, dtype=torch.float64)
    sam_at.backward(model, *batch(6, seed=seed, dtype=torch.float64))
    T = [w.detach().abs() + eta if w.ndim > 1 else torch.ones_like(w) for w in model.parameters()]
    v = ascended(model, rho, partial(sam_at.adaptive_ascent, eta=eta))
    Tg = [t * w.grad for t, w in zip(T, model.parameters())]
    assert math.isclose(length(a / t for a, t in zip(v, T)), rho, rel_tol=1e-5)
    for a, t, tg in zip(v, T, Tg):
        assert torch.allclose(a, t * tg * rho / length(Tg), rtol=1e-5, atol=1e-9 * rho)


@given(seeds, st.floats(0.001, 0.5))
def test_awp_moves_each_layer_by_gamma_times_its_norm_along_its_gradient(seed, gamma):
    model = tiny_net(seed, dtype=torch.float64)
    sam_at.backward(model, *batch(6, seed=seed, dtype=torch.float64))
    for w, v in zip(model.parameters(), ascended(model, gamma, sam_at.layerwise_ascent)):
        if w.ndim > 1:
            assert math.isclose(v.norm().item(), gamma * w.norm().item(), rel_tol=1e-6)
            assert math.isclose((v * w.grad).sum(), v.norm() * w.grad.norm(), rel_tol=1e-6)
        else:
            assert not v.any()


@given(seeds, st.floats(0, 0.5), st.sampled_from([0.0, 0.9]))
def test_esam_at_beta_and_gamma_one_is_sam(seed, rho, momentum):
    results = []
    for step in sam_at.sam_step, partial(sam_at.esam_step, beta=1.0, gamma=1.0):
        model, (x, y) = tiny_net(seed), batch(6, seed=seed)
        optimizer = sgd(model, momentum=momentum)
        for _ in range(2):
            loss, logits = step(model, x, y, optimizer, rho)
        results.append([loss, logits, *weights_of(model), *(b.clone() for b in model.buffers())])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


@given(seeds, st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 9), st.floats(0.01, 0.3))
def test_esam_moves_some_weights_and_descends_on_the_images_that_suffer(seed, beta, gamma, n, rho):
    model, (x, y) = tiny_net(seed, batchnorm=False, dtype=torch.float64), batch(n, seed=seed, dtype=torch.float64)
    before, passes, moved = weights_of(model), [], None

    def watch(module, arguments):
        nonlocal moved
        passes.append((arguments[0], torch.is_grad_enabled(), [w.requires_grad for w in model.parameters()]))
        if len(passes) == 2:
            moved = [w.detach() - b for w, b in zip(model.parameters(), before)]

    model.register_forward_pre_hook(watch)
    torch.manual_seed(seed)
    loss, logits = sam_at.esam_step(model, x, y, sgd(model), rho, beta=beta, gamma=gamma)
    (first, _, chosen), (second, with_gradient, _), (third, _, every) = passes
    assert first.equal(x) and second.equal(x) and not with_gradient and all(every) and any(chosen)
    assert all(bool(v.any()) <= c for v, c in zip(moved, chosen))  # the others rest
    assert math.isclose(length(moved), rho / beta, rel_tol=1e-6)
    passes.clear()
    twin = tiny_net(seed, batchnorm=False, dtype=torch.float64)
    with torch.no_grad():
        old = F.cross_entropy(twin(x), y, reduction="none")
        for w, v in zip(twin.parameters(), moved):
            w += v
        rise = F.cross_entropy(twin(x), y, reduction="none") - old
    k = math.ceil(gamma * n)
    assert len(third) == k
    kept = torch.tensor([any(image.equal(t) for t in third) for image in x])
    assert kept.sum() == k and (k == n or rise[kept].min() >= rise[~kept].max() - 1e-12)


def test_esam_lets_each_weight_ascend_with_probability_beta():
    torch.manual_seed(0)
    model, (x, y), counts = tiny_net(), batch(3), torch.zeros(6)
    model.register_forward_pre_hook(lambda *_: seen.append([w.requires_grad for w in model.parameters()]))
    for _ in range(400):
        seen = []
        sam_at.esam_step(model, x, y, sgd(model, 0.0), 0.01, beta=0.3)
        counts += torch.tensor(seen[0])
    share = 0.3 + 0.7 ** 6 / 6  # where none of the six is drawn, one of them is taken
    assert ((counts / 400 - share).abs() < 4 * math.sqrt(share * (1 - share) / 400)).all()


@given(seeds, st.floats(0.01, 0.1), st.floats(0.01, 0.3))
def test_sam_and_at_together_contain_both(seed, eps, rho):
    def after(step):
        model, (x, y) = tiny_net(seed), batch(6, seed=seed)
        torch.manual_seed(seed)
        return [*step(model, x, y, sgd(model)), *weights_of(model)]

    both = partial(sam_at.at_step, eps=eps, step=partial(sam_at.sam_step, rho=rho))
    assert same_bits(after(partial(both, eps=0.0)), after(partial(sam_at.sam_step, rho=rho)))
    assert same_bits(after(partial(both, step=partial(sam_at.sam_step, rho=0.0))), after(partial(sam_at.at_step, eps=eps)))
    assert not same_bits(after(both), after(partial(sam_at.sam_step, rho=rho)))


@given(seeds, st.integers(1, 3))
def test_the_batchnorm_flag_moves_the_statistics_in_every_pass(seed, steps):
    for always in False, True:
        model, (x, y) = tiny_net(seed), batch(6, seed=seed)
        model.always_track = always
        sam_at.at_step(model, x, y, sgd(model), 0.1, steps=steps, step=partial(sam_at.sam_step, rho=0.1))
        assert model.net[1].num_batches_tracked == (steps + 2 if always else 1)


@given(seeds, st.integers(2, 6))
def test_the_margin_is_positive_exactly_where_the_model_is_fooled(seed, classes):
    logits, y = normal(9, classes, seed=seed, dtype=torch.float64), torch.arange(9) % classes
    each = torch.stack([sam_at.margin(z[None], label[None]) for z, label in zip(logits, y)])
    assert torch.allclose(each.sum(), sam_at.margin(logits, y))
    assert (each > 0).equal(logits.argmax(1) != y)
    for z, label, m in zip(logits, y, each):
        assert math.isclose(m, max(v for j, v in enumerate(z) if j != label) - z[label])


def test_the_margin_attacks_where_cross_entropy_has_no_gradient():
    """Logits of some hundreds: the softmax is exactly one, its gradient zero, and the margin's is not."""
    x, y = 0.5 + 0.002 * normal(40, 3, 2, 2, seed=0), torch.zeros(40, dtype=torch.int64)
    model = Scored(lambda x: 1e5 * (x.mean(1) - 0.48))
    result = sam_at.evaluate(model, (x, y), ["linf 8/255", "linf 8/255 margin"])
    assert result["clean"] == result["robust"]["linf 8/255"] == 100 and result["robust"]["linf 8/255 margin"] == 0


@settings(max_examples=5)
@given(seeds, norms)
def test_pgd_is_as_strong_as_torchattacks_pgd(seed, norm):
    torchattacks = pytest.importorskip("torchattacks")
    model, x = tiny_net(seed).eval(), 0.5 + 0.1 * normal(300, 3, 8, 8, seed=seed).clamp(-3, 3)
    y, eps = model(x).argmax(1), {"linf": 0.02, "l2": 0.2}[norm]
    attack = (torchattacks.PGD if norm == "linf" else torchattacks.PGDL2)(model, eps=eps, alpha=eps / 4, steps=10)
    theirs = 100 * float((model(attack(x, y)).argmax(1) == y).float().mean())
    ours = sam_at.evaluate(model, (x, y), [f"{norm} {eps}"])["robust"][f"{norm} {eps}"]
    assert abs(ours - theirs) <= 2 * math.sqrt(max(theirs * (100 - theirs), 100) / 300)


@settings(max_examples=3)
@given(seeds, norms)
def test_autoattack_is_never_above_pgd(seed, norm):
    pytest.importorskip("torchattacks")
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 5))
    x, eps = pixels(60, 3, 4, 4, seed=seed), {"linf": 0.03, "l2": 0.12}[norm]
    names = f"{norm} {eps}", f"autoattack {norm} {eps}"
    robust = sam_at.evaluate(model, (x, model(x).argmax(1)), names)["robust"]
    assert robust[names[1]] <= robust[names[0]] + 100 / 60 and robust[names[0]] < 100


def test_autoattack_takes_its_authors_hundred_steps(monkeypatch):
    """torchattacks takes ten."""
    torchattacks, steps = pytest.importorskip("torchattacks"), {}
    for name in "APGD", "APGDT", "FAB":
        monkeypatch.setattr(getattr(torchattacks, name), "forward",
                            lambda self, x, y: steps.update({type(self).__name__: self.steps}) or x)
    x = pixels(3, 3, 4, 4, seed=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    sam_at.outside(model, x, model(x).argmax(1), attack="AutoAttack", norm="linf", eps=1e-4)
    assert steps == {"APGD": 100, "APGDT": 100, "FAB": 100}


@pytest.mark.parametrize("name", ["cw", "apgdt 0.3", "fab linf 0.3", "square 0.3", "pixle", "autoattack 0.3",
                                  "torchattacks:PGDL2 2/255", "torchattacks:FGSM 0.3"])
def test_outside_attacks_run_by_name_on_our_networks(name):
    """PGDL2 fails on channels_last tensors; pixle needs real image sizes; a model in training mode is put back so."""
    pytest.importorskip("torchattacks")
    torch.manual_seed(0)
    model, x = sam_at.make_model("small", 10, width=4), pixels(6, 3, 32, 32, seed=0)
    x, state = x.contiguous(memory_format=torch.channels_last), {k: v.clone() for k, v in model.state_dict().items()}
    y, rng = model.eval()(x).argmax(1), torch.get_rng_state()
    model.train()
    first, again = (sam_at.evaluate(model, (x, y), [name], batch_size=4)["robust"][name] for _ in range(2))
    assert 0 <= first <= 100 and (first == again or name == "pixle")  # pixle draws from numpy
    assert first < 100 or "0.3" not in name
    assert model.training and all(v.equal(state[k]) for k, v in model.state_dict().items())
    assert torch.get_rng_state().equal(rng) and all(w.requires_grad for w in model.parameters())


class Cheat:
    """An attack that ignores the rules: it leaves the ball and the image."""

    def __init__(self, model, norm="Linf", eps=0.1):
        self.eps = eps

    def __call__(self, x, y):
        return x + 100 * self.eps


def test_an_outside_attack_cannot_leave_the_ball(monkeypatch):
    monkeypatch.setattr(sam_at, "outside_class", lambda name: Cheat)
    x = torch.full((5, 3, 2, 2), 0.5)
    for bound, stands in (0.61, 5), (0.59, 0):
        model = Scored(lambda x, bound=bound: bound - x.amax(1))
        standing = sam_at.outside(model, x, torch.zeros(5, dtype=torch.int64), attack="Cheat", norm="linf", eps=0.1)
        assert len(standing) == stands


def test_an_outside_attack_that_fails_is_one_line(monkeypatch, tiny_demo):
    def broken(model):
        raise RuntimeError("no\nway")

    monkeypatch.setattr(sam_at, "outside_class", lambda name: broken)
    code, _, err = cli(*RUN[:RUN.index("--attacks")], "--attacks", "cw")
    assert code == 2 and err.count("\n") == 1 and "no" in err


def test_without_torchattacks_its_attacks_name_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    for name in "autoattack", "torchattacks:BIM":
        code, _, err = cli("--preset", "demo", "--attacks", name)
        assert code == 2 and "pip install torchattacks" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["cw l2 0.1", "pixle 0.1", "autoattack 8", "square 0.1 0.2", "torchattacks:Nothing",
                                  "torchattacks:", "torchattacks:PGD l2 0.1", "linf 0.1 dlr", "fgsm 0.1 margin"])
def test_attack_names_that_make_no_sense_are_refused(name):
    pytest.importorskip("torchattacks")
    code, _, err = cli("--preset", "demo", "--attacks", name)
    assert code == 2 and err.count("\n") == 1


def corruptions(root, n, seed=0):
    import numpy
    rng = numpy.random.default_rng(seed)
    root.mkdir()
    numpy.save(root / "labels.npy", numpy.tile(rng.integers(0, 3, n), 5).astype("uint8"))
    for name in "fog", "gaussian_noise":
        numpy.save(root / f"{name}.npy", rng.integers(0, 256, (5 * n, 32, 32, 3)).astype("uint8"))
    return root


def test_corruptions_are_read_by_severity(tmp_path, tiny_demo):
    import numpy
    cli(*RUN)
    root, checkpoint = corruptions(tmp_path / "c", 12), only_run() / "checkpoint.pt"
    code, out, err = cli("--eval", checkpoint, "--corruptions", root, "--json", "c.json")
    assert code == 0 and err == ""
    _, model = sam_at.load_model(checkpoint, None, "cpu")
    for row, name in zip(json.loads(Path("c.json").read_text()), ("fog", "gaussian_noise"), strict=True):
        x = torch.from_numpy(numpy.load(root / f"{name}.npy")).permute(0, 3, 1, 2) / 255
        right = (model(x).argmax(1).numpy() == numpy.load(root / "labels.npy")).reshape(5, 12).mean(1)
        assert row["corruption"] == name and row["severity"] == pytest.approx(list(100 * right), abs=1e-4)
        assert row["mean"] == pytest.approx(100 * right.mean(), abs=1e-4)
        assert re.search(rf"^{name} +{row['severity'][0]:.1f} .* {row['mean']:.1f}$", out, re.M)


@pytest.mark.parametrize("spoil", ["labels", "columns", "shape", "grey", "text", "nothing", "empty", "nowhere"])
def test_bad_corruptions_are_one_line(spoil, tmp_path, tiny_demo):
    import numpy
    cli(*RUN)
    root = corruptions(tmp_path / "c", 4)
    if spoil == "labels":
        (root / "labels.npy").unlink()
    elif spoil == "shape":
        numpy.save(root / "fog.npy", numpy.zeros((3, 32, 32, 3), "uint8"))
    elif spoil == "columns":
        numpy.save(root / "labels.npy", numpy.zeros((20, 1), "uint8"))
    elif spoil == "grey":
        numpy.save(root / "fog.npy", numpy.zeros((20, 32, 32, 1), "uint8"))
    elif spoil == "nothing":
        (root / "fog.npy").write_bytes(b"")
    elif spoil == "text":
        (root / "fog.npy").write_text("fog")
    elif spoil == "empty":
        [p.unlink() for p in root.glob("*[gs]*e.npy")], (root / "fog.npy").unlink()
    code, _, err = cli("--eval", only_run() / "checkpoint.pt", "--corruptions", root if spoil != "nowhere" else "nowhere")
    assert code == 2 and err.count("\n") == 1 and "--corruptions" in err


def test_every_method_and_network_trains_by_name(tiny_demo):
    for method in sam_at.METHODS:
        code, out, err = cli(*RUN, "--epochs", 1, "--method", method)
        assert code == 0 and re.search(rf"^{re.escape(method)} +\d", out, re.M), err
    for name, width in NARROW.items():
        code, out, err = cli(*RUN, "--epochs", 1, "--method", "sgd", "--model", name, "--width", width)
        assert code == 0, err
    settings = [json.loads(p.read_text())["settings"] for p in Path("runs").glob("*/record.json")]
    assert {s.get("optimizer", "sgd") for s in settings if s["model"] == "deit_ti"} == {"adamw"}
    assert {s["lr"] for s in settings} == {0.1, 0.001}
    labels = [sam_at.label_of(s) for s in settings]
    assert {"asam rho 0.2", "esam rho 0.2 beta 0.5 gamma 0.5", "sam+at rho 0.2 linf 4/255 in 1 steps",
            "awp gamma 0.005 linf 4/255 in 1 steps"} <= set(labels)


# ---------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------


def linear_task(seed, n=60, d=12):
    """A linear model, and points away from the border of [0,1] that it classifies with small margins."""
    w, x = normal(d, seed=seed), 0.5 + 0.05 * normal(n, d, seed=seed + 1).clamp(-3, 3)
    model = linear_net(w, b=-0.5 * float(w.sum()))
    noise = 0.1 * normal(n, seed=seed + 2)
    y = (model(x)[:, 1].detach() + noise > 0).long()
    margin = (model(x)[:, 1].detach() * (2 * y - 1))
    return model, x, y, margin, w


@given(seeds, norms, st.floats(0.001, 0.1), st.integers(1, 70))
def test_robust_accuracy_of_a_linear_model_is_the_closed_form(seed, norm, eps, batch_size):
    """An image withstands eps if its margin exceeds eps * |w|_q, q dual to p."""
    model, x, y, margin, w = linear_task(seed)
    threshold = eps * float(w.abs().sum() if norm == "linf" else w.norm())
    assume((margin - threshold).abs().min() > 1e-4 and margin.abs().min() > 1e-5)
    result = sam_at.evaluate(model, (x, y), [f"{norm} {eps}"], steps=40, batch_size=batch_size)
    assert result["clean"] == pytest.approx(100 * float((margin > 0).float().mean()))
    assert result["robust"][f"{norm} {eps}"] == pytest.approx(100 * float((margin > threshold).float().mean()), abs=1e-4)


@given(seeds, norms)
def test_robust_accuracy_falls_as_eps_grows_and_stays_below_clean(seed, norm):
    model, (x, y) = tiny_net(seed).eval(), batch(50, seed=seed)
    names = [f"{norm} {eps}" for eps in (1e-4, 0.02, 0.1, 0.5)]
    result = sam_at.evaluate(model, (x, y), names)
    assert list(result["robust"]) == names
    robust = [result["clean"], *result["robust"].values()]
    assert robust == sorted(robust, reverse=True)


@settings(max_examples=10)
@given(seeds, norms, st.floats(0.005, 0.05), st.integers(1, 6))
def test_dropping_fooled_images_changes_no_figure(seed, norm, eps, steps):
    """The same as attacking every image to the end and asking whether any iterate fooled the model."""
    model, (x, y) = tiny_net(seed).eval(), batch(40, seed=seed)
    x = x.round()  # on the border of [0,1]
    y = model(x).argmax(1)
    standing = sam_at.withstands(model, x, y, eps, steps=steps, norm=norm, generator=torch.Generator().manual_seed(seed))
    delta = sam_at.clip(x, sam_at.random_delta(x, eps, norm, torch.Generator().manual_seed(seed)))
    fooled = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(steps + 1):
        fooled |= model(x + delta).argmax(1) != y
        delta, _ = sam_at.pgd_step(model, x, y, delta, eps, eps / 4, norm)
        assert (x + delta).min() > -1e-6 and (x + delta).max() < 1 + 1e-6  # every iterate is an image
    assert standing.tolist() == (~fooled).nonzero().flatten().tolist()


def test_pgd_fools_what_evaluate_says_it_fools():
    """The public attack and the evaluation agree: what survives no iterate fails, what pgd's last iterate fools is not counted."""
    model, x, y, margin, w = linear_task(3)
    x_adv = sam_at.pgd(model, x, y, 0.02)
    still = (model(x_adv).argmax(1) == y).float().mean()
    assert sam_at.evaluate(model, (x, y), ["linf 0.02"])["robust"]["linf 0.02"] == pytest.approx(100 * float(still))


@given(seeds, st.integers(1, 17), st.booleans())
def test_evaluation_counts_the_whole_set_and_touches_nothing(seed, batch_size, training):
    model, (x, y) = tiny_net(seed).train(training), batch(17, seed=seed)
    x = (x * 255).byte()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    result = sam_at.evaluate(model, (x, y), ["linf 1/255"], steps=2, batch_size=batch_size)
    assert model.training == training and torch.get_rng_state().equal(rng)
    assert all(v.equal(state[k]) for k, v in model.state_dict().items())
    right = (model.eval()(x / 255).argmax(1) == y).float().mean()
    assert result["clean"] == pytest.approx(100 * float(right))


@pytest.mark.parametrize("wrong", ["linf", "linf 8", "fgsm 8", "l1 0.1", "linf 0", "linf -1/255", "linf 1/0", "", "pgd 1/255"])
def test_evaluate_refuses_an_attack_it_does_not_know(wrong):
    with pytest.raises(ValueError):
        sam_at.evaluate(tiny_net(), batch(3), [wrong])


def test_evaluate_refuses_nan_and_nothing():
    with pytest.raises(ValueError, match="finite"):
        sam_at.evaluate(Hostile("nan"), batch(3))
    with pytest.raises(ValueError, match="no images"):
        sam_at.evaluate(tiny_net(), (torch.zeros(0, 3, 8, 8), torch.zeros(0).long()))


# ---------------------------------------------------------------------------------------------------------------
# Runs: resume, records, attacks checked
# ---------------------------------------------------------------------------------------------------------------


RUN = ["--preset", "demo", "--method", "at", "--epochs", "3", "--batch-size", "7", "--width", "2", "--attacks", "linf 2/255",
       "--eval-steps", "2", "--attack-steps", "1"]


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(sam_at, "load_data", lambda *_: tiny_data(24, size=32)._replace(augment=True))


def only_run(runs="runs"):
    folder, = Path(runs).iterdir()
    return folder


def result_of(runs="runs"):
    """What must not depend on interruptions: the record without times, and the weights and states in the checkpoint."""
    folder = only_run(runs)
    record = json.loads((folder / "record.json").read_text())
    for part in (record, *record["log"]):
        part.pop("seconds", None)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert [r["epoch"] for r in state["log"]] == [r["epoch"] for r in record["log"]]
    header, *lines = (folder / "epochs.csv").read_text().splitlines()
    assert header == "epoch,lr,loss,accuracy,seconds" and len(lines) == len(record["log"])
    return record, [*state["model"].values(), *state["rng"]]


def same_result(a, b):
    return a[0] == b[0] and same_bits(a[1], b[1])


@settings(max_examples=12)
@given(crashes=st.lists(st.integers(0, 9), min_size=1, max_size=3), half_written=st.booleans())
def test_a_run_that_crashes_at_any_write_ends_as_if_it_had_not(crashes, half_written, tiny_demo):
    assert cli(*RUN, "--runs", "whole", "--fresh")[0] == 0
    shutil.rmtree("broken", ignore_errors=True)
    replace = sam_at.os.replace
    for crash in crashes:
        writes = iter(range(100))

        def replace_or_die(part, path):
            if next(writes) == crash:
                if half_written:
                    Path(part).write_bytes(Path(part).read_bytes()[:50])
                raise SystemExit(9)
            replace(part, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sam_at.os, "replace", replace_or_die)
            cli(*RUN, "--runs", "broken")
    code, out, _ = cli(*RUN, "--runs", "broken")
    assert code == 0 and same_result(result_of("whole"), result_of("broken"))


def test_a_run_killed_three_times_ends_with_the_same_weights():
    flags = ["--preset", "demo", "--method", "sam", "--epochs", "6", "--attacks", "linf 1/255", "--eval-steps", "1"]
    command = [sys.executable, sam_at.__file__, *flags]
    subprocess.run([*command, "--runs", "whole"], check=True, capture_output=True)
    for kill in range(3):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in run.stdout:
            if "images/s" in line:
                time.sleep(random.Random(kill).uniform(0, 0.4))
                run.kill()
                break
        assert run.wait() == -signal.SIGKILL
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert re.search(r"goes on after epoch [3-6]/6", done.stdout)
    assert same_result(result_of("whole"), result_of())


def test_a_finished_run_is_reported_and_fresh_trains_again(tiny_demo):
    _, first, _ = cli(*RUN)
    stamp = (only_run() / "checkpoint.pt").stat().st_mtime_ns
    code, second, _ = cli(*RUN)
    assert code == 0 and "finished before" in second and "images/s" not in second
    assert first.splitlines()[-2:] == second.splitlines()[-2:] and (only_run() / "checkpoint.pt").stat().st_mtime_ns == stamp
    code, third, _ = cli(*RUN, "--fresh")
    assert code == 0 and third.count("images/s") == 3
    code, fourth, _ = cli(*RUN[:RUN.index("--attacks")], "--attack-steps", 1, "--attacks", "l2 0.1", "fgsm")  # evaluates anew
    assert code == 0 and "images/s" not in fourth and "fgsm" in fourth and "linf 2/255" not in fourth


@settings(max_examples=6)
@given(other=st.sampled_from([["--lr", "0.2"], ["--seed", "1"], ["--batch-size", "8"], ["--eps", "1/255"], ["--norm", "l2"],
                        ["--epochs", "4"], ["--width", "3"], ["--method", "sgd"], ["--precision", "fp32"], ["--method", "sam"]]))
def test_other_settings_are_another_run(other, tiny_demo):
    shutil.rmtree("runs", ignore_errors=True)
    cli(*RUN, "--precision", "bf16")
    before = result_of()
    folder = only_run()
    code, out, _ = cli(*RUN, "--precision", "bf16", *other)
    assert code == 0 and "goes on" not in out and "finished before" not in out and len(list(Path("runs").iterdir())) == 2
    folder.rename("kept")
    shutil.rmtree("runs")
    Path("runs").mkdir()
    Path("kept").rename(folder)
    assert same_result(before, result_of())


def test_other_data_is_another_run(monkeypatch):
    for seed in 0, 1:
        monkeypatch.setattr(sam_at, "load_data", lambda *_: tiny_data(24, seed=seed, size=32))
        assert "finished before" not in cli(*RUN)[1]


@pytest.mark.parametrize("name, content", [("checkpoint.pt", b"short"), ("checkpoint.pt", None), ("record.json", b"{"),
                                           ("record.json", b"[1]"), ("checkpoint.pt", "foreign")])
def test_a_broken_file_is_named_and_kept(name, content, tiny_demo):
    cli(*RUN)
    path = only_run() / name
    if name == "checkpoint.pt":
        (only_run() / "record.json").unlink()
    if content == "foreign":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    broken = path.read_bytes()
    code, _, err = cli(*RUN)
    assert "weights_only" not in err  # torch's advice on loading untrusted files is not passed on
    assert code == 2 and str(path) in err and "--fresh" in err and err.count("\n") == 1 and path.read_bytes() == broken
    assert cli(*RUN, "--fresh")[0] == 0


def test_a_checkpoint_of_another_run_is_not_taken_for_this_one(tiny_demo):
    cli(*RUN)
    cli(*RUN, "--seed", 1)
    a, b = sorted(Path("runs").iterdir())
    shutil.copy(a / "checkpoint.pt", b / "checkpoint.pt")
    (b / "record.json").unlink()
    code, _, err = cli(*RUN, "--seed", 1)
    assert code == 2 and str(b / "checkpoint.pt") in err


def test_ctrl_c_says_how_to_go_on(tiny_demo, monkeypatch):
    whole = cli(*RUN, "--runs", "whole")
    save = sam_at.save_record

    def interrupt(folder, record):
        save(folder, record)
        if len(record["log"]) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(sam_at, "save_record", interrupt)
    code, _, err = cli(*RUN)
    assert code == 130 and err.count("\n") == 1 and "goes on" in err and whole[0] == 0
    monkeypatch.setattr(sam_at, "save_record", save)
    code, out, _ = cli(*RUN)
    assert code == 0 and "goes on after epoch 2/3" in out and same_result(result_of("whole"), result_of())


def test_a_record_says_all_that_it_takes_to_repeat_the_run(tiny_demo):
    code, out, _ = cli(*RUN)
    record = json.loads((only_run() / "record.json").read_text())
    assert {"settings", "command", "data", "machine", "torch", "log", "clean", "robust", "seconds", "finished", "date",
            "weights_sha256", "warnings", "evaluation", "test_images"} <= set(record)
    assert record["settings"]["data_sha256"] == sam_at.sha256(sam_at.load_data()[:4])
    state = torch.load(only_run() / "checkpoint.pt", weights_only=True)
    assert record["weights_sha256"] == sam_at.sha256(state["model"].values())
    assert cli(*shlex.split(record["command"])[2:], "--runs", "again")[0] == 0 and same_result(result_of(), result_of("again"))


def test_eval_attacks_a_saved_model(tiny_demo, tmp_path):
    cli(*RUN, "--json", tmp_path / "a.json")
    checkpoint = only_run() / "checkpoint.pt"
    code, out, err = cli("--eval", checkpoint, "--attacks", "linf 2/255", "--eval-steps", 2, "--json", tmp_path / "b.json")
    assert code == 0 and err == "" and json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())
    code, out, _ = cli("--eval", checkpoint, "--attacks", "fgsm", "fgsm 1/255", "l2 0.5", "--restarts", 3)
    assert code == 0 and "each of 3 starts" in out and "fgsm 1/255" in out


def test_what_was_measured_of_a_run_is_kept(tiny_demo, monkeypatch):
    cli(*RUN)
    folder, flags = only_run(), ["--attacks", "fgsm", "l2 0.5", "--eval-steps", 3, "--images", 7]
    first = json.loads((folder / "record.json").read_text())
    for _ in range(2):  # the second time takes the place of the first
        code, out, err = cli("--eval", folder / "checkpoint.pt", *flags, "--json", "e.json")
        assert code == 0 and err == "" and f"kept in {folder}" in out
    record, table = json.loads((folder / "record.json").read_text()), json.loads(Path("e.json").read_text())
    more, = record.pop("more")
    assert record == {k: v for k, v in first.items() if k != "more"} and first["more"] == []
    assert more["evaluation"] == {"attacks": ["fgsm", "l2 0.5"], "eval_steps": 3, "restarts": 1, "images": 7}
    assert (more["clean"], more["robust"]) == (table[0]["clean"], table[0]["robust"])
    cli(*RUN[:RUN.index("--attacks")], "--attack-steps", 1, "--attacks", "linf 0.1")  # the run itself, attacked anew
    record = json.loads((folder / "record.json").read_text())
    assert [e["evaluation"]["attacks"] for e in sam_at.evaluations(record)] == [["linf 0.1"], ["linf 2/255"], ["fgsm", "l2 0.5"]]
    assert cli("--report")[0] == 0
    text = Path("RESULTS.md").read_text()
    assert "The same models under PGD-3 from 1 start(s), 7 images" in text and f"{more['clean']:.1f} | {more['robust']['fgsm']:.1f}" in text
    (folder / "checkpoint.pt").rename("kept.pt")  # trained anew, and stopped in the evaluation: nothing is lost
    with monkeypatch.context() as patch:
        patch.setattr(sam_at, "assess", lambda *_: exec("raise KeyboardInterrupt"))
        assert cli(*RUN[:RUN.index("--attacks")], "--attack-steps", 1, "--attacks", "l2 0.1")[0] == 130
    assert cli(*RUN[:RUN.index("--attacks")], "--attack-steps", 1, "--attacks", "l2 0.1")[0] == 0
    again = json.loads((folder / "record.json").read_text())
    assert again["more"] == sam_at.evaluations(record) and again["weights_sha256"] == record["weights_sha256"]
    record = again
    for name in "linf 1/255", "linf 0.2":  # another seed and the same settings otherwise: two tables of their own
        assert cli("--eval", folder / "checkpoint.pt", "--seed", 3, "--attacks", name)[0] == 0
    record = json.loads((folder / "record.json").read_text())
    assert [e["evaluation"].get("seed") for e in record["more"]] == [None] * 3 + [3, 3]
    assert cli("--report")[0] == 0 and Path("RESULTS.md").read_text().count("The same models under PGD-10 from 1") == 3
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"model": {k: v + k.endswith("bias") for k, v in state["model"].items()}}, folder / "other.pt")  # other weights
    code, out, _ = cli("--eval", folder / "other.pt", "--attacks", "fgsm")
    assert code == 0 and "kept" not in out and json.loads((folder / "record.json").read_text()) == record
    monkeypatch.setattr(sam_at, "load_data", lambda *_: tiny_data(24, seed=5, size=32))  # other data: not this run's
    code, out, _ = cli("--eval", folder / "checkpoint.pt", "--attacks", "fgsm")
    assert code == 0 and "kept" not in out and json.loads((folder / "record.json").read_text()) == record


@given(st.integers(1, 50), st.one_of(st.none(), st.integers(1, 60)))
def test_spaced_rows_are_evenly_spaced(n, most):
    a, b = sam_at.spaced([torch.arange(n), -torch.arange(n)], most)
    assert len(a) == min(n, most or n) and a.equal(-b)
    gaps = [*(a[1:] - a[:-1]).tolist(), n - int(a[-1])]
    assert a[0] == 0 and max(gaps) - min(gaps) <= 1


@given(seeds, norms, st.integers(2, 4))
def test_restarts_never_raise_robust_accuracy(seed, norm, restarts):
    model, (x, y) = tiny_net(seed).eval(), batch(30, seed=seed)
    name = f"{norm} 0.03"
    once = sam_at.evaluate(model, (x, y), [name], steps=1)["robust"][name]
    assert sam_at.evaluate(model, (x, y), [name], steps=1, restarts=restarts)["robust"][name] <= once


def test_restarts_start_anew():
    """One pixel in three starts over the boundary by chance: one start fools a third of the images, twenty nearly all."""
    data = torch.full((300, 1), 0.5), torch.zeros(300, dtype=torch.int64)
    model = Scored(lambda x: x[:, 0] - 0.49)
    once, often = (sam_at.evaluate(model, data, ["linf 0.03"], steps=0, restarts=n)["robust"]["linf 0.03"] for n in (1, 20))
    assert 55 < once < 78 and often < 5


@given(seeds, st.floats(0.005, 0.2))
def test_evaluation_under_fgsm_is_fgsm(seed, eps):
    model, (x, y) = tiny_net(seed).eval(), batch(30, seed=seed)
    fooled = model(sam_at.fgsm(model, x, y, eps)).argmax(1) != y
    right = (model(x).argmax(1) == y) & ~fooled
    assert sam_at.evaluate(model, (x, y), [f"fgsm {eps}"])["robust"][f"fgsm {eps}"] == pytest.approx(100 * float(right.float().mean()))


class Scored(nn.Module):
    """Two classes, told apart by the sign of a score of the pixels (N, d)."""

    def __init__(self, score):
        super().__init__()
        self.score = score

    def forward(self, x):
        z = self.score(x.flatten(1))
        return torch.stack([z, torch.zeros_like(z)], 1)


def wall(x):
    """Rises towards x = 0.473, so that small steps climb back, and is broken beyond it, where one large step lands."""
    m = x.mean(1)
    return (m - 0.4735).abs() * 60 - 0.05 - 9 * (m < 0.47)


@pytest.mark.parametrize("score, says", [
    (lambda x: x.mean(1) - 0.45, None),                          # honest
    (lambda x: (x.mean(1) - 0.45).sign(), "above chance"),       # no gradient at all
    (lambda x: x.amax(1) - 0.49, "steps from"),                  # one pixel has a gradient at a time: takes many steps
    (wall, "one step"),
])
def test_an_evaluation_that_looks_unreliable_is_called_so(score, says):
    x, y = 0.5 + 0.002 * normal(100, 3, 2, 2, seed=0), torch.zeros(100, dtype=torch.int64)
    y[:50], x[:50] = 1, x[:50] - 0.1  # the other class, far away
    found = sam_at.doubts(Scored(score).eval(), (x, y), ["linf 8/255"], 10, 1, 0)
    assert (not found) if says is None else any(says in doubt for doubt in found), found


# ---------------------------------------------------------------------------------------------------------------
# More than one device: torchrun, here with two processes on the CPU
# ---------------------------------------------------------------------------------------------------------------

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="torch was built without gloo")


def torchrun(*command, **how):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, command)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(sam_at.__file__).parent)}, **how)


@given(st.integers(1, 30), st.integers(1, 5), st.booleans())
def test_shares_are_equal_and_cover_the_batch(n, processes, exact):
    t = torch.arange(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sam_at, "world", lambda: processes)
        shares = []
        for process in range(processes):
            patch.setattr(sam_at, "rank", lambda process=process: process)
            shares.append(sam_at.share(t, exact).tolist())
    met = sorted(i for share in shares for i in share)
    assert met == list(range(n if exact else n // processes * processes))
    assert exact or len({len(share) for share in shares}) == 1


def start_of(x, eps, norm, generator=None):
    """In place of a random start, one that depends on the image alone: whoever attacks it starts there."""
    return eps * (1000 * x).sin() * (1 if norm == "linf" else 0.1)


SHARED_STEPS = {
    "sgd": sam_at.sgd_step, "sam": partial(sam_at.sam_step, rho=0.3), "asam": partial(sam_at.sam_step, rho=0.3, ascend=sam_at.adaptive_ascent),
    "at": partial(sam_at.at_step, eps=0.1), "at l2": partial(sam_at.at_step, eps=0.5, norm="l2"),
    "sam+at": partial(sam_at.at_step, eps=0.1, step=partial(sam_at.sam_step, rho=0.3)),
    "esam": partial(sam_at.esam_step, rho=0.3),  # each device has its own ascent: two steps, and no deadlock
}


def three_steps(step, sync_ascent=True):
    """Three steps on batches of eight; under torchrun each process sees its share. Evaluation over 15 images after it."""
    torch.manual_seed(0)
    model, optimizer_model = tiny_net(batchnorm=False, dtype=torch.float64), None
    run = sam_at.spread(model, argparse.Namespace(sync_ascent=sync_ascent))
    optimizer_model = sgd(model, 0.5, momentum=0.9)
    for k in range(3):
        x, y = batch(8, seed=k, dtype=torch.float64)
        loss, _ = step(run, sam_at.share(x), sam_at.share(y), optimizer_model)
    x, y = batch(15, seed=9)
    return weights_of(model) + [torch.tensor(v) for v in sam_at.evaluate(model.float(), (x, y), ["linf 0.05"])["robust"].values()]


@needs_gloo
def test_two_processes_take_the_steps_of_one(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(f"""if True:
        import sys, torch, test_sam_at as t, sam_at
        torch.distributed.init_process_group("gloo")
        sam_at.random_delta = t.start_of
        results = {{name: t.three_steps(step, name != "esam") for name, step in t.SHARED_STEPS.items()}}
        results["own"] = t.three_steps(t.SHARED_STEPS["sam"], False)
        if not sam_at.rank():
            torch.save(results, {str(tmp_path / "two.pt")!r})
        sam_at.stop_processes()
        """)
    run = torchrun(tmp_path / "worker.py")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err[-3000:]
    two = torch.load(tmp_path / "two.pt")
    monkeypatch.setattr(sam_at, "random_delta", start_of)
    for name, step in SHARED_STEPS.items():
        one = three_steps(step)
        for a, b in zip(one, two[name], strict=True):
            assert name == "esam" or torch.allclose(a, b, rtol=1e-7, atol=1e-9), name
    assert not torch.allclose(two["own"][0], two["sam"][0], rtol=1e-4)

    # without --sync-ascent: the mean of the gradients that the two halves have, each at its own w + v
    model = tiny_net(batchnorm=False, dtype=torch.float64)
    optimizer = sgd(model, 0.5, momentum=0.9)
    for k in range(3):
        x, y = batch(8, seed=k, dtype=torch.float64)
        gradients = []
        for half in range(2):
            sam_at.backward(model, x[half::2], y[half::2])
            with sam_at.perturbed(model, 0.3):
                sam_at.backward(model, x[half::2], y[half::2])
            gradients.append([w.grad.clone() for w in model.parameters()])
        for w, a, b in zip(model.parameters(), *gradients):
            w.grad = (a + b) / 2
        optimizer.step()
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-9) for a, b in zip(weights_of(model), two["own"]))


@needs_gloo
def test_a_process_that_dies_costs_no_more_than_its_epoch():
    """torchrun starts both again; the end is that of an undisturbed run. One process goes on where two had been."""
    flags = [sam_at.__file__, "--preset", "demo", "--method", "sam", "--batch-size", 500, "--attacks", "linf 1/255", "--eval-steps", 1,
             "--width", 4, "--epochs", 3]
    whole = torchrun(*flags, "--runs", "whole")
    assert whole.wait() == 0
    broken = torchrun("--max-restarts", 1, *flags)
    lines, killed = [], False
    for line in broken.stdout:
        lines.append(line)
        if "images/s" in line and not killed:
            killed = True
            worker = next(int(p) for p in children_of(broken.pid) if "sam_at.py" in Path(f"/proc/{p}/cmdline").read_text())
            os.kill(worker, signal.SIGKILL)
    assert broken.wait() == 0, broken.stderr.read()[-3000:]
    out = "".join(lines)
    assert killed and re.search(r"goes on after epoch [1-3]/3", out) and out.count("accuracy in percent") == 1
    assert same_result(result_of("whole"), result_of())
    assert result_of()[0]["machine"].endswith("x 2")
    trained = torch.load(only_run() / "checkpoint.pt", weights_only=True)
    (only_run() / "record.json").unlink()
    code, out, err = cli(*flags[1:])
    assert code == 0 and "goes on after epoch 3/3" in out and err == ""
    assert same_bits(trained["model"].values(), torch.load(only_run() / "checkpoint.pt", weights_only=True)["model"].values())


def children_of(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_bad_input_under_torchrun_is_one_line(tiny_demo, monkeypatch):
    monkeypatch.setattr(sam_at, "world", lambda: 2)
    monkeypatch.setattr(sam_at, "rank", lambda: 0)
    monkeypatch.setattr(sam_at, "wait_for_first", lambda: None)
    for process, says in ("0", "sam_at.py: --batch-size 7 cannot be shared by 2 processes\n"), ("1", ""):
        monkeypatch.setenv("RANK", process)
        code, _, err = cli(*RUN)
        assert code == 2 and err == says


# ---------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------

HERE = Path(sam_at.__file__).parent


def test_results_regenerate_from_the_kept_records(monkeypatch, capsys):
    if not (HERE / "RESULTS.md").exists():
        pytest.fail("RESULTS.md is missing: run python sam_at.py --report")
    Path("results").mkdir()
    for kept in "records.jsonl", "theory.json":
        shutil.copy(HERE / "results" / kept, "results")
    assert cli("--report")[0] == 0
    assert Path("RESULTS.md").read_text() == (HERE / "RESULTS.md").read_text()
    assert Path("results/records.jsonl").read_text() == (HERE / "results" / "records.jsonl").read_text()


def test_readmes_tables_are_those_of_the_results():
    """Each row of a README table of accuracies stands in RESULTS.md, figure by figure."""
    rows = [line for line in (HERE / "README.md").read_text().splitlines() if re.match(r"\| (sgd|a?sam|esam|sam\+at|awp|at)\b[^|]*\| \d+ \| ", line)]
    assert rows and set(rows) <= set((HERE / "RESULTS.md").read_text().splitlines())


def test_the_report_says_what_was_not_run_and_what_the_data_is():
    note = {"data_note": "It shows little."}
    text = sam_at.report([made_up("sgd", 0, 50.0, {"a": 40.0}) | note, made_up("sam", 0, 50.0, {"a": 40.0}, rho=0.2)])
    assert "Not run: sam rho 0.1, sam rho 0.3, sam rho 0.4, at linf 1/255," in text
    assert "## cifar10; prn18" in text and "## cifar100; prn18" in text and "**C4** not run" in text
    assert "**made up**: It shows little." in text
    row = {"training": "at", "radius": 0.1, "closed_form": 2.0, "numerical": 2.001}
    for trained, says in (2.05, "holds (at most 2.5% apart)"), (2.1, "does not hold here (at most 5.0% apart)"):
        text = sam_at.report([made_up("sgd", 0, 50.0, {"a": 40.0})], [row | {"trained": trained}])
        assert f"**C4** {says}" in text and f"| at | 0.100 | 2.000 | 2.001 | {trained:.3f} |" in text


def made_up(method, seed, clean, robust, seconds=10.0, **radius):
    settings = {"method": method, **radius, "dataset": "demo", "data_sha256": "0", "model": "small", "width": None, "epochs": 1,
                "batch_size": 1, "lr": 0.1, "precision": "fp32", "seed": seed, "compile": False}
    if method == "at":
        settings |= {"norm": "linf", "eps": 1 / 255, "attack_steps": 5}
    return {"name": f"{method}{radius}{seed}", "settings": settings, "clean": clean, "robust": robust, "seconds": seconds,
            "test_images": 10_000, "evaluation": {"eval_steps": 10, "restarts": 1, "attacks": list(robust)}, "warnings": [], "data": "made up", "date": "d",
            "machine": "m", "torch": "t", "command": "c", "finished": True}


@pytest.mark.parametrize("name, content", [
    ("theory.json", ""), ("theory.json", "{"), ("theory.json", '{"a": 1}'), ("records.jsonl", "{}"), ("records.jsonl", "1"),
    ("records.jsonl", "{"), ("records.jsonl", '{"finished": true, "name": "a", "settings": {"method": "sgd"}}')])
def test_a_report_from_broken_records_is_one_line_and_writes_nothing(name, content):
    Path("results").mkdir()
    Path("results/records.jsonl").write_text(json.dumps(made_up("sgd", 0, 50.0, {"a": 40.0})) + "\n")
    (Path("results") / name).write_text(content)
    before = {p: p.read_bytes() for p in Path("results").iterdir()}
    code, _, err = cli("--report")
    assert code == 2 and err.count("\n") == 1 and name in err
    assert not Path("RESULTS.md").exists() and {p: p.read_bytes() for p in Path("results").iterdir()} == before


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6))
def test_table_figures_are_mean_and_deviation_over_seeds(values):
    records = [made_up("sgd", seed, value, {"a": 100 - value}) for seed, value in enumerate(values)]
    mean, deviation, error = sam_at.mean_and_error(records, "clean")
    t = torch.tensor(values, dtype=torch.float64)
    assert mean == pytest.approx(float(t.mean()), abs=1e-6)
    assert deviation == pytest.approx(float(t.std()) if len(values) > 1 else 0, abs=1e-6)
    assert error >= deviation / math.sqrt(len(values)) - 1e-9
    cells = f"| sgd | {len(values)} | {mean:.1f}" + (f" ± {deviation:.1f}" if len(values) > 1 else "")
    assert cells in sam_at.report(records)


@given(st.floats(-30, 19), st.floats(-3, 3), st.floats(1, 40), st.floats(-3, 3))
def test_verdicts_follow_their_rules(gain, clean, at_gain, at_clean):
    """One seed, 10,000 images at about 50%: an error of 0.5 each, so two standard errors of a difference are 1.41."""
    assume(all(abs(abs(v) - edge) > 0.1 for v in (gain, clean, at_gain, at_clean) for edge in (0, 0.5, 1.41)))
    rows = {"sgd": [made_up("sgd", 0, 50.0, {"a": 40.0, "b": 40.0})],
            "sam rho 1": [made_up("sam", 0, 50 + clean, {"a": 40 + gain, "b": 40 + gain}, 20.0, rho=1)],
            "at linf 1/255": [made_up("at", 0, 50 + at_clean, {"a": 40 + gain + at_gain, "b": 40 + gain + at_gain}, 60.0)]}
    (_, c1), (_, c2), (_, c3), (_, c5), (_, c6) = sam_at.verdicts(rows)
    assert c1.startswith("holds") == (gain > 1.41 and clean > -0.5)
    assert c2.startswith("holds") == (at_gain > 1.41 and gain + at_gain > 1.41 and at_clean < -0.5)
    assert c3.startswith("holds") == (gain > 0 and clean > at_clean)
    assert c5 == "not run" and c6.startswith("holds") and "sam rho 1 2.0, at linf 1/255 6.0" in c6
    del rows["sam rho 1"]
    assert all(text == "not run" for _, text in sam_at.verdicts(rows))


def test_pictures_are_drawn_from_records_and_checkpoints(tiny_demo):
    pytest.importorskip("matplotlib")
    for method in "sgd", "sam", "at":
        cli(*RUN, "--method", method)
    code, out, err = cli("--pictures")
    assert code == 0 and err == ""
    names = sorted(p.name for p in Path("results").iterdir())
    assert [re.sub("-....[.]png", "", name) for name in names] == [f"{kind}-demo-small-2-3" for kind in ("attacked", "curves", "tradeoff")]
    assert all((Path("results") / name).stat().st_size > 5000 for name in names)


def test_without_matplotlib_pictures_name_the_pip_command(tiny_demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("--pictures")
    assert code == 2 and "pip install matplotlib" in err and err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 254), st.sampled_from([255, 256, 1000]))
def test_radii_are_fractions_or_decimals(a, b):
    assert sam_at.parse_radius(f"{a}/{b}") == a / b == sam_at.parse_radius(repr(a / b))
    if b == 255:
        assert sam_at.show_radius(a / b) == f"{a}/255"
    with pytest.raises(ValueError, match=f"{a}/255"):
        sam_at.parse_radius(str(a))


def make_folder(root, train=("cat", "dog"), test=("cat", "dog"), n=3, size=(32, 32), test_name="test"):
    from PIL import Image
    for part, classes in ("train", train), (test_name, test):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", size, (80 * c, 60, 20 * i)).save(root / part / name / f"{i}.png")
    return root


BAD = {  # arguments, and what the one line must speak of
    "method": (["--method", "sma"], "sma"),
    "negative rho": (["--rho", "-0.1"], "rho"),
    "rho in words": (["--rho", "big"], "big"),
    "nan rho": (["--rho", "nan"], "rho"),
    "eps 8": (["--eps", "8"], "8/255"),
    "eps 0": (["--eps", "0"], "(0, 1)"),
    "eps 1": (["--eps", "1.0"], "(0, 1)"),
    "eps nan": (["--eps", "nan"], "eps"),
    "eps 1/0": (["--eps", "1/0"], "eps"),
    "eps negative": (["--eps=-1/255"], "(0, 1)"),
    "zero epochs": (["--epochs", "0"], "epochs"),
    "zero batch": (["--batch-size", "0"], "batch-size"),
    "large batch": (["--batch-size", "4001"], "4000"),
    "zero lr": (["--lr", "0"], "lr"),
    "infinite lr": (["--lr", "inf"], "lr"),
    "huge seed": (["--seed", str(2 ** 64)], "seed"),
    "no folder": (["--dataset", "folder", "--data-dir", "nowhere"], "nowhere"),
    "no folder named": (["--dataset", "folder"], "--data-dir"),
    "device": (["--device", "gpu"], "gpu"),
    "cuda": (["--device", "cuda:99"], "cuda:99"),
    "json in no folder": (["--json", "no/where.json"], "no/where.json"),
    "unknown flag": (["--roh", "1"], "roh"),
    "abbreviation": (["--epoch", "1"], "epoch"),
    "attack": (["--attacks", "linf 1/255", "l7 1/255"], "l7 1/255"),
    "eval of nothing": (["--eval", "no.pt"], "no.pt"),
    "report of nothing": (["--report"], "runs"),
    "pictures of nothing": (["--pictures"], ""),
    "corruptions of nothing": (["--corruptions", "."], "--eval"),
    "width of deit": (["--model", "deit_ti", "--width", "4"], "multiple of 3"),
    "esam beta": (["--esam-beta", "1.5"], "esam-beta"),
    "esam in step": (["--method", "esam", "--sync-ascent"], "--sync-ascent"),
    "synced on a CPU": (["--batchnorm", "synced", "--device", "cpu"], "CUDA"),
    "tiny-imagenet nowhere": (["--dataset", "tiny-imagenet"], "--data-dir"),
    "no images": (["--images", "0"], "images"),
    "runs on a file": (["--runs", sam_at.__file__ + "/runs"], "--runs"),
}


@pytest.mark.parametrize("argv, says", BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line_and_exit_code_2(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("--preset", "demo", *argv)
    assert code == 2 and err.count("\n") == 1 and says in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_no_cuda_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, err = cli("--device", "cuda")
    assert code == 2 and err.count("\n") == 1 and "cuda" in err


def test_bad_folders(tmp_path):
    def refused(root, says):
        code, _, err = cli("--preset", "demo", "--dataset", "folder", "--data-dir", root, "--batch-size", 2)
        assert code == 2 and err.count("\n") == 1 and says in err, err

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "train")
    (tmp_path / "hollow" / "train" / "cat").mkdir(parents=True)
    refused(tmp_path / "hollow", "cat")
    refused(make_folder(tmp_path / "one", ["cat"], ["cat"]), "one class")
    refused(make_folder(tmp_path / "differ", ["cat", "dog"], ["cat", "eel"]), "dog")
    root = make_folder(tmp_path / "broken")
    (root / "train" / "dog" / "1.png").write_bytes(b"no image")
    refused(root, "1.png")
    good = (root / "train" / "dog" / "0.png").read_bytes()
    (root / "train" / "dog" / "1.png").write_bytes(good[:len(good) // 2])
    refused(root, "1.png")


@pytest.mark.parametrize("there", [True, False])
def test_cifar_that_cannot_be_had_offers_the_demo(there, tmp_path, monkeypatch):
    import torchvision

    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    root = tmp_path / "data"
    if there:
        root.mkdir()
    for name in "cifar10", "cifar100":
        code, _, err = cli("--preset", "paper", "--dataset", name, "--data-dir", root, "--device", "cpu")
        assert code == 2 and err.count("\n") == 1 and "--preset demo" in err and name in err
        assert root.exists() == there


@settings(max_examples=4)
@given(st.sampled_from(["test", "val"]), st.integers(20, 50), st.integers(20, 50))
def test_folder_is_read_as_imagefolder_reads_it(tmp_path_factory, test_name, width, height):
    root = make_folder(tmp_path_factory.mktemp("images"), size=(width, height), test_name=test_name)
    data = sam_at.load_folder(root)
    assert data.x.shape == (6, 3, 32, 32) and data.x.dtype == torch.uint8 and data.num_classes == 2
    assert data.y.tolist() == [0, 0, 0, 1, 1, 1] == data.y_test.tolist()
    assert [tuple(image[:, 5, 5].tolist()) for image in data.x] == [(80 * c, 60, 20 * i) for c in (0, 1) for i in range(3)]
    assert data.mean_std == sam_at.mean_std_of(data.x) and data.augment
    assert data.source.startswith(f"{root.name} (6 training") and data.note == ""
    (root / "SOURCE.txt").write_bytes(b"")
    assert sam_at.load_folder(root).source.startswith(root.name)
    (root / "SOURCE.txt").write_text("Cats and dogs\nDrawn, not photographed.\nOne colour each.\n")
    data = sam_at.load_folder(root)
    assert data.source.startswith("Cats and dogs (6") and data.note == "Drawn, not photographed. One colour each."


def test_tiny_imagenet_as_downloaded(tmp_path):
    from PIL import Image
    root, colours = tmp_path / "tiny-imagenet-200", {"n02": (200, 10, 30), "n01": (10, 200, 30)}
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, (wnid, colour) in enumerate(colours.items()):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (64, 64), colour).save(root / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", quality=95)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t44\n")
        Image.new("RGB", (64, 64), colour).save(root / "val" / "images" / f"val_{i}.JPEG", quality=95)
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    annotations = root / "val" / "val_annotations.txt"
    annotations.write_text("".join(lines))
    data = sam_at.load_data("tiny-imagenet", root)
    assert data.x.shape == (6, 3, 32, 32) and data.y.tolist() == [0, 0, 0, 1, 1, 1] and data.y_test.tolist() == [1, 0]
    for x, y in (data.x, data.y), (data.x_test, data.y_test):  # sorted names: n01 is class 0
        colour = torch.tensor([colours[("n01", "n02")[c]] for c in y.tolist()])
        assert ((x.float().mean((2, 3)) - colour).abs() < 6).all()
    assert data.mean_std == sam_at.mean_std_of(data.x) and max(data.mean_std[0]) < 1
    for wrong in "val_0.JPEG\tn09\t0\n", "no tab\n", "val_7.JPEG\tn01\n":
        annotations.write_text(wrong)
        code, _, err = cli("--preset", "demo", "--dataset", "tiny-imagenet", "--data-dir", root, "--batch-size", 2)
        assert code == 2 and err.count("\n") == 1 and "val" in err


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_as_downloaded(name, tmp_path, monkeypatch):
    """Pickled batches in the real layout, read by torchvision; only its checksums are put aside."""
    import pickle

    import numpy
    import torchvision
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", ["a", "b", "c"]))
    folder, key = {"cifar10": ("cifar-10-batches-py", "labels"), "cifar100": ("cifar-100-python", "fine_labels")}[name]
    (tmp_path / folder).mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "cifar10" else ["train", "test"]
    rng, made = numpy.random.default_rng(0), {}
    for part in names:
        made[part] = rng.integers(0, 256, (4, 3072), dtype="uint8"), rng.integers(0, 3, 4).tolist()
        with open(tmp_path / folder / part, "wb") as file:
            pickle.dump({"data": made[part][0], key: made[part][1]}, file)
    data = sam_at.load_data(name, tmp_path)
    assert data.x.shape == (20 if name == "cifar10" else 4, 3, 32, 32) and data.num_classes == 3 and data.augment
    x, y = made[names[0]]
    assert data.x[:4].equal(torch.from_numpy(x).view(4, 3, 32, 32)) and data.y[:4].tolist() == y
    assert data.x_test.equal(torch.from_numpy(made[names[-1]][0]).view(4, 3, 32, 32)) and data.y_test.tolist() == made[names[-1]][1]
    assert data.mean_std == (sam_at.CIFAR10_MEAN_STD if name == "cifar10" else sam_at.CIFAR100_MEAN_STD)


def test_divergence_is_one_line_and_no_table():
    code, out, err = cli("--preset", "demo", "--method", "sgd", "--epochs", 2, "--lr", 1e20, "--batch-size", 500)
    assert code == 2 and "epoch 1" in err and err.count("\n") == 1 and "clean" not in out


def test_json_is_not_written_over_something_else(tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("mine")
    code, _, err = cli("--preset", "demo", "--json", note)
    assert code == 2 and "note.txt" in err and note.read_text() == "mine"


def test_help_is_grouped_and_shows_defaults():
    code, out, _ = cli("--help")
    assert code == 0
    for word in "what to run", "radii", "data and network", "training", "default", "8/255", "--rho", "--attack-steps":
        assert word in out


def check_demo(out, table, methods):
    first, *_ = out.splitlines()
    assert "preset demo" in first and "--preset paper" in first
    assert [row["method"] for row in table] == methods
    for row in table:
        assert list(row) == ["method", "clean", "robust", "seconds"] and tuple(row["robust"]) == sam_at.ATTACKS
        assert all(0 <= v <= row["clean"] <= 100 for v in row["robust"].values()) and row["seconds"] > 0
        line = next(li for li in out.splitlines() if re.match(rf"{row['method']} +\d", li))
        assert [float(c) for c in line.split()[1:6]] == pytest.approx([row["clean"], *row["robust"].values()], abs=0.0501)


def test_the_demo_end_to_end(tmp_path):
    """A short run of the real command in a process of its own, and SAM again, alone, in this one: the same figures."""
    flags = ["--preset", "demo", "--method", "sgd", "sam", "at", "--epochs", "2", "--attack-steps", "1", "--eval-steps", "2", "--json"]
    script = Path(sam_at.__file__)
    done = subprocess.run([sys.executable, script, *flags, tmp_path / "a.json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "a.json").read_text())
    check_demo(done.stdout, table, ["sgd", "sam", "at"])
    assert len(re.findall(r"epoch [12]/2 .*loss.*accuracy.*images/s.*left", done.stdout)) == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "runs"]
    code, out, _ = cli("--preset", "demo", "--method", "sam", "--epochs", "2", "--eval-steps", "2", "--json", tmp_path / "a.json")
    again, = json.loads((tmp_path / "a.json").read_text())  # the old table is replaced
    assert code == 0 and again | {"seconds": 0} == table[1] | {"seconds": 0}


def test_a_folder_end_to_end_and_ctrl_c(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "images", n=8)
    code, out, err = cli("--preset", "demo", "--dataset", "folder", "--data-dir", root, "--method", "sam", "--epochs", 2,
                         "--batch-size", 4, "--width", 4, "--model", "prn18")
    assert code == 0 and err == "" and re.search(r"^sam +\d", out, re.M) and "x SGD" in out

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sam_at, "load_data", interrupt)
    code, _, err = cli("--preset", "demo")
    assert code == 130 and err.count("\n") == 1
