"""A process that calls a reward function, so that a call that never returns can be ended.

Run as `python -m hpo_verl.rewards.scoring_process FD PATH NAME`. A thread would
not do: it cannot be stopped, and a hanging C call such as a backtracking regular
expression keeps the interpreter's lock, and with it whoever watches.

Over the connection FD come pickled lists of pickled keyword arguments, or of the
texts that say why there are none; for each response one pickled `(result, error)`
goes back at once, so that what was answered before a hang is kept. The pickles
come from, and go to, the parent only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import inspect
import math
import numbers
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

PACKAGE_PREFIX, FILE_PREFIX = "pkg://", "file://"
ERROR_CHARACTERS = 500
# A function beside the reward that imports what it scores with.
LOADER = "load_scorer"
_PR_SET_PDEATHSIG = 1


def load_function(path: str, name: str) -> Callable[..., Any]:
    """Load a reward function of a `pkg://package.module` or a Python file, as verl does."""
    if path.startswith(PACKAGE_PREFIX):
        module = importlib.import_module(path.removeprefix(PACKAGE_PREFIX).replace("/", "."))
    else:
        file = path.removeprefix(FILE_PREFIX)
        spec = importlib.util.spec_from_file_location("custom_reward_function", file)
        if spec is None or spec.loader is None:
            raise ImportError(f"{file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    if callable(found := getattr(module, name, None)):
        return found
    own = [
        key
        for key, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    ]
    raise AttributeError(f"no function {name!r}; it offers {', '.join(own) or 'no function'}")


def checked_result(value: object) -> dict[str, Any]:
    """Return a reward's mapping with a float `score`; for a plain number `acc` alone, as verl does.

    Numbers, arrays and tensors become Python's. Under further keys verl takes the mean of
    whatever is no text and not None.

    Raises:
        TypeError, ValueError: It is no finite number, nor a mapping with one under `score` and
            numbers, lists of them, texts or None under the other keys.
    """
    if not isinstance(value, Mapping):
        return {"acc": _finite(value)}
    if "score" not in value:
        raise ValueError("the reward's dict has no key 'score'")
    further = {str(key): _plain(str(key), entry) for key, entry in value.items()}
    return {**further, "score": _finite(value["score"])}


def _unwrapped(value: Any) -> Any:
    """A number of numpy as Python's own; an array or a tensor stays what it is."""
    return value.item() if hasattr(value, "item") and not hasattr(value, "__len__") else value


def shape(value: object) -> tuple[int, ...]:
    """Lengths of a list and of the lists in it, all of them alike; none for a number."""
    if not isinstance(value, list):
        return ()
    (inner,) = {shape(entry) for entry in value}
    return (len(value), *inner)


def _plain(key: str, value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if value is None:
        return None
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, list | tuple):
        entries = [_plain(key, entry) for entry in value]
        with contextlib.suppress(ValueError):
            shape(entries)
            if not any(entry is None or isinstance(entry, str) for entry in entries):
                return entries
        raise TypeError(f"the reward's {key!r} is a list, but not of numbers and of one shape")
    found = type(value).__name__
    raise TypeError(f"the reward's {key!r} is of type {found}, not a number, a text or None")


def _finite(value: object) -> float:
    value = _unwrapped(value)
    if not isinstance(value, numbers.Real):
        raise TypeError(f"the reward is of type {type(value).__name__}, not a number")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"the reward is {number}")
    return number


def describe(error: BaseException) -> str:
    """Type and message of an exception, on one line of bounded length."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message cannot be read)"
    return f"{type(error).__name__}: {message}"[:ERROR_CHARACTERS]


def describe_loading(error: BaseException, path: str) -> str:
    """Type and message of an exception, and the line of the file that it comes from."""
    file = path.removeprefix(FILE_PREFIX)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f" (line {frame.lineno})" for frame in frames if frame.filename == file]
    # A syntax error names its line itself.
    return describe(error) + ("" if isinstance(error, SyntaxError) else "".join(lines[-1:]))


def answer(function: Callable[..., Any], arguments: bytes | str) -> bytes:
    """Score one response; every exception becomes the error's text."""
    if isinstance(arguments, str):
        return pickle.dumps(({}, arguments))
    try:
        value = function(**pickle.loads(arguments))  # noqa: S301
        if inspect.iscoroutine(value):
            import asyncio

            value = asyncio.run(value)
        return pickle.dumps((checked_result(value), ""))
    except BaseException as error:  # a reward that calls sys.exit() is a broken reward
        return pickle.dumps(({}, describe(error)))


def main(descriptor: str, path: str, name: str) -> None:
    """Load the function and answer batches until the parent hangs up.

    The first answer says whether the function was loaded.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C reaches the whole terminal; the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(descriptor))
    try:
        function = load_function(path, name)
        # What a reward imports when it first scores would count as the first response's time.
        getattr(sys.modules.get(getattr(function, "__module__", "")), LOADER, lambda: None)()
    except BaseException as error:
        connection.send(({}, describe_loading(error, path)))
        return
    connection.send(({}, ""))
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            for arguments in connection.recv():
                connection.send_bytes(answer(function, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
