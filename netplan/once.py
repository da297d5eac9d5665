"""Pure functions of large values that stay the same from pass to pass: computed once for each."""

from collections.abc import Callable, Hashable
from functools import lru_cache
from operator import is_
from typing import Concatenate, ParamSpec, Protocol, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class _Named(Protocol):
    @property
    def id(self) -> str: ...


_Value = TypeVar("_Value", bound=Hashable)
_Item = TypeVar("_Item", bound=_Named)


@lru_cache(maxsize=64)
def same(value: _Value) -> _Value:
    """Return what was given when an equal value was given before: what :func:`once` knows again."""
    return value


def once(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Remember what a pure function of positional arguments made of the last ones, told by identity.

    To hash or compare what describes 500 partitions would cost as much as to compute the result.
    """
    last: tuple[tuple[object, ...], _Result] | None = None

    def wrapper(*arguments: _Arguments.args, **none: _Arguments.kwargs) -> _Result:
        nonlocal last
        known = last  # another thread may replace it at any moment
        if known is not None and len(known[0]) == len(arguments) and all(map(is_, known[0], arguments)):
            return known[1]
        result = function(*arguments, **none)
        last = (arguments, result)
        return result

    return wrapper


def once_each(
    function: Callable[Concatenate[_Item, _Arguments], _Result],
) -> Callable[Concatenate[_Item, _Arguments], _Result]:
    """Remember what a pure function made of the last item of each id, told by identity, and its other, positional,
    arguments, told by value: when one partition comes, the others are as they were.
    """
    known: dict[str, tuple[_Item, tuple[object, ...], _Result]] = {}

    def wrapper(item: _Item, /, *arguments: _Arguments.args, **none: _Arguments.kwargs) -> _Result:
        last = known.get(item.id)
        if last is not None and last[0] is item and last[1] == arguments:
            return last[2]
        result = function(item, *arguments, **none)
        known[item.id] = (item, arguments, result)
        return result

    return wrapper
