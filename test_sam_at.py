"""The specification of sam_at.py, as properties, on a CPU; hypothesis draws the cases. Sections follow the file's."""
import io
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the specification is of the CPU's bits, wherever it runs

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st
from torch import nn

import sam_at

settings.register_profile("repeatable", deadline=None, max_examples=20, derandomize=True,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("repeatable")

seeds = st.integers(0, 10_000)
norms = st.sampled_from(["linf", "l2"])
radii = st.floats(0.001, 0.3)
f64 = torch.float64

@pytest.fixture(autouse=True)
def own_folder(tmp_path_factory, monkeypatch):
    """Each test in an empty folder of its own: that is where runs/ goes."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))

def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def pixels(*shape, seed, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def batch(n, size=8, classes=3, seed=0, dtype=torch.float32):
    return pixels(n, 3, size, size, seed=seed, dtype=dtype), torch.arange(n) % classes

def tiny_net(seed=0, classes=3, dtype=torch.float32, batchnorm=True):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4) if batchnorm else nn.Identity(),
                        nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, classes))
    return sam_at.Classifier(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)).to(dtype)

def weights_of(model):
    return [w.detach().clone() for w in model.parameters()]

def same_bits(a, b):
    """Whether two lists of tensors agree in type and in every bit."""
    pairs = list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and x.contiguous().flatten().view(torch.uint8).equal(
        y.contiguous().flatten().view(torch.uint8)) for x, y in pairs)

def twins(seed, *actions, net=tiny_net):
    """What each action(model) leaves of its own copy of a network: weights and buffers."""
    left = []
    for action in actions:
        model = net(seed)
        torch.manual_seed(seed)
        action(model)
        left.append([*weights_of(model), *(b.clone() for b in model.buffers())])
    return left

def sgd(model, lr=0.1, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)

def length(tensors):
    return math.sqrt(sum(float(t.double().pow(2).sum()) for t in tensors))

def size_of(delta, norm):
    """|delta|_p of each image."""
    return delta.flatten(1).abs().amax(1) if norm == "linf" else delta.flatten(1).norm(dim=1)

def cli(*argv):
    """main() in this process: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = sam_at.main([str(a) for a in argv])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

def tiny_data(n=24, classes=3, seed=0, size=32):
    """A data set that any method can learn: random images, each with its own label."""
    x = (255 * pixels(2 * n, 3, size, size, seed=seed)).byte()
    y = torch.arange(2 * n) % classes
    return sam_at.Data(x[:n], y[:n], x[n:], y[n:], [*range(classes)], "tiny data", augment=False)

@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setattr(sam_at, "demo_data", partial(sam_at.demo_data, n_train=64, n_test=40))

# == Input space =======================================================================================
class Scored(nn.Module):
    """Logits (0, f(x, w))."""
    def __init__(self, f, w=torch.zeros(1)):
        super().__init__()
        self.f, self.w = f, nn.Parameter(w.clone())
    def forward(self, x):
        assert len(x), "a model need not know what to do with no image"
        score = self.f(x, self.w)
        return torch.stack([torch.zeros_like(score), score], 1)

linear = partial(Scored, lambda x, w: x.flatten(1) @ w)
hostile = [lambda z: 0 * z, lambda z: math.nan * z, lambda z: 1e30 * z, lambda z: (z - z.detach()).sqrt()]
modes = st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode])
X, Y = batch(3)

def all_of(model):
    """Weights, buffers, gradients, modes and requires_grad, as tensors."""
    weights = [*model.parameters()]
    tensors = [*weights, *model.buffers(), *(w.grad for w in weights if w.grad is not None)]
    flags = [m.training for m in model.modules()] + [w.requires_grad for w in weights]
    return [*(t.detach().clone() for t in tensors), torch.tensor(flags)]

def inside(x_adv, x, eps, norm):
    return bool((size_of(x_adv - x, norm) <= eps + 1e-6).all()) and x_adv.equal(x_adv.clamp(0, 1))

@pytest.mark.parametrize("f", [None, *hostile])
@given(seed=seeds, norm=norms, eps=radii, start=st.booleans(), dtype=st.sampled_from([torch.float32, f64]))
def test_pgd_stays_in_the_ball(f, seed, norm, eps, start, dtype):
    x, y = batch(4, classes=2, seed=seed, dtype=dtype)
    x = (3 * x - 1).clamp(0, 1).requires_grad_()  # many pixels on the border of [0,1]
    before = x.detach().clone()
    model = Scored(lambda x, w: f(x.mean((1, 2, 3)))) if f else tiny_net(seed, dtype=dtype).eval()
    attack = partial(sam_at.pgd, model, x, y, norm=norm, random_start=start)
    for steps in 0, 1, 12:
        x_adv = attack(eps, steps=steps)
        assert x_adv.dtype == dtype and not x_adv.requires_grad
        assert x_adv.shape == x.shape and inside(x_adv, x, eps, norm)
        assert attack(0.0, steps=steps).equal(x) and x.equal(before)

@given(seeds, norms, st.floats(0.001, 0.2), st.integers(2, 20), st.integers(1, 12), modes)
def test_pgd_on_a_linear_model(seed, norm, eps, d, steps, mode):
    """The optimum is eps sign(g) or eps g/|g|, g = -w at label 1, w at 0; a step goes a quarter of it."""
    w = normal(d, seed=seed, dtype=f64)
    assume(w.abs().min() > 1e-3)
    model = linear(w)
    with mode():
        x = 0.3 + 0.4 * pixels(6, d, seed=seed + 1, dtype=f64)  # no pixel reaches the border
        y = torch.arange(6) % 2
        g = (1 - 2 * y.double())[:, None] * w
        unit = g.sign() if norm == "linf" else g / g.norm(dim=1, keepdim=True)
        still = partial(sam_at.pgd, model, y=y, eps=eps, random_start=False)
        assert still(x=x, norm=norm, steps=steps).allclose(x + eps * min(1, steps / 4) * unit, atol=1e-9)
        assert still(x=x, step_size=eps / 20).allclose(x + eps / 2 * g.sign(), atol=1e-9)  # ten in linf
        x = x.round()  # on the border no pixel moves the wrong way; in linf all go as far as they can
        x_adv = still(x=x, norm=norm)
        for fgsm in partial(sam_at.fgsm, eps=eps), sam_at.parse_attack(f"fgsm {eps}"):
            assert fgsm(model, x, y).allclose((x + eps * g.sign()).clamp(0, 1), atol=1e-9)
    assert ((x_adv - x) * g >= -1e-12).all()
    assert norm == "l2" or x_adv.allclose((x + eps * unit).clamp(0, 1), atol=1e-9)

@given(seeds, norms)
def test_random_starts(seed, norm):
    x = torch.full((400, 3, 4, 4), 0.5)
    delta = sam_at.pgd(tiny_net(seed), x, torch.arange(400) % 3, 0.1, norm, steps=0) - x
    size = size_of(delta, norm)
    assert delta.mean().abs() < 0.005 and size.max() > 0.095
    if norm == "linf":  # each pixel uniform in [-eps, eps]
        assert abs(delta.std() - 0.1 / math.sqrt(3)) < 0.002
    else:  # lengths uniform in [0, eps]
        assert size.min() < 0.01 and 0.04 < size.mean() < 0.06

@given(seeds, norms, st.floats(1e-30, 1e30), st.floats(0.01, 2), st.floats(0.01, 2))
def test_steepest_and_project(seed, norm, scale, eps, size):
    g = normal(4, 3, 5, seed=seed)
    step = sam_at.steepest(g * scale, norm)
    assert step.allclose(sam_at.steepest(g, norm), rtol=1e-4)
    assert size_of(step, norm).allclose(torch.ones(4))
    delta, other = size * g, sam_at.random_delta(g, eps, norm)
    nearest = sam_at.project(delta, eps, norm)
    assert (size_of(nearest, norm) <= eps * (1 + 1e-5)).all()
    assert (size_of(delta - nearest, "l2") <= size_of(delta - other, "l2") + 1e-5).all()

@given(seeds, norms, st.booleans(), st.booleans(), st.booleans(), modes)
def test_pgd_leaves_the_model_alone(seed, norm, training, frozen, fail, mode):
    """Bit for bit, also when it raises. A step is one pass of that very model, for no weight gradient."""
    def look(module, args, logits):
        seen.append(any(w.requires_grad for w in model.parameters()))
        model.calls.add_(1)
        assert logits.allclose(own, atol=1e-6)
        if fail and len(seen) == 2:
            raise KeyError
    model, (x, y), seen = tiny_net(seed).train(training), batch(4, seed=seed), []
    model.register_buffer("calls", torch.tensor(0))
    model.net.insert(2, nn.InstanceNorm2d(4, momentum=0.9, track_running_stats=True))
    model.net[2].eval()  # a mode of its own, and statistics that are not the images'
    model.net[0].weight.requires_grad_(not frozen)
    own = model(x)
    F.cross_entropy(own, y).backward()
    before = all_of(model)
    model.register_forward_hook(look)
    with pytest.raises(KeyError) if fail else io.StringIO(), mode():
        sam_at.pgd(model, x, y, 0.0, norm, steps=3)
    assert same_bits(before, all_of(model))
    assert seen == [False] * (2 if fail else 3)

@pytest.mark.parametrize("wrong", [
    {"norm": "l1"}, {"eps": -0.1}, {"eps": math.nan}, {"eps": 8}, {"eps": 14, "norm": "l2"}, {"steps": -1},
    {"y": Y[:, None]}, {"y": Y[:2]}, {"y": Y.int()}, {"y": F.one_hot(Y).float()},
    {"x": X.bfloat16()}, {"x": X.half()}, {"x": X * math.nan}, {"x": 1.2 * X}, {"x": X - 0.1}])
def test_pgd_refuses(wrong):
    good = {"x": X, "y": Y, "eps": 0.1}
    sam_at.pgd(tiny_net(), **good | {"eps": 13.8, "norm": "l2"})  # the image's diagonal
    with pytest.raises(ValueError) as error:
        sam_at.pgd(tiny_net(), **good | wrong)
    if (x := wrong.get("x", X.half())).dtype == X.dtype:  # it names the range of the pixels
        assert f"{x.min():.3g} to {x.max():.3g}" in str(error.value)

@given(st.floats(0.01, 0.1))
def test_robust_means_right_at_every_step(eps):
    """PGD climbs past the one place where the model is wrong; who meets it stays there, the others go on."""
    def score(x, w):
        wrong = (x - 0.3).abs() < eps / 10
        return (x - x.detach() + wrong.float() - 0.5).sum((1, 2, 3))
    k = torch.tensor([0, 1, 2, 3, 4, 5, 4.5]).view(7, 1, 1, 1)  # steps of eps/4 to that place
    x = 0.3 - k * eps / 4
    y = torch.zeros(7).long()
    model, last = Scored(score), partial(sam_at.pgd, eps=eps, random_start=False)
    every = partial(last, stop_when_fooled=True)
    assert last(model, x, y).allclose(x + eps)
    assert every(model, x, y).allclose(x + k.clamp(max=4) * eps / 4)
    assert every(model, x[1:2], y[1:2]).allclose(x[1:2] + eps / 4)  # then none is left
    found = sam_at.evaluate(model, x, y, {"last": last, "every": every})
    assert [round(7 * a / 100) for a in found.values()] == [6, 5, 2]
    found = sam_at.evaluate(model, x.repeat(50, 1, 1, 1), y.repeat(50), [f"linf {eps}"])
    assert found[f"linf {eps}"] < 50  # from random starts most meet the place

def test_the_margin_attacks_sure_logits():
    model = Scored(lambda x, w: 1e5 * (x.mean((1, 2, 3)) - 0.5))
    x, y = torch.full((4, 3, 2, 2), 0.48), torch.tensor([0, 0, 0, 0])
    attack = partial(sam_at.pgd, model, x, y, 0.05, random_start=False)
    assert sam_at.margin(torch.tensor([[1.0, 3, 2], [9, 4, 2]]), torch.tensor([2, 0])) == 1 - 5
    assert attack().equal(x)  # softmax is exactly one, and cross-entropy's gradient zero
    assert attack(loss=sam_at.margin).allclose(x + 0.05)
    assert [*sam_at.evaluate(model, x, y, ["margin linf 0.05", "margin l2 0.2"]).values()] == [100, 0, 0]

# == Weight space ======================================================================================
def ascended(weights, rho, ascend=sam_at.ascent):
    before, kinds = [w.detach().double() for w in weights], [(w.dtype, w.stride()) for w in weights]
    with sam_at.perturbed(weights, rho, ascend):
        assert kinds == [(w.dtype, w.stride()) for w in weights]
        return [w.detach().double() - b for w, b in zip(weights, before)]

@given(seeds, st.floats(1e-4, 10), st.booleans())
def test_perturbed_restores_the_bits(seed, rho, fail):
    model = tiny_net(seed)
    sam_at.gradient(model, *batch(4, seed=seed))
    before, grads = all_of(model), [w.grad for w in model.parameters()]
    for wrong in -rho, math.nan, math.inf:
        with pytest.raises(ValueError), sam_at.perturbed(model, wrong):
            pass
    with pytest.raises(KeyError) if fail else io.StringIO(), sam_at.perturbed(model, rho):
        for w, old, g in zip(model.parameters(), before, grads):
            assert w.allclose(old + rho / length(grads) * g, rtol=1e-4, atol=1e-6)  # one norm
        if fail:
            raise KeyError
    assert same_bits(before, all_of(model))

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, f64])
@given(seed=seeds, rho=st.floats(0.5, 5), size=st.sampled_from([0, 1e-30, 1e-3, 1, 1e15]))
def test_gradients_of_any_size_and_type(dtype, seed, rho, size):
    """v is 0 where g is; a tiny g gives a short v; for any other |v| = rho, even if |g| overflows."""
    size = min(size, torch.finfo(dtype).max)
    weights = [nn.Parameter(torch.zeros(n, 1, 1, 4, dtype=dtype).transpose(1, 3)) for n in (30, 3, 1)]
    for w in weights[:2]:  # the third has none
        w.grad = size * normal(*w.shape, seed=seed).sign().to(dtype)
    v = ascended(weights, rho)
    assert not v[2].any() and (size or not length(v))
    assert length(v) <= 1.01 * rho and (size < 1e-3 or length(v) >= 0.99 * rho)

def several(step, **how):  # an action for twins
    def action(model):
        optimizer = sgd(model, momentum=0.9, weight_decay=5e-4)
        with torch.autocast("cpu", torch.bfloat16, **how):
            for _ in range(3):
                step(model, *batch(6), optimizer)
    return action

SAM = partial(sam_at.sam_step, rho=0.5)
STEPS = {
    "sgd": sam_at.sgd_step,
    "sam": SAM,
    "asam": partial(sam_at.sam_step, rho=5.0, ascend=sam_at.adaptive_ascent),
    "esam": partial(sam_at.esam_step, rho=0.5),
    "at": partial(sam_at.at_step, eps=0.05, steps=3),
    "awp": partial(sam_at.at_step, eps=0.05, step=partial(SAM, ascend=sam_at.layerwise_ascent)),
}
methods = pytest.mark.parametrize("method", STEPS)

@methods
def test_a_step_in_the_callers_autocast(method):
    """The copies of w that autocast keeps serve neither w + v nor the next w."""
    actions = several(STEPS[method]), several(STEPS[method], cache_enabled=False), several(sam_at.sgd_step)
    ours, uncached, plain = twins(0, *actions, net=lambda seed: tiny_net(seed).net)
    assert same_bits(ours, uncached)
    assert same_bits(ours, plain) == (method == "sgd")
    net, (x, y) = tiny_net().net, batch(4)
    with torch.autocast("cpu", torch.bfloat16):
        sam_at.gradient(net, x, y)
        at_w = net(x)
        with sam_at.perturbed(net, 1.0):
            assert not net(x).equal(at_w)
        assert net(x).equal(at_w)

@given(seeds, st.floats(0.001, 0.05), st.integers(2, 8))
def test_duality_on_a_linear_score(seed, eps, d):
    """The worst delta takes eps |w| from the margin, the worst v rho |x|: for one rho the same."""
    w = normal(d, seed=seed, dtype=f64)
    x, y = 0.3 + 0.4 * pixels(1, d, seed=seed, dtype=f64), torch.tensor([1])
    model = linear(w)
    drop = w @ (x - sam_at.pgd(model, x, y, eps, "l2", random_start=False))[0]
    assert drop.allclose(eps * w.norm())
    loss, _ = sam_at.gradient(model, x, y)
    rho = float(eps * w.norm() / x.norm())
    with sam_at.perturbed(model, rho):
        assert (w - model.w).dot(x[0]).allclose(drop)
        tangent = loss + rho * model.w.grad.norm()  # the loss is convex: it lies above
        assert F.cross_entropy(model(x), y) >= tangent - 1e-9

# == The three steps ===================================================================================
@given(seeds, st.integers(1, 5), st.floats(0.01, 0.5), st.floats(0, 0.5))
def test_sam_on_a_quadratic(seed, d, lr, rho):
    """With logits (0, log(e^q - 1)) cross-entropy at label 0 is exactly q, here 1 + w'Aw/2."""
    root = normal(d, d, seed=seed, dtype=f64)
    A, w = root @ root.T + torch.eye(d), normal(d, seed=seed + 1, dtype=f64)
    model = Scored(lambda x, w: (1 + w @ A @ w / 2).expm1().log()[None], w)
    step = partial(sam_at.sam_step, model, X, torch.tensor([0]), sgd(model, lr), rho)
    step()
    assert model.w.allclose(w - lr * A @ (w + rho * A @ w / (A @ w).norm()), rtol=1e-6)
    model.w.data = w.clone()
    step(lambda weights, grads, rho: [-rho * weights[0]])  # another ascent
    assert model.w.allclose(w - lr * (1 - rho) * A @ w, rtol=1e-6)

def by_hand(model, x, y, optimizer, eps, norm="linf", steps=5, step=sam_at.sgd_step):
    return step(model, sam_at.pgd(model, x, y, eps, norm, steps), y, optimizer)

@pytest.mark.parametrize("one, other, options", [
    (partial(sam_at.sam_step, rho=0.0), sam_at.sgd_step, {}),
    (partial(sam_at.esam_step, rho=0.5, beta=1.0, gamma=1.0), SAM, {}),
    (sam_at.at_step, by_hand, {"eps": 0.1}),
    (sam_at.at_step, by_hand, {"eps": 0.3, "norm": "l2", "steps": 2, "step": SAM})])
def test_steps_that_are_the_same(one, other, options):
    both = [several(partial(step, **options), enabled=False) for step in (one, other)]
    assert all(map(partial(torch.allclose, atol=1e-6), *twins(0, *both)))

@given(seeds, st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.sampled_from([0, -1]))
def test_sam_is_its_formula(seed, lr, rho, first):
    """Its ball is over the optimizer's weights alone: all others are at w, then and afterwards."""
    model, twin = (tiny_net(seed, dtype=f64) for _ in range(2))
    x, y = batch(6, seed=seed, dtype=f64)
    before, seen = weights_of(model), []
    theirs = [*twin.net[first:].parameters()]
    g = torch.autograd.grad(F.cross_entropy(twin(x), y), theirs)
    for w, gi in zip(theirs, g):
        w.data += rho * gi / length(g)
    g = torch.autograd.grad(F.cross_entropy(twin(x), y), theirs)
    model.register_forward_hook(lambda *_: seen.append(weights_of(model)))
    ours = [{"params": [w]} for w in model.net[first:].parameters()]
    sam_at.sam_step(model, x, y, torch.optim.SGD(ours, lr), rho)
    rest = len(before) - len(ours)
    for w, b, gi in zip(weights_of(model)[rest:], before[rest:], g):
        assert w.allclose(b - lr * gi, atol=1e-10)
    for weights in *seen, weights_of(model):
        assert same_bits(weights[:rest], before[:rest])

@methods
@given(seed=seeds)
def test_what_a_step_returns_and_forgets(method, seed):
    """Gradients that lay around do not count; running statistics move once, by the first pass."""
    def action(junk, model):
        for w in model.parameters():
            w.grad = normal(*w.shape, seed=1) if junk else None
        returned.extend(STEPS[method](model, x, y, sgd(model)))
    (x, y), returned = batch(6, seed=seed), []
    one_pass = lambda model: returned.append(model(x))
    clean, junk, once = twins(seed, partial(action, False), partial(action, True), one_pass)
    loss, logits, first = *returned[:2], returned[-1]
    assert same_bits(clean, junk) and clean[-1] == 1
    assert loss.allclose(F.cross_entropy(logits, y))
    assert not loss.requires_grad and not logits.requires_grad
    attacked = method in ("at", "awp")  # those see other images
    assert same_bits([logits, *clean[-5:]], [first, *once[-5:]]) != attacked

# == Variants ==========================================================================================
@given(seeds, st.floats(0.01, 5), st.sampled_from([{}, {"eta": 0.0}, {"eta": 0.1}]))
def test_asam_and_awp_are_their_formulas(seed, rho, eta):
    """ASAM: the highest point of |v/T| = rho, v/T parallel to T g. AWP: a layer moves by rho |w|."""
    model = tiny_net(seed, dtype=f64)
    sam_at.gradient(model, *batch(6, seed=seed, dtype=f64))
    weights = [*model.parameters()]
    T = [w.detach().abs() + eta.get("eta", 0.01) if w.ndim > 1 else 1 for w in weights]
    Tg = [t * w.grad for t, w in zip(T, weights)]
    asam = ascended(weights, rho, partial(sam_at.adaptive_ascent, **eta))
    awp = ascended(weights, rho, sam_at.layerwise_ascent)
    for w, t, tg, v, u in zip(weights, T, Tg, asam, awp):
        assert v.allclose(t * tg * rho / length(Tg), atol=1e-9)
        assert u.allclose((w.ndim > 1) * rho * w.norm() * w.grad / w.grad.norm(), atol=1e-12)

@given(seeds, st.floats(0.05, 1), st.floats(0.05, 1), st.integers(1, 9), st.floats(0.01, 0.3))
def test_esam_descends_for_those_who_suffer(seed, beta, gamma, n, rho):
    model, twin = (tiny_net(seed, batchnorm=False, dtype=f64) for _ in range(2))
    x, y = batch(n, seed=seed, dtype=f64)
    before, seen = weights_of(model), []
    model.register_forward_pre_hook(lambda _, args: seen.append((*args, weights_of(model))))
    torch.manual_seed(seed)
    sam_at.esam_step(model, x, y, sgd(model), rho, beta, gamma)
    v = [a - b for a, b in zip(seen[1][1], before)]
    kept = torch.tensor([any(image.equal(t) for t in seen[2][0]) for image in x])
    old = F.cross_entropy(twin(x), y, reduction="none")
    old.mean().backward()
    climbing = length(w.grad for w, a in zip(twin.parameters(), v) if a.any())
    for w, a in zip(twin.parameters(), v):
        assert not a.any() or a.allclose(w.grad * rho / beta / climbing, atol=1e-9)
        w.data += a
    rise = F.cross_entropy(twin(x), y, reduction="none") - old
    assert kept.sum() == math.ceil(gamma * n)
    assert kept.all() or rise[kept].min() >= rise[~kept].max() - 1e-12
    sam_at.gradient(twin, x[kept], y[kept])
    for w, b, t in zip(model.parameters(), before, twin.parameters()):
        assert w.allclose(b - 0.1 * t.grad, atol=1e-9)

def test_esam_is_for_half_the_weights_and_images():
    model, seen = tiny_net(batchnorm=False), []
    model.net[0].weight.requires_grad_(False)  # never climbs, and nothing fails for it
    before = weights_of(model)
    model.register_forward_pre_hook(lambda _, args: seen.append((len(*args), weights_of(model))))
    for _ in range(400):
        sam_at.esam_step(model, *batch(4), sgd(model, 0.0), 0.01)
    assert [n for n, _ in seen] == 400 * [4, 4, 2]
    climbs = [not a.equal(b) for _, weights in seen[1::3] for a, b in zip(before, weights)]
    assert abs(sum(climbs) / 1200 - 13 / 24) < 0.04  # if none of three is drawn, one climbs

def test_a_missing_library_is_named_with_its_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(sam_at.BadInput, match="^.*pip install pyautoattack.*$"):  # one line
        sam_at.parse_attack("autoattack linf 8/255")

@pytest.mark.parametrize("classes, norm", [(2, "linf"), (3, "l2"), (5, "linf"), (5, "l2")])
def test_autoattack_is_never_above_pgd(classes, norm):
    pytest.importorskip("pyautoattack")
    model = tiny_net(classes=classes).eval()
    x, eps = pixels(30, 3, 5, 5, seed=classes), {"linf": 0.03, "l2": 0.15}[norm]
    y = model(x).argmax(1)
    before, rng = all_of(model), torch.get_rng_state()
    attack = partial(sam_at.parse_attack(f"autoattack {norm} {eps}"), model, x, y)
    x_adv = attack()
    assert torch.get_rng_state().equal(rng) and same_bits(before, all_of(model))
    assert inside(x_adv, x, eps, norm)
    assert classes > 2 or x_adv.equal(attack())
    right = [int((model(z).argmax(1) == y).sum()) for z in (x_adv, sam_at.pgd(model, x, y, eps, norm))]
    assert right[0] <= right[1] < 30

# == Networks =============================================================================================
@pytest.mark.parametrize("name, parameters", [
    ("prn18", 11_172_170), ("wrn28_10", 36_479_194), ("deit_ti", 5_392_714)])
def test_the_networks_have_their_papers_size(name, parameters):
    """DeiT-Ti: 12 layers of 444,864, patches 2,496, class token 192, 257 positions 49,344, norm 384, head 1,930."""
    with torch.device("meta"):
        model = sam_at.MODELS[name](10)
    assert sum(w.numel() for w in model.parameters()) == parameters

def test_prn18_halves_the_image_three_times():
    model, sizes = sam_at.make_model("prn18", 10, width=4), []
    for block in model.net:
        block.register_forward_hook(lambda module, x, y: sizes.append(tuple(y.shape[1:3])))
    model(pixels(1, 3, 32, 32, seed=0))
    assert sizes[:9] == [(4, 32)] * 3 + [(8, 16)] * 2 + [(16, 8)] * 2 + [(32, 4)] * 2

@pytest.mark.parametrize("c_in, c_out, stride", [(3, 3, 1), (3, 5, 1), (3, 5, 2), (4, 4, 2)])
def test_a_preactivation_block_is_its_formula(c_in, c_out, stride):
    torch.manual_seed(0)
    block = sam_at.PreActBlock(c_in, c_out, stride).eval()
    x = normal(2, c_in, 8, 8, seed=0)
    h = F.relu(block.bn1(x))
    branch = F.conv2d(h, block.conv1.weight, stride=stride, padding=1)
    branch = F.conv2d(F.relu(block.bn2(branch)), block.conv2.weight, padding=1)
    skip = x if (c_in, 1) == (c_out, stride) else F.conv2d(h, block.shortcut.weight, stride=stride)
    assert torch.allclose(block(x), skip + branch, atol=1e-5)

@pytest.mark.parametrize("name, width", [("prn18", 4), ("small", 4), ("wrn28_10", 1), ("deit_ti", 6)])
def test_in_eval_mode_an_images_logits_do_not_depend_on_its_batch(name, width):
    model, features = sam_at.make_model(name, 7, width=width).eval(), []
    [*model.modules()][-1].register_forward_pre_hook(lambda module, args: features.append(args[0]))
    x = pixels(3, 3, 32, 32, seed=0)
    with torch.no_grad():
        assert model(x).shape == (3, 7)
        assert name == "deit_ti" or features[0].min() >= 0  # they come out of a ReLU
        assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-4)

@given(seeds)
def test_normalisation_is_inside_and_bf16_for_training_alone(seed):
    mean, std = pixels(3, seed=seed), 0.1 + pixels(3, seed=seed + 1)
    model = sam_at.make_model("small", 3, (mean.tolist(), std.tolist()), width=4).eval()
    x = pixels(2, 3, 32, 32, seed=seed)
    inside = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        exact = model(x)
        model.bf16 = True
        assert model(x).equal(exact) and torch.allclose(exact, model.net(inside), atol=1e-4)
        model.train()
        rounded = model(x)
        assert rounded.dtype == torch.float32 and not rounded.equal(model.net(inside))
        assert torch.allclose(rounded, model.net(inside), atol=0.2)

def test_the_papers_statistics_initial_values_and_names():
    model = sam_at.make_model("prn18", 10, width=1)
    assert model.mean.flatten().tolist() == pytest.approx([0.4914, 0.4822, 0.4465])
    assert model.std.flatten().tolist() == pytest.approx([0.2471, 0.2435, 0.2616])
    net = sam_at.make_model("deit_ti", 10, width=48).net
    for name, w in net.named_parameters():
        if w.ndim > 1 and w.numel() > 100:  # patches: PyTorch's own, uniform within 1/sqrt(12)
            assert w.std().item() == pytest.approx(1 / 6 if "conv" in name else 0.02, rel=0.2), name
    assert [layer.self_attention.num_heads for layer in net.encoder.layers] == [3] * 12
    with pytest.raises(ValueError, match="prn18"):
        sam_at.make_model("resnet", 10)

# == Data and loop ========================================================================================
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

def test_the_learning_rate_of_the_papers_recipe():
    optimizer, schedule = sam_at.make_optimizer(tiny_net(), 0.1, 100)
    for rate in [0.1] * 75 + [0.01] * 15 + [0.001] * 10:
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(rate)
        optimizer.step()
        schedule.step()
    assert type(optimizer) is torch.optim.SGD
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
    assert (group["nesterov"], group["dampening"]) == (False, 0)

@settings(max_examples=8)
@given(seeds, st.integers(1, 30), st.integers(1, 9), st.sampled_from((1, 2)))
def test_an_epoch_meets_every_image_once_and_averages_over_its_share(monkeypatch, seed, n, batch_size, world):
    monkeypatch.setattr(sam_at, "WORLD", world)
    data, model = tiny_data(n * world + world - 1, seed=seed, size=4), tiny_net().eval()  # one for nobody
    met = []
    def step(model, x, y, optimizer):
        assert model.training and len(x) <= batch_size
        met.extend(zip(map(tuple, x.flatten(1).tolist()), y.tolist()))
        optimizer.step()
        return torch.tensor(float(len(y))), F.one_hot(torch.zeros_like(y), 3).float()
    row, = sam_at.train(model, data, step, *sam_at.make_optimizer(model, 0.1, 1), 1, batch_size * world)
    every = {*zip(map(tuple, (data.x / 255).flatten(1).tolist()), data.y.tolist())}
    squares = sum(min(batch_size, n - i) ** 2 for i in range(0, n, batch_size))
    assert len(met) == len({*met}) == n and {*met} <= every
    assert (row["epoch"], row["loss"]) == (1, pytest.approx(squares / n))
    assert 0 < row["seconds"] < 99
    assert row["accuracy"] == pytest.approx(100 * sum(y == 0 for _, y in met) / n)

def test_images_are_shuffled_and_augmented_where_that_is_asked_for():
    data = tiny_data(8, size=8)
    originals = [image.flatten().tolist() for image in data.x / 255]
    for data.augment in False, True:
        torch.manual_seed(0)
        met = [image.flatten().tolist() for x, _ in sam_at.batches(data, 3) for image in x]
        kept = sum(image in originals for image in met)
        assert met != originals
        assert kept < 4 if data.augment else kept == 8

@pytest.mark.parametrize("step", [
    partial(sam_at.sam_step, rho=0.02), partial(sam_at.at_step, eps=0.002), partial(sam_at.esam_step, rho=0.02)])
def test_every_method_learns_a_tiny_set_by_heart(step):
    torch.manual_seed(0)
    data = tiny_data(24)
    model = sam_at.make_model("small", 3, width=8)
    optimizer, schedule = sam_at.make_optimizer(model, 0.05, 25)
    rows = list(sam_at.train(model, data, step, optimizer, schedule, 25, 8))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0005) and rows[-1]["epoch"] == 25
    assert rows[-1]["accuracy"] == 100 and rows[-1]["loss"] < rows[0]["loss"] / 5
    assert sam_at.evaluate(model, data.x, data.y, ()) == {"clean": 100}

# == Evaluation ===========================================================================================
def told_by(score, kind=Scored):  # the first of two classes where the score is above 0
    return kind(lambda x, w: -score(x.flatten(1)))

def linear_task(seed, n=60):
    """A linear model, and images away from the border of [0,1] that it classifies with small margins."""
    w = normal(12, seed=seed)
    x = 0.5 + 0.05 * normal(n, 3, 2, 2, seed=seed + 1).clamp(-3, 3)
    model = Scored(lambda x, w: (x.flatten(1) - 0.5) @ w, w)
    score = model(x)[:, 1].detach()
    y = (score + 0.1 * normal(n, seed=seed + 2) > 0).long()
    return model, x, y, score * (2 * y - 1), w

@given(seeds, norms, st.floats(0.001, 0.1), st.integers(1, 70))
def test_robust_accuracy_of_a_linear_model_is_the_closed_form(seed, norm, eps, batch_size):
    """An image withstands eps if its margin exceeds eps * |w|_q, q dual to p."""
    model, x, y, margin, w = linear_task(seed)
    threshold = eps * float(w.abs().sum() if norm == "linf" else w.norm())
    assume((margin - threshold).abs().min() > 1e-4 and margin.abs().min() > 1e-5)
    name = f"{norm} {eps}"
    figures = sam_at.evaluate(model, x, y, [name], steps=40, batch_size=batch_size)
    assert figures["clean"] == pytest.approx(100 * float((margin > 0).float().mean()))
    assert figures[name] == pytest.approx(100 * float((margin > threshold).float().mean()), abs=1e-4)

def test_each_restart_has_its_chance():
    """A third of the ball is wrong, and no gradient leads there."""
    model = told_by(lambda x: (x.mean(1) > 0.4933).float() - 0.5 + 0 * x.sum(1))
    x = torch.full((400, 1, 1, 1), 0.5)
    y = torch.zeros(400, dtype=torch.int64)
    for restarts in 1, 2, 4:
        figures = sam_at.evaluate(model, x, y, ["linf 0.02"], restarts=restarts)
        assert abs(figures["linf 0.02"] - 100 * (2 / 3) ** restarts) < 10

def test_attacks_take_their_steps_and_only_what_is_right_is_attacked():
    model, x, y, margin, _ = linear_task(1)
    assert list(sam_at.evaluate(model, x, y)) == ["clean", "linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255"]
    calls = []
    model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    sam_at.evaluate(model, x, y, ["linf 0.000001"], steps=7)
    assert calls == [60] + [int((margin > 0).sum())] * 8
    mine = lambda model, x, y: calls.append(torch.is_grad_enabled()) or x
    sam_at.evaluate(model, x, y, {"mine": mine}, restarts=3)
    assert calls[9:] == [60, True, calls[1]]  # may differentiate; restarts are PGD's

@given(seeds, st.integers(1, 17), st.booleans())
def test_evaluation_counts_the_whole_set_and_touches_nothing(seed, batch_size, training):
    model = tiny_net(seed).train(training)
    model.net[1].train(not training)
    x, y = batch(17, seed=seed)
    x = (x * 255).byte()
    before = [*(t.clone() for t in model.state_dict().values()), *(m.training for m in model.modules())]
    figures = sam_at.evaluate(model, x, y, ["linf 1/255"], steps=2, batch_size=batch_size)
    after = [*model.state_dict().values(), *(m.training for m in model.modules())]
    assert same_bits(map(torch.as_tensor, before), map(torch.as_tensor, after))
    right = model.eval()(x / 255).argmax(1) == y
    assert figures["clean"] == pytest.approx(100 * float(right.float().mean()))

@given(st.floats(1e-9, 0.99), st.integers(1, 500), st.integers(501, 999))
def test_radii_are_fractions_or_decimals(eps, numerator, denominator):
    assert sam_at.radius(repr(eps)) == eps
    assert sam_at.radius(f"{numerator}/{denominator}") == numerator / denominator
    attack = sam_at.parse_attack(f"margin l2 {eps!r}", steps=numerator).keywords
    assert attack | {"eps": eps, "norm": "l2", "steps": numerator, "loss": sam_at.margin} == attack
    assert sam_at.parse_attack(f"fgsm {eps!r}").func is sam_at.fgsm
    with pytest.raises(ValueError):
        sam_at.parse_attack("margin l3 1/255")

@pytest.mark.parametrize("spoil", [
    lambda x, y: (x, y[:, None]), lambda x, y: (x, y[:-1]), lambda x, y: (x, y.float()), lambda x, y: (x[0], y[:3]),
    lambda x, y: (x.long(), y), lambda x, y: (255 * x, y), lambda x, y: (x - 0.5, y), lambda x, y: (x[:0], y[:0])])
def test_evaluate_refuses_images_labels_and_logits_that_make_no_sense(spoil):
    with pytest.raises(ValueError):
        sam_at.evaluate(tiny_net(), *spoil(*batch(3)))
    with pytest.raises(FloatingPointError, match="finite"):
        sam_at.evaluate(told_by(lambda x: x.sum(1) * math.nan), *batch(3))

# == Doubts about an evaluation ===========================================================================
def one_step(x):
    """Rises towards a mean of 0.473, so that small steps climb back, and is broken where one large step lands."""
    m = x.mean(1)
    return (m - 0.4735).abs() * 60 - 0.05 - 9 * (m < 0.47)

class Random(Scored):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(len(x), 2)

class Softmax(Scored):
    def forward(self, x):
        return super().forward(x).softmax(1)

honest = lambda x: x.mean(1) - 0.45
DOUBTS = {  # a model, and what the sentence must name
    "sound": (told_by(honest), None),
    "sure": (told_by(lambda x: 3e4 * (x.mean(1) - 0.48)), "margin linf 8/255, 9 steps, 3 starts, takes another 6.0"),
    "slow": (told_by(lambda x: x.amax(1) - 0.49), "50 steps"),
    "masked": (told_by(one_step), "fgsm"),
    "flat": (told_by(lambda x: honest(x).clamp(max=0)), "zero or NaN for 6%"),
    "broken": (told_by(lambda x: honest(x) + (0 * x.sum(1)).sqrt()), "zero or NaN for 100%"),
    "random": (told_by(honest, Random), "random"),
    "probabilities": (told_by(honest, Softmax), "probabilities"),
}

@pytest.mark.parametrize("model, says", DOUBTS.values(), ids=DOUBTS.keys())
def test_an_evaluation_that_is_not_to_be_trusted_is_called_so(model, says):
    x = 0.5 + 0.002 * normal(500, 3, 2, 2, seed=0)
    y = (torch.arange(500) < 470).long()
    x[:470] -= 0.1  # the other class, far away
    sizes = []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    state = torch.get_rng_state()
    found = sam_at.doubts(model, x, y, ["linf 8/255", "l2 0.1", "margin l2 1/2", "linf 1/255"], 9, 2)
    assert (not found) if says is None else any(says in doubt for doubt in found), found
    taken = [doubt for doubt in found if "takes another" in doubt]
    assert all(doubt.startswith(("linf 8/255: ", "l2 0.1: ")) for doubt in taken)  # the largest radius
    assert max(sizes) == 200 and torch.get_rng_state().equal(state) and model.training

# == Data sources =========================================================================================
def save(path, colour, size=(32, 32), mode="RGB", **options):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)

def make_folder(root, classes=("cat", "dog"), n=3, size=(32, 32), part="test"):
    for c, name in enumerate(classes):
        for i in range(n):
            for folder in "train", part:
                save(root / folder / name / f"{i}.png", (80 * c, 60, 20 * i), size)
    return root

@pytest.mark.parametrize("part", ["test", "val", "valid"])
def test_a_folder_is_read_class_by_class(part, tmp_path):
    root = make_folder(tmp_path / "images", size=(20, 50), part=part)
    data = sam_at.load_data("folder", root)
    assert data.x.shape == (6, 3, 32, 32) and data.x.dtype == torch.uint8 and data.augment
    assert data.classes == ["cat", "dog"] and data.y.tolist() == [0, 0, 0, 1, 1, 1] == data.y_test.tolist()
    assert data.x[:, :, 5, 5].tolist() == [[c, 60, i] for c in (0, 80) for i in (0, 20, 40)]
    assert (data.source, data.note) == (root.name, "")
    assert cli(*QUICK, "--dataset", "folder", "--data-dir", root)[0] == 0  # a channel is the same everywhere
    for about, source, note in ("", root.name, ""), ("Kätzchen\nDrawn.\nSmall.\n", "Kätzchen", "Drawn. Small."):
        (root / "SOURCE.txt").write_text(about, "utf-8")
        data = sam_at.load_folder(root / "train" / "..")
        assert (data.source, data.note) == (source, note)

def test_images_are_read_upright_and_those_of_more_than_8_bits_refused(tmp_path):
    from PIL import Image
    picture = Image.new("RGB", (32, 32), (250, 0, 0))
    picture.paste((0, 0, 250), (0, 0, 32, 16))  # blue above, red below
    exif = picture.getexif()
    exif[0x0112] = 6  # a camera held on its side
    picture.rotate(90).save(tmp_path / "turned.png", exif=exif)
    read = sam_at.read_image(tmp_path / "turned.png")
    assert read[2, 2].min() == 250 == read[0, 30].min()
    for mode in "I;16", "I", "F":
        save(tmp_path / "deep.tiff", 40_000, mode=mode)
        with pytest.raises(ValueError, match="deep.tiff"):
            sam_at.read_image(tmp_path / "deep.tiff")

@pytest.mark.parametrize("spoil, says", [
    (lambda root: shutil.rmtree(root / "train"), "train"),
    (lambda root: shutil.rmtree(root / "test"), "test"),
    (lambda root: shutil.rmtree(root / "test" / "cat"), "cat"),
    (lambda root: [f.unlink() for f in (root / "train" / "cat").iterdir()], "cat"),
    (lambda root: [shutil.rmtree(root / part / "dog") for part in ("train", "test")], "cat"),
    (lambda root: (root / "train" / "dog" / "1.png").write_bytes(b"no image"), "1.png")])
def test_a_folder_that_cannot_be_used_is_refused_by_name(spoil, says, tmp_path):
    spoil(make_folder(tmp_path / "images"))
    with pytest.raises(sam_at.BadInput, match=says):
        sam_at.load_folder(tmp_path / "images")

def test_tiny_imagenet_as_it_unpacks(tmp_path):
    listed = tmp_path / "val" / "val_annotations.txt"
    for i, (wnid, grey) in enumerate([("n02", 200), ("n01", 100)]):
        save(tmp_path / "train" / wnid / "images" / f"{wnid}_0.png", grey, (64, 64), "L")
        save(tmp_path / "val" / "images" / f"val_{i}.png", grey, (64, 64), "L")
    listed.write_text("val_0.png\tn02\t0\t0\t62\t62\nval_1.png\tn01\t0\t0\t62\t62\n")
    data = sam_at.load_data("tiny-imagenet", tmp_path)
    assert data.y.tolist() == [0, 1] and data.x[:, 0, 0, 0].tolist() == [100, 200]
    assert data.y_test.tolist() == [1, 0] and data.x_test[:, 0, 0, 0].tolist() == [200, 100]
    for wrong in "val_0.png\tn09\t0\n", "no tab\n", "val_7.png\tn01\n":
        listed.write_text(wrong)
        with pytest.raises(sam_at.BadInput):
            sam_at.load_folder(tmp_path)

@pytest.mark.parametrize("name, folder, key, parts", [
    ("cifar10", "cifar-10-batches-py", "labels", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]),
    ("cifar100", "cifar-100-python", "fine_labels", ["train", "test"])])
def test_cifar_as_downloaded(name, folder, key, parts, tmp_path, monkeypatch):
    """Pickled batches in the real layout, read by torchvision; only its checksums are put aside."""
    import pickle
    from torchvision.datasets import cifar
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda *a, **k: open("no network"))
    with pytest.raises(sam_at.BadInput, match=f"{name}.*--dataset demo.*no network"):
        sam_at.load_data(name, tmp_path / "nowhere")
    monkeypatch.setattr(cifar, "check_integrity", lambda *_: True)
    monkeypatch.setattr(cifar.CIFAR10, "_load_meta", lambda self: setattr(self, "classes", ["a", "b", "c"]))
    (tmp_path / folder).mkdir()
    made = [(255 * pixels(4, 3, 32, 32, seed=i)).byte() for i in range(len(parts))]
    for i, part in enumerate(parts):
        content = {"data": made[i].flatten(1).numpy(), key: [i % 3, 0, 1, 2]}
        (tmp_path / folder / part).write_bytes(pickle.dumps(content))
    data = sam_at.load_data(name, tmp_path)
    assert data.x.equal(torch.cat(made[:-1])) and data.x_test.equal(made[-1])
    assert data.y[:4].tolist() == [0, 0, 1, 2] and data.y_test[0] == (len(parts) - 1) % 3
    assert data.classes == ["a", "b", "c"] and data.augment and data.source == name

# == The simplified model =================================================================================
MODEL = {"p": st.floats(0.55, 0.95), "eta": st.floats(0.2, 0.8), "n": st.integers(2, 20)}

def accuracy(w, p, eta, n):
    """A(w) in plain arithmetic."""
    Phi = lambda z: 0.5 * math.erfc(-z / math.sqrt(2))
    return p * Phi((w + eta * n) / math.sqrt(n)) + (1 - p) * Phi((eta * n - w) / math.sqrt(n))

def sam_optimum(p, eta, n, rho):
    """A(w - rho) = A(w + rho), by bisection: an independent way to the maximiser of the smaller one."""
    low, high = 0.0, 100.0
    for _ in range(200):
        w = (low + high) / 2
        low, high = (w, high) if accuracy(w + rho, p, eta, n) > accuracy(w - rho, p, eta, n) else (low, w)
    return low

@given(**MODEL, w=st.floats(-5, 10))
def test_the_accuracy_of_the_simplified_model_is_that_of_its_samples(p, eta, n, w):
    rng = torch.Generator().manual_seed(n)
    robust = torch.where(torch.rand(40_000, generator=rng) < p, 1.0, -1.0)  # y = 1
    score = w * robust + eta * n + math.sqrt(n) * torch.randn(40_000, generator=rng)
    a = float(sam_at.simple_accuracy(torch.tensor(w, dtype=f64), p, eta, n))
    assert abs(float((score > 0).float().mean()) - a) <= 0.015
    assert a == pytest.approx(accuracy(w, p, eta, n), abs=1e-12)

@settings(max_examples=60)
@given(p=st.floats(0.6, 0.9), eta=st.floats(0.3, 0.6), n=st.integers(4, 12))
def test_the_expansions_are_right_to_their_order(p, eta, n):
    """Halving the radius divides what is left by 2^4 (SAM, fourth order) and 2^2 (AT, second order)."""
    rho = 0.5 * math.sqrt(n)
    w = sam_at.w_standard(p, eta)
    left = [sam_optimum(p, eta, n, r) - sam_at.w_sam(p, eta, n, r) for r in (rho, rho / 2)]
    assert abs(left[0]) < 0.1 * w * (rho ** 2 / n) ** 2
    if abs(left[1]) > 0.02 * w * (rho ** 2 / 4 / n) ** 2:  # else the fourth order vanishes, too
        assert 13 < left[0] / left[1] < 18
    left = [sam_at.w_standard(p, eta - e) - w * (1 + e / eta) for e in (0.02 * eta, 0.01 * eta)]
    assert left[0] / left[1] == pytest.approx(4, rel=0.05)

def test_theory_agrees_with_itself_three_times_over():
    """The radii are those of the rule eta/eps = 1 + 3n/rho^2, at which AT and SAM end at the same weight."""
    assert "closed_form" in cli(*QUICK, "--theory", "--json", "rows.json")[1] and os.listdir() == ["rows.json"]
    rows = json.loads(Path("rows.json").read_text())
    assert [r["training"] for r in rows] == ["sgd", *["at"] * 3, *["sam"] * 3, "sam, its gradient"]
    for r in rows:
        assert r["numerical"] == pytest.approx(r["closed_form"], rel=0.002)
        assert r["trained"] == pytest.approx(r["closed_form"], rel=0.01)
    for at, sam in zip(rows[1:4], rows[4:7]):
        assert 0.5 / at["radius"] == pytest.approx(1 + 30 / sam["radius"] ** 2)
        assert at["closed_form"] == pytest.approx(sam["closed_form"])
    assert rows[6]["closed_form"] == pytest.approx(rows[0]["closed_form"] * (1 + 4 / 30))

# == The duality, measured ================================================================================
@settings(max_examples=6)
@given(seeds, norms)
def test_rises_are_those_of_the_ascent_and_of_pgd(seed, norm):
    """To first order: rho |dL/dw|, and eps |dL/dx| in the dual norm, image by image."""
    model = tiny_net(seed, dtype=f64)
    x, y = batch(8, seed=seed, dtype=f64)
    before = weights_of(model)
    rises = sam_at.sharpness(model, x, y, (1e-4, 0.1), [f"{norm} 0.0001", f"{norm} 0.05"])
    assert model.training and same_bits(before, weights_of(model))
    loss = F.cross_entropy(model.eval()(x.requires_grad_()), y)
    loss.backward()
    steepness = length(w.grad for w in model.parameters())
    dual = x.grad.flatten(1).abs().sum() if norm == "linf" else x.grad.flatten(1).norm(dim=1).sum()
    assert rises["rho 0.0001"] == pytest.approx(1e-4 * steepness, rel=0.01)
    assert rises[f"{norm} 0.0001"] == pytest.approx(1e-4 * float(dual), rel=0.3)
    assert rises["rho 0.1"] > 100 * rises["rho 0.0001"] and rises[f"{norm} 0.05"] > 50 * rises[f"{norm} 0.0001"]

# == 12. Settings and the command line ========================================================
QUICK = ["--method", "sgd", "--width", 2, "--epochs", 2, "--batch-size", 16,
         "--attacks", "linf 2/255", "--eval-steps", 1]
STAGES = {  # what stands in for the stages of a run
    "load_data": lambda name, directory: tiny_data(200),
    "make_model": lambda name, classes, mean_std, width: tiny_net(classes=classes),
    "train": lambda model, data, step, optimizer, schedule, epochs, batch_size: [
        {"epoch": 1, "loss": 1.0, "accuracy": 50.0, "seconds": 1.0}],
    "evaluate": lambda model, images, labels, attacks, steps, restarts: {attacks[0]: 0},
    "doubts": lambda model, images, labels, names, steps, restarts, seed: [],
    "compile": lambda model, dynamic: nn.Sequential(model)}

@pytest.fixture
def seen(monkeypatch):
    """What reaches the stages of a run, by stage; nothing is trained or measured."""
    calls = {stage: [] for stage in STAGES}
    def stand_in(stage, *given, **named):
        names = STAGES[stage].__code__.co_varnames
        call = dict(zip(names, given)) | named
        calls[stage].append(call | {"drawn": float(torch.rand(()))})
        return STAGES[stage](*map(call.get, names))
    for stage in STAGES:
        place = torch if stage == "compile" else sam_at
        monkeypatch.setattr(place, stage, partial(stand_in, stage))
    return calls

def each(calls, *names):
    return [tuple(call[name] for name in names) for call in calls]

def same_steps(calls, *steps):
    """Whether the steps that reached train do to a small network what these do."""
    def moves(step):
        return lambda model: step(model, *batch(6), sgd(model))
    pairs = zip(calls, steps, strict=True)
    return all(same_bits(*twins(1, moves(call["step"]), moves(step))) for call, step in pairs)

def test_every_flag_arrives(seen):
    flags = """--method sam+at --rho 0.3 --eps 3/255 --norm l2 --attack-steps 7 --dataset folder
        --data-dir pics --model prn18 --width 5 --epochs 4 --batch-size 6 --lr 0.03 --bf16 --compile
        --seed 11 --eval-steps 13 --restarts 3 --images 9 --runs elsewhere --json out.json --device cpu"""
    attacks = ["fgsm 1/255", "l2 0.5"]
    assert cli(*flags.split(), "--attacks", *attacks, *attacks)[::2] == (0, "")  # each once
    (model,), (training,), evaluations = seen["make_model"], seen["train"], seen["evaluate"]
    assert each(seen["load_data"], "name", "directory") == [("folder", "pics")]
    whole = tiny_data(200)
    assert model.items() >= {"name": "prn18", "classes": 3, "width": 5}.items()
    for found, f in zip(model["mean_std"], (torch.mean, torch.std)):
        assert found == pytest.approx([float(f(whole.x[:, c] / 255)) for c in range(3)], rel=1e-4)
    assert (training["epochs"], training["batch_size"], training["optimizer"].defaults["lr"]) == (4, 6, 0.03)
    assert training["model"][0].bf16 and each(seen["compile"], "dynamic") == [(False,)]
    sam = partial(sam_at.sam_step, rho=0.3)
    assert same_steps([training], partial(sam_at.at_step, eps=3 / 255, norm="l2", steps=7, step=sam))
    assert {call["drawn"] for call in [model, *evaluations]} == {float(pixels(1, seed=11))}  # each alike
    assert each(evaluations, "attacks") == [([attack],) for attack in attacks]
    assert each(seen["doubts"], "names", "seed") == [(attacks, 11)]
    chosen = torch.arange(9) * 200 // 9
    for call in evaluations + seen["doubts"]:
        assert (call["steps"], call["restarts"], call["model"]) == (13, 3, training["model"][0])
        assert call["images"].equal(whole.x_test[chosen]) and call["labels"].equal(whole.y_test[chosen])
    assert sorted(os.listdir()) == ["elsewhere", "out.json"]

def test_a_method_is_the_step_of_its_name(seen):
    sam, esam = partial(sam_at.sam_step, rho=0.15), partial(sam_at.esam_step, rho=0.15)
    asam = partial(sam, ascend=sam_at.adaptive_ascent)
    at = partial(sam_at.at_step, eps=4 / 255)
    awp = partial(at, step=partial(sam, rho=0.005, ascend=sam_at.layerwise_ascent))
    cli("--method", "sgd", "sam", "asam", "esam", "at", "sam+at", "awp", "--no-bf16")
    assert same_steps(seen["train"], sam_at.sgd_step, sam, asam, esam, at, partial(at, step=sam), awp)
    assert not seen["compile"] and not any(call["model"].bf16 for call in seen["train"])
    assert {*each(seen["make_model"], "drawn")} == {(float(pixels(1, seed=0)),)}

@pytest.mark.parametrize("flags, eps", [
    ("", 4 / 255), ("--norm l2", 128 / 255), ("--norm l2 --eps 0.25", 0.25), ("--preset paper", 8 / 255),
    ("--preset paper --norm l2", 128 / 255), ("--preset paper --model deit_ti --eps 1/255", 1 / 255)])
def test_presets_are_the_papers_recipe_and_the_demos(flags, eps, seen):
    assert cli("--device", "cpu", *flags.split())[0] == 0
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    norm, paper, deit = (word in flags for word in ("l2", "paper", "deit"))
    at = partial(sam_at.at_step, eps=eps, norm="l2" if norm else "linf", steps=5)
    sam = partial(sam_at.sam_step, rho=0.2 if paper else 0.15)
    assert same_steps(seen["train"], sam_at.sgd_step, sam, at)
    assert each(seen["load_data"], "name", "directory") == [("cifar10" if paper else "demo", "data")]
    model = "deit_ti" if deit else "prn18" if paper else "small"
    assert each(seen["make_model"], "name", "width") == 3 * [(model, None)]
    for call in seen["train"]:
        assert {*call["schedule"].milestones} == ({75, 90} if paper else {8, 9})
        assert call["batch_size"] == 128 and call["model"].bf16 == bf16
        kind, recipe = type(call["optimizer"]), call["optimizer"].defaults
        assert (kind is torch.optim.AdamW) == deit and (deit or recipe["momentum"] == 0.9)
        assert (recipe["lr"], recipe["weight_decay"]) == ((0.001, 0.05) if deit else (0.1, 5e-4))
    attacks = [([name], 10, 1) for name in ("linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255")]
    assert each(seen["evaluate"], "attacks", "steps", "restarts") == 3 * attacks
    assert {len(call["images"]) for call in seen["evaluate"]} == {200}

DECIDES = """rho=0 eps=2/255 norm=l2 attack-steps=3 dataset=cifar10 model=prn18 width=3 epochs=3
    batch-size=9 lr=0.2 bf16 compile seed=1 method=awp awp-gamma=0"""
MEASURES = "attacks=fgsm_1/255 eval-steps=3 restarts=2 images=7 sharpness json=table.json"
ELSEWHERE = "preset data-dir device runs theory benchmark report pictures"

def test_what_decides_the_weights_and_nothing_else_makes_another_run(seen, monkeypatch):
    def runs_after(*argv):
        assert cli(*argv)[0] == 0
        Path("table.json").unlink(missing_ok=True)
        return len(os.listdir("runs"))
    flags = [flag.split("=")[0] for flag in f"{DECIDES} {MEASURES} {ELSEWHERE}".split()]
    assert {*flags} == {name.replace("_", "-") for name in vars(sam_at.parse_args([]))}
    assert all("--" + flag in cli("--help")[1] for flag in flags)
    given = ["--method", "sam+at", "--no-bf16"]
    runs = runs_after(*given)
    for flag in f"{DECIDES} {MEASURES}".split():
        given += ("--" + flag.replace("_", " ")).split("=")
        runs += flag in DECIDES
        assert runs_after(*given) == runs, flag
    runs = runs_after("--method", "sgd")
    radii = "--rho 0.3 --eps 0.2 --norm l2 --attack-steps 2 --awp-gamma 1"  # SGD has none
    assert runs_after("--method", "sgd", *radii.split()) == runs
    for n, part in enumerate(["x", "y", "x_test", "y_test"], 1):
        other = tiny_data(200)
        setattr(other, part, getattr(other, part).roll(1, 0))
        monkeypatch.setattr(sam_at, "load_data", lambda *_: other)
        assert runs_after("--method", "sgd") == runs + n

BAD = """eps 8 > radius '8'; eps 0 > eps; eps x > eps; eps 8/0 > eps; eps nan > eps; eps 1 > eps
    eps -0.1 > eps; attacks l7_1/255 > l7 1/255; attacks linf_8 > '8'; attacks linf > 'linf'
    attacks linf_0.1_0.2 > 0.2; attacks > attacks; attacks _ > ''; method sma > sma; model vgg > vgg; norm l1 > l1
    roh 1 > roh; epoch 1 > epoch; epochs 1 stray > stray; rho -0.1 > rho; rho nan > rho; rho inf > rho
    rho big > rho; lr 0 > lr; lr nan > lr; awp-gamma -1 > awp-gamma; epochs 0 > epochs
    epochs 1000000000000000 > epochs; epochs 1.5 > epochs; attack-steps 0 > attack-steps; width 0 > width
    width 1000000000000 > width; batch-size 0 > batch-size; seed -1 > seed; seed 99999999999999999999 > seed
    images 0 > images; restarts 0 > restarts; eval-steps -1 > eval-steps; runs _ > empty; json mine > mine
    device cuda > device; model deit_ti --width 4 > width; benchmark --model deit_ti --width 4 > width
    data-dir pics > dataset; dataset folder > data-dir; dataset tiny-imagenet > data-dir; data-dir _ > empty
    runs /dev/null > /dev/null; dataset folder --data-dir nowhere > nowhere; report _ > empty; width 900000000 > width
    json _ > empty; pictures _ > empty; pictures . > matplotlib; report . --runs none > none; report . > no records"""

@pytest.mark.parametrize("case", [case.strip() for case in BAD.replace("\n", ";").split(";")])
def test_bad_input_is_one_message_and_exit_code_2(case, tiny_demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it was not there
    Path("mine").write_text("mine")
    flags, says = case.split(" > ")
    words = [word.replace("_", " ").strip() if word[0] in "_l" else word for word in flags.split()]
    code, out, err = cli(*QUICK, "--" + words[0], *words[1:])
    assert code == 2 and says in err.splitlines()[-1]
    assert os.listdir() == ["mine"] and Path("mine").read_text() == "mine"

# == 13. Runs =================================================================================
def only_run(runs="runs"):
    folder, = Path(runs).iterdir()
    return folder
def records_of(runs="runs"):
    return [json.loads(line) for line in open(only_run(runs) / "results.jsonl")]
def state_of(runs="runs"):
    return torch.load(only_run(runs) / "checkpoint.pt", weights_only=True)

def finish(body, *argv, command=(sys.executable, "script.py"), **environment):
    """What a script prints that has imported sam_at, made the demo's data small, and ends well."""
    Path("script.py").write_text(f"""
import os, random, signal, sys, time
sys.path[:0] = {[str(Path(file).parent) for file in (sam_at.__file__, __file__)]}
import sam_at
sam_at.demo_data = sam_at.partial(sam_at.demo_data, n_train=64, n_test=40)
sam_at.doubts = lambda *_: []
{body}""", encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([*map(str, [*command, *argv])], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return done.stdout.decode()

@pytest.fixture
def quick(tiny_demo, monkeypatch):
    monkeypatch.setattr(sam_at, "doubts", lambda *_: ["the moon is full"])

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
sys.exit(sam_at.main())""", *QUICK, "--method", "sam", "--epochs", 40)
    assert "goes on after epoch" in out
    assert same_bits(*(state_of(runs)["model"].values() for runs in ("whole", "runs")))
    assert records_of("whole")[0]["figures"] == records_of()[0]["figures"]

def test_a_finished_run_is_reported_and_other_attacks_are_one_more_record(quick, monkeypatch):
    first = cli(*QUICK)[1].split("\n\n")[1]
    monkeypatch.setattr(sam_at, "sgd_step", None)  # no step can be made
    with monkeypatch.context() as patch:
        patch.setattr(sam_at, "write_whole", None)  # a folder that can only be read
        assert cli(*QUICK)[1].split("\n\n")[1] == first
    others = [["--attacks", "fgsm 0.1", "l2 0.5"], ["--eval-steps", 2], ["--restarts", 2], ["--images", 7]]
    for other in others + others:
        assert cli(*QUICK, *other)[0] == 0
    assert [*records_of()[1]["figures"]] == ["clean", "fgsm 0.1", "l2 0.5"]
    assert [r["images"] for r in records_of()] == [40, 40, 40, 40, 7]
    monkeypatch.setattr(sam_at, "doubts", lambda *_: cli(*QUICK, "--sharpness") and [])  # ends before the other
    assert cli(*QUICK, "--images", 3)[0] == 0 and [r["images"] for r in records_of()][5:] == [40, 3]
    out, record = cli(*QUICK, "--sharpness")[1], records_of()[5]
    assert record["how"] == {"sharpness": True, "images": 1000} and f" {record['figures']['rho 0.2']:.2f}" in out
    assert [*record["figures"]] == ["rho 0.05", "rho 0.1", "rho 0.2", *FOUR]

def test_a_record_holds_what_it_takes_to_repeat_the_run(quick):
    _, out, _ = cli(*QUICK, "--method", "sam", "--seed", 3, "--epochs", 3, "--json", "table.json")
    record, = records_of()
    data, figures = sam_at.demo_data(), record["figures"]
    facts = {"doubts": ["the moon is full"], "data": data.source, "note": data.note, "images": 40,
             "torch": torch.__version__, "seconds": 3 * min(row["seconds"] for row in state_of()["log"])}
    assert record == record | facts and record["machine"] and record["code"] and record["date"]
    assert record["run"]["rho"] == 0.15 and record["how"]["attacks"] == ["linf 2/255"]
    assert not data.augment
    row = {"method": "sam", "seconds": record["seconds"], "clean": figures["clean"],
           "robust": {"linf 2/255": figures["linf 2/255"]}}
    assert f"accuracy {record['train_accuracy']:.1f}%" in out.split("epoch 3/3")[1]
    assert "the moon is full" in out and json.loads(Path("table.json").read_text()) == [row]
    model = sam_at.make_model("small", 10, width=2)
    model.load_state_dict(state_of()["model"])
    torch.manual_seed(3)
    assert figures == sam_at.evaluate(model, data.x_test, data.y_test, ["linf 2/255"], steps=1)

def refused_and_untouched(path, contents, *argv):
    for content in contents:
        path.write_bytes(content)
        code, out, err = cli(*argv)
        assert code == 2 and err.count("\n") == 1 and str(path) in err, (content[:200], err)
        assert path.read_bytes() == content and "epoch 2" not in out

def test_a_broken_checkpoint_is_named_and_kept(quick):
    cli(*QUICK, "--seed", 1, "--runs", "other")
    cli(*QUICK)
    path, state = only_run() / "checkpoint.pt", state_of()
    (only_run() / "results.jsonl").unlink()
    bias = [*state["model"].values()][-1]
    bias.copy_(bias.nextafter(torch.tensor(9.0)))  # its last bit
    torch.save(state, "bit.pt")
    torch.save([1], "list.pt")
    files = [only_run("other") / "checkpoint.pt", Path("bit.pt"), Path("list.pt")]
    refused_and_untouched(path, [b"", path.read_bytes()[:-100], *map(Path.read_bytes, files)], *QUICK)

def test_broken_records_are_named_and_kept(quick):
    cli(*QUICK)
    path, (record,) = only_run() / "results.jsonl", records_of()
    broken = [{k: v for k, v in record.items() if k != key} for key in {*record} - {"torch", "date", "code"}]
    broken += [record | {"figures": {"clean": "x"}}, record | {"doubts": None}, record | {"images": "text"}]
    contents = [b"{", b"[1]", b"\xe9", *(json.dumps(r).encode() for r in broken)]
    refused_and_untouched(path, contents, *QUICK)
    refused_and_untouched(path, contents, "--report", ".")
    assert os.listdir() == ["runs"]

def test_no_room_divergence_and_ctrl_c_are_one_line_and_the_run_goes_on(quick, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # ulimit -f
    try:
        code, _, err = cli(*QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.count("\n") == 1
    code, out, err = cli(*QUICK, "--lr", 1e8, "--runs", "steep")
    assert code == 2 and "epoch 1" in err and err.count("\n") == 1 and "clean" not in out
    with monkeypatch.context() as patch:
        patch.setattr(sam_at, "evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        code, _, err = cli(*QUICK)
    assert code == 130 and err.count("\n") == 1
    assert "goes on after epoch 2/2" in cli(*QUICK)[1]

def test_a_terminal_without_letters_and_a_closed_one():
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert "B?ume" in finish("""
data = sam_at.demo_data()
data.source = "Bäume"
sam_at.load_data = lambda *_: data
sys.exit(sam_at.main() or sam_at.main(["--report", "."]))""", *QUICK, **locale)
    assert "Bäume" in Path("RESULTS.md").read_text("utf-8")
    closed = ["bash", "-c", f'"$@" >&- && ! "$1" "{sam_at.__file__}" --lr 0', "-", sys.executable, "script.py"]
    finish("sys.exit(sam_at.main())", *QUICK, "--runs", "closed", command=closed)

# == 14. More than one device =================================================================
def test_two_processes_train_as_one_but_each_share_has_its_own_v(tiny_demo):
    flags = [*QUICK, "--method", "sam", "--rho", 0.3, "--no-bf16"]
    port = random.SystemRandom().randint(20_000, 40_000)
    torchrun = f"-m torch.distributed.run --nproc-per-node 2 --master-port {port} script.py"
    out = finish(f"""
import {Path(__file__).stem} as suite
sam_at.make_model = lambda *_: suite.tiny_net(classes=10, batchnorm=False)
sys.exit(sam_at.main())""", *flags, command=[sys.executable, *torchrun.split()])
    assert out.count("epoch 1/2") == 1  # one of the two speaks
    data = sam_at.demo_data()
    model = tiny_net(classes=10, batchnorm=False)
    optimizer = sam_at.make_optimizer(model, 0.1, 100)[0]
    for x, y in [*sam_at.batches(data, 16), *sam_at.batches(data, 16)]:
        shares = []
        for share in slice(0, None, 2), slice(1, None, 2):
            sam_at.sam_step(model, x[share], y[share], sgd(model, lr=0.0), rho=0.3)
            shares.append([w.grad for w in model.parameters()])
        for w, a, b in zip(model.parameters(), *shares):
            w.grad = (a + b) / 2
        optimizer.step()
    for name, w in model.named_parameters():
        assert torch.allclose(w, state_of()["model"][name], atol=1e-5), name
    assert "epoch 1/2" in cli(*flags)[1]  # by one process it is another run

def test_only_the_first_process_writes_and_speaks_and_shares_are_equal(tiny_demo, monkeypatch):
    monkeypatch.setattr(sam_at, "RANK", 1)
    assert cli(*QUICK)[0] == 0 and not [*Path().rglob("*.pt")]
    for error in "MemoryError", "torch.OutOfMemoryError('out of memory\\n.')":
        monkeypatch.setattr(sam_at, "train", lambda *_: exec("raise " + error))
        assert cli(*QUICK, "--seed", 1)[2].count("\n") == 1  # the first cannot know
    monkeypatch.setattr(sam_at, "WORLD", 3)
    assert cli(*QUICK)[::2] == (2, "")

# == 15. What a step costs ====================================================================
def test_the_benchmark_compares_a_step_of_each_method_with_sgd(monkeypatch):
    """Here a step takes a sixth of a second for each of the model's passes in three steps."""
    passes = []
    def timed(timer, **_):
        passes.clear()
        timer.timeit(1)  # after two to warm up
        return sam_at.argparse.Namespace(median=sum(passes) / 6)
    monkeypatch.setattr("torch.utils.benchmark.Timer.adaptive_autorange", timed)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    count = lambda module, *_: passes.append(isinstance(module, sam_at.Classifier))
    with nn.modules.module.register_module_forward_hook(count):
        out = cli(*"--benchmark --method at sam --width 2 --batch-size 6 --json b.json".split())[1]
    rows = [{"method": m, "step_s": n / 2, "ratio_to_sgd": n} for m, n in [("sgd", 1), ("at", 6), ("sam", 2)]]
    assert json.loads(Path("b.json").read_text()) == rows and os.listdir() == ["b.json"]
    assert "at 3.000 6.000" in " ".join(out.split())
    assert not torch.backends.cudnn.allow_tf32

# == 16. What came of it ======================================================================
FOUR = ["linf 1/255", "linf 2/255", "l2 16/255", "l2 32/255"]
RADII = {"sgd": {}, "at": {"norm": "linf", "eps": 4 / 255, "attack_steps": 5}}
RUN = {"dataset": "demo", "model": "small", "width": None, "epochs": 15, "batch_size": 128, "lr": 0.1,
       "bf16": False, "compile": False, "seed": 0, "device": "cpu", "data_sha256": "0"}
RECORD = {"doubts": [], "images": 10_000, "seconds": 10.0, "train_accuracy": 99.0, "data": "made-up data",
          "note": "A note.", "machine": "abacus", "torch": "2", "date": "2026-01-01", "code": "0"}

def made_up(method, clean=50.0, robust=(40.0,) * 4, keys=FOUR, run=(), how=(), **more):
    run = {"method": method, **RADII.get(method, {"rho": 0.2}), **RUN, **dict(run)}
    how = {"attacks": keys, "eval_steps": 10, "restarts": 1, "images": None, **dict(how)}
    return {"run": run, "how": how, "figures": {"clean": clean, **dict(zip(keys, robust))}, **RECORD, **more}

def report_of(*records, **solved):
    """there/RESULTS.md of records and those in mine/, and its tables of accuracies as rows of cells."""
    Path("there/results").mkdir(exist_ok=True, parents=True)
    Path("there/results/records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    row = {"training": "at", "radius": 0.1, "closed_form": 2.0, "numerical": 2.001, "trained": 2.01}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sam_at, "theory", lambda: [row | solved])
        assert cli("--report", "there", "--runs", "mine")[::2] == (0, "")
    text = Path("there/RESULTS.md").read_text("utf-8")
    tables = [block.strip().splitlines() for block in text.split("```")[1:-2:2]]
    return text, [[[c.strip() for c in line.split("  ") if c.strip()] for line in t] for t in tables]

def test_tables_hold_mean_and_deviation_of_records_of_the_same_settings():
    runs = {"model": "deit_ti", "width": 3, "epochs": 3, "batch-size": 3, "lr": 0.3, "dataset": "cifar10"}
    other = [{"run": {key.replace("-", "_"): value}} for key, value in runs.items()]
    other += [{"run": run} for run in ({"data_sha256": "1"}, {"bf16": True}, {"device": "cuda x 2"})] + [{"images": 3}]
    other += [{"how": {"eval_steps": 3}}, {"how": {"restarts": 3}}, {"data": "others"}, {"keys": FOUR[:2]}]
    at = {"attack_steps": 7, "norm": "l2", "eps": 128 / 255}
    drops = [[], ["linf 2/255: fgsm takes another 2.5", "l2 1: it takes another 10.5", "random"], ["random"]]
    alike = [made_up("at", run=at), made_up("at", doubts=drops[2]), made_up("sam", doubts=drops[1]),
             made_up("sam", run={"rho": 0.1}), made_up("sgd", run={"device": "cuda", "compile": True}), made_up("sgd"),
             made_up("sgd", 54.0, [47.0, 40.0, 40.0, 49.0], run={"seed": 1}, seconds=30.0, train_accuracy=98.0)]
    text, tables = report_of(*alike, *(made_up("sgd", **difference) for difference in other))
    assert sorted(map(len, tables)) == [3] * len(other) + [7]
    top, head, *rows = max(tables, key=len)
    assert top + head == "linf linf l2 l2 train train method seeds clean 1/255 2/255 16/255 32/255 stronger % s".split()
    assert rows[0] == "sgd|2|52.0±2.8|43.5±4.9|40.0±0.0|40.0±0.0|40 49|98.5|10.0".split("|")  # 40 and 49: far apart
    assert [[row[0], row[1], row[7:]] for row in rows[1:]] == [
        ["sam rho 0.1", "1", ["99.0", "10.0"]], ["sam rho 0.2", "1", ["-10.5", "99.0", "10.0"]],
        ["at l2 128/255 steps 7", "1", ["99.0", "10.0"]], ["at linf 4/255", "1", ["?", "99.0", "10.0"]]]
    assert text.count("A note.") == text.count("abacus") == len(tables)
    assert "--nproc-per-node 2" in text
    assert "others" in text and all(f"--{key} {value}" in text for key, value in runs.items())
    assert "--lr 0.1" not in text and text.count("--bf16`") == 1 and text.count("--no-bf16") == len(tables) - 1

def mean_and_error(records, keys):  # the larger of the seeds' error and the test set's
    t = torch.tensor([[r["figures"][key] for key in keys] for r in records], dtype=f64).mean(1)
    a, seeds = float(t.mean()), float(t.std(correction=min(1, len(t) - 1)))
    return a, max(seeds / math.sqrt(len(t)), math.sqrt(a * (100 - a) / 2_500))

def gain(records, others, *keys):
    (a, error), (b, other) = mean_and_error(records, keys), mean_and_error(others, keys)
    return a - b, math.hypot(error, other)

rises = st.sampled_from([-3, -1, 1.2, 1.7, 2.6, 8])
losses = st.sampled_from([-2, -0.6, -0.4, 0, 1])
ROWS = st.lists(st.tuples(losses, rises, rises, st.integers(0, 1)), max_size=2)

@settings(max_examples=300)
@given(ROWS, ROWS, ROWS)
@example([(0, 2.6, 2.6, 0), (0, 8, 1.2, 0)], [], [])  # more robust on average, not everywhere
def test_verdicts_follow_their_rules(sams, ats, variants):
    keys = ["a", "b"]
    rows = {"sgd": [made_up("sgd", 50.0, [40.0, 40.0], keys, images=2_500)]}
    for method, drawn in ("sam", sams), ("at", ats), ("asam", variants):
        for i, (clean, a, b, spread) in enumerate(drawn):
            up = 40 + i / 100 + 4 * (method == "at")
            rows[f"{method} {i}"] = [made_up(method, 50.0 + clean, [up + a + d, up + b + d], keys, images=2_500)
                                     for d in {-2 * spread, 2 * spread}]  # one seed or two
    gains = lambda label, other: [gain(rows[label], rows[other], key) for key in keys]
    ahead = lambda label, other="sgd": all(d > 2 * e for d, e in gains(label, other))
    clean = lambda label, other="sgd": gain(rows[label], rows[other], "clean")[0]
    robust = lambda label: gain(rows[label], rows["sgd"], *keys)[0]
    free = lambda label: ahead(label) and clean(label) >= -0.5
    sam, at, asam = ([label for label in rows if label.startswith(m)] for m in ("sam", "at", "asam"))
    wanted = {"C1": any(map(free, sam))} if sam else {}
    wanted |= {"C5": all(map(free, asam))} if asam else {}
    if sam and at:
        best, gentle = max(at, key=robust), max(sam, key=robust)
        wanted["C2"] = all(ahead(best, other) for other in ["sgd", *sam]) and clean(best) < -0.5
        wanted["C3"] = 0 < robust(gentle) < robust(best) and clean(gentle, best) > 0
    found = sam_at.verdicts(rows)
    assert {claim: text.split(",")[0] for claim, text in found.items()} == {
        claim: "yes" if holds else "no" for claim, holds in wanted.items()}
    assert not sam and not asam or sam_at.verdicts({label: rows[label] for label in sam + at + asam}) == {}

@given(st.permutations(range(5)), st.permutations(range(5)))
def test_rank_correlation_is_spearmans_and_p_the_share_of_orders_as_far_from_zero(a, b):
    spearman = lambda a, b: 1 - 6 * sum((i - j) ** 2 for i, j in zip(a, b)) / 120  # n (n^2 - 1) = 120
    r, p = sam_at.rank_correlation([math.exp(i) for i in a], [float(j) ** 3 for j in b])
    far = [abs(spearman(a, order)) >= abs(spearman(a, b)) - 1e-6 for order in itertools.permutations(b)]
    assert math.isclose(r, spearman(a, b), abs_tol=1e-6) and abs(p - sum(far) / 120) < 0.025

def test_sharpness_of_four_methods_or_more_has_its_rank_correlation():
    keys = ["rho 0.05", "rho 0.1", "rho 0.2", "linf 1/255", "linf 2/255"]
    figures = [[0, 0, 0, 8, 0], [1, 1, 20, 1, 0], [0, 9, 0, 0, 9], [1, 0, 0, 9, 9], [10, 10, 10, 0, 0]]
    runs = [made_up("sam", run={"rho": i % 4, "seed": i // 4}) | {"figures": dict(zip(keys, row))}
            for i, row in enumerate(figures)]  # first and last are seeds; sums of 15 22 9 1 and 4 1 9 18
    said = "Rank correlation of the rises around weights and inputs: -1.00, p = 0.08"
    assert said in report_of(*runs)[0] and "correlation" not in report_of(*runs[:3])[0]

def test_every_claim_has_its_verdict_on_top():
    rows = [made_up("sam", 50.0, [41.0] * 4), made_up("sam", 49.0, [44.0] * 4, run={"rho": 0.4})]
    rows += [made_up(*row, run={"seed": seed}) for seed in (0, 1) for row in (["sgd"], ["at", 45.0, [60.0] * 4])]
    other = [made_up(method, keys=["fgsm 1/255"], images=1000) for method in ("sgd", "sam", "at")]  # decides nothing
    esam = [made_up("esam", 50.0, [42.0] * 4, data="a data"), made_up("sgd", data="a data")]
    for solved, c4 in ({}, "yes; within 0.5%"), ({"numerical": 2.07}, "no; within 3.5%"), ({"trained": 1.93}, "no"):
        text, _ = report_of(*rows, *other, *esam, **solved)
        said = [line.split("|")[1:3] for line in text.split("\n\n")[2].splitlines()[2:]]
        assert [claim.split(".")[0] for claim, _ in said] == [" C1", " C2", " C3", " C4", " C5", " C6"]
        c1, c2, c3, four, c5, c6 = (verdict.strip() for _, verdict in said)
        assert c1.startswith("table 2: no, seeds: 1; sam rho 0.2 +1.0 ± 0.7, clear under 0/4, clean +0.0 ± 0.7")
        assert c2 == "table 2: yes, seeds: 2; at linf 4/255 +20.0 ± 0.7, clear under 4/4, clean -5.0 ± 0.7"
        assert c3.startswith("table 2: yes, seeds: 1; sam") and c5.startswith("table 1: yes, seeds") and "yes" in c6
        assert four.startswith(c4)
    assert "C3. SAM is gentler" in text and report_of(*esam)[0].count("| open |") == 3

def test_report_and_pictures_gather_records_and_write_where_they_are_told(quick, monkeypatch):
    axes, dots = pytest.importorskip("matplotlib.axes").Axes, []
    monkeypatch.setattr(axes, "plot", lambda *a, plot=axes.plot, **how: dots.append(a[:3]) or plot(*a, **how))
    cli(*QUICK, "--runs", "mine")
    made = [made_up("sgd"), made_up("sam", 51.0), made_up("esam", figures={"rho 0.1": 0.2, "l2 1": 0.7})]
    first = report_of(*made)
    made += records_of("mine")
    assert [json.loads(line) for line in open("there/results/records.jsonl")] == made and report_of(*made) == first
    assert cli("--report", "there", "--pictures", "there", "--runs", "mine")[::2] == (0, "")
    assert [p.read_bytes()[:4] for p in Path("there/results").glob("*.png")] == 3 * [b"\x89PNG"]
    assert ("mean of l2 1", "rho 0.1", [0.7], [0.2]) in [(a.get_xlabel(), a.get_ylabel(), *xy) for a, *xy in dots]
    assert sorted(os.listdir()) == ["mine", "there"]

@pytest.mark.parametrize("clean, robust, says", [
    (-1.3, 1.3, "no clear difference"), (-1.5, 1.3, "-1.5 clean"), (-1.5, 9, "-1.5 clean, +9.0 a")])
def test_a_run_ends_with_what_clearly_differs_from_sgd(clean, robust, says, capsys):
    """10,000 images at about 50%: an error of 0.5 each, so two standard errors of a difference are 1.41."""
    runs = [made_up("sgd", 50.0, [50.0], ["a"]), made_up("sam", 50.0 + clean, [50.0 + robust], ["a"])]
    sam_at.show(runs)
    out = " ".join(capsys.readouterr().out.split())
    assert f"sam rho 0.2 1 {50.0 + clean} {50.0 + robust} " in out and out.endswith(f"against sgd: {says}")
    sam_at.show(runs[1:])
    sam_at.show([r | {"how": {"sharpness": True}} for r in runs])  # rises of the loss
    assert "against" not in capsys.readouterr().out
