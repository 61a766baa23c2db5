"""One sequence of parameters through both backends' averages, and the bits that differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ema.demo.data import Floats

__all__ = ["Comparison", "compare"]

Params = Mapping[str, Floats]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of :func:`compare`."""

    elements: int
    """Elements of the averages after every step."""
    differing: int
    """The elements whose bits differ."""


def compare(params: Sequence[Params], decay: float, advance: Callable[[], None]) -> Comparison:
    """Average one sequence with ``EMAModel`` on the CPU and with a jitted ``params_ema``.

    Args:
        params: name to array, before the first step and after every one.
        decay: of both averages.
        advance: called after each step.
    """
    elements = differing = 0
    both = zip(_torch_averages(params, decay), _jax_averages(params, decay), strict=True)
    for torch_average, jax_average in both:
        for name, ours in torch_average.items():
            elements += ours.size
            differing += int(np.count_nonzero(_bits(ours) != _bits(jax_average[name])))
        advance()
    return Comparison(elements=elements, differing=differing)


def _bits(values: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return values.view(np.int32)


def _torch_averages(params: Sequence[Params], decay: float) -> Iterator[Params]:
    """The average after each step; a view, valid until the next."""
    import torch
    from torch import nn

    from ema.torch_backend import EMAModel

    tensors = {name: nn.Parameter(torch.tensor(values)) for name, values in params[0].items()}
    # a parameter's name has no dots in a ParameterDict
    model = nn.ParameterDict({name.replace(".", "_"): p for name, p in tensors.items()})
    ema_model = EMAModel(model, decay=decay)
    for now in params[1:]:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(torch.from_numpy(now[name]))
        ema_model.update()
        averages = ema_model.averaged_parameters()
        yield {name: averages[name.replace(".", "_")].detach().numpy() for name in tensors}


def _jax_averages(params: Sequence[Params], decay: float) -> Iterator[Params]:
    """The average after each step.

    The recorded parameters already hold the optimizer's update, so the transform gets them with
    updates of zero: ``old + (new - old)`` would not be ``new`` in the last bit.
    """
    import jax
    import jax.numpy as jnp

    from ema.jax_backend import ParamsEMAState, get_params_ema, params_ema

    tx = params_ema(decay=decay)

    @jax.jit
    def step(opt_state: ParamsEMAState, now: Params) -> ParamsEMAState:
        _, opt_state = tx.update(jax.tree.map(jnp.zeros_like, now), opt_state, now)
        return opt_state

    with jax.default_device(jax.devices("cpu")[0]):
        opt_state = tx.init(dict(params[0]))
        for now in params[1:]:
            opt_state = step(opt_state, now)
            averages = get_params_ema(opt_state)
            yield {name: np.asarray(average) for name, average in averages.items()}
