"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend: the message names the value, the limit and the fix.

    Scripts end with this message as one line on standard error and exit code 2
    (see ``minillm.training.arguments.script``).
    """


def missing_package(package: str, *, purpose: str, extra: str | None = None) -> UserError:
    """Return (do not raise) the error for an optional package that is not installed.

    ``extra`` is the name of minillm's own extra that brings it, if there is one.
    """
    how = f"pip install {package}" + (f"  (or: pip install 'minillm[{extra}]')" if extra else "")
    return UserError(f"{purpose} needs the optional package '{package}', which is not installed: {how}")
