"""A student that begins as its source adapter, where both bases have modules of one shape (an update of one base)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from translora.bundle import BaseInfo
from translora.bundle.modules import linear_modules
from translora.errors import InputError
from translora.lora.banked import Factors
from translora.lora.peft_io import LoraWeights, truncated
from translora.lora.targets import resolve_targets


def copy_adapter(source: LoraWeights, weights: Mapping[str, Factors], scaling: float) -> None:
    """Put s B A of a source adapter into a student's factors, module by module, in place.

    Training-free copies keep part of an adapter's gain on a related base (LoRA-X, arXiv 2501.16559); here they are
    where the training begins. A source of a smaller rank leaves the student's other rows of A random and columns of B
    zero, as they are in a new LoRA; of a larger one the best approximation of the student's rank is taken. Modules that
    the source does not adapt begin as they are; see `not_copied` for those that only the source adapts.

    Args:
        weights: of a new student, A [r, in] and B [out, r] by module, float32.
        scaling: the student's s.
    """
    for name, (lora_A, lora_B) in weights.items():
        if name not in source.modules:
            continue
        own_A, own_B = (factor.float() for factor in source.modules[name])
        rank = min(len(own_A), len(lora_A))
        if len(own_A) > rank:
            own_A, own_B = truncated(own_A, own_B, rank)
        lora_A[:rank] = own_A
        lora_B[:, :rank] = own_B * (source.scaling[name] / scaling)


def not_copied(source: LoraWeights, student_modules: Iterable[str]) -> list[str]:
    """Last parts of the names of modules that a source adapts and its student does not: that much of it gets lost."""
    return sorted({name.rpartition(".")[2] for name in source.modules.keys() - set(student_modules)})


def check_warm_start(source: BaseInfo, target: BaseInfo, target_modules: list[str] | str) -> None:
    """Refuse bases whose adapted modules are not of one shape.

    Raises:
        InputError: names the first module that differs.
    """
    old, new = linear_modules(source), linear_modules(target)
    own = resolve_targets(new, target_modules, target.name, "distill.lora.target_modules")
    ends = {name.rpartition(".")[2] for name in own}
    if extra := sorted(name for name in old.keys() - set(own) if name.rpartition(".")[2] in ends):
        raise InputError(
            f"distill.warm_start: {extra[0]} is in {source.name} and not in {target.name}; an adapter can be copied "
            "between bases of one shape only; set warm_start to false"
        )
    for name in own:
        if old.get(name) != new[name]:
            has = f"is {old[name]} there" if name in old else "is not there"
            raise InputError(
                f"distill.warm_start: {name} is {new[name]} (out, in) in {target.name} and {has}, in {source.name}; an "
                "adapter can be copied between bases of one shape only; set warm_start to false"
            )
