"""Pages for people: each one HTML file that loads nothing from anywhere, from a template beside its module.

A template may include page.css and page.js, which lie here beside: the look and the hidden texts that pages share.
"""

from pathlib import Path


def render(template: Path, filters: dict, **values) -> str:
    """The template with its values, every one of them escaped; a name it uses and nobody gave is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)
