"""The errors that a user can cause, and the exit status that each one ends a command with."""

from __future__ import annotations

# Of values that are quoted in a message: enough to recognise them by.
MOST_CHARACTERS = 300


class ZigzagError(Exception):
    """Base of every error that ends a command with one line on stderr."""

    exit_status = 1


class InputError(ZigzagError):
    """Bad input: what was read, what it held, what is allowed, what to try.

    Parameters
    ----------
    what
        The thing that is wrong: a flag, a file, a key of a file.
    got
        The offending value, as the user would recognise it.
    allowed
        What would have been accepted.
    hint
        What to try next; optional.
    """

    exit_status = 2

    def __init__(self, what: str, *, got: object, allowed: str, hint: str = "") -> None:
        self.what = what
        self.got = got
        self.allowed = allowed
        self.hint = hint
        line = f"{clipped(what)}: got {clipped(str(got))}; allowed: {allowed}"
        super().__init__(one_line(f"{line}; try: {hint}" if hint else line))

    def __reduce__(self) -> tuple[object, ...]:
        """Let it pass to other processes: an exception with keywords does not by itself."""
        return _input_error, (self.what, str(self.got), self.allowed, self.hint)

    def inside(self, where: str) -> InputError:
        """Return the same error told with the file and key that the value came from."""
        return InputError(
            f"{where}: {self.what}", got=self.got, allowed=self.allowed, hint=self.hint
        )


class InfeasibleError(ZigzagError):
    """The problem has no solution: which tier is short, by how many bytes, what would mend it."""

    exit_status = 3


class RunError(ZigzagError):
    """A failure while running that is not the user's input: a full disk, a read error."""

    exit_status = 1


def _input_error(what: str, got: str, allowed: str, hint: str) -> InputError:
    return InputError(what, got=got, allowed=allowed, hint=hint)


def clipped(text: str) -> str:
    """Return a text whose middle is left out where it is too long for a message."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]}...{text[-half:]}"


def one_line(text: str) -> str:
    """Fold all white space, so that a message stays one line whatever it quotes."""
    return " ".join(text.split())
