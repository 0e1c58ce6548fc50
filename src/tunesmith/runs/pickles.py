"""What pickles would do if somebody opened them: their opcodes are read with ``pickletools``, and nothing is unpickled.

A pickle is a program that names functions and calls them.  Trainers' pickles name few: those that rebuild tensors, and
the classes of their settings.  Any other name is reported, for who loads the file or resumes from it runs that.
"""

from __future__ import annotations

import hashlib
import pickletools
import re
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.checkpoint import open_regular
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding, Value
from tunesmith.runs.records import RunFile

UNREADABLE = "unreadable"
PICKLE_KINDS = frozenset(
    {
        "adapter_pickle",
        "weights_pickle",
        "optimizer",
        "scheduler",
        "scaler",
        "rng_state",
        "sampler_state",
        "custom_state",
        "deepspeed_model",
        "deepspeed_optimizer",
        "fsdp_model",
        "fsdp_optimizer",
        "training_args_bin",
        "pickle_unknown",
    }
)

_PROGRAM_BYTES = 8 * 2**20  # what follows the program in old files is numbers
_DIRECTORY_BYTES = 4 * 2**20  # some 50,000 members
_MEMBERS = 8
_OPCODES = 1_000_000
_MOST_PICKLES = 16
_MOST_NAMES = 12
_NAME_CHARACTERS = 80

_FURTHER_FILES = 64
_FURTHER_SECONDS = 0.04
_RUN_SECONDS = 0.6

# What trainers write, "module name".  None of these runs what a pickle hands to it.
_KNOWN = frozenset(
    [
        *(f"{builtins} {name}" for builtins in ("builtins", "__builtin__") for name in ("set", "frozenset", "complex")),
        *(f"{builtins} {name}" for builtins in ("builtins", "__builtin__") for name in ("bytearray", "slice", "range")),
        "_codecs encode",
        "argparse Namespace",
        "collections OrderedDict",
        "collections defaultdict",
        "datetime datetime",
        "datetime timedelta",
        "pathlib PosixPath",
        "pathlib WindowsPath",
        "pathlib._local PosixPath",
        "pathlib._local WindowsPath",
        "numpy dtype",
        "numpy ndarray",
        *(f"numpy.{core}.multiarray {name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
        *(f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")),
        *(f"torch {name}" for name in ("device", "Size", "layout", "memory_format")),
        "torch.nn.parameter Parameter",
        "torch.serialization _get_layout",
        "torch.storage UntypedStorage",
        "torch.storage TypedStorage",
        "torch._tensor _rebuild_from_type_v2",
        *(f"torch._utils _rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "sparse_tensor")),
        *(f"torch._utils _rebuild_{name}" for name in ("parameter", "parameter_with_state", "qtensor")),
        "accelerate.state PartialState",
        "accelerate.utils.deepspeed HfDeepSpeedConfig",
        "accelerate.data_loader SeedableRandomSampler",
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.utils.tensor_fragment fragment_address",
        "transformers.integrations.deepspeed HfTrainerDeepSpeedConfig",
        "transformers.trainer_pt_utils AcceleratorConfig",
        "axolotl.utils.dict DictDefault",
    ]
)
# Settings and the enumerations in them: data classes, of which each release of these tools has more.
_SETTINGS = (
    r"(?:transformers|trl|llamafactory|swift|axolotl)(?:\.\w+)*\.\w*(?:config|arguments|args)\w* "
    r"\w+(?:Config|Arguments)",
    r"(?:unsloth_compiled_cache\.)?Unsloth\w+Trainer Unsloth\w+Config",
    r"accelerate\.utils\.dataclasses \w+(?:Config|Plugin|Kwargs)",
)
_ENUMERATIONS = re.compile(
    r"transformers\.(?:trainer_utils|training_args|utils\.generic|debug_utils) \w+(?:Strategy|Type|Names|Option|Mode)"
    r"|trl(?:\.\w+)*\.\w+_config \w+Type"
    r"|accelerate\.utils\.dataclasses \w+Type"
    r"|torch\.distributed\.fsdp\.(?:\w+\.)*\w+ (?:ShardingStrategy|BackwardPrefetch|StateDictType)"
)
_TORCH = (
    r"torch (?:[A-Z]\w*Storage|b?float\d\w*|complex\d+|u?int\d+|bool|qu?int\d\w*)",
    r"torch\.distributed\.checkpoint\.metadata (?:\w*Metadata(?:Index)?|TensorProperties|StorageMeta)",
    r"torch\.distributed\.checkpoint\.metadata _MEM_FORMAT_ENCODING",
    r"torch\.distributed\.checkpoint\.filesystem (?:_StorageInfo|_StoragePrefix)",
)
_PATTERNS = re.compile("|".join((*_SETTINGS, _ENUMERATIONS.pattern, *_TORCH)))
_ATTRIBUTE = ("builtins getattr", "__builtin__ getattr")

_MARK = object()
_VALUE = object()
_COMPUTED = "?"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PICKLES = 5  # magic number, protocol, system, object, keys of the storages; then come numbers
_DAMAGE = (ValueError, LookupError, TypeError, OverflowError, EOFError, struct.error)

_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_EXTENSIONS = {"EXT1", "EXT2", "EXT4"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ADDS = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # to what stays on the stack
_ADDS_TO_MARK = {"APPENDS", "SETITEMS", "ADDITEMS"}
_MAKES_FROM_MARK = {"LIST", "DICT", "FROZENSET"}


class _Global(str):
    """A name, "module name", that a pickle has put on its stack."""

    __slots__ = ()


class _DamagedError(Exception):
    """The bytes are no pickle, break off, or are more than is read."""


def scan_pickle(path: Path) -> tuple[str, ...]:
    """The names in a pickle that no trainer writes, found without unpickling it.

    Reads plain pickles and what ``torch.save`` writes now (an archive) and wrote formerly (pickles in a row).  Time and
    memory are bounded, whatever the file holds.

    Args:
        path: the file.

    Returns:
        Names such as ``os.system``, ``?`` for one that the pickle puts together as it runs, and at the end
        :data:`UNREADABLE` where not all of it could be read.  Empty: nothing suspicious.
    """
    names: dict[str, None] = {}
    _scan(path, names, deadline=time.monotonic() + _RUN_SECONDS)
    return tuple(names)


def scan_run(root: Path, files: Sequence[RunFile]) -> list[Finding]:
    """What the pickles of a run would do that a trainer's do not.

    Those at the root and in the last checkpoint are all scanned; of the others the latest, as far as 64 files and
    four hundredths of a second, those for the first included, go.

    Args:
        root: the run directory.
        files: its files; of these only the kinds that are pickles are opened.

    Returns:
        ``pickle_suspicious``, one for each set of names, and ``pickle_unreadable``.
    """
    first, further = _in_order(files)
    begun = time.monotonic()
    results: dict[tuple[str, ...], list[str]] = {}
    seen: dict[bytes, tuple[str, ...]] = {}
    for number, file in enumerate([*first, *further]):
        optional = number >= len(first)
        deadline = begun + (_FURTHER_SECONDS if optional else _RUN_SECONDS)
        names: dict[str, None] = {}
        if time.monotonic() < deadline:
            _scan(root / file.path, names, deadline=deadline, seen=seen)
        elif not optional:
            names[UNREADABLE] = None
        if optional and time.monotonic() > deadline:  # it may only have lacked the time
            names.pop(UNREADABLE, None)
        if names:
            results.setdefault(tuple(names), []).append(file.path)
    return [_finding(names, paths) for names, paths in results.items()]


def _in_order(files: Sequence[RunFile]) -> tuple[list[RunFile], list[RunFile]]:
    """The pickles at the root and in the last checkpoint, the small ones first; and the latest of the others."""
    pickles = [file for file in files if file.kind in PICKLE_KINDS and not file.path.endswith(".distcp")]
    last = max((_step(file.path) for file in pickles), default=-1)
    first = [file for file in pickles if "/" not in file.path or (last >= 0 and _step(file.path) == last)]
    taken = {file.path for file in first}
    further = [file for file in pickles if file.path not in taken]
    further.sort(key=lambda file: (-_step(file.path), file.size_bytes))
    return sorted(first, key=lambda file: file.size_bytes), further[:_FURTHER_FILES]


def _step(path: str) -> int:
    match = re.search(r"(?:^|/)checkpoint-(\d{1,12})/", path)
    return int(match[1]) if match else -1


def _finding(names: tuple[str, ...], paths: list[str]) -> Finding:
    named = ", ".join(name for name in names if name != UNREADABLE)
    params: dict[str, Value] = {"file": paths[0], "count": len(paths)}
    if named:
        return Finding(code="pickle_suspicious", severity="error", params={**params, "names": named})
    return Finding(code="pickle_unreadable", severity="info", params=params)


def _scan(
    path: Path, names: dict[str, None], *, deadline: float, seen: dict[bytes, tuple[str, ...]] | None = None
) -> None:
    """Add what is suspicious about a file to ``names``; the programs in ``seen`` are known already."""
    seen = {} if seen is None else seen
    damaged = False
    try:
        with open_regular(path) as file:
            for program in _programs(file):
                digest = hashlib.blake2b(program).digest()
                if digest not in seen:
                    seen[digest] = _suspicious(program, deadline=deadline)
                damaged = damaged or UNREADABLE in seen[digest]
                names.update(dict.fromkeys(seen[digest]))
    except (OSError, CheckpointError, _DamagedError, struct.error, zlib.error):
        damaged = True
    names.pop(UNREADABLE, None)
    for surplus in list(names)[_MOST_NAMES:]:
        del names[surplus]
    if damaged:
        names[UNREADABLE] = None


def _programs(file: BinaryIO) -> Iterator[bytes]:
    """The pickle programs of a file: of an archive those that a loader would run, else the file; 8 MiB of each.

    Raises:
        _DamagedError: an archive that cannot be read, or holds none or too many.
    """
    head = file.read(4)
    file.seek(0)
    if head != b"PK\x03\x04":
        yield file.read(_PROGRAM_BYTES)
        return
    places = [place for name, *place in _directory(file) if name.lower().endswith(b".pkl")]
    if not 0 < len(places) <= _MEMBERS:
        raise _DamagedError
    for method, size, header in places:
        yield _member(file, method=method, size=size, header=header)


def _directory(file: BinaryIO) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, method, packed size and place of each member of an archive, as loaders find them: by its last directory.

    Python's own ``zipfile`` refuses archives that PyTorch reads (a false checksum, another name before the data), which
    is how a pickle is hidden from scanners; and its directory has no bound.

    Source: PKWARE's APPNOTE.TXT, sections 4.3.12 to 4.3.16.
    """
    size = file.seek(0, 2)
    begin = max(0, size - 2**16 - 100)
    file.seek(begin)
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise _DamagedError
    length, offset = struct.unpack_from("<II", tail, end + 12)
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        file.seek(min(size, struct.unpack_from("<Q", tail, end - 12)[0]))
        length, offset = struct.unpack_from("<QQ", file.read(56), 40)
    if length > _DIRECTORY_BYTES or offset > size:
        raise _DamagedError
    file.seek(offset)
    directory, place = file.read(length), 0
    while directory[place : place + 4] == b"PK\x01\x02":
        method, packed, plain, name, extra, comment, header = struct.unpack_from("<10xH8xIIHHH8xI", directory, place)
        place += 46
        wide = _wide(directory[place + name : place + name + extra], plain=plain, packed=packed, header=header)
        yield directory[place : place + name], method, *wide
        place += name + extra + comment


def _wide(extra: bytes, *, plain: int, packed: int, header: int) -> tuple[int, int]:
    """Packed size and place of a member, with those of 64 bits, which stand apart."""
    if 0xFFFFFFFF not in (plain, packed, header):
        return packed, header
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            _, packed, header = (next(values, 0) if short == 0xFFFFFFFF else short for short in (plain, packed, header))
            break
        extra = extra[4 + length :]
    return packed, header


def _member(file: BinaryIO, *, method: int, size: int, header: int) -> bytes:
    """The beginning of one member, unpacked to 8 MiB at most."""
    if header > file.seek(0, 2):
        raise _DamagedError
    file.seek(header + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    file.seek(name + extra, 1)
    packed = file.read(min(size, _PROGRAM_BYTES))
    if method == 8:
        return zlib.decompressobj(-15).decompress(packed, _PROGRAM_BYTES)
    if method:
        raise _DamagedError
    return packed


def _suspicious(program: bytes, *, deadline: float) -> tuple[str, ...]:
    """The suspicious names in pickles that follow one another; :data:`UNREADABLE` where the first one breaks off.

    What follows a whole pickle may be anything, as the numbers are that follow PyTorch's old five.
    """
    stream, names, limit = BytesIO(program), dict[str, None](), None
    for number in range(_MOST_PICKLES):
        machine = _Machine()
        with warnings.catch_warnings():  # Python remarks on odd escapes in texts, which are the file's, not ours
            warnings.simplefilter("ignore")
            whole = machine.run(stream, deadline=deadline)
        limit = _LEGACY_PICKLES if machine.magic else limit
        must_be = not number or limit is not None
        # Numbers that are read as a program seem to compute names, but do not spell any.
        names.update({name: None for name in machine.names if whole or must_be or not name.startswith(_COMPUTED)})
        if not whole and must_be:
            names[UNREADABLE] = None
        if not whole or number + 1 == limit or stream.tell() >= len(program):
            return tuple(names)
    return (*names, UNREADABLE)


class _Machine:
    """The pickle machine, with names and texts for values, and nothing that is ever called.

    Attributes:
        names: what it was made to name that no trainer's pickle names.
        magic: whether the number was among its values that begins PyTorch's old files.
    """

    def __init__(self) -> None:
        self.names: dict[str, None] = {}
        self.magic = False
        self._stack: list[object] = []
        self._memo: dict[int, object] = {}
        self._handlers: dict[str, Callable[[Any], object]] = {
            **dict.fromkeys(_STRINGS, self._stack.append),
            **dict.fromkeys(_PUTS, self._put),
            **dict.fromkeys(_GETS, lambda place: self._stack.append(self._memo[place])),
            **dict.fromkeys(_EXTENSIONS, self._extension),
            **dict.fromkeys(_ADDS_TO_MARK, lambda _: self._to_mark()),
            **dict.fromkeys(_MAKES_FROM_MARK, lambda _: self._make(self._to_mark())),
            **{name: partial(self._tuple, count) for name, count in _TUPLES.items()},
            **{name: partial(self._drop, count) for name, count in _ADDS.items()},
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "MARK": lambda _: self._stack.append(_MARK),
            "POP": lambda _: self._stack.pop(),
            "POP_MARK": lambda _: self._to_mark(),
            "DUP": lambda _: self._stack.append(self._stack[-1]),
            "TUPLE": lambda _: self._stack.append(tuple(self._to_mark())),
            "GLOBAL": self._global,
            "STACK_GLOBAL": lambda _: self._stack_global(),
            "INST": self._inst,
            "OBJ": lambda _: self._obj(),
            "REDUCE": lambda _: self._reduce(),
            "NEWOBJ": lambda _: self._new(1),
            "NEWOBJ_EX": lambda _: self._new(2),
            "LONG1": self._long,
        }

    def run(self, stream: BinaryIO, *, deadline: float) -> bool:
        """Read one pickle; whether it could be read to its end."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
                handler = self._handlers.get(opcode.name)
                if handler is not None:
                    handler(argument)
                else:
                    self._other(opcode)
                if count % 1024 == 1023 and (count >= _OPCODES or time.monotonic() > deadline):
                    return False
        except _DAMAGE:
            return False
        return True

    def _name(self, name: str) -> None:
        if not (name in _KNOWN or _PATTERNS.fullmatch(name)):
            self.names[name.replace(" ", ".")[:_NAME_CHARACTERS]] = None

    def _pop(self) -> object:
        value = self._stack.pop()
        if value.__class__ is _Global and value in _ATTRIBUTE:  # as a value it could be called out of sight
            self._name(str(value))
        return value

    def _to_mark(self) -> list[object]:
        values = []
        while (value := self._pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _make(self, _: object) -> None:
        self._stack.append(_VALUE)

    def _drop(self, count: int, _: object) -> None:
        for _number in range(count):
            self._pop()

    def _tuple(self, count: int, _: object) -> None:
        self._stack.append(tuple([self._pop() for _number in range(count)][::-1]))

    def _global(self, name: str) -> None:
        if name not in _ATTRIBUTE:
            self._name(name)
        self._stack.append(_Global(name))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if isinstance(name, str) and isinstance(module, str) and _Global not in (type(name), type(module)):
            self._global(f"{module} {name}")
        else:
            self.names[_COMPUTED] = None
            self._make(None)

    def _extension(self, number: int) -> None:
        self.names[f"copyreg.extension({number})"] = None
        self._make(None)

    def _inst(self, name: str) -> None:
        self._to_mark()
        self._name(name)
        self._make(None)

    def _obj(self) -> None:
        values = self._to_mark()
        self._called(values[0])
        self._make(None)

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._stack.pop()
        if function in _ATTRIBUTE and function.__class__ is _Global:
            if not _is_member(arguments):
                self._name(str(function))
        else:
            self._called(function)
        self._make(None)

    def _new(self, arguments: int) -> None:
        self._drop(arguments, None)
        self._called(self._pop())
        self._make(None)

    def _called(self, function: object) -> None:
        if function.__class__ is not _Global:
            self.names[_COMPUTED] = None

    def _long(self, number: int) -> None:
        self.magic = self.magic or number == _TORCH_MAGIC
        self._make(None)

    def _other(self, opcode: pickletools.OpcodeInfo) -> None:
        """Opcodes that make a plain value, or none, of those on the stack."""
        self._drop(len(opcode.stack_before), None)
        for _after in opcode.stack_after:
            self._make(None)


def _is_member(arguments: object) -> bool:
    """Whether these arguments make ``getattr`` look up a member of an enumeration, as Python 3.11.0 pickled them."""
    if not isinstance(arguments, tuple) or len(arguments) != 2:
        return False
    owner, name = arguments
    known = owner.__class__ is _Global and _ENUMERATIONS.fullmatch(owner)
    return bool(known) and name.__class__ is str and re.fullmatch(r"[A-Z][A-Z0-9_]*", name) is not None
