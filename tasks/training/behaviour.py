"""Behavioural checks: expectations/behaviour.yaml says what the model should do, a message at a time."""

from pathlib import Path

import numpy as np
import yaml

from tasks.text import clean

CHECKS = Path(__file__).parents[2] / "expectations" / "behaviour.yaml"


def check(probability_of_toxic, threshold: float, file: Path = CHECKS) -> dict:
    """Pass rates per kind of check, and what failed.

    Args:
        probability_of_toxic: a function from messages to float [N].
        threshold: above it a message is toxic.
    """
    cases = yaml.safe_load(file.read_text(encoding="utf-8"))
    texts = sorted({text for kind in cases.values() for case in kind for text in _texts(case)})
    score = dict(zip(texts, np.asarray(probability_of_toxic([clean(text) for text in texts])).tolist()))

    def toxic(text: str) -> bool:
        return score[text] >= threshold

    passed = {
        "minimum": lambda case: toxic(case["text"]) == case["toxic"],
        "invariance": lambda case: all(toxic(variant) == toxic(case["text"]) for variant in case["variants"]),
        "direction": lambda case: score[case["worse"]] >= score[case["text"]],
    }
    results = [
        {
            "kind": kind,
            "passed": bool(passed[kind](case)),
            "scores": {text: round(score[text], 3) for text in _texts(case)},
        }
        for kind, its_cases in cases.items()
        for case in its_cases
    ]
    return {
        "pass_rate": float(np.mean([r["passed"] for r in results])),
        "kinds": {kind: float(np.mean([r["passed"] for r in results if r["kind"] == kind])) for kind in cases},
        "failed": [r for r in results if not r["passed"]],
    }


def _texts(case: dict) -> list[str]:
    return [case["text"], *case.get("variants", []), *([case["worse"]] if "worse" in case else [])]
