"""translora: move fleets of LoRA adapters to a new base model, nearly without data (arXiv 2405.17258)."""

__version__ = "0.1.0"
