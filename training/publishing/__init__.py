"""Export of scoring modules to TorchScript, and changes of the model store."""
