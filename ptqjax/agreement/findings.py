"""What `validate` finds, as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ptqjax.ir import Report
from ptqjax.transforms.saturation import Saturation


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """How far the integers of one tensor, or of several, are from the runtime's."""

    largest: int
    """Largest distance of an element, in steps."""
    num_equal: int
    """How many elements agree."""
    num_elements: int
    """The number of elements that were compared."""

    @property
    def equal(self) -> float:
        """The fraction of elements that agree; 1 where there are none."""
        return self.num_equal / self.num_elements if self.num_elements else 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """How far one quantized tensor of the integer program is from the runtime's."""

    tensor: str
    """The quantized tensor."""
    operator: str
    """What computes it: the operator behind which it is quantized."""
    is_foreseen: bool
    """Whether the integer program computes it by an operator on integers."""
    integer: bool
    """Whether the runtime computed it in integers, by the operator that also runs where nothing is exposed.

    Where exposing the integers keeps the runtime from fusing, what was compared is not what runs: False, and a warning.
    """
    alone: Distance
    """Recomputed from the runtime's own integers before it: this group's doing alone."""
    end_to_end: Distance
    """Computed all the way from the graph's inputs: with all that groups before it did."""

    @property
    def is_verified(self) -> bool:
        """Whether what was compared is what runs where nothing is exposed, as far as it is told by operators."""
        return self.integer or not self.is_foreseen

    @property
    def largest(self) -> int:
        """Largest distance of the group alone, in steps."""
        return self.alone.largest

    @property
    def num_elements(self) -> int:
        """How many elements were compared."""
        return self.alone.num_elements

    @property
    def equal(self) -> float:
        """The fraction of elements that agree in the group alone."""
        return self.alone.equal


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorSummary:
    """All groups of one operator."""

    operator: str
    """The operator."""
    num_groups: int
    """How many quantized tensors it computes."""
    num_integer: int
    """How many of these the runtime computed in integers."""
    alone: Distance
    """The distance of all elements of these groups, each recomputed from the runtime's own integers."""
    lowest_equal_alone: float
    """The fraction of elements that agree, in the group alone where it is lowest."""
    end_to_end: Distance
    """The distance of all elements, computed from the graph's inputs."""
    lowest_equal_end_to_end: float
    """The fraction of elements that agree end to end, in the tensor where it is lowest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Likeness:
    """How like two programs' outputs are, end to end."""

    sqnr: float
    """10 log10(sum y^2 / sum (y - y')^2) over all outputs, y the runtime's, in dB; infinite where they are equal."""
    agreement: float
    """Fraction of samples whose largest element of the first output is the same one."""
    equal: float
    """Fraction of elements that are the same to the bit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """What `validate` found."""

    groups: tuple[Group, ...]
    """Every quantized tensor, in the order of the graph."""
    integer: Likeness
    """The integer program against ONNX Runtime."""
    float: Likeness | None
    """The float program against ONNX Runtime; None where it was not compared."""
    num_samples: int
    """How many samples were compared."""
    fusion: Report
    """Which operators the runtime computes in integers, which not, and why."""
    saturating: tuple[Saturation, ...]
    """The weights at which the runtime's default kernels may saturate on an x86 without VNNI."""
    warnings: tuple[str, ...]
    """What the reader should know: groups fused otherwise than foreseen, weights that saturate elsewhere."""

    @property
    def largest(self) -> int:
        """Largest distance of all groups alone, in steps."""
        return max((group.largest for group in self.groups), default=0)

    @property
    def equal(self) -> float:
        """The fraction of elements that agree, in the group where it is lowest."""
        return min((group.equal for group in self.groups), default=1.0)

    @property
    def farthest(self) -> Group:
        """The group with the lowest fraction of elements that agree end to end; of equals the first."""
        return min(self.groups, key=lambda group: group.end_to_end.equal)

    @property
    def operators(self) -> tuple[OperatorSummary, ...]:
        """The groups summed up by operator, in the order in which operators first occur."""
        by_operator: dict[str, list[Group]] = {}
        for group in self.groups:
            by_operator.setdefault(group.operator, []).append(group)
        return tuple(_summary(operator, groups) for operator, groups in by_operator.items())

    @property
    def unverified(self) -> tuple[str, ...]:
        """The tensors that are computed in integers only where they are not looked at."""
        return tuple(group.tensor for group in self.groups if not group.is_verified)

    def as_dict(self) -> dict[str, Any]:
        """Returns the findings as plain data, for JSON."""
        return asdict(self) | {"operators": [asdict(each) for each in self.operators], "unverified": self.unverified}


def _summary(operator: str, groups: Sequence[Group]) -> OperatorSummary:
    alone, end_to_end = [group.alone for group in groups], [group.end_to_end for group in groups]
    return OperatorSummary(
        operator=operator,
        num_groups=len(groups),
        num_integer=sum(group.integer for group in groups),
        alone=_together(alone),
        lowest_equal_alone=min(each.equal for each in alone),
        end_to_end=_together(end_to_end),
        lowest_equal_end_to_end=min(each.equal for each in end_to_end),
    )


def _together(distances: Sequence[Distance]) -> Distance:
    return Distance(
        largest=max(each.largest for each in distances),
        num_equal=sum(each.num_equal for each in distances),
        num_elements=sum(each.num_elements for each in distances),
    )
