"""What the configuration files say, as far as the forms of the DAGs show it: Airflow's environment has no Hydra.

Of Hydra it knows what these files need: a list of defaults (`group: file`, in a profile `override /group: file`), and
files that build on others of their group. It resolves no interpolation. tests/dags holds it against Hydra itself.
"""

from functools import cache
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PROFILES = ("demo", "gpu")


@cache
def configuration(profile: str) -> dict:
    """The sections and values under a profile, without any override."""
    root, chosen_by_profile = read("config"), read(f"profile/{profile}")
    chosen = {group: file for entry in root.pop("defaults") if isinstance(entry, dict) for group, file in entry.items()}
    for entry in chosen_by_profile.pop("defaults"):
        chosen |= {key.removeprefix("override /"): file for key, file in entry.items()}
    values = {group: section(group, file) for group, file in chosen.items() if group != "profile"}
    return merged(merged(values, root), chosen_by_profile)


def section(group: str, file: str) -> dict:
    """A file of a group on top of those of the same group that it builds on."""
    own, values = read(f"{group}/{file}"), {}
    for base in own.pop("defaults", []):
        if isinstance(base, str) and base != "_self_":
            values = merged(values, section(group, base))
    return merged(values, own)


def read(name: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")) or {}


def merged(under: dict, over: dict) -> dict:
    both = {key: merged(under[key], over[key]) for key in over if isinstance(under.get(key), dict) and over[key]}
    return {**under, **over, **both}


def value(key: str, profile: str):
    """What a key holds: value("data.max_samples", "demo") → 40000."""
    found = configuration(profile)
    for part in key.split("."):
        found = found[part]
    return found


def in_words(key: str) -> str:
    """What a key holds, for people: "40,000", or "4 (demo), 2 (gpu)" where the profiles differ."""
    values = {profile: shown(value(key, profile)) for profile in PROFILES}
    if len(set(values.values())) == 1:
        return values[PROFILES[0]]
    return ", ".join(f"{found} ({profile})" for profile, found in values.items())


def shown(found) -> str:
    return f"{found:,}" if isinstance(found, int | float) and not isinstance(found, bool) else str(found)


@cache
def limits() -> dict[str, bool | float]:
    """The gate's limits as shipped, by their keys: {"gate.toxic.min": 0.85, …}."""
    return flat(read("gate/default"), "gate.")


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, held in values.items():
        found |= flat(held, f"{prefix}{key}.") if isinstance(held, dict) else {f"{prefix}{key}": held}
    return found
