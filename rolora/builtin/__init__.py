"""The built-in model, a tiny Llama, and the built-in text: what runs where nothing is named."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
TEXT = Path(__file__).parent / "text"
