"""The specification of sam_at.py and results/report.py as properties, on a CPU; hypothesis draws the cases.
It opens with six worked by hand. Then the sections follow the file's, numbered as there."""
import importlib.util
import io
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the specification is of the CPU's bits, wherever it runs

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings, strategies as st
from torch import nn

import sam_at

settings.register_profile("repeatable", deadline=None, max_examples=20, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("repeatable")
HERE = Path(__file__).resolve().parent
seeds = st.integers(0, 10_000)
norms = st.sampled_from(["linf", "l2"])
f64 = torch.float64

@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    """Each test in an empty folder of its own: that is where runs/ goes."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))

class Scored(nn.Module):
    """Logits (0, f(x, w)): label 1 is right where f > 0."""
    def __init__(self, f, w=(0.0,)):
        super().__init__()
        self.f = f
        self.w = nn.Parameter(torch.tensor(w, dtype=f64))

    def forward(self, x):
        score = self.f(x, self.w)
        return torch.stack([torch.zeros_like(score), score], 1)

def linear(w):
    """The score w.(x - 1/2)."""
    return Scored(lambda x, w: (x - 0.5).flatten(1) @ w, w)

def loss_of(f, w):
    """A model whose cross-entropy at label 0 is f(w), whatever the images: log(1 + e^z) = f for z = log(e^f - 1)."""
    return Scored(lambda x, w: f(w).expm1().log().expand(len(x)), w)

def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)

ZERO, ONE = torch.tensor([0]), torch.tensor([1])
GREY = torch.full((1, 3, 2, 2), 0.5, dtype=f64)

# == Six worked by hand ================================================================================
def test_sam_on_a_parabola():
    """Loss 1 + w^2/2 at w = 3: the gradient is 3, so rho 1 leads to 4; its gradient 4 is applied at 3."""
    model = loss_of(lambda w: 1 + w.square().sum() / 2, [3.0])
    sam_at.sam_step(model, GREY, ZERO, sgd(model, lr=0.1), rho=1.0)
    assert model.w.item() == pytest.approx(3 - 0.1 * 4)

def test_the_attack_on_a_linear_score():
    """The score 3 (x1 - 1/2) - 4 (x2 - 1/2) at label 1 falls fastest along (-3, 4)/5, and in linf to a corner."""
    model, x = linear([3.0, -4.0]), torch.tensor([[0.5, 0.5]], dtype=f64)
    attack = partial(sam_at.pgd, model, x, ONE, 0.1, random_start=False)
    assert attack("l2").tolist()[0] == pytest.approx([0.5 - 0.06, 0.5 + 0.08])
    assert attack("linf").tolist()[0] == pytest.approx([0.4, 0.6])

def test_a_pixel_at_the_border_stays_an_image():
    """The attack wants to darken a pixel of 0.02 by 0.1 and to brighten one of 0.95."""
    model, x = linear([1.0, -1.0]), torch.tensor([[0.02, 0.95]], dtype=f64)
    assert sam_at.pgd(model, x, ONE, 0.1, random_start=False).tolist() == [[0.0, 1.0]]

def test_at_takes_the_gradient_at_the_attacked_image():
    """Score w x1 at w = 2, label 1, x1 = 1/2 + 0.3, eps 0.1: the attack goes to 0.2, where the loss log(1 + e^-z)
    has the gradient -0.2/(1 + e^z), z = 2 * 0.2."""
    model, x = linear([2.0]), torch.tensor([[0.8]], dtype=f64)
    sam_at.at_step(model, x, ONE, sgd(model, lr=1.0), eps=0.1, steps=8)
    assert model.w.item() == pytest.approx(2 + 0.2 / (1 + math.exp(0.4)))

def test_running_statistics_see_each_batch_once():
    """Momentum 0.1 from 0: after one batch of mean 1/2 the running mean is 0.05, with SAM, too."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2))
    x, y = torch.tensor([[0.2], [0.8]]), torch.tensor([0, 1])
    sam_at.sam_step(model, x, y, sgd(model), rho=1.0)
    assert model[0].running_mean.item() == pytest.approx(0.05)

def test_robust_accuracy_of_three_images():
    """Score x - 1/2 at label 1 for x = 0.4, 0.52, 0.6: two are right, and an attack of 0.05 leaves one."""
    x = torch.tensor([0.4, 0.52, 0.6], dtype=f64).view(3, 1, 1, 1)
    found = sam_at.evaluate(linear([1.0]), x, torch.tensor([1, 1, 1]), ["linf 0.05"])
    assert found == {"clean": pytest.approx(200 / 3), "linf 0.05": pytest.approx(100 / 3)}

# == Helpers ===========================================================================================
def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def uniform(*shape, seed, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def batch(n, size=8, classes=3, seed=0, dtype=torch.float32):
    return uniform(n, 3, size, size, seed=seed, dtype=dtype), torch.arange(n) % classes

def tiny_net(seed=0, classes=3, dtype=torch.float32, batchnorm=True):
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4) if batchnorm else nn.Identity()
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.Tanh(), *head)
    return sam_at.Classifier(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)).to(dtype)

def weights_of(model):
    return [w.detach().clone() for w in model.parameters()]

def all_of(model):
    """Weights, buffers, gradients, modes and requires_grad, as tensors."""
    weights = list(model.parameters())
    gradients = [w.grad for w in weights if w.grad is not None]
    flags = [module.training for module in model.modules()] + [w.requires_grad for w in weights]
    tensors = weights + list(model.buffers()) + gradients + [torch.tensor(flags)]
    return [t.detach().clone() for t in tensors]

def same_bits(a, b):
    """Whether two lists of tensors agree in every bit."""
    pairs = list(zip(a, b, strict=True))
    return all(s.numpy().tobytes() == t.numpy().tobytes() for s, t in pairs)

def after(action, seed=0):
    """The weights and buffers that action(model) leaves of a network, always the same at its start."""
    model = tiny_net(seed)
    action(model)
    return weights_of(model) + list(model.buffers())

def length(tensors):
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))

def size_of(delta, norm):
    """|delta|_p of each image."""
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)

def inside(x_adv, x, eps, norm="linf"):
    small = (size_of(x_adv - x, norm) <= eps + 1e-6).all()
    return bool(small) and x_adv.equal(x_adv.clamp(0, 1))

# == 1. Input space ====================================================================================
HOSTILE = [lambda z: 0 * z, lambda z: math.nan * z, lambda z: 1e30 * z, lambda z: (z - z.detach()).sqrt()]

@pytest.mark.parametrize("f", [None, *HOSTILE])
@given(seed=seeds, norm=norms, eps=st.floats(0.001, 0.3), start=st.booleans(), steps=st.sampled_from([0, 1, 12]))
def test_pgd_stays_in_the_ball(f, seed, norm, eps, start, steps):
    """Whatever the gradients are. The caller's images stay as they are."""
    x, y = batch(4, classes=2, seed=seed)
    x = (3 * x - 1).clamp(0, 1)  # many pixels on the border of [0,1]
    before = x.clone()
    model = Scored(lambda x, w: f(x.mean((1, 2, 3)))) if f else tiny_net(seed).eval()
    x_adv = sam_at.pgd(model, x.requires_grad_(), y, eps, norm, steps, random_start=start)
    assert inside(x_adv, x, eps, norm) and not x_adv.requires_grad
    assert x.equal(before)

@given(seeds, norms, st.floats(0.001, 0.2), st.integers(2, 20), st.integers(1, 12))
def test_pgd_goes_to_the_optimum_of_a_linear_score_in_quarter_steps(seed, norm, eps, d, steps):
    """That is eps sign(g) or eps g/|g|, with g = -w at label 1."""
    w = normal(d, seed=seed, dtype=f64)
    assume(w.abs().min() > 1e-3)
    x, unit = 0.3 + 0.4 * uniform(3, d, seed=seed, dtype=f64), -w.sign() if norm == "linf" else -w / w.norm()
    attack = partial(sam_at.pgd, linear(w.tolist()), x, torch.ones(3).long(), eps, norm, random_start=False)
    with torch.no_grad():  # pgd takes its gradients there, too
        assert attack(steps).allclose(x + eps * min(1, steps / 4) * unit, atol=1e-9)
        assert attack(3, step_size=eps / 9).allclose(x + eps / 3 * unit, atol=1e-9)

@given(seeds, norms)
def test_random_starts_fill_the_ball(seed, norm):
    """linf: each pixel is uniform, of deviation eps/sqrt 3. l2: lengths are uniform in [0, eps]."""
    x = torch.full((400, 3, 4, 4), 0.5)
    delta = sam_at.pgd(tiny_net(seed), x, torch.arange(400) % 3, 0.1, norm, steps=0) - x
    sizes = size_of(delta, norm)
    assert abs(delta.mean()) < 0.005 and sizes.max() > 0.095
    if norm == "linf":
        assert delta.std() == pytest.approx(0.1 / math.sqrt(3), abs=0.002)
    else:
        assert sizes.min() < 0.01 and sizes.mean() == pytest.approx(0.05, abs=0.01)

@given(seeds, norms, st.floats(1e-30, 1e30))
def test_the_steepest_direction_has_length_one_whatever_the_gradients_size(seed, norm, scale):
    g = normal(4, 3, 5, seed=seed)
    step = sam_at.steepest(g * scale, norm)
    assert size_of(step, norm).allclose(torch.ones(4))
    assert step.allclose(sam_at.steepest(g, norm), rtol=1e-4)

def test_an_infinite_gradient_keeps_its_sign_and_nan_moves_nothing():
    g = torch.tensor([[math.inf, -math.inf, math.nan, -2.0]])
    assert sam_at.steepest(g, "linf").tolist() == [[1, -1, 0, -1]]
    assert sam_at.steepest(g, "l2").allclose(torch.tensor([[1, -1, 0, 0]]) / math.sqrt(2))

@given(seeds, norms, st.booleans(), st.booleans())
def test_pgd_leaves_the_model_alone(seed, norm, training, fail):
    """Bit for bit, also when it raises. Each step is one pass in the model's own mode, for no weight's gradient."""
    def look(module, args, logits):
        seen.append(any(w.requires_grad for w in model.parameters()) or module.training != training)
        if fail and len(seen) == 2:
            raise KeyError
    model, (x, y), seen = tiny_net(seed).train(training), batch(4, seed=seed), []
    model.net[1].train(not training)  # a mode of its own
    model.net[0].weight.requires_grad_(False)
    F.cross_entropy(model(x), y).backward()
    before = all_of(model)
    model.register_forward_hook(look)
    with pytest.raises(KeyError) if fail else nullcontext():
        sam_at.pgd(model, x, y, 0.1, norm, steps=3)
    assert same_bits(before, all_of(model))
    assert seen == [False] * (2 if fail else 3)

class Membrane(nn.Module):
    """Its buffer changes shape, and a second one comes into being in the first pass."""
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 2)
        self.register_buffer("spikes", torch.zeros(2))
        self.register_buffer("mask", None)

    def forward(self, x):
        self.spikes = self.spikes.sum() + torch.ones(len(x))
        self.mask = torch.ones(1)
        return self.linear(x.flatten(1))

def test_restored_puts_back_buffers_that_changed_their_shape():
    model = Membrane()
    sam_at.pgd(model, *batch(5, size=2, classes=2), 0.1)
    assert model.spikes.tolist() == [0, 0] and model.mask is None
    assert all(w.requires_grad for w in model.parameters())

def test_a_model_that_works_in_place_harms_no_image():
    model, (x, y) = Scored(lambda x, w: x.sub_(0.5).sum((1, 2, 3)) + w), batch(4, classes=2)
    before = x.clone()
    sam_at.pgd(model, x, y, 0.1)
    sam_at.evaluate(model, x, y, ["linf 0.1"])
    sam_at.sam_step(model, x, y, sgd(model), 0.1)
    assert x.equal(before)

IMAGES, LABELS = batch(3)

@pytest.mark.parametrize("wrong", [
    {"norm": "l1"}, {"eps": -0.1}, {"eps": math.nan}, {"eps": 8}, {"eps": 1}, {"eps": 8, "norm": "l2"},
    {"y": LABELS[:2]}, {"y": LABELS.int()}, {"x": IMAGES.half()}, {"x": IMAGES * math.nan}, {"x": 1.2 * IMAGES},
    {"x": IMAGES - 0.1}, {"x": (255 * IMAGES).byte()}])
def test_pgd_refuses_what_makes_no_sense(wrong):
    with pytest.raises(sam_at.BadInput):
        sam_at.pgd(tiny_net(), **{"x": IMAGES, "y": LABELS, "eps": 0.1, **wrong})

@given(norms, st.floats(0, 1, exclude_max=True))
def test_one_rule_for_radii_lets_large_l2_ones_through(norm, share):
    eps = share * {"linf": 1, "l2": 8}[norm]
    sam_at.pgd(tiny_net(), IMAGES, LABELS, eps, norm, steps=1)
    assert sam_at.parse_attack(f"{norm} {eps!r}").keywords["eps"] == eps

@given(st.floats(0.01, 0.1))
def test_robust_means_right_at_every_step(eps):
    """PGD climbs past the one place where the model is wrong. Who meets it stays there; the others go on."""
    def score(x, w):
        wrong = (x - 0.3).abs() < eps / 10
        return (x - x.detach() + wrong - 0.5).sum((1, 2, 3))
    k = torch.tensor([0, 1, 2, 3, 4, 5, 4.5], dtype=f64).view(7, 1, 1, 1)  # steps of eps/4 to that place
    x, y, model = 0.3 - k * eps / 4, torch.zeros(7).long(), Scored(score)
    last = partial(sam_at.pgd, eps=eps, random_start=False)
    every = partial(last, stop_when_fooled=True)
    assert last(model, x, y).allclose(x + eps)
    assert every(model, x, y).allclose(x + k.clamp(max=4) * eps / 4)
    found = sam_at.evaluate(model, x, y, {"last": last, "every": every})
    assert [round(7 * points / 100) for points in found.values()] == [6, 5, 2]
    assert sam_at.parse_attack(f"l2 {eps}").keywords["stop_when_fooled"]

# == 2. Weight space ===================================================================================
def ascended(weights, rho, ascend=sam_at.ascent):
    """The v that perturbed() adds to each weight."""
    before = [w.detach().clone() for w in weights]
    with sam_at.perturbed(weights, rho, ascend):
        return [(w.detach() - old).double() for w, old in zip(weights, before)]

@given(seeds, st.floats(1e-4, 10), st.booleans())
def test_perturbed_restores_the_bits(seed, rho, fail):
    """The block is at w + rho g/|g|, one norm over all weights; after it, and after an error in it, all is as before."""
    model = tiny_net(seed)
    sam_at.gradient(model, *batch(4, seed=seed))
    before, layouts = all_of(model), [w.stride() for w in model.parameters()]
    size = length(w.grad for w in model.parameters())
    with pytest.raises(KeyError) if fail else nullcontext(), sam_at.perturbed(model, rho):
        for w, old in zip(model.parameters(), before):
            assert w.allclose(old + rho / size * w.grad, rtol=1e-4, atol=1e-6)
        if fail:
            raise KeyError
    assert same_bits(before, all_of(model))
    assert layouts == [w.stride() for w in model.parameters()]

def test_an_ascent_that_fails_half_way_leaves_the_weights_alone():
    model = tiny_net()
    sam_at.gradient(model, *batch(4))
    before = weights_of(model)
    with pytest.raises(RuntimeError), sam_at.perturbed(model, 0.1, lambda weights, *_: [1.0 + weights[0], torch.ones(7)]):
        pass
    assert same_bits(before, weights_of(model))

@given(seeds, st.floats(0.5, 5), st.sampled_from([0, 1e-30, 1e-9, 1e-6, 1, 1e15]))
def test_gradients_of_any_size_move_the_weights_by_rho(seed, rho, size):
    """But a gradient of 0 moves nothing, and a tiny one hardly. A weight without one stays."""
    weights = [nn.Parameter(torch.zeros(n)) for n in (30, 3, 2)]
    for w in weights[:2]:
        w.grad = size * normal(*w.shape, seed=seed).sign()
    v = ascended(weights, rho)
    assert not v[2].any()
    assert length(v) == pytest.approx(rho if size > 1e-10 else 0, rel=0.01, abs=1e-3)

def used_up(model):
    weights = model.parameters()
    list(weights)
    return weights

@pytest.mark.parametrize("wrong", [
    used_up, lambda model: model.zero_grad() or model, lambda model: model.net[0].weight.detach()])
def test_sam_that_would_be_sgd_is_an_error(wrong):
    model = tiny_net()
    sam_at.gradient(model, *batch(4))
    with pytest.raises(sam_at.BadInput, match="gradient"), sam_at.perturbed(wrong(model), 0.1):
        pass

@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_rho_is_finite_and_not_negative(rho):
    model = tiny_net()
    with pytest.raises(sam_at.BadInput, match="rho"):
        sam_at.sam_step(model, *batch(4), sgd(model), rho)

@pytest.mark.parametrize("fused", [True, False])
def test_an_update_inside_the_block_is_an_error(fused):
    """Not five steps that change nothing. The weights are restored all the same."""
    model = tiny_net()
    sam_at.gradient(model, *batch(4))
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="after"), sam_at.perturbed(model, 0.1):
        sgd(model, 1e-4, fused=fused).step()
    assert same_bits(before, weights_of(model))

def test_a_graph_made_at_w_cannot_be_used_at_w_plus_v():
    model, (x, y) = tiny_net(), batch(4)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"), sam_at.perturbed(model, 0.1):
        loss.backward()

def test_autocasts_copies_of_the_weights_do_not_hide_the_move():
    net, (x, y) = tiny_net().net, batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        sam_at.gradient(net, x, y)
        at_w = net(x)
        with sam_at.perturbed(net, 1.0):
            assert not net(x).equal(at_w)
        assert net(x).equal(at_w)

@given(seeds, st.floats(0.001, 0.05), st.integers(2, 8))
def test_duality_on_a_linear_score(seed, eps, d):
    """The worst delta takes eps |w| from the margin w.x, the worst v takes rho |x|: for one rho the same."""
    w, x = normal(d, seed=seed, dtype=f64), 0.3 + 0.4 * uniform(1, d, seed=seed, dtype=f64)
    model = Scored(lambda x, w: x @ w, w.tolist())
    drop = w @ (x - sam_at.pgd(model, x, ONE, eps, "l2", random_start=False))[0]
    assert drop.allclose(eps * w.norm())
    sam_at.gradient(model, x, ONE)
    with sam_at.perturbed(model, float(eps * w.norm() / x.norm())):
        assert (w - model.w).dot(x[0]).allclose(drop)

# == 3. The three training steps =======================================================================
SAM = partial(sam_at.sam_step, rho=0.5)
AT = partial(sam_at.at_step, eps=0.05, steps=3)
STEPS = {  # name: the step, its passes, and which of them gives the logits that it returns
    "sgd": (sam_at.sgd_step, 1, 0), "sam": (SAM, 2, 0), "esam": (partial(sam_at.esam_step, rho=0.5), 3, 0),
    "asam": (partial(SAM, ascend=sam_at.adaptive_ascent), 2, 0), "at": (AT, 4, 3), "sam+at": (partial(AT, step=SAM), 5, 3),
}
steps = pytest.mark.parametrize("step, passes, first", STEPS.values(), ids=STEPS)

@given(seeds, st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.sampled_from([0, -1]))
def test_sam_is_its_formula(seed, lr, rho, first):
    """w - lr g(w + rho g/|g|). The ball is over the optimizer's weights alone: the others stay, for the passes, too."""
    model, twin = tiny_net(seed, dtype=f64), tiny_net(seed, dtype=f64)
    x, y = batch(6, seed=seed, dtype=f64)
    trained, theirs = list(model.net[first:].parameters()), list(twin.net[first:].parameters())
    before, rest = weights_of(model), 4 - len(trained) + 2
    sam_at.sam_step(model, x, y, torch.optim.SGD([{"params": [w]} for w in trained], lr), rho)
    g = torch.autograd.grad(F.cross_entropy(twin(x), y), theirs)
    for w, gi in zip(theirs, g):
        w.data += rho * gi / length(g)
    g = torch.autograd.grad(F.cross_entropy(twin(x), y), theirs)
    for w, old, gi in zip(trained, before[rest:], g):
        assert w.allclose(old - lr * gi, atol=1e-10)
    assert same_bits(weights_of(model)[:rest], before[:rest])

def test_sam_takes_another_ascent():
    """Loss 1 + w^2/2 at w = 3, moved by -1: its gradient 2 is applied at 3."""
    model = loss_of(lambda w: 1 + w.square().sum() / 2, [3.0])
    sam_at.sam_step(model, GREY, ZERO, sgd(model), 1.0, ascend=lambda weights, grads, rho: [-grads[0] / 3 * rho])
    assert model.w.item() == pytest.approx(3 - 0.1 * 2)

def several(step):
    """Three steps of an optimizer with momentum and weight decay."""
    def action(model):
        torch.manual_seed(0)
        optimizer = sgd(model, momentum=0.9, weight_decay=5e-4)
        for _ in range(3):
            step(model, *batch(6), optimizer)
    return action

@pytest.mark.parametrize("one, other", [
    (partial(sam_at.sam_step, rho=0.0), sam_at.sgd_step),
    (partial(sam_at.esam_step, rho=0.5, beta=1.0, gamma=1.0), SAM),
    (partial(sam_at.at_step, eps=0.0), sam_at.sgd_step)])
def test_steps_that_are_the_same(one, other):
    for a, b in zip(after(several(one)), after(several(other))):
        assert a.allclose(b, atol=1e-6)

@pytest.mark.parametrize("norm, steps, step_size, step", [
    ("linf", 5, 0.025, sam_at.sgd_step), ("l2", 2, 0.025, SAM), ("linf", 1, 0.125, sam_at.sgd_step)])
def test_at_steps_on_attacked_images(norm, steps, step_size, step):
    """Steps of eps/4; one alone goes 1.25 eps."""
    def by_hand(model, x, y, optimizer):
        return step(model, sam_at.pgd(model, x, y, 0.1, norm, steps, step_size), y, optimizer)
    ours = partial(sam_at.at_step, eps=0.1, norm=norm, steps=steps, step=step)
    assert same_bits(after(several(ours)), after(several(by_hand)))

@steps
@given(seed=seeds)
def test_gradients_that_lay_around_do_not_count(step, passes, first, seed):
    def action(junk, model):
        for w in model.parameters():
            w.grad = normal(*w.shape, seed=1) if junk else None
        torch.manual_seed(seed)
        step(model, *batch(6, seed=seed), sgd(model))
    assert same_bits(after(partial(action, True), seed), after(partial(action, False), seed))

@steps
def test_a_step_takes_its_passes_and_returns_the_loss_and_logits_of_its_first_gradient(step, passes, first):
    model, (x, y), seen = tiny_net(), batch(6), []
    model.register_forward_hook(lambda module, args, logits: seen.append(logits.detach()))
    loss, logits = step(model, x, y, sgd(model))
    assert len(seen) == passes and logits.equal(seen[first])
    assert loss.allclose(F.cross_entropy(logits, y)) and not loss.requires_grad and not logits.requires_grad

@pytest.mark.parametrize("step", [SAM, partial(sam_at.at_step, eps=0.01)])
def test_the_steps_train_a_segmentation_network(step):
    """Logits (N, C, H, W) and labels (N, H, W): which pixels are bright?"""
    x = uniform(8, 3, 6, 6, seed=0)
    y = (x.mean(1) > 0.5).long()
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 1)
    for _ in range(60):
        step(model, x, y, sgd(model, lr=1.0))
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    x_adv = sam_at.pgd(model, x, y, 0.3, stop_when_fooled=True)
    assert (model(x_adv).argmax(1) == y).float().mean() < 0.3 and inside(x_adv, x, 0.3)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, tokens):
        return self.linear(self.embedding(tokens).mean(1))

def test_sam_trains_a_text_classifier():
    """Sentences of 6 tokens below 10 or from 10 on."""
    torch.manual_seed(0)
    model, y = Words(), torch.arange(40) % 2
    tokens = torch.randint(10, (40, 6)) + 10 * y[:, None]
    for _ in range(30):
        sam_at.sam_step(model, tokens, y, sgd(model, lr=1.0), rho=0.05)
    assert (model(tokens).argmax(1) == y).float().mean() > 0.9

# == 4. The networks ===================================================================================
@pytest.mark.parametrize("name, parameters", [
    ("prn18", 11_172_170), ("wrn28_10", 36_479_194), ("deit_ti", 5_392_714)])
def test_the_networks_have_their_papers_size(name, parameters):
    """DeiT-Ti: 12 layers of 444,864, patches 2,496, class token 192, 257 positions 49,344, norm 384, head 1,930."""
    with torch.device("meta"):
        model = sam_at.MODELS[name](10)
    assert sum(w.numel() for w in model.parameters()) == parameters

def test_prn18_halves_the_image_three_times_and_pools_by_the_mean():
    model, seen = sam_at.make_model("prn18", 10, width=4), []
    for block in model.net:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    model(uniform(1, 3, 32, 32, seed=0))
    shapes = [tuple(out.shape[1:3]) for out in seen[:9]]
    assert shapes == [(4, 32)] * 3 + [(8, 16)] * 2 + [(16, 8)] * 2 + [(32, 4)] * 2
    assert seen[10].min() >= 0 and seen[12].allclose(seen[10].mean((2, 3)), atol=1e-6)

@pytest.mark.parametrize("c_in, c_out, stride", [(3, 3, 1), (3, 5, 1), (3, 5, 2), (4, 4, 2)])
def test_a_preactivation_block_is_its_formula(c_in, c_out, stride):
    torch.manual_seed(0)
    block, x = sam_at.PreActBlock(c_in, c_out, stride).eval(), normal(2, c_in, 8, 8, seed=0)
    h = F.relu(block.bn1(x))
    branch = F.conv2d(h, block.conv1.weight, stride=stride, padding=1)
    branch = F.conv2d(F.relu(block.bn2(branch)), block.conv2.weight, padding=1)
    skip = x if (c_in, 1) == (c_out, stride) else F.conv2d(h, block.shortcut.weight, stride=stride)
    assert block(x).allclose(skip + branch, atol=1e-5)

@pytest.mark.parametrize("name, width", [("prn18", 4), ("small", 4), ("wrn28_10", 1), ("deit_ti", 6)])
def test_in_eval_mode_an_images_logits_do_not_depend_on_its_batch(name, width):
    model, x = sam_at.make_model(name, 7, width=width).eval(), uniform(3, 3, 32, 32, seed=0)
    with torch.no_grad():
        assert model(x).shape == (3, 7)
        assert model(x)[1:2].allclose(model(x[1:2]), atol=1e-4)

@given(seeds)
def test_normalisation_is_inside_and_bf16_for_training_alone(seed):
    mean, std, x = uniform(3, seed=seed), 0.1 + uniform(3, seed=seed + 1), uniform(2, 3, 32, 32, seed=seed)
    model = sam_at.make_model("small", 3, (mean.tolist(), std.tolist()), width=4).eval()
    with torch.no_grad():
        exact = model(x)
        assert exact.allclose(model.net((x - mean.view(3, 1, 1)) / std.view(3, 1, 1)), atol=1e-4)
        model.bf16 = True
        assert model(x).equal(exact)
        rounded, model.bf16 = model.train()(x), False
    assert rounded.dtype == torch.float32 and not rounded.equal(model(x)) and rounded.allclose(model(x), atol=0.3)

def test_the_papers_statistics_and_initial_values():
    model = sam_at.make_model("prn18", 10, width=1)
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert model.std.flatten().tolist() == pytest.approx([0.2471, 0.2435, 0.2616])
    net = sam_at.make_model("deit_ti", 10, width=48).net
    assert net.encoder.layers[0].self_attention.num_heads == 3
    assert net.conv_proj.weight.std().item() == pytest.approx(1 / 6, rel=0.1)  # uniform within 1/sqrt 12
    assert net.heads.head.weight.std().item() == pytest.approx(0.02, rel=0.1)

# == 5. Data ===========================================================================================
def tiny_data(n=24, classes=3, seed=0, size=32):
    """Random images, each with a label: to be learnt by heart. Test images are others than the training images."""
    x, y = (255 * uniform(2 * n, 3, size, size, seed=seed)).byte(), torch.arange(2 * n) % classes
    return sam_at.Data(x[:n], y[:n], x[n:], y[n:], classes, "tiny", augment=False)

def images_of(x):
    return [tuple(image.flatten().tolist()) for image in x]

def test_crop_and_flip_takes_every_crop_of_the_reflected_image_equally():
    """324 outcomes (2 images, 81 shifts, mirrored or not), 40,000 draws: chi-squared is below 420."""
    torch.manual_seed(0)
    x = torch.arange(2 * 3 * 11 * 12.0).view(2, 3, 11, 12)
    out = sam_at.crop_and_flip(x.repeat(20_000, 1, 1, 1)).flatten(1)
    found, counts = out.unique(dim=0, return_counts=True)
    crops = F.pad(x, (4, 4, 4, 4), mode="reflect").unfold(2, 11, 1).unfold(3, 12, 1)
    crops = crops.permute(0, 2, 3, 1, 4, 5).reshape(162, 3, 11, 12)
    assert found.equal(torch.cat([crops, crops.flip(3)]).flatten(1).unique(dim=0))
    assert out[0].min() < 396 <= out[1].min()  # each image in its place
    assert ((counts - 40_000 / 324) ** 2).sum() < 420 * 40_000 / 324

@given(seeds, st.integers(1, 30), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_an_epoch_meets_every_image_once(monkeypatch, seed, n, batch_size, world):
    """Processes share each batch equally, and what cannot be shared is left out."""
    data, met = tiny_data(n, seed=seed, size=4), []
    monkeypatch.setattr(sam_at, "WORLD", world)
    for rank in range(world):
        monkeypatch.setattr(sam_at, "RANK", rank)
        torch.manual_seed(seed)
        for x, y in sam_at.batches(data, batch_size):
            assert 0 < len(x) <= batch_size
            met += zip(images_of(x), y.tolist())
    whole, rest = divmod(n, batch_size)
    assert len(met) == len(set(met)) == (whole * (batch_size // world) + rest // world) * world
    assert set(met) <= set(zip(images_of(data.x / 255), data.y.tolist()))

def test_images_are_shuffled_and_augmented_where_that_is_asked_for():
    data = tiny_data(8, size=8)
    originals = images_of(data.x / 255)
    for data.augment in False, True:
        torch.manual_seed(0)
        met = [image for x, _ in sam_at.batches(data, 3) for image in images_of(x)]
        kept = sum(image in originals for image in met)
        assert met != originals and (kept < 4 if data.augment else kept == 8)

def test_images_of_floats_are_pixels_already():
    data = tiny_data()
    data.x = data.x / 255
    assert next(sam_at.batches(data, 24))[0].max() > 0.99

# == 6. The training loop ==============================================================================
def test_the_learning_rate_of_the_papers_recipe():
    optimizer, schedule = sam_at.make_optimizer(tiny_net(), 0.1, 100)
    group = optimizer.param_groups[0]
    for rate in [0.1] * 75 + [0.01] * 15 + [0.001] * 10:
        assert group["lr"] == pytest.approx(rate)
        optimizer.step()
        schedule.step()
    assert (group["momentum"], group["weight_decay"], group["nesterov"], group["dampening"]) == (0.9, 5e-4, False, 0)

def test_a_row_of_training_holds_averages_over_images():
    """Batches of 9, 9 and 2; a stand-in whose loss is the size of the batch, and which always says class 0."""
    def step(model, x, y, optimizer):
        assert model.training
        optimizer.step()
        return torch.tensor(float(len(y))), F.one_hot(0 * y, 3).float()
    model = tiny_net().eval()
    optimizer, schedule = sam_at.make_optimizer(model, 0.1, 3)
    rows = list(sam_at.train(model, tiny_data(20, size=4), step, optimizer, schedule, 3, 9))
    assert [row["epoch"] for row in rows] == [1, 2, 3] and optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert rows[1]["loss"] == (81 + 81 + 4) / 20 and rows[1]["accuracy"] == 35 and 0 < rows[1]["seconds"] < 99

@pytest.mark.parametrize("step", [
    partial(sam_at.sam_step, rho=0.02), partial(sam_at.at_step, eps=0.002), partial(sam_at.esam_step, rho=0.02)])
def test_every_method_learns_a_tiny_set_by_heart(step):
    torch.manual_seed(0)
    data, model = tiny_data(24), sam_at.make_model("small", 3, width=8)
    *_, last = sam_at.train(model, data, step, *sam_at.make_optimizer(model, 0.05, 25), 25, 8)
    assert last["accuracy"] == 100
    assert sam_at.evaluate(model, data.x, data.y, ()) == {"clean": 100}

# == 7. Evaluation =====================================================================================
def linear_task(seed, n=60):
    """A linear model, and images away from the border of [0,1] that it classifies with small margins, some wrongly."""
    w = normal(12, seed=seed, dtype=f64)
    x = 0.5 + 0.05 * normal(n, 3, 2, 2, seed=seed + 1, dtype=f64).clamp(-3, 3)
    model = linear(w.tolist())
    score = model(x)[:, 1].detach()
    y = (score + 0.1 * normal(n, seed=seed + 2) > 0).long()
    return model, x, y, score * (2 * y - 1), w

@given(seeds, norms, st.floats(0.001, 0.1), st.integers(1, 70))
def test_robust_accuracy_of_a_linear_model_is_the_closed_form(seed, norm, eps, batch_size):
    """An image withstands eps if its margin exceeds eps * |w|_q, q dual to p. The next attack begins anew."""
    model, x, y, margin, w = linear_task(seed)
    threshold = eps * float(w.abs().sum() if norm == "linf" else w.norm())
    assume((margin - threshold).abs().min() > 1e-4)
    found = sam_at.evaluate(model, x, y, [f"{norm} {eps}", "linf 0"], steps=40, batch_size=batch_size)
    wanted = [100 * float((margin > least).double().mean()) for least in (0, threshold, 0)]
    assert list(found.values()) == pytest.approx(wanted)

def blind(wrong):
    """A model with a gradient of 0 that takes images for class 1 where wrong(x) holds."""
    return Scored(lambda x, w: wrong(x).double() - 0.5 + 0 * x.sum((1, 2, 3)))

@pytest.mark.parametrize("attack", ["linf 0.02", lambda model, x, y: x + 0.04 * torch.rand_like(x) - 0.02])
def test_every_attack_has_each_of_its_starts(attack):
    """A third of the ball is wrong, and no gradient leads there."""
    model, x = blind(lambda x: x.mean((1, 2, 3)) > 0.5 + 0.02 / 3), torch.full((400, 1, 1, 1), 0.5)
    attacks = [attack] if isinstance(attack, str) else {"mine": attack}
    for restarts in 1, 2, 4:
        _, robust = sam_at.evaluate(model, x, torch.zeros(400).long(), attacks, restarts=restarts).values()
        assert robust == pytest.approx(100 * (2 / 3) ** restarts, abs=10)

def test_attacks_take_their_steps_on_what_is_right():
    model, x, y, margin, _ = linear_task(1)
    assert list(sam_at.evaluate(model, x, y)) == ["clean", "linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255"]
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    sam_at.evaluate(model, x, y, ["linf 0.000001"], steps=7)
    assert calls == [60, 60] + [int((margin > 0).sum())] * 8

def test_an_attack_may_take_gradients_and_leave_the_model_in_training_mode():
    def attack(model, x, y):
        assert torch.is_grad_enabled() and not model.training
        model.train()
        return x
    model, (x, y) = tiny_net(), batch(17)
    model.net[1].eval()
    before = all_of(model)
    figures = sam_at.evaluate(model, (x * 255).byte(), y, {"a": attack, "b": attack}, batch_size=5)
    assert same_bits(before, all_of(model))
    clean = (model.eval()((x * 255).byte() / 255).argmax(1) == y).float().mean()
    assert list(figures.values()) == pytest.approx([100 * float(clean)] * 3)

def shaped(*logits_shape):
    """A linear model whose logits have another shape."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, math.prod(logits_shape)), nn.Unflatten(1, logits_shape))

def further(model, x, y, eps, norm="linf"):
    return (x + 1.5 * eps).clamp(0, 1)

@pytest.mark.parametrize("wrong", [
    {"model": shaped(1), "labels": 0 * LABELS}, {"model": shaped(10, 1)}, {"labels": LABELS + 1}, {"labels": LABELS - 1},
    {"labels": LABELS[:, None]}, {"labels": LABELS.float()}, {"labels": LABELS[:2]}, {"labels": LABELS.repeat(2)},
    {"images": 255 * IMAGES}, {"images": IMAGES - 0.5}, {"images": IMAGES.long()}, {"restarts": 0},
    {"attacks": ["linf"]}, {"attacks": {"clean": sam_at.fgsm}}, {"attacks": {"mine": lambda model, x, y: x[:1]}},
    {"attacks": {"mine": lambda model, x, y: x * math.nan}}, {"attacks": {"mine": lambda model, x, y: x + 1}},
    {"attacks": {"mine": partial(further, eps=0.1)}}, {"attacks": {"mine": partial(further, eps=0.1, norm="l2")}}])
def test_evaluate_refuses_what_makes_no_sense(wrong):
    sound = {"model": tiny_net().eval(), "images": IMAGES, "labels": LABELS, "attacks": (), "batch_size": 3}
    sound["labels"] = sound["model"](IMAGES).argmax(1)  # all are right, so all are attacked
    with pytest.raises(sam_at.BadInput):
        sam_at.evaluate(**{**sound, **wrong})

@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("distance", [-1, 0])
def test_logits_that_are_not_finite_are_an_error(broken, distance):
    """On clean images or under attack alone: argmax would call them class 0."""
    def score(x, w):
        far = (x - 0.5).flatten(1).abs().amax(1) > distance
        return torch.where(far, broken, -1.0) + 0 * x.sum((1, 2, 3))
    with pytest.raises(FloatingPointError, match="finite"):
        sam_at.evaluate(Scored(score), torch.full((4, 1, 2, 2), 0.5), torch.zeros(4).long(), ["linf 0.1"])

# == 8. Where the data comes from ======================================================================
def save(path, colour, size=(32, 32), mode="RGB"):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)

def make_folder(root, size=(32, 32)):
    """Two images of each of two classes in each part; blue tells the parts apart."""
    for c, name in enumerate(["cat", "dog"]):
        for i in range(2):
            save(root / "train" / name / f"{i}.png", (80 * c, 60, 20 * i), size)
            save(root / "test" / name / f"{i}.png", (80 * c, 60, 100 + 20 * i), size)
    return root

def test_a_folder_is_read_class_by_class(tmp_path, capsys):
    data = sam_at.load_data("folder", make_folder(tmp_path / "pets", size=(20, 50)))
    assert data.x.shape == (4, 3, 32, 32) and data.x.dtype == torch.uint8
    assert data.y.tolist() == data.y_test.tolist() == [0, 0, 1, 1]
    assert data.x[:, :, 5, 5].tolist() == [[c, 60, i] for c in (0, 80) for i in (0, 20)]
    assert data.x_test[:, 2, 5, 5].tolist() == [100, 120, 100, 120]
    assert (data.classes, data.source, data.augment) == (2, "pets", True)
    assert "resized to 32x32" in capsys.readouterr().out

@pytest.mark.parametrize("spoil, says", [
    (lambda root: shutil.rmtree(root / "train"), "--data-dir"),
    (lambda root: (root / "test" / "cat").rename(root / "test" / "cow"), "cow"),
    (lambda root: [shutil.rmtree(root / part / "dog") for part in ("train", "test")], "two or more"),
    (lambda root: [save(root / part / ".hidden" / "0.png", 0) for part in ("train", "test")], "hidden"),
    (lambda root: (root / "train" / "dog" / "1.png").write_bytes(b"no image"), "1.png"),
    (lambda root: save(root / "test" / "dog" / "1.png", 40_000, mode="I;16"), "8 bits")])
def test_a_folder_that_cannot_be_used_is_refused_by_name(spoil, says, tmp_path):
    spoil(make_folder(tmp_path))
    with pytest.raises(sam_at.BadInput, match=says):
        sam_at.load_folder(tmp_path)

def test_tiny_imagenet_as_it_unpacks(tmp_path):
    listed = tmp_path / "val" / "val_annotations.txt"
    for i, (wnid, grey) in enumerate([("n02", 200), ("n01", 100)]):
        save(tmp_path / "train" / wnid / "images" / f"{wnid}_0.png", grey, (64, 64), "L")
        save(tmp_path / "val" / "images" / f"val_{i}.png", grey + 5, (64, 64), "L")
    listed.write_text("val_0.png\tn02\t0\t0\t62\t62\nval_1.png\tn01\t0\t0\t62\t62\n")
    data = sam_at.load_data("tiny-imagenet", tmp_path)
    assert data.y.tolist() == [0, 1] and data.x[:, 0, 0, 0].tolist() == [100, 200]
    assert data.y_test.tolist() == [1, 0] and data.x_test[:, 0, 0, 0].tolist() == [205, 105]
    listed.write_text("val_0.png\tn09\t0\n")
    with pytest.raises(sam_at.BadInput):
        sam_at.load_folder(tmp_path)

@pytest.mark.parametrize("name, folder, key, parts", [
    ("cifar10", "cifar-10-batches-py", "labels", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]),
    ("cifar100", "cifar-100-python", "fine_labels", ["train", "test"])])
def test_cifar_as_downloaded(name, folder, key, parts, tmp_path, monkeypatch):
    """Pickled batches in the real layout, read by torchvision; only its checksums are put aside."""
    from torchvision.datasets import cifar
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *given, **options: open("no network"))
    with pytest.raises(sam_at.BadInput, match=f"{name}.*--dataset demo.*no network"):
        sam_at.load_data(name, tmp_path)
    monkeypatch.setattr(cifar, "check_integrity", lambda *given: True)
    monkeypatch.setattr(cifar.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", ["a", "b", "c"]))
    (tmp_path / folder).mkdir()
    made = [(255 * uniform(4, 3, 32, 32, seed=i)).byte() for i in range(len(parts))]
    for i, part in enumerate(parts):
        content = {"data": made[i].flatten(1).numpy(), key: [i % 3, 0, 1, 2]}
        (tmp_path / folder / part).write_bytes(pickle.dumps(content))
    data = sam_at.load_data(name, tmp_path)
    assert data.x.equal(torch.cat(made[:-1])) and data.x_test.equal(made[-1])
    assert data.y[:4].tolist() == [0, 0, 1, 2] and data.y_test[0] == (len(parts) - 1) % 3
    assert (data.classes, data.source, data.augment) == (3, name, True)

def test_the_demos_test_images_are_others_and_its_random_numbers_its_own():
    torch.manual_seed(1)
    data, before = sam_at.demo_data(64, 40), torch.get_rng_state()
    assert before.equal(torch.Generator().manual_seed(1).get_state()) and not data.augment
    assert len(set(images_of(data.x) + images_of(data.x_test))) == 104 == len(data.x) + len(data.x_test)
    assert data.x.equal(sam_at.demo_data(64, 40).x) and set(data.y.tolist()) == set(range(data.classes))

@pytest.mark.parametrize("module, use", [
    ("pyautoattack", lambda: sam_at.parse_attack("autoattack linf 8/255")),
    ("torchvision.datasets", lambda: sam_at.load_data("cifar10", "data"))])
def test_a_missing_library_is_named_with_its_pip_command(module, use, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(sam_at.BadInput, match=f"^pip install {module.split('.')[0]}.*$"):
        use()

# == 9. Attacks by name ================================================================================
@given(st.floats(1e-9, 0.99), st.integers(1, 500), st.floats(0.01, 0.9))
def test_an_attacks_name_holds_its_norm_and_radius(eps, steps, numerator):
    assert sam_at.radius(repr(eps)) == eps and sam_at.radius(f"{numerator}/255") == numerator / 255
    attack = sam_at.parse_attack(f"margin l2 {eps!r}", steps).keywords
    assert (attack["eps"], attack["norm"], attack["steps"]) == (eps, "l2", steps)

@pytest.mark.parametrize("text", ["", "linf", "linf x", "linf 1/0", "linf 8", "l2 8", "fgsm 8", "l7 1/255", "linf nan",
                                  "linf -0.1", "linf 0.1 0.2", "margin 1/255", "autoattack 1/255"])
def test_an_attack_that_no_name_fits_is_refused(text):
    with pytest.raises(sam_at.BadInput):
        sam_at.parse_attack(text)

@given(seeds, st.floats(0.001, 0.1))
def test_fgsm_is_one_full_step(seed, eps):
    model, x, y, _, w = linear_task(seed)
    sign = ((1 - 2 * y)[:, None] * w.sign()).view_as(x)
    assert sam_at.parse_attack(f"fgsm {eps!r}")(model, x, y).allclose((x + eps * sign).clamp(0, 1), atol=1e-9)

def test_the_margin_attacks_where_softmax_is_exactly_one():
    model, logits = Scored(lambda x, w: 1e5 * (x.mean((1, 2, 3)) - 0.5)), torch.tensor([[1.0, 3, 2], [9, 4, 2]])
    assert sam_at.negative_margin(logits, torch.tensor([2, 0])) == (3 - 2) + (4 - 9)
    found = sam_at.evaluate(model, GREY - 0.02, ZERO, ["linf 0.05", "margin linf 0.05", "margin l2 0.2"])
    assert list(found.values()) == [100, 100, 0, 0]

@pytest.mark.parametrize("norm, eps", [("linf", 0.03), ("l2", 0.15)])
def test_autoattack_is_never_above_pgd(norm, eps):
    pytest.importorskip("pyautoattack")
    model, x = tiny_net(classes=10).eval(), uniform(30, 3, 5, 5, seed=0)
    before = all_of(model)
    _, auto, pgd = sam_at.evaluate(model, x, model(x).argmax(1), [f"autoattack {norm} {eps}", f"{norm} {eps}"]).values()
    assert auto <= pgd < 100 and same_bits(before, all_of(model))
    with pytest.raises(sam_at.BadInput, match="ten classes"):
        sam_at.evaluate(tiny_net(), *batch(8), [f"autoattack {norm} {eps}"])

class Noisy(Scored):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(len(x), 2)

class Batchwise(Scored):
    """BatchNorm without running statistics."""
    def forward(self, x):
        return super().forward(x) + x.mean()

class NoisyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.randn_like(g)

def honest(x, w=None):
    return 0.45 - x.mean((1, 2, 3))

DOUBTS = {  # a model, and what is said of it, with its percent
    "sound": (Scored(honest), None, 0),
    "sure": (Scored(lambda x, w: 3e4 * (0.48 - x.mean((1, 2, 3)))), "margin linf 8/255, 9 steps, another start", 6),
    "slow": (Scored(lambda x, w: 0.49 - x.flatten(1).amax(1)), "l2 0.1, 50 steps, another start", 3),
    "flat": (Scored(lambda x, w: honest(x).clamp(min=0)), "the gradient is zero or NaN", 6),
    "broken": (Scored(lambda x, w: honest(x) + (0 * x.sum((1, 2, 3))).sqrt()), "the gradient is zero or NaN", 100),
    "random": (Noisy(honest), "the logits depend on the batch", 100),
    "batch": (Batchwise(honest), "the logits depend on the batch", 100),
    "noise": (Scored(lambda x, w: honest(NoisyBackward.apply(x))), "two gradients disagree", 100),
}

@pytest.mark.parametrize("model, reason, points", DOUBTS.values(), ids=DOUBTS)
def test_an_evaluation_that_is_not_to_be_trusted_is_called_so(model, reason, points):
    """By 200 images, evenly spaced, of which 6% are near the other class."""
    x, sizes = 0.5 + 0.002 * normal(500, 3, 2, 2, seed=0), []
    x[:470] -= 0.1
    model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    found = sam_at.doubts(model, x, (torch.arange(500) < 470).long(), ["linf 8/255", "l2 0.1", "margin l2 1/2"], 9, 2)
    assert len(found) == 7 and max(sizes) == 200 and model.training
    if reason is None:
        assert max(found.values()) <= 1
    else:
        assert found[reason] == pytest.approx(points, abs=3.5) and found[reason] > 1

@pytest.mark.parametrize("n, length, chosen", [
    (3, 9, [0, 3, 6]), (3, 10, [0, 3, 6]), (2, 3, [0, 1]), (4, 4, [0, 1, 2, 3]), (9, 2, [0, 1])])
def test_some_images_are_evenly_spaced_ones(n, length, chosen):
    images, labels = sam_at.evenly_spaced(n, torch.arange(length), -torch.arange(length))
    assert images.tolist() == chosen and labels.equal(-images)

# == 10. Variants ======================================================================================
@given(seeds, st.floats(0.01, 5), st.sampled_from([0.01, 0.0, 0.1]))
def test_asam_and_awp_are_their_formulas(seed, rho, eta):
    """ASAM: v = rho T^2 g/|T g|, T = |w| + eta. AWP: a layer moves by rho |w| along its gradient."""
    model = tiny_net(seed, dtype=f64)
    sam_at.gradient(model, *batch(6, seed=seed, dtype=f64))
    weights = list(model.parameters())
    T = [w.detach().abs() + eta if w.ndim > 1 else torch.ones_like(w) for w in weights]
    size = length(t * w.grad for t, w in zip(T, weights))
    asam = partial(sam_at.adaptive_ascent, eta=eta) if eta != 0.01 else sam_at.adaptive_ascent
    for w, t, v in zip(weights, T, ascended(weights, rho, asam)):
        assert v.allclose(t * t * w.grad * rho / size, atol=1e-9)
    for w, v in zip(weights, ascended(weights, rho, sam_at.layerwise_ascent)):
        assert v.allclose((w.ndim > 1) * rho * w.norm() * w.grad / w.grad.norm(), atol=1e-9)

@given(seeds, st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 9), st.floats(0.01, 0.3))
def test_esam_descends_for_those_who_suffer(seed, beta, gamma, n, rho):
    """Some tensors climb, together by rho/beta; the share gamma of images counts whose loss rose most there."""
    model, twin = tiny_net(seed, batchnorm=False, dtype=f64), tiny_net(seed, batchnorm=False, dtype=f64)
    (x, y), before, seen = batch(n, seed=seed, dtype=f64), weights_of(model), []
    model.register_forward_pre_hook(lambda module, args: seen.append((args[0], weights_of(model))))
    sam_at.esam_step(model, x, y, sgd(model), rho, beta, gamma)
    old = F.cross_entropy(twin(x), y, reduction="none")
    old.mean().backward()
    v = [there - w for there, w in zip(seen[1][1], before)]
    climbing = length(w.grad for w, move in zip(twin.parameters(), v) if move.any())
    for w, move in zip(twin.parameters(), v):
        assert not move.any() or move.allclose(w.grad * rho / beta / climbing, atol=1e-9)
        w.data += move
    rise = F.cross_entropy(twin(x), y, reduction="none") - old
    kept = torch.tensor([any(image.equal(other) for other in seen[2][0]) for image in x])
    assert kept.sum() == math.ceil(gamma * n) and (kept.all() or rise[kept].min() >= rise[~kept].max() - 1e-12)
    sam_at.gradient(twin, x[kept], y[kept])
    for w, old, t in zip(model.parameters(), before, twin.parameters()):
        assert w.allclose(old - 0.1 * t.grad, atol=1e-9)

def test_esam_is_for_half_the_weights():
    """A frozen weight never climbs; if none of the other three is drawn, one of them does."""
    model, seen = tiny_net(batchnorm=False), []
    model.net[0].weight.requires_grad_(False)
    before = weights_of(model)
    model.register_forward_pre_hook(lambda module, args: seen.append(weights_of(model)))
    for _ in range(400):
        sam_at.esam_step(model, *batch(4), sgd(model, 0.0), 0.01)
    climbs = [not there.equal(w) for weights in seen[1::3] for there, w in zip(weights, before)]
    assert sum(climbs) / 1200 == pytest.approx(13 / 24, abs=0.04)

# == 11. The simplified model ==========================================================================
GRID = torch.linspace(0, 30, 300_001, dtype=f64)

def accuracy(w, p, eta, n):
    """A(w), w a tensor."""
    Phi, root = torch.special.ndtr, math.sqrt(n)
    return p * Phi((w + eta * n) / root) + (1 - p) * Phi((eta * n - w) / root)

def searched(p, eta, n, rho=0.0):
    """The w whose worst accuracy within rho is best."""
    worst = torch.minimum(accuracy(GRID - rho, p, eta, n), accuracy(GRID + rho, p, eta, n))
    return float(GRID[worst.argmax()])

@given(st.floats(0.6, 0.9), st.floats(0.3, 0.6), st.integers(4, 12), st.floats(0, 0.5))
def test_the_closed_forms_of_the_simplified_model(p, eta, n, share):
    """Standard training ln(p/(1-p))/(2 eta); AT the same with eta - eps, so first order in eps; SAM w (1 + rho^2/(3n)),
    so second order in rho. Both end alike where eta/eps = 1 + 3n/rho^2."""
    w = math.log(p / (1 - p)) / (2 * eta)
    assert searched(p, eta * (1 - share), n) == pytest.approx(w / (1 - share), abs=2e-4)
    for rho in 0.4 * math.sqrt(n), 0.8 * math.sqrt(n):
        assert abs(searched(p, eta, n, rho) - w * (1 + rho ** 2 / (3 * n))) < 0.1 * w * (rho ** 2 / n) ** 2 + 2e-4
    eps = eta / (1 + 3 * n / 0.04)
    assert searched(p, eta, n, 0.2) == pytest.approx(searched(p, eta - eps, n), abs=3e-4)

class OneWeight(nn.Module):
    """That classifier, p 0.9 and n 10, as a network. Its image holds the mean values of the n features, eta each, as
    pixels 1/2 + eta/40, and its cross-entropy at label 0 is 2 - A(w)."""
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.7], dtype=f64))

    def forward(self, x):
        loss = 2 - accuracy(self.w, 0.9, 40 * (x - 0.5).mean(1), 10)
        return torch.stack([torch.zeros_like(loss), loss.expm1().log()], 1)

def to_the_worse(weights, grads, rho):
    """SAM's exact maximum for a single weight: the worse of w - rho and w + rho."""
    w = weights[0]
    down = accuracy(w - rho, 0.9, 0.5, 10) < accuracy(w + rho, 0.9, 0.5, 10)
    return [torch.full_like(w, -rho if down else rho)]

@pytest.mark.parametrize("step, end", [
    (sam_at.sgd_step, searched(0.9, 0.5, 10)),
    (partial(sam_at.at_step, eps=0.05 / 40, steps=8), searched(0.9, 0.45, 10)),
    (partial(sam_at.sam_step, rho=1.0, ascend=to_the_worse), searched(0.9, 0.5, 10, 1.0)),
    (partial(sam_at.sam_step, rho=1.0), searched(0.9, 0.5, 10))])  # along the gradient it climbs the wrong side
def test_the_steps_train_the_one_weight_to_the_same_place(step, end):
    model, x = OneWeight(), torch.full((1, 10), 0.5 + 0.5 / 40, dtype=f64)
    for k in range(200):
        step(model, x, ZERO, sgd(model, lr=30 / (1 + k / 3)))
    assert model.w.item() == pytest.approx(end, rel=0.01)

# == 12. The duality, measured =========================================================================
@settings(max_examples=6)
@given(seeds)
def test_rises_are_those_of_the_ascent_and_of_pgd(seed):
    """To first order: rho |dL/dw|, and eps |dL/dx| in the dual norm, image by image. The model stays as it was."""
    model, (x, y) = tiny_net(seed, dtype=f64), batch(8, seed=seed, dtype=f64)
    model.net[-1].weight.data /= 30  # so that the loss is nearly linear
    before = weights_of(model)
    rises = sam_at.sharpness(model, x, y)
    assert model.training and same_bits(before, weights_of(model))
    model.zero_grad()
    F.cross_entropy(model.eval()(x.requires_grad_()), y).backward()
    steepness, g = length(w.grad for w in model.parameters()), x.grad.flatten(1)
    assert list(rises) == ["rho 0.05", "rho 0.1", "rho 0.2", *sam_at.ATTACKS]
    assert rises["rho 0.05"] == pytest.approx(0.05 * steepness, rel=0.15) and rises["rho 0.2"] > 3 * rises["rho 0.05"]
    assert rises["linf 1/255"] == pytest.approx(float(g.abs().sum()) / 255, rel=0.1)
    assert rises["l2 16/255"] == pytest.approx(16 / 255 * float(g.norm(dim=1).sum()), rel=0.1)

# == 13. The command line ==============================================================================
def cli(*argv):
    """main() in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = sam_at.main([str(word) for word in argv])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

QUICK = "--method sgd --width 2 --epochs 2 --batch-size 16 --attacks".split() + ["linf 2/255", "--eval-steps", 1]

@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sam_at, "demo_data", partial(sam_at.demo_data, n_train=64, n_test=40))
    monkeypatch.setattr(sam_at, "doubts", lambda *_: {"the moon is full": 12.5, "the sun": 1.0})

@pytest.fixture
def seen(monkeypatch):
    """What reaches data, training and evaluation, as lists of calls; nothing is trained or measured."""
    results = {
        "load_data": lambda *_: tiny_data(200),
        "train": lambda *_: [{"epoch": 1, "loss": 1.0, "accuracy": 50.0, "seconds": 1.0}],
        "right_images": lambda *_: torch.tensor([True, False]),
        "doubts": lambda *_: {},
        "compile": lambda model, dynamic: nn.Sequential(model),
    }
    calls = Namespace(**{name: [] for name in results})
    def stand_in(name, *given, **options):
        getattr(calls, name).append(Namespace(given=given, drawn=float(torch.rand(())), **options))
        return results[name](*given, **options)
    for name in results:
        monkeypatch.setattr(torch if name == "compile" else sam_at, name, partial(stand_in, name))
    return calls

def alike(step, other):
    """Whether two steps do the same to a small network."""
    return same_bits(after(several(step)), after(several(other)))

def test_every_flag_arrives(seen):
    flags = """--method sam+at --rho 0.3 --eps 3/255 --norm l2 --attack-steps 7 --dataset folder --data-dir pics --bf16
        --model prn18 --width 5 --epochs 4 --batch-size 6 --lr 0.03 --compile --seed 11 --eval-steps 13 --restarts 3
        --images 9 --runs elsewhere --device cpu"""
    assert cli(*flags.split(), "--attacks", "fgsm 1/255", "l2 0.5")[::2] == (0, "")
    model, data, step, optimizer, schedule, *sizes = seen.train[0].given
    assert seen.load_data[0].given == ("folder", "pics") and sizes == [4, 6] and seen.compile[0].dynamic is False
    whole = tiny_data(200).x / 255
    assert model[0].net[0].out_channels == 5 and model[0].bf16 and os.listdir() == ["elsewhere"]
    assert model[0].mean.flatten().allclose(whole.mean((0, 2, 3)))
    assert model[0].std.flatten().allclose(whole.std((0, 2, 3)))
    assert optimizer.defaults["lr"] == 0.03 and set(schedule.milestones) == {3, 4}
    sam = partial(sam_at.sam_step, rho=0.3)
    assert alike(step, partial(sam_at.at_step, eps=3 / 255, norm="l2", steps=7, step=sam))
    for call, attack in zip(seen.right_images, [{}, {"eps": 1 / 255}, {"eps": 0.5, "norm": "l2", "steps": 13}]):
        tested, images, labels, function, restarts = call.given
        assert tested is model[0] and restarts == 3 and call.drawn == float(uniform(1, seed=11))
        assert images.equal(data.x_test[torch.arange(9) * 200 // 9]) and len(labels) == 9
        assert getattr(function, "keywords", {}).items() >= attack.items()
    assert seen.doubts[0].given[3:] == (["fgsm 1/255", "l2 0.5"], 13, 3)

def test_every_method_is_the_step_of_its_name_with_all_its_settings(seen):
    sam, ball = partial(sam_at.sam_step, rho=0.2), "l2 4_255 steps 3"
    at = partial(sam_at.at_step, eps=4 / 255, norm="l2", steps=3)
    wanted = {
        "sgd": ("sgd", sam_at.sgd_step),
        "sam": ("sam rho 0.2", sam),
        "asam": ("asam rho 0.2", partial(sam, ascend=sam_at.adaptive_ascent)),
        "esam": ("esam rho 0.2", partial(sam_at.esam_step, rho=0.2)),
        "at": (f"at {ball}", at),
        "sam+at": (f"sam+at rho 0.2 {ball}", partial(at, step=sam)),
        "awp": (f"awp rho 0.2 {ball}", partial(at, step=partial(sam, ascend=sam_at.layerwise_ascent))),
    }
    cli("--method", *wanted, *"--rho 0.2 --eps 4/255 --norm l2 --attack-steps 3".split())
    for call, (label, step) in zip(seen.train, wanted.values(), strict=True):
        assert alike(call.given[2], step) and call.drawn == seen.train[0].drawn
        assert len(list(Path("runs").glob(f"tiny small {label} seed 0 *"))) == 1

@pytest.mark.parametrize("model, lr, decay", [("small", 0.1, 5e-4), ("deit_ti", 0.001, 0.05)])
def test_defaults(model, lr, decay, seen, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert cli("--model", model)[0] == 0
    optimizer = seen.train[0].given[3]
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (lr, decay)
    labels = [" ".join(folder.name.split()[2:-3]) for folder in Path("runs").iterdir()]
    assert sorted(labels) == ["at linf 1_255 steps 5", "sam rho 0.15", "sgd"]
    assert not seen.train[0].given[0].bf16 and not seen.compile
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert sam_at.parse_args([]).bf16 and not sam_at.parse_args(["--no-bf16"]).bf16

BAD = [  # arguments > words of the message
    "--eps 8 > below 1", "--eps x > radius", "--eps 1/0 > radius", "--eps nan > linf", "--attacks > attacks",
    "--attacks l7 > l7", "--method sma > sma", "--model vgg > vgg", "--norm l1 > l1", "--roh 1 > roh", "stray > stray",
    "--epoch 1 > epoch", "--rho -0.1 > rho", "--rho nan > rho", "--rho big > rho", "--epochs 0 > epochs", "--seed -1 > seed",
    "--epochs 1.5 > epochs", "--attack-steps 0 > attack-steps", "--batch-size 0 > batch-size", "--restarts 0 > restarts",
    "--eval-steps 0 > eval-steps", "--images -1 > images", "--width 900000000 > width", "--model deit_ti --width 4 > width",
    "--device cuda > no GPU found", "--dataset folder > --data-dir", "--runs /dev/null > /dev/null"]

@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message_and_exit_code_2(case, quick):
    argv, says = case.split(" > ")
    code, out, err = cli(*QUICK, *argv.split())
    assert code == 2 and says in err.splitlines()[-1]
    assert "epoch" not in out and not list(Path().rglob("*.pt"))

def test_help_says_what_it_does_and_names_every_flag_and_default():
    code, out, _ = cli("--help")
    text = "".join(out.split())
    assert code == 0 and text.index("Trainnetworks") < text.index("sam_at.py--method") < text.index("--rho")
    for name, (default, meaning) in sam_at.SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        assert flag in text and "".join(f"{meaning} (default: {default})".split()) in text
    assert "--no-bf16" in out and "--no-sharpness" not in out

# == 14. More than one device ==========================================================================
def finish(body, *argv, command=("script.py",), **environment):
    """What a script prints that has imported sam_at, made the demo's data small, and ends well."""
    Path("script.py").write_text(f"""
import os, random, signal, sys, time
sys.path[:0] = [{str(HERE)!r}]
import sam_at
sam_at.demo_data = sam_at.partial(sam_at.demo_data, n_train=64, n_test=40)
sam_at.doubts = lambda *_: {{}}
{body}""", encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    words = [str(word) for word in [sys.executable, *command, *argv]]
    done = subprocess.run(words, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode()

def only(pattern, runs="runs"):
    """The one file of that name among the runs."""
    path, = Path(runs).glob(f"*/{pattern}")
    return path

def state_of(runs="runs"):
    return torch.load(only("*.pt", runs), weights_only=True)

def test_two_processes_train_as_one_but_each_share_has_its_own_v(quick):
    """Only the first writes and speaks."""
    flags, port = [*QUICK, "--method", "sam", "--rho", 0.3], random.SystemRandom().randint(20_000, 40_000)
    torchrun = f"-m torch.distributed.run --nproc-per-node 2 --master-port {port} script.py".split()
    out = finish("""
import test_sam_at as suite
sam_at.make_model = lambda *_: suite.tiny_net(classes=10, batchnorm=False)
sys.exit(sam_at.main())""", *flags, command=torchrun)
    assert out.count("epoch 1/2") == 1
    data, model = sam_at.demo_data(), tiny_net(classes=10, batchnorm=False)
    optimizer, _ = sam_at.make_optimizer(model, 0.1, 100)
    for x, y in [*sam_at.batches(data, 16), *sam_at.batches(data, 16)]:
        shares = []
        for i in 0, 1:
            sam_at.sam_step(model, x[i::2], y[i::2], sgd(model, lr=0.0), rho=0.3)
            shares.append([w.grad for w in model.parameters()])
        for w, a, b in zip(model.parameters(), *shares):
            w.grad = (a + b) / 2
        optimizer.step()
    for name, w in model.named_parameters():
        assert w.allclose(state_of()["model"][name], atol=1e-5), name
    assert "epoch 1/2" in cli(*flags)[1]  # by one process it is another run

def test_processes_count_only_where_torchrun_started_them_and_threads_soon_sleep():
    """RANK is a sweep's own variable, too. What the caller has set stays."""
    body = "print(sam_at.RANK, sam_at.WORLD, os.environ['GOMP_SPINCOUNT'])"
    assert finish(body, RANK="2", WORLD_SIZE="9").split() == ["0", "1", "5000"]
    assert finish(body, RANK="", GOMP_SPINCOUNT="7").split() == ["0", "1", "7"]

def test_only_the_first_process_writes(monkeypatch):
    monkeypatch.setattr(sam_at, "RANK", 1)
    sam_at.write_whole(Path("file"), b"content")
    assert not os.listdir()

# == 15. Runs ==========================================================================================
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been():
    out = finish("""
begin = time.time()
sam_at.main([*sys.argv[1:], "--runs", "whole"])
epoch = (time.time() - begin) / 40
saved = lambda: [path.stat() for path in sam_at.Path("runs").glob("*/checkpoint.pt")]
for kill in range(10):
    before = saved()
    child = os.fork()
    if not child:
        os._exit(sam_at.main())
    while saved() == before and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(random.uniform(0, 1) * epoch)
    os.kill(child, signal.SIGKILL)
    os.wait()
sys.exit(sam_at.main())""", *QUICK, "--method", "sam+at", "--epochs", 40)
    assert "is trained up to epoch" in out
    assert same_bits(state_of("whole")["model"].values(), state_of()["model"].values())
    whole, killed = (json.loads(only("*.json", runs).read_text()) for runs in ("whole", "runs"))
    assert whole["figures"] == killed["figures"] and len(killed["log"]) == 40

DECIDES = """--seed 1;--batch-size 9;--lr 0.2;--epochs 3;--bf16;--compile;--width 3;--model prn18;--dataset cifar10;
--rho 0.2;--eps 2/255;--norm l2;--attack-steps 3;--method awp""".split(";")
MEASURES = "--eval-steps 3;--restarts 2;--images 7;--sharpness".split(";")

def test_what_decides_the_weights_and_nothing_else_makes_another_run(seen, monkeypatch):
    def runs_after(*argv):
        assert cli(*argv)[0] == 0
        return len(os.listdir("runs"))
    given = ["--method", "sam+at", "--no-bf16"]
    runs = runs_after(*given)
    for flag in DECIDES + MEASURES:
        given += flag.split()
        runs += flag in DECIDES
        assert runs_after(*given) == runs, flag
    runs = runs_after("--method", "sgd")
    assert runs_after("--method", "sgd", "--rho", 0.3, "--eps", 0.2, "--norm", "l2", "--attack-steps", 2) == runs
    for n, part in enumerate(["x", "y", "x_test", "y_test"], 1):
        other = tiny_data(200)
        setattr(other, part, getattr(other, part).roll(1, 0))
        monkeypatch.setattr(sam_at, "load_data", lambda *_: other)
        assert runs_after("--method", "sgd") == runs + n
    flags = {flag.strip().split()[0][2:].replace("-", "_") for flag in DECIDES + MEASURES}
    assert set(sam_at.SETTINGS) - flags == {"attacks", "data_dir", "device", "runs", "benchmark"}

def test_a_finished_run_is_reported_and_another_measurement_is_another_record(quick, monkeypatch):
    first = cli(*QUICK)[1].split("\n\n")[1]
    monkeypatch.setattr(sam_at, "sgd_step", None)  # no step can be made
    with monkeypatch.context() as patch:
        patch.setattr(sam_at, "write_whole", None)  # nothing can be written
        assert cli(*QUICK)[1].split("\n\n")[1] == first
    others = [["--attacks", "l2 0.5"], ["--eval-steps", 2], ["--restarts", 2], ["--images", 7], ["--sharpness"],
              ["--sharpness", "--images", 7]]
    for other in others + others:
        assert cli(*QUICK, *other)[0] == 0
    records = [json.loads(path.read_text()) for path in Path("runs").glob("*/*.json")]
    assert len({record["table"] for record in records}) == 7
    assert sorted(record["images"] for record in records) == [7, 7, 40, 40, 40, 40, 40]

def test_a_record_names_its_row_and_table_and_what_it_takes_to_repeat_it(quick, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    _, out, _ = cli(*QUICK, "--method", "sam", "--seed", 3, "--epochs", 3)
    record, data = json.loads(only("*.json").read_text()), sam_at.demo_data()
    for words in "demo", "small width 2", "3 epochs", "lr 0.1", "batch 16", "40 test images", "linf 2/255", "1 steps":
        assert words in record["table"]
    model = sam_at.make_model("small", 10, width=2)
    model.load_state_dict(state_of()["model"])
    torch.manual_seed(3)
    assert record["figures"] == sam_at.evaluate(model, data.x_test, data.y_test, ["linf 2/255"], steps=1)
    right = model.eval()(data.x_test / 255).argmax(1) == data.y_test
    assert report.unpacked(record["right"]["clean"], record["images"]) == right.int().tolist()
    settings = {"method": "sam", "label": "sam rho 0.15", "rho": 0.15, "seed": 3, "epochs": 3, "bf16": False}
    assert record["settings"].items() >= settings.items() and record["label"] == "sam rho 0.15"
    assert record["threads"] == torch.get_num_threads() and "avx2" in record["machine"]
    assert record["torch"] == torch.__version__ and {row["code"] for row in record["log"]} == {record["code"]}
    assert sam_at.CODE == sam_at.sha256(Path(sam_at.__file__).read_bytes())
    table = out.split("\n\n")[1].splitlines()
    assert table[0].split() == ["method", "clean", "linf", "2/255"] and "12.5" in table[2] and len(table) == 3
    assert table[1].split() == ["sam", "rho", "0.15", *(f"{points:.1f}" for points in record["figures"].values())]
    assert f"epoch 1/3  loss {record['log'][0]['loss']:.4f}" in out and not torch.backends.cudnn.allow_tf32

@pytest.mark.parametrize("name", ["checkpoint.pt", "*.json"])
def test_a_damaged_file_is_named_and_kept(name, quick):
    """Cut off, empty, another program's, or with a bit changed in a key or a value."""
    cli(*QUICK)
    path = only(name)
    whole = path.read_bytes()
    contents = [b"", whole[:-100]]
    if name == "checkpoint.pt":
        only("*.json").unlink()
        torch.save([1], "list.pt")
        contents.append(Path("list.pt").read_bytes())
        for i in whole.index(b"net.0.weight"), len(whole) // 2:
            contents.append(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1:])
    for content in contents:
        path.write_bytes(content)
        code, out, err = cli(*QUICK)
        assert code == 2 and err.count("\n") == 1 and str(path) in err
        assert path.read_bytes() == content and "epoch 2" not in out

def test_no_room_divergence_and_ctrl_c_are_one_line_and_the_run_goes_on(quick, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # ulimit -f
    try:
        full = cli(*QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    def interrupt(*_):
        raise KeyboardInterrupt
    steep = cli(*QUICK, "--lr", 1e8, "--runs", "steep")
    with monkeypatch.context() as patch:
        patch.setattr(sam_at, "right_images", interrupt)
        stopped = cli(*QUICK)
    assert [full[0], steep[0], stopped[0]] == [2, 2, 130] and "epoch 1" in steep[2]
    assert all(err.count("\n") == 1 for _, _, err in (full, steep, stopped))
    out = cli(*QUICK)[1]
    assert "is trained up to epoch 2/2" in out and "epoch 1/2" not in out

def test_a_notebook_has_no_file_to_sign_with():
    body = "cell = {'__name__': 'cell'}; exec(open(sam_at.__file__).read(), cell); print(repr(cell['CODE']))"
    assert finish(body).strip() == "''"

# == 16. The program ===================================================================================
def test_the_benchmark_times_a_step_of_each_method_in_both_precisions(monkeypatch):
    """Here a step takes a second for each of the model's passes."""
    passes = []
    def timed(timer):
        timer.timeit(1)  # after two to warm up
        return Namespace(median=len(passes) / 3)
    monkeypatch.setattr("torch.utils.benchmark.Timer.adaptive_autorange", timed)
    build = sam_at.build
    def build_and_count(*given):
        passes.clear()
        model, compiled, *rest = build(*given)
        model.register_forward_hook(lambda *_: passes.append(model.bf16))
        return model, compiled, *rest
    monkeypatch.setattr(sam_at, "build", build_and_count)
    code, out, _ = cli(*"--benchmark --method at sam --width 2 --batch-size 6".split())
    found = [(line.split()[0], *line.split()[-5:-3]) for line in out.splitlines()]
    kinds = [(precision, method) for precision in ("float32", "bfloat16") for method in ("at", "sam")]
    assert code == 0 and not os.listdir()
    assert found == [(method, precision, {"at": "6.0000", "sam": "2.0000"}[method]) for precision, method in kinds]

# == 17. results/report.py =============================================================================
spec = importlib.util.spec_from_file_location("report", HERE / "results" / "report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

def test_a_gain_and_its_error_of_six_images():
    """Differences of one seed 1 0 0 0 0 1, of the other 1 0 0 0 -1 0. Over images 1 0 0 0 -1/2 1/2, of mean 1/6 and
    variance 4/15; over seeds 1/3 and 0, of variance 1/18. A third seed has no partner."""
    a = {0: [1, 1, 0, 0, 1, 1], 1: [1, 1, 0, 0, 0, 1], 2: [0] * 6}
    b = {0: [0, 1, 0, 0, 1, 0], 1: [0, 1, 0, 0, 1, 1]}
    assert report.gain(a, b) == pytest.approx((100 / 6, 100 * math.sqrt(4 / 15 / 6 + 1 / 18 / 2)))
    assert report.gain({0: a[0]}, b) == pytest.approx((100 / 3, 100 * math.sqrt(4 / 15 / 6)))

def network(clean, robust):
    """One that is right on the first of four images."""
    return {"clean": {0: [1] * clean + [0] * (4 - clean)}, "mean": {0: [1] * robust + [0] * (4 - robust)}}

@pytest.mark.parametrize("clean, robust, height", [(3, 3, 75 - 50), (2, 1, 25 - 100), (0, 2, 50 - 25)])
def test_height_is_above_the_mixture_of_equal_clean_accuracy(clean, robust, height):
    """A curve from (clean 100, robust 0) over (50, 100) to (25, 25); beyond its ends its nearest row counts."""
    curve = [network(4, 0), network(2, 4), network(1, 1)]
    assert report.height(network(clean, robust), curve)[0] == pytest.approx(height)

def packed(bits):
    text = "".join(str(int(bit)) for bit in bits)
    return report.base64.b64encode(int(text, 2).to_bytes(len(text) // 8)).decode()

def three(method, clean, robust, **settings):
    """Records of three seeds, 4,000 images: so many percent right, clean and under two attacks, on the same images."""
    figures = {"clean": clean, "a": robust, "b": robust}
    right = {name: packed(i < 40 * points for i in range(4000)) for name, points in figures.items()}
    label = " ".join([method, *(f"{key} {value}" for key, value in settings.items())])
    settings = {"method": method, "eps": 0, "attack_steps": 5, "sharpness": False, **settings}
    record = {"label": label, "table": "main", "figures": figures, "images": 4000, "right": right}
    return [{**record, "right": dict(right), "settings": {**settings, "seed": seed}} for seed in (0, 1, 2)]

def verdicts_of(*records):
    rows = {}
    for record in records:
        rows.setdefault(record["label"], {})[record["settings"]["seed"]] = record
    return {claim: text.split("*")[2] for claim, text in report.verdicts(rows).items()}

SGD, AT5 = three("sgd", 80, 30), three("at", 75, 60, eps=1)

@pytest.mark.parametrize("clean, robust, word", [(80, 35, "yes"), (79.8, 35, "yes"), (79, 40, "no"), (82, 30, "no")])
def test_c1_wants_a_gain_under_every_attack_for_half_a_point(clean, robust, word):
    sam, asam = (three(method, clean, robust, rho=1) for method in ("sam", "asam"))
    assert verdicts_of(*SGD, *sam, *asam) == {"C1": word, "C5": word}
    assert verdicts_of(*SGD, *sam[:2]) == {"C1": f"open, so far {word}"}
    assert verdicts_of(*SGD, *sam, *three("sam", 70, 50, rho=2)) == {"C1": word}  # one radius is enough
    for record in sam:
        record["right"]["b"] = SGD[0]["right"]["b"]  # no gain under this attack
    assert verdicts_of(*SGD, *sam) == {"C1": "no"}

def test_c1_wants_two_errors_to_spare():
    """As accurate, but on other images: the error is a point."""
    sam = three("sam", 80, 35, rho=1)
    for record in sam:
        record["right"]["clean"] = packed(i >= 800 for i in range(4000))
    assert verdicts_of(*SGD, *sam) == {"C1": "no"}

@pytest.mark.parametrize("sam, c2, c3a", [((80, 35), "yes", "yes"), ((80, 60), "no", "no"), ((74, 50), "yes", "no")])
def test_c2_and_c3a_are_about_place(sam, c2, c3a):
    found = verdicts_of(*SGD, *AT5, *three("sam", *sam, rho=1))
    assert (found["C2"], found["C3a"]) == (c2, c3a)
    assert verdicts_of(*SGD, *three("at", 80, 60, eps=1), *three("sam", 80, 35, rho=1))["C2"] == "no"  # no price

@pytest.mark.parametrize("robust, word", [(50, "above, by +8.0"), (42, "on, by "), (35, "below, by -7.0")])
@pytest.mark.parametrize("claim, attack_steps", [("C3b", 5), ("C6", 1)])
def test_c3b_and_c6_are_about_price(robust, word, claim, attack_steps):
    """At 78 clean the line from SGD (80, 30) to AT (75, 60) is at 42. Each claim has its own number of steps."""
    curve = [three("at", 50, 70, eps=2, attack_steps=attack_steps), three("at", 75, 60, eps=1, attack_steps=attack_steps)]
    found = verdicts_of(*SGD, *three("sam", 78, robust, rho=1), *curve[0], *curve[1])
    assert found[claim].startswith(word) and len(found) == 4

def report_of(*records):
    """DIR/RESULTS.md of records, one of them in DIR/runs."""
    Path("there/results").mkdir(parents=True, exist_ok=True)
    Path("there/runs/one").mkdir(parents=True, exist_ok=True)
    Path("there/results/records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[1:]))
    Path("there/runs/one/x.json").write_text(json.dumps(records[0]))
    report.main(Path("there"))
    return Path("there/RESULTS.md").read_text("utf-8")

def test_the_report_has_a_table_a_title_a_picture_and_every_record_once():
    pytest.importorskip("matplotlib")
    records = [*SGD, *AT5, *three("sam", 80, 35, rho=0.1), {**SGD[0], "table": "check"}]
    text = report_of(*records, records[5])
    assert text.index("## main") < text.index("## check") and "| sam rho 0.1 | 3 | 80 | 35 | 35 | +0.0 ± 0.0 | +5.0 ± 0.3 |" in text
    lines = Path("there/results/records.jsonl").read_text("utf-8").splitlines()
    assert sorted(lines) == sorted(json.dumps(record) for record in records)
    assert report_of(*records) == text and text.count("- C1: **yes**") == 1
    assert Path("there/results/tradeoff.png").read_bytes()[:4] == b"\x89PNG"

def test_rises_have_their_rank_correlation_with_and_without_at():
    """Ranks 1 2 3 4 and 2 3 4 1; equal values would share theirs."""
    records = []
    for i, (method, around_w, around_x) in enumerate([("sgd", 1, 4), ("sam", 2, 5), ("sam", 3, 6), ("at", 9, 1)]):
        figures = {"rho 0.1": around_w, "linf 1/255": around_x, "l2 0.1": 0}
        record, label = three(method, 0, 0, sharpness=True)[0], f"{method} {i}" if i else "sgd"
        records.append({**record, "label": label, "table": "rises", "figures": figures, "right": {}})
    assert "-0.20, without AT +1.00" in report_of(*SGD, *AT5, *records)
    assert report.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1, 3.5, 2]
