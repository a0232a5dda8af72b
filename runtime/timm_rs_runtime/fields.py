"""Values from files and arguments, checked where they are read

A check is a function that returns a value in the form in which it is used, or raises Mismatch. `check_fields` and
`check_argument` turn that into one line that names the file, the field, the value and what was expected.
"""
import json
import math
import numbers
import os
import reprlib
from argparse import Namespace
from typing import Any, Callable, Dict, Mapping, Sequence, Union

from .errors import UserError, one_line

__all__ = [
    'MAX_BYTES', 'MAX_CLASSES', 'MAX_SIZE', 'array', 'check_argument', 'check_fields', 'check_numbers',
    'crop_share', 'either', 'flag', 'integer', 'number', 'optional', 'parse_json', 'plain', 'read_json',
    'read_text', 'record', 'resolutions', 'shown', 'size_text', 'table', 'text']

MAX_BYTES = 2 ** 24  # of a text file
MAX_CLASSES = 10 ** 6
MAX_SIZE = 4096  # pixels of a side, channels of an image

Check = Callable[[Any], Any]
_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


class Mismatch(Exception):
    """A value is not what a check expects.

    Args:
        value: The value.
        expected: What it should be, in words.
        place: Where it is in the checked value, such as '.mean[1]'.
    """

    def __init__(self, value: Any, expected: str, place: str = ''):
        super().__init__(expected)
        self.value, self.expected, self.place = value, expected, place


class _Missing:
    def __repr__(self) -> str:
        return 'missing'


_MISSING = _Missing()


def check_fields(value: Any, check: Check, source: str) -> Any:
    """Return what was read from a file, checked.

    Args:
        value: Content of the file.
        check: Check of the content, usually a record.
        source: The file, for the message.

    Raises:
        UserError: It is something else.

    Example:
        >>> check_fields({'size': 160, 'more': None}, record({'size': integer(1, 4096)}), 'a.json')
        {'size': 160}
        >>> check_fields({'size': [160, 0]}, record({'size': array(integer(1, 4096))}), 'a.json')
        Traceback (most recent call last):
        timm_rs_runtime.errors.UserError: a.json: size[1] is 0, expected an integer from 1 to 4096.
    """
    try:
        return check(value)
    except Mismatch as e:
        place = e.place.lstrip('.') or 'the content'
        raise UserError(f'{source}: {place} is {shown(e.value)}, expected {e.expected}.') from None


def check_argument(name: str, value: Any, check: Check) -> Any:
    """Return an argument, checked.

    Args:
        name: Its name, for the message.
        value: The argument.
        check: Its check.

    Raises:
        UserError: It is something else.

    Example:
        >>> check_argument('--threads', 0, integer(1, 1024))
        Traceback (most recent call last):
        timm_rs_runtime.errors.UserError: --threads is 0, expected an integer from 1 to 1024.
    """
    try:
        return check(value)
    except Mismatch as e:
        raise UserError(f'{name}{e.place} is {shown(e.value)}, expected {e.expected}.') from None


def check_numbers(args: Namespace, **further: Check) -> None:
    """Check the numbers that flags hold, those in lists too.

    Args:
        args: The flags; those that are missing or None are left out.
        further: Checks of flags that only some commands have.

    Raises:
        UserError: One is out of bounds.

    Example:
        >>> check_numbers(Namespace(workers=10 ** 9, batch_size=8))
        Traceback (most recent call last):
        timm_rs_runtime.errors.UserError: --workers is 1000000000, expected an integer from 0 to 1024.
    """
    for name, check in {**_NUMBERS, **further}.items():
        values = getattr(args, name, None)
        for value in values if isinstance(values, (list, tuple)) else (values,):
            if value is not None:
                check_argument(f"--{name.replace('_', '-')}", value, check)


def integer(low: int, high: int) -> Check:
    return _check(lambda v: _is(numbers.Integral, v) and low <= v <= high, f'an integer from {low} to {high}')


def number(low: float = -math.inf, high: float = math.inf, above: bool = False) -> Check:
    """Expect a finite number; with `above` it has to be larger than `low`."""
    expected = 'a number' if high < math.inf else 'a finite number'
    if low > -math.inf:
        expected += f" {'above' if above else 'of at least'} {low:g}"
    if high < math.inf:
        expected += f' and at most {high:g}'

    def is_right(value: Any) -> bool:
        if not _is(numbers.Real, value) or not -1e300 < (value if isinstance(value, int) else float(value)) < 1e300:
            return False
        return low <= value <= high and not (above and value == low)

    return _check(is_right, expected)


def text(most: int = 1000, choices: Sequence[str] = ()) -> Check:
    if choices:
        return _check(lambda v: isinstance(v, str) and v in choices, f"one of {', '.join(choices)}")
    return _check(lambda v: isinstance(v, str) and len(v) <= most, f'text of at most {most} characters')


def flag() -> Check:
    return _check(lambda v: isinstance(v, bool), 'true or false')


def optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def either(*checks: Check) -> Check:
    def check(value: Any) -> Any:
        expected = []
        for one in checks:
            try:
                return one(value)
            except Mismatch as e:
                if e.place:  # the kind is right, but a part of it is wrong
                    raise
                expected.append(e.expected)
        raise Mismatch(value, ' or '.join(expected))

    return check


def array(check: Check, least: int = 0, most: int = 1000) -> Check:
    """Expect a list of values of one kind, which becomes a tuple."""
    is_right = _check(
        lambda v: isinstance(v, (list, tuple)) and least <= len(v) <= most,
        f'a list of {least}' if least == most else f'a list of {least} to {most} values')
    return lambda value: tuple(_at(check, v, f'[{i}]') for i, v in enumerate(is_right(value)))


def table(key: Check, value: Check, most: int = 1000) -> Check:
    """Expect a dict of values of one kind, with keys of one kind."""
    is_right = _check(lambda v: isinstance(v, Mapping) and len(v) <= most, f'a dict of at most {most} values')

    def check(values: Any) -> Dict[Any, Any]:
        names = {k: '.' + shown(k).strip("'") for k in is_right(values)}
        return {_at(key, k, names[k]): _at(value, v, names[k]) for k, v in values.items()}

    return check


def record(fields: Mapping[str, Check], required: Sequence[str] = ()) -> Check:
    """Expect a dict with some fields, each with its own check; other fields are left out."""
    is_right = _check(lambda v: isinstance(v, Mapping), 'a dict of fields and their values')

    def check(values: Any) -> Dict[str, Any]:
        values = is_right(values)
        present = [name for name in fields if name in values or name in required]
        return {name: _at(fields[name], values.get(name, _MISSING), f'.{name}') for name in present}

    return check


def resolutions() -> Check:
    """Expect different input sizes in pixels, as a list, or one size as a number."""
    sizes = array(integer(1, MAX_SIZE), 1, 64)

    def check(value: Any) -> Any:
        found = sizes([value] if type(value) is int else value)
        if len(set(found)) < len(found):
            raise Mismatch(value, 'different input sizes')
        return tuple(sorted(found, reverse=True))

    return check


def crop_share() -> Check:
    """Expect the side of a crop as a share of the resized image; the crop may be larger than the image."""
    return number(0.1, 4)


def size_text(value: Any) -> int:
    """Expect an input size in pixels as the key of a table, which JSON keeps as text."""
    if type(value) is str and value.isdecimal() and len(value) <= 4:
        value = int(value)
    return integer(1, MAX_SIZE)(value)


def plain() -> Check:
    """Expect any value of JSON with at most 2000 parts on at most 5 levels, and numbers of at most a million."""
    scalar = either(flag(), number(-1e6, 1e6), text(), _check(lambda v: v is None, 'null'))

    def check(value: Any) -> Any:
        parts = [('', value, 0)]
        for place, part, level in parts:  # the list grows; a part that is in several places counts each time
            if not isinstance(part, (list, tuple, Mapping)):
                _at(scalar, part, place)
                continue
            if len(parts) + len(part) > 2000 or level == 5:
                raise Mismatch(value, 'at most 2000 values on at most 5 levels')
            if isinstance(part, Mapping):
                parts += [(f'{place}.{_at(text(100), k, place)}', v, level + 1) for k, v in part.items()]
            else:
                parts += [(f'{place}[{i}]', v, level + 1) for i, v in enumerate(part)]
        return value

    return check


def shown(value: Any) -> str:
    """Return a value as short text, however long or deep it is."""
    try:
        return one_line(_repr.repr(value), 200)
    except ValueError:  # an integer too large to be printed
        return f'too large an {type(value).__name__}'


def read_text(path: Union[str, os.PathLike], most: int = MAX_BYTES) -> str:
    """Return the text of a file in UTF-8.

    Raises:
        UserError: The file does not exist, is larger than `most` bytes, or is not text.
    """
    if not os.path.isfile(path):
        raise UserError(f'{path} does not exist or is not a regular file.')
    with open(path, 'rb') as f:
        content = f.read(most + 1)
    if len(content) > most:
        raise UserError(f'{path} is larger than {most} bytes, the most that is read of such a file.')
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        raise UserError(f'{path} is not text in UTF-8: {e.reason} at byte {e.start}.') from None


def parse_json(content: str, source: str) -> Any:
    """Return the value of a JSON text, which holds no NaN.

    Raises:
        UserError: It is not JSON.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise UserError(f'{source} is not valid JSON: {one_line(e)}.') from None


def read_json(path: Union[str, os.PathLike], check: Check) -> Any:
    """Return what a JSON file holds, checked; see check_fields."""
    return check_fields(parse_json(read_text(path), os.fspath(path)), check, os.fspath(path))


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check(is_right: Callable[[Any], bool], expected: str) -> Check:
    def check(value: Any) -> Any:
        if not is_right(value):
            raise Mismatch(value, expected)
        return value

    return check


def _at(check: Check, value: Any, place: str) -> Any:
    """Check a part of a value."""
    try:
        return check(value)
    except Mismatch as e:
        raise Mismatch(e.value, e.expected, place + e.place) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f'it holds {name}')


_NUMBERS = dict(
    workers=integer(0, 1024),
    seed=integer(0, 2 ** 32 - 1),
    mean=number(),
    std=number(0, above=True),
    crop_pct=crop_share(),
    bn_eps=number(0),
    max_unreadable=integer(0, 10 ** 9),
    **dict.fromkeys(('num_samples', 'train_num_samples', 'val_num_samples'), integer(1, 10 ** 12)),
    num_classes=integer(0, 10 ** 9),
    in_chans=integer(1, 10 ** 9),
    **dict.fromkeys(('batch_size', 'validation_batch_size', 'log_freq'), integer(1, 10 ** 6)),
    **dict.fromkeys(('resolution', 'resolutions', 'img_size', 'input_size'), integer(1, MAX_SIZE)),
)
