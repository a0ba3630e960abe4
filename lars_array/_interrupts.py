"""Handlers of signals wait while a step is written: all of it is done and counted, or nothing.

Python runs them in the main thread between any two calls, and what they raise, such as the KeyboardInterrupt of Ctrl+C,
would end a step halfway.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from _thread import get_ident
from importlib import import_module
from typing import Any

__all__ = ["SIGNALS", "SignalScope", "defer_signals"]

# Those for which handlers are set that raise: by Python, by batch systems and launchers, and by time limits of tests.
# That of Ctrl+C is the last to be in place again: one that raises meanwhile leaves none deferred but itself.
_NAMES = ("SIGTERM", "SIGALRM", "SIGHUP", "SIGQUIT", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGINT")
SIGNALS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))

# In C: those of the module `signal` convert numbers to enumerations, which takes ten times as long.
_signal: Any = import_module("_signal")

_main = threading.main_thread().ident  # the only thread that handlers run in
_scope: SignalScope | None = None
_noted: dict[int, None] = {}  # signals whose handlers wait; as in Python, one that comes twice is handled once


class SignalScope:
    """A context in which handlers of signals wait from `defer_signals` on, until it ends.

    Scopes in other threads than the main one, and handlers that were not set by Python, are left alone.
    """

    __slots__ = ("_handlers", "_outer")

    def __enter__(self) -> None:
        global _scope
        self._handlers: dict[int, Any] | None = None
        if get_ident() == _main:
            self._outer, _scope = _scope, self

    def __exit__(self, *_: object) -> None:
        global _scope
        if get_ident() != _main:
            return
        _scope, handlers = self._outer, self._handlers
        if handlers:
            try:
                _restore(handlers)
            except BaseException:  # of a handler that was in place again
                _restore(handlers)
                raise
            finally:
                if _noted:
                    _handle([(handler, number) for number, handler in handlers.items() if number in _noted])

    def defer(self) -> None:
        """Have handlers wait until the end of the context; those that wait for an outer one go on doing so."""
        self._handlers = handlers = {}
        for number, handler in zip(SIGNALS, map(_signal.getsignal, SIGNALS)):
            if handler not in _LEFT_ALONE:
                _noted.pop(number, None)  # of another scope, whose end was interrupted
                handlers[number] = handler
                _signal.signal(number, _note)


def defer_signals() -> None:
    """Have handlers of signals wait until the end of the scope that this runs in, if it runs in one."""
    if _scope is not None and _scope._handlers is None and get_ident() == _main:
        _scope.defer()


def _note(number: int, frame: Any) -> None:
    _noted[number] = None


# Actions of the system, handlers of other languages, and those that wait for an outer scope.
_LEFT_ALONE = (_signal.SIG_DFL, _signal.SIG_IGN, None, _note)


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        _signal.signal(number, handler)


def _handle(noted: list[tuple[Any, int]]) -> None:
    """Call the handlers of signals that were noted, each, although another one raises."""
    for handler, number in noted[:1]:
        del _noted[number]
        try:
            handler(number, sys._getframe(2))
        finally:
            _handle(noted[1:])


def _note_main_thread() -> None:
    global _main
    _main = threading.main_thread().ident


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_main_thread)
