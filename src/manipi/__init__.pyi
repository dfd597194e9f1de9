# What __init__.py imports lazily, for type checkers and editors; tests/test_api.py holds both equal.

from manipi.data.dataset import Dataset, Episode, Feature
from manipi.data.norm_stats import compute_norm_stats
from manipi.data.open import open_dataset
from manipi.errors import (
    ActionError,
    BadValueError,
    BusyError,
    CheckpointError,
    ConfigError,
    DataError,
    DatasetFormatError,
    DatasetNotFoundError,
    DeadlineError,
    FetchError,
    IntegrityError,
    ManipiError,
    MissingFeatureError,
    NonFiniteError,
    NormStatsError,
    ObservationError,
    RequestError,
    SelfTestError,
    ServeError,
    SimulatorError,
    StorageError,
    TokenizerError,
    TrainingError,
    UnknownNameError,
    WeightsMismatchError,
)
from manipi.evaluate.suites import Suite
from manipi.exchange.exporting import export_checkpoint
from manipi.exchange.importing import import_checkpoint
from manipi.model.config import (
    Adapters,
    GemmaSize,
    LoRA,
    Pi0Config,
    Pi0FastConfig,
    Pi05Config,
    VisionSize,
)
from manipi.policy import Policy
from manipi.robots.robot import (
    ActionGroup,
    EndEffector,
    Gripper,
    Joints,
    LinkageGripper,
    Robot,
    State,
)
from manipi.serve.server import PolicyServer
from manipi.train.config import (
    AugmentConfig,
    ComputeConfig,
    DataConfig,
    DatasetConfig,
    LogConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from manipi.train.loop import train as run_training
from manipi.types import FieldStats, NormStats

__all__ = [
    "ActionError",
    "ActionGroup",
    "Adapters",
    "AugmentConfig",
    "BadValueError",
    "BusyError",
    "CheckpointError",
    "ComputeConfig",
    "ConfigError",
    "DataConfig",
    "DataError",
    "Dataset",
    "DatasetConfig",
    "DatasetFormatError",
    "DatasetNotFoundError",
    "DeadlineError",
    "EndEffector",
    "Episode",
    "Feature",
    "FetchError",
    "FieldStats",
    "GemmaSize",
    "Gripper",
    "IntegrityError",
    "Joints",
    "LinkageGripper",
    "LoRA",
    "LogConfig",
    "ManipiError",
    "MissingFeatureError",
    "NonFiniteError",
    "NormStats",
    "NormStatsError",
    "ObservationError",
    "OptimizerConfig",
    "Pi0Config",
    "Pi0FastConfig",
    "Pi05Config",
    "Policy",
    "PolicyServer",
    "RequestError",
    "Robot",
    "SelfTestError",
    "ServeError",
    "SimulatorError",
    "State",
    "StorageError",
    "Suite",
    "TokenizerError",
    "TrainConfig",
    "TrainingError",
    "UnknownNameError",
    "ValidationConfig",
    "VisionSize",
    "WeightsMismatchError",
    "compute_norm_stats",
    "export_checkpoint",
    "import_checkpoint",
    "load_policy",
    "open_dataset",
    "run_training",
]

__version__: str
load_policy = Policy.load
