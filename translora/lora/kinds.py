"""The PEFT methods that are supported, by their `peft_type`. Importing this module loads neither torch nor ray."""

from translora.errors import InputError

MAX_RANK = 1024
"""Of a LoRA that is read, and of one that is made."""
VIRTUAL_TOKENS = frozenset({"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"})
METHODS = VIRTUAL_TOKENS | {"LORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "HRA", "MISS", "FOURIERFT", "RANDLORA", "C3A"}
"""Those that were tried (tests/unit/test_methods.py) and leave the base's own weights alone."""
SOURCES_ONLY = frozenset({"LOHA", "LOKR"})
"""PEFT (0.21) makes their tensors from the shape of the base's weights, which a partitioned base does not have."""


def check_kind(kind: object, where: str) -> str:
    """The method's name as PEFT writes it.

    Raises:
        InputError: it is none of METHODS.
    """
    name = kind.upper() if isinstance(kind, str) else ""
    if name not in METHODS:
        raise InputError(f"{where}peft_type is {kind!r}; supported are {', '.join(sorted(METHODS))}")
    return name
