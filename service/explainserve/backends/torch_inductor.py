"""An exported graph, forward and backward, as code that torch's inductor generates: C++ on processors, Triton on GPUs.

The graph is handed to the compiler as it is. `torch.compile` would trace it again, and compile it anew whenever a call
differs from those before, while requests wait. Here one compilation serves many numbers of rows. Which ones is what the
compiler assumed of that number, which torch calls guards; that is asked before each call, as is the layout of the
inputs, and where it does not hold the graph runs operator by operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from explainserve.backends.environment import variable
from explainserve.backends.precision import STEPS

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Outputs of a batch from its inputs."""

TYPICAL_ROWS = STEPS
"""For which code is chosen where it could be different for other numbers: those of the maps by which it is verified."""


class CompiledFunction:
    """A function whose gradients are computed by compiled code.

    Forward passes without gradient are left to the function as it was: they are few, and would be a second compilation.

    Args:
        code: takes the number of rows and the inputs.
        holds: whether the code was made for this number of rows too.
        examples: inputs that it was made for.
        any_rows: they may have other numbers of rows.
    """

    def __init__(
        self,
        eager: Function,
        code: Callable[..., Sequence[Tensor]],
        holds: Callable[[int], bool],
        examples: Sequence[Tensor],
        *,
        any_rows: bool,
    ) -> None:
        self._eager, self._code, self._holds = eager, code, holds
        self._first = 1 if any_rows else 0
        self._expected = [self._form(example) for example in examples]
        self._known: dict[int, bool] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs."""
        row_count = len(inputs[0])
        if torch.is_grad_enabled() and self._takes(row_count) and list(map(self._form, inputs)) == self._expected:
            return self._code(row_count, *inputs)
        return self._eager(inputs)

    def _takes(self, row_count: int) -> bool:
        if row_count not in self._known:
            self._known[row_count] = self._holds(row_count)
        return self._known[row_count]

    def _form(self, tensor: Tensor) -> tuple[object, ...]:
        """What code depends on."""
        return tensor.dtype, tensor.shape[self._first :], tensor.stride()


def with_compiled_gradient(
    eager: Function, graph: GraphModule, examples: Sequence[Tensor], *, any_rows: bool, thread_count: int
) -> CompiledFunction:
    """Compiles a function, and its gradient with respect to all inputs that can have one.

    Args:
        graph: of the function, from tensors, one by one, to a tuple of tensors; changed.
        examples: inputs with the layout of all later ones; their values are not looked at.
        any_rows: the first axis of all examples is that of rows, of which there may be other numbers.
        thread_count: of the code, where it is for a processor, and of the compiler.

    Raises:
        Exception: whatever the compiler raises on what it does not know, or where it finds no C++ compiler.
    """
    # slow to import, and needed by few servers
    from torch._functorch import config as autograd_config
    from torch._guards import TracingContext, tracing
    from torch._inductor import compile as inductor_compile
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    symbols = ShapeEnv()
    mode = FakeTensorMode(shape_env=symbols, allow_non_fake_inputs=True)
    row_count = _row_symbol(symbols)
    with mode:
        without_values = [_without_values(each, [row_count] if any_rows else each.shape[:1]) for each in examples]
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        graph.graph.placeholder("row_count")  # what is assumed of numbers is kept with the code for arguments alone
    graph.recompile()
    # the threads of the code are part of its key in the cache then, as torch's own number of threads is not
    options: dict[str, Any] = {"cpp.threads": thread_count, "compile_threads": thread_count}
    # Several targets go backward through one forward pass, whose memory a pass must not reuse therefore. It is the
    # default that is set: torch asks again on each thread that goes backward, and a setting holds for its thread alone.
    autograd_config._config["donated_buffer"].default = False  # type: ignore[attr-defined]
    quiet = warnings.catch_warnings(action="ignore")  # of what torch itself calls
    with quiet, torch.enable_grad(), tracing(TracingContext(mode)):
        code = inductor_compile(graph, [row_count, *without_values], options)

    def holds(rows: int) -> bool:
        assumed = symbols.produce_guards_expression([row_count])
        return assumed is None or bool(symbols.evaluate_guards_expression(assumed, [rows]))

    return CompiledFunction(eager, code, holds if any_rows else _any, examples, any_rows=any_rows)


def _row_symbol(symbols: Any) -> torch.SymInt:
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource("row_count")
    symbol = symbols.create_symbol(TYPICAL_ROWS, source, dynamic_dim=DimDynamic.DYNAMIC)
    row_count: torch.SymInt = symbols.create_symintnode(symbol, hint=TYPICAL_ROWS, source=source)
    return row_count


def _without_values(example: Tensor, rows: Sequence[int | torch.SymInt]) -> Tensor:
    """A leaf with the layout of an example; `rows` are the extents of its first axis, if it has one."""
    return torch.empty_strided(
        (*rows, *example.shape[1:]),
        example.stride(),
        dtype=example.dtype,
        device=example.device,
        requires_grad=example.is_floating_point(),
    )


def _any(rows: int) -> bool:
    return True


@contextmanager
def compiler_cache(folder: Path) -> Iterator[None]:
    """Has the compiler keep what it generates in a folder, and take from there what it generated before."""
    with variable("TORCHINDUCTOR_CACHE_DIR", str(folder)):
        yield
