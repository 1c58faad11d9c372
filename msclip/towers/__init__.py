"""Encoders that share nothing: each maps its input straight to embeddings. Transformers are in `model.py`, built from pairs."""
