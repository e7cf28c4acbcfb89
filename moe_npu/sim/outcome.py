"""What a callback answers to the runtime: that it is done, or how it failed, with a message."""

from __future__ import annotations

import ctypes
import traceback

# enum Outcome of runtime.cpp; 0 is what ctypes gives for a callback that could not answer
DONE, _NOT_IMPLEMENTED, _FAILED, _INTERRUPTED = 1, 2, 3, 4


def failure(runtime: ctypes.CDLL, what: str, error: BaseException) -> int:
    """Leave the message with the runtime, which raises it where the program called; the outcome to return."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{what}: {error} [{type(error).__name__} at {where.filename}:{where.lineno} on the simulated device]"
    runtime.moe_npu_sim_fail(message.encode())
    if isinstance(error, NotImplementedError):
        return _NOT_IMPLEMENTED
    return _INTERRUPTED if isinstance(error, KeyboardInterrupt) else _FAILED
