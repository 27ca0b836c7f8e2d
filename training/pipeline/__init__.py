"""The pipelines from data to a version: training, series of trainings, recalibration."""
