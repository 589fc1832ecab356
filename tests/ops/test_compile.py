"""The registered operators, and torch.compile where the matrix of routes does not look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from diffcore import GaussianDiffusion, make_betas, ops
from diffcore._engine import dispatch, library, native
from diffcore._engine.kernel import Kernel, NoisyKernel
from diffcore._kernels import (
    bound,
    gaussian,
    guidance,
    likelihood,
    linear,
    loss,
    noise,
    step,
    threshold,
)
from diffcore._kernels.loss import Loss
from diffcore._kernels.term import Term
from support.bounds import assert_same_bits, each_case
from support.calls import Given, calls_of, outputs_and_gradients
from support.cases import (
    BY_NAME,
    NOISE_TABLE,
    Arguments,
    OpCase,
    as_tuple,
    step_table,
    steps_of,
)

INDUCTOR = ("q_sample", "normal_kl_sample")

pytestmark = [
    pytest.mark.skipif(native._C is None, reason="needs the compiled module"),
    # torch's own compiler warns about its own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def value_and_gradients(case: OpCase, f: Callable[..., Any], args: Arguments) -> tuple[Any, ...]:
    leaves = [x.detach().requires_grad_(n in case.differentiable) for n, x in args.tensors.items()]
    outputs = as_tuple(f(*leaves))
    torch.autograd.backward(outputs, [torch.ones_like(y).mul_(0.5) for y in outputs])
    zeros = (torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return (*outputs, *zeros)


# ---- torch.library ------------------------------------------------------------------------------


def registered_kernels() -> list[Kernel]:
    """Every registered operator that a kernel of the module stands behind."""
    modules = (noise, linear, step, guidance, gaussian, likelihood, loss, bound)
    groups = [group for module in modules for group in vars(module).values()]
    kernels = [k for k in groups if isinstance(k, (Kernel, NoisyKernel))]
    for group in groups:
        if isinstance(group, Term):
            kernels += [group.elementwise, group.sum]
            kernels += [*group.of_elementwise.values(), *group.of_sum.values()]
        elif isinstance(group, Loss):
            kernels += [group.plain, group.with_gradient]
    for group in (
        step.REVERSE_STEP,
        step.STEP_BACKWARD,
        step.STEP_LOG_PROB,
        step.LOG_PROB_BACKWARD,
        threshold.X0_QUANTILE,
        bound.VLB_TERM,
        bound.VLB_TERM_BACKWARD,
    ):
        kernels += group.values()
    each = [one for k in kernels for one in ([k] if isinstance(k, Kernel) else k)]
    return list({k.operator: k for k in each}.values())


def operator(kernel: Kernel) -> Any:
    return getattr(torch.ops.diffcore, kernel.operator).default


NOISE_PARTS = {
    "ints": (-5, 2**40, 3, 8),
    "tensors": (
        torch.tensor([7, 2]),
        torch.tensor([5, 2**35, -1, 0]),
        torch.tensor([9]),
        0,
    ),
    "counted": (torch.tensor(7), torch.tensor(2**33), 1, 0),
}
"""What noise can be generated from: seed, sample ids, stream, first element."""


def registered_calls() -> list[Any]:
    """Every registered operator, with each source of coefficients and of noise."""
    calls = []
    for kernel in registered_kernels():
        sources = ("numbers", "rows", "table") if kernel.coefs else ("none",)
        noises = NOISE_PARTS if kernel.generates_noise else ("read",)
        for i in range(max(len(sources), len(noises))):
            source, noise = sources[i % len(sources)], list(noises)[i % len(noises)]
            name = f"{kernel.name}-{source}" + f"-{noise}" * kernel.generates_noise
            calls.append(pytest.param(kernel, source, noise, id=name))
    return calls


def packed(kernel: Kernel, source: str, noise: str, *, grad: bool) -> tuple[Any, ...]:
    tensors = [torch.randn(4, 5, requires_grad=grad) for _ in kernel.inputs]
    numbers = [0.5 + i for i in range(len(kernel.coefs))]
    coefs: tuple[Any, ...] = tuple(numbers)
    step: Any = None
    if source == "rows":
        column = torch.rand(4, dtype=torch.float64)
        coefs = tuple(column + i for i in range(len(kernel.coefs)))
    elif source == "table":
        columns = step_table()[:, :1].expand(-1, len(kernel.coefs)).contiguous()
        coefs, step = (columns,), steps_of(4)
    if kernel.makes_gradient:  # called where no other gradient is needed, each table by itself
        tensors[1:] = [x.detach() for x in tensors[1:]]
        each = coefs if len(coefs) > 1 else coefs[0].split(1, 1)
        own = [n in ("inverse_n", "slope") for n in kernel.coefs]
        coefs = tuple(n if o else c for n, c, o in zip(numbers, each, own, strict=True))
    parts = NOISE_PARTS[noise] if kernel.generates_noise else None
    coefficients = library.pack(kernel, tensors[0], coefs, step)
    return (*tensors, *coefficients, False, *library.pack_noise(parts))


def test_every_kernel_of_the_module_is_registered() -> None:
    assert native._C is not None
    found = {(k.name, k.generates_noise) for k in registered_kernels()}
    assert found == {(op[0], bool(op[5])) for op in native._C.op_table()}


@pytest.mark.parametrize(("kernel", "source", "noise"), registered_calls())
def test_opcheck(kernel: Kernel, source: str, noise: str) -> None:
    grad = kernel.backward is not None
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Where noise is generated, tracing takes seconds: once is enough, with every part a tensor.
    quick = not kernel.generates_noise or noise == "tensors"
    if (
        grad
        and quick
        and not (kernel.generates_noise and kernel.backward is loss._without_backward)
    ):
        tests.append("test_aot_dispatch_dynamic")
    arguments = packed(kernel, source, noise, grad=grad)
    torch.library.opcheck(operator(kernel), arguments, test_utils=tests)
    if not grad and quick:
        torch.library.opcheck(operator(kernel), arguments, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("name", "generated"),
    [
        ("normal_kl", False),
        ("reparameterize", False),
        ("reverse_step", False),
        ("linear_combination", True),
    ],
)
def test_opcheck_in_other_layouts_and_dtypes(name: str, generated: bool) -> None:
    kernel = {k.operator: k for k in registered_kernels()}[name + "_generated" * generated]
    source = "table" if kernel.coefs else "none"
    rest = packed(kernel, source, "tensors", grad=False)[len(kernel.inputs) :]
    for x in (
        torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, dtype=torch.bfloat16),
        torch.randn(4, 6)[:, ::2],
        torch.randn(6, 4).t(),
    ):
        tensors = [x.clone().requires_grad_() for _ in kernel.inputs]
        torch.library.opcheck(operator(kernel), (*tensors, *rest))


def test_differentiating_a_backward_operator_says_why_not() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    kernel = gaussian.NORMAL_KL.of_elementwise[""]
    out = operator(kernel)(x, x, x, x, x, False)
    with pytest.raises(RuntimeError, match="is not differentiable itself"):
        out[0].sum().backward()


@each_case
def test_the_operator_route_gives_the_same_bits(
    case: OpCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = case.make((3, 37), torch.float32)
    f, _ = case.by_position(args)
    direct = value_and_gradients(case, f, args)
    monkeypatch.setattr(dispatch, "_compiling", lambda: True)
    assert_same_bits(value_and_gradients(case, f, args), direct)


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDUCTOR)
def test_compile_with_inductor(name: str) -> None:
    case = BY_NAME[name]
    args = case.make((3, 4, 5, 6), torch.float32)
    args = args.map(lambda x: x.contiguous(memory_format=torch.channels_last))
    f, _ = case.by_position(args)
    compiled = torch.compile(f, fullgraph=True)
    for y, w in zip(
        value_and_gradients(case, compiled, args), value_and_gradients(case, f, args), strict=True
    ):
        assert_same_bits(y, w)
        assert y.stride() == w.stride()


# A float that is not in the code is an input, for which Dynamo starts again before it specializes.
@torch._dynamo.config.patch(specialize_float=True)
@pytest.mark.parametrize("how", ["dynamic", "marked", "automatic"])
def test_any_sizes_are_compiled_for_once(how: str) -> None:
    _, calls = calls_of((2, 3))
    if how != "dynamic":
        some = ("add_noise", "ddpm_step", "normal_kl_mean", "denoising_loss_v_prediction")
        calls = {name: calls[name] for name in some}

    def f(tensors: Given) -> dict[str, tuple[Tensor, ...]]:
        return {name: as_tuple(call(**tensors[name])) for name, call in calls.items()}

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        f, fullgraph=True, dynamic=True if how == "dynamic" else None, backend=counter
    )
    for shape in ((3, 37), (5, 41), (2, 8)):
        found, wanted = (
            {name: tensors for name, tensors in calls_of(shape)[0].items() if name in calls}
            for _ in range(2)
        )
        for x in (x for tensors in found.values() for x in tensors.values()):
            for dim in range(x.ndim * (how == "marked")):
                if x.shape[dim] == shape[dim]:
                    torch._dynamo.mark_dynamic(x, dim)
        plain = outputs_and_gradients(f, wanted)
        for name, ys in outputs_and_gradients(compiled, found).items():
            assert_same_bits(ys, plain[name], name)
    assert counter.frame_count == 1 + (how == "automatic")


def test_compile_with_a_step_that_changes() -> None:
    rows = step_table()
    compiled = torch.compile(
        lambda x, m, t: ops.reverse_step(x, m, rows, t=t), fullgraph=True, backend="aot_eager"
    )
    x, m = torch.randn(2, 4, 9)
    for t in (0, 1, 7, 49):
        assert_same_bits(compiled(x, m, t), ops.reverse_step(x, m, rows, t=t))
    counter = torch.tensor([0])
    for t in (0, 3, 49):
        counter.fill_(t)
        assert_same_bits(compiled(x, m, counter), ops.reverse_step(x, m, rows, t=t))


def test_compile_with_generated_noise() -> None:
    mean, logvar = torch.randn(2, 4, 9)
    compiled = torch.compile(ops.reparameterize_kl, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    found = compiled(mean, logvar)
    torch.manual_seed(1)
    assert_same_bits(found, ops.reparameterize_kl(mean, logvar))


def test_compile_a_training_step() -> None:
    model = torch.nn.Linear(9, 9)
    x0, noise = torch.randn(2, 6, 9)
    t = steps_of(6)

    def loss() -> Tensor:
        output = model(ops.q_sample(x0, t, noise, NOISE_TABLE))
        return ops.denoising_loss(output, x0, noise, weight=torch.linspace(0.5, 1, 6)).mean()

    grads = []
    for compute in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        compute().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for plain, compiled in zip(*grads, strict=True):
        assert_same_bits(plain, compiled)


def test_compile_training_losses() -> None:
    diffusion = GaussianDiffusion(make_betas("linear", 50, scale_to_1000=True))
    x0, noise = torch.randn(2, 6, 9)
    t = steps_of(6)
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(9, 9)

        def loss(model: Any = model) -> Tensor:
            losses = diffusion.training_losses(lambda x, t: model(x), x0, t, noise=noise)
            return losses["loss"].mean()

        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        run().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, of_compiled in zip(*grads, strict=True):
        assert_same_bits(plain, of_compiled)


def test_compile_with_out() -> None:
    def f(x: Tensor, m: Tensor, rows: Tensor) -> Tensor:
        x = x.clone()
        ops.reverse_step(x, m, rows, t=3, out=x)
        return x

    x, m = torch.randn(2, 4, 9)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(x, m, step_table()), f(x, m, step_table()))


def test_an_exported_program_holds_the_operator() -> None:
    class Step(torch.nn.Module):
        def forward(self, x: Tensor, m: Tensor, rows: Tensor, t: Tensor) -> Tensor:
            return ops.reverse_step(x, m, rows, t=t)

    x, m = torch.randn(2, 4, 9)
    arguments = (x, m, step_table(), steps_of(4))
    program = torch.export.export(Step(), arguments)
    assert any("diffcore" in str(node.target) for node in program.graph.nodes)
    assert_same_bits(program.module()(*arguments), Step()(*arguments))


# ---- modes ---------------------------------------------------------------------------------------


def test_a_dispatch_mode_sees_the_operator() -> None:
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, y = torch.randn(2, 3, 4)
    with Watch():
        ops.add_noise(x, y, 0.8, 0.6)
    assert "diffcore.linear_combination.default" in seen


def test_profiler_sees_something(tmp_path: Any) -> None:
    x, y = torch.randn(2, 3, 4)
    with torch.device("meta"):  # a function mode
        assert_same_bits(ops.add_noise(x, y, 0.8, 0.6), ops.add_noise(x, y, 0.8, 0.6))
