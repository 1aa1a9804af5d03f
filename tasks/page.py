"""Pages for people: each one HTML file that loads nothing from anywhere, from a template beside its module."""

from pathlib import Path


def render(template: Path, filters: dict, **values) -> str:
    """The template with its values, every one of them escaped; a name it uses and nobody gave is an error."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= filters
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values)
