from .vicur_config import ViCuRConfig
from .vicur_trainer import ViCuRTrainer


__all__ = ["ViCuRConfig", "ViCuRTrainer"]
