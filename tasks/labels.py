"""The six labels, in the order every tensor, table and file of the project keeps."""

LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")

# A message is first of all toxic or not; the types say in which way. Only Jigsaw's rows have them.
TYPES = LABELS[1:]

LANGUAGES = ("en", "ru")


def answer(decisions) -> dict:
    """The answer to one message, from six yes/no decisions in the order of LABELS.

    The types count only for a toxic message, so that `labels` is empty whenever `toxic` is false.

    >>> answer([True, False, True, False, True, False])
    {'toxic': True, 'labels': ['obscene', 'insult']}
    """
    toxic = bool(decisions[0])
    return {"toxic": toxic, "labels": [name for name, yes in zip(TYPES, decisions[1:]) if toxic and yes]}
