"""Offline training: data → autoencoder → TorchScript → calibration → evaluation → one model version."""
