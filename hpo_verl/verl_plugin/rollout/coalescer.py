"""Gathers what is asked for at the same time into one call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Coalescer(Generic[Item, Result]):
    """Processes items that are submitted together in one call.

    `process` returns one result or exception for each item. A batch stays open for `pause`
    seconds after its last item has come.
    """

    def __init__(
        self,
        process: Callable[[list[Item]], Awaitable[Sequence[Result | BaseException]]],
        pause: float = 0.01,
    ) -> None:
        self._process = process
        self._pause = pause
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._task: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Add an item to the open batch and wait for its result."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        while self._waiting:
            arrived = 0
            while arrived != len(self._waiting):
                arrived = len(self._waiting)
                await asyncio.sleep(self._pause)
            batch, self._waiting = self._waiting, []
            try:
                results = await self._process([item for item, _ in batch])
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, BaseException):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    async def idle(self) -> None:
        """Wait until every item that was submitted has its result."""
        if self._task is not None:
            await self._task
