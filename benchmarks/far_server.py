"""A server that is further away than it is: a relay that holds every request back for a while.

It is a process of its own (`python -m benchmarks.far_server`), so that it takes no time from the interpreter of whoever
is measured.  It knows nothing of HTTP but that what a client sends in one go is a request: it is for clients that wait
for each answer, and send no bodies.  A line on its stdin is answered with how many GETs there have been.
"""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

_PIECE = 1 << 18


class FarServer:
    """Where the relay listens, and how many GETs have gone through it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{self._answer()}"

    @property
    def gets(self) -> int:
        """So far."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout
        return int(self._process.stdout.readline())


@contextmanager
def far_server(url: str, seconds: float) -> Iterator[FarServer]:
    """A relay before a server for as long as the block lasts."""
    command = [sys.executable, "-m", "benchmarks.far_server", url, str(seconds)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield FarServer(process)  # it ends with its stdin


class _Relay:
    def __init__(self, url: str, seconds: float) -> None:
        self.server, self.seconds, self.gets = urlsplit(url), seconds, 0
        self._over = asyncio.Event()

    async def serve(self) -> None:
        server = await asyncio.start_server(self._join, "127.0.0.1", 0, backlog=1024)
        asyncio.get_running_loop().add_reader(sys.stdin, self._asked)
        _say(server.sockets[0].getsockname()[1])
        await self._over.wait()

    def _asked(self) -> None:
        if sys.stdin.readline():
            _say(self.gets)
        else:
            self._over.set()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(self.server.hostname, self.server.port)
        there, back = self._pass_on(reader, to_server, self.seconds), self._pass_on(from_server, writer, 0)
        with suppress(asyncio.CancelledError):  # the end of it all
            await asyncio.gather(there, back, return_exceptions=True)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
        try:
            while piece := await reader.read(_PIECE):
                if seconds:
                    self.gets += piece.startswith(b"GET ")
                    await asyncio.sleep(seconds)
                writer.write(piece)
                await writer.drain()
        finally:
            writer.close()


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


async def _main(url: str, seconds: str) -> None:
    await _Relay(url, float(seconds)).serve()


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
