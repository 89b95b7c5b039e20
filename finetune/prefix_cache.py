"""Frozen layers run once a row: what they return is kept, and later epochs and evaluations take it from there.

Below the lowest module that trains, nothing changes in training. So the hidden states of a row that come out there are
the same in every epoch. They are kept by the row's tokens, its positions and the precision that they are computed in,
without padding, in main memory as far as there is room and then in a file of the run's folder, which the system deletes
when the process ends, however it ends.

Before each pass it is looked at whether anything has changed on which that depends (`frozen_state.py`); then all that
is kept is forgotten. It is also compared with what the layers return, on the first batches that could do without them
and at shares of the run. Where they differ, the layers run as they did. A line says why.

Hidden states of padding are left out where labels count none of it and no gradient of the loss has reached it. They are
kept with their row where the loss reads them, or may: in evaluations, which read the same batches each time.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.devices import autocast_dtype
from ..common.text import format_bytes
from ..cost.budget import free_bytes
from ..data.batches import IGNORED
from ..errors import first_line
from .frozen_state import FrozenState, adapted, adapters_in_use, heard_by, layers_in_order, modules_below, random_parts
from .run import MEASURING, Participant

CHECKED_FIRST = 2
"""So many batches are compared before the layers are left out, of each kind: in training, and in evaluation."""

CHECK_SHARE, CHECK_EVERY = 0.05, (10, 100)
"""And afterwards one in this share of the run's passes, within these bounds."""

MOST_CHANGES = 3
"""After so many changes below the lowest layer that trains, without a pass that was served, all layers run."""

MOST_DIFFERENCE = 1e-5
"""By how much hidden states may differ at most, as a share of the largest: kernels round otherwise beside padding. In
half precision the last place of a number is the bound, where that is more."""

MEMORY_SHARE, DISK_SHARE = 0.125, 0.5
"""The shares of free main memory and of the free disk that are taken at most, unless it is said how much."""

PATIENCE = 50
"""Batches of a later epoch, of which fewer than half are known, after which rows are taken to change."""

WHOLE = 2**31
"""The end of a row whose length in tokens its input does not tell, such as an image."""

_MAIN_INPUTS = ("input_ids", "pixel_values", "input_values", "input_features")
_BESIDE_INPUTS = ("position_ids", "token_type_ids", "attention_mask")
_FOLLOW_INPUTS = ("labels", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_OTHER_INPUTS = ("past_key_values", "cache", "head_mask")
"""Inputs by name: those that rows are known by, what is read beside them, what follows from these, and those under
which all layers run. So they do where a model reads any other tensor, such as the boxes of words; a number is none."""

_OF_EACH_LAYER = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Options and settings of a model under which it returns something of each layer, or has a loss of it."""


@dataclass(frozen=True)
class Row:
    """The tokens of one row, or of one text where a row holds several.

    Attributes:
        row: its index in the batch.
        start: its first token.
        stop: the token after its last one.
        key: of its tokens, its positions and their precision.
    """

    row: int
    start: int
    stop: int
    key: bytes


def rows_of(inputs: Mapping[str, Any], *, padding_counts: bool, precision: str) -> list[Row] | None:
    """The rows of a batch; None if what the model reads cannot be told row by row.

    Args:
        inputs: of the model below its head, by name.
        padding_counts: whether hidden states of padding may be read. Then a row is one with its padding.
        precision: of the forward pass, in which hidden states of a row differ.
    """
    known = {*_MAIN_INPUTS, *_BESIDE_INPUTS, *_FOLLOW_INPUTS}
    others = (isinstance(value, torch.Tensor) and value.dim() and name not in known for name, value in inputs.items())
    if any(inputs.get(name) is not None for name in _OTHER_INPUTS) or any(others):
        return None
    main = next((inputs[name] for name in _MAIN_INPUTS if inputs.get(name) is not None), None)
    if main is None or main.dim() < 2:
        return None
    beside = [inputs.get(name) for name in _BESIDE_INPUTS]
    if any(each is not None and (each.dim() != 2 or each.shape[-1] != main.shape[-1]) for each in beside):
        return None
    ids = main.detach().cpu().numpy()
    positions, types, mask = (None if each is None else each.detach().cpu().numpy() for each in beside)
    rows = []
    for index in range(len(ids)):
        place = None if positions is None else positions[index % len(positions)]
        kind = None if types is None else types[index]
        for start, stop in _stretches(ids[index], place, None if mask is None else mask[index], padding_counts):
            parts = [ids[index, start:stop], np.array([start]) if place is None else place[start:stop]]
            parts += [] if kind is None else [kind[start:stop]]
            if mask is not None and (padding_counts or (mask[index, start:stop] != 1).any()):
                parts.append(mask[index])
            whole = b"|".join([precision.encode(), *(np.ascontiguousarray(part).tobytes() for part in parts)])
            key = hashlib.blake2b(whole, digest_size=16)
            rows.append(Row(index, start, stop, key.digest()))
    return rows


def _stretches(ids: Any, positions: Any, mask: Any, padding_counts: bool) -> list[tuple[int, int]]:
    """Where the texts of a row begin and end: several where positions begin anew, one with its padding if it counts."""
    if ids.ndim > 1:
        return [(0, WHOLE)]
    if mask is not None and not mask.all() and not padding_counts:
        real = np.flatnonzero(mask)
        if len(real) and real[-1] - real[0] + 1 == len(real):
            return [(int(real[0]), int(real[-1]) + 1)]
    elif positions is not None and not padding_counts:
        return [*pairwise([0, *(np.flatnonzero(np.diff(positions) != 1) + 1).tolist(), len(ids)])]
    return [(0, len(ids))]


@dataclass(frozen=True)
class Room:
    """Where hidden states may be kept.

    Attributes:
        folder: of a file.
        memory_bytes: of main memory, at most.
        file_bytes: of the file, at most.
    """

    folder: Path
    memory_bytes: float
    file_bytes: float

    @classmethod
    def of(cls, folder: Path, most_bytes: float = math.inf, processes: int = 1) -> Room:
        """A share of what is free now for each of some processes; of `most_bytes` together, main memory goes first."""
        memory, disk = MEMORY_SHARE * free_bytes(torch.device("cpu")), DISK_SHARE * shutil.disk_usage(folder).free
        memory = min(memory, most_bytes)
        return cls(folder, memory / processes, min(disk, most_bytes - memory) / processes)

    @property
    def whole(self) -> float:
        """Bytes in both places."""
        return self.memory_bytes + self.file_bytes


class Store:
    """Hidden states by key: in main memory up to some bytes, and in a file beyond that.

    Args:
        room: for them. The file is made when it is needed, and has no name.

    Attributes:
        full: nothing more is taken.
        size: bytes that are held.
    """

    full: bool
    size: int

    def __init__(self, room: Room) -> None:
        self._room = room
        self._begin()

    def _begin(self) -> None:
        self._held: dict[bytes, np.ndarray[Any, Any]] = {}
        self._places: dict[bytes, tuple[int, int, int]] = {}  # start, bytes and checksum
        self._file: Any = None
        self._end = 0
        self.full, self.size = False, 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._held or key in self._places

    def put(self, key: bytes, values: np.ndarray[Any, Any]) -> None:
        """Take bytes, uint8 (count,), which are not changed later.

        Raises:
            OSError: the file cannot be written, as on a full disk.
        """
        if self.size + values.nbytes <= self._room.memory_bytes:
            self._held[key] = values
        elif self._end + values.nbytes <= self._room.file_bytes:
            self._file = self._file or tempfile.TemporaryFile(dir=self._room.folder, buffering=0)  # noqa: SIM115  (it has no end that a block tells)
            self._file.seek(self._end)
            written = self._file.write(values.data)
            if written != values.nbytes:
                raise OSError("the disk is full")
            self._places[key] = self._end, values.nbytes, zlib.crc32(values.data)
            self._end += values.nbytes
        else:
            self.full = True
            return
        self.size += values.nbytes

    def get(self, key: bytes) -> np.ndarray[Any, Any]:
        """What was taken under a key.

        Raises:
            OSError: the file cannot be read, or holds something else.
        """
        if key in self._held:
            return self._held[key]
        start, size, checksum = self._places[key]
        values = np.empty(size, dtype=np.uint8)
        self._file.seek(start)
        if self._file.readinto(values.data) != size or zlib.crc32(values.data) != checksum:
            raise OSError("its file is damaged")
        return values

    def clear(self) -> None:
        """Forget all, and delete the file."""
        if self._file is not None:
            self._file.close()
        self._begin()


class PrefixCache(Participant):
    """Leaves frozen layers out of forward passes whose rows have been seen.

    Args:
        model: the PEFT model, with layers of transformers.
        room: for what is kept.
        epochs: how often training reads each row.
        passes: forward passes of training in the whole run, roughly.
        tokens: of all rows of training, roughly.
        evaluates: keep rows of evaluations.
        tell: gets a line when the cache begins or ends.

    Attributes:
        layers: how many run once a row; 0 while it is off.
        left_out: forward passes that ran without them.

    Raises:
        LookupError: the model's layers cannot be found, and why.
    """

    layers: int
    left_out: int

    def __init__(
        self,
        model: nn.Module,
        room: Room,
        *,
        epochs: float,
        tokens: float,
        evaluates: bool,
        tell: Callable[[str], None],
        passes: float = math.inf,
    ) -> None:
        self._model, self._tell, self._tokens, self._epochs = model, tell, tokens, epochs
        self._body, self._layers = layers_in_order(model)
        self._arguments = [*inspect.signature(self._body.forward).parameters]
        least, most = CHECK_EVERY
        self._check_every = int(max(least, min(most, CHECK_SHARE * passes)))
        self._room, self._store = room, Store(room)
        self._evaluates, self._wanted = evaluates, {True: False, False: False}
        self.layers = self.left_out = self._followed = 0
        self._changes = 0
        self._handles: list[Any] = []
        self._left: list[tuple[nn.Module, Any]] = []
        self._seen: dict[bool, int] = {}
        self._missed: dict[bool, list[bool]] = {}
        self._pass: _Pass | None = None
        self._padding_counts = True
        self._reads_padding: bool | None = None  # not known before the first backward pass
        self._padding: torch.Tensor | None = None  # that this pass may leave out, bool (rows, length)
        self._heard: list[torch.Tensor] = []
        self._uses: dict[Any, int] = {}
        self._dtypes: dict[str, torch.dtype] = {}  # of what is kept, by the precision of the pass

    def begin(self, state: Mapping[str, Any] | None) -> None:
        """Leave out layers from now on, and tell where a resumed run may differ in its last bits."""
        self.ranks_changed()
        if state is not None and self.layers:
            self._tell(
                "What frozen layers returned before is computed anew: beside other padding it may differ in its last "
                "bits from a run without a break. prefix_cache='off' goes on bit for bit."
            )

    def ranks_changed(self) -> None:
        """Leave out all layers below the lowest that trains, as it is now; rows are forgotten if it is another one."""
        count = self._frozen()
        if count != self._followed:
            self._begin(count)

    def _begin(self, count: int, change: str = "") -> None:
        """Leave out so many layers from now on, and tell it, after what has changed below them."""
        self.end()
        self._followed, self._seen, self._missed = count, {True: 0, False: 0}, {True: [], False: []}
        self._wanted, line = self._worth_it(count)
        wanted = any(self._wanted.values())
        if change:
            rest = "Evaluations keep it anew." if wanted else "All layers run for every row from now on."
            line = f"{change}, so what frozen layers returned is forgotten. {line or rest}"
        if line:
            self._tell(line)
        if not wanted:
            return
        self.layers = count
        self._handles = [
            self._model.register_forward_pre_hook(self._see_labels, with_kwargs=True),
            self._body.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._body.register_forward_hook(self._leave),
            self._layers[count].register_forward_pre_hook(self._keep, with_kwargs=True),
        ]
        for index, layer in enumerate(self._layers[:count]):
            forward = self._of_layer(index, layer.forward)
            layer.forward = forward
            self._left.append((layer, forward))
        self._below = modules_below(self._body, self._layers[count:])
        self._random = bool(random_parts(self._body, self._layers[count:]))
        self._look_below()

    def _look_below(self) -> None:
        self._state, self._adapted = FrozenState(self._below, getattr(self._body, "config", None)), adapted(self._below)

    def _changed(self, change: str) -> None:
        """Begin anew after a change below the lowest layer that trains, unless it changes again and again."""
        self._changes += 1
        if self._changes > MOST_CHANGES:
            self.end(f"{change}, and that was not the first change")
        else:
            self._begin(self._frozen(), change)

    def _frozen(self) -> int:
        """How many layers from the lowest do not train; 0 if the embeddings do."""
        count = next((i for i, layer in enumerate(self._layers) if _trains(layer.parameters())), 0)
        inside = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        outside = (parameter for parameter in self._body.parameters() if id(parameter) not in inside)
        return 0 if not count or _trains(outside) else count

    def expected_share(self, layers: int, others: Iterable[nn.Parameter]) -> float:
        """The share of the run's training steps without layers below the lowest adapter, as far as it is known before.

        Args:
            layers: how many the step was counted with.
            others: parameters that train beside adapters.
        """
        inside = {id(parameter) for parameter in self._body.parameters()}
        able = layers == len(self._layers) and not any(id(parameter) in inside for parameter in others)
        if not able or self._epochs < 2 or self._size > self._room.whole:
            return 0.0
        return 0.0 if random_parts(self._body, self._layers[-1:]) else 1 - 1 / self._epochs

    @property
    def _size(self) -> float:
        """Bytes of the hidden states of all rows of training."""
        weight = next(self._layers[0].parameters())
        width = getattr(getattr(self._body, "config", None), "hidden_size", weight.shape[-1])
        return self._tokens * width * (weight.element_size() if weight.is_floating_point() else 2)

    def _worth_it(self, count: int) -> tuple[dict[bool, bool], str]:
        """Whether rows of training and of evaluations are kept, and a line on that."""
        below, skipped = f"The {count} lowest of {len(self._layers)} layers train nothing", self._layers[:count]
        neither, evaluations = {True: False, False: False}, {True: False, False: self._evaluates}
        if not count or (self._epochs < 2 and not self._evaluates):
            return neither, ""
        if heard := heard_by(skipped):
            return neither, f"{below}, but run for every row: {heard} has a hook or a forward pass of the user's."
        if self._epochs < 2:
            return evaluations, ""
        if random := random_parts(self._body, self._layers[count:]):
            return evaluations, f"{below}, but run for every row of training: {random}."
        size = self._size
        if size > self._room.whole:
            return evaluations, (
                f"{below}. What they return would take {format_bytes(size)}, and there is room for "
                f"{format_bytes(self._room.whole)} (prefix_cache), so they run in every epoch."
            )
        return {True: True, False: self._evaluates}, (
            f"{below}, so they run once a row: later epochs take what they return from {format_bytes(size)} of memory "
            f"and disk, and leave about {100 * count / len(self._layers):.0f} % of the forward pass out."
        )

    def end(self, why: str = "") -> None:
        """Compute all layers anew, and forget all rows; a reason is told."""
        self._hear()
        for handle in self._handles:
            handle.remove()
        for layer, forward in self._left:
            if vars(layer).get("forward") is forward:  # else somebody has wrapped it
                del layer.forward
        if why and self.layers:
            self._tell(f"All layers run for every row from now on: {why}.")
        self._store.clear()
        self._handles, self._left, self._pass, self.layers = [], [], None, 0

    # One forward pass -------------------------------------------------------------------------------------------------

    def _see_labels(self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Find out whether the loss reads hidden states of padding."""
        labels, mask = options.get("labels"), options.get("attention_mask")
        self._padding_counts = True
        if isinstance(labels, torch.Tensor):
            self._padding_counts = mask is not None and labels.shape == mask.shape and _reads_padding(labels, mask)

    def _enter(self, body: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if MEASURING.get():
            return
        counts, self._padding_counts = self._padding_counts, True
        self._pass = self._padding = None
        self._hear()
        training = body.training
        if not self._wanted[training] or self._runs_whole(options):
            return
        if change := self._state.change():
            self._changed(change)
            return
        given = {**options, **dict(zip(self._arguments, arguments, strict=False))}
        mask = given.get("attention_mask")
        padding = mask == 0 if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        if padding is not None and bool(padding.any()) and not counts:
            # An evaluation reads the same batches each time. What it does with logits is not known.
            counts = bool(self._reads_padding) or not (training and torch.is_grad_enabled())
            self._padding = None if counts else padding
        precision = self._precision(next(body.parameters()), options)
        rows = rows_of(given, padding_counts=counts, precision=precision)
        if rows is None:
            return
        known = all(row.key in self._store for row in rows)
        known = known and (self._padding is None or self._reads_padding is not None)
        self._seen[training] += known
        if self._are_others(training, known):
            self.end("the rows are others than in the epoch before")
            return
        seen = self._seen[training]
        checks = known and (seen <= CHECKED_FIRST or seen % self._check_every == 0)
        self._pass = _Pass(rows, precision, known=known, checks=checks)
        if known:
            try:
                self._pass.states = [self._store.get(row.key) for row in rows]
            except OSError as error:
                self.end(f"what was kept cannot be read ({first_line(error)})")

    def _runs_whole(self, options: dict[str, Any]) -> bool:
        """Whether all layers run in a pass, since somebody sees each of them, or some drop numbers in an evaluation."""
        config = getattr(self._body, "config", None)
        asks = any(options.get(name) or getattr(config, name, False) for name in _OF_EACH_LAYER)
        hooks = torch.nn.modules.module
        heard = hooks._global_forward_hooks or hooks._global_forward_pre_hooks
        drops = self._random and any(each.training for each in self._below.values())
        return bool(asks or heard or drops or torch.compiler.is_compiling())

    def _precision(self, weight: torch.Tensor, options: dict[str, Any]) -> str:
        """What a pass is computed in: numbers, adapters, and what is switched by its arguments."""
        use = adapters_in_use(self._adapted)
        switches = sorted((name, value) for name, value in options.items() if isinstance(value, bool | str))
        return f"{weight.dtype}, {autocast_dtype(weight)}, {self._uses.setdefault(use, len(self._uses))}, {switches}"

    def _leave(self, body: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """Hear in the backward pass whether the loss reads the padding that was left out, or may be."""
        padding, self._padding = self._padding, None
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if padding is not None and hidden.requires_grad:
            heard = self._heard
            hidden.register_hook(lambda gradient: heard.append((gradient.any(-1) & padding).any()))

    def _hear(self) -> None:
        """Take in what the backward passes since the last pass told of padding."""
        heard = [*self._heard]
        self._heard.clear()  # hooks of passes to come hold this list
        if heard and not self._reads_padding:
            before, self._reads_padding = self._reads_padding, any(map(bool, heard))
            if self._reads_padding:
                late = "" if before is None else ", and the pass before may have left it out"
                self._tell(f"The loss reads padding{late}. Rows are kept with their padding from now on.")
                self._store.clear()

    def _are_others(self, training: bool, known: bool) -> bool:
        """Whether rows are others than before, once some of them have come back."""
        missed = self._missed[training]
        if self._seen[training]:
            missed.append(not known)
            del missed[:-PATIENCE]
        return len(missed) == PATIENCE and sum(missed) > PATIENCE // 2

    def _of_layer(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            now = self._pass
            if now is None or not now.known or now.checks:
                output = real(hidden, *arguments, **options)
                written = [name for name, value in options.items() if isinstance(value, MutableMapping)]
                if now is not None and not isinstance(output, torch.Tensor):
                    self.end(f"{type(self._layers[index]).__name__} returns more than hidden states")
                elif now is not None and written:
                    self.end(f"later layers read what earlier ones write into {written[0]}")
                return output
            if index < self.layers - 1:
                return hidden
            self.left_out += 1
            self._changes = 0
            return self._whole(hidden, now)

        return forward

    def _whole(self, hidden: torch.Tensor, now: _Pass) -> torch.Tensor:
        """The hidden states of a batch, of the shape of its embeddings; those of padding are 0."""
        dtype = self._dtypes[now.precision]
        result = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        for row, values in zip(now.rows, now.states, strict=True):
            result[row.row, row.start : row.stop] = _tensor(values, dtype, hidden.shape[-1]).to(hidden.device)
        return result

    def _keep(self, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Keep what comes into the lowest layer that always runs, or compare it with what is kept."""
        now, self._pass = self._pass, None
        hidden = arguments[0] if arguments else options.get("hidden_states")
        if now is None or (now.known and not now.checks):
            return
        if not isinstance(hidden, torch.Tensor) or hidden.requires_grad:
            self.end("something below the lowest adapter trains")
        elif now.known:
            kept = self._whole(hidden, now)
            differs = max(_difference(kept[r.row, r.start : r.stop], hidden[r.row, r.start : r.stop]) for r in now.rows)
            if differs > max(MOST_DIFFERENCE, 2 * torch.finfo(hidden.dtype).eps):
                self.end(
                    f"what they return differs by {differs:.1g} of its size from one pass to the next (dropout, noise, "
                    "or texts that read one another)"
                )
        else:
            if not self._store.size:  # the first pass may note something in modules
                self._look_below()
            self._dtypes[now.precision] = hidden.dtype
            for row in now.rows:
                if row.key not in self._store and not self._store.full:
                    self._put(row.key, hidden[row.row, row.start : row.stop])

    def _put(self, key: bytes, states: torch.Tensor) -> None:
        try:
            self._store.put(key, states.detach().cpu().contiguous().view(torch.uint8).numpy().flatten())
        except OSError as error:
            self.end(f"what they return cannot be kept ({first_line(error)})")


def _reads_padding(labels: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether a token that counts in the loss is padding, or the first after it, which is predicted from it."""
    counts, padding = labels != IGNORED, mask == 0
    return bool((counts & padding).any() or (counts[:, 1:] & padding[:, :-1]).any())


def _trains(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any number trains: at the end of `disable_adapter`, PEFT lets pairs of rank 0 require gradients."""
    return any(parameter.requires_grad and parameter.numel() for parameter in parameters)


@dataclass
class _Pass:
    """One forward pass: its rows and precision, whether all are known, whether that is checked, and what is kept."""

    rows: list[Row]
    precision: str
    known: bool
    checks: bool
    states: list[Any] = field(default_factory=list)


def _tensor(values: Any, dtype: torch.dtype, width: int) -> torch.Tensor:
    return torch.from_numpy(values).view(dtype).view(-1, width)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two tensors as a share of the largest number."""
    scale = other.abs().max().clamp(min=1e-30)
    return float((one - other).abs().max() / scale)
