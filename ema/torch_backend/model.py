"""``EMAModel``: the average of a model's weights, kept beside the model."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor, nn

from ema.checkpoint import MAX_SHARD_SIZE, Record
from ema.checkpoint.paths import errors_of
from ema.checkpoint.renaming import Rename, Transform
from ema.errors import StateError, listing, warn
from ema.options import OnNonfinite
from ema.schedules import Schedule
from ema.torch_backend.averages import Averages
from ema.torch_backend.calls import eager, run, uninterrupted
from ema.torch_backend.distance import relative_distance
from ema.torch_backend.saving import files
from ema.torch_backend.saving.ranks import verify_ranks
from ema.torch_backend.saving.state import State
from ema.torch_backend.settings import Settings
from ema.torch_backend.swap.averaged_module import AveragedModules
from ema.torch_backend.swap.blocks import ENDED_BESIDE, Block, ended_inside, report
from ema.torch_backend.swap.caches import clearing
from ema.torch_backend.swap.followers import refuse_follower
from ema.torch_backend.swap.swap import Swap, any_swapped, first_swapped, refuse_if_swapped
from ema.torch_backend.swap.teacher import call_with, current_buffers, with_current_buffers
from ema.torch_backend.tensors.copying import copy_over
from ema.torch_backend.tensors.fit import check_writable, targets
from ema.torch_backend.tensors.names import unwrap
from ema.torch_backend.tensors.selection import Selection
from ema.torch_backend.tensors.sharding import (
    any_sharded,
    before_write,
    fully_sharded,
    local_of,
    wrapped_like,
)
from ema.torch_backend.turns import Turns, in_eager_turn, in_turn
from ema.torch_backend.update.counters import Counters
from ema.weights import weight_of

__all__ = ["EMAModel", "with_settings"]

ModelT = TypeVar("ModelT", bound=nn.Module)


@final
class EMAModel(Generic[ModelT]):
    """Exponential moving average of the weights of ``model``.

    Every :meth:`update` moves the average towards the parameters by the weight ``w`` of the
    schedule (``1 − decay``)::

        average + w · (params − average)                 w < 0.5
        params  − (params − average) · (1 − w)           otherwise

    The average starts as a copy of the parameters and has their names, shapes and memory layout.
    It is always float32 or wider, unless you choose ``dtype``. Frozen parameters use no extra
    memory: they serve as their own average. If a parameter is unfrozen later, its average starts
    with its value at the next update. An averaged parameter that is frozen later stays averaged.
    Tied weights are averaged once.

    The average follows parameters that are replaced, moved or cast. If a parameter was resized or
    removed, the next update raises an error before anything has changed.

    Only one thread at a time may use an ``EMAModel``. A call that overlaps a call of another thread
    raises a ``StateError`` and changes nothing. Calls inside calls of the same thread work.

    Args:
        model: any module. It may be wrapped (DDP, ``torch.compile``) or sharded (``fully_shard``,
            DTensor), now or later. Only :meth:`averaged_module` copies it.
        decay: the decay of one update in [0, 1], or a schedule. A mapping from names to these
            keeps several averages, which read the parameters once (``use_ema("long")``).
        update_after_step: through this step the average equals the live weights; updates count
            from there.
        update_every: steps from one update to the next.
        dtype: of all averages: ``torch.float32``, ``torch.float64`` or ``torch.bfloat16``. A
            bfloat16 average uses half the memory; it is computed in float32 and rounded. None:
            float64 for float64 parameters, and float32 for all others.
        device: of all averages; None: the device of each parameter.
        include: patterns of parameter names (``"encoder.*"``). Only these parameters are averaged,
            from the start, even if they are frozen.
        exclude: patterns of parameters that are not averaged.
        buffers: ``"copy"`` uses the model's own buffers. ``"average"`` averages the floating-point
            buffers, except for those that :attr:`left_alone` lists. A mapping from patterns to
            these two words decides by name.
        compensated: keep the rounding error of each update in a remainder ``c`` of the size of the
            average. Then the average moves at any decay. (A float32 average loses steps of less
            than half a unit in the last place, 6e-3 of the weights at decay 0.99999.) ::

                y = c + w · ((params − average) − c)
                average, c = average + y, y − ((average + y) − average)

        stochastic_rounding: round bfloat16 averages up or down at random, see :mod:`ema.rounding`.
            Without it they do not move at decays near 1.
        seed: of the stochastic rounding, in [0, 2**64).
        on_nonfinite: what an update does if live weights hold NaN or Inf. ``"propagate"`` averages
            them. ``"skip"`` changes only :attr:`step` and :attr:`skipped`. ``"raise"`` raises an
            error before anything has changed. The last two read the weights once more.
        overlap: on a GPU, run an update beside the next forward and backward pass, on a stream of
            its own. PyTorch's optimizers wait for it. If other code writes the weights, updates
            run in order, unless that code calls :meth:`before_write` before each write.

    Raises:
        ArgumentError: an argument is out of range.
        ArgumentTypeError: an argument has the wrong type.
        ModelError: the model has nothing to average, a pattern matches nothing, or a tensor cannot
            be averaged: it is sparse, shares a part of its memory with another tensor, or belongs
            to FSDP1 or ZeRO-3.

    Sources: Polyak and Juditsky 1992; Ruppert 1988.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> ema_model = EMAModel(model, decay=0.99)
    >>> for _ in range(3):
    ...     ema_model.model(torch.ones(1, 2)).sum().backward()
    ...     optimizer.step()
    ...     ema_model.update()
    >>> with ema_model.use_ema():
    ...     prediction = ema_model.model(torch.ones(1, 2))
    """

    def __init__(
        self,
        model: ModelT,
        decay: float | Schedule | Mapping[str, float | Schedule] = 0.999,
        *,
        update_after_step: int = 0,
        update_every: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        include: str | Collection[str] | None = None,
        exclude: str | Collection[str] | None = None,
        buffers: str | Mapping[str, str] = "copy",
        compensated: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
        on_nonfinite: OnNonfinite = "propagate",
        overlap: bool = False,
    ) -> None:
        settings = Settings(
            decay=decay,
            update_after_step=update_after_step,
            update_every=update_every,
            dtype=dtype,
            device=device,
            include=include,
            exclude=exclude,
            buffers=buffers,
            compensated=compensated,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
            on_nonfinite=on_nonfinite,
            overlap=overlap,
        )
        self._set_up(model, settings)

    def _set_up(self, model: ModelT, settings: Settings) -> None:
        self._model = model
        self._settings = settings
        self._averages = Averages(model, settings)
        self._modules = AveragedModules(model, self._averages.look_for_views)
        self._swap: Swap | None = None
        self._blocks: list[Block] = []  # that are open and see the swap, in the order of entering
        self._turns = Turns()
        self._counters = Counters()
        self._file_metadata: dict[str, str] = {}
        self._begin()

    def __repr__(self) -> str:
        return (
            f"EMAModel({type(unwrap(self._model)).__name__}, {self._shown()},"
            f" step={self.step}, count={self.count})"
        )

    @property
    def model(self) -> ModelT:
        """The live model."""
        return self._model

    @property
    def schedule(self) -> Schedule:
        """The schedule of the decay; a plain number is a ``ConstantDecay``.

        Raises:
            StateError: there are several averages.
        """
        return self._settings.schedule

    @property
    def schedules(self) -> dict[str | None, Schedule]:
        """The schedule of each average by its name; a single average has the name None."""
        return dict(self._settings.schedules)

    @property
    def decay(self) -> float:
        """The decay of the last update, or of the first one before that.

        Raises:
            StateError: there are several averages.
        """
        return 1.0 - weight_of(self.schedule, max(self.count, 1), self._settings.update_every)

    @property
    def step(self) -> int:
        """Calls of :meth:`update` so far."""
        return self._counters.step

    @property
    def count(self) -> int:
        """Updates that were made by them."""
        return self._counters.settled().count

    @property
    def skipped(self) -> int:
        """Updates that were due and skipped, because live weights held NaN or Inf."""
        return self._counters.settled().skipped

    @property
    def left_alone(self) -> dict[str, str]:
        """Buffers that ``buffers="average"`` asked for and that are not averaged: name to reason.

        These are the vectors of spectral norms, the ranges and scales of quantization observers,
        and buffers that held infinities or NaN when they were first seen, such as masks. The model's
        own values are used for them, as with ``"copy"``. A rule that names such a buffer
        (``buffers={"*.mask": "average"}``) averages it.
        """
        return self._averages.left_alone

    @property
    @in_turn
    def sharded(self) -> bool:
        """Whether the model is sharded, so that every rank must call :meth:`save` and the like."""
        return any_sharded(self._look(next(iter(self._settings.schedules)))[1].averaged.values())

    @in_turn
    def reset(self) -> None:
        """Start again from the live weights, at step 0; Ctrl-C waits until it is done.

        Raises:
            StateError: averages are swapped in, these or another one's.
        """
        self._refuse_while_swapped("reset")
        self._refuse_others()
        self._begin()

    def _begin(self) -> None:
        with uninterrupted():
            if self._settings.update_after_step:
                self._averages.forget()
            else:
                self._averages.start()
            self._counters = Counters()
        self._modules.refresh()

    @eager
    @in_eager_turn
    def update(self) -> None:
        """Count a step and, if one is due, make an update: call it after ``optimizer.step()``.

        Raises:
            ArgumentError: a schedule of your own gives a weight outside [0, 1] or NaN. Nothing has
                changed.
            StateError: averages are swapped in, these or another one's, or with
                ``on_nonfinite="raise"`` a live weight is NaN or Inf. Or a CUDA graph is being
                captured that cannot hold the update. Nothing has changed, counters included.
            ModelError: an averaged parameter was resized or removed, or all tensors to average are
                on the meta device. Nothing has changed, counters included.

        Warns:
            EMAWarning: a parameter is on the meta device, or with ``on_nonfinite="skip"`` the first
                update was refused; once each.
        """
        self._refuse_while_swapped("update")
        self._refuse_incomplete()
        self._refuse_others()
        self._refuse_capture()
        step = self._counters.step + 1
        since = step - self._settings.update_after_step
        weights = self._next_weights(since)  # first: one that is refused leaves all as it is
        if since < 0:
            self._averages.forget()
        elif since == 0:
            self._averages.start()
        else:
            self._averages.follow(join=True, due=bool(weights))
        if not weights:
            self._counters = dataclasses.replace(self._counters, step=step)
            self._modules.refresh()
            return
        self._averages.check_values()
        counters = dataclasses.replace(self._counters, step=step)
        if names := self._refusing():
            self._counters = dataclasses.replace(counters, skipped=counters.skipped + 1)
            self._modules.refresh()
            self._warn_if_first(names)
            return
        counters = dataclasses.replace(counters, count=counters.count + 1)
        self._averages.update(weights, counters, partial(setattr, self, "_counters"))
        self._modules.refresh()

    @in_turn
    def before_write(self) -> None:
        """With ``overlap``, before anything but a PyTorch optimizer writes live weights."""
        self._averages.before_write()

    @in_turn
    def averaged_parameters(self, name: str | None = None) -> dict[str, Tensor]:
        """Canonical name to average: views, valid until the next update or swap.

        Tied weights appear once. Tensors that are not averaged do not appear: their average is the live
        tensor.

        Args:
            name: which average, where there are several; as for the methods below.
        """
        averages, found = self._look(name)
        return _wrapped(averages, found)

    @in_turn
    def relative_distance(self, name: str | None = None) -> float:
        """``‖average − params‖₂ / ‖params‖₂`` over all averaged tensors; reads both once.

        Where the model is sharded, ranks add up two numbers: every rank must call it.
        """
        self._refuse_while_swapped("relative_distance")
        self._refuse_others()
        averages, found = self._look(name)
        return relative_distance(averages, found.averaged)

    @in_turn
    def verify_ranks(self) -> None:
        """Make sure that all ranks have the same average, where they should (DDP, replicas).

        Communicates: every rank must call it. Without ``torch.distributed`` it does nothing.

        Raises:
            StateError: on every rank, with the tensors that differ and the ranks.
        """
        tensors = {}
        for index, label in enumerate(self._settings.schedules):
            averages, found = self._look(label)
            suffix = "" if label is None else f" ({label})"
            for key, average in averages.items():
                tensors[f"{key}{suffix}"] = average, found.averaged[key]
            for key, remainder in self._averages.remainders(index).items():
                tensors[f"{key}{suffix}, remainder"] = remainder, found.averaged[key]
        counters = {"step": self.step, "count": self.count, "skipped": self.skipped}
        verify_ranks(counters, tensors)

    @in_turn
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the averaged weights, as a teacher; the live model does not change.

        No gradient reaches the live parameters. Buffers, such as the statistics of a BatchNorm, keep
        their values. Attributes that ``forward`` assigns get their old values back; a container that
        ``forward`` changes in place stays changed. The call runs the bare model, in the mode of the
        live model, without DDP and not compiled. A function that has a weight in its closure uses
        the live weight.

        :meth:`averaged_module` is cheaper for many calls and has a mode of its own. Under
        ``fully_shard`` a call raises a ``ModelError``: use :meth:`use_ema` there. Gradients with
        respect to the inputs are wrong through checkpointed layers, because the backward pass
        computes these again with the live weights.
        """
        if self._settings.names:
            raise StateError(
                "calling is for one average: with several, call the model inside use_ema(name)"
            )
        averages, found = self._look()
        return call_with(self._model, found, averages, args, kwargs)

    @in_turn
    def averaged_module(self, name: str | None = None) -> nn.Module:
        """A copy of the bare model that has the averaged weights and follows every update.

        It is a module of the same class with a mode, hooks, attributes, buffers and frozen
        parameters of its own, and calling it costs a plain forward pass. Its parameters do not
        require grad. If an average has the dtype and the device of its parameter, the parameter of
        the copy refers to the memory of the average. The other parameters, frozen parameters and
        buffers are copies, which each :meth:`update`, :meth:`load`, :meth:`load_state_dict` and
        :meth:`reset` brings up to date. While averages are swapped into the live model, the copy
        still shows averages.

        Only read the copy. A write into its weights changes the average, and before
        ``update_after_step`` the live model. If you move or cast the copy, it holds copies of the
        averages in the new place. Its own copies and pickles do not follow the average. The
        ``EMAModel`` holds the copy weakly: once you drop it, updates do nothing for it.

        Attributes that are tensors with a history, such as a loss that ``forward`` has kept, are
        None in the copy. A function that has a weight or a module in its closure refers to the live
        one.

        Args:
            name: which average, where there are several.

        Raises:
            ModelError: something cannot be copied, with the path of its module and its attribute; a
                tensor has no memory yet; or ``fully_shard`` was called on the model.
            StateError: averages are swapped in, these or another one's.
        """
        index = self._settings.index(name)
        self._refuse_while_swapped("averaged_module")
        self._refuse_incomplete(index)
        self._refuse_others()
        return self._modules.make(index, {id(self): None})

    @in_turn
    def apply_ema(
        self, model: nn.Module | None = None, *, name: str | None = None, assign: bool = False
    ) -> None:
        """Swap the averaged weights into ``model``, by default the live one; a second call does nothing.

        Parameters keep their storage, unless ``assign`` is set. If an error is raised on the way,
        Ctrl-C included, the model keeps its weights. The ``EMAModel`` holds the model until
        :meth:`restore_original`. Until then only read its weights: a write is lost, or changes the
        average.

        Args:
            model: another model with the same names and shapes.
            name: which average, if there are several.
            assign: let the parameters refer to the memory of the averages, which costs no time at
                any size. Objects that hold the memory of a parameter, and not the parameter itself,
                still see live weights: captured CUDA graphs, NumPy arrays, views, other processes.
                Tensors of a sharded model, and tensors that share memory, are exchanged as without
                ``assign``.

        Raises:
            ArgumentError: ``name`` is not the name of one of several averages.
            ModelError: names or shapes differ; all differences are listed.
            StateError: these averages are in another model, or another average is in this one.
        """
        swap = self._prepare_swap(model, name, assign=assign)
        if swap is not None:
            swap.apply()

    @in_turn
    def restore_original(self, model: nn.Module | None = None) -> None:
        """Put the live weights back into the model that :meth:`apply_ema` was called with.

        Args:
            model: the model that the averages should be in; if they are in another one, this is
                an error.

        Raises:
            StateError: no averages are swapped in, or not into ``model``. Or a ``use_ema()`` block
                is open, whose code relies on the averages; the live weights are back all the same.
        """
        if self._swap is None or not self._swap.active:
            raise StateError("restore_original needs an apply_ema before it")
        if model is not None and not self._is_swapped_into(model):
            raise StateError("the averages are swapped into another model than this one")
        open_blocks = len(self._blocks)
        self._end(self._swap)
        if open_blocks:
            raise StateError(ended_inside("restore_original()", open_blocks))

    @contextmanager
    def use_ema(
        self,
        model: nn.Module | str | None = None,
        *,
        name: str | None = None,
        assign: bool = False,
    ) -> Iterator[nn.Module]:
        """Averaged weights inside the block, live weights after it, even if the block raises.

        Inside another block of the same average a block does nothing, so blocks must nest. If the
        outer block ends first, as it can in coroutines, generators and threads, its end raises an
        error.

        Args:
            model: another model with the same names and shapes.
            name: which average, where there are several; may stand first: ``use_ema("long")``.
            assign: see :meth:`apply_ema`.

        Raises:
            ModelError: see :meth:`apply_ema`.
            StateError: likewise; or at the end, if a block inside this one is still open, or
                another thread is within a call. The live weights are back, or come back when that
                call ends.
        """
        if isinstance(model, str):
            model, name = None, model
        block = Block()
        try:
            try:
                self._use_ema(block, model, name, assign=assign)
                yield self._model if model is None else model
            except BaseException as error:
                self._leave(block, error)
                raise
            self._leave(block)
        finally:  # once more: Ctrl-C may have come before the lines above
            self._leave(block, sys.exception())

    @eager
    @in_eager_turn
    def _use_ema(
        self, block: Block, model: nn.Module | None, name: str | None, *, assign: bool
    ) -> None:
        """Enter a block."""
        block.swap = self._prepare_swap(model, name, assign=assign)
        block.turn = self._turns.number
        self._blocks.append(block)
        if block.swap is not None:
            block.swap.apply()

    @eager
    def _leave(self, block: Block, error: BaseException | None = None) -> None:
        """Leave a block; does nothing the second time, or if its averages are out already.

        Args:
            block: may never have been entered.
            error: the exception that was raised in it.

        Raises:
            StateError: a block inside it is open, or a call of another thread runs. The live
                weights are back, or will be when that call ends.
        """
        if block.left or block not in self._blocks:
            return
        inside = 0 if block.swap is None else len(self._blocks) - 1
        beside = self._turns.finish(partial(self._close, block), block.turn)
        block.left = True
        if beside:
            report(ENDED_BESIDE, error)
        elif inside:
            report(ended_inside("the end of one", inside), error)

    def _close(self, block: Block) -> None:
        if block not in self._blocks:
            return
        if block.swap is None:
            self._blocks.remove(block)
        else:
            self._end(block.swap)

    @in_turn
    def copy_to(self, model: nn.Module, *, name: str | None = None) -> None:
        """Write the averages, and the live values of everything else, into ``model`` for good.

        Frozen quantized weights are copied where the two models are quantized alike.

        Args:
            model: a model with the same names and shapes. If it is the live one, its
                weights are lost.
            name: which average, where there are several.

        Raises:
            ModelError: names or shapes differ; all differences are listed. Or a tensor that is
                not averaged cannot be copied: it is quantized in another way, or has no values
                on the meta device. Or a tensor of ``model`` cannot be written: one that is
                expanded, or was made in inference mode. Nothing has changed.
            StateError: averages are swapped into ``model``, these or another one's.
        """
        if self._is_swapped_into(model):
            raise StateError("copy_to needs a model that no averages are swapped into")
        refuse_follower(model)
        averages, found = self._look(name)
        values = {**averages, **found.others, **current_buffers(self._model, found)}
        theirs = targets(model, values, found)
        refuse_if_swapped(theirs)
        check_writable(theirs)
        before_write(fully_sharded(model.modules()))
        with uninterrupted():
            for key, value in values.items():
                if key in averages:
                    local_of(theirs[key]).copy_(local_of(value))
                else:
                    copy_over(theirs[key], value)
            run(clearing())

    @in_turn
    def state_dict(self) -> dict[str, Any]:
        """Copies of the averages, the counters and the schedule, see :class:`State`.

        The values are right also while averages are swapped in. The state can be saved with ``torch.save`` and loaded
        with ``torch.load`` and its defaults.
        """
        copies, remainders = {}, {}
        for index, label in enumerate(self._settings.schedules):
            averages, found = self._look(label)
            own = {key: average.detach().clone() for key, average in averages.items()}
            copies[label] = _wrapped(own, found)
            if rest := self._averages.remainders(index):
                own = {key: remainder.clone() for key, remainder in rest.items()}
                remainders[label] = _wrapped(own, found)
        state = State(record=self._record(found), averages=copies, remainders=remainders)
        return state.to_dict()

    @in_turn
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``: averages and counters; the schedule of the constructor stays.

        From now on the tensors in the state are averaged. A parameter that was frozen in the saved
        run and requires grad now joins at the next update.

        Args:
            state: what :meth:`state_dict` returned; it is not kept.

        Raises:
            CheckpointError: it is damaged, of another version, or of another model: all that is
                missing, unexpected or of another shape is listed. Nothing has changed.
            StateError: averages are swapped in.

        Warns:
            EMAWarning: it was made with another schedule, ``update_after_step`` or
                ``update_every``; or it is of a step before ``update_after_step``, where the average
                equals the live weights, and these differ from those in the state.
        """
        self._refuse_while_swapped("load_state_dict")
        self._go_on(State.from_dict(state, self._settings.names))

    @in_turn
    def save(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        metadata: Mapping[str, str] | None = None,
        max_shard_size: int = MAX_SHARD_SIZE,
    ) -> Path:
        """Write the state as ``ema.safetensors``. A process that is killed leaves the previous file.

        The file holds the values of :meth:`state_dict`, which are not copied first. It is right
        also while averages are swapped in. :func:`ema.jax_backend.load_params_ema` reads it too.
        If the model is sharded, every rank must call this: rank 0 gathers one tensor at a time and
        writes the same file, from which any number of ranks can go on.

        Args:
            path: a file that ends in ``.safetensors``, or a folder, which is made.
            name: which average, where there are several: one file each.
            metadata: notes of your own, strings by string; None: those of the file that was
                loaded, if any.
            max_shard_size: bytes in one file; a larger state is split.

        Returns:
            The file.

        Raises:
            CheckpointError: the file cannot be written, with its path and the reason; or the
                parameters are on the meta device and have no average.
        """
        averages, found = self._look(name)
        files.check_some(averages, found)
        remainders = self._averages.remainders(self._settings.index(name))
        state = State(
            record=self._record(found, name),
            averages={None: _wrapped(averages, found)},
            remainders={None: _wrapped(remainders, found)},
        )
        notes = self._file_metadata if metadata is None else metadata
        return files.save(path, state, metadata=notes, max_shard_size=max_shard_size)

    @in_turn
    def load(
        self,
        path: str | os.PathLike[str],
        *,
        name: str | None = None,
        rename: Rename = None,
        transform: Transform = None,
    ) -> None:
        """Go on from a file that :meth:`save` or a JAX run wrote, see :meth:`load_state_dict`.

        Everything is checked before the first byte is assigned, and Ctrl-C waits for the
        assignment. If reading fails during the assignment, every later use of the average raises a
        ``StateError`` until a load or :meth:`reset` succeeds.

        Args:
            path: the file, or the folder with ``ema.safetensors`` in it.
            name: which average goes on from it, where there are several; the others stay as they
                are, and the counters are those of the last file.
            rename: from a name in the file to that of the parameter, a function or a table;
                None in place of a name leaves the tensor out.
            transform: ``transform(name, tensor)``, or a table from the parameter's name to a
                function of the tensor: for a layout that differs. Called more than once.

        Raises:
            CheckpointError: the file cannot be read, is damaged, of a newer version, or of another
                model. Nothing has changed, unless reading failed during the assignment.
            ArgumentError: ``rename`` gives two tensors one name, or has a name the file lacks;
                ``transform`` has a name that no tensor gets.
            StateError: averages are swapped in.

        Warns:
            EMAWarning: it was made with another schedule, ``update_after_step`` or
                ``update_every``.
        """
        self._refuse_while_swapped("load")
        self._settings.index(name)
        for label in self._settings.names if name is not None else ():
            if label != name:
                self._refuse_incomplete(self._settings.index(label))
        expected = self._settings.names if name is None else []
        state, stored = files.load(path, rename, transform, expected)
        with errors_of(stored.place, "read"):
            self._go_on(state, name, metadata=stored.record.extra)

    @in_turn
    def export(self, path: str | os.PathLike[str], *, name: str | None = None) -> Path:
        """Write a complete plain ``safetensors`` state dict with the averaged weights in it.

        Names and dtypes are those of the (unwrapped) model's own ``state_dict()``, tied weights
        under each of their names, so ``model.load_state_dict(safetensors.torch.load_file(path))``
        reads it where this library is not installed. Where the model is sharded every rank must
        call it, as for :meth:`save`.

        Args:
            path: the file.
            name: which average, where there are several.

        Returns:
            The file.

        Raises:
            CheckpointError: it cannot be written, with the file and the reason; or a weight is
                quantized into several tensors (torchao), which :meth:`averaged_state_dict` can
                hold and a plain safetensors file cannot.
            ModelError: the model's state dict holds something other than its tensors, or tensors
                on the meta device, which have no values.
        """
        return files.export(path, self._averaged_model(name))

    @in_turn
    def averaged_state_dict(self, *, name: str | None = None) -> dict[str, Tensor]:
        """The model's own state dict with the averaged weights in it, on the CPU: see :meth:`export`.

        Where the model is sharded every rank must call it, and ranks other than 0 get an empty one.

        Args:
            name: which average, where there are several.

        Raises:
            ModelError: the model's state dict holds something other than its tensors, or tensors
                on the meta device, which have no values.
        """
        return files.averaged_state_dict(self._averaged_model(name))

    def _averaged_model(self, name: str | None = None) -> dict[str, tuple[Tensor, torch.dtype]]:
        """The tensors of a state dict of the model with the averages in it, and their dtypes."""
        # before the look: a hook of the model may end a swap here
        state = unwrap(self._model).state_dict(keep_vars=True)
        averages, found = self._look(name)
        return files.averaged_model(state, _wrapped(averages, found), found)

    def _go_on(
        self,
        state: State,
        name: str | None = None,
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Check everything, then take over averages and counters together; Ctrl-C waits for both.

        Args:
            state: of all averages, or of the one with this name.
            name: of the average that goes on from it; None: all.
            metadata: notes to take over as well.
        """
        found = self._averages.follow()
        loaded = state.under_first_names(found)
        loaded.check_fits(found)
        theirs, ours = self._settings.differing(loaded.record, name)
        if theirs:
            warn(f"the state was made with {theirs}, from now on it is {ours}")
        labels = [label if name is None else None for label in self._settings.schedules]
        values = [loaded.averages[label] for label in labels]
        if self._settings.precision.compensated:
            values += [loaded.remainders.get(label, {}) for label in labels]
        elif any(loaded.remainders.values()):
            warn("the state holds the remainders of compensated averages, which are dropped")
        if loaded.record.step < self._settings.update_after_step:
            self._warn_where_live_weights_differ(loaded)
        self._averages.wait()
        with uninterrupted():
            self._take_over(loaded, values, None if name is None else self._settings.index(name))
            if metadata is not None:
                self._file_metadata = dict(metadata)
        self._modules.refresh()

    def _take_over(
        self, loaded: State, values: list[Mapping[str, Tensor]], only: int | None
    ) -> None:
        """Go on from a state that fits, as a run with these settings would from its step."""
        record, after = loaded.record, self._settings.update_after_step
        if record.step < after:
            self._averages.forget()
        elif record.step == after and _began_before(record, after):
            self._refuse_others()
            self._averages.start()  # the state's average is older than the start
        else:
            self._averages.assign(values, only)
        if record.step > after:
            self._counters = Counters(record.step, record.count, record.skipped or 0)
        else:  # updates count from there
            self._counters = Counters(record.step)

    def _warn_where_live_weights_differ(self, loaded: State) -> None:
        found = self._averages.follow()
        if first_swapped(found.averaged) is None and (names := loaded.unlike(found)):
            warn(
                f"the state is of step {loaded.record.step}, and through step"
                f" {self._settings.update_after_step} (`update_after_step`) the average equals the"
                f" live weights. They differ from those in the state: {listing(names)}. Load the"
                " weights of the model as well"
            )

    def _record(self, found: Selection, name: str | None = None) -> Record:
        """Counters, schedules and timing, of one average or of all, and the seed of the rounding."""
        counters = self._settled()
        looks = self._settings.precision.on_nonfinite == "skip"
        return Record(
            step=counters.step,
            count=counters.count,
            skipped=counters.skipped if looks else None,
            seed=self._settings.precision.seed if self._settings.rounds else None,
            not_averaged=tuple(found.others),
            **self._settings.timing(name),
        )

    @in_turn
    def __getstate__(self) -> dict[str, Any]:
        """Support copies and pickles, with or without the model."""
        self._refuse_while_swapped("copying")
        self._refuse_incomplete()
        averages = self._averages.apart()
        return {
            **self.__dict__,
            "_averages": averages,
            "_modules": AveragedModules(self._model, averages.look_for_views),
            "_counters": self._settled(),
            "_swap": None,
            "_blocks": [],
            "_turns": Turns(),
        }

    def _look(self, name: str | None = None) -> tuple[dict[str, Tensor], Selection]:
        """The averages of a name, wherever they are, and the tensors of the live model."""
        index = self._settings.index(name)
        self._refuse_incomplete(index)
        swap = self._swap
        if swap is None or not swap.active or not self._averages.started:
            averages, found = self._averages.look(index)
            if not self._averages.started:  # these are the live weights
                refuse_if_swapped(found.averaged)
            return averages, found
        self._averages.wait()
        # nothing is selected anew in a model that holds averages
        found = with_current_buffers(self._model, swap.found)
        return swap.averages() if swap.name == name else self._averages.held(index), found

    def _shown(self) -> str:
        if None in self._settings.schedules:
            return f"{self.schedule}"
        return f"{self._settings.schedules}"

    def _settled(self) -> Counters:
        """The counters, for which a device is waited for."""
        return self._learn(self._counters.settled())

    def _learn(self, counters: Counters) -> Counters:
        before, self._counters = self._counters, counters
        if counters.skipped > before.skipped:
            self._warn_if_first(self._averages.nonfinite())
        return counters

    def _next_weights(self, since: int) -> list[float]:
        """The weight of each average in the update that is due; empty if no update is due."""
        every = self._settings.update_every
        if since <= 0 or since % every:
            return []
        counters = self._counters
        if self._settings.depends_on_count:
            counters = self._settled()
        elif counters.pending and not self._averages.is_captured:
            counters = self._learn(counters.arrived())
        number = counters.count + 1
        return [weight_of(each, number, every) for each in self._settings.schedules.values()]

    def _refuse_capture(self) -> None:
        """Make sure that an update which is captured into a CUDA graph can be replayed."""
        if self._averages.is_captured and (reason := self._averages.keeps_from_capture()):
            raise StateError(f"a CUDA graph cannot hold an update of this average: {reason}")

    def _refusing(self) -> list[str]:
        """The tensors for which the update that is due is to be skipped."""
        on_nonfinite = self._settings.precision.on_nonfinite
        if on_nonfinite == "propagate":
            return []
        names = self._averages.nonfinite()
        if names and on_nonfinite == "raise":
            raise StateError(f"live weights must be finite to be averaged, got {listing(names)}")
        return names

    def _warn_if_first(self, names: list[str]) -> None:
        """Warn if every update so far was skipped: otherwise a whole run might go unnoticed."""
        if self._counters.count == 0 and self._counters.skipped == 1:
            warn(
                "`on_nonfinite='skip'` has refused every update so far:"
                f" {listing(names) or 'a tensor'} holds NaN or infinity"
            )

    def _refuse_while_swapped(self, call: str) -> None:
        if self._swap is not None and self._swap.active:
            raise StateError(f"{call} is not possible while averages are swapped in")

    def _refuse_incomplete(self, index: int | None = None) -> None:
        """Refuse averages that a failed load has left half assigned.

        Args:
            index: of the average that is needed; None: all.
        """
        incomplete = self._averages.incomplete
        if incomplete and (index is None or index in incomplete):
            labels = list(self._settings.schedules)
            names = [label for at in sorted(incomplete) if (label := labels[at]) is not None]
            which = f"the averages {listing(names)}" if names else "the average"
            raise StateError(f"a load of {which} broke off: load or reset before anything else")

    def _refuse_others(self) -> None:
        """Refuse a model that holds another average, which this one would take for live weights."""
        if any_swapped():
            refuse_if_swapped(self._averages.follow().averaged)

    def _is_swapped_into(self, model: nn.Module) -> bool:
        swap = self._swap
        return swap is not None and swap.active and unwrap(swap.model) is unwrap(model)

    @eager
    def _prepare_swap(
        self, model: nn.Module | None, name: str | None, *, assign: bool
    ) -> Swap | None:
        """A swap of the averages into a model, or None where they are in it already."""
        target = self._model if model is None else model
        refuse_follower(target)
        if self._swap is not None and self._swap.active:
            if self._is_swapped_into(target) and self._swap.name == name:
                return None
            raise StateError(
                "averages are swapped in already, another one or into another model: restore first"
            )
        averages, found = self._look(name)
        last = self._averages.swaps.get(name)
        if last is not None and last.model is target and not assign and (swap := last.again()):
            self._swap = swap
            return swap
        params = found.averaged
        if unwrap(target) is not unwrap(self._model):
            params = targets(target, averages, found)
            if not self._averages.started:  # these are the live weights, which stay where they are
                averages = {key: average.clone() for key, average in averages.items()}
        elif not self._averages.started:
            params = averages = {}
        self._swap = Swap(target, averages, params, found, name=name, assign=assign)
        return self._swap

    def _end(self, swap: Swap) -> None:
        swap.restore()
        if self._swap is swap:
            self._swap = None
            self._blocks = []
        if swap.model is self._model and swap.again() is not None:
            self._averages.swaps[swap.name] = swap


def _began_before(record: Record, after: int) -> bool:
    """Whether the average of a record began before step ``after``, as far as the record tells."""
    return record.update_after_step is not None and record.update_after_step < after


def with_settings(model: ModelT, settings: Settings) -> EMAModel[ModelT]:
    """An ``EMAModel`` of ``model`` whose options have been validated already."""
    average: EMAModel[ModelT] = object.__new__(EMAModel)
    average._set_up(model, settings)  # noqa: SLF001  # of this very file
    return average


def _wrapped(averages: Mapping[str, Tensor], found: Selection) -> dict[str, Tensor]:
    """The averages in the form that users see: sharded if the live tensors are."""
    return {name: wrapped_like(average, found.averaged[name]) for name, average in averages.items()}
