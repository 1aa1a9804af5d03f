"""The three ways in which a step ends without having done its work; `commands.py` turns them into exit codes."""


class UsageError(Exception):
    """Bad arguments, configuration or a missing file: what was asked cannot be done as asked (exit 2)."""


class StepFailed(Exception):
    """The step could not do its work. The message says what, against which limit, and the way out (exit 1)."""


class Skip(Exception):
    """Nothing is wrong, but nothing that follows should run: no new data, gate not passed, rejected (exit 99).

    `result` is the verdict: it is kept in the run folder like the result of a step that finished.
    """

    def __init__(self, message: str, **result):
        super().__init__(message)
        self.result = result
