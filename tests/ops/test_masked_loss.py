"""denoising_loss and vlb_term with masks, and the reductions of denoising_loss."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import ops
from diffcore.testing import assert_within_bound
from support import formulas
from support.bound_cases import vlb_table
from support.bounds import each_low_dtype
from support.cases import NOISE_TABLE, STEPS, steps_of, without_kernels
from support.losses import BATCH, KEY, UPSTREAM, Options, each_kind, gradient, judge, options_of

SHAPE = (BATCH, 3, 5, 67)
SHAPES = ((BATCH, 1, 5, 67), (5, 67), SHAPE)
each_reduction = pytest.mark.parametrize("mask_reduction", ["mask", "all"])


def masks(shape: tuple[int, ...]) -> list[Tensor]:
    """Soft and hard; of the hard one, nothing in sample 1 where it has samples."""
    soft = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    hard = soft > 0.6
    if len(shape) == 4:
        hard[1] = False
    return [soft, hard]


def tensors_of(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    m, x0 = (torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(2))
    return m.requires_grad_(), x0, KEY.tensor(SHAPE, dtype=dtype, device=device)


def eager(*tensors: Tensor, mask: Tensor, **options: Any) -> Tensor:
    q = mask.to(tensors[0].dtype).expand(SHAPE)
    loss: Tensor = formulas.denoising_loss(torch, *tensors, mask=q, **options)
    return loss


@each_kind
@each_reduction
@each_low_dtype
def test_values_and_gradients(
    kind: str, mask_reduction: str, dtype: torch.dtype, device: str
) -> None:
    m, x0, noise = tensors_of(dtype, device)
    weight = {"weight": torch.logspace(-2, 2, STEPS, dtype=torch.float64), "t": steps_of(BATCH)}
    options: Options = options_of(kind, lambda _: weight, device)
    options["mask_reduction"] = mask_reduction
    wide = tuple(x.detach().double() for x in (m, x0, noise))
    for shape in SHAPES:
        for mask in masks(shape):
            options["mask"] = mask.to(dtype).to(device) if mask.is_floating_point() else mask
            exact, plain = (eager(*x, **options)[:, None] for x in (wide, (m, x0, noise)))
            for form in (noise, KEY):
                judge(ops.denoising_loss(m, x0, form, **options)[:, None], plain, exact, "loss")
            for name, total in UPSTREAM.items():
                if name in ("sum", "some samples") and shape != SHAPES[0]:
                    continue
                truth, by_eager, found = (
                    gradient(f, of[0], of[1:], options, total).flatten(1)
                    for f, of in (
                        (eager, wide),
                        (eager, (m, x0, noise)),
                        (ops.denoising_loss, (m, x0, noise)),
                    )
                )
                judge(found, by_eager, truth, f"gradient of {name}")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@each_reduction
def test_gradcheck(kind: str, mask_reduction: str, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    m, x0, z = torch.randn(3, 3, 2, 4, generator=generator, dtype=torch.float64, device=device)
    options = {"alpha": 0.8, "sigma": 0.6} if kind == "v_prediction" else {}
    mask = torch.tensor([1.0, 0.0, 0.3, 1.0], dtype=torch.float64, device=device)
    for reduction in ("none", "sample"):
        for trained in ((m,), (m, x0, z)):  # one kernel, and the reference
            leaves = [y.clone().requires_grad_() for y in trained]

            def f(*given: Tensor, reduction: str = reduction, all_of: Any = (m, x0, z)) -> Tensor:
                return ops.denoising_loss(
                    *given,
                    *all_of[len(given) :],
                    prediction_type=kind,
                    mask=mask,
                    mask_reduction=mask_reduction,
                    reduction=reduction,
                    weight=1.5,
                    **options,
                )

            assert torch.autograd.gradcheck(f, leaves)
            assert torch.autograd.gradgradcheck(f, leaves)


@each_kind
@pytest.mark.parametrize("masked", [False, True])
@each_low_dtype
def test_reductions(kind: str, masked: bool, dtype: torch.dtype, device: str) -> None:
    m, x0, noise = tensors_of(dtype, device)
    options: Options = options_of(kind, lambda _: {"weight": torch.linspace(0.5, 2, BATCH)}, device)
    if masked:
        options["mask"] = masks(SHAPES[0])[1].to(device)
    wide = [x.detach().double().requires_grad_() for x in (m, x0, noise)]
    levels = {n: options[n].reshape(-1, 1, 1, 1) for n in ("alpha", "sigma") if n in options}

    def squares(m: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """What "none" is to give, in the dtype of m."""
        to = {n: c.to(m.dtype) for n, c in levels.items()}
        error = m - formulas.target(torch, kind, x0, noise, **to)
        w = options["weight"].to(device, m.dtype).reshape(-1, 1, 1, 1)
        found: Tensor = w * error**2
        return found * options["mask"] if masked else found

    def reduced(reduction: str, *given: Tensor) -> Tensor:
        terms = squares(*given)
        if reduction == "none":
            return terms
        n = math.prod(SHAPE[1:])
        if masked:
            counted = (options["mask"].expand(SHAPE)).flatten(1).sum(1)
            n = counted + (counted == 0)  # type: ignore[assignment]
        loss = terms.flatten(1).sum(1) / n
        return {"sample": lambda: loss, "mean": loss.mean, "sum": loss.sum}[reduction]()

    for reduction, form in itertools.product(("none", "sample", "mean", "sum"), (noise, KEY)):
        found = ops.denoising_loss(m, x0, form, reduction=reduction, **options)
        exact, plain = reduced(reduction, *wide), reduced(reduction, m, x0, noise)
        low = dtype if reduction == "none" else torch.float32
        assert found.dtype == low
        assert found.shape == exact.shape
        if reduction in ("none", "sample"):
            assert_within_bound(found, plain, exact, name=reduction)
        else:  # eager's one number may be right by luck: the bound of a sum of rounded terms
            terms = (BATCH + 2) * 2.0**-24
            torch.testing.assert_close(found.double(), exact, rtol=terms, atol=0)
        gradients = [
            torch.autograd.grad(3 * y.sum(), leaf)[0]
            for y, leaf in ((found, m), (plain, m), (exact, wide[0]))
        ]
        assert_within_bound(*gradients, name=f"gradient of {reduction}")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("masked", [False, True])
def test_reductions_make_their_gradient_with_the_loss(reduction: str, masked: bool) -> None:
    """Of 5 samples, so that a gradient for another reduction would be rounded twice."""
    m, x0, z = torch.randn(3, 5, 1031, generator=torch.Generator().manual_seed(2)).bfloat16()
    mask = torch.arange(1031) % 3 == 0 if masked else None

    def gradient_in(dtype: torch.dtype) -> Tensor:
        leaf = m.to(dtype).requires_grad_()
        loss = ops.denoising_loss(leaf, x0.to(dtype), z.to(dtype), reduction=reduction, mask=mask)
        return torch.autograd.grad(loss, leaf)[0]

    assert torch.equal(gradient_in(torch.bfloat16), gradient_in(torch.float32).bfloat16())


@each_kind
@each_reduction
@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
def test_what_is_masked_reaches_nothing(
    kind: str, mask_reduction: str, reduction: str, device: str
) -> None:
    m, x0, noise = (y.detach() for y in tensors_of(torch.float32, device))
    mask = masks(SHAPES[0])[1].to(device)
    options: Options = {"prediction_type": kind, "mask": mask, "reduction": reduction}
    options |= {"mask_reduction": mask_reduction}
    if kind == "v_prediction":
        options |= {"alpha": 0.8, "sigma": 0.6}

    def run(bad: float, all_trained: bool) -> list[Tensor]:
        leaves = [y.masked_fill(~mask, bad).requires_grad_() for y in (m, x0, noise)]
        trained = leaves if all_trained else leaves[:1]
        given = [*trained, *(y.detach() for y in leaves[len(trained) :])]
        loss = ops.denoising_loss(*given, **options)
        grads = torch.autograd.grad(loss.sum(), trained, allow_unused=True)
        return [loss, *(g for g in grads if g is not None)]

    for all_trained in (False, True):
        expected = run(0.0, all_trained)
        for bad in (math.nan, math.inf):
            for a, b in zip(run(bad, all_trained), expected, strict=True):
                assert torch.equal(a, b)
            with without_kernels():
                for a, b in zip(run(bad, all_trained), expected, strict=True):
                    torch.testing.assert_close(a, b)


def test_samples_of_which_nothing_counts() -> None:
    m = torch.randn(3, 2, 5).requires_grad_()
    x0, z = torch.randn(2, 3, 2, 5)
    mask = torch.tensor([1.0, 0.0, 0.5]).reshape(3, 1, 1)
    for reduction in ("mask", "all"):
        loss = ops.denoising_loss(m, x0, z, mask=mask, mask_reduction=reduction)
        assert loss[1] == 0
        assert (loss[::2] > 0).all()
        (g,) = torch.autograd.grad((loss * torch.tensor([1.0, 7.0, 1.0])).sum(), m)
        assert (g[1] == 0).all()
        assert g.isfinite().all()
        none = ops.denoising_loss(m, x0, z, mask=0 * mask, mask_reduction=reduction)
        assert (none == 0).all()


# ---- the variational bound -----------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["gaussian", "discretized"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("given", ["noise", "x_t"])
def test_masked_terms_of_the_bound(given: str, learned: bool, decoder: str, device: str) -> None:
    """Each element as a sample of its own, which no mask has a part in."""
    generator = torch.Generator().manual_seed(4)
    shape = (5, 3, 4, 2)
    m, v, z = torch.randn(3, *shape, generator=generator, dtype=torch.float64, device=device)
    x0 = torch.randint(0, 256, shape, generator=generator).to(m) / 127.5 - 1
    t = torch.tensor([0, 0, 3, 20, STEPS - 1], device=device)
    kind = "learned_range" if learned else "fixed_large"
    table = vlb_table(given=given, variance_type=kind, decoder=decoder).to(device)
    alpha, sigma = NOISE_TABLE[t].unbind(1)
    last = z if given == "noise" else ops.add_noise(x0, z, alpha, sigma)
    m.requires_grad_()
    trained = [m]
    if learned:
        trained.append(v.requires_grad_())

    def term(mask: Tensor | None = None, alone: bool = False, **options: Any) -> Tensor:
        def part(y: Tensor) -> Tensor:
            return y.reshape(-1, 1) if alone else y

        rows = t.repeat_interleave(24) if alone else t
        variance = {"variance_output": part(v)} if learned else {}
        return ops.vlb_term(
            part(x0),
            part(m),
            table,
            t=rows,
            mask=mask,
            **{given: part(last)},
            **variance,
            **options,
        )

    each = term(alone=True).reshape(shape)
    for q in (torch.rand(5, 1, 4, 2, generator=generator), torch.tensor([[0.0, 1.0]])):
        q = q.double().to(device)
        total = (each * q).flatten(1).sum(1)
        counted = q.expand(shape).flatten(1).sum(1)
        for expected, options in (
            (0.3 * total, {"mask_reduction": "all", "scale": 0.3}),
            (total * 24 / counted, {}),
        ):
            found = term(q, **options)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            for a, b in zip(
                torch.autograd.grad(found.cos().sum(), trained, retain_graph=True),
                torch.autograd.grad(expected.cos().sum(), trained, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    # Where nothing counts, nothing is used.
    dropped = torch.arange(24, device=device).reshape(shape[1:]) % 3 == 0
    with torch.no_grad():
        clean = term((~dropped).double())
        for y in (m, v, z, last, x0):
            y.masked_fill_(dropped, math.nan)
    found = term((~dropped).double())
    assert torch.equal(found, clean)
    for g in torch.autograd.grad(found.sum(), trained):
        assert g.isfinite().all()
        assert (g.masked_select(dropped) == 0).all()


@pytest.mark.parametrize("loss_type", ["mse", "rescaled_mse", "kl", "rescaled_kl"])
@pytest.mark.parametrize("learned", [False, True])
def test_training_losses_of_a_part_are_those_of_smaller_samples(
    loss_type: str, learned: bool
) -> None:
    """Of rows that do not see each other: a mask of some of them, or the model without the rest."""
    kind = "learned_range" if learned else "fixed_small"
    betas = diffcore.make_betas("linear", 50)
    diffusion = diffcore.GaussianDiffusion(betas, loss_type=loss_type, variance_type=kind)
    generator = torch.Generator().manual_seed(6)
    x = torch.randint(0, 256, (4, 1, 6, 8), generator=generator) / 127.5 - 1
    z = torch.randn(x.shape, generator=generator)
    t = torch.tensor([0, 7, 30, 49])
    scale = torch.tensor(0.4, requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([scale * x, scale * x * x], 1) if learned else scale * x

    mask = torch.arange(6).reshape(6, 1) < 2
    masked = {
        reduction: diffusion.training_losses(
            model, x, t, noise=z, mask=mask, mask_reduction=reduction
        )
        for reduction in ("mask", "all")
    }
    part = diffusion.training_losses(model, x[:, :, :2], t, noise=z[:, :, :2])
    for name, expected in part.items():
        (g,) = torch.autograd.grad(expected.sum(), scale, retain_graph=True)
        for reduction, share in (("mask", 1.0), ("all", 1 / 3)):
            found = masked[reduction][name]
            torch.testing.assert_close(found, share * expected)
            (by_mask,) = torch.autograd.grad(found.sum(), scale, retain_graph=True)
            torch.testing.assert_close(by_mask, share * g)


# ---- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"mask": torch.ones(4, 8)},
            ValueError,
            r"^mask must broadcast to the shape of model_output, \(4, 3, 8\), got \(4, 8\)",
        ),
        ({"mask": [1]}, TypeError, "^mask must be a torch.Tensor, got list$"),
        ({"mask": torch.full((8,), 2.0)}, ValueError, r"^mask must have values in \[0, 1\]"),
        (
            {"mask_reduction": "mean"},
            ValueError,
            "^mask_reduction must be one of 'mask', 'all', got 'mean'$",
        ),
        (
            {"reduction": "batchmean"},
            ValueError,
            "^reduction must be one of 'none', 'sample', 'mean', 'sum', got 'batchmean'$",
        ),
        ({"reduction": None}, TypeError, "^reduction must be a string, got NoneType$"),
        (
            {"mask": torch.ones(8), "noise": torch.ones(4, 8)},
            ValueError,
            r"^noise must have the shape of model_output, \(4, 3, 8\), got \(4, 8\)",
        ),
        (
            {"reduction": "none", "noise": torch.ones(4, 8)},
            ValueError,
            r"^noise must have the shape of model_output, \(4, 3, 8\), got \(4, 8\)",
        ),
        (
            {"mask": torch.ones(8), "weight": torch.ones(3)},
            ValueError,
            "^weight must have 1 or 4 entries, one per sample, got 3",
        ),
    ],
)
def test_bad_arguments(options: Any, kind: type[Exception], message: str) -> None:
    m, x0, noise = torch.randn(3, 4, 3, 8)
    with pytest.raises(kind, match=message):
        ops.denoising_loss(**{"model_output": m, "x0": x0, "noise": noise, **options})


def test_bad_masks_of_the_bound_and_of_training() -> None:
    diffusion = diffcore.GaussianDiffusion(diffcore.make_betas("linear", 50))
    x = torch.zeros(4, 3, 8)
    message = r"^mask must broadcast to the shape of {}, \(4, 3, 8\), got \(4, 8\)"
    with pytest.raises(ValueError, match=message.format("x_start")):
        diffusion.training_losses(lambda x, t: 1 / 0, x, 3, mask=torch.ones(4, 8))
    with pytest.raises(ValueError, match=message.format("x0")):
        ops.vlb_term(x, x, vlb_table(given="x_t"), t=3, x_t=x, mask=torch.ones(4, 8))
    for call in (
        lambda: diffusion.training_losses(lambda x, t: 1 / 0, x, 3, mask_reduction="sum"),
        lambda: ops.vlb_term(x, x, vlb_table(given="x_t"), t=3, x_t=x, mask_reduction="sum"),
    ):
        with pytest.raises(ValueError, match=r"^mask_reduction must be one of"):
            call()


def test_a_key_beside_what_is_no_tensor() -> None:
    """The error names what is wrong, not what the key is for elsewhere."""
    x, mask = torch.randn(4, 3, 8), torch.ones(8)
    for kind in ("flow_prediction", "v_prediction"):
        for options in ({"mask": mask}, {"reduction": "none"}):
            with pytest.raises(TypeError, match=r"^x0 must be a torch.Tensor, got list"):
                ops.denoising_loss(
                    x,
                    [1.0],  # type: ignore[arg-type]
                    KEY,
                    prediction_type=kind,
                    alpha=0.8,
                    sigma=0.6,
                    **options,  # type: ignore[arg-type]
                )
    with pytest.raises(TypeError, match=r"^x0 must be a torch.Tensor, got list"):
        ops.vlb_term([1.0], x, vlb_table(given="noise"), t=3, noise=KEY, mask=mask)  # type: ignore[arg-type]
