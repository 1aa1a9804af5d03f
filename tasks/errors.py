"""The ways in which a step ends without having done its work; `commands.py` turns them into exit codes."""

import re


class UsageError(Exception):
    """Bad arguments, configuration or a missing file: what was asked cannot be done as asked (exit 2)."""


class StepFailed(Exception):
    """The step could not do its work. The message says what, against which limit, and the way out (exit 1)."""


class Unsuitable(StepFailed):
    """A StepFailed that another try would end in again: what the step was given does not do (exit 2: Airflow does not
    try again)."""


class Skip(Exception):
    """Nothing is wrong, but nothing that follows should run: no new data, gate not passed, rejected (exit 99).

    `result` is the verdict: it is kept in the run folder like the result of a step that finished.
    """

    def __init__(self, message: str, **result):
        super().__init__(message)
        self.result = result


def without_credentials(text: str) -> str:
    """The text with `***` for user and password in every address: what is shown, logged or kept is not for everybody.

    A password may hold an `@`; SQLAlchemy takes one with a `/`, too.
    """
    return re.sub(r"://([^/\s]*@|[^:/@\s]+:[^@\s]*@)", "://***@", text)
