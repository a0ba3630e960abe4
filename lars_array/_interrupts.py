"""Handlers of signals are deferred while a step is written: all of it is done and counted, or nothing.

Python runs them in the main thread between any two calls, and what they raise, such as the KeyboardInterrupt of Ctrl+C,
would end a step halfway.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

__all__ = ["SIGNALS", "SignalScope", "defer_signals", "uninterrupted"]

# Those for which handlers are set that raise: by Python, by batch systems and launchers, and by time limits of tests.
_NAMES = ("SIGTERM", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGINT")

# In C: the functions of the module `signal` convert numbers to enumerations, which takes ten times as long.
_signal: Any = import_module("_signal")
SIGNALS = tuple(int(getattr(_signal, name)) for name in _NAMES if hasattr(_signal, name))

_main: int | None = None  # the only thread that handlers run in, once that is known
_scope: SignalScope | None = None
_deferred: dict[int, Any] = {}  # handlers that are not in place, by the signal
_noted: dict[int, None] = {}  # signals whose handlers are deferred; as in Python, one that comes twice is handled once


class SignalScope:
    """A context, to the end of which `defer_signals` defers handlers of signals.

    Scopes in other threads than the main one, and handlers that were not set by Python, are left alone.
    """

    __slots__ = ("_defers", "_outer")

    def __enter__(self) -> None:
        global _scope
        self._defers = False
        if _is_main_thread():
            self._outer, _scope = _scope, self

    def __exit__(self, *_: object) -> None:
        global _scope
        try:
            if _is_main_thread():
                _scope = self._outer
        finally:
            if self._defers:
                try:
                    _restore()
                finally:
                    _handle()

    def defer(self) -> None:
        """Defer handlers to the end of the context, unless an outer one does so already."""
        outer = self._outer
        while outer is not None:
            if outer._defers:
                return
            outer = outer._outer
        if _deferred:  # of a scope that was left by an exception before it could put them in place
            _restore()
        else:  # another signal has raised in the place of these
            _noted.clear()
        self._defers = True
        for number, handler in zip(SIGNALS, map(_signal.getsignal, SIGNALS)):
            if handler not in _LEFT_ALONE:
                _deferred[number] = handler
                _signal.signal(number, _note)


def defer_signals() -> None:
    """Defer handlers of signals to the end of the scope that this runs in, if it runs in one."""
    if _scope is not None and not _scope._defers and _is_main_thread():
        _scope.defer()


def _is_main_thread() -> bool:
    global _main
    if _main is None:
        if sys.is_finalizing():  # nothing can be imported, and no handler is called
            return False
        import threading  # importing lars_array need not wait for it

        _main = threading.main_thread().ident
    return get_ident() == _main


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer handlers of signals to the end of the context."""
    with SignalScope():
        defer_signals()
        yield


def _note(number: int, frame: Any) -> None:
    _noted[number] = None


_LEFT_ALONE = (_signal.SIG_DFL, _signal.SIG_IGN, None)  # actions of the system, and handlers of other languages


def _restore() -> None:
    """Put all handlers in place again, although one of them is called meanwhile and raises."""
    try:
        while _deferred:
            number, handler = next(iter(_deferred.items()))
            _signal.signal(number, handler)
            del _deferred[number]
    finally:
        if _deferred:
            _restore()


def _handle() -> None:
    """Call the handlers of signals that were noted, each, although another one raises."""
    number = next((number for number in _noted if number not in _deferred), None)
    if number is None:
        return
    del _noted[number]
    try:
        handler = _signal.getsignal(number)
        if handler not in _LEFT_ALONE:
            handler(number, sys._getframe(2))
    finally:
        _handle()


def _start_anew() -> None:
    """Put handlers in place in a child, which a thread of a process may fork whose main thread takes a step."""
    global _main, _scope
    _main, _scope = None, None
    _noted.clear()
    _restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
