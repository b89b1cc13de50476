"""Checkpoints: any nested state as safetensors and JSON, written so that none is ever lost."""
