# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The shell of `nbdjobs qmp`: commands line by line, and events as they come.

Reading a line with Python's readline blocks the main thread, where alone it can be interrupted.
So the QMP session lives in an event loop of its own, in a second thread, and takes and shows
events while the user types.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import readline
import shlex
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from qemu.qmp import EventListener, Message

from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.qmp_calls import call, fetch_schema, pretty
from nbdjobs.cli.qmp_schema import Schema
from nbdjobs.cli.qmp_words import complete
from nbdjobs.cli.session import ServerGoneError, Session, open_session

PROMPT: Final = "qmp> "
WELCOME: Final = "Tab completes, Ctrl-D leaves; the command quit ends the server."
HISTORY_LENGTH: Final = 1000

T = TypeVar("T")


def run_shell(path: Path) -> int:
    """Read commands from standard input until its end, and print their answers.

    Returns:
        Exit code: on a terminal 0; else 1 if any command was refused.

    Raises:
        CliError: The server cannot be reached, or went away.
    """
    is_interactive = sys.stdin.isatty()
    with _Background() as background, background.session(path) as session:
        schema = background.wait(fetch_schema(session))
        if not is_interactive:
            screen = Screen(sys.stderr)
            _show_events(session, screen)
            return _run_lines(background, session, schema, screen, iter(sys.stdin))
        screen = Screen(sys.stdout)
        _show_events(session, screen)
        with _editing(schema, screen):
            with screen.writing:
                print(WELCOME)
            _run_lines(background, session, schema, screen, screen.lines())
        return ExitCode.DONE


def split_line(line: str) -> list[str]:
    """Take a line apart like a POSIX shell; JSON behind the command needs no quotes.

    Raises:
        CliError: A quote is not closed.
    """
    command, _, rest = line.strip().partition(" ")
    if rest.lstrip().startswith("{"):
        return [command, rest.strip()]
    try:
        return shlex.split(line)
    except ValueError as error:
        raise CliError(f"the line cannot be read: {error}") from error


class Screen(EventListener):
    """Shows events; where a prompt stands, above it, and what was typed comes again below.

    Args:
        output: Where.

    Attributes:
        writing: Held by whichever thread writes, until all of it is there.
    """

    def __init__(self, output: IO[str]):
        super().__init__()
        self.writing = threading.Lock()
        self._output = output
        self._is_at_prompt = False

    async def put(self, event: Message) -> None:
        """Show an event."""
        line = describe_event(event)
        with self.writing:
            if self._is_at_prompt:
                # Back to the beginning of the line, and erase it.
                typed = PROMPT + readline.get_line_buffer()
                print(f"\r\x1b[K{line}\n{typed}", end="", file=self._output, flush=True)
            else:
                print(line, file=self._output, flush=True)

    def at_prompt(self) -> None:
        """Readline has written the prompt and begins to take what is typed."""
        if not self._is_at_prompt:
            self._is_at_prompt = True
            self.writing.release()

    def lines(self) -> Iterator[str]:
        """Ask the user for lines; Ctrl-C begins a new one, Ctrl-D is the end."""
        while True:
            try:
                yield self._ask()
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return

    def _ask(self) -> str:
        self.writing.acquire()  # readline writes the prompt; `at_prompt` lets others write
        try:
            return input(PROMPT)
        finally:
            if not self._is_at_prompt:
                self.writing.release()
            self._is_at_prompt = False


def describe_event(event: Message) -> str:
    """Write an event in one line, with the server's time of it as a local one."""
    stamp = event.get("timestamp")
    seconds = stamp.get("seconds") if isinstance(stamp, dict) else None
    moment = time.strftime("%H:%M:%S", time.localtime(seconds))
    return f"[{moment}] {event['event']} {json.dumps(event.get('data', {}), ensure_ascii=False)}"


def completions(schema: Schema, line: str, begin: int, word: str) -> list[str]:
    """Return what the word at `begin` of a line may become; see `qmp_words.complete`."""
    return complete(schema, line[:begin].split(), word)


def history_file() -> Path:
    """Return where the lines of earlier shells are kept (XDG Base Directory: state)."""
    configured = os.environ.get("XDG_STATE_HOME", "")
    state = Path(configured) if os.path.isabs(configured) else Path.home() / ".local" / "state"
    return state / "nbdjobs" / "qmp_history"


def _run_lines(
    background: _Background,
    session: Session,
    schema: Schema,
    screen: Screen,
    lines: Iterator[str],
) -> ExitCode:
    code = ExitCode.DONE
    for line in lines:
        try:
            words = split_line(line)
            if words:
                answer = pretty(background.wait(call(session, schema, words)))
                with screen.writing:
                    print(answer, flush=True)
            if words[:1] == ["quit"]:
                break
        except KeyboardInterrupt:
            # The server goes on with the command, and one that is cancelled here would leave an
            # answer that nobody expects.
            print("no longer waiting for the answer", file=sys.stderr)
        except ServerGoneError:
            raise
        except CliError as error:
            with screen.writing:
                print(f"nbdjobs: {error}", file=sys.stderr, flush=True)
            code = ExitCode.FAILED
    return code


def _show_events(session: Session, screen: Screen) -> None:
    session.client.register_listener(screen)


@contextlib.contextmanager
def _editing(schema: Schema, screen: Screen) -> Iterator[None]:
    """Let lines be completed, and remembered for the next shell."""
    candidates: list[str] = []

    def completer(word: str, number: int) -> str | None:
        if number == 0:
            line, begin = readline.get_line_buffer(), readline.get_begidx()
            candidates[:] = completions(schema, line, begin, word)
        return candidates[number] if number < len(candidates) else None

    readline.set_pre_input_hook(screen.at_prompt)
    readline.set_completer(completer)
    readline.set_completer_delims(" \t")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    history = history_file()
    with contextlib.suppress(OSError):  # the first shell has no history yet
        readline.read_history_file(history)
    readline.set_history_length(HISTORY_LENGTH)
    try:
        yield
    finally:
        # A home that cannot be written is no reason to fail: history is a comfort.
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(history)
        readline.set_completer(None)
        readline.set_pre_input_hook(None)


class _Background:
    """An event loop in a thread of its own; a context manager that ends it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="qmp", daemon=True)

    def __enter__(self) -> _Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wait(_end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and return its result; Ctrl-C ends the wait only."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    @contextlib.contextmanager
    def session(self, path: Path) -> Iterator[Session]:
        """Open a session that lives there."""
        stack = contextlib.AsyncExitStack()
        session = self.wait(stack.enter_async_context(open_session(path)))
        try:
            yield session
        finally:
            self.wait(stack.aclose())


async def _end_tasks() -> None:
    """End what nobody waits for any more, such as a command left by Ctrl-C."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
