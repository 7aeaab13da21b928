"""`.pt2` files of `torch.export.save`: autograd through the exported graph.

Names. Inputs and outputs bear the names of the exported graph: the arguments of `forward`, the keys of a dict of
outputs, or torch's own names of nodes such as "linear_1". Where model.toml uses other names and lists as many as the
file has, its names are given in order.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.utils import _pytree as pytree

from explainserve.backends import pattern_file
from explainserve.backends.contract import LoadedModel, LoadOptions
from explainserve.backends.environment import variable
from explainserve.backends.exported_activation import with_kind
from explainserve.backends.exported_function import NamedGraph
from explainserve.backends.exported_layers import axes
from explainserve.backends.onnx_verification import LARGEST_DIFFERENCES
from explainserve.backends.torch_archive import require_exported_program
from explainserve.backends.torch_compilation import code_folder, compile_elsewhere, typical_rows, where_faster
from explainserve.backends.torch_folding import fold_batch_norm
from explainserve.backends.torch_gradient import gradient_gaps
from explainserve.backends.torch_inductor import compiler_cache, with_compiled_gradient
from explainserve.backends.torch_layout import in_faster_layout
from explainserve.backends.torch_precision import Arithmetic
from explainserve.backends.torch_rows import Forward, TorchModel, resolve_device, use_threads
from explainserve.errors import ModelRefused, first_line
from explainserve.model_config import Compile, InputConfig, ModelConfig, OutputConfig
from explainserve.signature import InputSpec, OutputSpec, Signature

_TRAINING_ARGUMENTS = {"aten.batch_norm": 5, "aten.dropout": 2, "aten.feature_dropout": 2, "aten.alpha_dropout": 2}
_CONVOLUTIONS = frozenset(
    {torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default, torch.ops.aten.conv_transpose2d.input}
)

_Spec = TypeVar("_Spec", InputSpec, OutputSpec)


def load(path: Path, config: ModelConfig, options: LoadOptions) -> LoadedModel:
    """Reads a `.pt2` file. Nothing in it is unpickled but plain tensors, and those by torch's restricted unpickler.

    Raises:
        ModelRefused: the file is damaged or unsafe (see `torch_archive`), does not fit model.toml (CONFIG_MISMATCH),
            holds what is not served (UNSUPPORTED_INPUT, UNSUPPORTED_DTYPE), has a static batch of more than one row
            or no batch axis (STATIC_BATCH), was exported in training mode (TRAINING_MODE) or without gradients
            (NO_GRADIENT), or its device or precision is missing (DEVICE_UNAVAILABLE, PRECISION_UNAVAILABLE); see
            `pattern_file.read` too.
    """
    model = _read_model(path, config, options)
    if config.compile is Compile.OFF or options.compile_seconds == 0:
        return model
    options = replace(options, channels_last=model.channels_last)

    def in_code() -> TorchModel:
        compile_elsewhere(path, config, options)
        return compiled(model, code_folder(config, options))

    return where_faster(model, in_code, LARGEST_DIFFERENCES[config.precision])


def compile_into_cache(path: Path, config: ModelConfig, options: LoadOptions) -> None:
    """Compiles a model whose layout the options tell, and keeps the code for those who `load` it.

    Raises:
        Exception: whatever `load` or the compiler raises.
    """
    compiled(_read_model(path, config, options), code_folder(config, options))


def compiled(model: TorchModel, folder: Path) -> TorchModel:
    """The same model in code that is kept in a folder, or taken from it.

    Raises:
        Exception: whatever the compiler raises.
    """
    with compiler_cache(folder):
        found = model.compiled(functools.partial(_compiled_forward, any_rows=not model.fixed_batch))
        found.evaluate(typical_rows(model))  # a backward pass may be compiled when it is run
    return found


def _compiled_forward(forward: Forward, examples: Sequence[torch.Tensor], *, any_rows: bool) -> Forward:
    assert isinstance(forward, _Forward)
    threads = torch.get_num_threads()
    return with_compiled_gradient(forward, forward.of_tensors(), examples, any_rows=any_rows, thread_count=threads)


def _read_model(path: Path, config: ModelConfig, options: LoadOptions) -> TorchModel:
    """The model as it is in the file, in the faster layout."""
    device = resolve_device(options)
    require_exported_program(path)
    use_threads(options.thread_count)
    program = _read(path)
    _require_evaluation_mode(program)
    signature = config.signature(_with_kinds(_renamed(_found_signature(program), config), program, config))
    _require_batch_axis(signature)
    fixed_batch = any(spec.batched and spec.axes[0].size == 1 for spec in signature.inputs)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    forward = _Forward.of(program)
    patterns = {name: torch.from_numpy(array).to(device) for name, array in pattern_file.read(path).items()}
    named = NamedGraph.of(program, signature, forward.leaves, forward.kept, patterns)
    arithmetic = Arithmetic.of(config.precision, device, signature)
    weight_bytes = sum(weights.nbytes for weights in program.state_dict.values())
    model = TorchModel(
        "torch.export",
        signature,
        forward,
        arithmetic,
        fixed_batch,
        weight_bytes=weight_bytes,
        named=named,
        configured_layers=config.layers,
    )
    model.gaps = gradient_gaps(model, _captured_no_grad(program))
    return _laid_out(model, forward, lambda: _in_channels_last(model, program, named), options)


def _laid_out(
    model: TorchModel, forward: _Forward, in_channels_last: Callable[[], TorchModel], options: LoadOptions
) -> TorchModel:
    """The model with its images as the options say, or else as is faster."""
    if options.channels_last is None:
        return in_faster_layout(model, in_channels_last) if forward.has_convolutions else model
    return in_channels_last() if options.channels_last else model


@dataclass(frozen=True, eq=False)
class _Forward:
    """Calls the exported module with flat tensors.

    Attributes:
        leaves: of the call's arguments: None for a tensor, else the constant that was exported.
        kept: positions of the outputs that are tensors.
    """

    module: torch.fx.GraphModule
    leaves: tuple[Any, ...]
    in_spec: pytree.TreeSpec
    kept: tuple[int, ...]

    @classmethod
    def of(cls, program: ExportedProgram) -> _Forward:
        module = program.module(check_guards=False)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        leaves = tuple(a.value if isinstance(a, ConstantArgument) else None for a in _user_inputs(program))
        kept = tuple(i for i, a in enumerate(_user_outputs(program)) if isinstance(a, TensorArgument))
        return cls(fold_batch_norm(module), leaves, program.call_spec.in_spec, kept)

    @property
    def has_convolutions(self) -> bool:
        """Whether it convolves images."""
        return any(node.target in _CONVOLUTIONS for node in self.module.graph.nodes)

    def of_tensors(self) -> torch.fx.GraphModule:
        """Its graph from tensors, one by one, to the tuple of the outputs that are tensors."""
        graph, nodes = torch.fx.Graph(), list(self.module.graph.nodes)
        placeholders = [node for node in nodes if node.op == "placeholder"]
        copies: dict[torch.fx.Node, Any] = {
            node: graph.placeholder(node.name) if leaf is None else leaf
            for node, leaf in zip(placeholders, self.leaves, strict=True)
        }
        for node in nodes:
            if node.op not in ("placeholder", "output"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
        results: Any = self.module.graph.output_node().args[0]
        graph.output(tuple(copies[results[position]] for position in self.kept))
        return torch.fx.GraphModule(self.module, graph)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        tensors = iter(inputs)
        leaves = [next(tensors) if leaf is None else leaf for leaf in self.leaves]
        arguments, keywords = pytree.tree_unflatten(leaves, self.in_spec)
        outputs = pytree.tree_leaves(self.module(*arguments, **keywords), is_leaf=lambda value: value is None)
        return [outputs[position] for position in self.kept]


def _in_channels_last(model: TorchModel, program: ExportedProgram, named: NamedGraph) -> TorchModel:
    """The same model on weights of its own, which have their channels last in memory."""
    forward = _Forward.of(program)
    for part in forward.module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(_last_channels(parameter), requires_grad=False))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, _last_channels(buffer))
    return model.in_channels_last(forward, named.with_weights(forward.module))


def _last_channels(weights: torch.Tensor) -> torch.Tensor:
    return weights.contiguous(memory_format=torch.channels_last) if weights.ndim == 4 else weights


def _read(path: Path) -> ExportedProgram:
    try:
        with _restricted_unpickling():
            return torch.export.load(path)
    except Exception as error:
        raise ModelRefused(
            "MODEL_FILE_CORRUPT",
            f"{path.name} cannot be read by torch {torch.__version__}: {first_line(error)}",
            file=path.name,
        ) from error


@contextmanager
def _restricted_unpickling() -> Iterator[None]:
    """Takes from `torch.load` the choice to unpickle freely: a second wall behind `torch_archive`."""
    with variable("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"):
        yield


def _user_inputs(program: ExportedProgram) -> list[Any]:
    return [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]


def _user_outputs(program: ExportedProgram) -> list[Any]:
    return [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]


def _found_signature(program: ExportedProgram) -> Signature:
    """What the file says of itself."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs = [a for a in _user_inputs(program) if not isinstance(a, ConstantArgument)]
    keys = _output_names(program)
    outputs = [
        (key, a) for key, a in zip(keys, _user_outputs(program), strict=True) if not isinstance(a, ConstantArgument)
    ]
    for argument in [*inputs, *(a for _, a in outputs)]:
        if not isinstance(values[argument.name], torch.Tensor):
            what = type(argument).__name__
            raise ModelRefused("UNSUPPORTED_INPUT", f"{argument.name!r} is a {what}, not a tensor", name=argument.name)
    return Signature(
        tuple(_input(argument.name, values[argument.name]) for argument in inputs),
        tuple(OutputSpec(key, _dtype(key, values[a.name]), axes(values[a.name])) for key, a in outputs),
    )


def _input(name: str, value: torch.Tensor) -> InputSpec:
    found = axes(value)
    return InputSpec(name, _dtype(name, value), found, batched=bool(found) and found[0].size in (None, 1))


def _output_names(program: ExportedProgram) -> list[str]:
    """Keys of a dict of outputs, else names of nodes; made unique where two outputs are one node."""
    arguments = _user_outputs(program)
    out_spec = program.call_spec.out_spec
    if out_spec is not None and out_spec.type is dict and len(out_spec.context) == len(arguments):
        return [str(key) for key in out_spec.context]
    names = [argument.name for argument in arguments]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name}_output{i}" if name in repeated else name for i, name in enumerate(names)]


def _dtype(name: str, value: torch.Tensor) -> np.dtype[np.generic]:
    try:
        return torch.empty(0, dtype=value.dtype).numpy().dtype
    except TypeError as error:
        raise ModelRefused(
            "UNSUPPORTED_DTYPE", f"{name!r} has element type {value.dtype}, which numpy lacks", name=name
        ) from error


def _renamed(found: Signature, config: ModelConfig) -> Signature:
    return Signature(_in_order(found.inputs, config.inputs), _in_order(found.outputs, config.outputs))


def _with_kinds(found: Signature, program: ExportedProgram, config: ModelConfig) -> Signature:
    """With what the numbers of outputs are, which end in a softmax over classes, along the axis that `config` states or
    1, or in a sigmoid."""
    nodes = {node.name: node for node in program.graph.nodes}
    ends = [nodes[a.name] for a in _user_outputs(program) if not isinstance(a, ConstantArgument)]
    class_axes = {table.name: table.class_axis for table in config.outputs}
    outputs = zip(found.outputs, ends, strict=True)
    return replace(found, outputs=tuple(with_kind(own, end, class_axes.get(own.name) or 1) for own, end in outputs))


def _in_order(
    found: tuple[_Spec, ...], configured: tuple[InputConfig, ...] | tuple[OutputConfig, ...]
) -> tuple[_Spec, ...]:
    """Gives model.toml's names in order where they are not the file's own and there are as many."""
    names = [table.name for table in configured]
    if set(names) <= {spec.name for spec in found} or len(names) != len(found):
        return found
    return tuple(replace(spec, name=name) for spec, name in zip(found, names, strict=True))


def _require_batch_axis(signature: Signature) -> None:
    static = [s.name for s in signature.inputs if s.batched and s.axes[0].size not in (None, 1)]
    if static or not any(spec.batched for spec in signature.inputs):
        raise ModelRefused(
            "STATIC_BATCH",
            f"the first axis of {', '.join(static) or 'every input'} is fixed at export to more than one row; export "
            "with a torch.export.Dim for it and an example batch of 2, or with a batch of 1",
            inputs=", ".join(static),
        )


def _require_evaluation_mode(program: ExportedProgram) -> None:
    """An exported graph has no eval(): what it did in training mode it does forever."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            position = _TRAINING_ARGUMENTS.get(str(node.target).removesuffix(".default"))
            if position is not None and len(node.args) > position and node.args[position] is True:
                raise ModelRefused(
                    "TRAINING_MODE",
                    f"{node.name} was exported in training mode; call model.eval() before torch.export.export",
                    node=node.name,
                )


def _captured_no_grad(program: ExportedProgram) -> bool:
    """Whether a part of the graph runs without gradients."""
    nodes = program.graph_module.graph.nodes
    return any("set_grad_enabled" in str(node.target) and node.args[:1] == (False,) for node in nodes)
