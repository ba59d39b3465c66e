"""Training, records, tables: everything around a learner that makes an experiment of it."""

from bpfree.experiments.train import InterruptedRunError, Trainer, TrainingConfig, evaluate

__all__ = ["InterruptedRunError", "Trainer", "TrainingConfig", "evaluate"]
