"""UserError: what the user can mend. RunError: what ends a run and is no bug."""


class UserError(Exception):
    """A wrong input. The command line prints each problem on one line and exits with code 2, no traceback.

    Each problem says what is wrong, where (a dotted configuration path or a file) and what to do.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(Exception):
    """What a run met on its way and could not go on with. The command line prints one line and exits with code 1."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
