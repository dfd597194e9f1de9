"""The public API: π0, π0.5 and π0-FAST, trained, checked and served.

The names of `__all__` are the public API, which docs/api.md describes and which is kept stable; what is not in it may
move. Each is imported when it is first used: `import manipi` imports neither NumPy nor torch.
"""

import importlib
import operator
from typing import Any

__version__ = "0.1.0"

# Type checkers and editors read __init__.pyi instead.
_MODULES = {
    "robots.robot": "ActionGroup EndEffector Gripper Joints LinkageGripper Robot State",
    "data.dataset": "Dataset Episode Feature",
    "data.open": "open_dataset",
    "data.norm_stats": "compute_norm_stats",
    "types": "FieldStats NormStats Say",
    "model.config": (
        "Adapters FixedCodes GemmaSize HistoryConfig JointConfig LoRA Pi05Config Pi0Config Pi0FastConfig VisionSize"
    ),
    "train.config": (
        "AugmentConfig ComputeConfig DataConfig DatasetConfig LogConfig OptimizerConfig TrainConfig ValidationConfig"
    ),
    "evaluate.suites": "Suite",
    "policy": "Policy",
    "serve.server": "PolicyServer",
    "exchange.exporting": "export_checkpoint",
    "exchange.importing": "import_checkpoint",
    "errors": (
        "ActionError BadValueError BusyError CheckpointError ConfigError DataError DatasetFormatError "
        "DatasetNotFoundError DeadlineError FetchError IntegrityError ManipiError MissingFeatureError "
        "NonFiniteError NormStatsError ObservationError RequestError SelfTestError ServeError SimulatorError "
        "StorageError TokenizerError TrainingError UnknownNameError WeightsMismatchError"
    ),
}
_PLACES = {name: (module, name) for module, names in _MODULES.items() for name in names.split()} | {
    "load_policy": ("policy", "Policy.load"),
    "run_training": ("train.loop", "train"),
}
__all__ = sorted(_PLACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'manipi' has no attribute {name!r}")
    module, path = _PLACES[name]
    return operator.attrgetter(path)(importlib.import_module(f"manipi.{module}"))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
