"""BPF programs without a compiler: instructions with labels, put together in Python.  Pure.

Nothing beyond what :mod:`netplan.bpf_programs` needs.  Encoding: Documentation/bpf/standardization/
instruction-set.rst; include/uapi/linux/bpf.h.
"""

import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

RESULT, FRAME = 0, 10
"""The registers that have a meaning of their own: what a call returned, and the end of the stack."""

_LITTLE = sys.byteorder == "little"
_SIZES = {1: 0x10, 2: 0x08, 4: 0x00, 8: 0x18}  # BPF_B, BPF_H, BPF_W, BPF_DW
_LDX, _ST, _STX, _ALU, _JMP, _JMP32, _ALU64 = 0x61, 0x62, 0x63, 0x04, 0x05, 0x06, 0x07
_REGISTER = 0x08  # BPF_X: the operand is a register
_ADD, _OR, _AND, _SHIFT, _MOV = 0x00, 0x40, 0x50, 0x60, 0xB0
_ALWAYS, _CALL, _EXIT = 0x00, 0x80, 0x90
_TESTS = {"==": 0x10, "!=": 0x50, "&": 0x40}
_LOAD_64 = 0x18
_ATOMIC_64 = 0xDB  # BPF_STX | BPF_ATOMIC | BPF_DW, the operation is BPF_ADD
_PSEUDO_MAP_FD = 1


class _Instruction(NamedTuple):
    code: int
    target: int = 0
    source: int = 0
    offset: int = 0
    immediate: int = 0
    label: str = ""  # of a jump: where to
    value: str = ""  # of a 64-bit load: the map or the number that is known only when it is linked


@dataclass(frozen=True, slots=True)
class Code:
    """A program whose maps and numbers are not known yet."""

    instructions: tuple[_Instruction, ...]

    def linked(self, maps: Mapping[str, int], numbers: Mapping[str, int]) -> bytes:
        """Return the program with the descriptors of its maps and its numbers filled in."""
        parts = []
        for one in self.instructions:
            if one.code != _LOAD_64:
                parts.append(_packed(one))
                continue
            is_map = one.value in maps
            number = maps[one.value] if is_map else numbers[one.value]
            low, high = number & 0xFFFFFFFF, number >> 32
            source = _PSEUDO_MAP_FD if is_map else 0
            parts.append(_packed(one._replace(source=source, immediate=low)))
            parts.append(_packed(_Instruction(0, immediate=high)))
        return b"".join(parts)


def _packed(one: _Instruction) -> bytes:
    nibbles = (one.target, one.source) if _LITTLE else (one.source, one.target)
    registers = nibbles[1] << 4 | nibbles[0]
    return struct.pack("=BBhI", one.code, registers, one.offset, one.immediate & 0xFFFFFFFF)


class Assembler:
    """Collects instructions; a jump may name a label that comes later."""

    def __init__(self) -> None:
        self._instructions: list[_Instruction] = []
        self._labels: dict[str, int] = {}
        self._place = 0
        self._places: list[int] = []
        self._fresh = 0

    def label(self, name: str) -> None:
        """Give the next instruction a name; each only once."""
        if name in self._labels:
            raise ValueError(f"label {name} is there twice")
        self._labels[name] = self._place

    def fresh(self, name: str) -> str:
        """Return a label that nobody else has."""
        self._fresh += 1
        return f"{name}.{self._fresh}"

    def copy(self, target: int, source: int) -> None:
        """Copy a register."""
        self._add(_Instruction(_ALU64 | _MOV | _REGISTER, target, source))

    def copy_word(self, target: int, source: int) -> None:
        """Copy the lower 32 bits of a register; the upper ones become 0."""
        self._add(_Instruction(_ALU | _MOV | _REGISTER, target, source))

    def set(self, target: int, value: int) -> None:
        """Set a register to a small number."""
        self._add(_Instruction(_ALU64 | _MOV, target, immediate=value))

    def add(self, target: int, value: int) -> None:
        """Add a number to a register, which may be a pointer."""
        self._add(_Instruction(_ALU64 | _ADD, target, immediate=value))

    def or_register(self, target: int, source: int) -> None:
        """Add the bits of another register."""
        self._add(_Instruction(_ALU64 | _OR | _REGISTER, target, source))

    def mask_word(self, target: int, value: int) -> None:
        """Keep those of the lower 32 bits that are in the mask."""
        self._add(_Instruction(_ALU | _AND, target, immediate=value))

    def mask_register(self, target: int, source: int) -> None:
        """Keep those bits that another register has, too."""
        self._add(_Instruction(_ALU64 | _AND | _REGISTER, target, source))

    def shift_left(self, target: int, bits: int) -> None:
        """Multiply by a power of two."""
        self._add(_Instruction(_ALU64 | _SHIFT, target, immediate=bits))

    def load(self, target: int, pointer: int, offset: int, size: int = 4) -> None:
        """Read from memory."""
        self._add(_Instruction(_LDX | _SIZES[size], target, pointer, offset))

    def store(self, pointer: int, offset: int, source: int, size: int = 4) -> None:
        """Write a register to memory."""
        self._add(_Instruction(_STX | _SIZES[size], pointer, source, offset))

    def store_number(self, pointer: int, offset: int, value: int, size: int = 4) -> None:
        """Write a number to memory."""
        self._add(_Instruction(_ST | _SIZES[size], pointer, 0, offset, value))

    def count(self, pointer: int, offset: int, source: int) -> None:
        """Add a register to 64 bits of memory that others add to as well."""
        self._add(_Instruction(_ATOMIC_64, pointer, source, offset))

    def load_late(self, target: int, name: str) -> None:
        """Set a register to a map or a 64-bit number that is known only when the program is linked."""
        self._add(_Instruction(_LOAD_64, target, value=name), size=2)

    def jump(self, label: str) -> None:
        """Go on at the label."""
        self._add(_Instruction(_JMP | _ALWAYS, label=label))

    def jump_if(self, register: int, test: str, value: int, label: str) -> None:
        """Go on at the label if all 64 bits compare so with a number."""
        self._add(_Instruction(_JMP | _TESTS[test], register, immediate=value, label=label))

    def jump_if_word(self, register: int, test: str, value: int, label: str) -> None:
        """Go on at the label if the lower 32 bits compare so with a number."""
        self._add(_Instruction(_JMP32 | _TESTS[test], register, immediate=value, label=label))

    def jump_if_registers(self, register: int, test: str, other: int, label: str) -> None:
        """Go on at the label if two registers compare so."""
        self._add(_Instruction(_JMP | _TESTS[test] | _REGISTER, register, other, label=label))

    def call(self, number: int) -> None:
        """Call a function of the kernel: arguments in registers 1 to 5, which are lost, the result in 0."""
        self._add(_Instruction(_JMP | _CALL, immediate=number))

    def leave(self, value: int) -> None:
        """End the program with a result."""
        self.set(RESULT, value)
        self._add(_Instruction(_JMP | _EXIT))

    def finished(self) -> Code:
        """Return the program; every label that a jump names must be there."""
        return Code(tuple(self._resolved()))

    def _resolved(self) -> Iterable[_Instruction]:
        for place, one in zip(self._places, self._instructions, strict=True):
            yield one._replace(offset=self._labels[one.label] - place - 1, label="") if one.label else one

    def _add(self, one: _Instruction, size: int = 1) -> None:
        self._instructions.append(one)
        self._places.append(self._place)
        self._place += size
