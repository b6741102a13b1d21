"""``UserError``, the exception with a message for the user, and ``script``, which ends a program with it."""

import functools
import io
import os
import select
import sys
import time

CLOSED_PIPE, INTERRUPTED = 141, 130  # exit codes as shells report SIGPIPE and SIGINT


class UserError(ValueError):
    """An error that the user can correct: the message names the value, the limit and the fix.

    Scripts print the message as one line on standard error and end with exit code 2 (see :func:`script`).
    """


def missing_package(package: str, *, purpose: str, extra: str | None = None) -> UserError:
    """Return (do not raise) the error for an optional package that is not installed.

    ``extra`` is the name of minillm's extra that installs it, if there is one.
    """
    how = f"pip install {package}" + (f"  (or, in the folder of minillm: pip install -e '.[{extra}]')" if extra else "")
    return UserError(f"{purpose} needs the optional package '{package}', which is not installed: {how}")


def script(main):
    """Decorate a program's ``main(argv=None)``: user errors end the program with at most one line.

    A ``UserError`` is one line on standard error and exit code 2. Ctrl-C is one line and exit code 130. A closed
    standard output (``| head``) is no output and exit code 141. Characters that the terminal's encoding lacks are
    printed as escapes. If several ranks have the same error, only the first one prints it.
    """

    @functools.wraps(main)
    def run_main(argv: list[str] | None = None):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                is_ascii_locale = stream.errors == "surrogateescape"  # Python's setting for the locale C
                stream.reconfigure(encoding="utf-8" if is_ascii_locale else None, errors="backslashreplace")
        if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors == "surrogateescape":
            sys.stdin.reconfigure(encoding="utf-8")  # an ASCII locale does not tell the encoding of a pipe
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except UserError as error:
            after_the_first_rank()
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            after_the_first_rank()
            print("interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        except BrokenPipeError:
            if not _is_stdout_closed():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards the rest of the buffer
            raise SystemExit(CLOSED_PIPE) from None

    return run_main


def _is_stdout_closed() -> bool:
    try:
        sys.stdout.flush()
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except BrokenPipeError:
        return True
    except (AttributeError, OSError):  # no poll on this system, or a stream that is not a file
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def after_the_first_rank() -> None:
    """Wait 3 s on all ranks except the first: if that one ends with the same error, the launcher ends the others."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
