"""Typed configuration of the commands; each setting has a sentence.

    base.py       a base model, and what its actors get
    synthesis.py  generate, screen, label
    train.py      students, source adapters, discriminators
    own.py        what an adapter may have of its own
    fleet.py      `translora migrate`: the whole fleet file
    merge.py      `translora merge`, and the merges of a fleet file
    prepare.py    `translora prepare`: the owner's side

Importing these modules loads neither torch nor ray. Every field is checked before a model is touched; unknown keys are
refused.
"""

from translora.config.base import VLLM_EXECUTION_ONLY, BaseModelConfig, ResourceConfig
from translora.config.fleet import OPEN_GATE, AdapterEntry, FleetConfig, GateConfig, TrackingConfig
from translora.config.prepare import PrepareConfig, PrepareEntry, for_real_data, refuse_same_names
from translora.config.synthesis import SamplingConfig, Screen, SynthesisConfig
from translora.config.train import ChainSettings, Count, DiscriminatorConfig, LoraSettings, TrainConfig
from translora.config_file import load_config

__all__ = [
    "OPEN_GATE",
    "VLLM_EXECUTION_ONLY",
    "AdapterEntry",
    "BaseModelConfig",
    "ChainSettings",
    "Count",
    "DiscriminatorConfig",
    "FleetConfig",
    "GateConfig",
    "LoraSettings",
    "PrepareConfig",
    "PrepareEntry",
    "ResourceConfig",
    "SamplingConfig",
    "Screen",
    "SynthesisConfig",
    "TrackingConfig",
    "TrainConfig",
    "for_real_data",
    "load_config",
    "refuse_same_names",
]
