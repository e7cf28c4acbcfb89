"""Every experts class that the installed transformers decorates, tiny, and how to run it exactly."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations import moe

DECORATOR = "use_experts_implementation"
T, K, H, INTER, E = 33, 2, 16, 12, 6

# what the classes' __init__ read from their configs
CONFIG = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), E),
    **dict.fromkeys(("hidden_size", "moe_hidden_size", "moe_latent_size"), H),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTER),
    **dict.fromkeys(("swiglu_limit", "mlp_gate_softcap", "mlp_up_softcap"), 0.8),
    "swiglu_alpha": 1.702,
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "post_norm_eps": 1e-5,
}


class Config:
    """The attributes of ``CONFIG``; any other is an error that says what to do."""

    def __init__(self, owner: str, **changes: Any) -> None:
        self._owner = owner
        self._experts_implementation = "eager"
        self.__dict__.update({**CONFIG, **changes})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise LookupError(
            f"{self._owner} of transformers {transformers.__version__} reads config.{name}, for which "
            f"{Path(__file__).name} has no value: add one to CONFIG"
        )


def decorated_classes() -> list[str]:
    """``"qwen3_moe.Qwen3MoeExperts"`` ... of the installed transformers, read from its sources."""
    root = Path(transformers.__file__).parent / "models"
    names = []
    for file in sorted(root.glob("*/modeling_*.py")):
        source = file.read_text()
        if DECORATOR not in source:
            continue
        names += [
            f"{file.parent.name}.{node.name}"
            for node in ast.parse(source).body
            if isinstance(node, ast.ClassDef) and any(DECORATOR in ast.unparse(each) for each in node.decorator_list)
        ]
    return names


def experts_class(name: str) -> type[nn.Module]:
    model, class_name = name.split(".")
    root = Path(transformers.__file__).parent / "models" / model
    for file in sorted(root.glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{model}.{file.stem}")
        if hasattr(module, class_name):
            return getattr(module, class_name)
    raise LookupError(name)


def build(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A module of class ``name`` with random parameters, the same for each dtype but for rounding to bfloat16."""
    experts = experts_class(name)(Config(name, **config))
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        value = torch.empty(parameter.shape).uniform_(-0.6, 0.6, generator=generator)
        # exact in every dtype, so that results differ by arithmetic alone
        parameter.data = value.to(torch.bfloat16).to(dtype)
    return experts.train()


def own_code(function: Callable[..., Any]) -> str:
    """What a function does, whatever its layout, comments and annotations."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    body = definition.body[1:] if ast.get_docstring(definition) else definition.body
    return "\n".join(ast.unparse(statement) for statement in body)


def structure(name: str) -> tuple[str, ...]:
    """Equal for classes between which a compiler cannot see a difference, except for sizes."""
    cls = experts_class(name)
    experts = build(name)
    gate = cls._apply_gate
    flags = {key: value for key, value in vars(experts).items() if isinstance(value, bool)}
    shapes = {key: tuple(parameter.shape) for key, parameter in experts.named_parameters()}
    own_gate = "" if gate is moe._default_apply_gate else own_code(gate)
    return str(flags), str(shapes), own_gate, str(getattr(experts, "act_fn", None)).split(" at 0x")[0]


class InFloat64(TorchFunctionMode):
    """Code that asks for float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if each is torch.float32 else each for each in args)
        kwargs = {key: torch.float64 if each is torch.float32 else each for key, each in (kwargs or {}).items()}
        return func(*args, **kwargs)


def inputs(dtype: torch.dtype, experts_in_use: Iterable[int] = range(E), num_tokens: int = T) -> list[Tensor]:
    """hidden states ``[T, H]``, ids ``[T, K]``, each token's different, and float32 routing weights ``[T, K]``."""
    generator = torch.Generator().manual_seed(1)
    in_use = torch.tensor(list(experts_in_use))
    hidden_states = torch.randn(num_tokens, H, generator=generator).to(torch.bfloat16).to(dtype)
    order = torch.rand(num_tokens, len(in_use), generator=generator).argsort(-1)[:, :K]
    weights = torch.rand(num_tokens, K, generator=generator) + 0.1
    return [hidden_states.requires_grad_(), in_use[order], weights.requires_grad_()]


def results(experts: nn.Module, arguments: list[Tensor], implementation: str) -> dict[str, Tensor]:
    """The output and the gradients of hidden states, routing weights and parameters."""
    experts.config._experts_implementation = implementation
    hidden_states, _, weights = arguments
    y = experts(*arguments)
    leaves = {"hidden_states": hidden_states, "weights": weights, **dict(experts.named_parameters())}
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True)
    # eager leaves the parameters of experts without tokens out of the graph
    filled = (torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves.values(), grads))  # noqa: B905
    return {"y": y.detach(), **dict(zip(leaves, filled, strict=True))}


def exact_results(name: str, arguments: list[Tensor], **config: Any) -> dict[str, Tensor]:
    """The class's own eager code in float64."""
    hidden_states, ids, weights = arguments
    doubles = [hidden_states.detach().double().requires_grad_(), ids, weights.detach().double().requires_grad_()]
    experts = build(name, torch.float64, **config)
    with InFloat64():
        return results(experts, doubles, "eager")
