"""A model's and an optimiser's tensors by name, to and from the files of a torch distributed checkpoint (DCP).

    model.<parameter>                        parameters and buffers
    optimizer.state.<parameter>.<moment>     AdamW's moments and step counts
    random.<rank>                            torch's random state of a rank, uint8

Names do not depend on how many ranks there are, and DCP stores of a DTensor which slice of the whole each rank had:
what some ranks wrote, any other number can read. Only tensors are stored, so that nothing but DCP's index
``.metadata`` is a pickle, and that is read by :class:`Reader`, which knows the few types it may hold.
"""

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from hla_dist.nn import SequenceParallelHLA
from hla_dist.nn.head_norm import current_name
from hla_dist.processes.failure import UserError, describe, expect

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # one entry per parameter, however they are grouped


def capture(model: nn.Module, optimizer: torch.optim.Optimizer, random: Tensor, rank: int) -> dict[str, Tensor]:
    """Copies, on the CPU, of everything this rank has to store; training may go on while they are written."""
    tensors = _model_tensors(model)
    if optimizer.state:  # before the first step there is none, and asking for it would count as a step
        tensors |= _optimizer_tensors(model, optimizer)
    tensors[f"random.{rank}"] = random
    return {name: x.detach().clone() if x.device.type == "cpu" else x.detach().cpu() for name, x in tensors.items()}


def write(directory: Path, tensors: dict[str, Tensor], group: Any = None) -> None:
    """Write and fsync each rank's part into ``directory``; what all ranks have alike is shared out among them.

    Communication: DCP's plan, small objects over ``group`` (None: this process alone). Raises UserError, the same on
    every rank, if any cannot write.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a process alone saves alone
            dcp.save(tensors, storage_writer=_Writer(directory), process_group=group, no_dist=group is None)
    except CheckpointException as exc:
        rank, (cause, _) = sorted(exc.failures.items())[0]
        raise UserError((f"rank {rank}: " if rank else "") + describe(cause)) from exc


def read_model(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Put stored tensors into ``model`` and ``optimizer``, in the sharding these have now.

    No communication. Names, shapes and dtypes are compared before anything is changed; raises UserError naming the
    first difference. A checkpoint made before the first step leaves the optimiser as it is.
    """
    stored = stored_shapes(directory)
    wanted = _model_tensors(model)
    _compare(directory, "model.", wanted, stored)
    moments: dict[str, Any] = {}
    if optimizer is not None and any(name.startswith("optimizer.") for name in stored):
        moments = _optimizer_tensors(model, optimizer)
        _compare(directory, "optimizer.", moments, stored)
    tensors = wanted | moments
    read_tensors(directory, tensors)
    inner = unwrapped(model)
    set_model_state_dict(inner, {name.removeprefix("model."): tensors[name] for name in wanted})
    if optimizer is not None and moments:
        flat = get_optimizer_state_dict(inner, optimizer, options=_FLAT)  # with the groups' options of now
        flat |= {name.removeprefix("optimizer."): tensors[name] for name in moments}
        set_optimizer_state_dict(inner, optimizer, flat, options=_FLAT)


def read_random(directory: Path, rank: int) -> Tensor | None:
    """The random state that ``rank`` stored, None if there was no such rank."""
    name = f"random.{rank}"
    stored = stored_shapes(directory)
    if name not in stored:
        return None
    tensors = {name: torch.empty(stored[name][0], dtype=torch.uint8)}
    read_tensors(directory, tensors)
    return tensors[name]


def read_tensors(directory: Path, tensors: dict[str, Any]) -> None:
    """Overwrite ``tensors`` in place; each rank reads its own part, without a word to the others."""
    stored = {current_name(name): name for name in Reader(directory).read_metadata().state_dict_metadata}
    wanted = {stored.get(name, name): tensor for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(wanted, storage_reader=Reader(directory), no_dist=True)
    except CheckpointException as exc:
        cause = next(iter(exc.failures.values()))[0]
        raise UserError(f"checkpoint: cannot read {directory}: {describe(cause)}") from exc
    tensors.update({current_name(name): tensor for name, tensor in wanted.items()})


def stored_shapes(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor by today's name; UserError if ``directory``'s index is not one of tensors."""
    shapes = {}
    for name, item in Reader(directory).read_metadata().state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):  # anything else would be unpickled on reading
            raise UserError(f"checkpoint: expected tensors only in {directory}, got {name} as {type(item).__name__}")
        shapes[current_name(name)] = (tuple(item.size), item.properties.dtype)
    return shapes


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose names the checkpoint uses."""
    return model.module if isinstance(model, SequenceParallelHLA) else model


class Reader(dcp.FileSystemReader):
    """DCP's reader, except that ``.metadata`` may name only the types an index of tensors consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                metadata = _IndexUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, ValueError) as exc:
            raise UserError(f"checkpoint: expected the index of a checkpoint in {path}, got: {describe(exc)}") from exc
        if not isinstance(metadata, Metadata):
            raise UserError(f"checkpoint: expected the index of a checkpoint in {path}, got {type(metadata).__name__}")
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    _ALLOWED = {
        "torch": {"Size", "device", "dtype"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "pathlib": {"Path", "PosixPath", "PurePosixPath"},
        "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # Python 3.13
        "collections": {"OrderedDict"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in self._ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name}, which no index of tensors holds")
        return super().find_class(module, name)


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, except that a full disk is reported as such and not as what torch's archive makes of it."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as exc:
            cause: BaseException | None = exc
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror or str(cause)) from None


def _model_tensors(model: nn.Module) -> dict[str, Any]:
    return {f"model.{name}": value for name, value in get_model_state_dict(unwrapped(model)).items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Moments by name; the groups' options are the configuration's and are not stored."""
    flat = get_optimizer_state_dict(unwrapped(model), optimizer, options=_FLAT)
    return {f"optimizer.{name}": value for name, value in flat.items() if name.startswith("state.")}


def _compare(directory: Path, prefix: str, wanted: dict[str, Any], stored: dict[str, Any]) -> None:
    kind = "parameter" if prefix == "model." else "moment"
    stored = {name: value for name, value in stored.items() if name.startswith(prefix)}
    for name in sorted(wanted.keys() - stored.keys()):
        plain = name.removeprefix(prefix)
        raise UserError(f"checkpoint: expected {kind} {plain} in {directory}, got none of that name")
    for name in sorted(stored.keys() - wanted.keys()):
        plain = name.removeprefix(prefix)
        raise UserError(f"checkpoint: expected the {kind}s of this model in {directory}, got also {plain}")
    for name, tensor in wanted.items():
        shape, dtype = stored[name]
        own = (tuple(tensor.shape), tensor.dtype)
        given = f"{shape} and {dtype}; give the model options it was trained with"
        named = f"{name.removeprefix(prefix)} with shape {own[0]} and {own[1]} in {directory}"
        expect(own == (shape, dtype), "checkpoint", named, given)
