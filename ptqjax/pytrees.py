"""Frozen records that JAX traces: what `flax.struct` is, without the import of all of Flax (a third of JAX's own)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, TypeVar, dataclass_transform

import jax

_Node = TypeVar("_Node", bound="PyTreeNode")  # typing.Self is what beartype does not take under jaxtyping's hook


def static_field(**settings: Any) -> Any:
    """Returns a dataclass field that JAX does not trace: a part of the tree's structure, hashable and comparable.

    Args:
        **settings: As `dataclasses.field` takes them, `default` for one.
    """
    return dataclasses.field(metadata={"static": True}, **settings)


@dataclass_transform(field_specifiers=(static_field, dataclasses.field), frozen_default=True)
class PyTreeNode:
    """A base whose subclasses are frozen dataclasses and pytrees: fields are leaves or trees, static ones structure."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True)(cls)
        traced, static = [], []
        for field in dataclasses.fields(cls):
            (static if field.metadata.get("static") else traced).append(field.name)
        jax.tree_util.register_dataclass(cls, traced, static)

    def replace(self: _Node, **changes: Any) -> _Node:  # noqa: PYI019
        """Returns a record with other values in these fields."""
        return dataclasses.replace(self, **changes)
