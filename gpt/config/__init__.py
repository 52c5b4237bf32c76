"""Every setting: dataclasses, their checks, and the parser for TOML and the command line.

``dataclass defaults < TOML < command line``. The TOML is flattened into ``--group.field=value``
words, which are put before the user's own words. So both get the same parser (tyro), the same types
and the same suggestions. Nothing here imports torch, so ``--help`` answers at once.
"""

from gpt.config.adapter import AdapterConfig, AdapterKind, RoundedBase
from gpt.config.checks import FOREIGN, MESSAGE, Bounds, UsageError, foreign, nearest, quoted
from gpt.config.commands import (
    Duplicates,
    EvaluateConfig,
    ExportConfig,
    InspectConfig,
    PrepareConfig,
    SampleConfig,
    Weights,
)
from gpt.config.data import (
    MADE_FROM_TEXT,
    TOKENIZERS,
    BadBytes,
    DataConfig,
    Pattern,
    TextFormat,
    TooLong,
    WindowKind,
    WindowOrder,
)
from gpt.config.generation import (
    CacheFormat,
    GenerationConfig,
    SamplingConfig,
    token_ids,
    unescaped,
)
from gpt.config.model import (
    Activation,
    Balance,
    Initial,
    Mlp,
    ModelConfig,
    Norm,
    NormPlacement,
    PositionScheme,
    RotaryScaling,
    RouterScore,
    with_present_names,
)
from gpt.config.objective import Baseline, ObjectiveConfig, ObjectiveKind
from gpt.config.serving import ServeConfig
from gpt.config.toml import parse, parse_training, to_toml, toml_tokens
from gpt.config.tools import DoctorConfig, Gpu, PlanConfig, ReportConfig
from gpt.config.training import (
    CheckpointConfig,
    Device,
    EvaluationConfig,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    TrainConfig,
    TrainingConfig,
    run_of,
)

__all__ = [
    "FOREIGN",
    "MADE_FROM_TEXT",
    "MESSAGE",
    "TOKENIZERS",
    "Activation",
    "AdapterConfig",
    "AdapterKind",
    "BadBytes",
    "Balance",
    "Baseline",
    "Bounds",
    "CacheFormat",
    "CheckpointConfig",
    "DataConfig",
    "Device",
    "DoctorConfig",
    "Duplicates",
    "EvaluateConfig",
    "EvaluationConfig",
    "ExportConfig",
    "GenerationConfig",
    "Gpu",
    "Initial",
    "InspectConfig",
    "LogConfig",
    "Mlp",
    "ModelConfig",
    "Norm",
    "NormPlacement",
    "ObjectiveConfig",
    "ObjectiveKind",
    "OptimizerConfig",
    "ParallelConfig",
    "Pattern",
    "PlanConfig",
    "PositionScheme",
    "Precision",
    "PrepareConfig",
    "ReportConfig",
    "RotaryScaling",
    "RoundedBase",
    "RouterScore",
    "SampleConfig",
    "SamplingConfig",
    "ServeConfig",
    "TextFormat",
    "TooLong",
    "TrainConfig",
    "TrainingConfig",
    "UsageError",
    "Weights",
    "WindowKind",
    "WindowOrder",
    "foreign",
    "nearest",
    "parse",
    "parse_training",
    "quoted",
    "run_of",
    "to_toml",
    "token_ids",
    "toml_tokens",
    "unescaped",
    "with_present_names",
]
