"""Optimizers of other packages: built, and tried before a run.

A checkpoint has the tensors of an optimizer's state that its groups name. The trial, on small tensors in the place of
the model's parameters, sees whether that is all that it keeps.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clm_dist.config.job import TrainConfig
from clm_dist.errors import ConfigError, first_line
from clm_dist.extensions import load_extension

Group = dict[str, Any]
"""A group of parameters, as torch's optimizers take it."""
GROUP = "clm_dist.optimizers"
_FIELD = "train.optimizer"
_ADAMW = ("step", "exp_avg", "exp_avg_sq")
_SIZE = 4
"""Largest size of a dimension in the trial."""
_LEARNING_RATE = 0.1
_UPDATES = range(1, 13)
"""Seeds of the gradients of the trial: as many updates as show most of what is done only every few of them."""


def states_of(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the state of a group's parameters: tensors of their shape, and `step` where updates are counted."""
    return tuple(group.get("states", _ADAMW))


def first_state(parameter: Tensor, states: Iterable[str]) -> dict[str, Tensor]:
    """The state of a parameter before the first update."""
    return {
        name: torch.zeros((), dtype=torch.float32, device=parameter.device)
        if name == "step"
        else torch.zeros_like(parameter)
        for name in states
    }


def groups_of(
    parameters: Sequence[tuple[str, nn.Parameter]], shapes: Mapping[str, tuple[int, ...]], train: TrainConfig
) -> list[Group]:
    """Named parameters in groups, each with the weight decay that the job has for it.

    Args:
        shapes: of the whole parameters, by their names.
    """
    if train.decay_bias_and_norm:
        return [{"params": list(parameters), "weight_decay": train.weight_decay}]
    return [
        {"params": chosen, "weight_decay": decay}
        for decayed, decay in ((True, train.weight_decay), (False, 0.0))
        if (chosen := [(name, p) for name, p in parameters if _is_matrix(name, shapes[name]) is decayed])
    ]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is neither a bias nor a normalisation weight: those are vectors."""
    return len(shape) >= 2 and not name.endswith(".bias")


def why_not_saved(state: Mapping[str, Any], states: Sequence[str], parameter: Tensor) -> str | None:
    """The problem of a parameter's state of which a checkpoint would not have all; None where it has."""
    if others := sorted(state.keys() - set(states)):
        return f"keeps {', '.join(others)} beside the tensors that its groups name in `states`; name all of them"
    kept = {name: value for name, value in state.items() if name != "step"}
    if wrong := next((name for name, value in kept.items() if tuple(value.shape) != tuple(parameter.shape)), None):
        return f"keeps {wrong} in another shape than the parameter's, and pieces of a checkpoint have that"
    return None


class Several(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group in groups:
            # Either all groups may have them or none.
            group.pop("param_names", None)
        super().__init__(groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = iter(self.param_groups)
        for optimizer in self._optimizers:
            # Accelerate loads a state into this one, which gives it groups and a state that are others than before.
            optimizer.param_groups = list(itertools.islice(groups, len(optimizer.param_groups)))
            optimizer.state = self.state
            optimizer.step()


def build_other(train: TrainConfig, groups: list[Group]) -> torch.optim.Optimizer:
    """The optimizer of a package that a job names.

    Args:
        groups: with the parameters and their names, and their weight decay.

    Raises:
        ConfigError: no installed package has it, or it is not as docs/extend.md says.
    """
    make = load_extension(GROUP, train.optimizer, field=_FIELD)
    expected = {id(parameter): group["weight_decay"] for group in groups for _, parameter in group["params"]}
    try:
        made = make(groups, train.learning_rate, **train.optimizer_options)
    except Exception as error:  # whatever its package raises
        problem = f"{_FIELD} {train.optimizer} fails: {type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{problem}; see train.optimizer_options", field=_FIELD) from error
    optimizers = made if isinstance(made, list) else [made]
    if not optimizers or not all(isinstance(optimizer, torch.optim.Optimizer) for optimizer in optimizers):
        raise _wrong(train, f"returns {type(made).__name__}, not a torch.optim.Optimizer, or a list of them")
    own = [group for optimizer in optimizers for group in optimizer.param_groups]
    if not all(isinstance(group.get("states"), list | tuple) for group in own):
        raise _wrong(train, "has a group of parameters without `states`, the names of its state tensors")
    decays = [(id(parameter), group.get("weight_decay", 0)) for group in own for parameter in group["params"]]
    if len(decays) != len(expected) or dict(decays).keys() != expected.keys():
        raise _wrong(train, f"takes {len(decays)} parameters, not each of the {len(expected)} once")
    if others := {decay for parameter, decay in decays if decay != expected[parameter]}:
        raise _wrong(
            train,
            f"decays weights by {min(others)}, and not as the job says; it must take the `weight_decay` of the "
            "groups that it is given (where it has none, set train.weight_decay to 0)",
        )
    return optimizers[0] if len(optimizers) == 1 else Several(optimizers)


def check_optimizer(train: TrainConfig, strategy: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Try an optimizer of a package on small tensors.

    Args:
        shapes: of the parameters that are trained, by their names.

    Raises:
        ConfigError: it would not go on from a checkpoint as it was, or the strategy cuts what it needs whole.
    """
    element_wise = getattr(load_extension(GROUP, train.optimizer, field=_FIELD), "element_wise", False)
    if strategy != "ddp" and not element_wise:
        raise ConfigError(
            f"{_FIELD} {train.optimizer} may need whole tensors, and cluster.strategy {strategy} cuts them into "
            "pieces; set cluster.strategy to ddp, or `element_wise` where it needs none (docs/extend.md)",
            field=_FIELD,
        )
    small = {name: tuple(min(size, _SIZE) for size in shape) for name, shape in shapes.items()}
    through = _Trial(train, small).updated(*_UPDATES)
    before = _Trial(train, small).begun().updated(*_UPDATES[:3])
    resumed = _Trial(train, small).begun(before).updated(*_UPDATES[3:])
    if not through.is_like(resumed):
        raise _wrong(
            train,
            "does not go on from the tensors that its groups name in `states` as it was: they are not all that it "
            "keeps, or do not begin as zeros",
        )
    through.check_state()
    if strategy == "zero3" and len(through.all_states()) > 1:
        raise _wrong(
            train,
            "has groups with other `states`, which cluster.strategy zero3 does not keep apart; take zero2 or fsdp2",
        )
    if element_wise and not through.is_like(_Trial(train, small, num_pieces=2).updated(*_UPDATES), rounding=1e-5):
        raise _wrong(train, "says that it is element-wise, and updates pieces of a tensor otherwise than the whole")


class _Trial:
    """An optimizer with small parameters.

    Args:
        num_pieces: into which each parameter is cut; flat, if there are several.
    """

    def __init__(self, train: TrainConfig, shapes: Mapping[str, tuple[int, ...]], *, num_pieces: int = 1) -> None:
        self._train, self._shapes, self._num_pieces = train, shapes, num_pieces
        self._parameters = {name: nn.Parameter(value) for name, value in self._values(0).items()}
        whole = {name: shapes[name if num_pieces == 1 else name.rpartition("#")[0]] for name in self._parameters}
        self._optimizer = build_other(train, groups_of(list(self._parameters.items()), whole, train))
        self._groups = [(group, p) for group in self._optimizer.param_groups for p in group["params"]]

    def begun(self, before: "_Trial | None" = None) -> "_Trial":
        """Itself, with its first state, or that of another, as a run that loads a checkpoint."""
        for group, parameter in self._groups:
            self._optimizer.state[parameter].update(first_state(parameter, states_of(group)))
        if before is not None:
            with torch.no_grad():
                for (group, parameter), (_, other) in zip(self._groups, before._groups, strict=True):
                    parameter.copy_(other)
                    for name in states_of(group):
                        self._optimizer.state[parameter][name].copy_(before._optimizer.state[other][name])
        return self

    def updated(self, *numbers: int) -> "_Trial":
        """Itself after updates with gradients of these numbers."""
        for number in numbers:
            for name, gradient in self._values(number).items():
                self._parameters[name].grad = gradient
            for group in self._optimizer.param_groups:
                group["lr"] = _LEARNING_RATE
            try:
                self._optimizer.step()
            except Exception as error:  # whatever its package raises
                problem = f"fails in an update: {type(error).__name__}: {first_line(error)}"
                raise _wrong(self._train, problem) from error
        return self

    def all_states(self) -> set[tuple[str, ...]]:
        """The `states` that its groups have."""
        return {states_of(group) for group, _ in self._groups}

    def check_state(self) -> None:
        """Raise ConfigError where it keeps what would not be saved."""
        for group, parameter in self._groups:
            if problem := why_not_saved(self._optimizer.state[parameter], states_of(group), parameter):
                raise _wrong(self._train, problem)

    def is_like(self, other: "_Trial", *, rounding: float = 0.0) -> bool:
        """Whether the weights are the same."""
        own, others = (torch.cat([p.detach().flatten() for p in t._parameters.values()]) for t in (self, other))
        return torch.allclose(own, others, rtol=rounding, atol=rounding)

    def _values(self, number: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(number)
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in self._shapes.items()}
        if self._num_pieces == 1:
            return drawn
        return {
            f"{name}#{place}": piece.clone()
            for name, value in drawn.items()
            for place, piece in enumerate(value.flatten().tensor_split(self._num_pieces))
            if piece.numel()
        }


def _wrong(train: TrainConfig, problem: str) -> ConfigError:
    return ConfigError(f"{_FIELD} {train.optimizer} {problem}; see docs/extend.md", field=_FIELD)
