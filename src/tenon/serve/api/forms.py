"""The form of an answer: grammars are written and compiled before a request is let in, in a thread of their own.

A schema is a client's, and may be made to cost: its size and the work on it are bounded (see data/grammars.py), it
holds up neither the event loop nor the engine, and the time that a client waits for it is bounded too. This module
knows no routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tenon.data.grammars import Grammars
from tenon.errors import TenonError
from tenon.serve.http.api_errors import ApiError, as_api_error

_MOST_SECONDS = 15.0


class Forms:
    """Compiles what requests ask for. Belongs to the thread of the HTTP server."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forms")

    async def grammar(self, write: Callable[[], str], param: str) -> str:
        """What `write` writes, once it is compiled and kept. Raises ApiError 400, naming param."""

        def compile_it() -> str:
            grammar = write()
            self._grammars.check(grammar)
            return grammar

        try:
            async with asyncio.timeout(_MOST_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(self._thread, compile_it)
        except TimeoutError:
            raise ApiError(400, f"{param} takes longer than {_MOST_SECONDS:.0f} s to compile", param=param) from None
        except TenonError as error:
            told = as_api_error(error)
            raise ApiError(told.status, told.message, code=told.code, param=param) from error
