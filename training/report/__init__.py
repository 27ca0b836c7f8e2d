"""The report of a version: pictures, curves and the model card."""
