"""A server that is further away than it is: a relay that holds every request back for a while.

It runs in a process of its own, so that it takes no time from the interpreter of whoever is measured.  It knows nothing
of HTTP but that what a client sends in one go is a request: it holds for clients that wait for each answer, as ours do.
"""

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from urllib.parse import urlsplit

_PIECE = 1 << 18
_SPAWN = multiprocessing.get_context("spawn")


class FarServer:
    """Where the relay listens, and how many GETs have gone through it."""

    def __init__(self, url: str, gets: "Synchronized[int]") -> None:
        self.url, self._gets = url, gets

    @property
    def gets(self) -> int:
        """So far."""
        return self._gets.value


class _Relay:
    def __init__(self, host: str, port: int, seconds: float, gets: "Synchronized[int]") -> None:
        self.host, self.port, self.seconds, self.gets = host, port, seconds, gets

    async def serve(self, ready: Connection) -> None:
        server = await asyncio.start_server(self._join, "127.0.0.1", 0, backlog=1024)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(self.host, self.port)
        await asyncio.gather(
            self._pass_on(reader, to_server, self.seconds),
            self._pass_on(from_server, writer, 0),
            return_exceptions=True,
        )

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        try:
            while piece := await reader.read(_PIECE):
                if seconds:
                    with self.gets.get_lock():
                        self.gets.value += piece.startswith(b"GET ")
                    await asyncio.sleep(seconds)
                writer.write(piece)
                await writer.drain()
        finally:
            writer.close()


@contextmanager
def far_server(url: str, seconds: float) -> Iterator[FarServer]:
    """A relay before a server for as long as the block lasts."""
    parts, (ready, told) = urlsplit(url), _SPAWN.Pipe(duplex=False)
    gets = _SPAWN.Value("q", 0)
    process = _SPAWN.Process(target=_run, args=(parts.hostname, parts.port, seconds, gets, told), daemon=True)
    process.start()
    try:
        yield FarServer(f"http://127.0.0.1:{ready.recv()}", gets)
    finally:
        process.terminate()
        process.join()


def _run(host: str, port: int, seconds: float, gets: "Synchronized[int]", ready: Connection) -> None:
    asyncio.run(_Relay(host, port, seconds, gets).serve(ready))
