"""Scores a backlog of images into Parquet files: in this process, or on a Ray cluster. Imports the service's code."""
