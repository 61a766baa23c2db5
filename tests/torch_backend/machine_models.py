"""Random models for the state machine: nested, tied, shared, of any dtype and memory layout."""

import dataclasses
import math
from collections.abc import Iterator

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["LAYOUTS", "ModelSpec", "Tree", "lay_out", "random", "specs"]

LAYOUTS = ("contiguous", "transposed", "channels_last", "gaps", "offset")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64)
SHAPES = (
    (7,),
    (3, 5),
    (),
    (1,),
    (0,),
    (0, 3),
    (1, 1),
    (4, 4),
    (2, 3, 4),
    (2, 3, 3, 2),
    (130, 33),  # more than the 4096 elements up to which averages share an allocation
    (4200,),
)


class Tree(nn.Module):
    """A module whose output shows every tensor that its forward pass saw, by name."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self) -> dict[str, Tensor]:
        self.calls += 1
        own = [*self._parameters, *self._buffers]
        shown = {name: getattr(self, name).clone() for name in own}
        for child, module in self._modules.items():
            shown |= {f"{child}.{name}": tensor for name, tensor in module().items()}
        return shown


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A parameter or buffer; every second element of a buffer that is a mask is infinite."""

    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    frozen: bool
    buffer: bool
    mask: bool

    def tensor(self, seed: int) -> Tensor:
        """Its values, which depend on ``seed`` alone."""
        values = random(self.shape, self.dtype, seed)
        if self.buffer and self.mask and _trainable(values):
            values.view(-1)[::2] = -torch.inf
        return lay_out(values, self.layout)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model: the tensors of its root, of ``left`` and of ``right.inner``.

    Attributes:
        parts: the tensors of each of these modules.
        ties: pairs of parameters that become one: the numbers of the two, and whether the one is
            the same object as the other or only lies in the same memory.
        shared: whether ``left`` is also known as ``shared``.
    """

    parts: tuple[tuple[TensorSpec, ...], ...]
    ties: tuple[tuple[int, int, bool], ...]
    shared: bool

    def build(self) -> Tree:
        """A model of its own, with the same values each time."""
        root, left, right, inner = Tree(), Tree(), Tree(), Tree()
        root.left, root.right, right.inner = left, right, inner
        if self.shared:
            root.shared = left
        seed = 0
        for module, tensors in zip((root, left, inner), self.parts, strict=True):
            for number, spec in enumerate(tensors):
                seed += 1
                if spec.buffer:
                    module.register_buffer(f"b{number}", spec.tensor(seed))
                else:
                    grad = not spec.frozen and spec.dtype != torch.int64
                    module.register_parameter(
                        f"p{number}", nn.Parameter(spec.tensor(seed), requires_grad=grad)
                    )
        self._tie([*_places(root)])
        return root

    def _tie(self, places: list[tuple[nn.Module, str]]) -> None:
        for one, other, same_object in self.ties if len(places) > 1 else ():
            (home, name), (guest, key) = places[one % len(places)], places[other % len(places)]
            parameter = getattr(home, name)
            if not same_object:
                grad = getattr(guest, key).requires_grad and _trainable(parameter)
                parameter = nn.Parameter(parameter.detach(), requires_grad=grad)
            if (home, name) != (guest, key):
                setattr(guest, key, parameter)


def _places(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in root.modules():
        for name in module._parameters:
            yield module, name


def _trainable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    """Values of the size of ``scale`` that depend on nothing but the arguments."""
    generator = torch.Generator().manual_seed(seed)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.randint(-9, 9, shape, dtype=dtype, generator=generator)
    drawn = torch.complex64 if dtype.is_complex else torch.float32
    return (scale * torch.randn(shape, dtype=drawn, generator=generator)).to(dtype)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another order of memory, with gaps, or in a larger storage."""
    dims = tuple(reversed(range(values.dim())))
    if layout == "transposed":
        return values.permute(dims).contiguous().permute(dims)
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "gaps":
        roomy = values.new_zeros((*values.shape, 2))
        roomy[..., 0] = values
        return roomy[..., 0]
    if layout == "offset":
        size = math.prod(values.shape)
        roomy = values.new_zeros(3 + 2 * size)
        return roomy[3 : 3 + size].view(values.shape).copy_(values)
    return values.clone(memory_format=torch.contiguous_format)


_tensors = st.builds(
    TensorSpec,
    shape=st.sampled_from(SHAPES),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from((*FLOATS, torch.int64)),
    frozen=st.sampled_from((False, False, False, True)),
    buffer=st.sampled_from((False, False, False, True)),
    mask=st.sampled_from((False, False, True)),
)
_parts = st.lists(_tensors, max_size=3).map(tuple)
_ties = st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans())

specs: st.SearchStrategy[ModelSpec] = st.builds(
    ModelSpec,
    parts=st.tuples(_parts, _parts, _parts),
    ties=st.lists(_ties, max_size=2).map(tuple),
    shared=st.booleans(),
)
"""Models, down to those without a tensor."""
