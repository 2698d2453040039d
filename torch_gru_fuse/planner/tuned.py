"""Whole-sequence plans that were measured: candidates to measure, and a file that keeps the fastest of them.

The planner predicts, ``python -m torch_gru_fuse tune`` measures.  What it finds is kept in ``plans.json`` in the folder that
TORCH_GRU_FUSE_CACHE names, or else in ``torch_gru_fuse`` of the user's cache folder, and holds for one model of GPU and one
version of this package and of Triton.  A file that cannot be read, or is not ours, counts as empty.

Neither torch nor Triton is needed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    StagedPlan,
    WavefrontPlan,
    WholeSequencePlan,
    crosses_in_ring,
    plan_resident,
    plan_whole_sequence,
)

__all__ = ["Entry", "Key", "cache_file", "candidates", "key_of", "load", "lookup", "store"]

log = logging.getLogger("torch_gru_fuse")

_FORMAT = 1
_KERNELS = {kernel.name: kernel for kernel in (ResidentPlan, WavefrontPlan, StagedPlan)}


# ---- the file -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """What a plan was measured for.

    Attributes:
        gpu: its name, as torch has it.
        package, triton: versions.
        batch, hidden, lanes, reverse: as ``plan_whole_sequence`` takes them; a stack with dropout between its layers has one
            lane.  The number of steps and of inputs is none of them: they change the time, hardly what is fastest.
        dtype: "float16", "bfloat16" or "float32".
    """

    gpu: str
    package: str
    triton: str
    batch: int
    hidden: int
    lanes: int
    reverse: bool
    dtype: str


def key_of(gpu: str, batch: int, hidden: int, lanes: int, *, reverse: bool, dtype: str) -> Key:
    """The key for the versions that are installed."""
    return Key(gpu, *_versions(), batch, hidden, lanes, reverse, dtype)


@functools.cache
def _versions() -> tuple[str, str]:
    """Of this package and of Triton."""
    from torch_gru_fuse import __version__  # imports torch, which callers have

    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return __version__, metadata.version(name)
    return __version__, "unknown"


@dataclass(frozen=True)
class Entry:
    """The fastest plan of a key.

    Attributes:
        plan: for ``ops.whole_path``.
        us: microseconds of the forward pass that was measured, in a CUDA graph.
        own_us: of PyTorch's own GRU (cuDNN) in the same run, in a CUDA graph.
        steps, inputs, layers: of the GRU that was measured.
    """

    plan: WholeSequencePlan
    us: float
    own_us: float
    steps: int
    inputs: int
    layers: int


def cache_file() -> Path:
    """Where the plans are kept; nothing need be there."""
    folder = os.environ.get("TORCH_GRU_FUSE_CACHE")
    if folder:
        return Path(folder) / "plans.json"
    caches = os.environ.get("XDG_CACHE_HOME", "")
    # the standard has a relative path ignored
    return (Path(caches) if os.path.isabs(caches) else Path("~/.cache").expanduser()) / "torch_gru_fuse" / "plans.json"


def lookup(key: Key) -> Entry | None:
    """What was measured for a key; the file is read once in a process."""
    return load().get(key)


def load() -> dict[Key, Entry]:
    """All that is kept, as of the first call in this process or of the last ``store``."""
    try:
        return _load(cache_file())
    except (OSError, RuntimeError) as error:  # no home folder
        log.warning("tuned plans are not used: %s", error)
        return {}


@functools.cache
def _load(file: Path) -> dict[Key, Entry]:
    records = _records(file) or []
    return dict(parsed for parsed in map(_parse, records) if parsed is not None)


def _records(file: Path) -> list[Any] | None:
    """What a file holds, not yet understood; None of a file that is not ours."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not (isinstance(document, dict) and document.get("format") == _FORMAT and isinstance(document.get("plans"), list)):
            raise ValueError(f"expected an object with format {_FORMAT} and a list of plans")
        return document["plans"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of JSON, of UTF-8
        log.warning("tuned plans are not used, %s is not a file of them: %s", file, error)
        return None


def _parse(record: Any) -> tuple[Key, Entry] | None:
    """None of a record that another version of this package has written, or nobody should have."""
    try:
        return _from_json(Key, record["key"]), _entry(record["entry"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("a tuned plan is not used: %s: %s", type(error).__name__, error)
        return None


def store(key: Key, entry: Entry) -> Path:
    """Adds to the file, or replaces what is there for the key.

    Records that are not understood stay; a file that is none of ours is kept beside the new one, as plans.unreadable.

    A reader sees the file before or after, never in between.  Of two processes that store in the same moment, one may lose.

    Raises:
        OSError: the file cannot be written.
    """
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    records = _records(file)
    if records is None:
        with contextlib.suppress(OSError):
            os.replace(file, file.with_suffix(".unreadable"))
        records = []
    records = [record for record in records if (_parse(record) or (None,))[0] != key]
    records.append({"key": asdict(key), "entry": _entry_to_json(entry)})
    text = json.dumps({"format": _FORMAT, "plans": records}, indent=1)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix="plans-", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as new:
            new.write(text)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    _load.cache_clear()
    return file


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    kernel = entry.plan.kernel
    plan = {"lanes": entry.plan.lanes, "kernel": {"name": kernel.name, **asdict(kernel)}}
    return {**asdict(entry), "plan": plan}


def _entry(record: dict[str, Any]) -> Entry:
    kernel = dict(record["plan"]["kernel"])
    name = kernel.pop("name")
    if name not in _KERNELS:
        raise ValueError(f"kernel {name!r}, expected one of {', '.join(_KERNELS)}")
    plan = _from_json(WholeSequencePlan, {**record["plan"], "kernel": _from_json(_KERNELS[name], kernel)})
    return _from_json(Entry, {**record, "plan": plan})


_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool}


def _from_json(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from all of its fields and no others; annotations here are strings."""
    expected = {field.name: _TYPES.get(str(field.type)) for field in fields(kind)}
    if values.keys() != expected.keys():
        raise ValueError(f"{kind.__name__} with {sorted(values)}, expected {sorted(expected)}")
    for name, value in values.items():
        known = expected[name]
        if known is not None and (not isinstance(value, known) or (isinstance(value, bool) and known is not bool)):
            raise ValueError(f"{name} of {kind.__name__} is {value!r}")
    return kind(**values)


# ---- candidates ---------------------------------------------------------------------------------------------------------

_MOST_WEIGHTS = 192  # registers of a thread for weights; more spill
_MOST_OPERANDS = 208  # for weights and, of a wavefront, a tile of states; 224 spilled 12 to 1290 bytes in code for sm_90
_MOST_IN_FLIGHT = 32  # registers of a thread for a tile of states on its way
_VECTOR_BYTES = 16
_SHARED_OF_SMALL_GPUS = 99 * 1024


def candidates(
    batch: int, hidden: int, lanes: int, element_bytes: int, reverse: bool, multiprocessors: int, shared_bytes: int
) -> list[WholeSequencePlan]:
    """Plans worth measuring, the planned one first; empty where no kernel takes the sizes.

    The arguments are those of ``plan_whole_sequence``.  All kinds of kernels, both tilings of the batch, and the neighbours of
    what the planner would take.  A plan that spills, or does not fit after all, is among them: measuring finds out.
    """
    planned = plan_whole_sequence(
        batch, hidden, lanes, element_bytes, reverse=reverse, multiprocessors=multiprocessors, shared_bytes=shared_bytes
    )
    stack = lanes > 1 and not reverse
    found = [] if planned is None else [planned]
    if stack:  # all layers at once
        found += [WholeSequencePlan(lanes, kernel) for kernel in _residents(hidden, element_bytes, True)]
        found += [WholeSequencePlan(lanes, kernel) for kernel in _wavefronts(hidden, element_bytes, True)]
    each = 2 if reverse else 1  # one layer after the other
    found += [WholeSequencePlan(each, kernel) for kernel in _residents(hidden, element_bytes, False)]
    found += [WholeSequencePlan(each, kernel) for kernel in _wavefronts(hidden, element_bytes, False)]
    found += [
        WholeSequencePlan(each, kernel) for kernel in _staged(batch, hidden, each, element_bytes, multiprocessors, shared_bytes)
    ]
    if planned is not None and isinstance(planned.kernel, WavefrontPlan):
        found += [replace(planned, kernel=replace(planned.kernel, ahead=ahead)) for ahead in (2, 8)]
    fitting = [
        plan for plan in found
        if not plan.waits(reverse=reverse) or plan.programs(batch, hidden) <= multiprocessors * plan.programs_per_sm
    ]  # fmt: skip
    return list(dict.fromkeys(fitting))


def _padded(hidden: int) -> int:
    return 1 << (hidden - 1).bit_length()


def _residents(hidden: int, element_bytes: int, stack: bool) -> list[ResidentPlan]:
    planned = plan_resident(hidden, element_bytes, stack=stack)
    if planned is None:
        return []
    return [planned, replace(planned, early=not planned.early)] if stack else [planned]


def _wavefronts(hidden: int, element_bytes: int, stack: bool) -> list[WavefrontPlan]:
    """16 units a program, of a stack with x beside h or after it."""
    padded = _padded(hidden)
    if not 64 <= padded <= 1024:
        return []
    found = []
    for rows in (8, 16):
        for slices in (2, 4, 8):
            length = padded // slices * element_bytes  # bytes of k in a slice
            weights = 3 * 16 * length // 128  # registers of a thread, for one projection
            room = _MOST_OPERANDS - rows * length // 128
            if length < 64 or weights > room:
                continue
            options: list[dict[str, Any]] = []
            if not stack:
                options.append({})
            else:
                options += [{"input_slices": slices, "store_first": first} for first in (True, False)]
                if 2 * weights <= room:
                    options.append({})
            found += [WavefrontPlan(16, rows, slices, **option) for option in options]
    return found


def _staged(
    batch: int, hidden: int, lanes: int, element_bytes: int, multiprocessors: int, shared_bytes: int
) -> list[StagedPlan]:
    """8 warps, for every way to share them between units and k; the fewest tiles, and the fewest pieces that fit."""
    padded = _padded(hidden)
    found = []
    for unit_warps in (8, 4, 2, 1):
        units, slices = 16 * unit_warps, 8 // unit_warps
        weights = 3 * units * padded * element_bytes // 1024
        slice_bytes = padded // slices * element_bytes
        groups = multiprocessors // (lanes * -(-hidden // units))  # of programs along the batch
        if weights > _MOST_WEIGHTS or slice_bytes < 128 or not groups:
            continue
        share = 0 if weights < _MOST_WEIGHTS else 3 if shared_bytes <= _SHARED_OF_SMALL_GPUS else 2
        for rows in (8, 16):
            tiles = -(-batch // (groups * rows))
            tiles += tiles > 1 and tiles % 2  # they come in pairs
            for pieces in (1, 2, 4):
                tile_bytes = rows * padded * element_bytes // pieces
                # less than a vector a thread would be read twice, more than so many registers spill
                if not _VECTOR_BYTES * 256 <= tile_bytes <= 4 * 256 * _MOST_IN_FLIGHT or slice_bytes // pieces < 128:
                    continue
                ring = crosses_in_ring(padded, tiles, element_bytes)
                plan = StagedPlan(units, rows, tiles, slices, unit_warps, pieces, share, ring)
                if tiles <= 32 and plan.shared_bytes(hidden, element_bytes) <= shared_bytes:
                    found.append(plan)
                    break
    return found
