"""A user's own code, by name: `module:function` or `module:Class`."""

import importlib
import inspect
import os
import sys
from typing import Any

from gdro.common.errors import UserError, did_you_mean

_EXAMPLES = {"function": "my_rewards:brightness", "class": "my_objectives:Hinge"}


def load_own(spec: str, field: str, kind: str = "function") -> tuple[Any, str]:
    """(the object named by `spec`, "module:name"; its source file). The current directory is searched too.

    kind: "function" or "class", for messages. Raises UserError starting with `field`.
    """
    module_name, _, function_name = spec.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")) or not function_name.isidentifier():
        raise UserError(f'{field}: "{spec}" is not module:{kind}; expected e.g. {_EXAMPLES[kind]}')
    if module_name == "__main__" and kind == "function":
        raise UserError(
            f'{field}: "{spec}" is in the script or notebook that runs; expected {function_name} in a module of its '
            "own, which other processes can import too"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            f'{field}: cannot import "{module_name}" of "{spec}" ({type(error).__name__}: {reason})'
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        what = "nothing" if function is None else f"something of type {type(function).__name__}"
        hint = did_you_mean(function_name, functions) if functions else f"; expected a {kind}"
        raise UserError(f'{field}: "{module_name}" has {what} named "{function_name}"{hint}')
    try:
        source = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # a callable object: use its class's file
        source = inspect.getsourcefile(type(function)) if type(function).__module__ != "builtins" else None
    if source is None:
        raise UserError(f'{field}: "{spec}" has no Python source; expected a {kind} written in Python')
    return function, source
