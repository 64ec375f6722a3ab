"""Which linear modules an adapter adapts, by the names that a base has for them.

Importing this module loads neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from translora.errors import InputError

ALL_LINEAR = "all-linear"
"""Every linear module but the output head, as in PEFT."""
SAME_PART = (
    frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "Wqkv", "qkv", "c_attn", "wq", "wk", "wv"}),
    frozenset({"o_proj", "dense", "out_proj", "wo"}),
    frozenset({"gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h", "c_fc", "w1", "w3"}),
    frozenset({"down_proj", "fc2", "dense_4h_to_h", "w2"}),
)
"""Names that families have for the same part of a layer; some fuse what others keep apart."""


def resolve_targets(linears: Iterable[str], targets: Sequence[str] | str, base: str, setting: str) -> list[str]:
    """Full names of the linear modules that `targets` name, in the order of the base.

    A base of another family has other names: they are never guessed, because a fused module is adapted as a whole,
    and that is another adapter.

    Args:
        linears: full names of the base's linear modules without the head.
        targets: last parts of names, or all-linear.
        base: its name, for the error.
        setting: where the targets come from.

    Raises:
        InputError: the base has none, or not one of this name; says which there are, and what stands in its place.
    """
    linears = list(linears)
    if not linears:
        raise InputError(f"{setting}: {base} has no linear modules (its layers are of another kind); take another base")
    if isinstance(targets, str):
        return linears
    lasts = {name.rpartition(".")[2] for name in linears}
    missing = [target for target in targets if target not in lasts]
    if missing:
        instead = sorted({name for part in SAME_PART if part & set(missing) for name in part & lasts})
        hint = f"; in its place there is {', '.join(instead)}" if instead else ""
        raise InputError(
            f"{setting}: {', '.join(missing)} not in {base}; it has {', '.join(sorted(lasts))}{hint}; "
            f"or write {ALL_LINEAR} in its place, without brackets"
        )
    return [name for name in linears if name.rpartition(".")[2] in targets]
