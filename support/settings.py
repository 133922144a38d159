"""Settings of train.py: a dataclass whose fields know their meaning and range."""
import ast
import math
import os
import runpy
from dataclasses import field, fields
from types import ModuleType


def setting(default, text, choices=None, low=None, high=math.inf, free=False):
    """Return a dataclass field that knows what it means and which values it may have.

    free: it may differ when a run is resumed. It changes at most rounding and the samples skipped.
    """
    metadata = {"help": text, "choices": choices, "low": low, "high": high, "free": free}
    return field(default=default, metadata=metadata)


def print_help(settings_class):
    """Print a line for each setting."""
    for f in fields(settings_class):
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        print(f"  --{f.name:18} {f.default!r:14} {f.metadata['help']}{choices}")


def read(settings_class, argv):
    """Return (settings, {name: where it was set}) of config files and of --key=value.

    --key=value overrides a config file, also before it.
    """
    given = []                                                      # (name, value, where)
    for arg in sorted(argv, key=lambda arg: arg.startswith("--")):  # the files come first
        if arg.startswith("--"):
            key, equals, text = arg.lstrip("-").partition("=")
            given.append((key, text if equals else True, "the command line"))
            continue
        if not os.path.isfile(arg):
            raise ValueError(f"there is no config file {arg}; a setting is written --key=value")
        try:
            values = runpy.run_path(arg)
        except Exception as error:                  # a config file is a program that may raise all
            raise ValueError(f"{arg} is not a config file: {type(error).__name__}: "
                             f"{error}") from None
        given += [(key, value, arg) for key, value in values.items()
                  if not (key.startswith("_") or isinstance(value, ModuleType))]

    settings = settings_class()
    known = {f.name: f for f in fields(settings_class)}
    for key, value, where in given:
        if key not in known:
            raise ValueError(f"{where}: there is no setting {key!r}; train.py --help lists them")
        kind = known[key].type
        if where == "the command line" and type(value) is str and kind is not str:
            value = parse_value(value)              # a folder may be named 2024
        if type(value) is int and kind in (float, tuple):
            value = float(value) if kind is float else (value,)
        if type(value) is not kind:
            raise ValueError(f"{where}: {key} is {value!r}, it must be of type {kind.__name__}")
        check_range(value, key, **known[key].metadata)
        setattr(settings, key, value)
    return settings, {key: where for key, _, where in given}


def parse_value(text):
    """Return the Python literal that `text` is, such as a number or True; else `text` itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def check_range(value, name, choices, low, high, **_):
    """Raise ValueError if a setting may not have this value. choices, low, high: see `setting`."""
    if choices and value not in choices:
        raise ValueError(f"{name} is {value!r}, it must be one of {', '.join(choices)}")
    if type(value) is float and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, it must be a finite number")
    if low is not None and not low <= value <= high:
        limit = f" and at most {high}" if high < math.inf else ""
        raise ValueError(f"{name} is {value}, it must be at least {low}{limit}")
