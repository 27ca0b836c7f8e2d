"""The model version on disk: the contract between training and the service."""
