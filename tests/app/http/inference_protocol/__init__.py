"""Tests of `app/http/inference_protocol`."""
