"""The base class of all config sections, the types of their keys, and what each key changes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from shodh_moe.base.paths import expand

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # torch takes no larger one
Fraction = Annotated[float, Field(ge=0, le=1)]
# A path as the user wrote it; the value has ~ and $NAME replaced.
PathText = Annotated[str, AfterValidator(expand)]
# Becomes part of a folder name and must not lead out of its parent folder.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+=-]*$", max_length=100)]

# The artefacts of a run, each made from those before it. A key names the first one whose identity includes the key's
# value: the dataset, tokenizer or latents folder that is named after it, the model whose weights need it, or the run
# folder that accepts no other value. A key that changes "nothing" may differ when a run folder is used again.
Artefact = Literal["data", "tokenizer", "latents", "model", "run", "nothing"]
ARTEFACTS: tuple[Artefact, ...] = get_args(Artefact)


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values keep their YAML type, and instances are immutable.

    The sections of a run's config declare which artefact their keys change: `setting` does so for one key, and a class
    argument for all keys of the class and its subclasses (``class TelemetryConfig(Section, changes="nothing")``).
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)
    all_change: ClassVar[Artefact | None] = None

    def __init_subclass__(cls, changes: Artefact | None = None, **config: Any) -> None:
        super().__init_subclass__(**config)

    @classmethod
    def __pydantic_init_subclass__(cls, changes: Artefact | None = None, **config: Any) -> None:
        super().__pydantic_init_subclass__(**config)
        if changes is not None:
            cls.all_change = changes


def setting(
    default: Any,
    *,
    changes: Artefact,
    for_tokenizer: bool = False,
    before: Any = None,
    description: str | None = None,
    **field: Any,
) -> Any:
    """Declare a key of a section: pydantic's ``Field``, plus the artefact that the key changes.

    Args:
        changes: the first artefact that the key changes.
        for_tokenizer: the tokenizer's training uses this key of the ``training`` section as well.
        before: what versions without this key did, if that is another value than the default; see `with_old_values`.
        field: further arguments of ``Field``, such as ``gt``.
    """
    extra: JsonDict = {"changes": changes, "for_tokenizer": for_tokenizer, "before": before}
    return Field(default, description=description, json_schema_extra=extra, **field)


def section_of(field: FieldInfo) -> type[Section] | None:
    """Return the section class of a key, also if the section is optional; None for a plain value."""
    for kind in (field.annotation, *get_args(field.annotation)):
        # Python 3.10 considers list[int] a class, which issubclass then refuses.
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def first_changed(kind: type[Section], key: str) -> Artefact:
    """Return the first artefact that a dotted key changes; "data", the first of all, for an unknown key.

    For a key that holds a section, this is the first artefact that any key in the section changes. A key inside a
    dictionary changes the same artefact as the dictionary.

    Raises:
        TypeError: neither or both of the key and its section declare what the key changes.
    """
    name, _, rest = key.partition(".")
    field = kind.model_fields.get(name)
    if field is None:
        return kind.all_change or ARTEFACTS[0]
    if section := section_of(field):
        if rest:
            return first_changed(section, rest)
        return min((first_changed(section, inner) for inner in section.model_fields), key=ARTEFACTS.index)
    own = field.json_schema_extra.get("changes") if isinstance(field.json_schema_extra, dict) else None
    if (own is None) == (kind.all_change is None):
        both = "both its section and the key itself say" if own else "neither its section nor the key itself says"
        raise TypeError(f"{kind.__name__}.{name}: {both} what it changes: use setting(..., changes=...) or the class's")
    return own or kind.all_change  # type: ignore[return-value]


def with_old_values(kind: type[Section], stored: Any) -> Any:
    """Return a section that an older version has stored, with values for the keys that it did not have.

    A config that is stored has all keys of its version, so a missing key is a newer one.
    """
    if not isinstance(stored, dict):
        return stored
    complete = dict(stored)
    for name, field in kind.model_fields.items():
        extra = field.json_schema_extra
        if (section := section_of(field)) and name in complete:
            complete[name] = with_old_values(section, complete[name])
        elif name not in complete and isinstance(extra, dict) and extra.get("before") is not None:
            complete[name] = extra["before"]
    return complete


def settings_that_change(section: Section, artefact: Artefact) -> dict[str, Any]:
    """Return the part of ``section.model_dump()`` whose keys have ``artefact`` as the first that they change."""
    return _select(type(section), section.model_dump(), artefact)


def taken_by_tokenizer(section: Section) -> dict[str, Any]:
    """Return the keys of a section, with their values, that the tokenizer's training uses as well."""
    extras = {name: field.json_schema_extra for name, field in type(section).model_fields.items()}
    return {
        name: getattr(section, name)
        for name, extra in extras.items()
        if isinstance(extra, dict) and extra.get("for_tokenizer")
    }


def _select(kind: type[Section], tree: dict[str, Any], artefact: Artefact) -> dict[str, Any]:
    selected: dict[str, Any] = {}
    for name, value in tree.items():
        inner = section_of(kind.model_fields[name])
        if inner and isinstance(value, dict):
            if part := _select(inner, value, artefact):
                selected[name] = part
        elif first_changed(kind, name) == artefact:
            selected[name] = value
    return selected
