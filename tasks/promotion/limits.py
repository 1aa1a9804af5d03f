"""Which limits a version was judged by, and what of them leaves the decision to a person.

The registry is one for all profiles: a run of the demo may meet a real model in service there. A version that was held
to less than the champion was is never put in its place by a mode.
"""

import json

from tasks import config as configuration
from tasks.config import NAMED, Config, Gate
from tasks.promotion import in_service, registry

GROUP, LIMITS, PROFILE = "gate_group", "gate_limits", "profile"  # tags of a version

# What asks for less the higher it is; every other number of the gate asks for more.
CEILINGS = ("below", "tolerance", "max", "max_ece", "max_ratio", "min_positives", "near_threshold")


def binding(gate: Gate) -> dict[str, float]:
    """{"toxic.min": 0.85, …}: every number of the gate but those of checks that only warn."""
    values = configuration.flat(configuration.limits(gate))
    section = {key: key.rpartition(".")[0] for key in values}
    return {
        key: value
        for key, value in values.items()
        if not key.endswith(".binds") and values.get(f"{section[key]}.binds", True)
    }


def tags_of(gate: Gate) -> dict[str, str]:
    """What the registry keeps of the limits that a version is judged by."""
    return {GROUP: gate.group, LIMITS: json.dumps(binding(gate))}


def limits_in(tags: dict[str, str]) -> dict[str, float]:
    """The limits that a version's tags name; none where they have none, or a hand has written over them."""
    try:
        return {key: float(value) for key, value in json.loads(tags.get(LIMITS, "{}")).items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def softer(ours: dict[str, float], theirs: dict[str, float]) -> list[str]:
    """Where `ours` asks for less than `theirs`, in words."""
    found = []
    for key, limit in theirs.items():
        if key not in ours:
            found.append(f"{key} does not bind")
        elif ours[key] > limit if key.rpartition(".")[2] in CEILINGS else ours[key] < limit:
            found.append(f"{key} is {ours[key]:g}, not {limit:g}")
    return found


def for_a_person(config: Config, version: dict[str, str]) -> list[str]:
    """Why no mode may put a version with these tags in the champion's place; empty where nothing speaks against it."""
    serving = in_service.find(config)
    if serving is None:
        return []
    if serving.version is None:
        return [serving.warning]
    if serving.unsigned and not serving.from_before:
        return [serving.unsigned]
    theirs, name, why = registry.tags(config, serving.version), f"version {serving.version}, which serves,", []
    if theirs.get("base_sha256") != version.get("base_sha256"):
        why.append(f"{name} has another base model")
    if theirs.get(PROFILE) != version.get(PROFILE):
        why.append(f"{name} is of profile {theirs.get(PROFILE)}, this one of {version.get(PROFILE)}")
    before = limits_in(theirs)
    if not before:
        why.append(f"nobody knows by which limits {name} was judged")
    elif less := softer(limits_in(version), before):
        more = f", and {len(less) - NAMED} more" if len(less) > NAMED else ""
        of, by = theirs.get(GROUP, "no gate"), version.get(GROUP, "no gate")
        why.append(f"{name} was judged by harder limits ({of}, this one by {by}): {', '.join(less[:NAMED])}{more}")
    return why
